"""Figures and the HTML report from an evaluation's numbers.

Figures are plain `matplotlib.figure.Figure` objects, never pyplot's: nothing global is touched, so they can
be drawn in any thread and are freed with their last reference.
"""

import base64
import io
import math
import numbers
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import cv2
import jinja2
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

TRAINING_COLOR, VALIDATION_COLOR = "#98a2ad", "#1f5fa8"
DPI = 144
# Numbers are written into a confusion matrix up to here: beyond, a cell is smaller than its number.
MAX_NUMBERED_CLASSES = 40
# Room for 240 names at 14 megapixels. Of more classes only every nth is named.
MAX_MATRIX_INCHES = 24
MAX_BARS = 200
# Bars stand in one column up to here, then in two: 196 classes still fit a printed page.
MAX_BARS_PER_COLUMN = 60
# Stanford's longest name has 54 characters.
MAX_LABEL = 60
# A class name is text: two "$" in it are no formula.
LITERAL = {"parse_math": False}


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes, the first of which was taken for the second.

    Attributes:
        true_name: Name of the true class.
        predicted_name: Name of the class it was taken for.
        count: Photos of the true class that were taken for the other.
        true_total: Photos of the true class.
        true_photo: One of the `count` photos, uint8 RGB of shape `(height, width, 3)`.
        predicted_photo: A photo of the other class, uint8 RGB of shape `(height, width, 3)`.
    """

    true_name: str
    predicted_name: str
    count: int
    true_total: int
    true_photo: np.ndarray
    predicted_photo: np.ndarray


@dataclass(frozen=True)
class Section:
    """A part of a report: whatever is not None is shown, in the order of the attributes.

    Attributes:
        title: Heading, and alternative text of the figure.
        text: Plain text. Line breaks are kept.
        figure: Optional `Figure`.
        table: Optional list of rows, each a dict of column name to text, number or None. The first row names
            the columns.
    """

    title: str
    text: str = ""
    figure: Figure | None = None
    table: list[dict] | None = None


def curves_figure(history):
    """Draws loss and accuracy by epoch and marks the epoch of the best validation accuracy.

    Args:
        history: Dict of metric name to a list of floats, one an epoch: `loss`, `val_loss`, `accuracy`,
            `val_accuracy` and, if it shall be drawn, `learning_rate`.

    Returns:
        `Figure` of two panels, or three with the learning rate.
    """
    with_rate = "learning_rate" in history
    figure = Figure(figsize=(7.5, 6.6 if with_rate else 5.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(2 + with_rate, 1, sharex=True, height_ratios=[3, 3, 1][: 2 + with_rate])
    best = int(np.argmax(history["val_accuracy"]))
    # Dots make a single epoch visible, and a few epochs countable.
    dots = {"marker": "o" if len(history["loss"]) <= 30 else "", "markersize": 3}
    for name, axes in zip(("loss", "accuracy"), panels, strict=False):
        axes.plot(_epochs(history[name]), history[name], color=TRAINING_COLOR, label="training", **dots)
        validation = history[f"val_{name}"]
        axes.plot(_epochs(validation), validation, color=VALIDATION_COLOR, label="validation", **dots)
        axes.axvline(best + 1, color=VALIDATION_COLOR, linewidth=0.8, linestyle=":")
        axes.set_title(name, loc="left")
    value = history["val_accuracy"][best]
    panels[1].plot(best + 1, value, marker="o", markersize=9, fillstyle="none", color=VALIDATION_COLOR)
    # In the title, where no curve can run through it.
    panels[1].set_title(f"best: {value:.3f} in epoch {best + 1}", loc="right", color=VALIDATION_COLOR)
    panels[0].legend(frameon=False)
    if with_rate:
        rates = history["learning_rate"]
        panels[2].plot(_epochs(rates), rates, color="0.3", drawstyle="steps-mid", **dots)
        panels[2].set_title("learning rate", loc="left")
        panels[2].yaxis.set_major_locator(MaxNLocator(3))
        panels[2].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for axes in panels:
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("epoch")
    panels[-1].set_xlim(0.5, len(history["loss"]) + 0.5)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


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
    names = [_label(class_names[index]) for index in shown]
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
    axes.set_xticks(shown, names, rotation=90, fontsize=font_size, **LITERAL)
    axes.set_yticks(shown, names, fontsize=font_size, **LITERAL)
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


def photo_grid_figure(photos, captions, columns):
    """Lays photos out as a contact sheet.

    Args:
        photos: Sequence of at least one uint8 RGB array of shape `(height, width, 3)`; sizes may differ.
        captions: A text for each photo.
        columns: Photos in a row, at most.

    Returns:
        `Figure`.
    """
    columns = min(columns, len(photos))
    rows = [range(first, min(first + columns, len(photos))) for first in range(0, len(photos), columns)]
    heights = [_row_inches([photos[index] for index in row]) for row in rows]
    captions = [_wrap(caption) for caption in captions]
    caption_inches = 0.1 + 0.12 * max(caption.count("\n") + 1 for caption in captions)
    size = (2.1 * columns, sum(heights) + caption_inches * len(rows))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (photo, caption) in zip(grid.flat, zip(photos, captions, strict=True), strict=False):
        _show_photo(axes, photo, caption)
    return figure


def confused_pairs_figure(pairs):
    """Shows which classes are taken for which, a photo of each side by side.

    Args:
        pairs: List of `ConfusedPair`, drawn from top to bottom.

    Returns:
        `Figure`; for an empty list one that says so.
    """
    if not pairs:
        figure = Figure(figsize=(5, 1), dpi=DPI)
        figure.text(0.5, 0.5, "No photo was taken for another class.", ha="center", va="center")
        return figure
    heights = [_row_inches((pair.true_photo, pair.predicted_photo)) for pair in pairs]
    size = (5.6, sum(heights) + 0.4 * len(pairs))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(len(pairs), 3, squeeze=False, width_ratios=[2, 1, 2], height_ratios=heights)
    for (left, middle, right), pair in zip(grid, pairs, strict=True):
        _show_photo(left, pair.true_photo, _wrap(pair.true_name))
        _show_photo(right, pair.predicted_photo, _wrap(pair.predicted_name))
        counted = f"{pair.count} of {pair.true_total}\ntaken for\n→"
        middle.text(0.5, 0.5, counted, ha="center", va="center", fontsize=9)
        middle.set_axis_off()
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
        axes.barh(range(len(part)), values, height=0.7, color=VALIDATION_COLOR)
        for row, (value, count) in enumerate(zip(values, counts[part], strict=True)):
            written = f"{value:.0%} of {count}" if count else "no photos"
            axes.text(value + 0.01, row, written, va="center", fontsize=6)
        names = [_label(class_names[index]) for index in part]
        axes.set_yticks(range(len(part)), names, **LITERAL)
        axes.tick_params(length=0, labelsize=6.5)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_xlim(0, 1.25)
        axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="0.92")
    name_inches = max(_widest_name_inches(axes) for axes in panels)
    figure.set_size_inches(columns * (name_inches + 2.4), 0.15 * rows + 0.7)
    every = "" if len(order) == len(class_names) else f", the worst {len(order)} of {len(class_names)}"
    figure.suptitle(f"accuracy by class{every}", fontsize=9)
    return figure


def render_report(title, summary, sections):
    """Renders a report as one HTML page that refers to nothing outside itself.

    Args:
        title: Text of the heading.
        summary: List of `(name, value)` texts, shown large at the top.
        sections: List of `Section`.

    Returns:
        HTML. Every text is escaped.
    """
    return _PAGE.render(title=title, summary=summary, sections=sections)


def write_report(path, title, summary, sections):
    """Writes a rendered report as UTF-8. Readers of `path` see the old page or the whole new one."""
    path = Path(path)
    page = render_report(title, summary, sections)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _epochs(values):
    return range(1, len(values) + 1)


def _label(name):
    """Shortens a name in the middle: the model's year, at its end, tells it from its neighbour."""
    name = " ".join(name.split())
    return name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 16]}…{name[-15:]}"


