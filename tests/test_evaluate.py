import csv
import io
import json
import shutil

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import CLASS_NAMES

import carflavor
from carflavor import evaluate as evaluate_module
from carflavor.data.records import RecordFile, RecordWriter
from carflavor.evaluate import EvaluateConfig, evaluate
from carflavor.image import squash

TEST_LABELS = [0, 1, 2, 0, 1, 2, 0, 0]
BY_CROP = ["confusion", "confused_pairs", "classes", "reliability", "rejection", "hardest", "gradcam"]


def write_split(path, photos, labels, crops=("box", "full"), names=tuple(CLASS_NAMES), **settings):
    with RecordWriter(path, crops, 48, names, {"source": "cars", "crop_margin": 4, **settings}) as writer:
        for row, (photo, label) in enumerate(zip(photos, labels, strict=True)):
            square = squash(photo, 48)
            images = {"box": square, "full": 255 - square}
            writer.append({crop: images[crop] for crop in crops}, label, f"photos/{row}.jpg", (36, 48), (4, 4, 44, 32))


@pytest.fixture
def records(tmp_path, photos):
    """A folder of record files; the tiny network has learned that the classes are 0, 1, 2, 0, 1, 2, 0, 1."""
    labels = {"train": [0, 1, 2, 0, 1, 2, 0, 1], "validation": [0, 1, 2, 0, 1, 2, 0, 1], "test": TEST_LABELS}
    for split in labels:
        write_split(tmp_path / "records" / f"{split}.h5", photos, labels[split], crops=("box",))
    return tmp_path / "records"


def artifacts(store, run):
    return {artifact.path for artifact in store.list_artifacts(run.info.run_id)}


def load_evaluation(run):
    return mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/evaluation.json")


def load_report(run):
    return mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/report.html")


def test_evaluate_measures_what_the_network_says(store, records, tiny_network, packed_model, photos):
    for split in ("validation", "test"):
        write_split(records / f"{split}.h5", photos, TEST_LABELS)
    findings = evaluate(EvaluateConfig(str(packed_model), str(records)))
    squares = {"box": [squash(photo, 48) for photo in photos], "full": [255 - squash(photo, 48) for photo in photos]}
    (run,) = store.search_runs(["0"])
    for crop in ("box", "full"):
        network_says = tiny_network.predict_on_batch(np.stack([squash(square, 32) for square in squares[crop]]))
        right = float(np.mean(network_says.argmax(axis=1) == TEST_LABELS))
        assert findings[crop].measurement.top_1.value == run.data.metrics[f"{crop}_top_1"] == right
        assert findings[crop].measurement.top_5.value == run.data.metrics[f"{crop}_top_5"] == 1.0
        text = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/predictions_{crop}.csv")
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["photo"] for row in rows] == [f"photos/{row}.jpg" for row in range(8)]
        assert [row["predicted"] for row in rows] == [CLASS_NAMES[i] for i in network_says.argmax(axis=1)]
        np.testing.assert_allclose(
            [float(row["prob_of_label"]) for row in rows], network_says[range(8), TEST_LABELS], atol=1e-5
        )
    assert artifacts(store, run) == {
        "config.json",
        "report.html",
        "evaluation.json",
        *(f"{name}_{crop}.png" for name in BY_CROP for crop in ("box", "full")),
        *(f"predictions_{crop}.csv" for crop in ("box", "full")),
    }
    assert "Škoda &#34;Octavia&#34; Combi 2010" in load_report(run)
    assert run.data.tags["carflavor.model"] == str(packed_model)


