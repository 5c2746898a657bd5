import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from colours import PROJECT, mlflow_run, wait_for, write_split

import carflavor
from carflavor.data.records import RecordFile
from carflavor.recipes import PRESETS
from carflavor.train import TrainConfig, _class_weights, train

pytestmark = pytest.mark.usefixtures("tiny_network_by_name")


def small(data, **changes):
    return TrainConfig(**{"data": str(data), "network": "tiny", "epochs": 3, "batch_size": 16, **changes})


def test_train_learns_and_logs_a_model(store, data):
    info = train(small(data, learning_rate=0.003))
    run = store.get_run(info.run_id)
    assert run.info.status == "FINISHED"
    history = mlflow.artifacts.load_dict(f"runs:/{info.run_id}/history.json")
    assert len(history["loss"]) == len(history["val_accuracy"]) == 3
    assert history["loss"][-1] < history["loss"][0]
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "photos_per_second", "learning_rate"):
        assert [point.step for point in store.get_metric_history(info.run_id, name)] == [0, 1, 2]
    artifacts = {artifact.path for artifact in store.list_artifacts(info.run_id)}
    assert {"config.json", "resolved_config.json", "curves.png", "data.json", "history.json"} <= artifacts
    config = mlflow.artifacts.load_dict(f"runs:/{info.run_id}/config.json")
    assert (config["epochs"], config["learning_rate"], config["crop"]) == (3, 0.003, "auto")
    config = mlflow.artifacts.load_dict(f"runs:/{info.run_id}/resolved_config.json")
    assert (config["epochs"], config["learning_rate"], config["crop"]) == (3, 0.003, "box")
    summary = mlflow.artifacts.load_text(f"runs:/{info.run_id}/model_summary.txt")
    assert 'Model: "tiny"' in summary and summary.count("(Scale)") == 3
    assert run.data.params["optimizer_weight_decay"] == "0.05"
    assert (run.data.params["used_learning_rate"], run.data.params["used_crop"]) == ("0.003", "box")
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
    losses = [point.value for point in store.get_metric_history(info.run_id, "val_loss")]
    best = max(range(3), key=lambda epoch: (values[epoch], -losses[epoch]))
    assert manifest["training"]["best_epoch"] == best + 1
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"network": "vgg"},
            "network: 'vgg' is not one of 'resnet18', .*, 'tiny', nor the word auto.",
        ),
        ({"crop": "half"}, "crop: 'half' is not one of 'box', 'full', 'mixed', nor the word auto."),
        (
            {"input_size": "big"},
            "input_size: 'big' is not a valid integer range, nor the word auto.",
        ),
        ({"input_size": 16}, "input_size: 16 is not in the range 32<=x<=1024, nor the word auto."),
        ({"preset": "fast"}, "preset: 'fast' is not one of 'scratch', 'quick', 'article', 'best'."),
        (
            {"precision": "float16"},
            "precision: 'float16' is not one of 'float32', 'mixed_bfloat16', nor the word auto.",
        ),
        ({"validation": "none"}, "validation: 'none' is not one of 'hold_out', 'train'."),
        ({"class_weights": "yes"}, "class_weights: 'yes' is not one of 'none', 'balanced', nor the word auto."),
        ({"statistics": "frozen"}, "Expected weights with statistics=frozen: a random network has no statistics to"),
        ({"optimizer": "adam"}, "optimizer: 'adam' is not one of 'adamw', 'sgd', nor the word auto."),
        ({"epochs": 0}, "epochs: 0 is not in the range x>=1, nor the word auto."),
        ({"batch_size": 2.5}, "batch_size: '2.5' is not a valid integer range, nor the word auto."),
        ({"cutmix": 1.5}, "cutmix: 1.5 is not in the range 0<=x<=1, nor the word auto."),
        ({"devices": 64}, "Expected devices to be from 1 to 1, the CPUs here. Received: 64"),
    ],
)
def test_train_refuses_parameters(store, data, changes, message):
    with pytest.raises(ValueError, match=message):
        train(small(data, **changes))
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FAILED"
    error = Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/error.txt")).read_text()
    assert re.search(message, error)


def test_every_preset_says_all_that_can_be_auto():
    automatic = {field.name for field in dataclasses.fields(TrainConfig) if field.default == "auto"}
    assert {name: set(preset) for name, preset in PRESETS.items()} == dict.fromkeys(PRESETS, automatic)
    for preset in PRESETS:
        assert "auto" not in dataclasses.asdict(TrainConfig(preset=preset).resolved()).values()


