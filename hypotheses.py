"""Hypotheses as data, judged on paired seeds: supported, not supported or undecided, and why.

    hypotheses:
      gone: {claim: .., measure: hack, of: {arm: routing, mode: retain_only}, against: {arm: none, mode: both}, expect: "< -.5"}
      kept: {claim: .., measure: task, of: {arm: routing, mode: retain_only}, against: {mode: both}, as: ratio, expect: ">= .8"}
      clean: {claim: .., measure: hack, of: {arm: routing, mode: retain_only}, against: {mode: untrained}, expect: "<= .03"}
      there: {claim: .., measure: hack, of: {arm: routing, mode: forget_only}, expect: ">= .5"}
      alike: {claim: .., measure: task, of: {arm: routing, mode: both}, against: {arm: none}, expect: "-.05 .. .05"}
      works: {claim: .., all: [kept, clean]}

A cell (`of`, `against`) is an arm, a mode, and, where the arm was swept, the flags that pick its runs ({arm: none, beta: 0.02,
mode: both}). A mode may be what it was at a step, `both@20`, or a step's log line, `training@20`. What `against` leaves out
is as in `of`, the measure too. `as` is value (one cell's own measure; the default without `against`),
difference (of - against; the default with it), or ratio, the share of a gain that is kept: (of - untrained) /
(against - untrained), each gain over the same run's untrained row. `expect` bounds it: <, <=, >, >=, or a range with its ends.

Seeds are the observations and are paired: a seed counts where both cells have it. The bound is compared with the 95% bootstrap
interval over seeds and with Student's t interval (Fieller's for a ratio), since a bootstrap of five seeds is too narrow:
supported if it holds in all of both, not supported if in none of either, otherwise undecided, as with fewer than three seeds.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from experiments import Run, same
from stats import bootstrap, holm, mean_interval, p_above, ratio_interval

MIN_SEEDS = 3
SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
KINDS = ("value", "difference", "ratio")
OWN = ("arm", "mode", "measure")  # a cell's own keys: the others are flags
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass(frozen=True)
class Bound:
    low: float  # -inf: unbounded below
    high: float
    closed: bool  # whether the ends belong to it
    text: str  # as it was written

    def holds(self, x: float) -> bool:
        return self.low <= x <= self.high if self.closed else self.low < x < self.high

    def judge(self, low: float, high: float) -> str:
        """The word for an interval: all of it meets the bound, none of it, or some."""
        if self.holds(low) and self.holds(high):
            return SUPPORTED
        apart = (high < self.low or low > self.high) if self.closed else (high <= self.low or low >= self.high)
        return NOT_SUPPORTED if apart else UNDECIDED


@dataclass(frozen=True)
class Hypothesis:
    name: str
    claim: str
    measure: str = ""
    of: dict | None = None
    against: dict | None = None
    kind: str = "value"
    bound: Bound | None = None
    parts: tuple[str, ...] = ()  # names of other hypotheses: this one is their conjunction


@dataclass(frozen=True)
class Verdict:
    name: str
    claim: str
    verdict: str
    why: str
    seeds: tuple[int, ...] = ()
    unpaired: tuple[str, ...] = ()  # seeds that did not count, and why
    estimate: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)  # bootstrap
    t_interval: tuple[float, float] = (math.nan, math.nan)  # Student's, or Fieller's for a ratio
    p: float = math.nan  # t-test of the bound
    p_holm: float = math.nan  # corrected for the number of hypotheses


# ------------------------------------------------------------------------------------------------------ reading


def parse_bound(text) -> Bound:
    """ "< -0.5", "<= 0.03", "> 0", ">= 0.8" or "-0.05 .. 0.05" (ends included). Raises ValueError for anything else."""
    words = str(text).strip()
    if match := re.fullmatch(rf"(<=?|>=?)\s*({NUMBER})", words):
        sign, value = match[1], float(match[2])
        low, high = (-math.inf, value) if sign[0] == "<" else (value, math.inf)
        return Bound(low, high, sign.endswith("="), f"{sign} {match[2]}")
    if (match := re.fullmatch(rf"({NUMBER})\s*\.\.\s*({NUMBER})", words)) and float(match[1]) < float(match[2]):
        return Bound(float(match[1]), float(match[2]), True, f"{match[1]} .. {match[2]}")
    raise ValueError(f'expect {text!r} is no bound: write "< -0.5", "<= 0.03", "> 0", ">= 0.8", or a range "-0.05 .. 0.05"')


def read_hypotheses(entries: dict | None) -> list[Hypothesis]:
    """The `hypotheses` of an experiment's YAML. Raises ValueError, naming the hypothesis, for what cannot be judged."""
    if not isinstance(entries or {}, dict):
        raise ValueError("hypotheses must map names to what is claimed")
    return [_read(name, entry, set(entries) - {name}) for name, entry in (entries or {}).items()]