def test_run_has_the_tables_as_json_and_the_record_files_as_inputs(store, records, packed_model):
    evaluate(EvaluateConfig(str(packed_model), str(records)))
    (run,) = store.search_runs(["0"])
    evaluation = load_evaluation(run)
    assert (evaluation["model"], evaluation["against"]) == (str(packed_model), None)
    assert evaluation["data"]["source"] == "cars"
    box = evaluation["crops"]["box"]
    assert [row["photos"] for row in box["measurement"]["by_class"]] == [4, 2, 2]
    assert box["measurement"]["top_1"]["of"] == 8
    assert sum(row["photos"] for row in box["measurement"]["calibration"]["bins"]) == 8
    wrong = 8 - box["measurement"]["top_1"]["count"]
    assert sum(row["photos"] for row in box["measurement"]["confused"]) == len(box["hardest"]) == wrong
    assert all(name.startswith("photos/") for name in box["hardest"])

    inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert sorted(inputs) == ["test", "validation"]
    assert inputs["test"].name == "cars test"
    assert json.loads(inputs["test"].source)["uri"] == str(records / "test.h5")
    assert json.loads(inputs["test"].profile)["num_rows"] == 8
    with RecordFile(records / "test.h5") as test:
        assert inputs["test"].digest == evaluation["data"]["digest"] == test.digest()[:36]


def test_threshold_is_chosen_on_validation_and_reported_for_test(store, records, tiny_network, packed_model, photos):
    says = tiny_network.predict_on_batch(np.stack([squash(squash(photo, 48), 32) for photo in photos]))
    ranked, taken_for = np.argsort(-says.max(axis=1)), says.argmax(axis=1)
    # On validation the less sure half is wrong; on the test photos all are right, and none had to be withheld.
    on_validation = taken_for.copy()
    on_validation[ranked[4:]] = (taken_for[ranked[4:]] + 1) % 3
    write_split(records / "validation.h5", photos, on_validation, crops=("box",))
    write_split(records / "test.h5", photos, taken_for, crops=("box",))
    findings = evaluate(EvaluateConfig(str(packed_model), str(records), answered_accuracy=0.99))["box"]
    (run,) = store.search_runs(["0"])
    threshold = findings.threshold
    probs = says.max(axis=1)[ranked]
    assert probs[4] < threshold.validation.min_prob <= probs[3] + 1e-6
    assert (threshold.validation.answered.count, threshold.validation.accuracy.value) == (4, 1.0)
    assert (threshold.test.answered.count, threshold.test.answered.of) == (4, 8)
    metrics = run.data.metrics
    assert metrics["box_min_prob"] == threshold.test.min_prob == threshold.validation.min_prob
    assert metrics["box_answered"] == 0.5
    with RecordFile(records / "test.h5") as test:
        squares = list(test.images("box")[:])
    answer = carflavor.load_model(packed_model).predict(squares, min_prob=metrics["box_min_prob"])
    assert (answer["label"] != "unknown").sum() == 4


def test_no_threshold_from_photos_that_the_model_has_learned(store, records, tiny_network, tmp_path):
    carflavor.save_model(
        tiny_network, tmp_path / "merged", CLASS_NAMES, image_size=48, crop_margin=4, training={"validation": "train"}
    )
    findings = evaluate(EvaluateConfig(str(tmp_path / "merged"), str(records)))["box"]
    (run,) = store.search_runs(["0"])
    assert findings.threshold is None
    assert findings.notes == [
        "The threshold for unknown: the model has learned from the validation photos, and is too sure of them."
    ]
    assert "box_min_prob" not in run.data.metrics
    assert "too sure of them" in load_report(run)


SPLIT = {"source_digest": "1a", "seed": 0, "validation_share": 0.1, "near_duplicate_distance": 36}


@pytest.mark.parametrize(
    ("changes", "note", "caution"),
    [
        ({}, None, False),
        # Most of these validation photos are among those that the model learned from.
        (
            {"seed": 1},
            "the validation photos are of another split than the model's training, which had most of them",
            False,
        ),
        ({"source_digest": "2b", "seed": 1}, None, True),
    ],
    ids=["same", "other split", "other data"],
)
def test_threshold_from_record_files_that_the_model_was_not_trained_with(
    store, records, photos, tiny_network, tmp_path, monkeypatch, changes, note, caution
):
    training = {"data": {"source": "cars", **SPLIT}}
    carflavor.save_model(tiny_network, tmp_path / "model", CLASS_NAMES, image_size=48, crop_margin=4, training=training)
    for split in ("train", "validation", "test"):
        write_split(records / f"{split}.h5", photos, TEST_LABELS, crops=("box",), **{**SPLIT, **changes})
    asked = []

    def find(test, others):
        asked.extend(other.path.name for other in others)
        return np.zeros(8, bool)

    monkeypatch.setattr(evaluate_module, "near_duplicates", find)
    findings = evaluate(EvaluateConfig(str(tmp_path / "model"), str(records)))["box"]
    (run,) = store.search_runs(["0"])
    assert findings.notes == ([f"The threshold for unknown: {note}."] if note else [])
    assert (findings.threshold is None) == bool(note)
    assert asked == (["train.h5", "validation.h5"] if note else ["train.h5"])
    assert ("The model was trained on other data (cars)" in load_report(run)) == caution


