"""What variance.py measured at the policies of several seeds: figures over seeds, and hypothesis 1, which is judged by them.

    policies = measured_policies("output/estimators")       # every variance.json below it
    pairs(policies)                                         # GRADE against each rival, at each temperature measured
    word, text = less_variance(policies)

At one policy all estimators have one KL, to the bit, and the same prompts: what is compared is a difference at the same policy. A
seed is one observation: several policies of its runs are averaged first. Intervals over a file's draws are of that policy
alone and say nothing of another seed's.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from experiments import markdown, plus_minus
from hypotheses import MIN_SEEDS, NOT_SUPPORTED, SUPPORTED, UNDECIDED, parse_bound
from stats import mean_interval

VARIANCE = "variance.json"
METHODS = {"grade": "GRADE", "ste": "GRADE-STE", "ppo": "PPO", "reinforce": "REINFORCE"}  # variance.py's rows, the runs' methods
RIVALS = ("ppo", "reinforce")
NEEDED = {"ratio", "low", "high", "cosine", "cosine_half", "tokens", "seconds"}


@dataclass(frozen=True)
class Policy:
    """One variance.json. A row: ratio (the relative variance) with low and high, cosine, tokens, seconds, ...; NaN where it is
    not resolved, inf where it is open."""

    folder: str  # that it lies in
    where: dict  # run, method, seed and checkpoint, of a run's policy; kl, nats a completion
    flags: dict  # that all estimators had
    rows: dict[str, dict]  # label -> row; empty: only the toy was measured
    toy: dict[str, dict]

    @property
    def seed(self) -> int | None:
        """Of the policy's run; None where it is of none, or an older variance.py wrote the file."""
        return self.where.get("seed")


# ------------------------------------------------------------------------------------------------------ reading


def measured_policies(folder: str | Path) -> list[Policy]:
    """Every variance.json below a folder. Raises ValueError for one that is none, and where two that count differ in flags."""
    folder = Path(folder)
    found = [_read(path, str(path.parent.relative_to(folder))) for path in sorted(folder.rglob(VARIANCE))]
    for other in counted(found)[1:]:
        first = counted(found)[0]
        keys = sorted((first.flags.keys() | other.flags.keys()) - {"seed"})
        if apart := [key for key in keys if first.flags.get(key) != other.flags.get(key)]:
            was, now = (f"{apart[0]} {policy.flags.get(apart[0])} in {policy.folder}" for policy in (first, other))
            raise ValueError(f"{folder}: variance was measured with {was}, {now}: keep files of one setting below the folder")
    return found


def _read(path: Path, name: str) -> Policy:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON ({error})") from None
    words = {"not resolved": math.nan, "open": math.inf}
    tables = [data.get(key, {}) for key in ("rows", "toy")]
    for label, row in [pair for table in tables for pair in table.items()]:
        if lacking := NEEDED - set(row):
            raise ValueError(f"{path}: row {label} lacks {', '.join(sorted(lacking))}")
        row |= {key: words.get(value, value) for key, value in row.items()}
        if row["ratio"] <= 0:
            raise ValueError(f"{path}: row {label} has a relative variance of {row['ratio']}; it is above 0")
    return Policy(name, data.get("where", {}), data.get("flags", {}), *tables)


def counted(policies: list[Policy]) -> list[Policy]:
    """Those of a seed's run, with rows."""
    return [policy for policy in policies if policy.rows and policy.seed is not None]


def labels_of(policies: list[Policy]) -> list[str]:
    """The rows of all policies, in their order."""
    return list(dict.fromkeys(label for policy in policies for label in policy.rows))


# --------------------------------------------------------------------------------------------------- over seeds


def by_seed(policies: list[Policy], figure: Callable[[Policy], float]) -> dict[int, float]:
    """Seed -> mean of a figure over its policies; those where it is not finite are left out."""
    found = {}
    for policy in counted(policies):
        if math.isfinite(x := figure(policy)):
            found.setdefault(policy.seed, []).append(x)
    return {seed: fmean(found[seed]) for seed in sorted(found)}


def row_figure(label: str, of: Callable[[dict], float]) -> Callable[[Policy], float]:
    """A figure of a label's row; NaN where the policy has no such row."""
    return lambda policy: of(policy.rows[label]) if label in policy.rows else math.nan


