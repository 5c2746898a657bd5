"""Measures a packed model on the test photos and says where it errs."""

import contextlib
import io
import logging
from dataclasses import asdict, dataclass

import mlflow
import numpy as np
import pandas as pd

import carflavor
from carflavor import report, tracking
from carflavor.data.locations import resolve_model
from carflavor.preprocess import open_split
from carflavor.progress import progress_bar

TOP_K = 5
_CONFUSED_PAIRS = 10
_ROWS_AT_ONCE = 256

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        model: Model directory that carflavor wrote, as path, `runs:/...` or `models:/...`.
        data: Folder with `test.h5`, as path or URI, or `sample`.
    """

    model: str
    data: str = "sample"


@dataclass(frozen=True)
class Measurement:
    """What was measured under one crop protocol.

    Attributes:
        photos: Number of test photos.
        top_1: Share of them whose most probable class is the true one.
        top_5: Share of them whose true class is among the five most probable.
        by_class: Dicts with `class`, `photos`, `right`, `top_1`, and `most often taken for`.
        confusion: Lists of int (C, C), rows true, columns predicted.
    """

    photos: int
    top_1: float
    top_5: float
    by_class: list
    confusion: list


def evaluate(config):
    """Evaluates a model under every crop protocol that the test file holds, and logs metrics, figures and a report.

    Args:
        config: `EvaluateConfig`.

    Returns:
        Dict of crop protocol (`box`, `full`) -> `Measurement`.

    Raises:
        ValueError: If there is no test file, or its classes are not those of the model.
    """
    with tracking.step_run("evaluate", config), contextlib.ExitStack() as stack:
        # The model first: where there is none, the sample need not be drawn to say so.
        classifier = carflavor.load_model(resolve_model(config.model))
        test = stack.enter_context(open_split(config.data, "test"))
        if test.class_names != classifier.class_names:
            raise ValueError(
                f"{test.path}: expected the {len(classifier.class_names)} classes of the model, "
                f"got {len(test.class_names)} that are not the same in the same order"
            )
        made = {"image_size": test.image_size, "crop_margin": test.settings["crop_margin"]}
        trained = {"image_size": classifier.image_size, "crop_margin": classifier.crop_margin}
        if made != trained:
            _logger.warning(
                "%s was made with %s, the photos that the model learned from with %s: served, the model sees other "
                "pixels than these",
                test.path,
                made,
                trained,
            )
        if not len(test):
            raise ValueError(f"{test.path}: expected test photos, got none")
        mlflow.set_tags({tracking.DATA_TAG: test.settings["source"], tracking.MODEL_TAG: config.model})
        measurements, sections = {}, []
        for crop in test.crops:
            probabilities = predict_split(classifier, test, crop)
            measurement = measure(test.labels, probabilities, test.class_names)
            measurements[crop] = measurement
            mlflow.log_metrics({f"{crop}_top_1": measurement.top_1, f"{crop}_top_5": measurement.top_5})
            mlflow.log_text(_predictions_csv(test, probabilities), f"predictions_{crop}.csv")
            figures = _draw(test, crop, measurement, probabilities)
            for name, figure in figures.items():
                mlflow.log_figure(figure, f"{name}_{crop}.png")
            sections += _sections(crop, measurement, figures)
            _logger.info(
                "crop=%s: top-1 %.1f %%, top-5 %.1f %% of %d photos",
                crop,
                100 * measurement.top_1,
                100 * measurement.top_5,
                measurement.photos,
            )
        mlflow.log_dict({crop: asdict(measurement) for crop, measurement in measurements.items()}, "evaluation.json")
        html = report.render_report("Evaluation of a car classifier", _headline(config, test, measurements), sections)
        mlflow.log_text(html, "report.html")
    return measurements


def predict_split(classifier, records, crop):
    """Returns the float32 probabilities (N, C) of all photos of a record file, in its order."""
    images = records.images(crop)
    parts = []
    with progress_bar(f"evaluate {crop}", len(records)) as progress:
        for start in range(0, len(records), _ROWS_AT_ONCE):
            photos = images[start : start + _ROWS_AT_ONCE]
            parts.append(classifier.predict_probabilities(list(photos)))
            progress.update(len(photos))
    return np.concatenate(parts)


def measure(labels, probabilities, class_names):
    """Computes a `Measurement`.

    Args:
        labels: (N,) int, the true classes.
        probabilities: (N, C) float.
        class_names: C names.
    """
    ranking = np.argsort(-probabilities, axis=1, kind="stable")
    predicted = ranking[:, 0]
    confusion = np.zeros((len(class_names), len(class_names)), int)
    np.add.at(confusion, (labels, predicted), 1)
    by_class = []
    for label, name in enumerate(class_names):
        row = confusion[label]
        mistakes = np.where(np.arange(len(row)) == label, 0, row)
        by_class.append(
            {
                "class": name,
                "photos": int(row.sum()),
                "right": int(row[label]),
                "top_1": row[label] / row.sum() if row.sum() else None,
                "most often taken for": class_names[mistakes.argmax()] if mistakes.any() else None,
            }
        )
    return Measurement(
        photos=len(labels),
        top_1=float(np.mean(predicted == labels)),
        top_5=float(np.mean(np.any(ranking[:, :TOP_K] == labels[:, None], axis=1))),
        by_class=by_class,
        confusion=confusion.tolist(),
    )


def _predictions_csv(test, probabilities):
    predicted = probabilities.argmax(axis=1)
    frame = pd.DataFrame(
        {
            "photo": test.sources,
            "label": [test.class_names[label] for label in test.labels],
            "predicted": [test.class_names[label] for label in predicted],
            "prob": probabilities.max(axis=1),
            "prob_of_label": probabilities[np.arange(len(test)), test.labels],
        }
    )
    text = io.StringIO()
    frame.to_csv(text, index=False)
    return text.getvalue()


def _draw(test, crop, measurement, probabilities):
    counts = [row["photos"] for row in measurement.by_class]
    accuracies = [row["top_1"] if row["photos"] else 0.0 for row in measurement.by_class]
    pairs = _confused_pairs(test, crop, np.array(measurement.confusion), probabilities.argmax(axis=1))
    return {
        "confusion": report.confusion_figure(np.array(measurement.confusion), test.class_names),
        "confused_pairs": report.confused_pairs_figure(pairs),
        "classes": report.class_bars_figure(test.class_names, accuracies, counts),
    }


def _confused_pairs(test, crop, confusion, predicted):
    mistakes = confusion * (1 - np.eye(len(confusion), dtype=int))
    images = test.images(crop)
    pairs = []
    for place in np.argsort(-mistakes, axis=None, kind="stable")[:_CONFUSED_PAIRS]:
        label, taken_for = np.unravel_index(place, mistakes.shape)
        if not mistakes[label, taken_for]:
            break
        mistaken = np.flatnonzero((test.labels == label) & (predicted == taken_for))[0]
        # A photo of the other class, where the test set has one; the same photo again would say nothing.
        others = np.flatnonzero(test.labels == taken_for)
        pairs.append(
            report.ConfusedPair(
                true_name=test.class_names[label],
                predicted_name=test.class_names[taken_for],
                count=int(mistakes[label, taken_for]),
                true_total=int(confusion[label].sum()),
                true_photo=images[mistaken],
                predicted_photo=images[others[0]] if len(others) else np.full_like(images[mistaken], 255),
            )
        )
    return pairs


def _headline(config, test, measurements):
    headline = []
    for crop, measurement in measurements.items():
        headline += [
            (f"top-1, crop={crop}", f"{100 * measurement.top_1:.1f} %"),
            (f"top-5, crop={crop}", f"{100 * measurement.top_5:.1f} %"),
        ]
    return [
        *headline,
        ("photos", f"{len(test):,}"),
        ("classes", f"{len(test.class_names):,}"),
        ("data", test.settings["source"]),
        ("model", config.model),
    ]


def _sections(crop, measurement, figures):
    return [
        report.Section(
            f"Most confused pairs, crop={crop}",
            text="Left: a photo that was mistaken. Right: a photo of the class it was taken for.",
            figure=figures["confused_pairs"],
        ),
        report.Section(f"Confusion matrix, crop={crop}", figure=figures["confusion"]),
        report.Section(f"Accuracy by class, crop={crop}", figure=figures["classes"]),
        report.Section(f"Table by class, crop={crop}", table=measurement.by_class),
    ]
