import csv
import io

import mlflow
import numpy as np
import pytest
from conftest import CLASS_NAMES

from carflavor.data.records import RecordWriter
from carflavor.evaluate import EvaluateConfig, evaluate, measure
from carflavor.image import squash


def write_test(path, photos, labels, crops=("box", "full"), names=tuple(CLASS_NAMES)):
    with RecordWriter(path, crops, 48, names, {"source": "cars", "crop_margin": 4}) as writer:
        for row, (photo, label) in enumerate(zip(photos, labels, strict=True)):
            square = squash(photo, 48)
            images = {"box": square, "full": 255 - square}
            writer.append(
                {crop: images[crop] for crop in crops}, label, f"cars_test/{row}.jpg", (48, 48), (0, 0, 48, 48)
            )


def test_measure_by_hand():
    # Four photos of three classes; the second class is taken for the first once, the third has no photo.
    probabilities = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])
    measurement = measure(np.array([0, 1, 1, 0]), probabilities, ["a", "b", "c"])
    assert (measurement.photos, measurement.top_1, measurement.top_5) == (4, 0.5, 1.0)
    assert measurement.confusion == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert measurement.by_class == [
        {"class": "a", "photos": 2, "right": 1, "top_1": 0.5, "most often taken for": "c"},
        {"class": "b", "photos": 2, "right": 1, "top_1": 0.5, "most often taken for": "a"},
        {"class": "c", "photos": 0, "right": 0, "top_1": None, "most often taken for": None},
    ]


def test_measure_top_5_counts_the_fifth_and_not_the_sixth():
    probabilities = np.array([[0.3, 0.25, 0.2, 0.1, 0.08, 0.07]] * 2)
    measurement = measure(np.array([4, 5]), probabilities, list("abcdef"))
    assert (measurement.top_1, measurement.top_5) == (0.0, 0.5)


def test_evaluate_measures_what_the_network_says(store, tmp_path, tiny_network, packed_model, photos):
    labels = [0, 1, 2, 0, 1, 2, 0, 0]
    write_test(tmp_path / "records" / "test.h5", photos, labels)
    measurements = evaluate(EvaluateConfig(str(packed_model), str(tmp_path / "records")))
    squares = {"box": [squash(photo, 48) for photo in photos], "full": [255 - squash(photo, 48) for photo in photos]}
    (run,) = store.search_runs(["0"])
    for crop in ("box", "full"):
        network_says = tiny_network.predict_on_batch(np.stack([squash(square, 32) for square in squares[crop]]))
        right = float(np.mean(network_says.argmax(axis=1) == labels))
        assert measurements[crop].top_1 == run.data.metrics[f"{crop}_top_1"] == right
        assert measurements[crop].top_5 == run.data.metrics[f"{crop}_top_5"] == 1.0
        rows = list(
            csv.DictReader(io.StringIO(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/predictions_{crop}.csv")))
        )
        assert [row["photo"] for row in rows] == [f"cars_test/{row}.jpg" for row in range(8)]
        assert [row["predicted"] for row in rows] == [CLASS_NAMES[i] for i in network_says.argmax(axis=1)]
    assert {artifact.path for artifact in store.list_artifacts(run.info.run_id)} == {
        "config.json",
        "report.html",
        "evaluation.json",
        *(f"{name}_{crop}.png" for name in ("confusion", "confused_pairs", "classes") for crop in ("box", "full")),
        *(f"predictions_{crop}.csv" for crop in ("box", "full")),
    }
    evaluation = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/evaluation.json")
    assert np.sum(evaluation["box"]["confusion"]) == 8
    html = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/report.html")
    assert "Škoda &#34;Octavia&#34; Combi 2010" in html
    assert run.data.tags["carflavor.model"] == str(packed_model)


def test_evaluate_takes_the_crops_that_are_there(store, tmp_path, packed_model, photos):
    write_test(tmp_path / "records" / "test.h5", photos, [0] * 8, crops=("full",))
    assert list(evaluate(EvaluateConfig(str(packed_model), str(tmp_path / "records")))) == ["full"]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0], ("a", "b"), "expected the 3 classes of the model, got 2 that are not the same in the same order"),
        ([0], tuple(reversed(CLASS_NAMES)), "expected the 3 classes of the model, got 3"),
        ([], tuple(CLASS_NAMES), "expected test photos, got none"),
    ],
)
def test_evaluate_refuses_other_data(store, tmp_path, packed_model, photos, labels, names, message):
    write_test(tmp_path / "records" / "test.h5", photos[: len(labels)], labels, names=names)
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateConfig(str(packed_model), str(tmp_path / "records")))
    assert store.search_runs(["0"])[0].info.status == "FAILED"


def test_evaluate_needs_test_photos(store, tmp_path, packed_model):
    (tmp_path / "records").mkdir()
    with pytest.raises(ValueError, match="expected .*test.h5, which preprocess writes, got nothing"):
        evaluate(EvaluateConfig(str(packed_model), str(tmp_path / "records")))
