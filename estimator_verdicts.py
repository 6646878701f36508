"""The estimators compared over seeds: every pair of methods tested, and the experiment's five hypotheses judged.

    frame = common_frame(compared(load("results")))                # the targets and the horizon that all are held to
    rows = compare(values(frame.groups, final_reward), equivalence=True)
    rows = compare_matched(frame.groups, rewards, equivalence=True)
    for verdict in judge(frame): print(verdict.verdict, verdict.why)

A seed is one observation, whatever it was averaged over; fewer than MIN_SEEDS of a method are no test. H2, H3 and H5 are judged
over whole runs and at matched KL (two runs of one seed, at a KL that both have had), and a verdict is what both say; where they
differ, or one can't tell, it is undecided. H1 is judged at the same policies (estimator_variance.py), which have one KL.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy.stats import spearmanr

from estimator_runs import TITLES, Run, common_kl, final_reward, first_reach, gap, reward_at_kl, roughness, spread
from estimator_variance import Policy, by_method, less_variance
from hypotheses import MIN_SEEDS, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Verdict, parse_bound
from stats import holm, mean_interval, p_above, p_beyond, paired, tost, welch

GRADE, RIVALS = "GRADE", ("PPO", "REINFORCE")
MARGIN = 0.05  # of equivalence: this share of the reward, the mean of the two methods'
ALPHA = 0.05
SHARE = 0.8  # of the best final gain: what sample efficiency is judged by
Values = dict[str, dict[int, float]]  # method -> seed -> a finite number


# --------------------------------------------------------------------------------------- what all are held to


@dataclass(frozen=True)
class Frame:
    groups: dict[str, list[Run]]
    start: float  # validation reward of the untrained model, mean over runs
    best: float  # the best method's final validation reward, mean over its seeds
    horizon: float  # the last step that every run has

    def target(self, share: float = SHARE) -> float:
        """The reward at a share of the best final gain; NaN where nothing was gained."""
        return _target(self.start, self.best, share)


def _target(start: float, best: float, share: float = SHARE) -> float:
    return start + share * (best - start) if best > start else math.nan


def common_frame(groups: dict[str, list[Run]]) -> Frame:
    runs = [run for group in groups.values() for run in group]
    start = float(np.mean([run.validation["val_reward"][0] for run in runs]))
    best = max(float(np.mean([final_reward(run) for run in group])) for group in groups.values())
    return Frame(groups, start, best, min(float(run.steps["step"][-1]) for run in runs))


def values(groups: dict[str, list[Run]], measure: Callable[[Run], float]) -> Values:
    """A measure of every run; those that have no finite one are left out, and so not counted among the seeds."""
    found = {method: {run.seed: measure(run) for run in group} for method, group in groups.items()}
    return {method: {seed: x for seed, x in of.items() if math.isfinite(x)} for method, of in found.items()}


def steps_to(run: Run, target: float, horizon: float) -> float:
    """Steps to the target, at most the horizon: a seed that never reaches it counts as the horizon, which is less than it would
    have needed. NaN where there is no target."""
    return math.nan if math.isnan(target) else min(first_reach(run, "val_reward", target), horizon)


# What two runs of one seed amount to at a KL that both have had: a number each, NaN where there is none.


def rewards(a: Run, b: Run, kl: float) -> tuple[float, float]:
    return reward_at_kl(a, kl), reward_at_kl(b, kl)


def steps_to_the_better(a: Run, b: Run, kl: float) -> tuple[float, float]:
    """Steps to SHARE of the gain of the better of the two."""
    target = _target(float(a.validation["val_reward"][0]), max(rewards(a, b, kl)))
    horizon = min(float(run.steps["step"][-1]) for run in (a, b))
    return steps_to(a, target, horizon), steps_to(b, target, horizon)


def early_roughness(a: Run, b: Run, kl: float) -> tuple[float, float]:
    """Of the steps until each first has that KL."""
    return tuple(roughness(run, until=first_reach(run, "val_kl", kl)) for run in (a, b))


# ------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Comparison:
    a: str
    b: str
    seeds: tuple[int, int]
    note: str = ""  # why there is no test
    means: tuple[float, float] = (math.nan, math.nan)  # of what was compared
    difference: float = math.nan  # of means, a - b
    low: float = math.nan  # its 95% interval: Welch's; at matched KL the paired one
    high: float = math.nan
    p: float = math.nan  # Welch's t-test; NaN at matched KL, where only pairs can be had
    p_holm: float = math.nan
    pairs: int = 0  # seeds that both have; at matched KL those with a KL that both runs have had
    p_paired: float = math.nan
    p_paired_holm: float = math.nan
    margin: float = math.nan
    p_equivalent: float = math.nan  # TOST
    p_beyond: float = math.nan  # small where the difference exceeds the margin
    kl: tuple[float, float] | None = None  # the least and the largest at which pairs were matched


def compare(found: Values, equivalence: bool = False) -> list[Comparison]:
    """Every pair of methods, p values Holm-corrected for the pairs tested; with `equivalence` within MARGIN of the reward too."""
    return _corrected([_compare(a, b, found[a], found[b], equivalence) for a, b in combinations(found, 2)])


def compare_matched(groups: dict[str, list[Run]], measure: Callable, equivalence: bool = False) -> list[Comparison]:
    """As `compare`, of pairs of runs of one seed, each at the pair's own common KL: measure(a, b, kl) -> (a's, b's)."""
    return _corrected([_compare_matched(a, b, groups, measure, equivalence) for a, b in combinations(groups, 2)])


