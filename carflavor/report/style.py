"""What all figures share: colours, resolution, and how a class name is written."""

import textwrap

from matplotlib import font_manager

DPI = 144
# Blue for what a page is about, grey for what it is held against.
MAIN_COLOR, OTHER_COLOR = "#1f5fa8", "#98a2ad"
# Stanford's longest name has 54 characters.
MAX_LABEL = 60
# The usual fonts of Linux, Windows and macOS that know Chinese, Japanese and Korean. matplotlib takes a letter that its
# own font lacks from the first of them that has it, and warns at each name that is not installed.
_FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Noto Sans SC",
    "Noto Sans JP",
    "Noto Sans KR",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "IPAexGothic",
    "NanumGothic",
    "Microsoft YaHei",
    "SimHei",
    "Yu Gothic",
    "MS Gothic",
    "Malgun Gothic",
    "PingFang SC",
    "Hiragino Sans",
    "Hiragino Sans GB",
    "AppleGothic",
    "Arial Unicode MS",
    # Comes with matplotlib and draws a box for any letter. Without it every such letter is a warning.
    "Last Resort High-Efficiency",
)


def find_fonts():
    """Returns the installed font families that class names are written in, the preferred one first."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed)]


# A class name is text: two "$" in it are no formula.
NAME_STYLE = {"parse_math": False, "fontfamily": find_fonts()}


def shorten_name(name):
    """Shortens a name in the middle: the model's year, at its end, tells it from its neighbour."""
    name = " ".join(name.split())
    return name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 16]}…{name[-15:]}"


def wrap_caption(caption, width=30):
    """Breaks each line of a caption into at most three."""
    return "\n".join(textwrap.fill(line, width, max_lines=3, placeholder="…") for line in caption.splitlines())


def widest_name_inches(axes):
    """Returns the width of the widest name beside the rows of some axes."""
    return max(label.get_window_extent().width for label in axes.get_yticklabels()) / DPI
