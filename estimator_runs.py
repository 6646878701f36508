"""The estimators' experiment as data: the runs below a folder, and what one run amounts to, a number a seed.

    runs = load("results")                                  # every results.json below it
    groups = compared(runs)                                 # method -> the runs of its main setting
    first_reach(run, "val_reward", 0.8), roughness(run), reward_at_kl(run, common_kl(runs))

A run is a folder with results.json, as train_gumbel.py, train_reinforce.py and train_ppo.py --env sentiment write it:
{"method", "seed", "config", "untrained", "steps": [a row a step], "validation": [a row an evaluation], "test": {"last", "best",
"untrained"}, "wall_s"}. Tokens and prompts count from the start of the run. KL is in nats a completion.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments import MANIFEST, label_of, read_manifest
from runs import read_config, read_metrics

RESULT = "results.json"
TITLES = {"grade": "GRADE", "grade_ste": "GRADE-STE", "ppo": "PPO", "reinforce": "REINFORCE"}  # in the order of every table
STEP = ("step", "reward", "loss", "kl", "grad_norm_mean", "grad_norm_std", "tokens", "prompts")
VALIDATION = ("step", "val_reward", "val_kl")
TAU = ("tau_start", "tau_end", "tau_steps")  # the schedule: from, to, in so many steps
PLACE = {"seed", "output_dir", "results_dir", "resume", "device", "threads", "logging_steps", "save_steps"}  # no settings


@dataclass(frozen=True)
class Run:
    method: str  # as it is printed: GRADE
    label: str  # the method and what sets it apart from the method's main setting; of that one, the method
    seed: int
    folder: Path
    config: dict
    steps: dict[str, np.ndarray]  # columns (S,), NaN where a row has none
    validation: dict[str, np.ndarray]  # columns (V,); the first row is the untrained model, at step 0
    test: dict[str, dict[str, float]]  # last, best, untrained: reward, kl; of best its step
    wall_s: float


# ------------------------------------------------------------------------------------------------------ reading


def run_files(folder: str | Path) -> list[Path]:
    """Every results.json below a folder but those of analyses."""
    folder = Path(folder)
    return sorted(path for path in folder.rglob(RESULT) if "analysis" not in path.relative_to(folder).parts)


def load(folder: str | Path) -> list[Run]:
    """Every run below a folder, methods in the order of TITLES, labelled by what they differ in.

    A method's main setting is the one with the most seeds; of several, that of the first folder by name.
    Raises ValueError where there is none, for a file that is not as above, and for one run found twice.
    """
    runs = [_read(path) for path in run_files(folder)]
    if not runs:
        lost = f"; without one: {'; '.join(there)}" if (there := missing(folder)) else ""
        scripts = "train_gumbel.py, train_reinforce.py and train_ppo.py write them"
        raise ValueError(f"{folder} holds no {RESULT} of a run: {scripts}{lost}")
    known = list(TITLES.values())
    runs.sort(key=lambda run: known.index(run.method) if run.method in known else len(known))
    mains = {run.method: _main_setting([other for other in runs if other.method == run.method]) for run in runs}
    labelled = {}
    for run in runs:
        main, own = mains[run.method], _setting(run)
        apart = {key: own.get(key) for key in sorted(main.keys() | own.keys()) if main.get(key) != own.get(key)}
        run = replace(run, label=label_of(run.method, apart))
        if other := labelled.get((run.label, run.seed)):
            raise ValueError(f"{other.folder} and {run.folder} are one run twice ({run.label}, seed {run.seed}): delete one")
        labelled[run.label, run.seed] = run
    return list(labelled.values())


def missing(folder: str | Path) -> list[str]:
    """Every run without a result, with the reason and the last step that it logged: those that a sweep planned (its manifest
    says which), and run folders besides."""
    folder = Path(folder)
    entries = read_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else []
    reasons = {}
    for entry in entries:
        why = ": ".join(filter(None, [entry["status"], entry.get("error")]))
        reasons[folder / entry["folder"]] = f"done, but it holds no {RESULT}" if why == "done" else why
    for path in sorted(folder.rglob("config.yaml")):
        if "method" in read_config(path.parent):  # a run of this experiment
            reasons.setdefault(path.parent, "running, or stopped")
    lost = {place: why for place, why in reasons.items() if not (place / RESULT).is_file()}
    return [f"{place.relative_to(folder)}: {why}{_progress(place)}" for place, why in lost.items()]


def _progress(place: Path) -> str:
    steps = [row["step"] for row in read_metrics(place)] if (place / "metrics.jsonl").is_file() else []
    return f", step {steps[-1]} of {read_config(place).get('max_steps', '?')}" if steps else ""


def compared(runs: list[Run]) -> dict[str, list[Run]]:
    """Method -> the runs of its main setting, in the order of `runs`."""
    groups = {}
    for run in runs:
        if run.label == run.method:
            groups.setdefault(run.method, []).append(run)
    return groups


def tau_settings(runs: list[Run]) -> dict[str, list[Run]]:
    """Method with its schedule -> runs, of the methods that were run with several: settings that differ in tau_* alone."""
    settings = {}
    for run in runs:
        main = next(other for other in runs if other.label == run.method).config
        apart = {key for key in main.keys() | run.config.keys() if main.get(key) != run.config.get(key)} - PLACE
        if set(TAU) <= main.keys() and apart <= set(TAU):
            start, end, steps = (run.config[key] for key in TAU)
            name = f"{run.method}, τ {start:g} to {end:g} in {steps:g}"
            settings.setdefault(run.method, {}).setdefault(name, []).append(run)
    return {name: group for of in settings.values() if len(of) > 1 for name, group in of.items()}


def _read(path: Path) -> Run:
    def wrong(message: str) -> ValueError:
        return ValueError(f"{path}: {message}")

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise wrong(f"no JSON ({error})") from None
    if lacking := {"method", "seed", "config", "untrained", "steps", "validation", "test", "wall_s"} - set(data):
        raise wrong(f"lacks {', '.join(sorted(lacking))}")
    if lacking := {"last", "best", "untrained"} - set(data["test"]):
        raise wrong(f"test lacks {', '.join(sorted(lacking))}")
    for name, row in data["test"].items():
        if not {"reward", "kl"} <= set(row):
            raise wrong(f"test {name} needs reward and kl")
    steps, validation = (_columns(data[key], needed, key, wrong) for key, needed in (("steps", STEP), ("validation", VALIDATION)))
    for key in ("tokens", "prompts"):
        if (np.diff(steps[key], prepend=0) <= 0).any():
            raise wrong(f"{key} must count from the start of the run and grow with every step")
    if len(set(np.diff(steps["step"][:-1]))) > 1:
        raise wrong("steps must be evenly spaced, but for the last")
    if _one_micro_batch(data["config"]):
        steps["grad_norm_std"] = np.full_like(steps["grad_norm_std"], math.nan)
    if not all(np.isfinite(validation[key]).all() for key in VALIDATION):
        raise wrong("a validation without a number for val_reward or val_kl")
    if validation["step"][0] > 0:
        first = {"step": 0.0, "val_reward": _untrained_reward(data["untrained"], wrong), "val_kl": 0.0}
        validation = {key: np.concatenate([[first.get(key, math.nan)], column]) for key, column in validation.items()}
    if data["test"]["best"].get("step") not in validation["step"]:
        raise wrong("test best must name the step of a validation")
    method = str(data["method"]).lower().replace("-", "_")
    title = TITLES.get(method, str(data["method"]))
    return Run(title, "", data["seed"], path.parent, data["config"], steps, validation, data["test"], float(data["wall_s"]))


def _one_micro_batch(config: dict) -> bool:
    """Whether a batch is one micro-batch: then the norms have no spread. PPO's is that of its epochs, between which the policy
    moves."""
    size, batch = config.get("micro_batch_size"), config.get("batch_size")
    return size is not None and batch is not None and (size == 0 or size >= batch)


def _columns(rows, needed: tuple[str, ...], name: str, wrong) -> dict[str, np.ndarray]:
    if not isinstance(rows, list) or not rows:
        raise wrong(f"{name} must be a list of rows, at least one")
    for number, row in enumerate(rows):
        if lacking := set(needed) - set(row):
            raise wrong(f"{name}, row {number} lacks {', '.join(sorted(lacking))}")
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, (int, float)))
    columns = {key: np.array([math.nan if row.get(key) is None else row[key] for row in rows], float) for key in [*needed, *keys]}
    if (np.diff(columns["step"]) <= 0).any():
        raise wrong(f"{name} must stand in the order of their steps")
    return columns


def _untrained_reward(untrained: dict, wrong) -> float:
    for key in ("val_reward", "reward"):
        if key in untrained:
            return float(untrained[key])
    raise wrong("no validation at step 0, and no val_reward of the untrained model")


def _setting(run: Run) -> dict:
    return {key: json.dumps(value).strip('"') for key, value in run.config.items() if key not in PLACE}


def _main_setting(runs: list[Run]) -> dict:
    counts = Counter(json.dumps(_setting(run), sort_keys=True) for run in runs)  # in the order of the folders
    return json.loads(max(counts, key=counts.get))


# ---------------------------------------------------------------------------------- what one run amounts to


def first_reach(run: Run, key: str, level: float) -> float:
    """The step at which the validations' `key`, linear between two of them, first is at least `level`; inf where it never is."""
    steps, values = run.validation["step"], run.validation[key]
    at = int(np.argmax(values >= level))
    if not values[at] >= level:
        return math.inf
    if at == 0:
        return float(steps[0])
    share = (level - values[at - 1]) / (values[at] - values[at - 1])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


