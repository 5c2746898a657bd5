"""Copies of training photos: by one process, by several, on Spark, after a kill, and in a training."""

import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from colours import write_split

import carflavor
from carflavor import augment as augmenting
from carflavor.augment import WORK_FOLDER, AugmentConfig, augment, write_augmented
from carflavor.data.copies import Copying, make_copy
from carflavor.data.operations import Operations
from carflavor.data.records import RecordFile, RecordWriter
from carflavor.data.shards_on_spark import write_shards_on_spark
from carflavor.locking import lock
from carflavor.spark import open_session
from carflavor.train import TrainConfig, train

ROOT = Path(carflavor.__file__).parents[1]
ALL = "crop,pad,flip,rotate,shift,zoom,color,blur,erase,randaugment"
SIZE, BOX = (60, 100), (30, 20, 80, 50)
CODE = """
import sys
from carflavor import augment
augment._BYTES_A_SHARD = 30_000
augment.write_augmented(augment.AugmentConfig(data=sys.argv[1], copies=3, workers=int(sys.argv[2])))
"""


def write_cars(path, names, crops=("box", "full"), box=BOX):
    """Writes squares of a photo with a white car in a gradient of its own."""
    with RecordWriter(path, crops, 32, ["red", "blue"], {"source": "cars", "crop_margin": 4}) as writer:
        for number, name in enumerate(names):
            shade = np.add.outer(np.arange(32), np.arange(32) + 10 * number).astype(np.uint8)[..., None]
            full = np.concatenate([shade, shade // 2, 255 - shade], axis=2)
            images = {"full": full, "box": full[::-1]}
            writer.append({crop: images[crop] for crop in crops}, number % 2, name, SIZE, box)
    return path


@pytest.fixture
def cars(tmp_path):
    """A folder with 12 photos for training and 4 for validation."""
    write_cars(tmp_path / "cars" / "train.h5", [f"{number}.jpg" for number in range(12)])
    write_cars(tmp_path / "cars" / "validation.h5", [f"v{number}.jpg" for number in range(4)])
    return tmp_path / "cars"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(augmenting, "_BYTES_A_SHARD", 30_000)  # of two photos with two copies each


def write(folder, **settings):
    path, _ = write_augmented(AugmentConfig(**{"data": str(folder), "copies": 2, "workers": 1, **settings}))
    return path


def digest(path):
    with RecordFile(path) as file:
        return file.digest()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_copies_follow_the_originals(cars, small_shards):
    with RecordFile(write(cars, operations=ALL, seed=7)) as file, RecordFile(cars / "train.h5") as originals:
        assert len(file) == 36
        assert file.crops == ("box", "full")
        assert file.class_names == ["red", "blue"]
        assert file.sources[:12] == originals.sources
        assert file.sources[12:16] == ["0.jpg#copy1", "0.jpg#copy2", "1.jpg#copy1", "1.jpg#copy2"]
        assert file.labels.tolist() == [0, 1] * 6 + [0, 0, 1, 1] * 6
        assert (file.sizes == SIZE).all()
        for crop in file.crops:
            np.testing.assert_array_equal(file.images(crop)[:12], originals.images(crop)[:])
            assert len(np.unique(file.images(crop)[:], axis=0)) == 36
        x1, y1, x2, y2 = file.boxes.T
        assert (0 <= x1).all() and (x1 < x2).all() and (x2 <= 100).all()
        assert (0 <= y1).all() and (y1 < y2).all() and (y2 <= 60).all()
        settings = file.settings
        assert settings.pop("augmentation") == {
            "operations": "crop:0.3,pad:0.15,flip,rotate:8,shift:0.1,zoom:0.2,color:0.3,blur:0.005,erase:0.15,"
            "randaugment:0.3",
            "copies": 2,
            "seed": 7,
            "originals_digest": originals.digest(),
            "opencv": settings_version("cv2"),
            "pillow": settings_version("PIL"),
            "numpy": np.__version__,
        }
        assert settings == originals.settings
    assert names(cars) == ["train-augmented.h5", "train.h5", "validation.h5"]


def settings_version(module):
    return sys.modules[module].__version__


@pytest.mark.parametrize("crop", ["box", "full"])
def test_one_crop_is_enough(tmp_path, crop):
    write_cars(tmp_path / "train.h5", ["a.jpg"], crops=(crop,))
    with RecordFile(write(tmp_path, operations="flip", copies=8)) as file:
        assert file.crops == (crop,)
        # Mirrored or not, and with it the box.
        first, *copies = file.images(crop)[:]
        mirrored = [np.array_equal(copy, first[:, ::-1]) for copy in copies]
        assert [np.array_equal(copy, first) for copy in copies] == [not is_mirrored for is_mirrored in mirrored]
        assert set(mirrored) == {True, False}
        assert file.boxes[1:].tolist() == [[20, 20, 70, 50] if one else list(BOX) for one in mirrored]


def test_both_squares_of_a_copy_are_changed_alike(cars):
    with RecordFile(write(cars, operations="flip")) as file:
        mirrored = {crop: [(image[0] != image[0, ::-1]).any() for image in file.images(crop)] for crop in file.crops}
        assert mirrored["box"] == mirrored["full"]
        boxes, fulls = file.images("box")[12:], file.images("full")[12:]
        originals = file.images("full")[:12].repeat(2, 0)
        is_mirrored = [not np.array_equal(full, original) for full, original in zip(fulls, originals, strict=True)]
        assert 4 < sum(is_mirrored) < 20
        for one, box, original in zip(is_mirrored, boxes, file.images("box")[:12].repeat(2, 0), strict=True):
            np.testing.assert_array_equal(box, original[:, ::-1] if one else original)


def test_a_copy_depends_on_its_photo_alone(cars, tmp_path):
    write_cars(tmp_path / "one" / "train.h5", ["other.jpg", "1.jpg"])
    with RecordFile(write(cars)) as file, RecordFile(write(tmp_path / "one", copies=1)) as other:
        assert file.sources[14] == other.sources[3] == "1.jpg#copy1"
        np.testing.assert_array_equal(file.images("full")[14], other.images("full")[3])
        np.testing.assert_array_equal(file.boxes[14], other.boxes[3])


def test_another_seed_makes_other_copies(cars):
    first = digest(write(cars, seed=1))
    assert digest(write(cars, seed=1)) == first
    assert digest(write(cars, seed=2)) != first


@pytest.mark.parametrize("box", [BOX, (0, 0, 6, 60), (97, 57, 100, 60), (-5, -5, 20, 20), (90, 40, 300, 200)])
def test_the_car_is_never_lost(tmp_path, box):
    operations = Operations("crop:0.75,rotate:180,shift:0.5,zoom:1,randaugment:1")
    with RecordFile(write_cars(tmp_path / "train.h5", ["a.jpg"], box=box)) as file:
        x1, y1, x2, y2 = np.clip(box, 0, [100, 60, 100, 60])
        for seed in range(60):
            moved = make_copy(file, 0, operations, 1, seed)["box"]
            # Half of it is there; enlarged or reduced, at least by what the operations reduce by.
            assert (moved[2] - moved[0]) * (moved[3] - moved[1]) >= (x2 - x1) * (y2 - y1) / 2 / 6, moved


def test_what_would_lose_every_car_leaves_it_where_it_is(tmp_path):
    with RecordFile(write_cars(tmp_path / "train.h5", ["a.jpg"], box=(0, 0, 1, 1))) as file:
        # A car in the corner is cut off by nearly every crop.
        copies = [make_copy(file, 0, Operations("crop:0.01"), 1, seed) for seed in range(30)]
        assert all(copy["box"][2] >= 1 and copy["box"][3] >= 1 for copy in copies)


def test_a_photo_whose_box_is_beside_it_is_all_car(tmp_path):
    write_cars(tmp_path / "train.h5", ["a.jpg"], crops=("full",), box=(200, 10, 220, 20))
    with RecordFile(write(tmp_path, operations="flip")) as file:
        assert file.boxes.tolist() == [[200, 10, 220, 20], [0, 0, 100, 60], [0, 0, 100, 60]]


def test_the_number_of_processes_changes_nothing(cars, small_shards):
    assert digest(write(cars, workers=2)) == digest(write(cars, workers=1))


def test_spark_writes_an_equal_file(cars, small_shards):
    expected = digest(write(cars))
    assert digest(write(cars, master="local[2]")) == expected
    assert names(cars) == ["train-augmented.h5", "train.h5", "validation.h5"]


def test_a_session_that_is_there_is_used(cars, small_shards):
    expected = digest(write(cars))
    with open_session("local[1]", "outer") as session:
        assert digest(write(cars, master="session")) == expected
        assert session.range(2).count() == 2

        def interrupt(written):
            raise KeyboardInterrupt

        # Of 240 tasks of two seconds; those that are not begun are not done.
        copying = Copying(str(cars / "train.h5"), str(cars), "blur", 100, 0, 1)
        with pytest.raises(KeyboardInterrupt):
            write_shards_on_spark(session, copying, list(range(12)) * 20, interrupt)
        assert session.range(3).count() == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_it_goes_on_where_it_was(tmp_path, caplog, clean_environment, monkeypatch, workers):
    for name in ("cars", "undisturbed"):
        write_cars(tmp_path / name / "train.h5", [f"{number}.jpg" for number in range(100)])
    monkeypatch.setattr(augmenting, "_BYTES_A_SHARD", 30_000)
    expected = digest(write(tmp_path / "undisturbed", copies=3))
    cars = tmp_path / "cars"
    command = [sys.executable, "-c", CODE, str(cars), str(workers)]
    environment = {**clean_environment, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True) as process:
        while process.poll() is None and len(list((cars / WORK_FOLDER).glob("*/[0-9]*.h5"))) < 9:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert names(cars) == [WORK_FOLDER, "train.h5"]
    caplog.set_level(logging.INFO, "carflavor")
    assert digest(write(cars, copies=3)) == expected
    (going_on,) = [message for message in caplog.messages if message.startswith("Going on after ")]
    assert going_on.endswith(" of 300 copies")
    assert names(cars) == ["train-augmented.h5", "train.h5"]


def test_a_failure_leaves_the_older_file(cars, small_shards, monkeypatch):
    path = write(cars, seed=1)
    before = digest(path)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(RecordWriter, "finish", fail)
        write(cars, seed=2)
    assert digest(path) == before
    assert digest(write(cars, seed=1)) == before
    assert names(cars) == ["train-augmented.h5", "train.h5", "validation.h5"]


def test_another_setting_starts_over(cars, caplog):
    folder = cars / WORK_FOLDER / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "0.h5").touch()
    write(cars)
    assert f"not what they were when {cars}/{WORK_FOLDER} was begun: starting over" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "runs:/1/records"}, "data: expected a local path, got runs:/1/records"),
        ({"data": "/nowhere"}, "data: /nowhere does not exist"),
        ({"operations": "mirror"}, "Expected operations among crop, pad, flip"),
        ({"master": "head:7077"}, "Expected master to be local"),
    ],
)
def test_bad_parameters_are_refused(store, settings, message):
    with pytest.raises(ValueError, match=message):
        augment(AugmentConfig(**settings))
    assert store.search_runs(["0"])[0].info.status == "FAILED"


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"data: expected {tmp_path}/train.h5, which preprocess writes, got nothing"):
        write(tmp_path)
    assert names(tmp_path) == []


