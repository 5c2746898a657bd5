import json
import logging
import os
import re
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_layouts import write_annotations, write_devkit

import carflavor
from carflavor.data import sample, stores
from carflavor.data.drawing import draw_photo
from carflavor.data.records import RecordFile
from carflavor.image import encode_jpeg
from carflavor.preprocess import WORK_FOLDER, PreprocessConfig, open_split, preprocess, sample_records, write_records

ROOT = Path(carflavor.__file__).parents[1]
RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (120, 120, 120)
HOSTILE = "<b>Ram</b> C/V"


def write_photo(path, left, right):
    """Writes a photo of 60 x 40 pixels, exact: its left half of one colour, its right of another."""
    halves = np.array([[left] * 30 + [right] * 30] * 40, np.uint8)
    path.write_bytes(cv2.imencode(".png", halves[..., ::-1])[1].tobytes())


def draw(number):
    """Draws a photo that is no near-duplicate of the others."""
    return draw_photo(number % 8, np.random.default_rng([3, number]))[0]


def write_drawing(path, number):
    """Writes a drawing, squeezed to 60 x 40 pixels."""
    path.write_bytes(encode_jpeg(cv2.resize(draw(number), (60, 40), interpolation=cv2.INTER_AREA)))


@pytest.fixture
def devkit(tmp_path):
    """Two classes with two training photos each and a test photo, whose car is in its right third."""
    box = (np.uint8(41), np.uint8(1), np.uint8(60), np.uint8(40))
    train = [(*box, np.uint8(class_id), f"{number}.jpg") for number, class_id in enumerate((1, 2, 1, 2), start=1)]
    write_devkit(tmp_path / "cars", [HOSTILE, "Škoda"], train, [(*box, np.uint8(2), "1.jpg")])
    for number in range(1, 5):
        write_drawing(tmp_path / "cars" / "cars_train" / f"{number}.jpg", number)
    write_photo(tmp_path / "cars" / "cars_test" / "1.jpg", GREY, BLUE)
    return tmp_path / "cars"


@pytest.fixture(scope="module")
def tiny_sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "cars"
    sample.write_sample(folder, train_per_class=4, test_per_class=2)
    return folder


def write(source, out, **options):
    """Returns the content of the report."""
    return write_records(PreprocessConfig(source=str(source), out=str(out), **options))[1]


def digests(folder):
    found = {}
    for path in sorted(folder.glob("*.h5")):
        with RecordFile(path) as file:
            found[path.name] = file.digest()
    return found


def names(folder):
    """What people see: not what a run that ended early has left for the next one."""
    return sorted(path.name for path in folder.glob("*") if path.name != WORK_FOLDER)


def test_sample_in_devkit_layout(tiny_sample, tmp_path):
    summary = write(tiny_sample, tmp_path, image_size=32)
    assert names(tmp_path) == ["report.html", "report.json", "test.h5", "train.h5", "validation.h5"]
    # Every class is in every split.
    for split, count in (("train", 3), ("validation", 1), ("test", 2)):
        with RecordFile(tmp_path / f"{split}.h5") as file:
            assert np.bincount(file.labels).tolist() == [count] * 8
            assert file.images("box").shape == file.images("full").shape == (8 * count, 32, 32, 3)
    assert summary["photos_by_split"] == {"train": 24, "validation": 8, "test": 16}
    assert summary["photos_by_class"][7] == {
        "class": "Škvara Citron Coupé 2010",
        "train": 3,
        "validation": 1,
        "test": 2,
    }
    # The photos of this seed from before near-duplicates were looked for: there are none among the drawings.
    with RecordFile(tmp_path / "validation.h5") as file:
        assert file.sources == [f"cars_train/{number:05d}.jpg" for number in (5, 7, 8, 16, 18, 19, 22, 25)]
        assert file.settings["near_duplicate_distance"] == 36
    assert {kind: found["count"] for kind, found in summary["findings"].items() if found["count"]} == {}
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Looked for and not found: leak, conflict, unreadable, truncated, missing," in page