def _read(name: str, entry: dict, others: set[str]) -> Hypothesis:
    def wrong(message: str) -> ValueError:
        return ValueError(f"hypothesis {name}: {message}")

    if not isinstance(entry, dict) or not isinstance(entry.get("claim"), str):
        raise wrong("give a claim, one sentence, and what it is judged by")
    known = {"claim", "all"} if "all" in entry else {"claim", "measure", "of", "against", "as", "expect"}
    if unknown := sorted(set(entry) - known):
        raise wrong(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if "all" in entry:
        parts = entry["all"]
        if not isinstance(parts, list) or not parts or not set(parts) <= others:
            raise wrong(f"all: {parts!r} must list other hypotheses: {', '.join(sorted(others))}")
        return Hypothesis(name, entry["claim"], parts=tuple(parts))
    if lacking := {"measure", "of", "expect"} - set(entry):
        raise wrong(f"needs {', '.join(sorted(lacking))}")
    of, against = entry["of"], entry.get("against")
    if not isinstance(of, dict) or not {"arm", "mode"} <= set(of) or not isinstance(against or {}, dict):
        raise wrong("of must be {arm: ..., mode: ...}, against the same or the part of it that differs")
    against = None if against is None else of | against
    kind = entry.get("as", "value" if against is None else "difference")
    if kind not in KINDS:
        raise wrong(f"as {kind!r}; known: {', '.join(KINDS)}")
    if (kind == "value") != (against is None):
        raise wrong(f"as {kind} " + ("needs a cell to stand against" if against is None else "takes no `against`"))
    if of == against:
        raise wrong("of and against are the same cell")
    try:
        bound = parse_bound(entry["expect"])
    except ValueError as error:
        raise wrong(str(error)) from None
    return Hypothesis(name, entry["claim"], str(entry["measure"]), of, against, kind, bound)


# ------------------------------------------------------------------------------------------------------- judging


def judge_all(hypotheses: list[Hypothesis], runs: list[Run]) -> list[Verdict]:
    """A verdict for each hypothesis, in order, p values corrected for their number.

    Raises ValueError for an arm, mode, measure or flag that the experiment does not have, and for a cell that takes in runs which
    differ in more than their seed.
    """
    single = [judge(h, runs) for h in hypotheses if not h.parts]
    tested = [v for v in single if math.isfinite(v.p)]
    corrected = dict(zip([v.name for v in tested], holm([v.p for v in tested])))
    found = {v.name: Verdict(**vars(v) | {"p_holm": corrected.get(v.name, math.nan)}) for v in single}
    waiting = [h for h in hypotheses if h.parts]
    while waiting:  # a conjunction may name another one
        ready = [h for h in waiting if all(part in found for part in h.parts)]
        if not ready:
            raise ValueError(f"hypotheses {', '.join(h.name for h in waiting)} name each other in a circle")
        found |= {h.name: _conjunction(h, [found[part] for part in h.parts]) for h in ready}
        waiting = [h for h in waiting if h not in ready]
    return [found[h.name] for h in hypotheses]


def _conjunction(h: Hypothesis, parts: list[Verdict]) -> Verdict:
    words = [part.verdict for part in parts]
    verdict = next((word for word in (NOT_SUPPORTED, UNDECIDED) if word in words), SUPPORTED)
    return Verdict(h.name, h.claim, verdict, "; ".join(f"{part.name} {part.verdict}" for part in parts))


def judge(h: Hypothesis, runs: list[Run]) -> Verdict:
    """One hypothesis on the seeds that all of its cells have; see the module's docstring for the rule."""
    cells = [h.of] if h.against is None else [h.of, h.against]
    if h.kind == "ratio":
        cells += [cell | {"mode": "untrained"} for cell in cells]
    measured = [_measure(h, cell, runs) for cell in cells]
    seeds = sorted(seed for seed in measured[0][0] if all(seed in values for values, _ in measured))
    unpaired = _unpaired(cells, measured, seeds)
    behind = f" Left out: {'; '.join(unpaired)}." if unpaired else ""
    known = {"name": h.name, "claim": h.claim, "seeds": tuple(seeds), "unpaired": tuple(unpaired)}
    count = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"
    if not seeds:
        return Verdict(**known, verdict=UNDECIDED, why=f"{count} to judge by.{behind}")
    rows = np.array([[values[seed] for values, _ in measured] for seed in seeds])  # (seeds, cells)
    if h.kind == "ratio":
        rows = rows[:, :2] - rows[:, 2:]  # gains over the untrained model
        if not _keeps_its_sign(rows):
            gains = ", ".join(f"{gain:+.3f}" for gain in rows[:, 1])
            why = f"{_spell(h.against)} has no clear gain in {h.measure} to keep a share of ({gains}; {count}).{behind}"
            return Verdict(**known, verdict=UNDECIDED, why=why)
    low, high, _ = bootstrap(rows, STATISTICS[h.kind])
    estimate, by_t = float(STATISTICS[h.kind](rows.mean(axis=0)[None])[0]), _t_interval(h.kind, rows)
    known |= {"estimate": estimate, "interval": (low, high), "t_interval": by_t, "p": _p_value(h, rows)}
    measures = " against ".join(dict.fromkeys(cell.get("measure", h.measure) for cell in cells))
    what = WORDS[h.kind].format(measures) + f" {estimate:.3f}"
    if len(seeds) < MIN_SEEDS:
        return Verdict(**known, verdict=UNDECIDED, why=f"{what}, from {count} only: a verdict takes {MIN_SEEDS}.{behind}")
    words = {h.bound.judge(low, high), h.bound.judge(*by_t)}
    verdict = words.pop() if len(words) == 1 else UNDECIDED
    share = {SUPPORTED: "all", NOT_SUPPORTED: "nothing", UNDECIDED: "a part"}[verdict]
    intervals = f"{low:.3f} to {high:.3f} (bootstrap), {by_t[0]:.3f} to {by_t[1]:.3f} (t)"
    why = f"{what}, 95% intervals {intervals}, {share} of them {h.bound.text} ({count})."
    return Verdict(**known, verdict=verdict, why=why + behind)


STATISTICS = {"value": lambda m: m[:, 0], "difference": lambda m: m[:, 0] - m[:, 1], "ratio": lambda m: m[:, 0] / m[:, 1]}
WORDS = {"value": "{}", "difference": "difference in {}", "ratio": "share kept of the gain in {}"}


def _measure(h: Hypothesis, cell: dict, runs: list[Run]) -> tuple[dict[int, float], dict[int, str]]:
    """A cell's measure by seed, and by seed why there is none."""

    def wrong(message: str) -> ValueError:
        return ValueError(f"hypothesis {h.name}: {message}")

    flags = {key: value for key, value in cell.items() if key not in OWN}
    of_arm = [run for run in runs if run.arm == cell["arm"]]
    if not of_arm:
        raise wrong(f"unknown arm {cell['arm']!r}; known: {', '.join(sorted({run.arm for run in runs}))}")
    for key in flags:
        if not any(key in run.config for run in of_arm):
            raise wrong(f"the runs of arm {cell['arm']} have no flag {key!r}")
    chosen = [run for run in of_arm if all(key in run.config and same(run.config[key], value) for key, value in flags.items())]
    if not chosen:
        raise wrong(f"no run of arm {cell['arm']} has {', '.join(f'{k} {v}' for k, v in flags.items())}")
    if len(labels := {run.label for run in chosen}) > 1:
        raise wrong(f"{_spell(cell)} takes in {'; '.join(sorted(labels))}: add the flag that tells them apart")
    values, missing = {}, {}
    for run in chosen:
        if run.missing:
            missing[run.seed] = f"{run.label} {run.missing}"
            continue
        try:
            row = run.row(cell["mode"])
        except ValueError as error:
            raise wrong(str(error)) from None
        measure = cell.get("measure", h.measure)
        if measure not in row:
            raise wrong(f"mode {cell['mode']} of {run.folder.name} has no measure {measure!r}; known: {', '.join(row)}")
        values[run.seed] = row[measure]
    return values, missing


def _unpaired(cells: list[dict], measured: list[tuple[dict, dict]], seeds: list[int]) -> list[str]:
    """Each seed that some cell has or should have and that does not count, with the reason."""
    reasons = {}
    for _, missing in measured:
        reasons = missing | reasons
    for cell, (values, _) in zip(cells, measured):
        for seed in {seed for others, _ in measured for seed in others} - set(values):
            reasons.setdefault(seed, f"{_spell(cell)} was not run with it")
    return [f"seed {seed}, {reasons[seed]}" for seed in sorted(reasons, key=str) if seed not in seeds]


def _spell(cell: dict) -> str:
    return " ".join([cell["arm"], cell["mode"], *[f"{k} {v}" for k, v in cell.items() if k not in OWN]])


def _keeps_its_sign(gains: np.ndarray) -> bool:
    """Whether the mean gain of the reference (column 1) stays on one side of 0 in every bootstrap draw."""
    means = bootstrap(gains, STATISTICS["value"])[2][:, 1]
    return bool((means > 0).all() or (means < 0).all())


def _t_interval(kind: str, rows: np.ndarray) -> tuple[float, float]:
    if kind == "ratio":
        return ratio_interval(rows[:, 0], rows[:, 1])
    mean, half = mean_interval(rows[:, 0] - rows[:, 1] if kind == "difference" else rows[:, 0])
    return mean - half, mean + half


def _p_value(h: Hypothesis, rows: np.ndarray) -> float:
    """t-test of the bound over seeds: one-sided, and TOST for a range. A ratio r is tested by the contrast of - r * against."""
    if len(rows) < 2:
        return math.nan
    if h.kind == "ratio":
        rows = rows * np.sign(rows[:, 1].mean())  # both gains may fall; turned round, keeping more is again more

    def above(end: float) -> np.ndarray:
        shift = end * rows[:, 1] if h.kind == "ratio" else end + (rows[:, 1] if h.kind == "difference" else 0)
        return rows[:, 0] - shift

    sides = [sign * above(end) for sign, end in ((1, h.bound.low), (-1, h.bound.high)) if math.isfinite(end)]
    if h.bound.closed and any(not side.any() for side in sides):  # exactly on an end that belongs to the bound, in every seed
        return 0.0
    return max(p_above(side) for side in sides)