def test_records_without_photos_are_refused(tmp_path):
    write_cars(tmp_path / "train.h5", [])
    with pytest.raises(ValueError, match="train.h5: expected photos to copy, got none"):
        write(tmp_path)


def test_two_at_once_are_refused(cars):
    with (
        lock(cars / WORK_FOLDER / "lock", ""),
        pytest.raises(ValueError, match=f"Another process augments the photos in {cars}"),
    ):
        write(cars)


def test_what_stands_on_the_run(cars, store):
    command = runpy.run_path(str(ROOT / "entrypoints" / "augment.py"))["main"]
    result = CliRunner().invoke(command, ["--data", str(cars), "--copies", "2", "--seed", "5", "--workers", "1"])
    assert result.exit_code == 0, result.output
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["carflavor.step"] == "augment"
    assert run.data.tags["carflavor.records"] == str(cars)
    assert {name: run.data.metrics[name] for name in ("photos", "copies")} == {"photos": 36, "copies": 24}
    assert run.data.metrics["bytes"] == (cars / "train-augmented.h5").stat().st_size
    artifacts = Path(store.download_artifacts(run.info.run_id, ""))
    assert names(artifacts) == ["config.json", "copies_box.png", "copies_full.png", "data.json", "report.html"]
    assert json.loads((artifacts / "data.json").read_text())["augmentation"]["seed"] == 5
    page = (artifacts / "report.html").read_text()
    assert "What augment wrote" in page and "crop:0.3,flip,rotate:8" in page


