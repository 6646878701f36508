"""The estimators compared over seeds: every pair of methods tested, and the experiment's five hypotheses judged.

    frame = common_frame(compared(load("results")))                # the targets, the KL and the horizon that all are held to
    rows = compare(values(frame.groups, final_reward), equivalence=True)
    for verdict in judge(frame): print(verdict.verdict, verdict.why)

A seed is one observation, whatever it was averaged over; fewer than MIN_SEEDS of a method are no test. H2, H3 and H5 are judged
over whole runs and at matched KL, and a verdict is what both say; where they differ, or one can't tell, it is undecided. H1 is
judged at the same policies (estimator_variance.py), where every estimator has the same KL.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import numpy as np
from scipy.stats import spearmanr

from estimator_runs import TITLES, Run, common_kl, final_reward, first_reach, gap, reward_at_kl, roughness, spread
from estimator_variance import Policy, by_method, less_variance
from hypotheses import MIN_SEEDS, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Verdict, parse_bound
from stats import holm, mean_interval, p_beyond, paired, tost, welch

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
    matched_best: float  # the best method's validation reward at the common KL; NaN without one
    kl: float | None  # a KL inside every run's range
    horizon: float  # the last step that every run has

    def target(self, share: float = SHARE, matched: bool = False) -> float:
        """The reward at a share of the best final gain (or of the best gain at the common KL); NaN where nothing was gained."""
        best = self.matched_best if matched else self.best
        return self.start + share * (best - self.start) if best > self.start else math.nan


def common_frame(groups: dict[str, list[Run]]) -> Frame:
    runs = [run for group in groups.values() for run in group]
    kl = common_kl(runs)

    def highest(measure: Callable[[Run], float]) -> float:
        return max(float(np.mean([measure(run) for run in group])) for group in groups.values())

    start = float(np.mean([run.validation["val_reward"][0] for run in runs]))
    matched = highest(partial(reward_at_kl, level=kl)) if kl is not None else math.nan
    return Frame(groups, start, highest(final_reward), matched, kl, min(float(run.steps["step"][-1]) for run in runs))


def values(groups: dict[str, list[Run]], measure: Callable[[Run], float]) -> Values:
    """A measure of every run; those that have no finite one are left out, and so not counted among the seeds."""
    found = {method: {run.seed: measure(run) for run in group} for method, group in groups.items()}
    return {method: {seed: x for seed, x in of.items() if math.isfinite(x)} for method, of in found.items()}


def steps_to(frame: Frame, run: Run, share: float = SHARE, matched: bool = False) -> float:
    """Steps to the target, at most the horizon: a seed that never reaches it counts as the horizon, which is less than it would
    have needed. NaN where there is no target."""
    target = frame.target(share, matched)
    return math.nan if math.isnan(target) else min(first_reach(run, "val_reward", target), frame.horizon)


def matched_reward(frame: Frame, run: Run) -> float:
    return math.nan if frame.kl is None else reward_at_kl(run, frame.kl)


# ------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Comparison:
    a: str
    b: str
    seeds: tuple[int, int]
    note: str = ""  # why there is no test
    difference: float = math.nan  # of means, a - b
    low: float = math.nan  # Welch's 95% interval
    high: float = math.nan
    p: float = math.nan  # Welch's t-test
    p_holm: float = math.nan
    pairs: int = 0  # seeds that both have
    p_paired: float = math.nan
    p_paired_holm: float = math.nan
    margin: float = math.nan
    p_equivalent: float = math.nan  # TOST
    p_beyond: float = math.nan  # small where the difference exceeds the margin


def compare(found: Values, equivalence: bool = False) -> list[Comparison]:
    """Every pair of methods, p values Holm-corrected for the pairs tested; with `equivalence` within MARGIN of the reward too."""
    rows = [_compare(a, b, found[a], found[b], equivalence) for a, b in combinations(found, 2)]
    for plain, corrected in (("p", "p_holm"), ("p_paired", "p_paired_holm")):
        tested = [i for i, row in enumerate(rows) if math.isfinite(getattr(row, plain))]
        for i, p in zip(tested, holm([getattr(rows[i], plain) for i in tested])):
            rows[i] = replace(rows[i], **{corrected: p})
    return rows


def _compare(a: str, b: str, of_a: dict[int, float], of_b: dict[int, float], equivalence: bool) -> Comparison:
    x, y = list(of_a.values()), list(of_b.values())
    row = Comparison(a, b, (len(x), len(y)))
    if min(row.seeds) < MIN_SEEDS:
        return replace(row, note=f"no test: {len(x)} and {len(y)} seeds, and it takes {MIN_SEEDS} of each")
    difference, low, high, p = welch(x, y)
    row = replace(row, difference=difference, low=low, high=high, p=p)
    both = sorted(of_a.keys() & of_b.keys())
    if len(both) >= MIN_SEEDS:
        row = replace(row, pairs=len(both), p_paired=paired([of_a[s] for s in both], [of_b[s] for s in both])[3])
    margin = MARGIN * abs(np.mean(x) + np.mean(y)) / 2
    if equivalence and margin > 0:
        beyond = min(1.0, 2 * min(p_beyond(x, y, margin), p_beyond(y, x, margin)))
        row = replace(row, margin=float(margin), p_equivalent=tost(x, y, margin), p_beyond=beyond)
    return row


# -------------------------------------------------------------------------------------------------- hypotheses


def judge(frame: Frame, policies: list[Policy] = ()) -> list[Verdict]:
    """The five hypotheses, in their order; `policies` are those at which variance.py was run."""

    def parts(what: str, whole: Callable, matched: Callable, judge_one: Callable = _lower) -> list[tuple[str, str, str]]:
        first = (f"{what}, whole runs", *judge_one(values(frame.groups, whole)))
        if frame.kl is None:
            return [first, ("matched KL", UNDECIDED, "the methods' KL ranges share nothing, so that there is none")]
        return [first, (f"matched KL, {frame.kl:.2f}", *judge_one(values(frame.groups, matched)))]

    def early(measure: Callable) -> Callable[[Run], float]:
        return lambda run: measure(run, until=first_reach(run, "val_kl", frame.kl))

    steps = parts("steps to the target", partial(steps_to, frame), partial(steps_to, frame, matched=True))
    return [
        _verdict("H1 gradient variance", "GRADE's gradient varies less than PPO's and REINFORCE's.",
                 [("relative variance at the same policy", *less_variance(policies))]),
        _verdict("H2 sample efficiency", f"GRADE needs fewer steps to {SHARE:.0%} of the best gain.", steps, _reaching(frame)),
        _verdict("H3 final performance", f"All methods end at the same reward, within {MARGIN:.0%}.",
                 parts("test reward", lambda run: run.test["last"]["reward"], partial(matched_reward, frame), _alike)),
        _verdict("H4 generalisation", "The less a method's gradient varies, the smaller its gap between validation and test.",
                 [_smaller_gap(frame, policies)]),
        _verdict("H5 stability", "GRADE's reward changes less from step to step than PPO's and REINFORCE's.",
                 parts("roughness", roughness, early(roughness))),
    ]  # fmt: skip


def _verdict(name: str, claim: str, parts: list[tuple[str, str, str]], more: str = "") -> Verdict:
    words = {word for _, word, _ in parts}
    why = "; ".join(f"{where}: {text} ({word})" for where, word, text in parts)
    return Verdict(name, claim, words.pop() if len(words) == 1 else UNDECIDED, why + "." + more)


def _lower(found: Values) -> tuple[str, str]:
    """Whether GRADE is below each of its rivals: a word and the numbers. Welch's 95% interval must lie below 0."""
    words, texts = [], []
    mine = list(found.get(GRADE, {}).values())
    for rival in RIVALS:
        theirs = list(found.get(rival, {}).values())
        if min(len(mine), len(theirs)) < MIN_SEEDS:
            words.append(UNDECIDED)
            texts.append(f"{rival}: no test, {len(mine)} seeds of {GRADE} and {len(theirs)} of {rival}")
            continue
        difference, low, high, _ = welch(mine, theirs)
        words.append(parse_bound("< 0").judge(low, high))
        texts.append(f"{rival} {number(np.mean(theirs))}, difference {number(difference)}, 95% {number(low)} to {number(high)}")
    text = (f"{GRADE} {number(np.mean(mine))}; " if mine else "") + ", ".join(texts)
    return next((word for word in (NOT_SUPPORTED, UNDECIDED) if word in words), SUPPORTED), text


def _alike(found: Values) -> tuple[str, str]:
    """Whether all methods are equivalent. Supported where every pair is, by TOST (all of them at once: no correction is needed);
    not supported where some pair differs by more than its margin, Holm-corrected for the pairs."""
    rows = compare(found, equivalence=True)
    tested = [row for row in rows if math.isfinite(row.p_equivalent)]
    absent = [title for title in TITLES.values() if len(found.get(title, {})) < MIN_SEEDS]
    lacking = f"fewer than {MIN_SEEDS} seeds of {', '.join(absent)}; " * bool(absent)
    if not tested:
        return UNDECIDED, lacking + "no pair to test"
    widest = max(tested, key=lambda row: abs(row.difference) / row.margin)
    beyond = holm([row.p_beyond for row in tested])
    outside = [f"{row.a} and {row.b}" for row, p in zip(tested, beyond) if p < ALPHA]
    inside = [row for row in tested if row.p_equivalent < ALPHA]
    text = (
        f"{lacking}{len(inside)} of {len(tested)} pairs equivalent; widest {widest.a} - {widest.b} {number(widest.difference)}, "
        f"95% {number(widest.low)} to {number(widest.high)}, margin {number(widest.margin)}"
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