def log_variance(label: str) -> Callable[[Policy], float]:
    return row_figure(label, lambda row: math.log(row["ratio"]))


def interval(numbers) -> tuple[float, float]:
    """(mean, half-width of its t interval over seeds), NaN under MIN_SEEDS seeds."""
    mean, half = mean_interval(list(numbers))
    return mean, half if len(numbers) >= MIN_SEEDS else math.nan


def by_method(policies: list[Policy]) -> dict[str, dict[int, float]]:
    """Method -> seed -> relative variance, the geometric mean over the seed's policies; of mixtures at the lowest temperature."""
    found = {}
    for name, title in METHODS.items():
        labels = [label for label in labels_of(counted(policies)) if label.split()[0] == name]
        if labels:
            label = min(labels, key=lambda label: float((label.split() + ["0"])[1]))
            found[title] = {seed: math.exp(x) for seed, x in by_seed(policies, log_variance(label)).items()}
    return found


@dataclass(frozen=True)
class Pair:
    """log(relative variance of a) - log(that of b) at the same policy, over seeds."""

    a: str
    b: str
    seeds: tuple[int, ...]
    unresolved: int  # policies where one of them is not resolved: left out
    difference: float = math.nan
    low: float = math.nan  # 95% t interval; NaN under MIN_SEEDS seeds
    high: float = math.nan


def pairs(policies: list[Policy]) -> list[Pair]:
    """GRADE at each temperature that was measured against each rival."""
    mine = [label for label in labels_of(counted(policies)) if label.split()[0] == "grade"]
    return [_pair(label, rival, counted(policies)) for label in mine for rival in RIVALS]


def _pair(a: str, b: str, policies: list[Policy]) -> Pair:
    def apart(policy: Policy) -> float:
        return log_variance(a)(policy) - log_variance(b)(policy)

    both = [policy for policy in policies if a in policy.rows and b in policy.rows]
    found, unresolved = by_seed(both, apart), sum(math.isnan(apart(policy)) for policy in both)
    if not found:
        return Pair(a, b, (), unresolved)
    mean, half = interval(found.values())
    return Pair(a, b, tuple(found), unresolved, mean, mean - half, mean + half)


# ------------------------------------------------------------------------------------------------- hypothesis 1


def less_variance(policies: list[Policy]) -> tuple[str, str]:
    """Whether GRADE's gradient varies less than each rival's at every temperature measured: a word and the numbers.

    Supported where every interval over seeds is below 0, not supported where one is above 0.
    """
    files, seen = [policy for policy in policies if policy.rows], counted(policies)
    if not files:
        return UNDECIDED, "variance.py was run at no policy, and a spread of norms is no variance"
    seeds = sorted({policy.seed for policy in seen})
    text = f"{len(seen)} policies of {len(seeds)} seeds"
    if kls := [policy.where["kl"] for policy in seen if "kl" in policy.where]:
        text += f", KL {digits(min(kls))} to {digits(max(kls))} nats a completion"
    if len(seen) < len(files):
        text += f", and {len(files) - len(seen)} of no seed's run, not counted"
    if len(seeds) < MIN_SEEDS:
        each = [f"{policy.folder} {drawn}" for policy in files if (drawn := _over_draws(policy))]
        return UNDECIDED, "; ".join([f"{text}, and it takes {MIN_SEEDS} seeds; relative variance over draws alone", *each])
    found = pairs(policies)
    if not found:
        return UNDECIDED, f"{text}, and GRADE was not measured"
    words = [parse_bound("< 0").judge(p.low, p.high) for p in found]  # undecided where the ends are NaN
    word = next((word for word in (NOT_SUPPORTED, UNDECIDED) if word in words), SUPPORTED)
    return word, "; ".join([text, *map(_spelt, found)])


def _spelt(pair: Pair) -> str:
    lost = f" ({pair.unresolved} not resolved)" if pair.unresolved else ""
    if len(pair.seeds) < MIN_SEEDS:
        return f"{pair.a} and {pair.b}: {len(pair.seeds)} seeds, and it takes {MIN_SEEDS}{lost}"
    ends = f"95% {digits(pair.low)} to {digits(pair.high)}, {len(pair.seeds)} seeds{lost}"
    return f"{pair.a} has {digits(math.exp(pair.difference))} times {pair.b}'s, log {digits(pair.difference)} ({ends})"