def test_training_photos_under_another_crop(store, records, packed_model, photos):
    write_split(records / "train.h5", photos, TEST_LABELS, crops=("full",))
    findings = evaluate(EvaluateConfig(str(packed_model), str(records)))["box"]
    assert findings.measurement.without_near_duplicates is None
    assert findings.notes == [
        "Accuracy without near-duplicates: the training photos are stored under another crop than the test photos."
    ]


@pytest.mark.parametrize("empty", [False, True])
def test_no_threshold_without_validation_photos(store, records, packed_model, empty):
    (records / "validation.h5").unlink()
    if empty:
        write_split(records / "validation.h5", [], [], crops=("box",))
    findings = evaluate(EvaluateConfig(str(packed_model), str(records)))["box"]
    assert findings.notes == ["The threshold for unknown: there are no validation photos beside the test photos."]


@pytest.mark.parametrize(("number", "named"), [(3, "3 test photos that have"), (1, "one test photo that has")])
def test_near_duplicates_in_training_are_counted_apart(number, named, store, records, packed_model, monkeypatch):
    asked = []

    def find(test, others):
        asked.append((test.path.name, [other.path.name for other in others]))
        return np.arange(8) < number

    monkeypatch.setattr(evaluate_module, "near_duplicates", find)
    findings = evaluate(EvaluateConfig(str(packed_model), str(records)))["box"]
    (run,) = store.search_runs(["0"])
    assert asked == [("test.h5", ["train.h5"])]
    alone = findings.measurement.without_near_duplicates
    assert alone.of == 8 - number
    assert run.data.metrics["box_top_1_without_near_duplicates"] == alone.value
    assert f"Without the {named} a near-duplicate in train.h5" in load_report(run)


def test_metrics_stand_on_the_page_of_the_model(store, records, tiny_network):
    info = carflavor.log_model(tiny_network, CLASS_NAMES, image_size=48, crop_margin=4)
    mlflow.end_run()
    evaluate(EvaluateConfig(info.model_uri, str(records)))
    run = store.get_run(store.search_runs(["0"], "tags.`carflavor.step` = 'evaluate'")[0].info.run_id)
    (metric,) = [metric for metric in mlflow.get_logged_model(info.model_id).metrics if metric.key == "box_top_1"]
    assert (metric.value, metric.run_id) == (run.data.metrics["box_top_1"], run.info.run_id)
    assert metric.dataset_name == "cars test"
    assert [model.model_id for model in run.inputs.model_inputs] == [info.model_id]


def test_evaluate_takes_the_crops_that_are_there(store, tmp_path, packed_model, photos):
    write_split(tmp_path / "records" / "test.h5", photos, [0] * 8, crops=("full",))
    assert list(evaluate(EvaluateConfig(str(packed_model), str(tmp_path / "records")))) == ["full"]


class FirstClass(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: pd.DataFrame, params=None):
        return pd.Series([CLASS_NAMES[0]] * len(model_input))


@pytest.fixture
def labels_only(tmp_path):
    path = tmp_path / "first"
    mlflow.pyfunc.save_model(path, python_model=FirstClass(), pip_requirements=[])
    return str(path)


