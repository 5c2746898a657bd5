"""Who is measured: a model of any flavor, or a run that has measured one, asked for the photos of a record file."""

import base64
import functools
import io
import logging
import re

import cv2
import mlflow
import numpy as np
import pandas as pd
from mlflow.models import Model

import carflavor
from carflavor import tracking
from carflavor.data.locations import resolve_input
from carflavor.data.records import CROPS
from carflavor.engines import KerasEngine
from carflavor.flavor import FLAVOR_NAME
from carflavor.measures import NO_CLASS, TOP_K, Predictions
from carflavor.progress import progress_bar
from carflavor.scoring import UNKNOWN

_ROWS_AT_ONCE = 256
_SPLIT_SETTINGS = ("seed", "validation_share", "near_duplicate_distance")  # what decides about the validation photos
_ROUNDING = 0.01  # how far the sum of a photo's probabilities may lie from 1
_RUN = re.compile(r"runs:/([^/]+)/?|([0-9a-f]{32})")

_logger = logging.getLogger(__name__)


class CarModel:
    """A model that carflavor wrote.

    Attributes:
        uri: What it was named by.
        model_id: MLflow's id of the logged model, or None.
        classifier: The `carflavor.scoring.CarClassifier`.
        trained_crop: Parameter `crop` of its training, where it is known.
    """

    def __init__(self, uri, path, model_id, engine=None):
        self.uri = uri
        self.model_id = model_id
        self.classifier = carflavor.load_model(path, engine=engine)
        training = self.classifier.manifest.get("training", {})
        self.trained_crop = training.get("crop")
        self._path = path
        self._trained_on_validation = training.get("validation") == "train"
        self._data = training.get("data") or {}  # settings of its record files, where it is known

    @functools.cached_property
    def network(self):
        """The `keras.Model`, whatever engine runs it."""
        if isinstance(self.classifier.engine, KerasEngine):
            return self.classifier.network
        return carflavor.load_model(self._path, engine="keras").network

    def check(self, records):
        """Raises a ValueError unless the classes are the model's, and warns of photos prepared in another way."""
        if records.class_names != self.classifier.class_names:
            raise ValueError(
                f"{records.path}: expected the {len(self.classifier.class_names)} classes of the model, "
                f"got {len(records.class_names)} that are not the same in the same order"
            )
        made = {"image_size": records.image_size, "crop_margin": records.settings["crop_margin"]}
        trained = {"image_size": self.classifier.image_size, "crop_margin": self.classifier.crop_margin}
        if made != trained:
            _logger.warning(
                "%s was made with %s, the photos that the model learned from with %s: served, the model sees other "
                "pixels than these",
                records.path,
                made,
                trained,
            )

    def knows(self, validation):
        """Says in what way it has learned from the photos of a validation file, or nothing if it has not."""
        if self._differs(validation, "source_digest"):
            return ""
        if self._differs(validation, *_SPLIT_SETTINGS):
            return "the validation photos are of another split than the model's training, which had most of them"
        if self._trained_on_validation:
            return "the model has learned from the validation photos, and is too sure of them"
        return ""

    def caution(self, records):
        """Says what a reader should know of its training and the photos of a record file, or nothing."""
        if not self._differs(records, "source_digest"):
            return ""
        return (
            f"The model was trained on other data ({self._data.get('source')}): whether any of the photos here were "
            "part of that is not known."
        )

    def _differs(self, records, *names):
        return bool(self._data) and any(self._data.get(name) != records.settings.get(name) for name in names)

    def predict(self, records, crop):
        """Returns `Predictions` for all photos of a record file."""
        return Predictions.of_probabilities(predict_split(self.classifier, records, crop))


class OtherModel:
    """A model of any other flavor: it takes a DataFrame with the column `image`, photos in base64.

    Attributes:
        uri: What it was named by.
        model_id: MLflow's id of the logged model, or None.
        classifier: None.
    """

    classifier = None

    def __init__(self, uri, path, model_id):
        self.uri = uri
        self.model_id = model_id
        self._pyfunc = mlflow.pyfunc.load_model(str(path))

    def knows(self, validation):
        """Says nothing: what it has learned from is not known."""
        return ""

    def caution(self, records):
        """Says what a reader should know of its training."""
        return "What the model was trained on is not known: any of the photos here may have been part of it."

    def predict(self, records, crop):
        """Returns `Predictions` for all photos of a record file.

        Raises:
            ValueError: If the answer is none that `read_answer` understands.
        """
        signature = self._pyfunc.metadata.signature
        names = {param.name for param in signature.params} if signature and signature.params else ()
        # As our own models do, it may name but a few classes unless it is asked for all.
        params = {"top_k": len(records.class_names)} if "top_k" in names else None

        def answer(photos):
            return self._pyfunc.predict(pd.DataFrame({"image": [_encode(photo) for photo in photos]}), params=params)

        parts = _ask_for_each(answer, records, crop)
        try:
            return read_answer(_join(parts), records.class_names, len(records))
        except ValueError as error:
            raise ValueError(f"{self.uri}: {error}") from None


