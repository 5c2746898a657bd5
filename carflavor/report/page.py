"""The page: sections of text, figures and tables as one HTML file that refers to nothing outside itself."""

import base64
import io
import json
import numbers
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import jinja2
import numpy as np
from matplotlib.figure import Figure

# A page of hundreds of classes shall go by mail. The figures on the run are finer.
_PAGE_DPI = 120
_LOSSLESS = 101  # OpenCV's word for it: a quality beyond 100


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


def render_report(title, summary, sections, lead=()):
    """Renders a report as one HTML page that refers to nothing outside itself.

    Args:
        title: Text of the heading.
        summary: List of `(name, value)` texts, shown large at the top.
        sections: List of `Section`.
        lead: Paragraphs under the heading: what a reader who stops there should know.

    Returns:
        HTML. Every text is escaped.
    """
    return _PAGE.render(title=title, lead=lead, summary=summary, sections=sections)


def write_report(path, title, summary, sections):
    """Writes a rendered report as UTF-8. Readers of `path` see the old page or the whole new one."""
    _replace(path, render_report(title, summary, sections))


def write_json(path, content):
    """Writes what a report says for machines, as JSON in UTF-8, likewise."""
    _replace(path, json.dumps(content, indent=2, ensure_ascii=False))


def _replace(path, text):
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _image(figure):
    """Returns a figure as a data URI, and its width in CSS pixels."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_PAGE_DPI, pil_kwargs={"compress_level": 1})
    pixels = cv2.imdecode(np.frombuffer(png.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    # Photos, the images of three dimensions, are a fifth as large with a loss that is hardly seen. Lines and letters
    # stay sharp; 16 shades of each colour are enough for them, and halve their size.
    if any(image.get_array().ndim == 3 for axes in figure.axes for image in axes.images):
        quality = 75
    else:
        pixels, quality = np.round(pixels / 17).astype(np.uint8) * 17, _LOSSLESS
    webp = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, quality])[1]
    uri = f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
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


def _keep_unbroken(text):
    """Keeps a percent sign on the line of its number."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True)
_ENVIRONMENT.filters.update(image=_image, columns=_columns, cell=_cell, unbroken=_keep_unbroken)
_PAGE = _ENVIRONMENT.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
