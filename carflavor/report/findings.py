"""What the report of an evaluation shows and says, in the order in which people act on it."""

from dataclasses import dataclass

import numpy as np

from carflavor.image import cut_out
from carflavor.measures import Comparison, Measurement, Rejection, count_confusions, rejection_curve
from carflavor.report.classes import class_bars_figure, confusion_figure
from carflavor.report.comparison import comparison_figure
from carflavor.report.page import Section
from carflavor.report.photos import ConfusedPair, confused_pairs_figure, overlay_heat, photo_grid_figure, unsquash
from carflavor.report.probabilities import rejection_figure, reliability_figure

_CONFUSED_PAIRS = 10
_PAIRS_NAMED = 3
_GRID_COLUMNS = 6
_NO_PHOTO = np.full((3, 4, 3), 255, np.uint8)


@dataclass(frozen=True)
class Threshold:
    """A threshold for `unknown` that was chosen on the validation photos.

    Attributes:
        answered_accuracy: Accuracy that it was chosen for.
        temperature: Temperature that would make the probabilities fit the validation photos best, 1 where they do; None
            if the model does not give the probabilities of all classes.
        validation: `Rejection` on the validation photos; None where no threshold reaches that accuracy.
        test: `Rejection` on the test photos at the same threshold, or None.
        validation_curve: Its `rejection_curve` on the validation photos, as lists.
    """

    answered_accuracy: float
    temperature: float | None
    validation: Rejection | None
    test: Rejection | None
    validation_curve: tuple


@dataclass(frozen=True)
class Findings:
    """All that was found under one crop protocol.

    Attributes:
        crop: `box` or `full`.
        measurement: `carflavor.measures.Measurement`.
        hardest: Rows of the photos that are wrong with the highest probability, the most probable first.
        threshold: Optional `Threshold`.
        comparison: Optional `carflavor.measures.Comparison`.
        notes: Texts: what was left out, and why.
    """

    crop: str
    measurement: Measurement
    hardest: list
    threshold: Threshold | None
    comparison: Comparison | None
    notes: list


@dataclass(frozen=True)
class Heat:
    """A photo, and where the model looked in it.

    Attributes:
        row: Row of the photo in the record file.
        heat: (height, width) float, 0 to 1.
    """

    row: int
    heat: np.ndarray


def draw_figures(findings, records, predictions, heats):
    """Draws the figures of one crop protocol.

    Args:
        findings: `Findings`.
        records: `RecordFile` of the test photos.
        predictions: `carflavor.measures.Predictions` for them.
        heats: List of `Heat`.

    Returns:
        Dict of name -> `Figure`, in the order of the page; without those that the predictions do not allow.
    """
    measurement = findings.measurement
    figures = {"confused_pairs": confused_pairs_figure(_pick_pairs(findings, records, predictions))}
    if findings.hardest:
        photos = [_read_photo(records, findings.crop, row) for row in findings.hardest]
        captions = [_caption(records, predictions, row) for row in findings.hardest]
        figures["hardest"] = photo_grid_figure(photos, captions, _GRID_COLUMNS)
    if measurement.calibration:
        figures["reliability"] = reliability_figure(measurement.calibration.bins)
        figures["rejection"] = _draw_rejection(findings.threshold, records, predictions)
    if findings.comparison:
        figures["comparison"] = comparison_figure(findings.comparison)
    if heats:
        overlays = [overlay_heat(_read_photo(records, findings.crop, heat.row), heat.heat) for heat in heats]
        captions = [_caption(records, predictions, heat.row) for heat in heats]
        figures["gradcam"] = photo_grid_figure(overlays, captions, _GRID_COLUMNS)
    confusion = count_confusions(records.labels, predictions.predicted, len(records.class_names))
    figures["confusion"] = confusion_figure(confusion, records.class_names)
    recalls, counts = zip(*((row["recall"] or 0.0, row["photos"]) for row in measurement.by_class), strict=True)
    figures["classes"] = class_bars_figure(records.class_names, recalls, counts)
    return figures


def _draw_rejection(threshold, records, predictions):
    curve = rejection_curve(predictions.prob, predictions.predicted == records.labels)
    if threshold is None:
        return rejection_figure(curve)
    chosen = None
    if threshold.test and threshold.test.answered.count:
        chosen = threshold.test.answered.value, threshold.test.accuracy.value
    validation_curve = [np.array(values) for values in threshold.validation_curve]
    return rejection_figure(curve, validation_curve, chosen, threshold.answered_accuracy)


