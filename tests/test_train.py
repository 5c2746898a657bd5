import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest

import carflavor
from carflavor.data.records import RecordFile, RecordWriter
from carflavor.networks import NETWORKS, Network
from carflavor.networks.resnet import _basic_block, build_resnet
from carflavor.train import AugmentedNetwork, PhotoBatches, SquashedBatches, TrainConfig, build_augmentation, train

PROJECT = Path(__file__).parents[1]
COLOURS = [(220, 40, 40), (40, 200, 60), (50, 60, 220)]


def write_split(path, rows, crops=("box", "full"), names=("red", "green", "blue"), size=40):
    """Writes noisy squares whose colour is their class; under `full` they are darker."""
    random = np.random.default_rng(len(rows))
    with RecordWriter(path, crops, size, names, {"source": "colours", "crop_margin": 16}) as writer:
        for row, label in enumerate(rows):
            square = np.clip(np.array(COLOURS[label]) + random.normal(0, 30, (size, size, 3)), 0, 255).astype("uint8")
            images = {"box": square, "full": square // 2}
            images = {crop: images[crop] for crop in crops}
            writer.append(images, label, f"{row}.jpg", (size, size), (0, 0, size, size))


@pytest.fixture(autouse=True)
def tiny_network_by_name(monkeypatch):
    """A real network that TensorFlow compiles in a second, beside those that users choose from."""
    monkeypatch.setitem(
        NETWORKS,
        "tiny",
        Network(lambda num_classes, input_size: build_resnet([1], _basic_block, num_classes, input_size, "tiny"), 32),
    )


@pytest.fixture
def data(tmp_path):
    write_split(tmp_path / "records" / "train.h5", [0, 1, 2] * 16)
    write_split(tmp_path / "records" / "validation.h5", [0, 1, 2] * 4)
    return tmp_path / "records"


def small(data, **changes):
    return TrainConfig(**{"data": str(data), "network": "tiny", "epochs": 3, "batch_size": 16, **changes})


def test_train_learns_and_logs_a_model(store, data):
    info = train(small(data, learning_rate=0.003))
    run = store.get_run(info.run_id)
    assert run.info.status == "FINISHED"
    history = mlflow.artifacts.load_dict(f"runs:/{info.run_id}/history.json")
    assert len(history["loss"]) == len(history["val_accuracy"]) == 3
    assert history["loss"][-1] < history["loss"][0]
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "photos_per_second"):
        assert [point.step for point in store.get_metric_history(info.run_id, name)] == [0, 1, 2]
    artifacts = {artifact.path for artifact in store.list_artifacts(info.run_id)}
    assert {"config.json", "curves.png", "data.json", "history.json"} <= artifacts
    config = mlflow.artifacts.load_dict(f"runs:/{info.run_id}/config.json")
    assert (config["epochs"], config["learning_rate"], config["crop"]) == (3, 0.003, "box")
    assert run.data.tags["carflavor.step"] == "train"
    assert run.data.tags["carflavor.data"] == "colours"

    # One model, and not a second one from autologging.
    assert len(mlflow.search_logged_models(output_format="list")) == 1
    classifier = carflavor.load_model(f"runs:/{info.run_id}/model")
    assert classifier.class_names == ["red", "green", "blue"]
    assert (classifier.image_size, classifier.crop_margin, classifier.engine.input_size) == (40, 16, 32)
    # Nothing of the training is left in the user's folder.
    assert list(Path(os.environ["CARFLAVOR_HOME"], "checkpoints").iterdir()) == []


def test_logged_model_is_that_of_the_best_epoch(store, data):
    info = train(small(data, learning_rate=0.003))
    values = [point.value for point in store.get_metric_history(info.run_id, "val_accuracy")]
    manifest = mlflow.artifacts.load_dict(f"runs:/{info.run_id}/model/manifest.json")
    assert manifest["training"]["validation_accuracy"] == max(values)
    classifier = carflavor.load_model(f"runs:/{info.run_id}/model")
    with RecordFile(data / "validation.h5") as validation:
        probabilities = classifier.predict_probabilities(list(validation.images("box")[:]))
        accuracy = np.mean(probabilities.argmax(axis=1) == validation.labels)
    assert accuracy == pytest.approx(max(values))


