"""From an experiment's run folders to figures, tables, and a verdict for each of its hypotheses.

    python analyze.py output/routing                                   # hypotheses from configs/routing.yaml
    python analyze.py output/routing --config configs/other.yaml
    python analyze.py output/routing --bad_scales 0,.25,.5,.75,1       # evaluates the routed runs' adapters at these scales too
    python analyze.py --results_dir results                            # the estimators' experiment: estimator_report.py

The folder is one that sweep.py wrote; one with results.json files in it is the estimators'. Everything goes to its `analysis/`:
report.md (verdicts, missing runs, figures, summary), summary.md and summary.tex, results.json (every number), and the figures.
Seeds are the observations: every interval is a 95% interval over seeds. What a hypothesis may say: hypotheses.py.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
import yaml
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

import estimator_report
import estimator_runs
from checkpoints import atomic_write
from experiments import (
    Run,
    by_label,
    curve,
    finished,
    label_of,
    latex,
    load,
    markdown,
    movement,
    plain,
    plus_minus,
    records,
    summarise,
    summary_rows,
)
from figures import GREY, PALE, PALETTE, STYLE, band, legend, limits, over_seeds, panels
from fronts import equal_gain_table, joint_front, price_paths, price_plane, price_table
from hypotheses import MIN_SEEDS, Verdict, judge_all, read_hypotheses
from model import check_device
from verdict import bad_scale_rows


@dataclass
class Args:
    folder: tyro.conf.Positional[str] = ""
    """an experiment's folder, as sweep.py writes it: runs.json and the run folders"""
    results_dir: str = ""
    """in its place: a folder with results.json files somewhere below it, the runs of the estimators' experiment"""
    config: str = ""
    """the experiment's YAML file, for its `hypotheses`; default: configs/<the folder's name>.yaml"""
    arms: str = ""
    """arms to colour in the figures, comma-separated; default: those with at least three finished seeds, or else all"""
    measures: str = "task,hack,reward,unique,jaccard,kl,base_nll,length"
    """columns of the summary, comma-separated"""
    curves: str = ""
    """further training metrics to draw over steps, comma-separated, as projection/cin,cin/teacher"""
    bad_scales: str = ""
    """scales of the bad branch at which to evaluate the routed runs, comma-separated; what was evaluated before is kept"""
    device: str = "cpu"
    """where --bad_scales evaluates"""


CURVES = {"reward": "reward", "task": "task", "hack_rate": "hack rate", "kl": "KL to the untrained model, nats a token"}
MODES = {"both": ("o", "#444444"), "retain_only": ("v", "#009E73"), "forget_only": ("s", "#D55E00")}  # marker and colour
DEGENERATE = {"unique": (-1, 0.5), "jaccard": (0.7, 2)}  # as verdict.diversity flags it
STILL = 0.03  # a training metric that moves further than this over the last quarter has not converged


# ------------------------------------------------------------------------------------------------------ figures


def learning_curves(runs: list[Run], colours: dict[str, str], titles: dict[str, str] = CURVES) -> Figure | None:
    """Training metrics over steps: mean and 95% band over seeds for each arm. Dashed: steps with the bad branch off."""
    groups = {label: group for label, group in by_label(runs).items() if label in colours}
    keys = [key for key in titles if any(len(curve(group, key)[0]) for group in groups.values())]
    if not keys:
        return None
    figure, axes = panels(len(keys), 2, 4.9, 2.9)
    apart = False
    for axis, key in zip(axes, keys):
        seen = []
        for label, group in groups.items():
            for coherence, line in ((False, "-"), (True, (0, (4, 2)))):
                steps, values = curve(group, key, coherence)
                if len(steps):
                    mean, half = over_seeds(values)
                    band(axis, steps, mean, half, colours[label], linestyle=line)
                    seen.append(values[np.isfinite(values)])
                    apart |= coherence
        axis.set(title=titles[key], xlabel="step", ylim=limits(np.concatenate(seen)))
    legend(figure, colours, groups, [Line2D([], [], color=GREY, linestyle=(0, (4, 2)), label="bad branch off")] * apart)
    return figure


