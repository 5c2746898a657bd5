"""The curves of a training."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from carflavor.report.style import DPI, MAIN_COLOR, OTHER_COLOR


def curves_figure(history, best_epoch):
    """Draws loss and accuracy by epoch and marks the epoch whose network is kept.

    Args:
        history: Dict of metric name to a list of floats, one an epoch: `loss`, `accuracy` and, as far as they shall be
            drawn, `val_loss` with `val_accuracy`, and `learning_rate`.
        best_epoch: Number of the epoch to mark, from 1.

    Returns:
        `Figure` of two panels, or three with the learning rate.
    """
    with_rate = "learning_rate" in history
    figure = Figure(figsize=(7.5, 6.6 if with_rate else 5.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(2 + with_rate, 1, sharex=True, height_ratios=[3, 3, 1][: 2 + with_rate])
    # Dots make a single epoch visible, and a few epochs countable.
    dots = {"marker": "o" if len(history["loss"]) <= 30 else "", "markersize": 3}
    for name, axes in zip(("loss", "accuracy"), panels, strict=False):
        axes.plot(_epochs(history[name]), history[name], color=OTHER_COLOR, label="training", **dots)
        axes.set_title(name, loc="left")
    if "val_accuracy" in history:
        _add_validation(panels, history, best_epoch, dots)
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


def _add_validation(panels, history, best_epoch, dots):
    for name, axes in zip(("val_loss", "val_accuracy"), panels, strict=False):
        axes.plot(_epochs(history[name]), history[name], color=MAIN_COLOR, label="validation", **dots)
        axes.axvline(best_epoch, color=MAIN_COLOR, linewidth=0.8, linestyle=":")
    value = history["val_accuracy"][best_epoch - 1]
    panels[1].plot(best_epoch, value, marker="o", markersize=9, fillstyle="none", color=MAIN_COLOR)
    # In the title, where no curve can run through it.
    panels[1].set_title(f"best: {value:.3f} in epoch {best_epoch}", loc="right", color=MAIN_COLOR)


def _epochs(values):
    return range(1, len(values) + 1)