def _corrected(rows: list[Comparison]) -> list[Comparison]:
    for plain, corrected in (("p", "p_holm"), ("p_paired", "p_paired_holm")):
        tested = [i for i, row in enumerate(rows) if math.isfinite(getattr(row, plain))]
        for i, p in zip(tested, holm([getattr(rows[i], plain) for i in tested])):
            rows[i] = replace(rows[i], **{corrected: p})
    return rows


def _compare(a: str, b: str, of_a: dict[int, float], of_b: dict[int, float], equivalence: bool) -> Comparison:
    x, y = list(of_a.values()), list(of_b.values())
    row = Comparison(a, b, (len(x), len(y)))
    if min(row.seeds) < MIN_SEEDS:
        return replace(row, note=_few(*row.seeds))
    difference, low, high, p = welch(x, y)
    row = replace(row, means=(float(np.mean(x)), float(np.mean(y))), difference=difference, low=low, high=high, p=p)
    both = sorted(of_a.keys() & of_b.keys())
    if len(both) >= MIN_SEEDS:
        row = replace(row, pairs=len(both), p_paired=paired([of_a[s] for s in both], [of_b[s] for s in both])[3])
    if equivalence and (margin := _margin(x, y)) > 0:
        beyond = min(1.0, 2 * min(p_beyond(x, y, margin), p_beyond(y, x, margin)))
        row = replace(row, margin=margin, p_equivalent=tost(x, y, margin), p_beyond=beyond)
    return row


def _compare_matched(a: str, b: str, groups: dict[str, list[Run]], measure: Callable, equivalence: bool) -> Comparison:
    of_a, of_b = ({run.seed: run for run in groups[method]} for method in (a, b))
    both = [(of_a[seed], of_b[seed]) for seed in of_a if seed in of_b]
    kls = [(pair, kl) for pair in both if (kl := common_kl(pair)) is not None]
    found = [(*numbers, kl) for pair, kl in kls if np.isfinite(numbers := measure(*pair, kl)).all()]
    row = Comparison(a, b, (len(of_a), len(of_b)), pairs=len(found))
    if row.pairs < MIN_SEEDS:
        return replace(row, note=f"no test: {row.pairs} seeds of {len(both)} with a common KL, and it takes {MIN_SEEDS}")
    x, y, at = np.array(found).T
    difference, low, high, p = paired(x, y)
    row = replace(row, means=(float(x.mean()), float(y.mean())), difference=difference, low=low, high=high, p_paired=p,
                  kl=(float(at.min()), float(at.max())))  # fmt: skip
    if equivalence and (margin := _margin(x, y)) > 0:
        equivalent = max(p_above(x - y + margin), p_above(margin - (x - y)))
        beyond = min(1.0, 2 * min(p_above(x - y - margin), p_above(y - x - margin)))
        row = replace(row, margin=margin, p_equivalent=equivalent, p_beyond=beyond)
    return row


