import keras
import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import CLASS_NAMES

import carflavor
from carflavor.calibration import fit_temperature, fold_temperature
from carflavor.image import squash


def test_temperature_of_odds_that_are_too_high():
    # Of four photos three are right, all with a probability of 0.9: log odds of 2.1972 where they should be 1.0986,
    # those of 0.75. So the logits have to be halved.
    probabilities = np.array([[0.9, 0.1]] * 4)
    assert fit_temperature(probabilities, np.array([0, 0, 0, 1])) == pytest.approx(2.0, abs=1e-3)


def test_temperature_of_odds_that_are_too_low():
    probabilities = np.array([[0.6, 0.4]] * 10, np.float32)
    # ln(0.6 / 0.4) / ln(0.9 / 0.1)
    assert fit_temperature(probabilities, np.array([0] * 9 + [1])) == pytest.approx(0.18454, abs=1e-4)


def test_temperature_is_one_where_every_photo_is_right():
    assert fit_temperature(np.array([[0.6, 0.4]] * 3), np.array([0, 0, 0])) == 1.0


def test_temperature_of_probabilities_that_are_zero():
    probabilities = np.array([[1.0, 0.0]] * 4, np.float32)
    assert 1 < fit_temperature(probabilities, np.array([0, 0, 0, 1])) <= 20


def test_folded_temperature_reaches_every_way_in(tiny_network, photos, tmp_path):
    network = keras.models.clone_model(tiny_network)
    network.set_weights(tiny_network.get_weights())
    squares = np.stack([squash(squash(photo, 48), 32) for photo in photos])
    logs = np.log(network.predict_on_batch(squares)) / 2.5
    expected = np.exp(logs) / np.exp(logs).sum(axis=1, keepdims=True)

    fold_temperature(network, 2.5)
    path = tmp_path / "model"
    carflavor.save_model(network, path, class_names=CLASS_NAMES, image_size=48, crop_margin=4)
    answer = mlflow.pyfunc.load_model(str(path)).predict(pd.DataFrame({"image": photos}))
    in_class_order = [
        [{entry["label"]: entry["prob"] for entry in top_k}[name] for name in CLASS_NAMES] for top_k in answer["top_k"]
    ]
    for probabilities in (
        network.predict_on_batch(squares),
        carflavor.load_model(path).predict_probabilities(photos),
        mlflow.tensorflow.load_model(str(path)).predict_on_batch(squares),
        mlflow.keras.load_model(str(path)).predict_on_batch(squares),
        in_class_order,
    ):
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)


@pytest.mark.parametrize(
    "last",
    [keras.layers.Dense(3), keras.layers.Dense(3, activation="sigmoid"), keras.layers.Softmax()],
    ids=["no activation", "sigmoid", "softmax of its own"],
)
def test_fold_refuses_other_last_layers(last):
    network = keras.Sequential([keras.Input((3,)), last])
    with pytest.raises(ValueError, match="Expected a network that ends in a Dense layer with softmax. Received: <"):
        fold_temperature(network, 2.0)
