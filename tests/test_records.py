import json
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import carflavor
from carflavor.data.records import RecordFile, RecordWriter

ROOT = Path(carflavor.__file__).parents[1]
FIRST, SECOND = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
ROWS = [
    {"images": {"box": FIRST}, "label": 1, "source": "a.jpg", "size": (40, 60), "box": (1, 2, 3, 4)},
    {"images": {"box": SECOND}, "label": 0, "source": "b.jpg", "size": (30, 50), "box": (5, 6, 7, 8)},
]
CLASS_NAMES = ["Ram C/V", "Škoda"]
# By hand over what the format says: name, shape and bytes of each dataset.
DIGEST = "14ef41bb065aa91cb3f9d8469740425c4006f0fe2d0f1999dfe1c09af480ce6c"


def write(path, rows=ROWS, class_names=CLASS_NAMES, settings=None, crops=("box",)):
    with RecordWriter(path, crops, 2, class_names, settings or {"seed": 7}) as writer:
        for row in rows:
            writer.append(**row)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    with RecordFile(write(tmp_path / "new" / "train.h5")) as file:
        assert len(file) == 2
        assert file.crops == ("box",)
        assert file.image_size == 2
        assert file.class_names == ["Ram C/V", "Škoda"]
        assert file.sources == ["a.jpg", "b.jpg"]
        assert file.settings == {"format_version": 1, "seed": 7}
        for values, expected, dtype in (
            (file.labels, [1, 0], "int64"),
            (file.sizes, [[40, 60], [30, 50]], "int32"),
            (file.boxes, [[1, 2, 3, 4], [5, 6, 7, 8]], "int32"),
            (file.images("box")[1], [[[12, 13, 14], [15, 16, 17]], [[18, 19, 20], [21, 22, 23]]], "uint8"),
        ):
            assert values.tolist() == expected
            assert values.dtype == dtype
        assert file.images("box").chunks == (1, 2, 2, 3)
        assert file.images("box").compression is None


def test_crops_are_kept_apart(tmp_path):
    rows = [{**row, "images": {"full": SECOND, "box": FIRST}} for row in ROWS]
    with RecordFile(write(tmp_path / "train.h5", rows, crops=("box", "full"))) as file:
        assert file.crops == ("box", "full")
        np.testing.assert_array_equal(file.images("box")[:], [FIRST, FIRST])
        np.testing.assert_array_equal(file.images("full")[:], [SECOND, SECOND])


def test_a_crop_that_is_not_there_is_refused(tmp_path):
    with RecordFile(write(tmp_path / "train.h5")) as file, pytest.raises(ValueError) as error:
        file.images("full")
    assert str(error.value) == (
        f"{tmp_path}/train.h5: expected images of crop=full, got a file with only box; run preprocess with crop=both"
    )


def test_a_view_of_a_larger_photo_is_stored(tmp_path):
    photo = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with RecordFile(write(tmp_path / "train.h5", [{**ROWS[0], "images": {"box": photo[1:3, 1:3]}}])) as file:
        assert file.images("box")[0, :, 0].tolist() == [[15, 16, 17], [27, 28, 29]]


@pytest.mark.parametrize("image", [np.zeros((3, 2, 3), np.uint8), np.zeros((2, 2, 3), np.float32)])
def test_an_image_of_another_form_is_refused(tmp_path, image):
    with pytest.raises(
        ValueError, match=r"Expected uint8 images of shape \(2, 2, 3\). Received: (uint8 \(3|float32 \(2)"
    ):
        write(tmp_path / "train.h5", [{**ROWS[0], "images": {"box": image}}])
    assert names(tmp_path) == []


def test_thousands_of_class_names_fit(tmp_path):
    class_names = [f"Škoda Octavia Combi number {number} 2012" for number in range(5000)]
    with RecordFile(write(tmp_path / "train.h5", class_names=class_names)) as file:
        assert file.class_names == class_names


def test_a_file_without_rows(tmp_path):
    with RecordFile(write(tmp_path / "train.h5", [])) as file:
        assert (len(file), file.sources, file.boxes.shape, file.images("box").shape) == (0, [], (0, 4), (0, 2, 2, 3))


def test_digest(tmp_path):
    with RecordFile(write(tmp_path / "train.h5")) as file:
        assert file.digest() == DIGEST


