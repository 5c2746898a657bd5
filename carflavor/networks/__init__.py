"""The networks that can be trained, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import keras

from carflavor.networks import efficientnet_lite, resnet
from carflavor.networks.weights import load_imagenet_weights


@dataclass(frozen=True)
class Network:
    """One network by name.

    Attributes:
        build: Function `(num_classes, input_size) -> keras.Model` from uint8 RGB photos to probabilities.
        input_size: Side of the square input in pixels that the network is meant for.
        build_for_imagenet: The same with the input scaled as ImageNet weights expect it, or None where there are no
            such weights.
    """

    build: Callable
    input_size: int
    build_for_imagenet: Callable | None = None


def _resnet(build, input_size):
    return Network(build, input_size, partial(build, rescaling=resnet.IMAGENET_MEANS))


def _efficientnet_lite(build, input_size):
    return Network(build, input_size, build)


NETWORKS = {
    # Small on purpose: for the sample, for trials and for tests.
    "resnet18": Network(resnet.build_resnet18, input_size=96),
    "resnet50": _resnet(resnet.build_resnet50, input_size=224),
    "resnet101": _resnet(resnet.build_resnet101, input_size=224),
    "resnet152": _resnet(resnet.build_resnet152, input_size=224),
    "efficientnet-lite0": _efficientnet_lite(efficientnet_lite.build_efficientnet_lite0, input_size=224),
    "efficientnet-lite1": _efficientnet_lite(efficientnet_lite.build_efficientnet_lite1, input_size=240),
    "efficientnet-lite2": _efficientnet_lite(efficientnet_lite.build_efficientnet_lite2, input_size=260),
}


def build(name, num_classes, input_size, weights="none"):
    """Builds a network, with random weights or with those of ImageNet.

    Args:
        name: One of `NETWORKS`.
        num_classes: Number of outputs.
        input_size: Side of the square input in pixels.
        weights: `none`, `imagenet`, or the path of a file of ImageNet weights; see
            `carflavor.networks.weights.load_imagenet_weights`. The classifier is random in any case.

    Returns:
        `keras.Model` from uint8 RGB photos `(batch, input_size, input_size, 3)` to float32 probabilities
        `(batch, num_classes)`.

    Raises:
        ValueError: If there are no such weights for this network.
        ConnectionError: If the weights cannot be downloaded.
    """
    network = NETWORKS[name]
    if weights == "none":
        return network.build(num_classes, input_size)
    if network.build_for_imagenet is None:
        able = ", ".join(other for other in NETWORKS if NETWORKS[other].build_for_imagenet)
        raise ValueError(
            f"Expected weights=none for network={name}: there are ImageNet weights for {able}. "
            f"Received: weights={str(weights)!r}"
        )
    model = network.build_for_imagenet(num_classes, input_size)
    load_imagenet_weights(model, name, weights)
    return model


def copy_at_size(network, input_size, clone_layer=None):
    """Returns a copy of a network with the same values, for photos of another size.

    Args:
        network: `keras.Model` whose layers are the same for every size of photo.
        input_size: Side of the square input in pixels.
        clone_layer: Function from a layer to its copy; None has Keras copy layers as they are.
    """
    photos = keras.Input((input_size, input_size, 3), dtype=network.input.dtype, name=network.input.name)
    copy = keras.models.clone_model(network, input_tensors=photos, clone_function=clone_layer)
    copy.set_weights(network.get_weights())
    return copy


def with_new_head(network, num_classes, input_size):
    """Returns a copy of a trained network whose last layer is new, for other classes or another size.

    Args:
        network: `keras.Model` as `build` returns it.
        num_classes: Number of outputs.
        input_size: Side of the square input in pixels.

    Returns:
        `keras.Model` as `build` returns it.
    """
    copy = copy_at_size(network, input_size)
    head = type(network.layers[-1]).from_config(network.layers[-1].get_config() | {"units": num_classes})
    return keras.Model(copy.input, head(copy.layers[-1].input), name=network.name)
