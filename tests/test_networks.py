import keras
import pytest
from keras import layers

from carflavor.layers import Scale
from carflavor.networks import NETWORKS, Network, build
from carflavor.networks.resnet import _basic_block, build_resnet


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 96),
        ("resnet50", 224),
        ("resnet101", 224),
        ("resnet152", 224),
        ("efficientnet-lite0", 224),
        ("efficientnet-lite1", 240),
        ("efficientnet-lite2", 260),
    ],
)
def test_networks_know_the_size_they_are_meant_for(name, size):
    assert NETWORKS[name].input_size == size


def test_those_are_all_networks():
    assert len(NETWORKS) == 7


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_normalization_stands_between_a_convolution_and_its_scale(name):
    network = build(name, num_classes=2, input_size=32)
    assert network.name == name
    readers = {}
    for layer in network.layers[1:]:
        for tensor in layer.input if isinstance(layer.input, list) else [layer.input]:
            readers.setdefault(id(tensor), []).append(layer)
    convolutions = [layer for layer in network.layers if type(layer) in (layers.Conv2D, layers.DepthwiseConv2D)]
    normalizations = [layer for layer in network.layers if type(layer) is layers.BatchNormalization]
    scales = [layer for layer in network.layers if type(layer) is Scale]
    assert len(convolutions) == len(normalizations) == len(scales) > 0
    for convolution in convolutions:
        (normalization,) = readers[id(convolution.output)]
        (scale,) = readers[id(normalization.output)]
        assert type(normalization) is layers.BatchNormalization
        assert type(scale) is Scale
        assert not convolution.use_bias
        assert normalization.momentum == 0.9


@pytest.mark.parametrize(
    ("name", "weights", "scale", "offset"),
    [
        ("resnet50", "none", 1 / 127.5, -1.0),
        ("efficientnet-lite0", "none", 1 / 128, -127 / 128),
        ("efficientnet-lite0", "imagenet", 1 / 128, -127 / 128),
    ],
)
def test_scaling_of_the_input_belongs_to_the_network(name, weights, scale, offset):
    rescaling = build(name, num_classes=2, input_size=32, weights=weights).get_layer("rescaling")
    assert (rescaling.scale, rescaling.offset) == (scale, offset)


def test_build_takes_a_network_without_imagenet_weights(monkeypatch):
    def build_tiny(num_classes, input_size):
        return build_resnet([1], _basic_block, num_classes, input_size, "tiny")

    monkeypatch.setitem(NETWORKS, "tiny", Network(build_tiny, 32))
    network = build("tiny", num_classes=3, input_size=40)
    assert isinstance(network, keras.Model)
    assert (network.input_shape, network.output_shape) == ((None, 40, 40, 3), (None, 3))
    with pytest.raises(ValueError, match="Expected weights=none for network=tiny: .* Received: weights='imagenet'"):
        build("tiny", num_classes=3, input_size=40, weights="imagenet")


@pytest.mark.parametrize("name", ["resnet50", "efficientnet-lite0"])
def test_build_refuses_weights_that_are_nowhere(name):
    with pytest.raises(
        ValueError, match="Expected weights to be none, imagenet or a file. Received: weights='imagnet'"
    ):
        build(name, num_classes=2, input_size=32, weights="imagnet")