def _over_draws(policy: Policy) -> str:
    rows = {label: row for label, row in policy.rows.items() if label.split()[0] == "grade" or label in RIVALS}
    return ", ".join(f"{label} {digits(row['low'])} to {digits(row['high'])}" for label, row in rows.items())


# ------------------------------------------------------------------------------------------------------- tables


def digits(x: float) -> str:
    return f"{x:,.3g}" if abs(x) < 1000 else "open" if math.isinf(x) else "not resolved" if math.isnan(x) else f"{x:,.0f}"


def geometric(logs) -> str:
    """Geometric mean with its t interval, of logarithms, one a seed."""
    if not logs:
        return "not resolved"
    mean, half = interval(logs)
    ends = f" ({digits(math.exp(mean - half))} to {digits(math.exp(mean + half))})" if math.isfinite(half) else ""
    return digits(math.exp(mean)) + ends


SEED_HEADS = ["estimator", "seeds", "policies", "relative variance", "cosine", "squared bias", "tokens", "seconds",
              "seconds x variance"]  # fmt: skip


def seed_rows(policies: list[Policy]) -> list[list[str]]:
    """A row an estimator, figures over seeds, as SEED_HEADS; none where no policy counts."""

    def mean(label: str, key: str) -> str:
        found = by_seed(policies, row_figure(label, lambda row: row.get(key, math.nan)))
        return plus_minus(interval(found.values())) if found else "–"

    rows = []
    for label in labels_of(counted(policies)):
        there = [policy.rows[label]["ratio"] for policy in counted(policies) if label in policy.rows]
        resolved = sum(map(math.isfinite, there))
        cost = by_seed(policies, row_figure(label, lambda row: math.log(row["ratio"] * row["seconds"])))
        rows.append([
            label, str(len({policy.seed for policy in counted(policies) if label in policy.rows})),
            str(len(there)) if resolved == len(there) else f"{resolved} of {len(there)} resolved",
            geometric(by_seed(policies, log_variance(label)).values()), mean(label, "cosine"),
            "–" if label == "ppo" or not resolved else mean(label, "bias"),  # PPO's has a length of its own: docs/variance.md
            mean(label, "tokens"), mean(label, "seconds"), geometric(cost.values()),
        ])  # fmt: skip
    return rows


FILE_HEADS = ["folder", "seed", "KL", "where", "estimator", "relative variance", "95% over draws", "cosine", "tokens", "seconds"]


def file_rows(policies: list[Policy]) -> list[list[str]]:
    """A row a file and estimator, as FILE_HEADS: what each variance.json holds, its toy too."""
    return [
        [policy.folder, "–" if policy.seed is None or toy else str(policy.seed),
         "–" if "kl" not in policy.where or toy else digits(policy.where["kl"]), "toy" if toy else "policy", label,
         digits(row["ratio"]), f"{digits(row['low'])} to {digits(row['high'])}",
         plus_minus((row["cosine"], row["cosine_half"])) if math.isfinite(row["cosine"]) else "not resolved",
         digits(row["tokens"]), digits(row["seconds"])]
        for policy in policies for toy, rows in enumerate((policy.rows, policy.toy)) for label, row in rows.items()
    ]  # fmt: skip


def variance_text(policies: list[Policy], drawn: list[str]) -> list[str]:
    """The report's lines: over seeds, the picture, policy by policy."""
    if not policies:
        return []
    lines = ["### Gradients of a policy that does not move (variance.py)", ""]
    if rows := seed_rows(policies):
        lines += ["Over seeds' policies, all estimators at the same ones; of several policies a seed has their mean. Means of "
                  "variances are geometric, intervals t intervals over seeds.", "", markdown(SEED_HEADS, rows)]  # fmt: skip
    lines += ["![variance](variance.png)", ""] if "variance" in drawn else []
    return [*lines, "Policy by policy:", "", markdown(FILE_HEADS, file_rows(policies))]
