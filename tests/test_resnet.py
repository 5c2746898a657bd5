from collections import Counter

import keras
import numpy as np
import pytest

from carflavor.networks import NETWORKS
from carflavor.networks.resnet import build_resnet152


@pytest.fixture(scope="module")
def resnet152():
    return build_resnet152(num_classes=196, input_size=224)


def test_resnet152_has_the_ancestors_layers(resnet152):
    kinds = Counter(type(layer).__name__ for layer in resnet152.layers)
    assert kinds == {
        "InputLayer": 1,
        "Rescaling": 1,  # ours: photos enter as uint8
        "Conv2D": 155,
        "BatchNormalization": 155,
        "Scale": 155,
        "Activation": 151,
        "Add": 50,
        "ZeroPadding2D": 52,  # one more: the padded pooling
        "MaxPooling2D": 1,
        "GlobalAveragePooling2D": 1,  # theirs: AveragePooling2D and Flatten
        "Dense": 1,
    }
    # The ancestors' 722, with Rescaling and the pooling's padding, and one layer instead of two before the head.
    assert len(resnet152.layers) == 722 + 2 - 1


def test_resnet152_has_the_ancestors_parameters(resnet152):
    # 58.8 million, as flyyufelix/cnn_finetune's resnet_152.py with a head for 196 classes. By hand from torchvision's
    # 60,192,808 with 1000 classes: without its head of 2,049,000 and two numbers for each of 75,712 channels,
    # 57,992,384 are left for the convolutions.
    parameters = Counter()
    for layer in resnet152.layers:
        parameters[type(layer).__name__] += layer.count_params()
    assert +parameters == {
        "Conv2D": 57_992_384,
        "BatchNormalization": 302_848,
        "Scale": 151_424,
        "Dense": 401_604,
    }
    assert resnet152.count_params() == 58_848_260


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv1_relu", (None, 112, 112, 64)),
        ("pool1", (None, 56, 56, 64)),
        ("res2c_relu", (None, 56, 56, 256)),
        ("res3b7_relu", (None, 28, 28, 512)),
        ("res4b35_relu", (None, 14, 14, 1024)),
        ("res5c_relu", (None, 7, 7, 2048)),
        ("avg_pool", (None, 2048)),
        ("fc", (None, 196)),
    ],
)
def test_resnet152_shapes(resnet152, name, shape):
    assert resnet152.get_layer(name).output.shape == shape


def test_resnet152_names_are_those_weights_are_matched_by(resnet152):
    names = {layer.name for layer in resnet152.layers}
    for suffix in ("2a_branch1", "2a_branch2a", "3b7_branch2b", "4b35_branch2c", "5c_branch2c"):
        assert {f"res{suffix}", f"bn{suffix}", f"scale{suffix}"} <= names
    assert {"conv1", "bn_conv1", "scale_conv1", "res2a", "res2a_relu", "res5c_relu"} <= names
    assert resnet152.get_layer("bn2a_branch2a").epsilon == 1.1e-5


@pytest.mark.parametrize(
    ("name", "convolutions", "parameters"),
    # torchvision's counts with 1000 classes: 11,689,512, 25,557,032 and 44,549,160.
    [
        ("resnet18", 20, 11_689_512 - 513_000 + 5_130 + 4 * 4_800),
        ("resnet50", 53, 25_557_032 - 2_049_000 + 20_490 + 4 * 26_560),
        ("resnet101", 104, 44_549_160 - 2_049_000 + 20_490 + 4 * 52_672),
    ],
)
def test_smaller_resnets(name, convolutions, parameters):
    network = NETWORKS[name].build(num_classes=10, input_size=64)
    kinds = Counter(type(layer).__name__ for layer in network.layers)
    assert kinds["Conv2D"] == kinds["BatchNormalization"] == kinds["Scale"] == convolutions
    assert network.count_params() == parameters
    assert network.input_shape == (None, 64, 64, 3)
    assert network.output_shape == (None, 10)


def test_network_takes_bytes_and_gives_probabilities():
    network = NETWORKS["resnet18"].build(num_classes=3, input_size=32)
    assert network.inputs[0].dtype == "uint8"
    photos = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), "uint8")
    probabilities = keras.ops.convert_to_numpy(network(photos))
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), [1, 1], rtol=1e-6)
    assert not np.allclose(probabilities[0], probabilities[1])