class MeasuredRun:
    """A run of `evaluate`, which has kept what its model answered.

    Attributes:
        uri: URI of the run.
        model_uri: What its model was named by.
        crops: Crop protocols that it measured.
    """

    def __init__(self, run):
        self._run_id = run.info.run_id
        self.uri = f"runs:/{self._run_id}"
        self.model_uri = run.data.tags.get(tracking.MODEL_TAG, f"{self.uri}/model")
        names = [file.path for file in mlflow.MlflowClient().list_artifacts(self._run_id)]
        self.crops = [crop for crop in CROPS if predictions_file(crop) in names]

    def measured(self, records, crop):
        """Says whether it has answers for the photos of a record file under a crop, and for no others."""
        if crop not in self.crops:
            return False
        frame = self._read(crop)
        labels = [records.class_names[label] for label in records.labels]
        return frame["photo"].tolist() == records.sources and frame["label"].tolist() == labels

    def predict(self, records, crop):
        """Returns `Predictions` without a ranking for the photos of a record file that was `measured`."""
        return Predictions(_number(self._read(crop)["predicted"], records.class_names))

    def _read(self, crop):
        text = mlflow.artifacts.load_text(f"{self.uri}/{predictions_file(crop)}")
        # As text: a class may be called None, NA or 911.
        return pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)


def predictions_file(crop):
    """Returns the name of the file on a run that `encode_predictions` fills and `MeasuredRun` reads."""
    return f"predictions_{crop}.csv"


def encode_predictions(records, predictions):
    """Returns predictions as CSV, a row a photo: `photo`, `label`, `predicted`, and the probabilities of both."""
    names = [*records.class_names, UNKNOWN]  # NO_CLASS, which is -1, takes the last one
    columns = {
        "photo": records.sources,
        "label": [names[label] for label in records.labels],
        "predicted": [names[label] for label in predictions.predicted],
    }
    if predictions.prob is not None:
        columns["prob"] = predictions.prob
    if predictions.probabilities is not None:
        columns["prob_of_label"] = predictions.probabilities[np.arange(len(records)), records.labels]
    text = io.StringIO()
    pd.DataFrame(columns).to_csv(text, index=False)
    return text.getvalue()


def load_predictor(place, parameter):
    """Loads a model of any flavor.

    Args:
        place: Path, `runs:/...` or `models:/...` of a model directory.
        parameter: What the user calls it.

    Returns:
        `CarModel` or `OtherModel`.

    Raises:
        ValueError: If there is no model.
    """
    path = resolve_input(place, parameter)
    if not (path / "MLmodel").is_file():
        raise ValueError(f"{parameter}: expected a model, a folder with the file MLmodel, got {place}")
    model = Model.load(path)
    kind = CarModel if FLAVOR_NAME in model.flavors else OtherModel
    return kind(place, path, _find_model_id(model))


def load_other_predictor(place, parameter, records):
    """Finds what a model is compared with.

    Args:
        place: A run, as `runs:/<run id>` or its id; or whatever `load_predictor` takes.
        parameter: What the user calls it.
        records: `RecordFile` that it has to answer for.

    Returns:
        `MeasuredRun` if the run is one of `evaluate` on the same photos, or else the run's model.
    """
    run_id = _RUN.fullmatch(place)
    if not run_id:
        return load_predictor(place, parameter)
    try:
        run = mlflow.get_run(run_id[1] or run_id[2])
    except mlflow.MlflowException as error:
        raise ValueError(f"{parameter}: expected a run, got {place}: {error}") from None
    measured = MeasuredRun(run)
    if any(measured.measured(records, crop) for crop in records.crops):
        return measured
    if measured.crops:
        _logger.info("%s measured other photos: its model %s is asked for these", place, measured.model_uri)
    return load_predictor(measured.model_uri, parameter)


def predict_split(classifier, records, crop):
    """Returns the float32 probabilities (N, C) of all photos of a record file, in its order.

    Args:
        classifier: `CarClassifier`, or whatever has its `predict_probabilities`.
        records: `RecordFile` with at least one photo.
        crop: `box` or `full`.
    """
    return np.concatenate(_ask_for_each(classifier.predict_probabilities, records, crop))


def read_answer(answer, class_names, count):
    """Reads what a model of any flavor answered.

    Args:
        answer: One of: a DataFrame with `label` and, if it likes, `prob` and `top_k`, as carflavor's models answer;
            labels as a DataFrame of one column, Series or array, texts being class names and whole numbers 0-based
            class ids; class probabilities (N, C) as an array or DataFrame, in the order of the classes unless the
            columns are the class names.
        class_names: C names.
        count: N.

    Returns:
        `Predictions`.

    Raises:
        ValueError: If it is anything else.
    """
    expected = f"expected a label or {len(class_names)} class probabilities for each of {count} photos"
    top_k = prob = None
    if isinstance(answer, pd.DataFrame):
        columns = [str(column) for column in answer.columns]
        if "label" in columns:
            top_k, prob, answer = answer.get("top_k"), answer.get("prob"), answer["label"]
        elif sorted(columns) == sorted(class_names):
            answer = answer.set_axis(columns, axis=1)[class_names]
    values = np.asarray(answer)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if not values.ndim or len(values) != count:
        raise ValueError(f"{expected}, got {_describe(answer)}")
    if values.ndim == 2 and values.shape[1] == len(class_names) and pd.api.types.is_numeric_dtype(values.dtype):
        values = values.astype(float)  # a one-hot answer may be of bool or uint8, which know no less than 0
        if not _are_probabilities(values):
            raise ValueError(f"{expected}, got rows that do not sum to 1 or hold less than 0")
        return Predictions.of_probabilities(values)
    if values.ndim != 1 or values.dtype.kind == "f":
        raise ValueError(f"{expected}, got {_describe(answer)}")
    predicted = _number(values, class_names)
    if (predicted == NO_CLASS).all():
        raise ValueError(f"{expected}, got labels that are none of the classes, such as {values.tolist()[0]!r}")
    rankings, probabilities = (None, None) if top_k is None else _read_top_k(top_k, class_names)
    return Predictions(predicted, None if prob is None else _read_prob(prob), rankings, probabilities)


