"""The report of the estimators' experiment: eight analyses, five verdicts; PNG, Markdown and LaTeX. analyze.py calls it.

    python analyze.py --results_dir results

What it reads and what a run amounts to: estimator_runs.py. Tests and hypotheses: estimator_verdicts.py. Pictures:
estimator_figures.py. What variance.py measured: estimator_variance.py. Definitions in words: docs/analyze.md.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np

import estimator_figures as figures
from checkpoints import atomic_write
from estimator_figures import SHARES
from estimator_runs import (
    TITLES,
    Run,
    compared,
    drawdown,
    final_reward,
    first_reach,
    gap,
    kl_range,
    load,
    missing,
    roughness,
    spent,
    spread,
    tau_settings,
)
from estimator_variance import Policy, measured_policies, pairs, variance_text
from estimator_verdicts import (
    MARGIN,
    SHARE,
    Comparison,
    Frame,
    common_frame,
    compare,
    compare_matched,
    judge,
    number,
    rewards,
    steps_to,
    values,
)
from experiments import latex, markdown, plain, plus_minus
from figures import STYLE
from stats import mean_interval

REWARDS = ("test reward, last", "test reward, best")  # compared for equivalence too
MATCHED = "validation reward at matched KL"  # likewise, seed by seed


def measures(frame: Frame) -> dict[str, Callable[[Run], float]]:
    """What the methods are compared in, a number a run."""
    last, best = REWARDS
    return {
        last: lambda run: run.test["last"]["reward"],
        best: lambda run: run.test["best"]["reward"],
        f"steps to {SHARE:.0%} of the best gain": partial(steps_to, target=frame.target(), horizon=frame.horizon),
        "roughness": roughness,
        "gap, last": gap,
        "KL, last": lambda run: run.test["last"]["kl"],
    }


# ------------------------------------------------------------------------------------------------------- tables


def mean_of(numbers) -> str:
    there = [x for x in numbers if math.isfinite(x)]
    lost = f" ({len(there)} of {len(numbers)})" if len(there) < len(numbers) else ""
    return plus_minus(mean_interval(there)) + lost if there else "–"


def reaching(costs: list[float]) -> str:
    """Mean ± half-width where every seed reached; otherwise how many did, and the median where that is a number."""
    reached = sum(map(math.isfinite, costs))
    if reached == len(costs):
        return plus_minus(mean_interval(costs))
    median = f"median {number(float(np.median(costs)))}, " if math.isfinite(np.median(costs)) else ""
    return f"{median}{reached} of {len(costs)} reached" if reached else f"never (0 of {len(costs)})"


def budget_rows(groups: dict[str, list[Run]]) -> list[list[str]]:
    return [
        [m, str(len(group)), *[mean_of([run.steps[key][-1] for run in group]) for key in ("step", "prompts", "tokens")],
         mean_of([run.wall_s / 60 for run in group])]
        for m, group in groups.items()
    ]  # fmt: skip


def unequal_budgets(groups: dict[str, list[Run]]) -> list[str]:
    """The budgets in which two methods differ by more than a twentieth."""
    means = {key: [np.mean([run.steps[key][-1] for run in group]) for group in groups.values()] for key in ("prompts", "tokens")}
    return [key for key, of in means.items() if max(of) > 1.05 * min(of)]


def validation_rows(groups: dict[str, list[Run]]) -> list[list[str]]:
    kinds = (final_reward, lambda run: run.validation["val_reward"].max(), partial(gap, which="last"), partial(gap, which="best"))
    return [[m, str(len(group)), *[mean_of([kind(run) for run in group]) for kind in kinds]] for m, group in groups.items()]


def has_spread(runs: list[Run]) -> bool:
    return any(math.isfinite(spread(run)) for run in runs)


def gradient_table(groups: dict[str, list[Run]]) -> str:
    """Section 3's; the columns of the spread where some run logged it."""

    def mean(run: Run, key: str) -> float:
        column = run.steps[key][np.isfinite(run.steps[key])]
        return float(column.mean()) if len(column) else math.nan

    kinds = {"norm": partial(mean, key="grad_norm_mean")}
    if has_spread([run for group in groups.values() for run in group]):
        kinds |= {"its std over micro-batches": partial(mean, key="grad_norm_std"), "spread": spread}
    kinds |= {"roughness of the reward": roughness, "largest fall": drawdown}
    rows = [[m, str(len(group)), *[mean_of([of(run) for run in group]) for of in kinds.values()]] for m, group in groups.items()]
    return markdown(["method", "seeds", *kinds], rows)


