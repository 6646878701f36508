"""An experiment's folder as data: its runs, what each measured, and summaries over seeds.

    runs = load("output/routing")                       # finished ones and missing ones, each with the reason
    table = summarise(records(finished(runs)))          # (label, mode) -> measure -> (mean, half-width), n

The folder is what sweep.py leaves: `runs.json`, a list of {"arm", "swept", "flags", "folder", "status"}, and the run folders, of
which this reads config.yaml, verdict.json ({"modes": {mode: {measure: number}}}) and metrics.jsonl. Nothing here knows an
algorithm: a mode is a row of verdict.json, a measure a number in it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runs import read_config, read_metrics
from stats import mean_interval

MANIFEST, RESULT = "runs.json", "verdict.json"
PLACE = {"output_dir", "resume"}  # flags that say nothing of what a run is


@dataclass(frozen=True)
class Run:
    arm: str
    swept: dict  # the arm's swept flags but the seed
    seed: int | None
    folder: Path
    config: dict  # the resolved config; of a run that left none, its flags
    modes: dict[str, dict]  # the rows of verdict.json; empty where the run is missing
    metrics: list[dict]  # the lines of metrics.jsonl
    missing: str  # why there is no result; "" where there is one

    @property
    def label(self) -> str:
        """The arm and what was swept in it: runs of one label differ in their seed alone."""
        return label_of(self.arm, self.swept)

    def row(self, mode: str) -> dict[str, float]:
        """The numbers of a mode: one of the verdict's; as it was evaluated at a step, `both@20`; or a step's log line,
        `training@20` (steps with the bad branch off left out). Raises ValueError for what the run does not have."""
        name, at, step = mode.partition("@")
        if not at and mode in self.modes:
            return numbers(self.modes[mode])
        lines = [line for line in self.metrics if at and str(line["step"]) == step]
        if name == "training":
            found = next((numbers(line) for line in lines if "lr" in line and not line.get("coherence")), {})
        else:
            logged = [(key.removeprefix(f"{name}/"), line[key]) for line in lines for key in line if key.startswith(f"{name}/")]
            found = numbers(dict(logged)) if name in self.modes else {}
        if not found:
            known = f"{', '.join(self.modes)}, each also as evaluated at a step (both@20), training@20"
            raise ValueError(f"{self.folder.name} has no mode {mode!r}; known: {known}")
        return found


def label_of(arm: str, swept: dict) -> str:
    return ", ".join([arm] * bool(arm) + [f"{key} {value}" for key, value in swept.items()]) or "all runs"


# ------------------------------------------------------------------------------------------------------ loading


def load(folder: str | Path) -> list[Run]:
    """Every run of the manifest, in its order, those without a result included.

    Raises ValueError where there is no manifest or it is none; where a finished run's config contradicts its flags; where two
    runs of one label share a seed.
    """
    folder = Path(folder)
    entries = read_manifest(folder / MANIFEST)
    loaded, seen = [], {}
    for entry in entries:
        arm, flags, place = entry["arm"], entry["flags"], folder / entry["folder"]
        missing = "" if entry["status"] == "done" else ": ".join(filter(None, [entry["status"], entry.get("error")]))
        if not missing and not (place / RESULT).is_file():
            missing = f"done, but {place.name} holds no {RESULT}"
        config = read_config(place) if (place / "config.yaml").is_file() else dict(flags)
        if not missing:
            _check_flags(place, config, flags)
        modes, metrics = ({}, []) if missing else (_read_modes(place / RESULT), read_metrics(place))
        run = Run(arm, entry["swept"], config.get("seed", flags.get("seed")), place, config, modes, metrics, missing)
        if other := seen.get((run.label, run.seed)):
            raise ValueError(f"{other.folder} and {place} are one run twice ({run.label}, seed {run.seed}): mend {MANIFEST}")
        seen[run.label, run.seed] = run
        loaded.append(run)
    return loaded


def read_manifest(path: Path) -> list[dict]:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no experiment's folder: it has no {path.name} (sweep.py writes it)")
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a list of runs, at least one")
    for number, entry in enumerate(entries):
        if lacking := {"arm", "swept", "flags", "folder", "status"} - set(entry):
            raise ValueError(f"{path}: run {number} lacks {', '.join(sorted(lacking))}")
    return entries


def _check_flags(place: Path, config: dict, flags: dict) -> None:
    for key, value in flags.items():
        if key in config and key not in PLACE and not same(config[key], value):
            raise ValueError(f"{place} was run with {key} {config[key]!r}, {MANIFEST} says {value!r}: another run's folder?")


def _read_modes(path: Path) -> dict[str, dict]:
    modes = json.loads(path.read_text(encoding="utf-8")).get("modes")
    if not modes or not all(isinstance(row, dict) for row in modes.values()):
        raise ValueError(f'{path} holds no "modes": {{mode: {{measure: number}}}}')
    return modes


def same(a, b) -> bool:
    """Whether a flag's value, as YAML or a command line spells it, is a config's: 1e-3 is 0.001 is "1e-3"."""
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return a == b or str(a).lower() == str(b).lower()


def finished(runs: list[Run]) -> list[Run]:
    return [run for run in runs if not run.missing]


def by_label(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs grouped by label, in order of appearance."""
    groups = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


