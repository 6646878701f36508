"""What the pictures of all experiments share: colours, style, bands over seeds, panels, a legend.

    with matplotlib.rc_context(STYLE):
        figure, axes = panels(3, columns=3, width=3.6, height=3.0)
        band(axes[0], steps, *over_seeds(values), PALETTE[0])
"""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hypotheses import MIN_SEEDS
from stats import mean_interval

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C3E", "#444444")  # Okabe and Ito's, extended
GREY, PALE = "#8a8a8a", "#c9c9c9"
STYLE = {
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.7,
    "axes.axisbelow": True, "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False, "legend.fontsize": 9,
    "lines.linewidth": 1.7, "lines.solid_capstyle": "round", "savefig.dpi": 150, "figure.constrained_layout.use": True,
}  # fmt: skip


def band(axis, x, mean: np.ndarray, half: np.ndarray, colour: str, **line) -> None:
    axis.plot(x, mean, color=colour, **line)
    axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)


def panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list]:
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * min(count, columns), height * rows + 0.4))
    axes = np.ravel(figure.subplots(rows, min(count, columns), squeeze=False))
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(runs, S) with NaN where a run has none -> mean (S,) and half-width of the 95% interval (S,).

    NaN under three runs, where it would be wider than any picture: of two runs it is nine times their distance.
    """
    columns = [column[np.isfinite(column)] for column in values.T]
    halves = [mean_interval(column)[1] if len(column) >= MIN_SEEDS else math.nan for column in columns]
    return np.array([column.mean() for column in columns]), np.array(halves)


def limits(values) -> tuple[float, float]:
    """The values' range with some room, so that a wide band cannot flatten the picture."""
    low, high = float(np.min(values)), float(np.max(values))
    room = 0.06 * (high - low) + 1e-3
    return low - room, high + room


def legend(figure: Figure, colours: dict, groups: dict, extra=(), where="outside upper center", columns=4, marker="") -> None:
    line = {"marker": marker, "linestyle": "" if marker else "-"}
    handles = [Line2D([], [], color=colours[label], label=label, **line) for label in groups if label in colours]
    figure.legend(handles=[*handles, *extra], loc=where, ncols=min(columns, len(handles) + len(extra)))