def test_model_that_gives_labels_only(store, records, labels_only):
    findings = evaluate(EvaluateConfig(labels_only, str(records)))["box"]
    (run,) = store.search_runs(["0"])
    assert findings.measurement.top_1.value == 0.5
    assert findings.notes == [
        "Calibration, the threshold for unknown and the hardest photos: the model gives labels only.",
        "Top-5: the model does not name the most probable classes.",
        "Grad-CAM: it needs a network that carflavor wrote.",
    ]
    assert {path for path in artifacts(store, run) if path.endswith("_box.png")} == {
        f"{name}_box.png" for name in ("confusion", "confused_pairs", "classes")
    }
    assert [entry.tags[0].value for entry in run.inputs.dataset_inputs] == ["test"]
    assert "the model gives labels only" in load_report(run)


def test_comparison_with_another_model(store, records, packed_model, labels_only):
    findings = evaluate(EvaluateConfig(str(packed_model), str(records), against=labels_only))["box"]
    (run,) = store.search_runs(["0"])
    comparison = findings.comparison
    assert comparison.second.value == 0.5
    assert comparison.first == findings.measurement.top_1
    assert run.data.metrics["box_difference"] == pytest.approx(comparison.first.value - 0.5)
    assert run.data.metrics["box_mcnemar_p"] == comparison.p_value
    assert load_evaluation(run)["against"] == labels_only
    assert "comparison_box.png" in artifacts(store, run)


def test_comparison_with_a_run_asks_no_model(store, records, labels_only, packed_model, tmp_path):
    evaluate(EvaluateConfig(labels_only, str(records)))
    (other,) = store.search_runs(["0"])
    shutil.rmtree(labels_only)
    for against in (other.info.run_id, f"runs:/{other.info.run_id}"):
        findings = evaluate(EvaluateConfig(str(packed_model), str(records), against=against))["box"]
        assert findings.comparison.second.value == 0.5


def test_comparison_with_a_run_on_other_photos_asks_its_model(store, records, labels_only, packed_model, photos):
    write_split(records.parent / "others" / "test.h5", photos[:4], [0, 0, 0, 1], crops=("box",))
    evaluate(EvaluateConfig(labels_only, str(records.parent / "others")))
    (other,) = store.search_runs(["0"])
    findings = evaluate(EvaluateConfig(str(packed_model), str(records), against=other.info.run_id))["box"]
    assert (findings.comparison.second.count, findings.comparison.second.of) == (4, 8)


def test_comparison_with_a_run_that_measured_another_crop(store, records, labels_only, packed_model, photos):
    evaluate(EvaluateConfig(labels_only, str(records)))
    (other,) = store.search_runs(["0"])
    write_split(records.parent / "both" / "test.h5", photos, TEST_LABELS)
    findings = evaluate(EvaluateConfig(str(packed_model), str(records.parent / "both"), against=other.info.run_id))
    assert findings["box"].comparison.second.value == 0.5
    assert findings["full"].comparison is None
    assert findings["full"].notes[-1] == (
        f"The comparison: runs:/{other.info.run_id} has no answers for these photos with crop=full."
    )


def test_comparison_with_nothing(store, records, packed_model):
    with pytest.raises(ValueError, match="against: expected a run, got runs:/1a: "):
        evaluate(EvaluateConfig(str(packed_model), str(records), against="runs:/1a"))


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0], ("a", "b"), "expected the 3 classes of the model, got 2 that are not the same in the same order"),
        ([0], tuple(reversed(CLASS_NAMES)), "expected the 3 classes of the model, got 3"),
        ([], tuple(CLASS_NAMES), "expected test photos, got none"),
    ],
)
def test_evaluate_refuses_other_data(store, tmp_path, packed_model, photos, labels, names, message):
    write_split(tmp_path / "records" / "test.h5", photos[: len(labels)], labels, names=names)
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateConfig(str(packed_model), str(tmp_path / "records")))
    assert store.search_runs(["0"])[0].info.status == "FAILED"


def test_evaluate_needs_test_photos(store, tmp_path, packed_model):
    (tmp_path / "records").mkdir()
    with pytest.raises(ValueError, match="expected .*test.h5, which preprocess writes, got nothing"):
        evaluate(EvaluateConfig(str(packed_model), str(tmp_path / "records")))
