"""Figure about two ways of running one network."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from carflavor.report.style import DPI, MAIN_COLOR


def agreement_figure(probabilities, keras_probabilities, engine):
    """Draws how sure an engine is of Keras's answer against how sure Keras is: on the diagonal they are alike.

    Args:
        probabilities: (N, C) float, of the engine.
        keras_probabilities: (N, C) float, of Keras.
        engine: What to call the engine.

    Returns:
        `Figure`; photos that the engine takes for another class are crosses.
    """
    figure = Figure(figsize=(4.6, 4.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    answers = keras_probabilities.argmax(axis=1)
    rows = np.arange(len(answers))
    x, y = keras_probabilities[rows, answers], probabilities[rows, answers]
    other = probabilities.argmax(axis=1) != answers
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)
    axes.scatter(x[~other], y[~other], s=9, alpha=0.4, color=MAIN_COLOR, linewidths=0, label="the same answer")
    # Not told apart by colour alone.
    axes.scatter(x[other], y[other], s=34, marker="x", color="#c0392b", linewidths=1.3, label="another answer")
    axes.set_xlabel("probability of Keras's answer, by Keras")
    axes.set_ylabel(f"the same, by {engine}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_aspect("equal")
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