@pytest.mark.parametrize("option", ["--copies=0", "--copies=101", "--seed=-1", "--workers=257"])
def test_numbers_out_of_range_are_refused(option):
    command = runpy.run_path(str(ROOT / "entrypoints" / "augment.py"))["main"]
    assert CliRunner().invoke(command, [option]).exit_code == 2


def tiny(data, **settings):
    parameters = {"network": "tiny", "epochs": 1, "batch_size": 16, "input_size": 32, "augmented": True}
    return TrainConfig(data=str(data), **{**parameters, **settings})


def name_photos(path, prefix):
    """Gives the photos of a record file names of their own."""
    with h5py.File(path, "r+") as file:
        names = [prefix + name for name in file["sources"].asstr()[()]]
        file["sources"][...] = names


@pytest.mark.usefixtures("tiny_network_by_name")
def test_train_learns_from_the_copies(data, store):
    name_photos(data / "validation.h5", "v")
    write(data, copies=1)
    info = train(tiny(data))
    run = store.get_run(info.run_id)
    artifacts = Path(store.download_artifacts(info.run_id, ""))
    assert json.loads((artifacts / "config.json").read_text())["augmented"] is True
    assert json.loads((artifacts / "data.json").read_text())["augmentation"]["copies"] == 1
    (learned,) = [entry for entry in run.inputs.dataset_inputs if entry.tags[0].value == "train"]
    assert learned.dataset.name == "colours train-augmented"
    assert json.loads(learned.dataset.profile)["num_rows"] == 96


@pytest.mark.usefixtures("tiny_network_by_name", "store")
def test_train_without_copies_says_who_writes_them(data):
    with pytest.raises(ValueError, match=f"data: expected {data}/train-augmented.h5, which augment writes, got noth"):
        train(tiny(data))


@pytest.mark.usefixtures("tiny_network_by_name", "store")
def test_train_refuses_copies_of_validation_photos(data):
    write(data, copies=1)
    # As preprocess would with another seed.
    write_split(data / "validation.h5", [0, 1, 2])
    expected = r"expected copies of the photos that are in train.h5 now, got 3 photos of validation.h5, such as 0.jpg"
    with pytest.raises(ValueError, match=f"train-augmented.h5: {expected}: run augment again"):
        train(tiny(data))


def test_it_needs_no_tensorflow():
    code = "import sys, carflavor.augment; print('tensorflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert done.stdout == "False\n"