def test_same_seed_gives_the_same_curve(store, data):
    curves = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        info = train(small(data, epochs=2, seed=seed))
        curves[name] = [point.value for point in store.get_metric_history(info.run_id, "loss")]
    np.testing.assert_allclose(curves["first"], curves["again"], rtol=1e-3)
    assert not np.allclose(curves["first"], curves["other"], rtol=1e-3)


def test_training_batches_are_the_stored_bytes(data):
    with RecordFile(data / "train.h5") as records:
        batches = PhotoBatches(records, ("box",), batch_size=20, seed=0)
        assert len(batches) == 2  # 48 photos: eight wait for a later epoch
        photos, targets = batches[0]
        assert (photos.dtype, photos.shape, targets.shape) == (np.uint8, (20, 40, 40, 3), (20, 3))
        stored = records.images("box")[:]
        for photo, target in zip(photos, targets, strict=True):
            row = np.flatnonzero((stored == photo).all(axis=(1, 2, 3)))
            assert records.labels[row].tolist() == [target.argmax()]
        first = photos.copy()
        batches.on_epoch_end()
        assert not np.array_equal(batches[0][0], first)


def test_mixed_batches_draw_both_crops_and_validate_on_both(data):
    with RecordFile(data / "train.h5") as records:
        photos, _ = PhotoBatches(records, ("box", "full"), batch_size=48, seed=0)[0]
        dark = (photos.max(axis=(1, 2, 3)) < 128).mean()
        assert 0.2 < dark < 0.8
        validation = SquashedBatches(records, ("box", "full"), batch_size=40, input_size=32)
        assert len(validation) == 3
        photos = np.concatenate([validation[index][0] for index in range(3)])
        assert photos.shape == (96, 32, 32, 3)
        assert (photos.max(axis=(1, 2, 3)) < 128).sum() == 48


def test_few_photos_still_make_a_batch(tmp_path):
    write_split(tmp_path / "train.h5", [0, 1, 2])
    with RecordFile(tmp_path / "train.h5") as records:
        batches = PhotoBatches(records, ("box",), batch_size=32, seed=0)
        assert len(batches) == 1
        assert batches[0][0].shape == (3, 40, 40, 3)


def test_augmentation_changes_photos_in_training_only():
    photos = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), "uint8")
    augmentation = build_augmentation(40, 32, seed=0)
    first, second = (np.asarray(augmentation(photos, training=True)) for _ in range(2))
    assert first.dtype == np.uint8 and first.shape == (4, 32, 32, 3)
    assert not np.array_equal(first, second)

    class Mean:
        def __call__(self, photos, training):
            return photos

    model = AugmentedNetwork(augmentation, Mean())
    np.testing.assert_array_equal(model(photos, training=False), photos)
    assert np.asarray(model(photos, training=True)).shape == (4, 32, 32, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"network": "vgg"},
            "Expected network to be one of resnet18, resnet50, resnet101, resnet152, tiny. Received: network='vgg'",
        ),
        ({"crop": "half"}, "Expected crop to be one of box, full, mixed. Received: crop='half'"),
        (
            {"input_size": "big"},
            "Expected input_size to be auto or a number from 32 to 1024. Received: input_size='big'",
        ),
        ({"input_size": "16"}, "Received: input_size='16'"),
        ({"input_size": "-96"}, "Received: input_size='-96'"),
    ],
)
def test_train_refuses_parameters(store, data, changes, message):
    with pytest.raises(ValueError, match=message):
        train(small(data, **changes))
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FAILED"
    assert message in Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/error.txt")).read_text()


