"""What a gain costs: arms in the plane of perplexity degradation and reward improvement, and the front of each.

    front(points)                         # of (cost, gain) pairs those that no other beats in both
    figure = price_plane(runs, colours)   # colours by arm; None where runs have no price
    figure = price_paths(runs, colours)   # the way there, evaluation by evaluation
    heads, rows = price_table(runs)
    heads, rows = equal_gain_table(runs)  # what the same gain cost on the way
    labels = joint_front(runs)            # of all arms

A point is an arm at one setting (a KL coefficient, say), the mean over its seeds. Costs are averaged, and drawn, in
log(1 + cost), the loss on base text in nats: degradations of 2 and 30 have no useful mean.
"""

import math

import numpy as np
from matplotlib.figure import Figure

from experiments import Run, by_label, plus_minus
from stats import mean_interval

COST, GAIN = "perplexity_degradation", "reward_improvement"
DEGRADATIONS = (-0.1, 0, 0.1, 0.3, 1, 3, 10, 30, 100, 1000)  # ticks
GREY = "#9a9a9a"
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


def price_plane(runs: list[Run], colours: dict[str, str]) -> Figure | None:
    """The arms that have a colour: each run a small point, each setting its mean, joined where they are the arm's front, with
    intervals where there are three seeds. The other arms' means in grey. Better is up and to the left."""
    arms = priced(runs)
    if not arms:
        return None
    figure = Figure(figsize=(8.6, 5.4))
    axis = figure.subplots()
    for arm, cells in sorted(arms.items(), key=lambda item: item[0] in colours):
        colour, points = colours.get(arm, GREY), []
        for label, seeds in cells.items():
            costs, gains = zip(*seeds)
            (cost, low, high), (gain, half) = cost_interval(costs), mean_interval(gains)
            bars = {"xerr": [[cost - low], [high - cost]], "yerr": half} if arm in colours and len(seeds) >= 3 else {}
            axis.errorbar(cost, gain, **bars, color=colour, marker="o", markersize=5, elinewidth=0.8)
            if arm in colours:
                axis.scatter(costs, gains, s=9, color=colour, alpha=0.4, linewidth=0)
            setting = label.removeprefix(arm).removeprefix(", ") if arm in colours else label
            axis.annotate(setting, (cost, gain), xytext=(5, 3), textcoords="offset points", fontsize=7, color=colour)
            points.append((cost, gain))
        if arm in colours:
            axis.plot(*zip(*front(points)), color=colour, drawstyle="steps-post", label=arm)
    axis.scatter(0, 0, s=130, marker="*", color="black", zorder=4, label="before")
    axis.set(xlabel="perplexity degradation", ylabel="reward improvement", title="What the reward costs")
    degradations_on(axis)
    figure.legend(loc="outside right upper")
    return figure


def degradations_on(axis) -> None:
    """Scales the axis of a cost: linear up to .05, logarithmic above."""
    axis.set_xscale("symlog", linthresh=0.05, linscale=0.7)
    low, high = axis.get_xlim()
    ticks = [tick for tick in DEGRADATIONS if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def joint_front(runs: list[Run]) -> list[str]:
    """The labels that no other beats, by their means: at most the cost and at least the gain; by ascending cost."""
    means = {}
    for cells in priced(runs).values():
        for label, points in cells.items():
            nats, gain = np.mean([(math.log1p(cost), gain) for cost, gain in points], axis=0)
            means[float(nats), float(gain)] = label
    return [means[point] for point in front(list(means))]


def price_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: each arm's settings with gain (mean ± half-width over seeds), cost and efficiency, the ratio of the two (a
    ratio of one seed may divide by nearly nothing), a dash where nothing was paid."""
    rows = []
    for cells in priced(runs).values():
        for label, points in cells.items():
            costs, gains = zip(*points)
            cost, said = mean_cost(costs)
            efficiency = f"{np.mean(gains) / cost:.2f}" if cost > 0 else "–"
            rows.append([label, str(len(points)), plus_minus(mean_interval(gains)), said, efficiency])
    return ["arm", "seeds", "reward improvement", "perplexity degradation", "efficiency"], rows


def mean_cost(costs) -> tuple[float, str]:
    """The mean of costs, and that with its 95% interval over seeds."""
    mean, low, high = cost_interval(costs)
    return mean, f"{mean:.3g} ({low:.3g} to {high:.3g})" if len(costs) > 1 else f"{mean:.3g}"


def cost_interval(costs) -> tuple[float, float, float]:
    """Mean and ends of its 95% interval over seeds, made in log(1 + cost); of one seed the cost itself."""
    mean, half = mean_interval([math.log1p(cost) for cost in costs])
    half = half if len(costs) > 1 else 0.0
    return math.expm1(mean), math.expm1(mean - half), math.expm1(mean + half)


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


def price_paths(runs: list[Run], colours: dict[str, str]) -> Figure | None:
    """The mean path of each label, a panel for each arm that has a colour, all others in grey behind it."""
    groups = {label: group for label, group in by_label(runs).items() if all(len(path(run)) > 1 for run in group)}
    arms = [arm for arm in dict.fromkeys(group[0].arm for group in groups.values()) if arm in colours]
    if not arms:
        return None
    places = {label: np.array([path(run) for run in group]) for label, group in groups.items()}
    means = {label: np.stack([np.expm1(np.log1p(p[..., 0]).mean(0)), p[..., 1].mean(0)], axis=1) for label, p in places.items()}
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.3))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, arm in zip(axes.flat, arms):
        own = [label for label in groups if groups[label][0].arm == arm]
        for label, points in means.items():
            if label not in own:
                axis.plot(*points.T, color="#d8d8d8", linewidth=0.8, zorder=1)
        for label, line in zip(own, ("-", "--", ":", "-.")):
            setting = label.removeprefix(arm).removeprefix(", ") or arm
            axis.plot(*means[label].T, line, marker="o", markersize=3, color=colours[arm], label=setting)
        axis.set_title(arm)
        axis.legend(fontsize=7, loc="lower right")
    for axis in list(axes.flat)[len(arms) :]:
        axis.set_axis_off()
    degradations_on(axes.flat[0])
    figure.supxlabel("perplexity degradation", fontsize=9)
    figure.supylabel("reward improvement", fontsize=9)
    return figure


def equal_gain_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: what each label had paid when it first reached a share of the largest final gain of any label, over the
    seeds that reached it, with their number where some did not. No rows where no run was evaluated on its way, or none gained."""
    groups = {label: group for label, group in by_label(runs).items() if all(len(path(run)) > 1 for run in group)}
    best = max((float(np.mean([path(run)[-1][1] for run in group])) for group in groups.values()), default=0.0)
    levels, rows = [share * best for share in SHARES], []
    for label, group in groups.items() if best > 0 else ():
        cells = []
        for level in levels:
            costs = [cost for run in group if math.isfinite(cost := cost_at(path(run), level))]
            reached = f" ({len(costs)} of {len(group)})" if len(costs) < len(group) else ""
            cells.append((mean_cost(costs)[1] if costs else "never") + reached)
        rows.append([label, str(len(group)), *cells])
    return ["arm", "seeds", *[f"at gain {level:.2f}" for level in levels]], rows