def test_preset_gives_way_to_what_is_said():
    config = TrainConfig(preset="article", epochs=2).resolved()
    assert (config.network, config.epochs, config.input_size) == ("efficientnet-lite0", 2, 208)


@pytest.mark.parametrize(
    ("input_size", "train_scale", "train_size"),
    [(224, 0.7, 160), (208, 0.75, 160), (192, 0.85, 160), (40, 1.0, 40), (100, 0.99, 96), (32, 0.25, 32)],
)
def test_train_size_is_a_multiple_of_32_or_the_input_size(input_size, train_scale, train_size):
    assert TrainConfig(input_size=input_size, train_scale=train_scale).resolved().train_size == train_size


def test_train_scale_has_photos_smaller_in_training_than_in_the_model(store, data):
    """The loss is that of a training at half the size; the model, and what validates it, has the full size."""
    half = train(small(data, input_size=64, train_scale=0.5, epochs=1))
    small_one = train(small(data, input_size=32, epochs=1))
    metrics = [store.get_run(info.run_id).data.metrics for info in (half, small_one)]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-3)
    assert metrics[0]["val_loss"] != pytest.approx(metrics[1]["val_loss"], rel=1e-3)
    assert [carflavor.load_model(info.model_uri).engine.input_size for info in (half, small_one)] == [64, 32]


def test_train_uses_every_part_of_the_recipe(store, data):
    info = train(
        small(
            data,
            crop="mixed",
            head_epochs=2,
            backbone_rate=0.5,
            color=0.3,
            randaugment=0.2,
            mixup=0.2,
            cutmix=1.0,
            ema=0.9,
            class_weights="balanced",
            precision="mixed_bfloat16",
        )
    )
    assert store.get_run(info.run_id).data.metrics["head_accuracy"] > 0.3
    network = carflavor.load_model(f"runs:/{info.run_id}/model").engine.network
    assert {layer.compute_dtype for layer in network.layers} == {"float32", "uint8"} - {"uint8"}


def test_final_training_learns_from_the_validation_photos_and_keeps_the_last_epoch(store, data):
    info = train(small(data, validation="train", epochs=2, batch_size=20))
    run = store.get_run(info.run_id)
    assert "val_accuracy" not in run.data.metrics
    history = mlflow.artifacts.load_dict(f"runs:/{info.run_id}/history.json")
    assert len(history["loss"]) == 2
    training = mlflow.artifacts.load_dict(f"runs:/{info.run_id}/model/manifest.json")["training"]
    assert (training["best_epoch"], training["validation_accuracy"], training["validation"]) == (2, None, "train")


def test_temperature_is_folded_into_the_model(store, data):
    losses = {}
    for temperature in (1.0, 4.0, "fit"):
        info = train(small(data, temperature=temperature))
        classifier = carflavor.load_model(f"runs:/{info.run_id}/model")
        with RecordFile(data / "train.h5") as records:
            probabilities = classifier.predict_probabilities(list(records.images("box")[:]))
        losses[temperature] = np.log(probabilities)
        training = mlflow.artifacts.load_dict(f"runs:/{info.run_id}/model/manifest.json")["training"]
    # Of the same training: logits that are a quarter, up to one number a photo.
    for temperature, factor in ((4.0, 0.25), ("fit", 1 / training["temperature"])):
        spread = np.diff(losses[temperature], axis=1)
        np.testing.assert_allclose(spread, factor * np.diff(losses[1.0], axis=1), rtol=0.02, atol=0.02)


def test_training_begins_with_a_model_of_ours_for_another_dataset(store, data, tmp_path):
    first = train(small(data, epochs=1))
    for split in ("train", "validation"):
        write_split(tmp_path / "other" / f"{split}.h5", [0, 1] * 8, names=("rot", "gruen"))
    weights = f"runs:/{first.run_id}/model"
    second = train(small(tmp_path / "other", weights=weights, epochs=1, learning_rate=1e-9, input_size=40))
    before = carflavor.load_model(weights).network
    after = carflavor.load_model(f"runs:/{second.run_id}/model")
    assert (after.class_names, after.network.input_shape) == (["rot", "gruen"], (None, 40, 40, 3))
    for layer in before.layers[:-1]:
        for old, new in zip(
            layer.trainable_weights, after.network.get_layer(layer.name).trainable_weights, strict=True
        ):
            np.testing.assert_allclose(new, old, atol=1e-6)
    with pytest.raises(ValueError, match="weights: expected a model with network=resnet18, got .* with network=tiny"):
        train(small(data, weights=weights, network="resnet18"))


