"""Measures a model on the test photos, says where it errs, and compares it with another."""

import contextlib
import logging
from dataclasses import asdict, dataclass

import mlflow
import numpy as np
from mlflow.entities import LoggedModelInput

from carflavor import report, tracking
from carflavor.calibration import fit_temperature
from carflavor.data.duplicates import near_duplicates
from carflavor.data.records import RecordFile
from carflavor.gradcam import find_feature_map, grad_cam
from carflavor.image import squash
from carflavor.measures import NO_CLASS, choose_min_prob, compare, find_hardest, measure, reject, rejection_curve
from carflavor.predictions import (
    CarModel,
    MeasuredRun,
    OtherModel,
    encode_predictions,
    load_other_predictor,
    load_predictor,
    predictions_file,
)
from carflavor.preprocess import open_split
from carflavor.report import findings as reporting
from carflavor.report.findings import Findings, Heat, Threshold

_HARDEST = 24
_HEATS = 12  # half of them of photos that are wrong

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        model: Model directory of any flavor that takes a column `image`, as path, `runs:/...` or `models:/...`.
        data: Folder with `test.h5`, as path or URI, or `sample`.
        against: Another model, or a run of this step as `runs:/<run id>` or its id, to compare with. Empty for none.
        answered_accuracy: Accuracy of the answers that the threshold for `unknown` is chosen for.
    """

    model: str
    data: str = "sample"
    against: str = ""
    answered_accuracy: float = 0.95


def evaluate(config):
    """Evaluates a model under every crop protocol that the test file holds, and logs metrics, figures and a report.

    Args:
        config: `EvaluateConfig`.

    Returns:
        Dict of crop protocol (`box`, `full`) -> `carflavor.report.findings.Findings`.

    Raises:
        ValueError: If there is no model or no test file, or they do not fit.
    """
    with tracking.step_run("evaluate", config):
        return evaluate_in_run(config)


def evaluate_in_run(config):
    """Does the same within the active run, for a step of which it is a part."""
    with contextlib.ExitStack() as stack:
        # The model first: where there is none, the sample need not be drawn to say so.
        model = load_predictor(config.model, "model")
        test = stack.enter_context(open_split(config.data, "test"))
        if not len(test):
            raise ValueError(f"{test.path}: expected test photos, got none")
        other = load_other_predictor(config.against, "against", test) if config.against else None
        for predictor in (model, other):
            if isinstance(predictor, CarModel):
                predictor.check(test)
        materials = _gather(stack, model, other, test)
        mlflow.set_tags({tracking.DATA_TAG: test.settings["source"], tracking.MODEL_TAG: config.model})
        dataset = tracking.log_records(test, "test")
        if model.model_id:
            mlflow.log_input(model=LoggedModelInput(model.model_id))

        all_findings, sections = {}, []
        for crop in test.crops:
            predictions = model.predict(test, crop)
            findings = _find(materials, crop, predictions, config.answered_accuracy)
            heats = [] if materials.no_heat else _explain(model.network, test, crop, predictions, findings)
            figures = reporting.draw_figures(findings, test, predictions, heats)
            sections += reporting.build_sections(findings, figures)
            all_findings[crop] = findings
            mlflow.log_metrics(_list_metrics(findings), model_id=model.model_id, dataset=dataset)
            mlflow.log_text(encode_predictions(test, predictions), predictions_file(crop))
            for name, figure in figures.items():
                mlflow.log_figure(figure, f"{name}_{crop}.png")
            _logger.info("crop=%s: %s", crop, reporting.say_shares(findings.measurement))
        if any(findings.threshold for findings in all_findings.values()):
            tracking.log_records(materials.validation, "validation")
        tables = {
            "model": model.uri,
            "against": other.uri if other else None,
            "data": {"source": test.settings["source"], "digest": dataset.digest},
            "crops": {crop: _list_tables(findings, test) for crop, findings in all_findings.items()},
        }
        mlflow.log_dict(tables, "evaluation.json")
        page = report.render_report(
            "Evaluation of a car classifier",
            reporting.build_summary(all_findings.values()),
            sections,
            lead=[_say_what_was_measured(materials), *map(reporting.write_lead, all_findings.values())],
        )
        mlflow.log_text(page, "report.html")
    return all_findings


@dataclass(frozen=True)
class Materials:
    """What an evaluation works with.

    Attributes:
        model: `CarModel` or `OtherModel`.
        other: What it is compared with: one of these, a `MeasuredRun`, or None.
        test: `RecordFile`.
        validation: `RecordFile`; None where no threshold can be chosen on it.
        no_validation: Why not, or an empty text.
        near_duplicates: (N,) bool, the test photos like one that the model learned from; None if that is unknown.
        no_near_duplicates: Why it is unknown, or an empty text.
        no_heat: Why no heat maps can be drawn, or an empty text.
    """

    model: CarModel | OtherModel
    other: CarModel | OtherModel | MeasuredRun | None
    test: RecordFile
    validation: RecordFile | None
    no_validation: str
    near_duplicates: np.ndarray | None
    no_near_duplicates: str
    no_heat: str


def _gather(stack, model, other, test):
    training, validation = (_open_beside(stack, test, split) for split in ("train", "validation"))
    no_validation = no_near_duplicates = no_heat = ""
    known = model.knows(validation) if validation is not None else ""
    if validation is None or not len(validation):
        no_validation = "there are no validation photos beside the test photos"
    elif (validation.class_names, validation.crops) != (test.class_names, test.crops):
        no_validation = f"{validation.path} has other classes or crops than the test photos"
    else:
        # Of photos that it knows a model is too sure: the threshold would be too low.
        no_validation = known
    learned_from = [training, validation] if known else [training]
    duplicates = None
    if training is None:
        no_near_duplicates = "there is no train.h5 beside the test photos"
    elif not set(test.crops).intersection(*(file.crops for file in learned_from)):
        no_near_duplicates = "the training photos are stored under another crop than the test photos"
    else:
        duplicates = near_duplicates(test, learned_from)
    if model.classifier is None:
        no_heat = "it needs a network that carflavor wrote"
    else:
        try:
            find_feature_map(model.network)
        except ValueError as error:
            no_heat = str(error)
    return Materials(
        model=model,
        other=other,
        test=test,
        validation=None if no_validation else validation,
        no_validation=no_validation,
        near_duplicates=duplicates,
        no_near_duplicates=no_near_duplicates,
        no_heat=no_heat,
    )


def _open_beside(stack, test, split):
    path = test.path.with_name(f"{split}.h5")
    return stack.enter_context(RecordFile(path)) if path.is_file() else None


def _find(materials, crop, predictions, answered_accuracy):
    """Returns the `Findings` of one crop protocol."""
    other, test, validation = materials.other, materials.test, materials.validation
    right = predictions.predicted == test.labels
    notes = _list_left_out(materials, predictions)
    threshold = comparison = None
    if predictions.prob is not None and validation:
        on_validation = materials.model.predict(validation, crop)
        threshold = _choose_threshold(on_validation, validation.labels, answered_accuracy, predictions, right)
    if isinstance(other, MeasuredRun) and not other.measured(test, crop):
        notes.append(f"The comparison: {other.uri} has no answers for these photos with crop={crop}.")
    elif other:
        answers = other.predict(test, crop)
        comparison = compare(test.labels, predictions.predicted, answers.predicted, test.class_names)
    return Findings(
        crop=crop,
        measurement=measure(test.labels, predictions, test.class_names, materials.near_duplicates),
        hardest=[] if predictions.prob is None else find_hardest(test.labels, predictions, _HARDEST).tolist(),
        threshold=threshold,
        comparison=comparison,
        notes=notes,
    )


def _list_left_out(materials, predictions):
    notes = []
    if predictions.prob is None:
        notes.append("Calibration, the threshold for unknown and the hardest photos: the model gives labels only.")
    elif materials.no_validation:
        notes.append(f"The threshold for unknown: {materials.no_validation}.")
    if predictions.ranking is None:
        notes.append("Top-5: the model does not name the most probable classes.")
    if materials.no_near_duplicates:
        notes.append(f"Accuracy without near-duplicates: {materials.no_near_duplicates}.")
    if materials.no_heat:
        notes.append(f"Grad-CAM: {materials.no_heat}.")
    if strangers := int(np.sum(predictions.predicted == NO_CLASS)):
        notes.append(f"{strangers:,} answers that name none of the classes: they count as wrong.")
    return notes


def _choose_threshold(on_validation, validation_labels, answered_accuracy, predictions, right):
    validation_right = on_validation.predicted == validation_labels
    min_prob = choose_min_prob(on_validation.prob, validation_right, answered_accuracy)
    temperature = None
    if on_validation.probabilities is not None:
        temperature = fit_temperature(on_validation.probabilities, validation_labels)
    answered, accuracy = rejection_curve(on_validation.prob, validation_right)
    return Threshold(
        answered_accuracy=answered_accuracy,
        temperature=temperature,
        validation=None if min_prob is None else reject(on_validation.prob, validation_right, min_prob),
        test=None if min_prob is None else reject(predictions.prob, right, min_prob),
        validation_curve=(answered.tolist(), accuracy.tolist()),
    )


def _explain(network, test, crop, predictions, findings):
    """Returns `Heat` of the hardest photos, and of some from all over the file that are right."""
    wrong = findings.hardest[: _HEATS // 2]
    right = np.flatnonzero(predictions.predicted == test.labels)
    right = right[np.linspace(0, len(right) - 1, min(_HEATS - len(wrong), len(right))).astype(int)]
    rows = [*wrong, *right.tolist()]
    squares = np.stack([squash(test.images(crop)[row], network.input_shape[1]) for row in rows])
    maps = grad_cam(network, squares, predictions.predicted[rows])
    return [Heat(row, heat) for row, heat in zip(rows, maps, strict=True)]


def _list_metrics(findings):
    measurement, threshold, comparison = findings.measurement, findings.threshold, findings.comparison
    alone, calibration = measurement.without_near_duplicates, measurement.calibration
    chosen = threshold and threshold.test
    metrics = {
        "top_1": measurement.top_1.value,
        "top_5": measurement.top_5 and measurement.top_5.value,
        "top_1_without_near_duplicates": alone and alone.value,
        "make_accuracy": measurement.make and measurement.make.value,
        "ece": calibration and calibration.ece,
        "nll": calibration and calibration.nll,
        "brier": calibration and calibration.brier,
        "min_prob": chosen and chosen.min_prob,
        "answered": chosen and chosen.answered.value,
        "answered_accuracy": chosen and chosen.accuracy.value,
        "difference": comparison and comparison.difference,
        "mcnemar_p": comparison and comparison.p_value,
    }
    return {f"{findings.crop}_{name}": value for name, value in metrics.items() if value is not None}


def _list_tables(findings, test):
    # By name: rows mean nothing without the record file.
    return {**asdict(findings), "hardest": [test.sources[row] for row in findings.hardest]}


def _say_what_was_measured(materials):
    test = materials.test
    said = [
        f"Model: {materials.model.uri}",
        materials.other and f"Other model: {materials.other.uri}",
        f"Data: {test.settings['source']}, {len(test):,} test photos of {len(test.class_names):,} classes",
        materials.model.caution(test),
    ]
    return "\n".join(filter(None, said))