def _fit_around(axes, side):
    """Sizes a figure for square axes `side` inches wide with their names beside and below them."""
    # Constrained layout would choose another side, and takes seconds over hundreds of names.
    left = bottom = _widest_name_inches(axes) + 0.5
    width, height = left + side + 1.5, bottom + side + 0.4
    axes.figure.set_size_inches(width, height)
    axes.set_position([left / width, bottom / height, side / width, side / height])


def _widest_name_inches(axes):
    return max(label.get_window_extent().width for label in axes.get_yticklabels()) / DPI


def _wrap(caption):
    return "\n".join(textwrap.fill(line, 30, max_lines=3, placeholder="…") for line in caption.splitlines())


def _row_inches(photos):
    """Height of a row of photos two inches wide. The tallest become narrower, strips get some air."""
    return 2 * min(1.2, max(0.3, *(photo.shape[0] / photo.shape[1] for photo in photos)))


def _show_photo(axes, photo, caption):
    # A camera's photo has a hundred times the pixels that its two inches show.
    height, width = photo.shape[:2]
    scale = 2 * DPI / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    axes.imshow(photo)
    axes.set_anchor("S")
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(caption, fontsize=7, **LITERAL)


def _image(figure):
    """Returns a figure as a data URI, and its width in CSS pixels."""
    png = io.BytesIO()
    # Without "Software", which is matplotlib's version, equal figures are equal files.
    figure.savefig(png, format="png", metadata={"Software": None})
    uri = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return uri, round(96 * figure.get_figwidth())


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _columns(table):
    """Names the columns of a table and says which of them hold numbers only."""
    values = {name: [row[name] for row in table if row[name] is not None] for name in table[0]}
    return [(name, "number" if all(map(_is_number, column)) else "text") for name, column in values.items()]