def _are_probabilities(values):
    return values.min() >= 0 and np.allclose(values.sum(axis=1), 1, atol=_ROUNDING)


def _read_prob(prob):
    try:
        # A photo that the model could not answer for has none.
        values = pd.to_numeric(prob).astype("Float64").fillna(0.0).to_numpy(float)
    except (TypeError, ValueError):
        raise ValueError(f"expected prob to be from 0 to 1, got {prob.tolist()[0]!r:.100}") from None
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"expected prob to be from 0 to 1, got {values.min():g} to {values.max():g}")
    return values


def _read_top_k(top_k, class_names):
    """Returns the ranking and the probabilities of all photos; each None unless `top_k` tells it of every photo."""
    rows = [_read_entries(entries, class_names) for entries in top_k]
    wanted = min(TOP_K, len(class_names))
    ranking = probabilities = None
    if all(len(labels) >= wanted for labels, _ in rows):
        ranking = np.array([labels[:wanted] for labels, _ in rows])
    if all(len(labels) == len(class_names) and NO_CLASS not in labels for labels, _ in rows):
        probabilities = np.array([probs[np.argsort(labels)] for labels, probs in rows])
        if not _are_probabilities(probabilities):
            raise ValueError("expected the probabilities of all classes in top_k to sum to 1, got others")
    return ranking, probabilities


def _read_entries(entries, class_names):
    """Returns class ids and probabilities that a model named for one photo, the most probable first."""
    if pd.api.types.is_scalar(entries) and pd.isna(entries):
        entries = []  # it could not answer for this photo
    try:
        labels = _number([entry["label"] for entry in entries], class_names)
        probs = np.array([entry["prob"] for entry in entries], float)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"expected top_k to hold lists of {{label, prob}}, got {entries!r:.100}") from None
    known = labels[labels != NO_CLASS]
    if not (probs >= 0).all() or probs.sum() > 1 + _ROUNDING or len(set(known)) < len(known):
        raise ValueError(
            f"expected top_k to hold different classes, with probabilities of 1 at most together, got {entries!r:.100}"
        )
    order = np.argsort(-probs, kind="stable")
    return labels[order], probs[order]


def _number(labels, class_names):
    """Turns labels into class ids; what is no class becomes `NO_CLASS`."""
    labels = np.asarray(labels)
    if labels.dtype.kind in "iu":
        return np.where((labels >= 0) & (labels < len(class_names)), labels, NO_CLASS).astype(np.int64)
    ids = {name: label for label, name in enumerate(class_names)}
    return np.array([ids.get(label, NO_CLASS) if isinstance(label, str) else NO_CLASS for label in labels], np.int64)


def _describe(answer):
    shape = getattr(answer, "shape", None)
    return type(answer).__name__ if shape is None else f"{type(answer).__name__} of shape {shape}"


def _ask_for_each(ask, records, crop):
    """Calls a function with the photos of a record file, a few hundred at a time; returns what it returned."""
    images = records.images(crop)
    answers = []
    with progress_bar(f"evaluate {crop}", len(records)) as progress:
        for start in range(0, len(records), _ROWS_AT_ONCE):
            photos = images[start : start + _ROWS_AT_ONCE]
            answers.append(ask(list(photos)))
            progress.update(len(photos))
    return answers


def _join(parts):
    kinds = sorted({type(part).__name__ for part in parts})
    if len(kinds) > 1:
        raise ValueError(f"expected answers of one kind, got {' and '.join(kinds)}")
    if isinstance(parts[0], (pd.DataFrame, pd.Series)):
        return pd.concat(parts, ignore_index=True)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    if isinstance(parts[0], list):
        return pd.Series([label for part in parts for label in part])
    raise ValueError(f"expected a DataFrame, Series, array or list, got {type(parts[0]).__name__}")


def _encode(photo):
    return base64.b64encode(cv2.imencode(".png", photo[:, :, ::-1])[1]).decode()


def _find_model_id(model):
    # A model that was copied from another store has an id that this one does not know.
    try:
        return mlflow.get_logged_model(model.model_id).model_id if model.model_id else None
    except mlflow.MlflowException:
        return None
