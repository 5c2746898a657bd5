"""EfficientNet-Lite 0, 1 and 2, in which every BatchNormalization is followed by a Scale.

EfficientNets for small devices: ReLU6 instead of swish, no squeeze-and-excitation, and a stem and a head that do not
grow with the network. The layer names (`stem_conv`, `block3_expand_conv`, `block3_expand_bn`, `block3_expand_scale`,
...) are a file format: `weights.py` matches weights by them.

Convolutions are padded as TensorFlow's "SAME" does it, at every size: where the stride is 2, an even size is padded on
its far side only. This is how the weights were trained. (The PyTorch model of https://github.com/ml-illustrated/
EfficientNet-Lite-PyTorch pads the same at the size that it was built for; fed with another size, it keeps that padding
and its features are shifted by a pixel.)

Reference: [Tan and Le, 2019](https://arxiv.org/abs/1905.11946);
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite, whose block table, widths, depths,
dropout and epsilon these are.
"""

import math

import keras
from keras import layers

from carflavor.networks.blocks import conv_bn_scale

BATCH_NORM_EPSILON = 1e-3
# Blocks, kernel size, stride of the first block, expansion and filters of each stage, before width and depth.
_STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
_STEM_FILTERS, _HEAD_FILTERS = 32, 1280
# (x - 127) / 128, which the weights were trained with: MEAN_RGB and STDDEV_RGB of efficientnet_lite_builder.py in
# tensorflow/tpu. The packages that bring the weights say nothing of it, and the README of their PyTorch model shows
# ImageNet's mean and deviation. What speaks in the files themselves, over Lite0, 1 and 2, on 400 Stanford car crops at
# 224 px: the variance after the stem's convolution, as multiple of the running variance that training left (median of
# the channels), and the share of photos that ImageNet's top-1 class calls a car, with its mean probability.
#   (x - 127) / 128        0.93  0.97  0.95     95.0 %  94.8 %  97.3 %     0.46  0.48  0.63
#   x / 127.5 - 1          0.94  0.97  0.95     95.0 %  94.5 %  97.3 %     0.46  0.48  0.63
#   ImageNet mean and std  4.62  4.83  4.69     95.5 %  88.7 %  91.2 %     0.49  0.47  0.62
#   x / 255                0.25  0.25  0.24     92.2 %  92.5 %  97.0 %     0.43  0.45  0.60
# The first two cannot be told apart by this; of these, TensorFlow's own.
_RESCALING = {"scale": 1 / 128, "offset": -127 / 128}


def build_efficientnet_lite0(num_classes, input_size, dropout=0.2, drop_connect=0.0):
    """Builds the EfficientNet-Lite0, meant for 224 px; see `build_efficientnet_lite`."""
    return build_efficientnet_lite(1.0, 1.0, num_classes, input_size, "efficientnet-lite0", dropout, drop_connect)


def build_efficientnet_lite1(num_classes, input_size, dropout=0.2, drop_connect=0.0):
    """Builds the EfficientNet-Lite1, meant for 240 px; see `build_efficientnet_lite`."""
    return build_efficientnet_lite(1.0, 1.1, num_classes, input_size, "efficientnet-lite1", dropout, drop_connect)


def build_efficientnet_lite2(num_classes, input_size, dropout=0.3, drop_connect=0.0):
    """Builds the EfficientNet-Lite2, meant for 260 px; see `build_efficientnet_lite`."""
    return build_efficientnet_lite(1.1, 1.2, num_classes, input_size, "efficientnet-lite2", dropout, drop_connect)


def build_efficientnet_lite(width, depth, num_classes, input_size, name, dropout, drop_connect):
    """Builds an EfficientNet-Lite with conv -> BN -> Scale.

    Args:
        width: Multiple of the filters of Lite0, except those of the stem and the head.
        depth: Multiple of the blocks of Lite0's stages, except the first and the last.
        num_classes: Number of outputs.
        input_size: Side of the square input in pixels, at least 32.
        name: Name of the Keras model.
        dropout: Share of the features that training sets to zero before the classifier.
        drop_connect: Share of the photos for which training leaves out the last block's branch; it grows from zero with
            the block's position (stochastic depth, Huang et al., 2016, https://arxiv.org/abs/1603.09382).

    Returns:
        `keras.Model` from uint8 RGB photos `(batch, input_size, input_size, 3)` to float32 probabilities
        `(batch, num_classes)`. Floats are made inside it, one batch at a time.
    """
    photos = keras.Input((input_size, input_size, 3), dtype="uint8", name="photos")
    x = layers.Rescaling(**_RESCALING, name="rescaling")(photos)
    x = _convolve(x, "stem", _STEM_FILTERS, 3, 2)
    x = layers.Activation("relu6", name="stem_relu")(x)
    blocks = list(_blocks(width, depth))
    for index, block in enumerate(blocks):
        x = _inverted_residual(x, f"block{index}", *block, drop_connect * index / len(blocks))
    x = _convolve(x, "head", _HEAD_FILTERS, 1, 1)
    x = layers.Activation("relu6", name="head_relu")(x)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    # float32 under every precision policy: probabilities are what people compare and sum.
    probabilities = layers.Dense(num_classes, activation="softmax", dtype="float32", name="fc")(x)
    return keras.Model(photos, probabilities, name=name)


def _blocks(width, depth):
    for stage, (repeats, kernel_size, stride, expansion, filters) in enumerate(_STAGES):
        if 0 < stage < len(_STAGES) - 1:
            repeats = math.ceil(depth * repeats)
        for position in range(repeats):
            yield kernel_size, stride if position == 0 else 1, expansion, _round_filters(width * filters)


def _round_filters(filters):
    """Rounds to a multiple of 8, and never down by more than a tenth."""
    rounded = max(8, int(filters + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * filters else rounded + 8


def _inverted_residual(x, name, kernel_size, stride, expansion, filters, drop_connect):
    y = x
    if expansion > 1:
        y = _convolve(y, f"{name}_expand", expansion * x.shape[-1], 1, 1)
        y = layers.Activation("relu6", name=f"{name}_expand_relu")(y)
    y = _convolve_depthwise(y, f"{name}_depthwise", kernel_size, stride)
    y = layers.Activation("relu6", name=f"{name}_depthwise_relu")(y)
    y = _convolve(y, f"{name}_project", filters, 1, 1)
    if stride > 1 or x.shape[-1] != filters:
        return y
    if drop_connect:
        # One draw a photo: the whole branch or nothing of it.
        y = layers.Dropout(drop_connect, noise_shape=(None, 1, 1, 1), name=f"{name}_drop")(y)
    return layers.Add(name=f"{name}_add")([y, x])


def _convolve(x, name, filters, kernel_size, stride):
    convolution = layers.Conv2D(
        filters,
        kernel_size,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer=_initializer(),
        name=f"{name}_conv",
    )
    return _normalize(x, name, convolution)


def _convolve_depthwise(x, name, kernel_size, stride):
    convolution = layers.DepthwiseConv2D(
        kernel_size,
        strides=stride,
        padding="same",
        use_bias=False,
        depthwise_initializer=_initializer(),
        name=f"{name}_conv",
    )
    return _normalize(x, name, convolution)


def _normalize(x, name, convolution):
    return conv_bn_scale(x, convolution, f"{name}_bn", f"{name}_scale", epsilon=BATCH_NORM_EPSILON, bn_affine=False)


def _initializer():
    # He's, by what a kernel gives and not by what it takes: Keras counts all channels as input of a depthwise kernel,
    # each of which takes one. A new one each time: an initializer draws the same numbers whenever it is asked.
    return keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="truncated_normal")