@pytest.mark.parametrize(("crop", "crops"), [("box", ("box",)), ("full", ("full",)), ("both", ("box", "full"))])
def test_literal_records(devkit, tmp_path, crop, crops):
    out = tmp_path / "out"
    write(devkit, out, crop=crop, image_size=9)
    rows = {}
    for split in ("train", "validation"):
        with RecordFile(out / f"{split}.h5") as file:
            assert file.crops == crops
            assert sorted(file.labels.tolist()) == [0, 1]
            rows |= dict(zip(file.sources, file.labels.tolist(), strict=True))
    assert rows == {"cars_train/1.jpg": 0, "cars_train/2.jpg": 1, "cars_train/3.jpg": 0, "cars_train/4.jpg": 1}
    with RecordFile(out / "test.h5") as file:
        assert file.class_names == [HOSTILE, "Škoda"]
        assert (file.labels.tolist(), file.sources) == ([1], ["cars_test/1.jpg"])
        assert file.sizes.tolist() == [[40, 60]]
        assert file.boxes.tolist() == [[40, 0, 60, 40]]
        assert file.settings["crop_margin"] == 16
        assert file.settings["source"] == "cars"
        # The box and its margin are the columns 24 to 59: six are grey, thirty blue.
        mixed = [60, 60, 188]
        pixels = {"box": [GREY, mixed, *[BLUE] * 7], "full": [*[GREY] * 4, mixed, *[BLUE] * 4]}
        for name in crops:
            np.testing.assert_array_equal(file.images(name)[0], [pixels[name]] * 9)