def test_on_epoch_ends_the_training_without_a_model(store, data):
    seen = []

    def on_epoch(epoch, metrics):
        seen.append((epoch, metrics["val_accuracy"]))
        return epoch == 1

    assert train(small(data, epochs=5), on_epoch) is None
    (run,) = store.search_runs(["0"])
    values = [point.value for point in store.get_metric_history(run.info.run_id, "val_accuracy")]
    assert seen == list(enumerate(values)) and len(seen) == 2
    assert "curves.png" in {artifact.path for artifact in store.list_artifacts(run.info.run_id)}
    assert mlflow.search_logged_models(output_format="list") == []
    assert list(Path(os.environ["CARFLAVOR_HOME"], "checkpoints").iterdir()) == []


def curve_and_weights(store, run_id):
    curves = {
        name: [(point.step, point.value) for point in store.get_metric_history(run_id, name)]
        for name in ("loss", "val_loss", "learning_rate")
    }
    return curves, carflavor.load_model(f"runs:/{run_id}/model").engine.network.get_weights()


def test_killed_training_goes_on_where_it_was(store, data, clean_environment):
    """The first training is a process of its own that kills itself with SIGKILL after its second epoch."""
    recipe = {"epochs": 4, "mixup": 0.2, "cutmix": 1.0, "color": 0.3, "ema": 0.9, "crop": "mixed", "head_epochs": 2}
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(PROJECT)!r}, {str(PROJECT / "tests")!r}]
import mlflow
from colours import add_tiny_network
from test_train import small
from carflavor.train import train
add_tiny_network()
mlflow.set_tracking_uri({mlflow.get_tracking_uri()!r})
train(small({str(data)!r}, **{recipe!r}), lambda epoch, metrics: epoch == 1 and os.kill(os.getpid(), signal.SIGKILL))
"""
    environment = {**clean_environment, "CARFLAVOR_HOME": os.environ["CARFLAVOR_HOME"]}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (dead,) = store.search_runs(["0"])
    assert dead.info.status == "RUNNING"

    resumed = train(small(data, **recipe)).run_id
    undisturbed = train(small(data, **recipe)).run_id
    assert store.get_run(dead.info.run_id).info.status == "KILLED"
    assert store.get_run(resumed).data.tags["carflavor.resumed_from"] == dead.info.run_id
    assert "carflavor.resumed_from" not in store.get_run(undisturbed).data.tags

    curves, weights = curve_and_weights(store, resumed)
    expected_curves, expected_weights = curve_and_weights(store, undisturbed)
    for name, points in expected_curves.items():
        assert [step for step, _ in curves[name]] == [0, 1, 2, 3]
        np.testing.assert_allclose(curves[name], points, rtol=1e-3, err_msg=name)
    for weight, expected in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=0.02, atol=1e-3)


def test_training_begins_anew_where_resume_is_false(store, data):
    with pytest.raises(RuntimeError):
        train(small(data), fail_after_the_second_epoch)
    info = train(small(data, resume=False))
    assert "carflavor.resumed_from" not in store.get_run(info.run_id).data.tags
    assert len(store.get_metric_history(info.run_id, "loss")) == 3


def fail_after_the_second_epoch(epoch, metrics):
    if epoch == 1:
        raise RuntimeError


def test_refused_training_leaves_no_checkpoint(store, data):
    with pytest.raises(ValueError, match="Expected weights=none for network=tiny"):
        train(small(data, weights="imagenet"))
    with pytest.raises(RuntimeError):
        train(small(data), fail_after_the_second_epoch)
    assert len(list(Path(os.environ["CARFLAVOR_HOME"], "checkpoints").iterdir())) == 1


def test_other_settings_do_not_go_on_from_a_checkpoint(store, data):
    with pytest.raises(RuntimeError):
        train(small(data), fail_after_the_second_epoch)
    info = train(small(data, learning_rate=0.01))
    assert "carflavor.resumed_from" not in store.get_run(info.run_id).data.tags


def test_step_that_is_started_again_goes_on_in_its_run(store, data, monkeypatch):
    run_id = store.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setattr("carflavor.tracking._insist_on", lambda *arguments: None)
    with pytest.raises(RuntimeError):
        train(small(data), fail_after_the_second_epoch)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)  # MLflow takes it out of the environment
    statuses = []
    info = train(small(data), lambda *epoch: statuses.append(store.get_run(run_id).info.status))
    assert info.run_id == run_id
    assert statuses == ["RUNNING"]
    assert [point.step for point in store.get_metric_history(run_id, "loss")] == [0, 1, 2]
    assert "carflavor.resumed_from" not in store.get_run(run_id).data.tags


def test_balanced_classes_count_the_same():
    class File:
        labels = np.array([0, 0, 0, 1])
        class_names = ("red", "green", "blue")

    # 4 photos over 2 classes that have any: three times 2/3, and once 2.
    np.testing.assert_allclose(_class_weights("balanced", [File()])[:2], [2 / 3, 2.0])


def test_one_batch_is_shared_by_two_devices(store, data, clean_environment):
    """Logical devices must be declared before TensorFlow starts: a process of its own."""
    program = f"""
