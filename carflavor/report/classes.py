"""Figures with a row for each class."""

import math

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from carflavor.report.style import DPI, MAIN_COLOR, NAME_STYLE, shorten_name, widest_name_inches

# Numbers are written into a confusion matrix up to here: beyond, a cell is smaller than its number.
MAX_NUMBERED_CLASSES = 40
# Room for 240 names at 14 megapixels. Of more classes only every nth is named.
MAX_MATRIX_INCHES = 24
MAX_BARS = 200
# Bars stand in one column up to here, then in two: 196 classes still fit a printed page.
MAX_BARS_PER_COLUMN = 60


def confusion_figure(confusion, class_names):
    """Draws a confusion matrix: the diagonal in blue, mistakes in red, as shares of the true class.

    Args:
        confusion: int array of shape `(classes, classes)`: photos by true class (row) and predicted class
            (column).
        class_names: Names in the order of the rows.

    Returns:
        `Figure` that grows with the number of classes. A class without photos is a grey row.

    Raises:
        ValueError: If the matrix is not square or does not fit the names.
    """
    confusion, count = np.asarray(confusion), len(class_names)
    if confusion.shape != (count, count):
        raise ValueError(f"Expected a row and a column for {count} names. Received: {confusion.shape}")
    numbered = count <= MAX_NUMBERED_CLASSES
    side = min(max(2.4, count * (0.3 if numbered else 0.11)), MAX_MATRIX_INCHES)
    font_size = 8 if numbered else 6
    step = math.ceil(count * 1.2 * font_size / 72 / side)
    shown = range(0, count, step)
    names = [shorten_name(class_names[index]) for index in shown]
    figure = Figure(dpi=DPI)
    axes = figure.add_subplot()
    totals = confusion.sum(axis=1)
    shares = confusion / np.maximum(totals, 1)[:, None]
    right = np.eye(count, dtype=bool)
    for offset, label, colormap, cells in ((0.2, "right", "Blues", right), (0.8, "wrong", "Reds", ~right)):
        image = axes.imshow(
            np.ma.masked_where(~cells | (confusion == 0), shares),
            cmap=colormap,
            # The square root sets a rare mistake off from the white of none.
            norm=PowerNorm(0.5, 0, 1),
            interpolation="nearest",
        )
        # Two inches high beside a matrix of any size.
        bar_axes = axes.inset_axes([1 + offset / side, 1 - 2 / side, 0.15 / side, 2 / side])
        bar = figure.colorbar(image, cax=bar_axes)
        bar.ax.set_title(label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    for row in np.flatnonzero(totals == 0):
        axes.axhspan(row - 0.5, row + 0.5, color="0.88", linewidth=0)
    if numbered:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[row, column] > 0.35 else "black"
            number = confusion[row, column]
            axes.text(column, row, number, ha="center", va="center", color=color, fontsize=6.5)
    axes.set_xticks(shown, names, rotation=90, fontsize=font_size, **NAME_STYLE)
    axes.set_yticks(shown, names, fontsize=font_size, **NAME_STYLE)
    axes.tick_params(length=2)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    _fit_around(axes, side)
    if step == 1:
        # Lines between the cells, by which a name is followed to its mistakes.
        axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(which="minor", color="0.9", linewidth=0.4)
    return figure


def class_bars_figure(class_names, accuracies, counts):
    """Draws the accuracy of each class as a bar, the worst first.

    Args:
        class_names: Names of the classes.
        accuracies: Share of each class's photos that was recognised, 0 to 1. Not read where `counts` is 0.
        counts: Photos of each class.

    Returns:
        `Figure` of at most `MAX_BARS` classes. Those without photos come last.
    """
    counts = np.asarray(counts)
    accuracies = np.where(counts > 0, np.asarray(accuracies, float), np.inf)
    order = np.argsort(accuracies, kind="stable")[:MAX_BARS]
    columns = 1 if len(order) <= MAX_BARS_PER_COLUMN else 2
    rows = math.ceil(len(order) / columns)
    figure = Figure(dpi=DPI, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for column, axes in enumerate(panels):
        part = order[column * rows : (column + 1) * rows]
        values = np.where(counts[part] > 0, accuracies[part], 0)
        axes.barh(range(len(part)), values, height=0.7, color=MAIN_COLOR)
        for row, (value, count) in enumerate(zip(values, counts[part], strict=True)):
            written = f"{value:.0%} of {count}" if count else "no photos"
            axes.text(value + 0.01, row, written, va="center", fontsize=6)
        names = [shorten_name(class_names[index]) for index in part]
        axes.set_yticks(range(len(part)), names, **NAME_STYLE)
        axes.tick_params(length=0, labelsize=6.5)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_xlim(0, 1.25)
        axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="0.92")
    name_inches = max(widest_name_inches(axes) for axes in panels)
    figure.set_size_inches(columns * (name_inches + 2.4), 0.15 * rows + 0.7)
    every = "" if len(order) == len(class_names) else f", the worst {len(order)} of {len(class_names)}"
    figure.suptitle(f"accuracy by class{every}", fontsize=9)
    return figure


def _fit_around(axes, side):
    """Sizes a figure for square axes `side` inches wide with their names beside and below them."""
    # Constrained layout would choose another side, and takes seconds over hundreds of names.
    left = bottom = widest_name_inches(axes) + 0.5
    width, height = left + side + 1.5, bottom + side + 0.4
    axes.figure.set_size_inches(width, height)
    axes.set_position([left / width, bottom / height, side / width, side / height])
