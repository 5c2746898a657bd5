import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from carflavor.networks.keras_files import read_layers


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Activation("relu", name="relu")(x)
    model = keras.Model(inputs, layers.Conv2D(2, 1, use_bias=False, name="another_conv")(x))
    random = np.random.default_rng(0)
    model.set_weights([random.normal(size=array.shape) for array in model.get_weights()])
    return model


def save(model, path):
    model.save_weights(path) if path.name.endswith(".weights.h5") else model.save(path)
    return path


@pytest.mark.parametrize("file_name", ["model.keras", "model.h5", "model.weights.h5"])
def test_layers_by_name(tmp_path, model, file_name):
    read = read_layers(save(model, tmp_path / file_name))
    assert {name for name, weights in read.items() if weights} == {"conv", "bn", "another_conv"}
    for layer in ("conv", "bn", "another_conv"):
        for ours, theirs in zip(read[layer], model.get_layer(layer).get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_order_is_that_of_the_names_and_long_lists_come_in_chunks(tmp_path):
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file.attrs["layer_names0"] = [b"second"]
        file.attrs["layer_names1"] = [b"first"]
        for name in ("first", "second"):
            group = file.create_group(name)
            group.attrs["weight_names"] = [b"gamma:0", b"beta:0"]
            group["gamma:0"], group["beta:0"] = np.float32([1, 2]), np.float32([3])
    read = read_layers(tmp_path / "weights.h5")
    assert list(read) == ["second", "first"]
    assert [weights.tolist() for weights in read["first"]] == [[1, 2], [3]]


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


@pytest.mark.parametrize("file_name", ["model.h5", "model.weights.h5"])
@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        ("external link", "got nothing or a link"),
        ("soft link", "got nothing or a link"),
        ("external data", "expected all 432 bytes of .* in the file, got fewer"),
        ("virtual data", "expected all 432 bytes of .* in the file, got fewer"),
        ("declared only", "expected all 4000000000000 bytes of .* in the file, got fewer"),
        ("nothing", "got nothing or a link"),
    ],
)
def test_weights_outside_the_file_are_refused(tmp_path, model, file_name, replacement, message):
    path, secret = save(model, tmp_path / file_name), tmp_path / "secret"
    secret.write_bytes(bytes(1000))
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["data"] = np.zeros((3, 3, 3, 4), "float32")
    with h5py.File(path, "r+") as file:
        names = []
        file.visititems(lambda name, item: names.append(name) if getattr(item, "shape", None) == (3, 3, 3, 4) else None)
        group, name = file[names[0]].parent, names[0].rpartition("/")[2]
        del group[name]
        if replacement == "external link":
            group[name] = h5py.ExternalLink(str(tmp_path / "other.h5"), "data")
        elif replacement == "soft link":
            group[name] = h5py.SoftLink("/elsewhere")
        elif replacement == "external data":
            group.create_dataset(name, (3, 3, 3, 4), "float32", external=[(str(secret), 0, 432)])
        elif replacement == "virtual data":
            layout = h5py.VirtualLayout((3, 3, 3, 4), "float32")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "data", (3, 3, 3, 4))
            group.create_virtual_dataset(name, layout)
        elif replacement == "declared only":
            group.create_dataset(name, (10**6, 10**6), "float32", chunks=(1000, 1000))
    with pytest.raises(ValueError, match=f"{file_name} cannot be read as weights of Keras: .*{message}"):
        read_layers(path)


def test_compressed_archive_is_refused(tmp_path, model):
    source = save(model, tmp_path / "model.keras")
    with zipfile.ZipFile(source) as stored, zipfile.ZipFile(tmp_path / "bomb.keras", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("model.weights.h5", stored.read("model.weights.h5"))
    with pytest.raises(ValueError, match="bomb.keras cannot .*: expected model.weights.h5 uncompressed"):
        read_layers(tmp_path / "bomb.keras")


def test_file_without_layer_names_is_refused(tmp_path, model):
    path = save(model, tmp_path / "model.weights.h5")
    with h5py.File(path, "r+") as file:
        del file["layers/conv2d/vars"].attrs["name"]
    with pytest.raises(ValueError, match="expected the layers' names, which newer versions of Keras 3 save"):
        read_layers(path)


@pytest.mark.parametrize("again", ["name", "hard link", "layer"])
def test_array_that_is_named_again_is_refused(tmp_path, again):
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        layer = file.create_group("layer")
        layer["kernel"] = np.zeros(1000, "float32")
        layer["bias"] = layer["kernel"] if again == "hard link" else np.zeros(3, "float32")
        file["other"] = layer
        file.attrs["layer_names"] = [b"layer", b"other"] if again == "layer" else [b"layer"]
        layer.attrs["weight_names"] = [b"kernel", b"kernel"] if again == "name" else [b"kernel", b"bias"]
    with pytest.raises(ValueError, match="weights.h5 cannot be read .*: expected each array once, got .* again"):
        read_layers(tmp_path / "weights.h5")


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "file.h5").write_bytes(content)
    with pytest.raises(ValueError, match="file.h5 cannot be read as weights of Keras: ."):
        read_layers(tmp_path / "file.h5")