SPREAD = {
    True: "The spread is of the norms of a step's micro-batch gradients: lengths without directions, so it is no variance.",
    False: "No spread of micro-batch norms was logged (it takes two micro-batches a step; it would be no variance).",
}


def efficiency_rows(frame: Frame) -> list[list[str]]:
    rows = []
    for share in SHARES:
        for method, group in frame.groups.items():
            steps = [first_reach(run, "val_reward", frame.target(share)) for run in group]
            used = [[spent(run, key, step) for run, step in zip(group, steps)] for key in ("tokens", "prompts")]
            rows.append([f"{share:.0%}: {frame.target(share):.3f}", method, *[reaching(costs) for costs in (steps, *used)]])
    return rows


def final_rows(frame: Frame, runs: list[Run]) -> list[list[str]]:
    """The untrained model, then every method and every other setting."""
    by_seed = {round(float(np.mean([r.test["untrained"]["reward"] for r in runs if r.seed == run.seed])), 9) for run in runs}
    rows = [["untrained", str(len(by_seed)), mean_of(sorted(by_seed)), *["–"] * 5]]  # seeds may all have judged it alike
    of = measures(frame)
    before = [of[REWARDS[0]], of[REWARDS[1]], of["KL, last"], gap]
    for label in dict.fromkeys(run.label for run in runs):
        group = [run for run in runs if run.label == label]
        steps = reaching([first_reach(run, "val_reward", frame.target()) for run in group])
        first = [mean_of([kind(run) for run in group]) for kind in before]
        rows.append([label, str(len(group)), *first, steps, mean_of([roughness(run) for run in group])])
    return rows


FINAL = [
    "method", "seeds", "test, last", "test, best", "KL, last", "gap, last", f"steps to {SHARE:.0%}", "roughness",
]  # fmt: skip


COMPARED = ["pair", "seeds", "difference", "95% interval", "p, Welch", "Holm", "p, paired", "Holm", "margin", "p, TOST"]
SEED_BY_SEED = ["pair", "seeds", "KL", "difference", "95% interval", "p, paired", "Holm", "margin", "p, TOST"]


def p_text(x: float) -> str:
    return "–" if math.isnan(x) else "< 0.001" if x < 0.001 else f"{x:.3f}"


def difference_cells(r: Comparison) -> list[str]:
    return [number(r.difference), f"{number(r.low)} to {number(r.high)}"]


def margin_cells(r: Comparison) -> list[str]:
    return [f"± {number(r.margin)}" if r.margin > 0 else "–", p_text(r.p_equivalent)]


def comparison_table(rows: list[Comparison]) -> str:
    """Margin and TOST only where equivalence was asked for."""
    heads = COMPARED if any(r.margin > 0 for r in rows) else COMPARED[:-2]
    lines = [
        [f"{r.a} − {r.b}", f"{r.seeds[0]}, {r.seeds[1]}",
         *([r.note, *["–"] * 7] if r.note else
           [*difference_cells(r), *map(p_text, (r.p, r.p_holm, r.p_paired, r.p_paired_holm)), *margin_cells(r)])]
        for r in rows
    ]  # fmt: skip
    return markdown(heads, [line[: len(heads)] for line in lines])