def plane(runs: list[Run], colours: dict[str, str], x="task", y="hack", start="both", end="retain_only") -> Figure | None:
    """One point a run in the plane of two measures, an arrow from one mode to another where a run has both."""
    if not any(x in row and y in row for run in runs for row in run.modes.values()):
        return None
    figure = Figure(figsize=(7.6, 5.2))
    axis = figure.subplots()
    spare = [run for run in runs if run.label not in colours]
    for run in [*spare, *[run for run in runs if run.label in colours]]:
        colour, above = colours.get(run.label, PALE), 3 if run.label in colours else 2
        at = {mode: (run.modes[mode][x], run.modes[mode][y]) for mode in (start, end) if mode in run.modes}
        if start in at:
            axis.scatter(*at[start], s=38, color=colour, edgecolor="white", linewidth=0.6, zorder=above)
        if end in at:
            axis.scatter(*at[end], s=44, marker="v", facecolor="white", edgecolor=colour, linewidth=1.4, zorder=above)
        if start in at and end in at:
            arrow = {"arrowstyle": "-|>", "color": colour, "alpha": 0.55, "linewidth": 1.1, "shrinkA": 4, "shrinkB": 5}
            axis.annotate("", at[end], at[start], arrowprops=arrow, zorder=above - 1)
    untrained = {(run.modes["untrained"][x], run.modes["untrained"][y]) for run in runs if "untrained" in run.modes}
    for point in untrained:
        axis.scatter(*point, s=130, marker="*", color="black", zorder=4)
    both = Line2D([], [], color="#333333", marker="o", linestyle="", label=start)
    retained = Line2D([], [], color="#333333", marker="v", markerfacecolor="white", linestyle="", label=end)
    star = Line2D([], [], color="black", marker="*", markersize=10, linestyle="", label="untrained")
    others = Line2D([], [], color=PALE, marker="o", linestyle="", label="other arms")
    extra = [both, *[retained] * any(end in run.modes for run in runs), *[star] * bool(untrained), *[others] * bool(spare)]
    axis.set(xlabel=x, ylabel=y, title=f"{x} and {y}: a point a run")
    legend(figure, colours, by_label(runs), extra, where="outside right upper", columns=1, marker="o")
    return figure