def test_same_seed_same_files(tiny_sample, tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write(tiny_sample, tmp_path / name, crop="full", image_size=16, seed=seed)
    assert digests(tmp_path / "one") == digests(tmp_path / "same")
    sources = {}
    for name in ("one", "other"):
        for split in ("train", "validation"):
            with RecordFile(tmp_path / name / f"{split}.h5") as file:
                sources[name, split] = set(file.sources)
    assert sources["one", "validation"] != sources["other", "validation"]
    assert sources["one", "train"] | sources["one", "validation"] == {f"cars_train/{n:05d}.jpg" for n in range(1, 33)}
    assert not sources["one", "train"] & sources["one", "validation"]


def test_validation_takes_a_tenth_of_each_class(devkit, tmp_path):
    # 20 photos, 2 and 1: the last class cannot give one away.
    rows = [(41, 1, 60, 40, class_id, f"{row}.jpg") for row, class_id in enumerate([1] * 20 + [2] * 2 + [3])]
    write_devkit(tmp_path / "more", ["a", "b", "c"], rows)
    for row in range(23):
        write_drawing(tmp_path / "more" / "cars_train" / f"{row}.jpg", row)
    summary = write(tmp_path / "more", tmp_path / "out", image_size=4)
    assert summary["photos_by_class"] == [
        {"class": "a", "train": 18, "validation": 2},
        {"class": "b", "train": 1, "validation": 1},
        {"class": "c", "train": 1, "validation": 0},
    ]


def test_no_labels_for_the_test_photos(devkit, tmp_path, caplog):
    (devkit / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    with caplog.at_level(logging.INFO, "carflavor"):
        write(devkit, tmp_path / "out", image_size=4)
    assert names(tmp_path / "out") == ["report.html", "report.json", "train.h5", "validation.h5"]
    assert caplog.messages == [
        f"No labels for the test photos in {devkit}: test.h5 is not written",
        "Found: tiny 4",  # 19 pixels wide are their boxes
    ]


def test_another_test_split_is_not_left_beside_new_files(devkit, tmp_path):
    out = tmp_path / "out"
    write(devkit, out, image_size=4)
    before = digests(out)
    (devkit / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(ValueError) as error:
        write(devkit, out, image_size=4, seed=1)
    assert (
        str(error.value) == f"{out}: expected a folder without test.h5, for {devkit} has no labels for its test photos"
    )
    assert digests(out) == before


def cut_off(path):
    path.write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    return "expected a whole JPEG, got 10 bytes of one that was cut off"


def remove(path):
    path.unlink()
    return "No such file or directory"


def shrink(path):
    path.write_bytes(cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes())
    return "expected a box with x1 < x2 and y1 < y2 inside the photo of 9 x 9 pixels, got (40, 0, 60, 40)"


@pytest.mark.parametrize("spoil", [cut_off, remove, shrink])
def test_an_unreadable_photo_stops_the_run(devkit, tmp_path, spoil):
    photo = devkit / "cars_test" / "1.jpg"
    reason = spoil(photo)
    with pytest.raises(ValueError) as error:
        write(devkit, tmp_path / "out", image_size=4)
    assert str(error.value) == f"{photo}: {reason}. Leave such photos out with skip_unreadable=true"
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("spoil", [cut_off, remove, shrink])
def test_unreadable_photos_are_left_out_and_listed(tiny_sample, devkit, tmp_path, spoil):
    write_annotations(
        devkit / "devkit" / "cars_test_annos_withlabels.mat",
        [(41, 1, 60, 40, 2, "1.jpg"), (41, 1, 60, 40, 1, "<i>.jpg")],
    )
    write_photo(devkit / "cars_test" / "<i>.jpg", RED, BLUE)
    reason = spoil(devkit / "cars_test" / "<i>.jpg")
    out = tmp_path / "out"
    summary = write(devkit, out, image_size=4, skip_unreadable=True)
    assert (summary["photos"], summary["skipped"]) == (5, 1)
    assert json.loads((out / "report.json").read_text("utf-8")) == summary
    assert summary["skipped_photos"] == [{"photo": "cars_test/<i>.jpg", "split": "test", "reason": reason}]
    with RecordFile(out / "test.h5") as file:
        assert file.sources == ["cars_test/1.jpg"]
    page = (out / "report.html").read_text("utf-8")
    assert "cars_test/&lt;i&gt;.jpg" in page
    assert "&lt;b&gt;Ram&lt;/b&gt; C/V" in page
    assert not re.search(r"<[ib]>", page)


def test_what_an_earlier_run_left_out_is_not_left_out_by_the_next(devkit, tmp_path, monkeypatch):
    photo, out = devkit / "cars_test" / "1.jpg", tmp_path / "out"
    read_file = stores.read_file

    def read(path):
        if Path(path) == photo:
            raise PermissionError(13, "Permission denied", str(path))
        return read_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(stores, "read_file", read)
        with pytest.raises(ValueError, match="unreadable"):
            write(devkit, out, image_size=4, skip_unreadable=True, fail_on="unreadable", workers=1)
        with pytest.raises(ValueError, match=f"{photo}: .*Permission denied.* skip_unreadable=true"):
            write(devkit, out, image_size=4, workers=1)
    write(devkit, out, image_size=4, workers=1)
    write(devkit, tmp_path / "new", image_size=4)
    assert digests(out) == digests(tmp_path / "new")


def test_a_split_without_a_readable_photo_is_refused(devkit, tmp_path):
    remove(devkit / "cars_test" / "1.jpg")
    with pytest.raises(ValueError, match="^Expected at least one readable photo for test.h5, got none of 1$"):
        write(devkit, tmp_path / "out", image_size=4, skip_unreadable=True)
    assert names(tmp_path / "out") == []


def test_an_unknown_crop_is_refused(devkit, tmp_path):
    with pytest.raises(ValueError, match="^Expected crop to be one of box, full, both. Received: crop='mixed'$"):
        write(devkit, tmp_path / "out", crop="mixed")


def test_files_have_the_mode_of_the_umask(devkit, tmp_path):
    before = os.umask(0o027)
    try:
        write(devkit, tmp_path / "out", image_size=4)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {
        "report.html": "0o640",
        "report.json": "0o640",
        "test.h5": "0o640",
        "train.h5": "0o640",
        "validation.h5": "0o640",
    }


def test_the_run_tells_what_was_written(devkit, tmp_path, store):
    out = preprocess(PreprocessConfig(source=str(devkit), image_size=4, out=str(tmp_path / "out")))
    assert out == tmp_path / "out"
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["carflavor.records"] == str(out)
    assert run.data.metrics["photos"] == 5
    assert run.data.metrics["skipped"] == 0
    assert run.data.metrics["near_duplicate_groups"] == 0
    assert run.data.metrics["near_duplicate_photos"] == 0
    assert run.data.metrics["near_duplicate_test_photos"] == 0
    assert run.data.metrics["bytes"] == sum(path.stat().st_size for path in out.glob("*.h5"))
    artifacts = [artifact.path for artifact in store.list_artifacts(run.info.run_id)]
    assert sorted(artifacts) == ["config.json", "photos.png", "report.html", "report.json"]
    picture = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="photos.png")
    with RecordFile(out / "train.h5") as train:
        photos = len(train)
    # Two inches and a tenth for each photo, at 144 pixels an inch; what is left of a pixel is cut off.
    assert cv2.imread(picture).shape[1] == int(2.1 * 144 * photos)


def test_two_folders_of_one_name_do_not_share_their_files(devkit, tmp_path, store):
    other = tmp_path / "other" / "cars"
    other.parent.mkdir()
    devkit.rename(other)
    write_devkit(devkit, ["a"], [(41, 1, 60, 40, 1, "1.jpg"), (41, 1, 60, 40, 1, "2.jpg")])
    for number in (1, 2):
        write_drawing(devkit / "cars_train" / f"{number}.jpg", number)
    folders = [preprocess(PreprocessConfig(source=str(source), image_size=4)) for source in (devkit, other)]
    assert folders[0] != folders[1]
    assert {folder.parent for folder in folders} == {tmp_path / "home" / "records"}
    with open_split(str(folders[0]), "train") as file:
        assert file.class_names == ["a"]


def test_an_out_that_is_a_file_fails_the_run(devkit, tmp_path, store):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match=f"^out: expected a folder, got the file {tmp_path}/out$"):
        preprocess(PreprocessConfig(source=str(devkit), out=str(tmp_path / "out")))
    assert (tmp_path / "out").read_text() == "mine"
    assert [run.info.status for run in store.search_runs(["0"])] == ["FAILED"]


@pytest.fixture
def copies(tmp_path):
    """Two classes of ten and twelve drawings, among them copies, and three test photos."""
    train = [(1, 1, 99, 99, 1 + (number >= 10), f"{number:02d}.jpg") for number in range(22)]
    test = [(1, 1, 99, 99, 1, f"{number}.jpg") for number in range(3)]
    write_devkit(tmp_path / "copies", ["a", "<b>"], train, test)
    for number in range(22):
        (tmp_path / "copies" / "cars_train" / f"{number:02d}.jpg").write_bytes(encode_jpeg(draw(number)))
    pictures = {number: draw(number) for number in (3, 4, 5, 16)}
    smaller = cv2.resize(pictures[3], None, fx=0.9, fy=0.9, interpolation=cv2.INTER_AREA)
    changed = {
        "cars_train/07": encode_jpeg(smaller),  # three of one class
        "cars_train/09": encode_jpeg(pictures[3], 50),
        "cars_train/12": encode_jpeg(np.ascontiguousarray(pictures[5][:, ::-1])),  # mirrored, under another label
        "cars_test/0": encode_jpeg(pictures[16], 60),  # also in training, under another label
        "cars_test/1": encode_jpeg(draw(100)),
        "cars_test/2": encode_jpeg(draw(101)),
    }
    for name, data in changed.items():
        (tmp_path / "copies" / f"{name}.jpg").write_bytes(data)
    return tmp_path / "copies"


def sources(out, split):
    with RecordFile(out / f"{split}.h5") as file:
        return set(file.sources)


@pytest.mark.parametrize("seed", range(8))
def test_near_duplicates_stand_on_one_side(copies, tmp_path, seed):
    out = tmp_path / "out"
    summary = write(copies, out, crop="full", image_size=16, seed=seed)
    train, validation = sources(out, "train"), sources(out, "validation")
    for group in (("03", "07", "09"), ("05", "12")):
        group = {f"cars_train/{name}.jpg" for name in group}
        assert group <= train or group <= validation
    assert [row["validation"] for row in summary["photos_by_class"]] == [1, 1]


def test_near_duplicates_are_reported(copies, tmp_path, caplog):
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO, "carflavor"):
        summary = write(copies, out, crop="full", image_size=64)
    validation = sources(out, "validation")
    found = [
        (1, "cars_train/03.jpg", "a"),
        (1, "cars_train/07.jpg", "a"),
        (1, "cars_train/09.jpg", "a"),
        (2, "cars_train/05.jpg", "a"),
        (2, "cars_train/12.jpg", "<b>"),
        (3, "cars_train/16.jpg", "<b>"),
        (3, "cars_test/0.jpg", "a"),
    ]
    found = [
        {
            "group": group,
            "photo": name,
            "split": "test" if "test" in name else "validation" if name in validation else "train",
            "class": class_name,
        }
        for group, name, class_name in found
    ]
    findings = {kind: found["items"] for kind, found in summary["findings"].items()}
    keys = ("group", "photo", "split", "class")
    assert [{key: item[key] for key in keys} for item in findings["near_duplicate"]] == found
    assert [{key: item[key] for key in keys} for item in findings["conflict"]] == found[3:]
    assert [item["mirrored"] for item in findings["conflict"]] == [False, True, False, False]
    (leak,) = findings["leak"]
    assert (leak["photo"], leak["copy_of"]["photo"]) == ("cars_test/0.jpg", "cars_train/16.jpg")
    counts = {name: count for name, count in summary.items() if name.startswith("near_") and isinstance(count, int)}
    assert counts == {
        "near_duplicate_groups": 3,
        "near_duplicate_groups_with_different_labels": 2,
        "near_duplicate_photos": 7,
        "near_duplicate_test_photos": 1,
    }
    # No test photo is of the second class.
    assert caplog.messages == ["Found: leak 1, conflict 4, absent_class 1, near_duplicate 7"]
    assert json.loads((out / "report.json").read_text("utf-8")) == summary
    page = (out / "report.html").read_text("utf-8")
    assert "7 photos in 3 groups. Shown: 2 above and 1 here, with two photos each." in page
    # Each pair is shown once.
    assert page.count("cars_train/16.jpg") == page.count("cars_test/0.jpg") == page.count("cars_train/05.jpg") == 1
    assert "<b>" not in page