import sys
sys.path[:0] = [{str(PROJECT)!r}, {str(PROJECT / "tests")!r}]
import mlflow, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from colours import add_tiny_network
from test_train import small
from carflavor.train import train
add_tiny_network()
mlflow.set_tracking_uri({mlflow.get_tracking_uri()!r})
def say_replicas(epoch, metrics):
    print("replicas:", tf.distribute.get_strategy().num_replicas_in_sync)
settings = dict(devices=2, head_epochs=2, ema=0.9, mixup=0.2, learning_rate=0.003)
print(train(small({str(data)!r}, **settings), say_replicas).run_id)
"""
    environment = {**clean_environment, "CARFLAVOR_HOME": os.environ["CARFLAVOR_HOME"]}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    *said, run_id = ended.stdout.splitlines()
    assert said == ["replicas: 2"] * 3
    history = mlflow.artifacts.load_dict(f"runs:/{run_id}/history.json")
    assert history["loss"][-1] < history["loss"][0]
    assert carflavor.load_model(f"runs:/{run_id}/model").class_names == ["red", "green", "blue"]


def test_train_says_when_it_diverges(store, data):
    with pytest.raises(ValueError, match="The loss is nan after epoch 1: try a smaller learning_rate"):
        train(small(data, learning_rate=1e30))
    (run,) = store.search_runs(["0"])
    assert store.list_artifacts(run.info.run_id, "model") == []


def test_train_that_fails_keeps_the_best_model_so_far(store, data, monkeypatch):
    def fail(history, best_epoch):
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
        train(small(tmp_path / "records", crop="full"))


def test_mixed_takes_the_crop_that_is_stored(store, tmp_path, caplog):
    for split in ("train", "validation"):
        write_split(tmp_path / "records" / f"{split}.h5", [0, 1, 2] * 6, crops=("full",))
    caplog.set_level("INFO")
    train(small(tmp_path / "records", crop="mixed", epochs=1))
    assert "crop=mixed: full is all that the record files hold" in caplog.text


def test_train_refuses_splits_of_different_datasets(store, tmp_path):
    write_split(tmp_path / "records" / "train.h5", [0, 1, 2])
    write_split(tmp_path / "records" / "validation.h5", [0, 1, 2], names=("red", "blue", "green"))
    with pytest.raises(ValueError, match="expected the same class names, got different ones"):
        train(small(tmp_path / "records"))


@pytest.mark.parametrize("signalled", ["SIGINT to the group", "SIGTERM to the step", "SIGTERM to mlflow run"])
def test_interrupted_mlflow_run_is_killed_and_keeps_its_best_model(store, data, clean_environment, signalled):
    """Ctrl-C goes to the whole process group of a real `mlflow run`, as from a terminal; SIGTERM to one process."""
    parameters = [f"data={data}", "input_size=32", "epochs=5000", "batch_size=16"]
    with open("mlflow-run.log", "w") as log, mlflow_run("train", parameters, clean_environment, log) as project_run:
        run = wait_for(lambda: [run for run in store.search_runs(["0"]) if "val_accuracy" in run.data.metrics], log)[0]
        if signalled == "SIGINT to the group":
            os.killpg(project_run.pid, signal.SIGINT)
        elif signalled == "SIGTERM to the step":
            (step,) = Path(f"/proc/{project_run.pid}/task/{project_run.pid}/children").read_text().split()
            os.kill(int(step), signal.SIGTERM)
        else:
            project_run.terminate()
        assert project_run.wait(timeout=120) != 0
    wait_for(lambda: store.get_run(run.info.run_id).info.status == "KILLED", log)
    # It may be KILLED before the model is there: an ended run takes artifacts, too.
    wait_for(lambda: "MLmodel" in {Path(f.path).name for f in store.list_artifacts(run.info.run_id, "model")}, log)
    answer = carflavor.load_model(f"runs:/{run.info.run_id}/model").predict([np.zeros((40, 40, 3), "uint8")])
    assert answer["label"][0] in ("red", "green", "blue")