def spent(run: Run, key: str, step: float) -> float:
    """Tokens or prompts that the run had used by a step, linear between logged steps; inf at inf."""
    if math.isinf(step):
        return math.inf
    return float(np.interp(step, [0, *run.steps["step"]], [0, *run.steps[key]]))


def final_reward(run: Run) -> float:
    return float(run.validation["val_reward"][-1])


def gap(run: Run, which: str = "last") -> float:
    """Generalisation gap: validation reward minus test reward, of the last step or of the best checkpoint (whose validation
    reward was the largest of many, and so too high by chance)."""
    steps, rewards = run.validation["step"], run.validation["val_reward"]
    at = -1 if which == "last" else int(np.flatnonzero(steps == run.test["best"]["step"])[0])
    return float(rewards[at]) - run.test[which]["reward"]


def spread(run: Run) -> float:
    """How much the norms of a step's micro-batch gradients differ, over their size: mean grad_norm_std over mean grad_norm_mean
    of a run's steps. Free of the loss's scale; it sees lengths only, no directions. NaN where nothing is logged."""
    std, mean = run.steps["grad_norm_std"], run.steps["grad_norm_mean"]
    there = np.isfinite(std) & np.isfinite(mean)
    return float(std[there].mean() / mean[there].mean()) if mean[there].any() else math.nan