def test_a_photo_that_is_left_out_is_nobodys_near_duplicate(copies, tmp_path):
    # Its box lies outside, which is seen only when it is to be cut out.
    (copies / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    box = [(999, 999, 1099, 1099), (1, 1, 99, 99)]
    rows = [(*box[number != 0], 1, f"{number}.jpg") for number in range(3)]
    write_annotations(copies / "devkit" / "cars_test_annos_withlabels.mat", rows)
    (copies / "cars_train" / "12.jpg").write_bytes(b"no photo")
    summary = write(copies, tmp_path / "out", crop="box", image_size=16, skip_unreadable=True)
    assert {photo["photo"] for photo in summary["skipped_photos"]} == {"cars_test/0.jpg", "cars_train/12.jpg"}
    findings = {kind: found["items"] for kind, found in summary["findings"].items()}
    assert [item["photo"] for item in findings["near_duplicate"]] == [f"cars_train/0{n}.jpg" for n in (3, 7, 9)]
    assert summary["near_duplicate_test_photos"] == 0
    assert findings["conflict"] == []
    # The first is a photo all the same.
    assert [item["photo"] for item in findings["unreadable"]] == ["cars_train/12.jpg"]
    assert [item["photo"] for item in findings["box"]] == ["cars_test/0.jpg"]


def test_a_dataset_of_one_picture_is_refused(devkit, tmp_path):
    for number in range(1, 5):
        write_drawing(devkit / "cars_train" / f"{number}.jpg", 7)
    with pytest.raises(ValueError) as error:
        write(devkit, tmp_path / "out", image_size=4)
    assert str(error.value) == (
        f"{devkit}: expected two training photos of some class that are no near-duplicates of each other, one of them "
        f"for validation, got none"
    )
    assert names(tmp_path / "out") == []


def test_sample_records_are_written_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CARFLAVOR_HOME", str(tmp_path))
    write_sample = sample.write_sample
    monkeypatch.setattr(
        sample, "write_sample", lambda folder: write_sample(folder, train_per_class=2, test_per_class=1)
    )
    with open_split("sample", "validation") as file:
        assert file.image_size == 128
        assert file.settings["source"] == "embedded sample"
        assert len(file) == 8
    written = {path.name: path.stat().st_mtime_ns for path in sample_records().iterdir()}
    assert written == {path.name: path.stat().st_mtime_ns for path in sample_records().iterdir()}
    # One of the files is gone: all are written again.
    (sample_records() / "test.h5").unlink()
    with open_split("sample", "test") as file:
        assert len(file) == 8


def test_a_folder_without_the_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"^data: expected {tmp_path}/test.h5, which preprocess writes, got nothing$"):
        open_split(str(tmp_path), "test")