def _margin(x, y) -> float:
    return MARGIN * abs(float(np.mean(x)) + float(np.mean(y))) / 2


# -------------------------------------------------------------------------------------------------- hypotheses


def judge(frame: Frame, policies: list[Policy] = ()) -> list[Verdict]:
    """The five hypotheses, in their order; `policies` are those at which variance.py was run."""

    def parts(what: str, whole: Callable, matched: Callable, judge_one: Callable = _lower) -> list[tuple[str, str, str]]:
        equivalence = judge_one is _alike
        rows = compare(values(frame.groups, whole), equivalence), compare_matched(frame.groups, matched, equivalence)
        return [(name, *judge_one(of, frame.groups)) for name, of in zip((f"{what}, whole runs", "matched KL"), rows)]

    return [
        _verdict("H1 gradient variance", "GRADE's gradient varies less than PPO's and REINFORCE's.",
                 [("relative variance at the same policy", *less_variance(policies))]),
        _verdict("H2 sample efficiency", f"GRADE needs fewer steps to {SHARE:.0%} of the best gain.",
                 parts("steps to the target", lambda run: steps_to(run, frame.target(), frame.horizon), steps_to_the_better),
                 _reaching(frame)),
        _verdict("H3 final performance", f"All methods end at the same reward, within {MARGIN:.0%}.",
                 parts("test reward", lambda run: run.test["last"]["reward"], rewards, _alike)),
        _verdict("H4 generalisation", "The less a method's gradient varies, the smaller its gap between validation and test.",
                 [_smaller_gap(frame, policies)]),
        _verdict("H5 stability", "GRADE's reward changes less from step to step than PPO's and REINFORCE's.",
                 parts("roughness", roughness, early_roughness)),
    ]  # fmt: skip


def _verdict(name: str, claim: str, parts: list[tuple[str, str, str]], more: str = "") -> Verdict:
    words = {word for _, word, _ in parts}
    why = "; ".join(f"{where}: {text} ({word})" for where, word, text in parts)
    return Verdict(name, claim, words.pop() if len(words) == 1 else UNDECIDED, why + "." + more)


def _lower(rows: list[Comparison], groups: dict[str, list[Run]]) -> tuple[str, str]:
    """Whether GRADE is below each of its rivals: a word and the numbers. The 95% interval of the difference must lie below 0."""
    words, texts = [], []
    there = {row.b: row for row in rows if row.a == GRADE}
    for rival in RIVALS:
        seeds = tuple(len(groups.get(method, [])) for method in (GRADE, rival))
        row = there.get(rival) or Comparison(GRADE, rival, seeds, _few(*seeds))
        words.append(parse_bound("< 0").judge(row.low, row.high))  # undecided where they are NaN
        numbers = f"{number(row.means[0])} − {number(row.means[1])}, 95% {_between(row)}"
        texts.append(f"{GRADE} − {rival} {row.note or numbers}")
    return next((word for word in (NOT_SUPPORTED, UNDECIDED) if word in words), SUPPORTED), ", ".join(texts)


def _few(a: int, b: int) -> str:
    return f"no test: {a} and {b} seeds, and it takes {MIN_SEEDS} of each"


def _between(row: Comparison) -> str:
    at = f" at KL {number(row.kl[0])} to {number(row.kl[1])}, {row.pairs} seeds" if row.kl else ""
    return f"{number(row.low)} to {number(row.high)}{at}"


