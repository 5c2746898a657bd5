"""Figures and the HTML report from numbers and photos.

Figures are plain `matplotlib.figure.Figure` objects, never pyplot's: nothing global is touched, so they can be drawn in
any thread and are freed with their last reference.
"""

from carflavor.report.agreement import agreement_figure
from carflavor.report.audit import build_audit_sections, pick_photos
from carflavor.report.classes import class_bars_figure, confusion_figure
from carflavor.report.comparison import comparison_figure
from carflavor.report.curves import curves_figure
from carflavor.report.page import Section, render_report, write_json, write_report
from carflavor.report.photos import (
    ConfusedPair,
    PhotoPair,
    confused_pairs_figure,
    outline_box,
    overlay_heat,
    photo_grid_figure,
    photo_pairs_figure,
    unsquash,
)
from carflavor.report.probabilities import rejection_figure, reliability_figure

__all__ = [
    "ConfusedPair",
    "PhotoPair",
    "Section",
    "agreement_figure",
    "build_audit_sections",
    "class_bars_figure",
    "comparison_figure",
    "confused_pairs_figure",
    "confusion_figure",
    "curves_figure",
    "outline_box",
    "overlay_heat",
    "photo_grid_figure",
    "photo_pairs_figure",
    "pick_photos",
    "rejection_figure",
    "reliability_figure",
    "render_report",
    "unsquash",
    "write_json",
    "write_report",
]