@pytest.mark.parametrize(
    "change",
    [
        {"images": {"box": FIRST + np.array([0, 0, 1], np.uint8)}},
        {"label": 0},
        {"source": "c.jpg"},
        {"size": (40, 61)},
        {"box": (1, 2, 3, 5)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_digest_sees_every_column(tmp_path, change):
    with RecordFile(write(tmp_path / "train.h5", [{**ROWS[0], **change}, ROWS[1]])) as file:
        assert file.digest() != DIGEST


@pytest.mark.parametrize("change", [{"class_names": ["Ram C/V", "Skoda"]}, {"settings": {"seed": 8}}])
def test_digest_sees_what_the_file_says_of_all_rows(tmp_path, change):
    with RecordFile(write(tmp_path / "train.h5", **change)) as file:
        assert file.digest() != DIGEST


def test_the_name_appears_at_the_end(tmp_path):
    path = tmp_path / "train.h5"
    with RecordWriter(path, ("box",), 2, CLASS_NAMES, {}) as writer:
        writer.append(**ROWS[0])
        assert not path.exists()
        writer.finish()
        assert not path.exists()
    assert names(tmp_path) == ["train.h5"]


def test_an_error_leaves_the_older_file(tmp_path):
    path = write(tmp_path / "train.h5")
    with pytest.raises(KeyboardInterrupt), RecordWriter(path, ("box",), 2, CLASS_NAMES, {}) as writer:
        writer.append(**ROWS[0])
        raise KeyboardInterrupt
    assert names(tmp_path) == ["train.h5"]
    with RecordFile(path) as file:
        assert file.digest() == DIGEST


def test_a_killed_writer_leaves_the_older_file(tmp_path):
    path = write(tmp_path / "train.h5")
    code = """
import sys, time
import numpy as np
from carflavor.data.records import RecordWriter
with RecordWriter(sys.argv[1], ("box",), 2, ["a"], {}) as writer:
    for row in range(200):
        writer.append({"box": np.zeros((2, 2, 3), np.uint8)}, 0, "a.jpg", (2, 2), (0, 0, 2, 2))
    print("half way", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
    partial, whole = names(tmp_path)
    assert partial.startswith(".train.h5.")
    assert whole == "train.h5"
    with RecordFile(path) as file:
        assert file.digest() == DIGEST
    write(path)
    assert names(tmp_path) == ["train.h5"]


def test_rows_do_not_gather_in_memory(tmp_path):
    code = """
import resource, sys
import numpy as np
from carflavor.data.records import RecordWriter
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with RecordWriter(sys.argv[1], ("box",), 512, ["a"], {}) as writer:
    for row in range(160):
        writer.append({"box": np.full((512, 512, 3), row, np.uint8)}, 0, "a.jpg", (2, 2), (0, 0, 2, 2))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    path = tmp_path / "train.h5"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert path.stat().st_size > 120_000_000
    assert int(done.stdout) < 40_000  # kB


def test_two_writers_of_one_file_do_not_harm_each_other(tmp_path):
    path = tmp_path / "train.h5"
    with RecordWriter(path, ("box",), 2, CLASS_NAMES, {"seed": 7}) as first:
        first.append(**ROWS[0])
        write(path, ROWS[:1])
        with RecordFile(path) as file:
            assert len(file) == 1
        first.append(**ROWS[1])
        # Finished, but without its name.
        first.finish()
        write(path, ROWS[:1])
    assert names(tmp_path) == ["train.h5"]
    with RecordFile(path) as file:
        assert file.digest() == DIGEST


def replace(name, values):
    def change(file):
        del file[name]
        if values is not None:
            file[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("settings", json.dumps({"format_version": 2})), "format version 2, not 1"),
        (replace("settings", json.dumps({"seed": 7})), "'format_version'"),
        (replace("settings", "{"), "Expecting property name"),
        (replace("settings", None), "settings"),
        (replace("labels", None), "labels"),
        (replace("boxes", None), "boxes"),
        (replace("class_names", [1, 2]), "string datatype"),
        (replace("images", None), "neither images/box nor images/full"),
        (replace("labels", [1, 2]), "labels from 1 to 2 for 2 classes"),
        (replace("labels", [-1, 0]), "labels from -1 to 0 for 2 classes"),
        (replace("labels", [0, 1, 1]), "3 labels beside {'sources': 2, 'sizes': 2, 'boxes': 2}"),
        (replace("sources", ["a.jpg"]), "2 labels beside {'sources': 1, 'sizes': 2, 'boxes': 2}"),
        (replace("images/box", np.zeros((1, 2, 2, 3), np.uint8)), "images/box of shape (1, 2, 2, 3) beside 2 labels"),
        (replace("images/box", np.zeros((2, 2, 3, 3), np.uint8)), "images/box of shape (2, 2, 3, 3) beside 2 labels"),
        (replace("images/box", np.zeros((2, 2, 2, 3))), "images/box of float64, not uint8"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, change, message):
    path = write(tmp_path / "train.h5")
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(ValueError) as error:
        RecordFile(path)
    assert str(error.value).startswith(f"{path}: expected a record file as preprocess writes it, got: ")
    assert message in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"<html>404</html>", "cut off"])
def test_what_is_no_hdf5_is_refused(tmp_path, content):
    path = write(tmp_path / "train.h5")
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:3000] if content == "cut off" else content)
    with pytest.raises(ValueError) as error:
        RecordFile(path)
    assert str(error.value).startswith(f"{path}: expected a record file as preprocess writes it, got: ")
