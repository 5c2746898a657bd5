"""What is measured of a model's answers: arrays in, numbers out.

Intervals are 95 % ones. They say how far chance in the choice of the test photos reaches, and nothing of whether those
photos are like a user's own.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95
TOP_K = 5
# What a photo is taken for that the model gives no class of the test photos.
NO_CLASS = -1
CALIBRATION_BINS = 15  # as Guo et al., 2017
# Makes of more than one word. Class names begin with the make, as in Stanford Cars, whose makes are all single words
# but for three of these.
_LONG_MAKES = ("AM General", "Alfa Romeo", "Aston Martin", "Land Rover")


@dataclass(frozen=True)
class Predictions:
    """What a model answered for N photos.

    Attributes:
        predicted: (N,) int64, the class that each photo was taken for, or `NO_CLASS`.
        prob: (N,) float, the probability of that class; None if the model gave none.
        ranking: (N, K) int64, the K most probable classes, best first, K being `TOP_K` or the number of classes; None
            if the model did not say.
        probabilities: (N, C) float; None if the model did not say.
    """

    predicted: np.ndarray
    prob: np.ndarray | None = None
    ranking: np.ndarray | None = None
    probabilities: np.ndarray | None = None

    @classmethod
    def of_probabilities(cls, probabilities):
        """Builds them from the (N, C) probabilities of all classes."""
        ranking = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP_K]
        return cls(ranking[:, 0], probabilities.max(axis=1), ranking, probabilities)


@dataclass(frozen=True)
class Share:
    """A share of photos and its interval (Wilson, 1927). Of no photos there is neither.

    Attributes:
        count: Photos that have the property.
        of: Photos that were looked at.
        value: `count / of`.
        low: Lower end of the interval.
        high: Upper end.
    """

    count: int
    of: int
    value: float | None
    low: float | None
    high: float | None

    def __str__(self):
        if not self.of:
            return "none"
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class Calibration:
    """How far the probabilities can be taken at their word.

    Attributes:
        mean_prob: Mean probability of the predicted classes. The accuracy is as high where they are calibrated.
        ece: Expected calibration error with 15 bins of equal width: the mean distance of probability and accuracy over
            the bins, weighted by photos. Reference: [Guo et al., 2017](https://arxiv.org/abs/1706.04599)
        nll: Mean negative logarithm of the probability of the true class; None without the probabilities of all.
        brier: Mean squared distance of the probabilities from the truth, 0 to 2 (Brier, 1950); None likewise.
        bins: Dicts with `from`, `to`, `photos`, `mean_prob`, `accuracy`, `low`, `high`; the last four are None for a
            bin without photos.
    """

    mean_prob: float
    ece: float
    nll: float | None
    brier: float | None
    bins: list


@dataclass(frozen=True)
class Rejection:
    """What becomes of the answers when those below a threshold are `unknown`.

    Attributes:
        min_prob: The threshold: answers with at least this probability are given.
        answered: `Share` of the photos that are answered.
        accuracy: `Share` of the answered photos whose answer is right.
    """

    min_prob: float
    answered: Share
    accuracy: Share


@dataclass(frozen=True)
class Measurement:
    """What was measured under one crop protocol.

    Attributes:
        photos: Number of test photos.
        top_1: `Share` whose most probable class is the true one.
        top_5: `Share` whose true class is among the five most probable; None if the model gives labels only.
        make: `Share` whose predicted class is of the true make; None where the class names do not name makes.
        without_near_duplicates: Top-1 of the photos that have no near-duplicate in training; None if that is unknown.
        calibration: `Calibration`, or None if the model gives no probabilities.
        rejections: `Rejection` at the thresholds 0, 0.1, ..., 0.9, or None likewise.
        by_class: Dicts with `class`, `photos`, `right`, `recall` (`right / photos`), `predicted` (photos that were
            taken for the class), `precision` (`right / predicted`) and `most often taken for`. What has no value is
            None.
        confused: Dicts with `class`, `taken for`, `photos` (how often) and `of` (photos of the class), the most
            frequent first.
    """

    photos: int
    top_1: Share
    top_5: Share | None
    make: Share | None
    without_near_duplicates: Share | None
    calibration: Calibration | None
    rejections: list[Rejection] | None
    by_class: list
    confused: list


@dataclass(frozen=True)
class Comparison:
    """Two models on the same photos.

    Attributes:
        first: `Share` that the first one recognised.
        second: `Share` that the second one recognised.
        only_first: Photos that the first one alone recognised.
        only_second: Photos that the second one alone recognised.
        difference: Share of the first minus that of the second.
        low: Lower end of the interval of the difference. Reference: Agresti and Min, 2005, "Simple improved confidence
            intervals for comparing matched proportions", https://doi.org/10.1002/sim.1781
        high: Upper end.
        p_value: Exact test of McNemar, 1947: how often chance alone parts the photos that only one recognised at least
            as unevenly, were the models equally good.
        by_class: Dicts with `class`, `photos`, `first`, `second` (photos recognised), the largest difference first,
            without the classes where there is none.
    """

    first: Share
    second: Share
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p_value: float
    by_class: list


def measure(labels, predictions, class_names, near_duplicates=None):
    """Computes a `Measurement`.

    Args:
        labels: (N,) int, the true classes.
        predictions: `Predictions` for the same photos.
        class_names: C names.
        near_duplicates: Optional (N,) bool, photos that have a near-duplicate among those that the model learned from.
    """
    right = predictions.predicted == labels
    confusion = count_confusions(labels, predictions.predicted, len(class_names))
    top_5 = make = alone = None
    if predictions.ranking is not None:
        top_5 = share_of(np.any(predictions.ranking == labels[:, None], axis=1))
    if (makes := find_makes(class_names)) is not None:
        make = share_of((makes[predictions.predicted] == makes[labels]) & (predictions.predicted != NO_CLASS))
    if near_duplicates is not None:
        alone = share_of(right[~near_duplicates])
    has_prob = predictions.prob is not None
    return Measurement(
        photos=len(labels),
        top_1=share_of(right),
        top_5=top_5,
        make=make,
        without_near_duplicates=alone,
        calibration=measure_calibration(labels, predictions) if has_prob else None,
        rejections=[reject(predictions.prob, right, tenth / 10) for tenth in range(10)] if has_prob else None,
        by_class=_measure_classes(labels, predictions.predicted, confusion, class_names),
        confused=_list_confused(confusion, labels, class_names),
    )


def share_of(marks):
    """Returns the `Share` of the true values in a bool array."""
    count, total = int(np.sum(marks)), len(marks)
    if not total:
        return Share(0, 0, None, None, None)
    interval = binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return Share(count, total, count / total, float(interval.low), float(interval.high))


def count_confusions(labels, predicted, num_classes):
    """Returns the (C, C) int confusion matrix, rows true, columns predicted, without answers that are `NO_CLASS`."""
    confusion = np.zeros((num_classes, num_classes), int)
    known = predicted != NO_CLASS
    np.add.at(confusion, (labels[known], predicted[known]), 1)
    return confusion


def find_makes(class_names):
    """Numbers the makes that class names begin with.

    Returns:
        (C,) int array, the same number for classes of one make; or None where the names tell no makes: all of one, or
        each of its own.
    """
    makes = [
        next((make for make in _LONG_MAKES if name.startswith(f"{make} ")), name.partition(" ")[0])
        for name in class_names
    ]
    different, numbers = np.unique(makes, return_inverse=True)
    return numbers if 1 < len(different) < len(class_names) else None


def measure_calibration(labels, predictions):
    """Computes a `Calibration` from predictions that have probabilities."""
    prob, right = predictions.prob.astype(float), predictions.predicted == labels
    # Bins are closed above, as in Guo et al.: a probability of 0.2 belongs to the third bin, which ends there.
    places = np.clip(np.ceil(prob * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    bins, ece = [], 0.0
    for place in range(CALIBRATION_BINS):
        inside = places == place
        accuracy = share_of(right[inside])
        mean_prob = float(prob[inside].mean()) if accuracy.of else None
        if accuracy.of:
            ece += accuracy.of / len(prob) * abs(accuracy.value - mean_prob)
        bins.append(
            {
                "from": place / CALIBRATION_BINS,
                "to": (place + 1) / CALIBRATION_BINS,
                "photos": accuracy.of,
                "mean_prob": mean_prob,
                "accuracy": accuracy.value,
                "low": accuracy.low,
                "high": accuracy.high,
            }
        )
    nll = brier = None
    if predictions.probabilities is not None:
        probabilities = predictions.probabilities.astype(float)
        of_label = probabilities[np.arange(len(labels)), labels]
        # A float32 softmax says 0 for what is merely very unlikely.
        nll = float(-np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).mean())
        brier = float(((probabilities**2).sum(axis=1) - 2 * of_label + 1).mean())
    return Calibration(float(prob.mean()), ece, nll, brier, bins)


def reject(prob, right, min_prob):
    """Returns the `Rejection` at a threshold.

    Args:
        prob: (N,) float, probabilities of the predicted classes.
        right: (N,) bool.
        min_prob: The threshold.
    """
    answered = prob >= min_prob
    return Rejection(float(min_prob), share_of(answered), share_of(right[answered]))


def choose_min_prob(prob, right, answered_accuracy):
    """Chooses the threshold below which a model says `unknown`.

    Args:
        prob: (N,) float, probabilities of the predicted classes.
        right: (N,) bool.
        answered_accuracy: Accuracy that the answers with at least that probability shall have.

    Returns:
        The smallest threshold of four decimals at which they have it: 0.0 where no answer need be withheld, and None
        where no threshold does it.
    """
    # Four decimals, so that what a report shows is what was measured. Rounded down: the photo itself is answered.
    candidates = np.unique(np.append(np.floor(prob.astype(float) * 1e4) / 1e4, 0.0))
    order = np.argsort(prob)
    first = np.searchsorted(prob[order], candidates)
    answered = len(prob) - first
    right_from = np.append(np.cumsum(right[order][::-1])[::-1], 0)
    reached = right_from[first] / answered >= answered_accuracy
    return float(candidates[reached.argmax()]) if reached.any() else None


def rejection_curve(prob, right):
    """Follows a threshold from the highest probability to the lowest.

    Returns:
        Share of the photos that are answered, and accuracy of these answers: two float arrays, a value for each
        probability that occurs.
    """
    order = np.argsort(-prob, kind="stable")
    # Photos of the same probability are answered together.
    last = np.append(np.flatnonzero(np.diff(prob[order])), len(prob) - 1)
    answered = np.arange(1, len(prob) + 1)
    return answered[last] / len(prob), (np.cumsum(right[order]) / answered)[last]


def find_hardest(labels, predictions, count):
    """Returns the rows of the `count` photos that are wrong with the highest probability, the most probable first."""
    wrong = np.flatnonzero(predictions.predicted != labels)
    return wrong[np.argsort(-predictions.prob[wrong], kind="stable")][:count]


def compare(labels, predicted, other_predicted, class_names):
    """Computes the `Comparison` of the answers of two models, both (N,) int."""
    first, second = predicted == labels, other_predicted == labels
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    discordant, total = only_first + only_second, len(labels)
    # Agresti and Min add half a photo to each of the four cells.
    shift = (only_first - only_second) / (total + 2)
    reach = norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt((discordant + 1) / (total + 2) - shift**2) / np.sqrt(total + 2)
    rows = []
    for label, name in enumerate(class_names):
        of_class = labels == label
        counts = {"first": int(np.sum(first[of_class])), "second": int(np.sum(second[of_class]))}
        if counts["first"] != counts["second"]:
            rows.append({"class": name, "photos": int(np.sum(of_class)), **counts})
    rows.sort(key=lambda row: -abs(row["first"] - row["second"]))
    return Comparison(
        first=share_of(first),
        second=share_of(second),
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / total,
        low=float(max(shift - reach, -1)),
        high=float(min(shift + reach, 1)),
        p_value=float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        by_class=rows,
    )


def _measure_classes(labels, predicted, confusion, class_names):
    rows = []
    for label, name in enumerate(class_names):
        photos, taken = int(np.sum(labels == label)), int(confusion[:, label].sum())
        right = int(confusion[label, label])
        mistakes = np.where(np.arange(len(class_names)) == label, 0, confusion[label])
        rows.append(
            {
                "class": name,
                "photos": photos,
                "right": right,
                "recall": right / photos if photos else None,
                "predicted": taken,
                "precision": right / taken if taken else None,
                "most often taken for": class_names[mistakes.argmax()] if mistakes.any() else None,
            }
        )
    return rows


def _list_confused(confusion, labels, class_names):
    mistakes = confusion * (1 - np.eye(len(confusion), dtype=int))
    photos = np.bincount(labels, minlength=len(class_names))
    rows, columns = np.nonzero(mistakes)
    order = np.argsort(-mistakes[rows, columns], kind="stable")
    return [
        {
            "class": class_names[row],
            "taken for": class_names[column],
            "photos": int(mistakes[row, column]),
            "of": int(photos[row]),
        }
        for row, column in zip(rows[order], columns[order], strict=True)
    ]
