import base64

import cv2
import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import CLASS_NAMES
from test_evaluate import write_split

from carflavor.data.records import RecordFile
from carflavor.measures import Predictions
from carflavor.predictions import CarModel, OtherModel, encode_predictions, load_predictor, read_answer

NAMES = ["a", "b", "c"]
PROBABILITIES = [[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]]


class Darkness(mlflow.pyfunc.PythonModel):
    """Says from the stored square alone: the darkest of the three colours is the class."""

    def __init__(self, answer):
        self.answer = answer

    def predict(self, context, model_input: pd.DataFrame, params=None):
        photos = [cv2.imdecode(np.frombuffer(base64.b64decode(text), "uint8"), 1) for text in model_input["image"]]
        darkness = np.array([255 - photo.mean(axis=(0, 1))[::-1] for photo in photos])
        return self.answer(darkness / darkness.sum(axis=1, keepdims=True))


def save_darkness(path, answer):
    mlflow.pyfunc.save_model(path, python_model=Darkness(answer), pip_requirements=[])
    return str(path)


@pytest.fixture
def records(tmp_path):
    colours = [(0, 200, 200), (200, 0, 200), (200, 200, 0), (200, 200, 100)]
    write_split(tmp_path / "test.h5", [np.full((48, 48, 3), colour, "uint8") for colour in colours], [0, 1, 2, 0])
    with RecordFile(tmp_path / "test.h5") as file:
        yield file


@pytest.mark.parametrize(
    "answer",
    [
        pd.DataFrame({"label": ["b", "a"]}),
        pd.DataFrame({"anything": ["b", "a"]}),
        pd.Series(["b", "a"]),
        pd.Series(["b", "a"], dtype="string"),
        np.array(["b", "a"]),
        np.array([["b"], ["a"]]),
        np.array([1, 0]),
        pd.DataFrame({"class_id": [1, 0]}),
    ],
    ids=["label", "one column", "series", "strings", "array", "column", "ids", "column of ids"],
)
def test_labels_in_all_forms(answer):
    predictions = read_answer(answer, NAMES, 2)
    assert predictions.predicted.tolist() == [1, 0]
    assert (predictions.prob, predictions.ranking, predictions.probabilities) == (None, None, None)


@pytest.mark.parametrize(
    "answer",
    [
        np.array(PROBABILITIES),
        pd.DataFrame(PROBABILITIES),
        pd.DataFrame(PROBABILITIES, columns=NAMES)[["c", "a", "b"]],
    ],
    ids=["array", "frame in order", "frame by name"],
)
def test_probabilities_in_all_forms(answer):
    predictions = read_answer(answer, NAMES, 2)
    assert predictions.predicted.tolist() == [1, 0]
    assert predictions.ranking.tolist() == [[1, 0, 2], [0, 2, 1]]
    assert predictions.prob.tolist() == [0.7, 0.5]
    assert predictions.probabilities.tolist() == PROBABILITIES


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int64", "float32"])
def test_one_hot_answers_of_any_type(dtype):
    predictions = read_answer(np.array([[0, 1, 0], [0, 0, 1]], dtype), NAMES, 2)
    assert predictions.predicted.tolist() == [1, 2]
    assert predictions.prob.tolist() == [1.0, 1.0]


def top_k(row):
    return [{"label": name, "prob": prob} for prob, name in sorted(zip(PROBABILITIES[row], NAMES, strict=True))[::-1]]


def test_answers_of_our_own_kind():
    answer = pd.DataFrame({"label": ["b", "unknown"], "prob": [0.7, None], "top_k": [top_k(0), top_k(1)]})
    predictions = read_answer(answer, NAMES, 2)
    assert predictions.predicted.tolist() == [1, -1]
    assert predictions.prob.tolist() == [0.7, 0.0]
    assert predictions.ranking.tolist() == [[1, 0, 2], [0, 2, 1]]
    assert predictions.probabilities.tolist() == PROBABILITIES


def test_short_top_k_tells_no_probabilities():
    answer = pd.DataFrame({"label": ["b", "a"], "prob": [0.7, 0.5], "top_k": [top_k(0)[:2], top_k(1)[:2]]})
    predictions = read_answer(answer, NAMES, 2)
    assert predictions.prob.tolist() == [0.7, 0.5]
    assert (predictions.ranking, predictions.probabilities) == (None, None)


def test_top_k_in_any_order():
    answer = pd.DataFrame({"label": ["b", "a"], "top_k": [top_k(0)[::-1], top_k(1)[::-1]]})
    predictions = read_answer(answer, NAMES, 2)
    assert predictions.ranking.tolist() == [[1, 0, 2], [0, 2, 1]]
    assert predictions.probabilities.tolist() == PROBABILITIES