def _read_photo(records, crop, row):
    """Reads a stored square in the proportions that it was squashed from."""
    # Only the shape is of interest: these pixels take no memory.
    whole = np.broadcast_to(np.uint8(0), records.sizes[row])
    view = cut_out(whole, records.boxes[row], records.settings["crop_margin"]) if crop == "box" else whole
    return unsquash(records.images(crop)[row], view.shape)


def _pick_pairs(findings, records, predictions):
    ids = {name: label for label, name in enumerate(records.class_names)}
    pairs = []
    for row in findings.measurement.confused[:_CONFUSED_PAIRS]:
        label, taken_for = ids[row["class"]], ids[row["taken for"]]
        mistaken = np.flatnonzero((records.labels == label) & (predictions.predicted == taken_for))[0]
        # A photo of the other class, where the test set has one; the same photo again would say nothing.
        others = np.flatnonzero(records.labels == taken_for)
        pairs.append(
            ConfusedPair(
                true_name=row["class"],
                predicted_name=row["taken for"],
                count=row["photos"],
                true_total=row["of"],
                true_photo=_read_photo(records, findings.crop, mistaken),
                predicted_photo=_read_photo(records, findings.crop, others[0]) if len(others) else _NO_PHOTO,
            )
        )
    return pairs


def _caption(records, predictions, row):
    names = [*records.class_names, "another class"]  # NO_CLASS, which is -1, takes the last one
    label, predicted = records.labels[row], predictions.predicted[row]
    sure = f" {100 * predictions.prob[row]:.0f} %" if predictions.prob is not None else ""
    if label == predicted:
        return f"right{sure}: {names[label]}"
    return f"said{sure}: {names[predicted]}\nis: {names[label]}"


def say_shares(measurement):
    """Says in one line how many photos were recognised."""
    shares = {"top-1": measurement.top_1, "top-5": measurement.top_5}
    said = ", ".join(f"{name} {share}" for name, share in shares.items() if share)
    return f"{said} of {measurement.photos:,} photos"


def write_lead(findings):
    """Says in a few lines what a reader of one crop protocol should know and do."""
    measurement = findings.measurement
    top_1 = measurement.top_1
    said = [
        f"crop={findings.crop}: of {top_1.of:,} test photos, {_percent(top_1.value)} are recognised "
        f"(95 % interval {_percent(top_1.low)} to {_percent(top_1.high)})."
    ]
    if measurement.make:
        said.append(f"The make is right for {_percent(measurement.make.value)}.")
    alone = measurement.without_near_duplicates
    if alone and alone.of < top_1.of:
        left_out = top_1.of - alone.of
        named = "one test photo that has" if left_out == 1 else f"{left_out:,} test photos that have"
        said.append(f"Without the {named} a near-duplicate in train.h5, it is {alone}.")
    if measurement.calibration:
        said.append(_say_calibration(measurement.calibration, top_1))
    if findings.threshold:
        said.append(_say_threshold(findings.threshold))
    if findings.comparison:
        said.append(_say_comparison(findings.comparison))
    if pairs := measurement.confused[:_PAIRS_NAMED]:
        named = [f"{row['class']} taken for {row['taken for']} ({row['photos']} of {row['of']})" for row in pairs]
        said.append(f"Look first at: {'; '.join(named)}.")
    return "\n".join(said)


def _say_calibration(calibration, top_1):
    # By the interval of the accuracy: a smaller distance may be chance.
    if top_1.low <= calibration.mean_prob <= top_1.high:
        judged = "Its probabilities can be taken at their word"
    elif calibration.mean_prob > top_1.high:
        judged = "Its probabilities are too high"
    else:
        judged = "Its probabilities are too low"
    return (
        f"{judged}: {_percent(calibration.mean_prob)} on average, where {_percent(top_1.value)} are right "
        f"(calibration error {calibration.ece:.3f})."
    )


def _say_threshold(threshold):
    target = _percent(threshold.answered_accuracy)
    if threshold.validation is None:
        return f"No threshold makes {target} of the answers right on the validation photos."
    if threshold.validation.min_prob == 0:
        return f"No answer need be withheld: {threshold.validation.accuracy} of the validation photos are recognised."
    test = threshold.test
    return (
        f"With min_prob={threshold.validation.min_prob:g}, chosen on the validation photos for {target}, it answers "
        f"{_percent(test.answered.value)} of the test photos, {test.accuracy} of these rightly; the rest is unknown."
    )