def test_train_says_when_it_diverges(store, data):
    with pytest.raises(ValueError, match="The loss is nan after epoch 1: try a smaller learning_rate"):
        train(small(data, learning_rate=1e30))
    (run,) = store.search_runs(["0"])
    assert store.list_artifacts(run.info.run_id, "model") == []


def test_train_that_fails_keeps_the_best_model_so_far(store, data, monkeypatch):
    def fail(history):
        raise OSError("no space left on the device")

    monkeypatch.setattr("carflavor.report.curves_figure", fail)
    with pytest.raises(OSError, match="no space left"):
        train(small(data))
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FAILED"
    assert carflavor.load_model(f"runs:/{run.info.run_id}/model").class_names == ["red", "green", "blue"]


def test_train_refuses_data_that_is_not_there(store, tmp_path):
    with pytest.raises(ValueError, match=r"the relative path records does not exist .* data=\"\$PWD/records\""):
        train(small("records"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data: expected .*train.h5, which preprocess writes, got nothing"):
        train(small(tmp_path / "empty"))


def test_train_refuses_a_crop_that_was_not_stored(store, tmp_path):
    for split in ("train", "validation"):
        write_split(tmp_path / "records" / f"{split}.h5", [0, 1, 2], crops=("box",))
    with pytest.raises(ValueError, match="expected images of crop=full, got a file with only box"):
        train(small(tmp_path / "records", crop="mixed"))


def test_train_refuses_splits_of_different_datasets(store, tmp_path):
    write_split(tmp_path / "records" / "train.h5", [0, 1, 2])
    write_split(tmp_path / "records" / "validation.h5", [0, 1, 2], names=("red", "blue", "green"))
    with pytest.raises(ValueError, match="expected the same class names, got different ones"):
        train(small(tmp_path / "records"))


@pytest.mark.parametrize("signalled", ["SIGINT to the group", "SIGTERM to the step", "SIGTERM to mlflow run"])
def test_interrupted_mlflow_run_is_killed_and_keeps_its_best_model(store, data, clean_environment, signalled):
    """Ctrl-C goes to the whole process group of a real `mlflow run`, as from a terminal; SIGTERM to one process."""
    log = open("mlflow-run.log", "w")
    project_run = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "run", str(PROJECT), "-e", "train", "--env-manager", "local"]
        + [f"-P{name}" for name in (f"data={data}", "input_size=32", "epochs=5000", "batch_size=16")],
        env={
            **clean_environment,
            "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
            "CARFLAVOR_HOME": os.environ["CARFLAVOR_HOME"],
        },
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        run = wait_for(lambda: [run for run in store.search_runs(["0"]) if "val_accuracy" in run.data.metrics], log)[0]
        if signalled == "SIGINT to the group":
            os.killpg(project_run.pid, signal.SIGINT)
        elif signalled == "SIGTERM to the step":
            (step,) = Path(f"/proc/{project_run.pid}/task/{project_run.pid}/children").read_text().split()
            os.kill(int(step), signal.SIGTERM)
        else:
            project_run.terminate()
        assert project_run.wait(timeout=120) != 0
    finally:
        if project_run.poll() is None:
            os.killpg(project_run.pid, signal.SIGKILL)
        log.close()
    wait_for(lambda: store.get_run(run.info.run_id).info.status == "KILLED", log)
    # It may be KILLED before the model is there: an ended run takes artifacts, too.
    wait_for(lambda: "MLmodel" in {Path(f.path).name for f in store.list_artifacts(run.info.run_id, "model")}, log)
    answer = carflavor.load_model(f"runs:/{run.info.run_id}/model").predict([np.zeros((40, 40, 3), "uint8")])
    assert answer["label"][0] in ("red", "green", "blue")


def wait_for(condition, log, seconds=180):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.5)
    raise AssertionError(f"it did not come to pass within {seconds} s:\n{Path(log.name).read_text()[-3000:]}")
