"""Figures about how sure a model is."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from carflavor.report.style import DPI, MAIN_COLOR, OTHER_COLOR


def reliability_figure(bins):
    """Draws how often a model is right by how sure it is: on the diagonal it can be taken at its word.

    Args:
        bins: List of dicts with `from`, `to`, `photos`, `mean_prob`, `accuracy`, `low`, `high`, as
            `carflavor.measures.Calibration` has them.

    Returns:
        `Figure` of two panels: accuracy with its 95 % interval, and photos a bin.
    """
    figure = Figure(figsize=(5, 5.6), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    filled = [row for row in bins if row["photos"]]
    prob, accuracy, low, high = (
        np.array([row[name] for row in filled]) for name in ("mean_prob", "accuracy", "low", "high")
    )
    upper.plot([0, 1], [0, 1], color=OTHER_COLOR, linestyle="--", linewidth=1)
    reach = np.maximum([accuracy - low, high - accuracy], 0)
    upper.errorbar(prob, accuracy, reach, color=MAIN_COLOR, marker="o", markersize=4, linewidth=1.2)
    upper.text(0.03, 0.93, "not sure enough", color="0.4", fontsize=8)
    upper.text(0.97, 0.04, "too sure", color="0.4", fontsize=8, ha="right")
    # A little beyond, for what is drawn at 100 %.
    upper.set_ylim(0, 1.02)
    upper.set_ylabel("right")
    upper.yaxis.set_major_formatter(PercentFormatter(1))
    left, photos = [row["from"] for row in bins], [row["photos"] for row in bins]
    lower.bar(left, photos, 1 / len(bins), align="edge", color=MAIN_COLOR, edgecolor="white")
    lower.set_ylabel("photos")
    lower.set_xlabel("probability that the model gave its answer")
    lower.set_xlim(0, 1)
    _finish(upper, lower)
    return figure


def rejection_figure(curve, validation_curve=None, chosen=None, target=None):
    """Draws accuracy against the share of the photos that are answered, as the threshold for an answer falls.

    Args:
        curve: Two float arrays: share answered and accuracy of these, on the test photos.
        validation_curve: Optional, the same on the validation photos.
        chosen: Optional `(share answered, accuracy)` on the test photos at the chosen threshold.
        target: Optional accuracy that the threshold was chosen for.

    Returns:
        `Figure`.
    """
    figure = Figure(figsize=(5.6, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    lowest = 1.0 if target is None else target
    for name, color, points in (("validation", OTHER_COLOR, validation_curve), ("test", MAIN_COLOR, curve)):
        if points is not None:
            answered, accuracy = points
            axes.plot(answered, accuracy, color=color, label=name, marker="o" if len(answered) == 1 else "")
            # A few photos decide the left end; it may leave the figure.
            lowest = min(lowest, *accuracy[answered >= min(0.05, answered[-1])])
    if target is not None:
        axes.axhline(target, color=OTHER_COLOR, linewidth=0.8, linestyle=":")
    if chosen is not None:
        axes.plot(*chosen, marker="o", markersize=9, fillstyle="none", color=MAIN_COLOR)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(max(0, lowest - 0.03), 1.005)
    axes.set_xlabel("share of the photos that are answered")
    axes.set_ylabel("right among these")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, loc="lower left")
    _finish(axes)
    return figure


def _finish(*panels):
    for axes in panels:
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
