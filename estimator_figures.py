"""Pictures of the estimators' experiment: each function gives a matplotlib Figure, or None where there is nothing to draw.

A line is the mean over a method's seeds, its band the 95% interval of the mean; from three seeds on. A dot is a seed.
"""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from estimator_runs import TITLES, Run, first_reach, gap, spent, spread
from estimator_variance import METHODS, Policy, by_seed, labels_of, row_figure
from estimator_verdicts import Comparison, Frame
from figures import GREY, PALETTE, band, legend, limits, over_seeds, panels
from hypotheses import MIN_SEEDS
from stats import mean_interval

SHARES = (0.25, 0.5, 0.8, 0.9)  # of the best final gain: the reward thresholds
BINS = 60  # of a learning curve


def colours_of(labels) -> dict[str, str]:
    """A method has its colour in every picture of every experiment; what TITLES does not know comes after."""
    known = dict(zip(TITLES.values(), PALETTE))
    others = [label for label in labels if label not in known]
    return known | {label: PALETTE[(len(known) + i) % len(PALETTE)] for i, label in enumerate(others)}


def binned(runs: list[Run], key: str, over: str = "") -> tuple[np.ndarray, np.ndarray]:
    """A logged column (or its ratio to the column `over`), averaged within at most BINS equal stretches of the steps: the middles
    (B,), values (runs, B). Every mean is of its own stretch alone, so that no curve drags its beginning along."""
    last = max(run.steps["step"][-1] for run in runs)
    edges = np.linspace(0, last, min(BINS, max(len(run.steps["step"]) for run in runs)) + 1)
    table = np.full((len(runs), len(edges) - 1), math.nan)
    for row, run in zip(table, runs):
        column = run.steps[key] / run.steps[over] if over else run.steps[key]
        place = np.searchsorted(edges, run.steps["step"]) - 1  # a step belongs to the stretch that it ends
        for i in range(len(row)):
            there = column[(place == i) & np.isfinite(column)]
            row[i] = there.mean() if len(there) else math.nan
    seen = np.isfinite(table).any(axis=0)
    return ((edges[:-1] + edges[1:]) / 2)[seen], table[:, seen]


def learning(groups: dict[str, list[Run]]) -> Figure:
    figure, axes = panels(3, 3, 3.9, 3.1)
    titles = {"reward": "training reward", "loss": "loss (each method's own)", "kl": "KL to the reference, nats a completion"}
    for axis, key in zip(axes, titles):
        _curves(axis, groups, key)
        axis.set(title=titles[key], xlabel="step")
    legend(figure, colours_of(groups), groups)
    return figure


def validation(groups: dict[str, list[Run]]) -> Figure:
    figure, axes = panels(3, 3, 3.9, 3.1)
    _validation_curves(axes[0], groups, colours_of(groups))
    axes[0].set(title="validation reward", xlabel="step")
    for axis, which in zip(axes[1:], ("last", "best")):
        dots(axis, {label: [gap(run, which) for run in group] for label, group in groups.items()}, colours_of(groups), 0.0)
        axis.set(title=f"validation − test reward, {which}")
    legend(figure, colours_of(groups), groups)
    return figure


def gradients(groups: dict[str, list[Run]]) -> Figure:
    """Norms of micro-batch gradients, and their spread of those methods that logged it."""
    spreads = {label: found for label, group in groups.items() if (found := [x for x in map(spread, group) if math.isfinite(x)])}
    figure, axes = panels(3 if spreads else 1, 3, 3.9, 3.1)
    _curves(axes[0], groups, "grad_norm_mean")
    axes[0].set(title="mean norm of micro-batch gradients", xlabel="step", yscale="log")
    if spreads:
        _curves(axes[1], {label: groups[label] for label in spreads}, "grad_norm_std", "grad_norm_mean")
        axes[1].set(title="their spread over their mean (no variance)", xlabel="step")
        dots(axes[2], spreads, colours_of(groups))
        axes[2].set(title="the same, a run a dot")
    legend(figure, colours_of(groups), groups, columns=4 if spreads else 2)
    return figure