def _alike(rows: list[Comparison], groups: dict[str, list[Run]]) -> tuple[str, str]:
    """Whether all methods are equivalent. Supported where every pair is, by TOST (all of them at once: no correction is needed);
    not supported where some pair differs by more than its margin, Holm-corrected for the pairs."""
    tested = [row for row in rows if math.isfinite(row.p_equivalent)]
    absent = [title for title in TITLES.values() if len(groups.get(title, [])) < MIN_SEEDS]
    lacking = f"fewer than {MIN_SEEDS} seeds of {', '.join(absent)}; " * bool(absent)
    if not tested:
        return UNDECIDED, lacking + "no pair to test"
    widest = max(tested, key=lambda row: abs(row.difference) / row.margin)
    beyond = holm([row.p_beyond for row in tested])
    outside = [f"{row.a} and {row.b}" for row, p in zip(tested, beyond) if p < ALPHA]
    inside = [row for row in tested if row.p_equivalent < ALPHA]
    text = (
        f"{lacking}{len(inside)} of {len(rows)} pairs equivalent, {len(rows) - len(tested)} without a test; widest {widest.a} − "
        f"{widest.b} {number(widest.difference)}, 95% {_between(widest)}, margin {number(widest.margin)}"
    )
    if outside:
        return NOT_SUPPORTED, text + f"; beyond it {', '.join(outside)}"
    return (SUPPORTED if len(inside) == len(rows) and not absent else UNDECIDED), text


def _smaller_gap(frame: Frame, policies: list[Policy]) -> tuple[str, str, str]:
    """What H4 is judged by, the word and the numbers: the relative variances that variance.py measured, or, where they are of too
    few seeds or methods, the spread of norms. One of them for all seeds, as they are two quantities."""
    gaps = values(frame.groups, lambda run: abs(gap(run)))
    figures = {"relative variance": by_method(policies), "spread of norms": values(frame.groups, spread)}
    ranked = {name: _ranked(found, gaps) for name, found in figures.items()}
    for name, (word, text) in ranked.items():
        if word:
            return f"{name} and absolute gap", word, text
    return "no ranking", UNDECIDED, ", ".join(f"{name}: {text}" for name, (_, text) in ranked.items())


def _ranked(x: Values, y: Values) -> tuple[str, str]:
    """Whether methods that are low in x are low in y: Spearman's rank correlation over methods within each seed, averaged. The
    word is empty where there are too few of either."""
    methods = [method for method in x if len(x[method]) and len(y.get(method, {}))]
    seeds = sorted(set.intersection(*[x[m].keys() & y[m].keys() for m in methods])) if methods else []
    if len(methods) < 3:
        return "", f"{len(methods)} methods, and a ranking takes 3"
    columns = [([x[m][s] for m in methods], [y[m][s] for m in methods]) for s in seeds]
    columns = [pair for pair in columns if min(len(set(of)) for of in pair) > 1]  # where all methods are alike there is no rank
    ranked = [float(spearmanr(*pair).statistic) for pair in columns]
    if len(ranked) < MIN_SEEDS:
        return "", f"{len(ranked)} seeds that all methods have, and it takes {MIN_SEEDS}"
    mean, half = mean_interval(ranked)
    text = f"rank correlation over {len(methods)} methods {number(mean)}, 95% {number(mean - half)} to {number(mean + half)} "
    return parse_bound("> 0").judge(mean - half, mean + half), text + f"over {len(ranked)} of {len(seeds)} seeds"


def _reaching(frame: Frame) -> str:
    if math.isnan(target := frame.target()):
        return " No method gained anything."
    counts = {m: sum(math.isfinite(first_reach(run, "val_reward", target)) for run in g) for m, g in frame.groups.items()}
    reached = ", ".join(f"{m} {count} of {len(frame.groups[m])}" for m, count in counts.items())
    return f" Target reward {target:.3f}; seeds that reach it: {reached}."


def number(x: float) -> str:
    """Three decimals of what is small, none of what is large; an infinity is an open end."""
    if not math.isfinite(x):
        return "open" if math.isinf(x) else "–"
    digits = 3 if abs(x) < 10 else 1 if abs(x) < 100 else 0
    return f"{round(x, digits) + 0.0:,.{digits}f}"  # + 0: no -0.000