def matched_table(rows: list[Comparison]) -> str:
    lines = [
        [f"{r.a} − {r.b}", str(r.pairs),
         *([r.note, *["–"] * 6] if r.note else
           [f"{number(r.kl[0])} to {number(r.kl[1])}", *difference_cells(r), p_text(r.p_paired), p_text(r.p_paired_holm),
            *margin_cells(r)])]
        for r in rows
    ]  # fmt: skip
    return markdown(SEED_BY_SEED, lines)


# ------------------------------------------------------------------------------------------------------- report


def kl_text(groups: dict[str, list[Run]]) -> str:
    spans = []
    for method, group in groups.items():
        lows, highs = zip(*map(kl_range, group))
        spans.append(f"{method} {number(min(lows))} to {number(max(highs))}")
    return f"KL at validations after step 0: {', '.join(spans)} nats a completion. At matched KL: section 7."


def report(folder: Path, runs: list[Run], frame: Frame, policies: list[Policy], verdicts, tables, drawn: list[str]) -> str:
    """The text of report.md."""
    groups, others = frame.groups, [label for label in dict.fromkeys(run.label for run in runs) if label not in frame.groups]

    def picture(name: str) -> list[str]:
        return [f"![{name}]({name}.png)", ""] if name in drawn else []

    lines = [f"# {folder.resolve().name}", "", f"{len(runs)} runs. A seed is one observation; intervals are 95% over seeds.", ""]
    if lost := missing(folder):
        lines += ["Missing, and in nothing below:", "", *[f"- {line}" for line in lost], ""]
    if absent := [title for title in TITLES.values() if title not in groups]:
        lines += [f"No run of {', '.join(absent)}.", ""]
    if others:
        lines += [f"Other settings, in sections 5 and 6 only: {'; '.join(others)}.", ""]
    lines += [markdown(["method", "seeds", "steps", "prompts", "tokens", "minutes a run"], budget_rows(groups))]
    if unequal := unequal_budgets(groups):
        lines += [f"**The budgets are not equal: {' and '.join(unequal)} differ by more than 5%.**", ""]
    table = [[v.name, v.claim, f"**{v.verdict}**"] for v in verdicts]
    lines += ["## Verdicts", "", markdown(["hypothesis", "claim", "verdict"], table)]
    lines += [*[f"- {v.name}, **{v.verdict}**: {v.why}" for v in verdicts], ""]
    lines += ["## 1. Learning curves", "", *picture("learning")]
    heads = ["method", "seeds", "validation, last", "highest", "gap, last", "gap, best"]
    lines += ["## 2. Validation and generalisation gap", "", markdown(heads, validation_rows(groups)), *picture("validation")]
    lines += ["## 3. Gradients and stability", "", gradient_table(groups), SPREAD[has_spread(runs)], "", *picture("gradients")]
    lines += variance_text(policies, drawn)
    lines += ["## 4. Sample efficiency", ""]
    if math.isnan(frame.target()):
        lines += ["No method gained anything over the untrained model: there is no threshold to reach.", ""]
    else:
        heads = ["share of the best gain: reward", "method", "steps", "tokens", "prompts"]
        lines += [markdown(heads, efficiency_rows(frame)), *picture("efficiency")]
    lines += ["## 5. Final comparison", "", markdown(FINAL, final_rows(frame, runs)), kl_text(groups), "", *picture("final")]
    lines += ["## 6. Temperature ablation", ""]
    settings = tau_settings(runs)
    if settings:
        heads = ["setting", "seeds", "test, last", "test, best", "KL, last", f"steps to {SHARE:.0%}"]
        lines += [markdown(heads, tau_rows(frame, settings)), *picture("tau")]
    else:
        lines += ["None: all runs of a method have one schedule of τ.", ""]
    lines += ["## 7. Tests over seeds", ""]
    for title, rows in tables.items():
        table = matched_table if title == MATCHED else comparison_table
        lines += [f"### {title[0].upper()}{title[1:]}", "", table(rows)]
    lines += [f"Margins are {MARGIN:.0%} of the pair's mean reward. TOST's p values are not corrected. At matched KL: two runs "
              "of a seed, where both have had the KL; intervals and tests are paired.", ""]  # fmt: skip
    lines += picture("differences")
    return "\n".join([*lines, "## 8. LaTeX", "", "[estimators.tex](estimators.tex) holds the table of section 5.", ""])


