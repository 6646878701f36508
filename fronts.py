"""What a gain costs: arms in the plane of perplexity degradation and reward improvement, and the front of each.

    front(points)                         # of (cost, gain) pairs those that no other beats in both
    figure = price_plane(runs, PALETTE)   # None where runs have no price
    figure = price_paths(runs, PALETTE)   # the way there, evaluation by evaluation
    heads, rows = price_table(runs)
    heads, rows = equal_gain_table(runs)  # what the same gain cost on the way

A point is an arm at one setting (a KL coefficient, say), the mean over its seeds.
"""

import math

import numpy as np
from matplotlib.figure import Figure

from experiments import Run, by_label, plus_minus
from stats import mean_interval

COST, GAIN = "perplexity_degradation", "reward_improvement"
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the largest gain that any arm ends with


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


# ----------------------------------------------------------------------------------------------------------- the way there


def path(run: Run) -> list[tuple[float, float]]:
    """(cost, gain) of the trained model at every evaluation, from (0, 0) on."""
    return [(0.0, 0.0), *[(line[f"both/{COST}"], line[f"both/{GAIN}"]) for line in run.metrics if f"both/{COST}" in line]]


def cost_at(points: list[tuple[float, float]], gain: float) -> float:
    """The cost at which a path first reaches a gain above 0, on straight lines in log(1 + cost), the loss on base text in nats;
    NaN where it never does."""
    for (a, low), (b, high) in zip(points, points[1:]):
        if low < gain <= high:
            share = (gain - low) / (high - low)
            return math.expm1((1 - share) * math.log1p(a) + share * math.log1p(b))
    return math.nan


def price_paths(runs: list[Run], palette: tuple[str, ...]) -> Figure | None:
    """The mean path of each label, a panel an arm, the others' in grey behind it. The cost's axis is linear below .1, logarithmic
    above."""
    groups = {label: group for label, group in by_label(runs).items() if all(len(path(run)) > 1 for run in group)}
    if not groups:
        return None
    means = {label: np.mean([path(run) for run in group], axis=0) for label, group in groups.items()}
    arms = list(dict.fromkeys(group[0].arm for group in groups.values()))
    rows = -(-len(arms) // 4)
    figure = Figure(figsize=(3.1 * min(4, len(arms)), 2.6 * rows + 0.3))
    axes = figure.subplots(rows, min(4, len(arms)), sharex=True, sharey=True, squeeze=False)
    for axis, arm in zip(axes.flat, arms):
        own = [label for label in groups if groups[label][0].arm == arm]
        for label, points in means.items():
            if label not in own:
                axis.plot(*points.T, color="#d0d0d0", linewidth=0.8, zorder=1)
        for number, label in enumerate(own):
            setting = label.removeprefix(arm).removeprefix(", ") or arm
            axis.plot(*means[label].T, "-o", markersize=3, color=palette[number % len(palette)], label=setting)
        axis.set_title(arm)
        axis.set_xscale("symlog", linthresh=0.1)
        axis.legend(fontsize=7, loc="lower right")
    for axis in list(axes.flat)[len(arms) :]:
        axis.set_axis_off()
    figure.supxlabel("perplexity degradation", fontsize=9)
    figure.supylabel("reward improvement", fontsize=9)
    return figure


def equal_gain_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: what each label had paid when it first reached a share of the largest final gain of any label, mean ±
    half-width over the seeds that reached it, with their number where some did not. No rows where no run was evaluated on its
    way, or none gained."""
    groups = {label: group for label, group in by_label(runs).items() if all(len(path(run)) > 1 for run in group)}
    best = max((float(np.mean([path(run)[-1][1] for run in group])) for group in groups.values()), default=0.0)
    levels, rows = [share * best for share in SHARES], []
    for label, group in groups.items() if best > 0 else ():
        cells = []
        for level in levels:
            costs = [cost for run in group if math.isfinite(cost := cost_at(path(run), level))]
            reached = f" ({len(costs)} of {len(group)})" if len(costs) < len(group) else ""
            cells.append((plus_minus(mean_interval(costs)) if costs else "never") + reached)
        rows.append([label, str(len(group)), *cells])
    return ["arm", "seeds", *[f"at gain {level:.2f}" for level in levels]], rows
