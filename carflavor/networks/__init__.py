"""The networks that can be trained, by name."""

from collections.abc import Callable
from dataclasses import dataclass

from carflavor.networks import resnet


@dataclass(frozen=True)
class Network:
    """One network by name.

    Attributes:
        build: Function `(num_classes, input_size) -> keras.Model` from uint8 RGB photos to probabilities.
        input_size: Side of the square input in pixels that the network is meant for.
    """

    build: Callable
    input_size: int


NETWORKS = {
    # Small on purpose: for the sample, for trials and for tests.
    "resnet18": Network(resnet.build_resnet18, input_size=96),
    "resnet50": Network(resnet.build_resnet50, input_size=224),
    "resnet101": Network(resnet.build_resnet101, input_size=224),
    "resnet152": Network(resnet.build_resnet152, input_size=224),
}
