"""Reads the weights that Keras saved, of any version from 1 on, with h5py only: no layer of the file is built or run.

There are two layouts, each bare or inside something else:
    - That of Keras 1 and 2, and of keras.applications to this day: attributes list the layers, and of each layer the
      weights. A whole model saved as `.h5` has it in the group `model_weights`.
    - That of Keras 3: a group a layer, with its name as attribute and its weights numbered. `.weights.h5` is it, and
      `.keras` is a zip archive that holds it.

Reference: https://github.com/keras-team/keras, keras/src/legacy/saving/legacy_h5_format.py and
keras/src/saving/saving_lib.py.
"""

import zipfile

import h5py
import numpy as np


def read_layers(path):
    """Reads the weights of a model's layers.

    Args:
        path: File of weights or of a whole model, `.h5`, `.weights.h5` or `.keras`.

    Returns:
        Dict from each layer's name to the list of its weights as float32 arrays, in the order of Keras: kernel and bias
        of a convolution; gamma, beta, moving mean and moving variance of a BatchNormalization.

    Raises:
        ValueError: If the file is something else, is damaged, or its weights lie outside it.
    """
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                return _read_file(file)
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo("model.weights.h5")
            # Keras compresses nothing, so no small file unfolds into a large one.
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("expected model.weights.h5 uncompressed in the archive")
            with archive.open(info) as member, h5py.File(member) as file:
                return _read_file(file)
    # h5py raises OSError, KeyError, RuntimeError, TypeError and more for a damaged file.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights of Keras: {error}") from error


def _read_file(file):
    root = _member(file, "model_weights") if "model_weights" in file else file
    names = _names(root, "layer_names")
    seen = set()
    if names:
        return {name: _read_legacy_layer(_member(root, name), seen) for name in names}
    layers = _member(root, "layers")
    return dict(_read_layer(_member(layers, name), seen) for name in layers)


def _read_legacy_layer(group, seen):
    return [_array(_member(group, name), seen) for name in _names(group, "weight_names")]


def _names(group, attribute):
    # HDF5 limits an attribute to 64 KB: Keras splits longer lists into layer_names0, layer_names1, ...
    chunks = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(chunks)}" in group.attrs:
        chunks.append(f"{attribute}{len(chunks)}")
    names = [name for chunk in chunks for name in group.attrs[chunk]]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _read_layer(group, seen):
    weights = _member(group, "vars")
    name = weights.attrs.get("name")
    if not isinstance(name, str):
        raise ValueError("expected the layers' names, which newer versions of Keras 3 save, got none")
    return name, [_array(_member(weights, str(index)), seen) for index in range(len(weights))]


def _member(group, path):
    # A file of someone else's: a link out of it would read what lies on this machine into a model.
    for name in path.split("/"):
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"expected {path} in {group.name}, got nothing or a link")
        group = group[name]
    return group


def _array(dataset, seen):
    # External and virtual datasets lie outside the file; one that is larger than what is stored, or is named again and
    # again, makes large arrays out of a small file. Keras writes none of these.
    if dataset.external or dataset.is_virtual or dataset.id.get_storage_size() < dataset.nbytes:
        raise ValueError(f"expected all {dataset.nbytes} bytes of {dataset.name} in the file, got fewer")
    address = h5py.h5o.get_info(dataset.id).addr
    if address in seen:
        raise ValueError(f"expected each array once, got {dataset.name} again")
    seen.add(address)
    return np.asarray(dataset, np.float32)
