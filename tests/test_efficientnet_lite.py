import json
from pathlib import Path

import keras
import numpy as np
import pytest
from golden.photos import draw_photo
from keras import layers

from carflavor.networks import NETWORKS, build
from carflavor.networks.efficientnet_lite import build_efficientnet_lite0

GOLDEN = json.loads((Path(__file__).parent / "golden" / "efficientnet_lite_features.json").read_text())


def pooled_features(network, photos):
    features = keras.Model(network.input, network.get_layer("avg_pool").output)
    return keras.ops.convert_to_numpy(features(photos))


@pytest.fixture(scope="module")
def lite0():
    return build_efficientnet_lite0(num_classes=1000, input_size=224)


@pytest.mark.parametrize(
    ("name", "convolutions", "learned", "channels"),
    # Learned parameters as published, 4.652, 5.417 and 6.092 million with 1000 classes.
    [
        ("efficientnet-lite0", 49, 4_652_008, 21_008),
        ("efficientnet-lite1", 64, 5_416_680, 26_832),
        ("efficientnet-lite2", 64, 6_092_072, 29_048),
    ],
)
def test_layers_and_parameters(name, convolutions, learned, channels):
    network = NETWORKS[name].build(num_classes=1000, input_size=64)
    kinds = [type(layer).__name__ for layer in network.layers]
    assert kinds.count("Conv2D") + kinds.count("DepthwiseConv2D") == convolutions
    assert kinds.count("BatchNormalization") == kinds.count("Scale") == convolutions
    assert sum(weight.shape.num_elements() for weight in network.trainable_weights) == learned
    # A mean and a variance for each channel, and no gamma and beta beside those of the Scales.
    assert network.count_params() == learned + 2 * channels


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("stem_relu", (None, 112, 112, 32)),
        ("block0_project_scale", (None, 112, 112, 16)),
        ("block1_expand_relu", (None, 112, 112, 96)),
        ("block2_add", (None, 56, 56, 24)),
        ("block4_add", (None, 28, 28, 40)),
        ("block7_add", (None, 14, 14, 80)),
        ("block10_add", (None, 14, 14, 112)),
        ("block14_add", (None, 7, 7, 192)),
        ("block15_project_scale", (None, 7, 7, 320)),
        ("head_relu", (None, 7, 7, 1280)),
        ("avg_pool", (None, 1280)),
        ("fc", (None, 1000)),
    ],
)
def test_lite0_shapes(lite0, name, shape):
    assert lite0.get_layer(name).output.shape == shape


def test_epsilon_and_momentum(lite0):
    batch_norm = lite0.get_layer("block3_depthwise_bn")
    assert (batch_norm.epsilon, batch_norm.momentum) == (1e-3, 0.9)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("size", ["75", "192", "own"])
def test_features_equal_those_of_the_pytorch_model(name, size):
    size = NETWORKS[name].input_size if size == "own" else int(size)
    network = build(name, num_classes=2, input_size=size, weights="imagenet")
    features = pooled_features(network, np.stack([draw_photo(size, index) for index in range(2)]))
    # Features reach from 0 to about 5. Measured: at most 2e-6 of the largest.
    np.testing.assert_allclose(features[:, ::40], GOLDEN[name][str(size)], rtol=1e-4, atol=1e-5)


def test_saved_network_gives_the_same_probabilities(tmp_path):
    network = build("efficientnet-lite0", num_classes=5, input_size=64, weights="imagenet")
    photos = np.stack([draw_photo(64, index) for index in range(2)])
    probabilities = keras.ops.convert_to_numpy(network(photos))
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (2, 5))
    np.testing.assert_allclose(probabilities.sum(axis=1), [1, 1], rtol=1e-6)
    assert not np.allclose(probabilities[0], probabilities[1])
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(loaded(photos)), probabilities)


@pytest.mark.parametrize(("name", "rate"), [(f"efficientnet-lite{n}", rate) for n, rate in enumerate((0.2, 0.2, 0.3))])
def test_dropout_of_the_paper_and_nothing_else_is_dropped(name, rate):
    network = NETWORKS[name].build(num_classes=2, input_size=32)
    (dropout,) = (layer for layer in network.layers if isinstance(layer, layers.Dropout))
    assert dropout.rate == rate
    assert dropout.input is network.get_layer("avg_pool").output
    assert network.get_layer("fc").input is dropout.output


def test_drop_connect_grows_with_depth_and_drops_whole_photos():
    network = build_efficientnet_lite0(num_classes=2, input_size=32, dropout=0.5, drop_connect=0.16)
    rates = {layer.name: layer.rate for layer in network.layers if isinstance(layer, layers.Dropout)}
    # Of 16 blocks, those with a shortcut.
    with_shortcut = (2, 4, 6, 7, 9, 10, 12, 13, 14)
    assert rates == {"dropout": 0.5, **{f"block{i}_drop": pytest.approx(0.01 * i) for i in with_shortcut}}
    drop = network.get_layer("block14_drop")
    drop.rate = 0.5
    dropped = keras.ops.convert_to_numpy(drop(np.ones((64, 2, 2, 3), "float32"), training=True))
    assert {tuple(np.unique(photo)) for photo in dropped} == {(0.0,), (2.0,)}


def test_random_kernels_keep_the_variance(lite0):
    # He et al., 2015: 2 over the numbers that each output is summed from, or given to: 9 of a depthwise 3 x 3 kernel.
    assert np.std(lite0.get_layer("block9_expand_conv").kernel) == pytest.approx((2 / 672) ** 0.5, rel=0.02)
    assert np.std(lite0.get_layer("block5_depthwise_conv").kernel) == pytest.approx((2 / 9) ** 0.5, rel=0.05)


@pytest.mark.parametrize("size", [32, 33])
def test_smallest_and_odd_sizes(size):
    network = build_efficientnet_lite0(num_classes=2, input_size=size)
    assert network.get_layer("head_relu").output.shape == (None, -(-size // 32), -(-size // 32), 1280)