def roughness(run: Run, until: float = math.inf) -> float:
    """Mean absolute step-to-step change of the training reward without its trend: of |r_t - (r_(t-1) + r_(t+1)) / 2|, in which
    every locally linear trend cancels. Over logged steps up to `until`; NaN where they are fewer than three."""
    r = run.steps["reward"][run.steps["step"] <= until]
    return float(np.abs(r[1:-1] - (r[:-2] + r[2:]) / 2).mean()) if len(r) >= 3 else math.nan


def drawdown(run: Run) -> float:
    """The largest fall of the validation reward below what it had been before: an oscillation that is slower than roughness."""
    rewards = run.validation["val_reward"]
    return float((np.maximum.accumulate(rewards) - rewards).max())


# --------------------------------------------------------------------------------------------------- matched KL


def kl_range(run: Run) -> tuple[float, float]:
    """The least and the largest KL among the validations after step 0."""
    trained = run.validation["val_kl"][run.validation["step"] > 0]
    return (float(trained.min()), float(trained.max())) if len(trained) else (math.inf, -math.inf)


def common_kl(runs: list[Run]) -> float | None:
    """A KL inside the range of every run: the least of their final ones, or, where some run is never as low, the lowest KL that
    all have. None where the ranges share nothing."""
    ranges = [kl_range(run) for run in runs]
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    return max(low, min(float(run.validation["val_kl"][-1]) for run in runs)) if low <= high else None


def reward_at_kl(run: Run, level: float) -> float:
    """Validation reward where the run's way through the (KL, reward) plane, validations after step 0 joined by straight lines,
    has this KL: the mean, where it comes by more than once. NaN outside its range."""
    trained = run.validation["step"] > 0
    x, y = run.validation["val_kl"][trained], run.validation["val_reward"][trained]
    crossed = np.flatnonzero((x[:-1] - level) * (x[1:] - level) < 0)
    share = (level - x[crossed]) / (x[crossed + 1] - x[crossed])
    rewards = [*y[x == level], *(y[crossed] + share * (y[crossed + 1] - y[crossed]))]
    return float(np.mean(rewards)) if rewards else math.nan