def _say_comparison(comparison):
    judged = "more than chance explains" if comparison.p_value < 0.05 else "which may be chance"
    return (
        f"Compared with the other model: {100 * comparison.difference:+.1f} points "
        f"({100 * comparison.low:+.1f} to {100 * comparison.high:+.1f}), {judged} (p = {comparison.p_value:.2g})."
    )


def build_sections(findings, figures):
    """Builds the sections of one crop protocol from what `draw_figures` drew."""
    measurement, crop = findings.measurement, findings.crop
    texts = {
        "confused_pairs": "Left: a photo that was mistaken. Right: a photo of the class it was taken for.",
        "hardest": "Wrong with the highest probability. Some of these may be right, and their label wrong.",
        "reliability": _explain_calibration(findings),
        "rejection": _explain_rejection(findings.threshold),
        "comparison": _explain_comparison(findings.comparison),
        "gradcam": "Grad-CAM: what glows speaks for the class that the model named. "
        "First the hardest photos, then some that are right.",
        "confusion": "",
        "classes": "",
    }
    titles = {
        "confused_pairs": "Most confused pairs",
        "hardest": "Hardest photos",
        "reliability": "Calibration",
        "rejection": "Unknown below a threshold",
        "comparison": "Against another model",
        "gradcam": "Where the model looks",
        "confusion": "Confusion matrix",
        "classes": "Accuracy by class",
    }
    tables = {
        "rejection": measurement.rejections and [_rejection_row(rejection) for rejection in measurement.rejections],
        "classes": measurement.by_class,
    }
    sections = [
        Section(f"{titles[name]}, crop={crop}", texts[name], figure, tables.get(name) or None)
        for name, figure in figures.items()
    ]
    if findings.notes:
        sections.append(Section(f"Left out, crop={crop}", "\n".join(findings.notes)))
    return sections


def _explain_calibration(findings):
    calibration, threshold = findings.measurement.calibration, findings.threshold
    if calibration is None:
        return ""
    said = [
        "Photos by the probability of the model's answer: on the dashed line, that share of them is right. "
        f"Expected calibration error {calibration.ece:.3f} (15 bins)."
    ]
    if calibration.nll is not None:
        said.append(f"Negative log-likelihood {calibration.nll:.3f}, Brier score {calibration.brier:.3f} (0 to 2).")
    if threshold and threshold.temperature is not None:
        said.append(f"Temperature that would fit the validation photos best: {threshold.temperature:.2f}.")
    return "\n".join(said)


def _explain_rejection(threshold):
    said = "From right to left the threshold rises: fewer photos are answered, more of the answers are right."
    if threshold is None:
        return said
    said += f" Dotted: {_percent(threshold.answered_accuracy)}, which the threshold is chosen for."
    if threshold.validation and threshold.validation.min_prob > 0:
        minimum = f"{threshold.validation.min_prob:g}"
        said += (
            f'\nCallers of a carflavor model pass it along: "params": {{"min_prob": {minimum}}} in a request, '
            f'model.predict(photos, params={{"min_prob": {minimum}}}) in Python.'
        )
    return said


def _explain_comparison(comparison):
    if comparison is None:
        return ""
    return (
        f"This model is right for {comparison.first} of the photos, the other for {comparison.second}. "
        f"{comparison.only_first:,} photos are recognised by this one alone, {comparison.only_second:,} by the other "
        f"alone. McNemar's exact test: p = {comparison.p_value:.2g}, how often chance would part them as unevenly."
    )


def _rejection_row(rejection):
    return {
        "min_prob": f"{rejection.min_prob:.1f}",
        "answered": _percent(rejection.answered.value),
        "right among these": str(rejection.accuracy),
    }


def build_summary(all_findings):
    """Builds what stands large at the top: a list of `(name, value)`."""
    summary = []
    for findings in all_findings:
        measurement = findings.measurement
        shares = {"top-1": measurement.top_1, "top-5": measurement.top_5, "make": measurement.make}
        summary += [(f"{name}, crop={findings.crop}", _percent(share.value)) for name, share in shares.items() if share]
    return summary


def _percent(value):
    return f"{100 * value:.1f} %"
