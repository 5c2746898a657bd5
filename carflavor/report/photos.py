"""Figures that show photos."""

from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from carflavor.report.style import DPI, NAME_STYLE, wrap_caption

_OUTLINED_SIDE = 144  # pixels: what is smaller is enlarged, so that a box's line does not hide it
_GROUND, _OUTLINE, _HALO = 225, (216, 27, 96), (255, 255, 255)


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
class PhotoPair:
    """Two photos to set side by side.

    Attributes:
        photos: Both, uint8 RGB of shape `(height, width, 3)`.
        captions: A text below each.
        between: Short text between them.
    """

    photos: tuple
    captions: tuple
    between: str


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
    captions = [wrap_caption(caption) for caption in captions]
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
        pairs: List of `ConfusedPair`, drawn line by line; of more than three, two on a line.

    Returns:
        `Figure`; for an empty list one that says so.
    """
    if not pairs:
        figure = Figure(figsize=(5, 1), dpi=DPI)
        figure.text(0.5, 0.5, "No photo was taken for another class.", ha="center", va="center")
        return figure
    return photo_pairs_figure(
        [
            PhotoPair(
                (pair.true_photo, pair.predicted_photo),
                (pair.true_name, pair.predicted_name),
                f"{pair.count} of {pair.true_total}\ntaken for\n→",
            )
            for pair in pairs
        ]
    )


def photo_pairs_figure(pairs):
    """Shows photos in twos, side by side.

    Args:
        pairs: List of at least one `PhotoPair`, drawn line by line; of more than three, two on a line.

    Returns:
        `Figure`.
    """
    columns = 2 if len(pairs) > 3 else 1
    rows = [pairs[first : first + columns] for first in range(0, len(pairs), columns)]
    heights = [_row_inches([photo for pair in row for photo in pair.photos]) for row in rows]
    captions = [[wrap_caption(caption) for caption in pair.captions] for pair in pairs]
    caption_inches = max(0.4, 0.1 + 0.12 * max(text.count("\n") + 1 for pair in captions for text in pair))
    size = (5.1 * columns, sum(heights) + caption_inches * len(rows))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    # The last of each four columns holds two pairs apart.
    ratios = ([2, 0.9, 2, 0.2] * columns)[:-1]
    grid = figure.subplots(len(rows), len(ratios), squeeze=False, width_ratios=ratios, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
    places = [line[first : first + 3] for line in grid for first in range(0, len(ratios), 4)]
    for (left, middle, right), pair, texts in zip(places, pairs, captions, strict=False):
        for axes, photo, caption in zip((left, right), pair.photos, texts, strict=True):
            _show_photo(axes, photo, caption)
        middle.text(0.5, 0.5, pair.between, ha="center", va="center", fontsize=9)
    return figure


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
    axes.set_xlabel(caption, fontsize=7, **NAME_STYLE)


def outline_box(photo, box, size):
    """Draws a box into a photo; where it reaches beyond, on grey ground, at most half a photo wide on each side.

    Args:
        photo: uint8 RGB array of shape `(height, width, 3)`, perhaps scaled down.
        box: `(x1, y1, x2, y2)`, 0-based half-open, in pixels of the photo as it was; of any order and size.
        size: Height and width of the photo as it was.

    Returns:
        uint8 RGB array, as large as photo and box together.
    """
    enlarged = max(1, _OUTLINED_SIDE // max(photo.shape[:2]))
    photo = photo.repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    (top, bottom, above, below), (left, right, before, after) = (
        _place_outline(side, whole, corners)
        for side, whole, corners in zip(photo.shape, size, (box[1::2], box[0::2]), strict=False)
    )
    canvas = np.pad(photo, ((above, below), (before, after), (0, 0)), constant_values=_GROUND)
    for color, thickness in ((_HALO, 4), (_OUTLINE, 2)):
        cv2.rectangle(canvas, (left + before, top + above), (right + before, bottom + above), color, thickness)
    return canvas


def _place_outline(side, whole, corners):
    """Returns first and last pixel of a box along a side that had `whole` pixels, and what to add to both its ends."""
    first, end = sorted(round(min(max(corner, -whole / 2), 1.5 * whole) * side / whole) for corner in corners)
    last = max(first, end - 1)
    return first, last, max(0, -first), max(0, last + 1 - side)


def unsquash(square, size):
    """Gives a stored square the proportions that it was squashed from.

    Args:
        square: uint8 RGB array of shape `(S, S, 3)`.
        size: Height and width of what it shows, in any unit.

    Returns:
        uint8 RGB array in these proportions, whose longer side is S.
    """
    scale = len(square) / max(size)
    height, width = (max(1, round(scale * side)) for side in size)
    return cv2.resize(square, (width, height), interpolation=cv2.INTER_AREA)


def overlay_heat(photo, heat):
    """Lays a heat map over a photo, which stays as it is where the map is cold.

    Args:
        photo: uint8 RGB array of shape `(height, width, 3)`.
        heat: float array of any height and width, 0 to 1.

    Returns:
        uint8 RGB array of the photo's shape.
    """
    height, width = photo.shape[:2]
    heat = np.clip(cv2.resize(heat.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)[..., None]
    grey = np.repeat(photo.mean(axis=2, keepdims=True), 3, axis=2)
    glow = 255 * matplotlib.colormaps["inferno"](heat[..., 0])[..., :3]
    return np.round((1 - 0.65 * heat) * (0.5 * photo + 0.5 * grey) + 0.65 * heat * glow).astype(np.uint8)