def tau_rows(frame: Frame, settings: dict[str, list[Run]]) -> list[list[str]]:
    of = measures(frame)
    kinds = [of["test reward, last"], of["test reward, best"], of["KL, last"]]
    return [
        [label, str(len(group)), *[mean_of([kind(run) for run in group]) for kind in kinds],
         reaching([first_reach(run, "val_reward", frame.target()) for run in group])]
        for label, group in settings.items()
    ]  # fmt: skip


def draw(out: Path, runs: list[Run], frame: Frame, policies: list[Policy], tables: dict[str, list[Comparison]]) -> list[str]:
    """Every figure that the runs have data for, as PNG; their names."""
    with matplotlib.rc_context(STYLE):
        pictures = {
            "learning": figures.learning(frame.groups), "validation": figures.validation(frame.groups),
            "gradients": figures.gradients(frame.groups), "variance": figures.variance(policies),
            "efficiency": figures.efficiency(frame), "final": figures.final(frame), "tau": figures.tau(tau_settings(runs)),
            "differences": figures.differences({name: rows for name, rows in tables.items() if name in (*REWARDS, MATCHED)}),
        }  # fmt: skip
        drawn = [name for name, picture in pictures.items() if picture is not None]
        for name in drawn:
            pictures[name].savefig(out / f"{name}.png")
    return drawn


def main(folder: Path) -> None:
    """Writes the analysis of all runs below a folder to its analysis/. Raises ValueError for what estimator_runs.load refuses."""
    runs = load(folder)
    frame = common_frame(compared(runs))
    policies = measured_policies(folder)
    verdicts = judge(frame, policies)
    found = {name: values(frame.groups, of) for name, of in measures(frame).items()}
    tables = {name: compare(of, name in REWARDS) for name, of in found.items() if any(of.values())}  # of what was logged
    tables |= {MATCHED: compare_matched(frame.groups, rewards, equivalence=True)}
    tables = {name: rows for name, rows in tables.items() if rows}
    out = folder / "analysis"
    out.mkdir(exist_ok=True)
    drawn = draw(out, runs, frame, policies, tables)
    atomic_write(out / "report.md", report(folder, runs, frame, policies, verdicts, tables, drawn))
    atomic_write(out / "estimators.tex", latex(FINAL, final_rows(frame, runs)))
    figures_of_run = measures(frame) | {"gradient spread": spread}
    numbers = {
        "verdicts": [{key: asdict(v)[key] for key in ("name", "claim", "verdict", "why")} for v in verdicts],
        "runs": [{"label": r.label, "seed": r.seed} | {name: of(r) for name, of in figures_of_run.items()} for r in runs],
        "comparisons": {name: [asdict(row) for row in rows] for name, rows in tables.items()},
        "variance": {policy.folder: asdict(policy) for policy in policies},
        "variance_pairs": [asdict(pair) for pair in pairs(policies)],
        "targets": {f"{share:g}": frame.target(share) for share in SHARES},
        "missing": missing(folder),
    }
    atomic_write(out / "results.json", json.dumps(plain(numbers), indent=1) + "\n")
    for line in missing(folder):
        print(f"missing: {line}")
    for v in verdicts:
        print(f"{v.verdict.upper()}: {v.name}: {v.claim}\n    {v.why}")
    print(f"{len(runs)} runs; report.md, estimators.tex, results.json and {len(drawn)} figures in {out}")
