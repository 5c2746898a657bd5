"""The figure that sets the trials of a sweep side by side."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from optuna.distributions import CategoricalDistribution, IntDistribution

from carflavor.report.style import DPI, MAIN_COLOR, NAME_STYLE, OTHER_COLOR, shorten_name

_MAX_COLUMNS = 3
_SPREAD = 0.2  # of the points over one value of a list, where 1 is the way to the next value
_MARGIN = 0.05  # beside a range, as a share of it
_LETTERS_IN_LINE = 26  # of the values of a list, under one panel


def sweep_figure(trials, ranges, best, importances):
    """Draws the accuracy of all trials by epoch, and by the value of each parameter that was varied.

    Args:
        trials: List of `carflavor.trials.runs.Trial`, at least one. Those without an accuracy are not drawn.
        ranges: Dict of parameter name to Optuna distribution.
        best: The `Trial` to mark, or None.
        importances: Dict of parameter name to its share of the differences in accuracy, or empty.

    Returns:
        `Figure` of one panel over the whole width and one for each parameter below.
    """
    drawn = [trial for trial in trials if trial.accuracies]
    names = sorted(ranges, key=lambda name: -importances.get(name, 0))
    columns = min(len(names), _MAX_COLUMNS)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(8, 3.6 + 2.4 * rows), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[3.4] + [2.4] * rows)
    curves = figure.add_subplot(grid[0, :])
    _draw_curves(curves, drawn, best)
    panels = []
    for place, name in enumerate(names):
        row, column = divmod(place, columns)
        # One range of accuracies for all: how steep a panel is, is what is compared.
        axes = figure.add_subplot(grid[row + 1, column], sharey=panels[0] if panels else None)
        _draw_parameter(axes, drawn, best, name, ranges[name])
        title = shorten_name(name) + (f" ({importances[name]:.0%})" if name in importances else "")
        axes.set_title(title, loc="left", fontsize=9, **NAME_STYLE)
        axes.tick_params(labelleft=column == 0)
        panels.append(axes)
    for axes in (curves, *panels):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.tick_params(which="both", length=0, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    said = "below, one mark a trial: • finished   × ended early   — median of the finished"
    if importances:
        said += "   (%) share in telling the better half from the others"
    figure.supxlabel(said, fontsize=8, color="0.4")
    return figure


def _draw_curves(axes, drawn, best):
    for trial in sorted(drawn, key=lambda trial: trial is best):
        epochs = sorted(trial.accuracies)
        values = [trial.accuracies[epoch] for epoch in epochs]
        numbers = [epoch + 1 for epoch in epochs]
        chosen = trial is best
        style = {"color": MAIN_COLOR, "linewidth": 1.8} if chosen else {"color": OTHER_COLOR, "linewidth": 0.7}
        axes.plot(numbers, values, marker="o" if len(epochs) == 1 else "", markersize=3, zorder=2 + chosen, **style)
        if not chosen and trial.state != "finished":
            axes.plot(numbers[-1], values[-1], marker="x", markersize=4, color=OTHER_COLOR, zorder=2)
        if chosen:
            at = int(np.argmax(values))
            axes.plot(numbers[at], values[at], marker="o", markersize=9, fillstyle="none", color=MAIN_COLOR, zorder=4)
            said = f"best: {values[at]:.1%}, trial {trial.number}, epoch {numbers[at]}"
            # In the title, where no curve can run through it.
            axes.set_title(said, loc="right", color=MAIN_COLOR, fontsize=9)
    axes.set_title("validation accuracy by epoch", loc="left", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ends = [
        Line2D([], [], color=OTHER_COLOR, linewidth=0.7, label="finished"),
        Line2D([], [], color=OTHER_COLOR, linewidth=0.7, marker="x", markersize=4, label="ended early"),
    ]
    axes.legend(handles=ends, frameon=False, fontsize=8, loc="lower right")


def _draw_parameter(axes, drawn, best, name, distribution):
    listed = isinstance(distribution, CategoricalDistribution)
    for trial in sorted(drawn, key=lambda trial: trial is best):
        value = trial.parameters[name]
        # By the trial's number, so that the same trials make the same figure.
        at = distribution.choices.index(value) + _SPREAD * math.sin(7 * trial.number) if listed else value
        chosen = trial is best
        axes.plot(
            at,
            trial.accuracy,
            marker="o" if trial.state == "finished" else "x",
            markersize=7 if chosen else 4,
            color=MAIN_COLOR if chosen else OTHER_COLOR,
        )
    if listed:
        _draw_medians(axes, drawn, name, distribution.choices)
        written = [shorten_name(str(choice)) for choice in distribution.choices]
        slanted = {"rotation": 20, "ha": "right"} if sum(map(len, written)) > _LETTERS_IN_LINE else {}
        axes.set_xticks(range(len(written)), written, **slanted, **NAME_STYLE)
        axes.set_xlim(-0.5, len(written) - 0.5)
    elif distribution.log:
        margin = (distribution.high / distribution.low) ** _MARGIN
        axes.set_xscale("log")
        axes.set_xlim(distribution.low / margin, distribution.high * margin)
        # Numbers as they are typed; no 10^-3.
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter() if distribution.high >= 10 * distribution.low else "{x:g}")
    else:
        margin = (distribution.high - distribution.low) * _MARGIN
        axes.set_xlim(distribution.low - margin, distribution.high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=isinstance(distribution, IntDistribution)))


def _draw_medians(axes, drawn, name, choices):
    for place, choice in enumerate(choices):
        values = [trial.accuracy for trial in drawn if trial.parameters[name] == choice and trial.state == "finished"]
        if values:
            axes.hlines(np.median(values), place - 0.3, place + 0.3, color="0.3", linewidth=1)
