"""ResNets of identity and convolution blocks in which every BatchNormalization is followed by a Scale.

The layer names (`res2a_branch2a`, `bn2a_branch2a`, `scale2a_branch2a`, ...) are a file format: weights are matched by
them, ours and those of the Caffe-style ancestors.

Reference: [He et al., 2015](https://arxiv.org/abs/1512.03385);
https://github.com/flyyufelix/cnn_finetune (resnet_152.py) and https://github.com/foamliu/Car-Recognition, whose names
and epsilon these networks keep. Differences from those: photos enter as uint8, the first pooling is padded (a grid of
56 x 56 at 224 px, as in the paper and in keras.applications), and the last pooling is global, so that any size fits.
"""

import string

import keras
from keras import layers

from carflavor.networks.blocks import conv_bn_scale

BATCH_NORM_EPSILON = 1.1e-5  # of the Caffe-style ancestors
# Arguments of the Rescaling layer, which makes floats of the bytes.
PLUS_MINUS_ONE = {"scale": 1 / 127.5, "offset": -1.0}
# What the ImageNet weights of Caffe and of keras.applications were trained with, in RGB: the means are taken off, and 0
# to 255 stays the unit (keras/src/applications/imagenet_utils.py, mode "caffe").
IMAGENET_MEANS = {"scale": 1.0, "offset": [-123.68, -116.779, -103.939]}
# With zeros each block begins as the identity, which a deep network learns from more easily (Goyal et al., 2017,
# https://arxiv.org/abs/1706.02677, section 5.1).
_LAST_GAMMA = "zeros"


def build_resnet18(num_classes, input_size):
    """Builds the ResNet-18 (basic blocks); see `build_resnet`."""
    return build_resnet([2, 2, 2, 2], _basic_block, num_classes, input_size, "resnet18")


def build_resnet50(num_classes, input_size, rescaling=PLUS_MINUS_ONE):
    """Builds the ResNet-50 (bottleneck blocks); see `build_resnet`."""
    return build_resnet([3, 4, 6, 3], _bottleneck_block, num_classes, input_size, "resnet50", rescaling)


def build_resnet101(num_classes, input_size, rescaling=PLUS_MINUS_ONE):
    """Builds the ResNet-101 (bottleneck blocks); see `build_resnet`."""
    return build_resnet([3, 4, 23, 3], _bottleneck_block, num_classes, input_size, "resnet101", rescaling)


def build_resnet152(num_classes, input_size, rescaling=PLUS_MINUS_ONE):
    """Builds the ResNet-152 (bottleneck blocks); see `build_resnet`."""
    return build_resnet([3, 8, 36, 3], _bottleneck_block, num_classes, input_size, "resnet152", rescaling)


def build_resnet(stage_sizes, block, num_classes, input_size, name, rescaling=PLUS_MINUS_ONE):
    """Builds a ResNet with conv -> BN -> Scale.

    Args:
        stage_sizes: Number of blocks of each stage; each stage has twice the filters of the one before, the first 64.
        block: Function `(x, filters, stride, project, label)` that adds one residual block.
        num_classes: Number of outputs.
        input_size: Side of the square input in pixels.
        name: Name of the Keras model.
        rescaling: Arguments of the Rescaling layer: `PLUS_MINUS_ONE`, or `IMAGENET_MEANS` for ImageNet weights.

    Returns:
        `keras.Model` from uint8 RGB photos `(batch, input_size, input_size, 3)` to float32 probabilities
        `(batch, num_classes)`. Floats are made inside it, one batch at a time.
    """
    photos = keras.Input((input_size, input_size, 3), dtype="uint8", name="photos")
    x = layers.Rescaling(**rescaling, name="rescaling")(photos)
    x = _convolve(x, 64, 7, 2, "conv1", "bn_conv1", "scale_conv1")
    x = layers.Activation("relu", name="conv1_relu")(x)
    # A ReLU came before, so padding with zeros is padding with the least value, as a padded max-pooling needs.
    x = layers.ZeroPadding2D(1, name="pool1_zeropadding")(x)
    x = layers.MaxPooling2D(3, strides=2, name="pool1")(x)
    for index, num_blocks in enumerate(stage_sizes):
        stage = index + 2
        for position, letter in enumerate(_block_letters(num_blocks)):
            first = position == 0
            stride = 2 if first and index > 0 else 1
            x = block(x, 64 * 2**index, stride, first, f"{stage}{letter}")
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    # float32 under every precision policy: probabilities are what people compare and sum.
    probabilities = layers.Dense(num_classes, activation="softmax", dtype="float32", name="fc")(x)
    return keras.Model(photos, probabilities, name=name)


def _block_letters(num_blocks):
    # As in Caffe: a, b, c in short stages; a, b1, b2, ... in long ones.
    if num_blocks <= 6:
        return list(string.ascii_lowercase[:num_blocks])
    return ["a"] + [f"b{i}" for i in range(1, num_blocks)]


def _basic_block(x, filters, stride, project, label):
    # The first block of ResNet-18 keeps both size and width, so it needs no projection.
    project = project and (stride != 1 or x.shape[-1] != filters)
    y = _branch(x, filters, 3, stride, label, "2a")
    y = layers.Activation("relu", name=f"res{label}_branch2a_relu")(y)
    y = _branch(y, filters, 3, 1, label, "2b", _LAST_GAMMA)
    return _join(y, _branch(x, filters, 1, stride, label, "1") if project else x, label)


def _bottleneck_block(x, filters, stride, project, label):
    y = _branch(x, filters, 1, stride, label, "2a")
    y = layers.Activation("relu", name=f"res{label}_branch2a_relu")(y)
    y = _branch(y, filters, 3, 1, label, "2b")
    y = layers.Activation("relu", name=f"res{label}_branch2b_relu")(y)
    y = _branch(y, 4 * filters, 1, 1, label, "2c", _LAST_GAMMA)
    return _join(y, _branch(x, 4 * filters, 1, stride, label, "1") if project else x, label)


def _branch(x, filters, kernel_size, stride, label, branch, gamma_initializer="ones"):
    suffix = f"{label}_branch{branch}"
    names = (f"res{suffix}", f"bn{suffix}", f"scale{suffix}")
    return _convolve(x, filters, kernel_size, stride, *names, gamma_initializer)


def _join(branch, shortcut, label):
    x = layers.Add(name=f"res{label}")([branch, shortcut])
    return layers.Activation("relu", name=f"res{label}_relu")(x)


def _convolve(x, filters, kernel_size, stride, conv_name, bn_name, scale_name, gamma_initializer="ones"):
    if kernel_size > 1:
        x = layers.ZeroPadding2D(kernel_size // 2, name=f"{conv_name}_zeropadding")(x)
    convolution = layers.Conv2D(
        filters, kernel_size, strides=stride, use_bias=False, kernel_initializer="he_normal", name=conv_name
    )
    return conv_bn_scale(
        x,
        convolution,
        bn_name,
        scale_name,
        epsilon=BATCH_NORM_EPSILON,
        bn_affine=True,
        gamma_initializer=gamma_initializer,
    )