def variance(policies: list[Policy]) -> Figure | None:
    """What variance.py measured, a row an estimator. A small dot is a policy (hollow: of no seed's run, and in no mean), its thin
    line the interval over draws (dashed: open above); below them the mean over seeds with its t interval, from three seeds on.
    Means of variances are geometric."""
    policies = [policy for policy in policies if policy.rows]
    if not policies:
        return None
    labels = labels_of(policies)
    figure, axes = panels(3, 3, 4.3, 0.9 + 0.42 * len(labels))
    for y, label in enumerate(labels):
        colour = colours_of([METHODS.get(label.split()[0], label)])[METHODS.get(label.split()[0], label)]
        there = [policy for policy in policies if label in policy.rows]
        for axis, key in zip(axes, ("ratio", "cosine", "seconds")):
            for place, policy in enumerate(there):
                _policy(axis, policy, policy.rows[label], key, y + 0.1 - 0.4 * (place + 1) / len(there), colour)
            found = by_seed(there, row_figure(label, lambda row, key=key: math.log(row[key]) if key == "ratio" else row[key]))
            if len(found) >= MIN_SEEDS:
                mean, half = mean_interval(list(found.values()))
                low, middle, high = (math.exp(x) if key == "ratio" else x for x in (mean - half, mean, mean + half))
                axis.plot([low, high], [y + 0.28] * 2, color=colour, linewidth=2.2)
                axis.plot(middle, y + 0.28, "o", color=colour, markersize=7, markeredgecolor="white", markeredgewidth=0.6)
        for axis, key in zip(axes, ("ratio", "cosine")):
            if lost := sum(math.isnan(policy.rows[label][key]) for policy in there):
                place = {"xycoords": axis.get_yaxis_transform(), "ha": "right", "va": "center"}
                axis.annotate(f"{lost} not resolved", (0.99, y + 0.28), color=GREY, fontsize=8, **place)
    for axis, title in zip(axes, ("relative variance", "cosine to the hard reward's gradient", "seconds a gradient")):
        axis.set(title=title, ylim=(len(labels) - 0.5, -0.5))
        axis.set_yticks(range(len(labels)), labels)
        axis.grid(axis="y", visible=False)
    axes[0].set_xscale("log")
    axes[1].set_xlim(-1.6, 1.6)  # an interval that leaves it tells nothing; freed of noise, a cosine may leave -1 to 1
    axes[2].set_xlim(left=0)
    kinds = {"a policy, 95% over its draws": (3.5, 0.9), "mean over seeds, 95%": (7, 2.2)}
    handles = [Line2D([], [], color=GREY, marker="o", markersize=s, linewidth=w, label=text) for text, (s, w) in kinds.items()]
    legend(figure, {}, {}, handles)
    return figure


def _policy(axis, policy: Policy, row: dict, key: str, y: float, colour: str) -> None:
    """One policy's figure, with its interval over draws where it has one."""
    if not math.isfinite(row[key]):
        return
    axis.plot(row[key], y, "o", color=colour, markersize=3.5, alpha=0.7, fillstyle="none" if policy.seed is None else "full")
    ends = {"ratio": (row["low"], min(row["high"], 10 * row["ratio"])), "seconds": (row["seconds"],) * 2,
            "cosine": (row["cosine"] - row["cosine_half"], row["cosine"] + row["cosine_half"])}  # fmt: skip
    style = "--" if key == "ratio" and math.isinf(row["high"]) else "-"
    axis.plot(ends[key], [y, y], style, color=colour, linewidth=0.9, alpha=0.5)


def efficiency(frame: Frame) -> Figure | None:
    """What a seed had spent when it reached each threshold; a cross above: it never did."""
    if math.isnan(frame.target()):
        return None
    figure, axes = panels(3, 3, 3.9, 3.3)
    colours, width = colours_of(frame.groups), 0.7 / len(frame.groups)
    for axis, key in zip(axes, ("steps", "tokens", "prompts")):
        seen, never = [0.0], []
        for place, (method, group) in enumerate(frame.groups.items()):
            for at, share in enumerate(SHARES):
                steps = [first_reach(run, "val_reward", frame.target(share)) for run in group]
                used = [step if key == "steps" else spent(run, key, step) for run, step in zip(group, steps)]
                x = at + width * (place - (len(frame.groups) - 1) / 2)
                there = [u for u in used if math.isfinite(u)]
                axis.scatter([x] * len(there), there, s=14, color=colours[method], alpha=0.6, linewidth=0)
                if len(there) == len(used):
                    axis.plot([x - width / 3, x + width / 3], [np.mean(there)] * 2, color=colours[method], linewidth=2)
                else:
                    never.append((x, len(used) - len(there), colours[method]))
                seen += there
        top = 1.12 * max(seen) + 1
        for x, count, colour in never:
            axis.plot(x, top, "x", color=colour, markersize=6, markeredgewidth=1.6)
            axis.annotate(str(count), (x, top), (0, 5), textcoords="offset points", fontsize=7, ha="center", color=colour)
        axis.set(title=f"{key} to a share of the best gain", ylim=(0, 1.12 * top))
        axis.set_xticks(range(len(SHARES)), [f"{share:.0%}\n{frame.target(share):.3f}" for share in SHARES])
    cross = Line2D([], [], color=GREY, marker="x", linestyle="", label="never reached, by so many seeds")
    legend(figure, colours, frame.groups, [cross] * any(_never(frame)), columns=5)
    return figure