def arms_chart(runs: list[Run], measures=("task", "hack")) -> Figure | None:
    """Every arm's modes side by side, however few its seeds: mean and 95% interval over seeds."""
    table, labels = summarise(records(runs)), list(by_label(runs))
    measures = [m for m in measures if any(m in cell for cell in table.values())]
    if not measures:
        return None
    figure = Figure(figsize=(2.6 + 3.4 * len(measures), 1.3 + 0.34 * len(labels)))
    axes = np.atleast_1d(figure.subplots(1, len(measures), sharey=True))
    shown = [mode for mode in MODES if any((label, mode) in table for label in labels)]
    for axis, measure in zip(axes, measures):
        untrained = [cell[measure][0] for (_, mode), cell in table.items() if mode == "untrained"]
        if untrained:
            axis.axvline(np.mean(untrained), color="black", linewidth=1, linestyle=":")
        for row, label in enumerate(labels):
            there = [mode for mode in shown if (label, mode) in table]
            for place, mode in enumerate(there):
                (mean, half), (marker, colour) = table[label, mode][measure], MODES[mode]
                y = row + 0.2 * (place - (len(there) - 1) / 2)
                axis.plot([mean - half, mean + half], [y, y], color=colour, linewidth=1.6, alpha=0.6)
                axis.plot(mean, y, marker, color=colour, markersize=5.5, markeredgecolor="white", markeredgewidth=0.5)
        axis.set(title=measure, ylim=(len(labels) - 0.5, -0.5), xlim=limits([cell[measure][0] for cell in table.values()]))
        axis.grid(axis="y", visible=False)
        for row in range(1, len(labels)):
            axis.axhline(row - 0.5, color="#ececec", linewidth=0.7)
    axes[0].set_yticks(range(len(labels)), [f"{label}  (n = {len(group)})" for label, group in by_label(runs).items()])
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=mode) for mode, (m, c) in MODES.items() if mode in shown]
    handles.append(Line2D([], [], color="black", linewidth=1, linestyle=":", label="untrained"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def bad_scale_curve(runs: list[Run], rows: dict[Path, dict], colours: dict[str, str], measures=("task", "hack")) -> Figure | None:
    """Measures against the scale of the bad branch: each run a thin line, mean and 95% band over seeds."""
    groups = {label: [r for r in group if rows.get(r.folder)] for label, group in by_label(runs).items() if label in colours}
    groups = {label: group for label, group in groups.items() if group}
    if not groups:
        return None
    figure, axes = panels(len(measures), 2, 4.4, 3.4)
    for axis, measure in zip(axes, measures):
        for label, group in groups.items():
            scales = sorted(set.intersection(*[set(rows[run.folder]) for run in group]))  # the band takes all seeds
            values = np.array([[rows[run.folder][scale][measure] for scale in scales] for run in group])
            mean, half = over_seeds(values)
            axis.plot(scales, values.T, color=colours[label], linewidth=0.7, alpha=0.35)
            band(axis, scales, mean, half, colours[label], marker="o", markersize=4)
        low, high = limits([row[measure] for r in rows.values() for row in r.values()])
        untrained = np.mean([run.modes["untrained"][measure] for group in groups.values() for run in group])
        axis.axhline(untrained, color="black", linewidth=1, linestyle=":")
        axis.set(title=measure, xlabel="scale of the bad branch", ylim=(min(low, untrained - 0.02), max(high, untrained + 0.02)))
    legend(figure, colours, groups, [Line2D([], [], color="black", linewidth=1, linestyle=":", label="untrained")])
    return figure


def collapse_curve(runs: list[Run]) -> Figure | None:
    """Reward, unique share and Jaccard of both over beta, a line an arm: at which beta, if any, there is reward without sameness.
    Grey: what counts as degenerate. None where no arm was swept over beta."""
    lines = {}
    for run in runs:
        if "beta" in run.config and "both" in run.modes:
            other = {key: value for key, value in run.swept.items() if key != "beta"}
            lines.setdefault(label_of(run.arm, other), {}).setdefault(float(run.config["beta"]), []).append(run.modes["both"])
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    colours = dict(zip(lines, PALETTE * len(lines)))
    betas = sorted({beta for points in lines.values() for beta in points})  # evenly spaced: they are often powers, or 0
    names = {"reward": "reward", "unique": "unique share", "jaccard": "Jaccard similarity"}
    figure, axes = panels(len(names), 3, 3.6, 3.1)
    for axis, measure in zip(axes, names):
        seen = []
        for label, points in lines.items():
            there = [beta for beta in betas if beta in points]
            mean, half = np.array([over_seeds(np.array([[row[measure]] for row in points[beta]])) for beta in there])[:, :, 0].T
            band(axis, [betas.index(beta) for beta in there], mean, half, colours[label], marker="o", markersize=4.5)
            seen += list(mean)
        axis.set(title=names[measure], xlabel="β", ylim=limits(seen))
        axis.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        if measure in DEGENERATE:
            axis.set_ylim(*limits([0, 1]))
            axis.axhspan(*DEGENERATE[measure], color="#f0f0f0", zorder=0)
    legend(figure, colours, lines, [Line2D([], [], color="#dddddd", linewidth=7, label="degenerate")])
    return figure


# ------------------------------------------------------------------------------------------------------- report


VERDICT_HEADS = ["hypothesis", "claim", "verdict", "estimate", "bootstrap interval", "t interval", "p (Holm)", "seeds"]


def verdict_rows(verdicts: list[Verdict]) -> list[list[str]]:
    def between(pair) -> str:
        return f"{pair[0]:.3f} to {pair[1]:.3f}" if not math.isnan(pair[0]) else "–"

    def number(x: float) -> str:
        return f"{x:.3f}" if math.isfinite(x) else "–"

    def p_value(p: float) -> str:
        return "< 0.001" if p < 0.001 else number(p)

    return [
        [v.name, v.claim, f"**{v.verdict}**", number(v.estimate), between(v.interval), between(v.t_interval), p_value(v.p_holm),
         str(len(v.seeds) or "–")]
        for v in verdicts
    ]  # fmt: skip


def still_moving(runs: list[Run]) -> list[list[str]]:
    """How far each arm's training metrics move over the last quarter; bold where by more than STILL."""

    def cell(moved: tuple[float, float] | None) -> str:
        bold = "**" if moved and abs(moved[0]) > STILL else ""
        return f"{bold}{plus_minus(moved)}{bold}" if moved else "–"

    keys = ("task", "hack_rate", "reward")
    return [[label, *[cell(movement(group, key)) for key in keys]] for label, group in by_label(runs).items()]


def report(folder: Path, runs: list[Run], verdicts: list[Verdict], figures: list[str], summary: str) -> str:
    """report.md: what was run and what is missing, verdicts and why, convergence, figures, summary."""
    missing = [f"- {run.label}, seed {run.seed}: {run.missing}" for run in runs if run.missing]
    lines = [
        f"# {folder.name}",
        "",
        f"{len(finished(runs))} of {len(runs)} runs have a result. Intervals are 95% over seeds.",
        "",
    ]
    if missing:
        lines += ["Missing, and in nothing below:", "", *missing, ""]
    if verdicts:
        lines += ["## Verdicts", "", markdown(VERDICT_HEADS, verdict_rows(verdicts))]
        lines += [*[f"- {v.name}, **{v.verdict}**: {v.why}" for v in verdicts], ""]
        lines += ["Both intervals must agree: from few seeds the bootstrap's alone is too narrow (docs/analyze.md).", ""]
    heads, prices = price_table(finished(runs))
    if prices:
        lines += ["## What the reward costs", "", markdown(heads, prices)]
        lines += [f"On the front of all, by their means: {'; '.join(joint_front(finished(runs)))}.", ""]
    heads, prices = equal_gain_table(finished(runs))
    if prices:
        lines += ["What the same gain had cost on the way, in perplexity degradation:", "", markdown(heads, prices)]
    lines += ["## Movement of the training metrics over the last quarter", "", f"Bold: by more than {STILL}.", ""]
    lines += [markdown(["arm", "task", "hack rate", "reward"], still_moving(finished(runs))), "## Figures", ""]
    lines += [f"![{name.replace('_', ' ')}]({name}.png)\n" for name in figures]
    return "\n".join([*lines, "## Summary", "", summary])


# --------------------------------------------------------------------------------------------------------- main


def read_experiment(args: Args) -> dict:
    """The experiment's YAML. Raises ValueError where --config names none; without --config there may be none."""
    path = Path(args.config or Path(__file__).parent / "configs" / f"{Path(args.folder).resolve().name}.yaml")
    if not path.is_file():
        if args.config:
            raise ValueError(f"--config {path}: no such file")
        print(f"no {path.parent.name}/{path.name}: no hypothesis to judge (--config names another file)")
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping")
    return values


def colours_of(runs: list[Run], arms: str) -> dict[str, str]:
    """label -> colour, for the arms that --arms names (by label, or by arm for all its labels), or the well-seeded ones."""
    groups = by_label(runs)
    if arms:
        names = [name.strip() for name in arms.split(",") if name.strip()]
        if unknown := [name for name in names if not any(name in (run.arm, run.label) for run in runs)]:
            raise ValueError(f"--arms {unknown[0]}: no finished run; known: {'; '.join(groups)}")
        chosen = [label for name in names for label, group in groups.items() if name in (label, group[0].arm)]
    else:
        chosen = [label for label, group in groups.items() if len(group) >= MIN_SEEDS] or list(groups)
    if len(chosen) > len(PALETTE):
        print(f"{len(chosen)} arms, {len(PALETTE)} colours: the figures colour the first; --arms chooses")
    return dict(zip(chosen, PALETTE))


def arm_colours(runs: list[Run], arms: str) -> dict[str, str]:
    """arm -> colour, where a figure has a colour for an arm and not for each of its settings; chosen as `colours_of` does."""
    groups, names = by_label(runs), [name.strip() for name in arms.split(",") if name.strip()]
    chosen = [group[0].arm for label, group in groups.items()
              if (label in names or group[0].arm in names if names else len(group) >= MIN_SEEDS)]  # fmt: skip
    return dict(zip(dict.fromkeys(chosen or [group[0].arm for group in groups.values()]), PALETTE))


def scales_of(words: str) -> list[float]:
    try:
        return sorted({float(word) for word in words.split(",") if word.strip()})
    except ValueError:
        raise ValueError(f"--bad_scales {words!r} must be numbers, comma-separated, as 0,.5,1") from None


def measures_of(summary: dict, words: str) -> list[str]:
    """The summary's columns: of the default ones those that there are; of those asked for, all."""
    names = [name.strip() for name in words.split(",") if name.strip()]
    known = {measure: None for cell in summary.values() for measure in cell if measure != "n"}
    unknown = [name for name in names if name not in known]
    if unknown and words != Args.measures:
        raise ValueError(f"--measures {unknown[0]}: no run has it; known: {', '.join(known)}")
    return [name for name in names if name in known]


def further_curves(runs: list[Run], words: str) -> dict[str, str]:
    """Titles of the metrics that --curves names. Raises ValueError for one that no run has logged."""
    names = [name.strip() for name in words.split(",") if name.strip()]
    known = {key for run in runs for line in run.metrics for key in line}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--curves {unknown[0]}: no run has logged it; known: {', '.join(sorted(known))}")
    return {name: name for name in names}


def draw(out: Path, runs: list[Run], scaled: dict, colours: dict[str, str], further: dict[str, str], arms: str) -> list[str]:
    """Every figure that the runs have data for, as PNG; their names."""
    by_arm = arm_colours(runs, arms)
    with matplotlib.rc_context(STYLE):
        figures = {
            "learning_curves": learning_curves(runs, colours), "plane": plane(runs, colours), "arms": arms_chart(runs),
            "bad_scale": bad_scale_curve(runs, scaled, colours), "collapse": collapse_curve(runs),
            "curves": learning_curves(runs, colours, further), "price": price_plane(runs, by_arm),
            "price_paths": price_paths(runs, by_arm),
        }  # fmt: skip
        drawn = [name for name, figure in figures.items() if figure is not None]
        for name in drawn:
            figures[name].savefig(out / f"{name}.png")
    return drawn


def estimators_folder(args: Args) -> Path | None:
    """The folder, if it is one of the estimators' experiment. Raises ValueError for flags that say nothing of it."""
    if bool(args.folder) == bool(args.results_dir):
        raise ValueError("give an experiment's folder: python analyze.py output/routing, or --results_dir results")
    folder = Path(args.results_dir or args.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not args.results_dir and not estimator_runs.run_files(folder):
        return None
    for name in ("config", "arms", "measures", "curves", "bad_scales", "device"):
        if getattr(args, name) != getattr(Args, name):
            raise ValueError(f"--{name} has no meaning for {folder}, whose results.json files are the estimators' experiment")
    return folder


def main(args: Args) -> None:
    if estimators := estimators_folder(args):
        return estimator_report.main(estimators)
    folder, scales = Path(args.folder), scales_of(args.bad_scales)
    check_device(args.device)
    every = load(folder)
    verdicts = judge_all(read_hypotheses(read_experiment(args).get("hypotheses")), every)
    runs = finished(every)
    if not runs:
        raise ValueError(f"{folder}: none of its {len(every)} runs has a result; the first: {every[0].missing}")
    colours, summary = colours_of(runs, args.arms), summarise(records(runs))
    measures, further = measures_of(summary, args.measures), further_curves(runs, args.curves)
    routed = [run for run in runs if "retain_only" in run.modes]
    if scales and not routed:
        raise ValueError(f"--bad_scales: no finished run of {folder} has a bad branch")
    progress = tqdm(routed, "bad scales", disable=not scales)
    scaled = {run.folder: bad_scale_rows(run.folder, scales, args.device) for run in progress}

    out = folder / "analysis"
    out.mkdir(exist_ok=True)
    figures = draw(out, runs, scaled, colours, further, args.arms)
    heads, rows = ["arm", "mode", "seeds", *measures], summary_rows(summary, measures)
    atomic_write(out / "summary.md", markdown(heads, rows))
    atomic_write(out / "summary.tex", latex(heads, rows))
    atomic_write(out / "report.md", report(folder, every, verdicts, figures, markdown(heads, rows)))
    results = {
        "verdicts": [asdict(v) for v in verdicts],
        "summary": [{"label": label, "mode": mode} | cell for (label, mode), cell in summary.items()],
        "missing": [{"label": run.label, "seed": run.seed, "why": run.missing} for run in every if run.missing],
        "bad_scales": {place.name: rows for place, rows in scaled.items()},
    }
    atomic_write(out / "results.json", json.dumps(plain(results), indent=1) + "\n")
    for run in every:
        if run.missing:
            print(f"missing: {run.label}, seed {run.seed}: {run.missing}")
    for v in verdicts:
        print(f"{v.verdict.upper()}: {v.name}: {v.claim}\n    {v.why}")
    print(f"{len(runs)} of {len(every)} runs; report.md, summary.tex, results.json and {len(figures)} figures in {out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
