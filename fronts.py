"""What a gain costs: arms in the plane of perplexity degradation and reward improvement, and the front of each.

    front(points)                         # of (cost, gain) pairs those that no other beats in both
    figure = price_plane(runs, PALETTE)   # None where runs have no price
    heads, rows = price_table(runs)

A point is an arm at one setting (a KL coefficient, say), the mean over its seeds.
"""

import numpy as np
from matplotlib.figure import Figure

from experiments import Run, by_label, plus_minus
from stats import mean_interval

COST, GAIN = "perplexity_degradation", "reward_improvement"


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (cost, gain) points that no other beats: none has at most the cost and at least the gain; by ascending cost."""
    best, kept = -np.inf, []
    for cost, gain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if gain > best:
            best = gain
            kept.append((cost, gain))
    return kept


def priced(runs: list[Run]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """arm -> label -> (cost, gain) of each seed, of the trained model."""
    found = {}
    for label, group in by_label([run for run in runs if COST in run.modes.get("both", {})]).items():
        found.setdefault(group[0].arm, {})[label] = [(run.modes["both"][COST], run.modes["both"][GAIN]) for run in group]
    return found


def price_plane(runs: list[Run], palette: tuple[str, ...]) -> Figure | None:
    """Each run a small point, each arm's settings their means, joined where they are its front; intervals where there are three
    seeds. Better is up and to the left. The costs are drawn as they are: a degradation may be negative."""
    arms = priced(runs)
    if not arms:
        return None
    figure = Figure(figsize=(7.8, 5.2))
    axis = figure.subplots()
    for number, (arm, cells) in enumerate(arms.items()):
        colour = palette[number % len(palette)]
        means = [tuple(np.mean(points, axis=0)) for points in cells.values()]
        for points in cells.values():
            axis.scatter(*zip(*points), s=9, color=colour, alpha=0.4, linewidth=0)
        for (label, points), (cost, gain) in zip(cells.items(), means):
            halves = [mean_interval(column)[1] if len(points) >= 3 else 0 for column in zip(*points)]
            axis.errorbar(cost, gain, halves[1], halves[0], color=colour, marker="o", markersize=5, elinewidth=0.8)
            setting = label.removeprefix(arm).removeprefix(", ")
            axis.annotate(setting, (cost, gain), xytext=(5, 3), textcoords="offset points", fontsize=7.5, color=colour)
        axis.plot(*zip(*front(means)), color=colour, drawstyle="steps-post", label=arm)
    axis.scatter(0, 0, s=130, marker="*", color="black", zorder=4, label="before")
    axis.set(xlabel="perplexity degradation", ylabel="reward improvement", title="What the reward costs")
    figure.legend(loc="outside right upper")
    return figure


def price_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: each arm's settings with gain, cost and efficiency, mean ± half-width over seeds. Efficiency is the ratio
    of the means (a ratio of one seed may divide by nearly nothing), and a dash where nothing was paid."""
    rows = []
    for cells in priced(runs).values():
        for label, points in cells.items():
            costs, gains = zip(*points)
            efficiency = f"{np.mean(gains) / np.mean(costs):.2f}" if np.mean(costs) > 0 else "–"
            rows.append([label, str(len(points)), plus_minus(mean_interval(gains)), plus_minus(mean_interval(costs)), efficiency])
    return ["arm", "seeds", "reward improvement", "perplexity degradation", "efficiency"], rows