@pytest.mark.parametrize("nothing", [None, float("nan"), []])
def test_photo_without_top_k_leaves_the_labels(nothing):
    predictions = read_answer(pd.DataFrame({"label": ["b", "unknown"], "top_k": [top_k(0), nothing]}), NAMES, 2)
    assert predictions.predicted.tolist() == [1, -1]
    assert (predictions.ranking, predictions.probabilities) == (None, None)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["b", "a", "c"], "expected top_k to hold lists of {label, prob}, got ['b', 'a', 'c']"),
        (7, "expected top_k to hold lists of {label, prob}, got 7"),
        ([{"label": "b"}], "expected top_k to hold lists of {label, prob}, got [{'label': 'b'}]"),
        ([{"label": "b", "prob": 70}], "different classes, with probabilities of 1 at most together, got [{'label'"),
        ([{"label": "b", "prob": -0.1}], "different classes, with probabilities of 1 at most together, got [{'label'"),
        ([{"label": "b", "prob": float("nan")}], "different classes, with probabilities of 1 at most together, got"),
        ([{"label": "b", "prob": 0.1}] * 3, "different classes, with probabilities of 1 at most together, got"),
        ([{"label": name, "prob": 0.1} for name in NAMES], "probabilities of all classes in top_k to sum to 1"),
    ],
)
def test_other_top_k_is_refused_in_a_sentence(entries, message):
    answer = pd.DataFrame({"label": ["b", "a"], "top_k": [entries, top_k(1)]})
    with pytest.raises(ValueError) as error:
        read_answer(answer, NAMES, 2)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (np.array([["b"], ["a"], ["a"]]), "got ndarray of shape (3, 1)"),
        (np.zeros((2, 4)), "got ndarray of shape (2, 4)"),
        (np.array([0.1, 0.9]), "got ndarray of shape (2,)"),
        (pd.DataFrame({"x": ["b", "a"], "y": ["b", "a"]}), "got DataFrame of shape (2, 2)"),
        (pd.Series(["Audi", "BMW"]), "got labels that are none of the classes, such as 'Audi'"),
        (np.array([3, 4]), "got labels that are none of the classes, such as 3"),
        (pd.Series([["b"], ["a"]]), "got labels that are none of the classes, such as ['b']"),
        (np.array([[0.2, 3.0, 0.1], [0, 0, 1]]), "got rows that do not sum to 1 or hold less than 0"),
        (np.array([[-1.0, 2.0, 0.0], [0, 0, 1]]), "got rows that do not sum to 1 or hold less than 0"),
        (None, "got NoneType"),
    ],
)
def test_other_answers_are_refused_in_a_sentence(answer, got):
    with pytest.raises(ValueError) as error:
        read_answer(answer, NAMES, 2)
    assert str(error.value) == f"expected a label or 3 class probabilities for each of 2 photos, {got}"


def test_probability_beyond_one_is_refused():
    with pytest.raises(ValueError, match="expected prob to be from 0 to 1, got 70 to 80"):
        read_answer(pd.DataFrame({"label": ["a", "b"], "prob": [70, 80]}), NAMES, 2)


@pytest.mark.parametrize("prob", [["high", "low"], [[0.7], [0.3]]])
def test_probability_that_is_no_number_is_refused(prob):
    with pytest.raises(ValueError, match="expected prob to be from 0 to 1, got "):
        read_answer(pd.DataFrame({"label": ["a", "b"], "prob": prob}), NAMES, 2)


@pytest.mark.parametrize(
    "answer",
    [
        lambda shares: [CLASS_NAMES[label] for label in shares.argmax(axis=1)],
        lambda shares: shares,
        lambda shares: pd.DataFrame({"label": [CLASS_NAMES[label] for label in shares.argmax(axis=1)]}),
    ],
    ids=["list of labels", "probabilities", "frame"],
)
def test_model_of_another_flavor_is_asked_for_the_stored_squares(tmp_path, records, answer):
    model = load_predictor(save_darkness(tmp_path / "model", answer), "model")
    assert isinstance(model, OtherModel)
    # Of the last photo, whose class is the first one, blue is the darkest colour.
    assert model.predict(records, "box").predicted.tolist() == [0, 1, 2, 2]
    # The other crop is the negative.
    assert 0 not in model.predict(records, "full").predicted[[0]]


def test_model_with_a_bad_answer_is_named(tmp_path, records):
    model = load_predictor(save_darkness(tmp_path / "model", lambda shares: {"nothing": 1}), "model")
    with pytest.raises(ValueError, match="model: expected a DataFrame, Series, array or list, got dict"):
        model.predict(records, "box")


def test_model_of_ours_behind_pyfunc_is_asked_for_all_classes(packed_model, records):
    ours = CarModel("ours", packed_model, None).predict(records, "box")
    other = OtherModel("other", packed_model, None).predict(records, "box")
    np.testing.assert_allclose(other.probabilities, ours.probabilities, atol=1e-6)
    assert other.ranking.tolist() == ours.ranking.tolist()


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="model: expected a model, a folder with the file MLmodel, got /"):
        load_predictor(str(tmp_path), "model")


def test_predictions_as_csv(records):
    text = encode_predictions(records, Predictions(np.array([0, 1, 2, -1]), prob=np.array([0.5, 0.6, 0.7, 0.0])))
    assert text.splitlines() == [
        "photo,label,predicted,prob",
        "photos/0.jpg,Ram C/V Cargo Van 2012,Ram C/V Cargo Van 2012,0.5",
        'photos/1.jpg,"Škoda ""Octavia"" Combi 2010","Škoda ""Octavia"" Combi 2010",0.6',
        "photos/2.jpg,Citroën l'Ami 1961,Citroën l'Ami 1961,0.7",
        "photos/3.jpg,Ram C/V Cargo Van 2012,unknown,0.0",
    ]


def test_a_model_that_openvino_runs_has_its_network_for_keras(openvino_model):
    model = load_predictor(str(openvino_model), "model")
    assert model.classifier.engine.name == "openvino"
    assert model.network.input_shape == (None, 32, 32, 3)