# ---------------------------------------------------------------------------------------------------- summaries


def records(runs: list[Run]) -> list[dict]:
    """One flat record per run and mode: label, arm, seed, mode, and every number of the mode's row."""
    return [
        {"label": run.label, "arm": run.arm, "seed": run.seed, "mode": mode} | numbers(row)
        for run in runs
        for mode, row in run.modes.items()
    ]


def numbers(row: dict) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}


def summarise(table: list[dict]) -> dict[tuple[str, str], dict]:
    """(label, mode) -> {"n": seeds, measure: (mean, half-width of the 95% t interval; NaN of one seed)}; of `records`' rows.

    Raises ValueError where one seed of a label has a measure that another lacks: a mean of some would pass as one of all.
    """
    cells = {}
    for record in table:
        cells.setdefault((record["label"], record["mode"]), []).append(record)
    summary = {}
    for (label, mode), rows in cells.items():
        if odd := {key for row in rows for key in row.keys() ^ rows[0].keys()}:
            raise ValueError(f"arm {label}, mode {mode}: some seeds lack the measure {min(odd)!r}")
        keys = [key for key in rows[0] if key not in ("label", "arm", "seed", "mode")]
        summary[label, mode] = {"n": len(rows)} | {key: mean_interval([row[key] for row in rows]) for key in keys}
    return summary


# ------------------------------------------------------------------------------------------------------- curves


def curve(runs: list[Run], key: str, coherence: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A training metric over steps: steps (S,), values (runs, S), NaN where a run did not log that step.

    With `coherence` the rows that were sampled and trained with the bad branch off, without it the others.
    """
    logged = [
        {row["step"]: row[key] for row in run.metrics if key in row and bool(row.get("coherence")) == coherence} for run in runs
    ]
    steps = sorted({step for rows in logged for step in rows})
    return np.array(steps), np.array([[rows.get(step, math.nan) for step in steps] for rows in logged])


def movement(runs: list[Run], key: str) -> tuple[float, float] | None:
    """How far a training metric moves over the last quarter: its least-squares slope there times the quarter's length, as mean
    and half-width over seeds. None where the quarter holds fewer than three logged steps."""
    steps, values = curve(runs, key)
    late = steps > 0.75 * steps[-1] if len(steps) else np.array([], dtype=bool)
    moved = []
    for row in values[:, late] if late.sum() >= 3 else []:
        there = np.isfinite(row)
        if there.sum() >= 3:
            moved.append(np.polyfit(steps[late][there], row[there], 1)[0] * 0.25 * steps[-1])
    return mean_interval(moved) if moved else None


# ------------------------------------------------------------------------------------------------------ tables


def summary_rows(summary: dict, measures: list[str]) -> list[list[str]]:
    """Label, mode, seeds and mean ± half-width of each measure, as text; a dash where the mode lacks it, no ± of one seed, of
    `degenerate` how many runs are.

    The untrained model is one line, of one seed, where all arms have the same one, to the last bit.
    """
    first = {key: cell for key, cell in summary.items() if key[1] == "untrained"}
    rest = {key: cell for key, cell in summary.items() if key[1] != "untrained"}
    means = [{m: pair[0] for m, pair in cell.items() if m != "n"} for cell in first.values()]
    if len(means) > 1 and all(other == means[0] for other in means):
        summary = {("all", "untrained"): {"n": 1} | {m: (x, math.nan) for m, x in means[0].items()}} | rest

    def shown(cell: dict, measure: str) -> str:
        if measure not in cell:
            return "–"
        return f"{round(cell[measure][0] * cell['n'])}/{cell['n']}" if measure == "degenerate" else plus_minus(cell[measure])

    return [[label, mode, str(cell["n"]), *[shown(cell, m) for m in measures]] for (label, mode), cell in summary.items()]


def plus_minus(pair: tuple[float, float]) -> str:
    """(0.91, 0.02) -> "0.910 ± 0.020"; fewer decimals of what is large; a NaN half-width is left out."""
    mean, half = pair
    digits = 3 if abs(mean) < 10 else 1 if abs(mean) < 1000 else 0
    return f"{mean:,.{digits}f}" + (f" ± {half:,.{digits}f}" if math.isfinite(half) else "")


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is legible as text too."""
    cells = [heads, *[[text.replace("|", "\\|") for text in row] for row in rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in cells) + "\n"


def latex(heads: list[str], rows: list[list[str]]) -> str:
    """A tabular with booktabs' rules; two text columns, then numbers."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}
    special |= {c: "\\" + c for c in "&%$#_{}"}
    lines = [" & ".join("".join(special.get(c, c) for c in text) for text in line) + r" \\" for line in [heads, *rows]]
    head = rf"\begin{{tabular}}{{ll{'r' * (len(heads) - 2)}}}"
    return "\n".join([head, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def plain(value):
    """A value as JSON holds it: NaN and infinities are null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