def _cell(value):
    if value is None or value != value:  # NaN: a class without photos has no accuracy.
        return "—"
    if not _is_number(value) or isinstance(value, numbers.Integral):
        return str(value)
    magnitude = abs(value)
    if 0 < magnitude < 0.1:
        return f"{value:#.3g}"
    # Fixed decimals, so that shares stand in line under each other.
    decimals = 3 if magnitude < 10 else 2 if magnitude < 100 else 1 if magnitude < 1000 else 0
    return f"{value:.{decimals}f}"


_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; }
body { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-top: 1px solid #d8dee5; padding-top: 1rem; }
h1, h2, p, td, dd { overflow-wrap: anywhere; }
p { white-space: pre-line; max-width: 42rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; }
dl div { background: #f1f4f8; border-radius: .4rem; padding: .6rem .8rem; }
dt { font-size: .8rem; color: #52606d; }
dd { font-size: 1.4rem; margin: 0; line-height: 1.3; }
.wide { overflow-x: auto; }
.zoom input { position: absolute; opacity: 0; }
.zoom input:focus-visible + img { outline: 2px solid #1f5fa8; }
.zoom img { max-width: 100%; height: auto; cursor: zoom-in; }
.zoom input:checked + img { max-width: none; cursor: zoom-out; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; }
tr { border-bottom: 1px solid #e4e9ee; }
th { color: #52606d; font-weight: 600; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; }
  h2, tr, .zoom { break-inside: avoid; }
  h2, p { break-after: avoid; }
  .wide { overflow: visible; }
  .zoom img, .zoom input:checked + img { max-width: 100%; max-height: 82vh; }
  dl div { border: 1px solid #d8dee5; }
}
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if summary %}
<dl>
{% for name, value in summary %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.text %}
<p>{{ section.text }}</p>
{% endif %}
{% if section.figure %}
{% set uri, width = section.figure | image %}
<div class="wide"><label class="zoom"><input type="checkbox" aria-label="full size">
<img src="{{ uri }}" width="{{ width }}" alt="{{ section.title }}"></label></div>
{% endif %}
{% if section.table %}
{% set columns = section.table | columns %}
<div class="wide"><table>
<thead><tr>
{% for name, kind in columns %}
<th class="{{ kind }}">{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in section.table %}
<tr>
{% for name, kind in columns %}
<td class="{{ kind }}">{{ row[name] | cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% elif section.table is not none %}
<p>None.</p>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""

_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True)
_ENVIRONMENT.filters.update(image=_image, columns=_columns, cell=_cell)
_PAGE = _ENVIRONMENT.from_string(_TEMPLATE)
