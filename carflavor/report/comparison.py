"""The figure that sets two models side by side."""

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from carflavor.report.style import DPI, MAIN_COLOR, NAME_STYLE, OTHER_COLOR, shorten_name, widest_name_inches

_MAX_CLASSES = 20


def comparison_figure(comparison):
    """Draws the accuracy of two models with intervals, and the classes in which they differ most.

    Args:
        comparison: `carflavor.measures.Comparison`: the model and what it is compared with.

    Returns:
        `Figure` of one panel, or of two where the models differ in a class.
    """
    rows = comparison.by_class[:_MAX_CLASSES]
    heights = [0.9, 0.19 * len(rows) + 0.2] if rows else [0.9]
    figure = Figure(dpi=DPI, layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    names = {"this model": (comparison.first, MAIN_COLOR), "the other": (comparison.second, OTHER_COLOR)}
    for place, (share, color) in enumerate(names.values()):
        reach = [[share.value - share.low], [share.high - share.value]]
        panels[0].errorbar(share.value, place, xerr=reach, color=color, marker="o", capsize=3)
    panels[0].set_yticks(range(2), names)
    panels[0].set_ylim(1.6, -0.6)
    panels[0].set_title("all photos, 95 % intervals", loc="left", fontsize=9)
    if rows:
        for place, row in enumerate(rows):
            first, second = row["first"] / row["photos"], row["second"] / row["photos"]
            panels[1].plot([first, second], [place, place], color="0.85", linewidth=2, zorder=1)
            panels[1].plot(second, place, color=OTHER_COLOR, marker="o", markersize=5)
            panels[1].plot(first, place, color=MAIN_COLOR, marker="o", markersize=5)
        written = [f"{shorten_name(row['class'])} ({row['photos']})" for row in rows]
        panels[1].set_yticks(range(len(rows)), written, fontsize=7, **NAME_STYLE)
        panels[1].set_ylim(len(rows) - 0.4, -0.6)
        panels[1].set_xlim(-0.03, 1.03)
        panels[1].set_title("the classes that differ most, with their photos", loc="left", fontsize=9)
    for axes in panels:
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(length=0, labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
    figure.set_size_inches(max(map(widest_name_inches, panels)) + 5, sum(heights) + 0.9)
    return figure