def test_photos_inside_parquet_files(tmp_path, caplog):
    photos = [{"bytes": encode_jpeg(draw(number)), "path": f"{number}.jpg"} for number in range(5)]
    photos[3]["bytes"] = b"no photo"
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, rows in (("train", slice(0, 4)), ("validation", slice(4, 5))):
        columns = {"image": pa.array(photos[rows], image), "label": [0, 0, 0, 1, 1][rows]}
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError) as error:
        write(tmp_path, tmp_path / "out", image_size=16)
    reason = "expected a JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC, got 8 bytes of something else"
    assert str(error.value) == (
        f"{tmp_path}/train.parquet, row 4: {reason}. Leave such photos out with skip_unreadable=true"
    )
    caplog.clear()
    summary = write(tmp_path, tmp_path / "out", image_size=16, skip_unreadable=True)
    assert caplog.messages[:2] == [
        "No file names the classes: they are called by their numbers",
        "There are no labelled test photos: the 1 for validation are used as such",
    ]
    assert summary["photos_by_split"] == {"train": 2, "validation": 1, "test": 1}
    assert summary["skipped_photos"] == [{"photo": "3.jpg", "split": "train", "reason": reason}]
    with RecordFile(tmp_path / "out" / "test.h5") as file:
        assert (file.labels.tolist(), file.sources) == ([1], ["4.jpg"])
        # Nobody drew a box: the car is the whole photo.
        height, width = draw(4).shape[:2]
        assert file.boxes.tolist() == [[0, 0, width, height]]
        np.testing.assert_array_equal(file.images("box"), file.images("full"))