def final(frame: Frame) -> Figure:
    figure, axes = panels(3, 3, 4.6, 3.2)
    colours, groups = colours_of(frame.groups), frame.groups
    untrained = float(np.mean([run.test["untrained"]["reward"] for group in groups.values() for run in group]))
    for axis, which in zip(axes, ("last", "best")):
        dots(axis, {m: [run.test[which]["reward"] for run in group] for m, group in groups.items()}, colours, untrained)
        axis.set(title=f"test reward, {which}")
    for method, group in groups.items():
        for run in group:
            trained = run.validation["step"] > 0
            x, y = run.validation["val_kl"][trained], run.validation["val_reward"][trained]
            axes[2].plot(x, y, color=colours[method], linewidth=0.9, alpha=0.55)
            axes[2].plot(x[-1:], y[-1:], "o", color=colours[method], markersize=4)
    axes[2].set(title="each seed's way, to its end (dot)", xlabel="KL, nats a completion", ylabel="validation reward")
    legend(figure, colours, groups, [Line2D([], [], color="black", linewidth=1, linestyle=":", label="untrained")], columns=5)
    return figure


def tau(settings: dict[str, list[Run]]) -> Figure | None:
    if len(settings) < 2:
        return None
    figure, axes = panels(3, 3, 4.3, 3.3)
    colours = dict(zip(settings, PALETTE * len(settings)))
    _validation_curves(axes[0], settings, colours)
    axes[0].set(title="validation reward", xlabel="step")
    for label, group in settings.items():
        if all("tau" in run.steps for run in group):
            steps, table = binned(group, "tau")
            band(axes[1], steps, *over_seeds(table), colours[label])
    axes[1].set(title="τ", xlabel="step")
    rewards = {label: [run.test["last"]["reward"] for run in group] for label, group in settings.items()}
    dots(axes[2], rewards, colours, named=False)
    axes[2].set(title="test reward, last")
    legend(figure, colours, settings, columns=3)
    return figure


def differences(tables: dict[str, list[Comparison]]) -> Figure | None:
    """Each pair's difference with Welch's 95% interval, over the margin of equivalence."""
    tables = {title: [row for row in rows if math.isfinite(row.difference)] for title, rows in tables.items()}
    tables = {title: rows for title, rows in tables.items() if rows}
    if not tables:
        return None
    figure, axes = panels(len(tables), 2, 5.4, 0.9 + 0.32 * max(map(len, tables.values())))
    for axis, (title, rows) in zip(axes, tables.items()):
        for y, row in enumerate(rows):
            axis.fill_betweenx([y - 0.4, y + 0.4], -row.margin, row.margin, color="#e3e3e3", linewidth=0)
            axis.plot([row.low, row.high], [y, y], color=PALETTE[0], linewidth=1.6)
            axis.plot(row.difference, y, "o", color=PALETTE[0], markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=title, ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(range(len(rows)), [f"{row.a} − {row.b}" for row in rows])
        axis.grid(axis="y", visible=False)
    return figure


def dots(axis, found: dict[str, list[float]], colours: dict[str, str], line: float | None = None, named: bool = True) -> None:
    """A row a method: its seeds as dots, their mean, and the 95% interval from MIN_SEEDS seeds on; `line` is where to compare."""
    for y, (label, numbers) in enumerate(found.items()):
        there = [x for x in numbers if math.isfinite(x)]
        if there:
            axis.scatter(there, [y + 0.16] * len(there), s=14, color=colours[label], alpha=0.6, linewidth=0)
            mean, half = mean_interval(there)
            if len(there) >= MIN_SEEDS:
                axis.plot([mean - half, mean + half], [y - 0.12] * 2, color=colours[label], linewidth=1.8)
            axis.plot(mean, y - 0.12, "o", color=colours[label], markersize=6, markeredgecolor="white", markeredgewidth=0.6)
    if line is not None:
        axis.axvline(line, color="black", linewidth=1, linestyle=":")
    axis.set_yticks(range(len(found)), list(found) if named else [""] * len(found))
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def _curves(axis, groups: dict[str, list[Run]], key: str, over: str = "") -> None:
    colours, seen = colours_of(groups), []
    for label, group in groups.items():
        steps, table = binned(group, key, over)
        if len(steps):
            band(axis, steps, *over_seeds(table), colours[label])
            seen.append(table[np.isfinite(table)])
    if seen:
        axis.set_ylim(*limits(np.concatenate(seen)))


def _validation_curves(axis, groups: dict[str, list[Run]], colours: dict[str, str]) -> None:
    for label, group in groups.items():
        steps = np.unique(np.concatenate([run.validation["step"] for run in group]))
        table = np.full((len(group), len(steps)), math.nan)
        for row, run in zip(table, group):
            row[np.searchsorted(steps, run.validation["step"])] = run.validation["val_reward"]
        band(axis, steps, *over_seeds(table), colours[label])


def _never(frame: Frame):
    for group in frame.groups.values():
        yield from (math.isinf(first_reach(run, "val_reward", frame.target(share))) for run in group for share in SHARES)
