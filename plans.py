"""From an experiment's YAML to its runs: the flags of each, checked by the train script itself before any starts.

    file = read_experiment("configs/routing.yaml")
    root, planned = plan(file, given={"max_steps": 50})      # a list of Run; nothing is read but code, nothing is written
    commands = commands_of(planned[0])                       # what is left to do in its folder: {"train": words, "eval": words}

A train script offers `resolve(argv) -> (run folder, resolved config)`, which parses and checks flags and loads nothing; RESULT,
the file in its folder that a finished run has; and, where its runs can be judged afterwards, EVALUATE, the script that does it
(with a `resolve` and RESULT of its own; not for a run whose config says `judges_itself`). See docs/sweep.md.
"""

import importlib.util
import io
import itertools
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import yaml

import runs

LEAD = ("arm", "reward", "routing", "lora_config", "lr", "beta")  # the order in a run's name of what is swept
OWN = ("output_dir", "resume")  # flags that a sweep gives each run
DEFAULT_SCRIPT = "train_grpo.py"


@dataclass
class Script:
    path: Path
    module: ModuleType


@dataclass
class Run:
    name: str
    """of its folder: the arm and every swept flag"""
    arm: str
    swept: dict
    """the swept flags but the seed: runs of one arm and the same of these differ in their seed alone"""
    flags: dict
    """what was asked for, values as the script resolved them"""
    config: dict
    """the whole resolved config"""
    folder: Path
    report: Path
    """the file with the figures to summarise"""
    script: Script
    words: list[str]
    """the script's command line"""
    judge: Script | None
    judge_words: list[str]
    judge_config: dict


# ------------------------------------------------------------------------------------------------------- the YAML file


def read_experiment(path: str | Path) -> dict:
    """An experiment's file, its shape checked; `name` is the file's if it gives none. ValueError names the file and the key."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        file = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    kinds = {"name": str, "script": str, "fixed": dict, "grid": dict, "arms": dict, "eval": dict, "hypotheses": dict}
    if not isinstance(file, dict):
        raise ValueError(f"{path} must map {', '.join(kinds)} to their values")
    for key, value in file.items():
        if key not in kinds:
            raise ValueError(f"{path}: unknown key {key!r}; known: {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise ValueError(f"{path}: {key} must be {'a mapping' if kinds[key] is dict else 'text'}, not {value!r}")
    for arm, own in file.get("arms", {}).items():
        if not isinstance(arm, str) or not re.fullmatch(r"[\w.=-]+", arm, re.ASCII):
            raise ValueError(f"{path}: arm {arm!r} must be letters, digits and . _ = - (and quote yes, no, on and off)")
        if not isinstance(own, dict) or not isinstance(own.get("grid", {}), dict):
            raise ValueError(f"{path}: arm {arm} must map flags to values, and its grid flags to lists, not {own!r}")
        if not isinstance(own.get("script", ""), str):
            raise ValueError(f"{path}: arm {arm}: script must be text, not {own['script']!r}")
    return {"name": path.stem} | file


def cells(levels: list[tuple[str, dict, dict]]) -> list[tuple[dict, dict]]:
    """(fixed, swept) flags of every combination of the grid.

    levels: (where, fixed, grid); flag by flag the last level that gives it wins, whether it fixes or sweeps it.
    """
    fixed, grid = {}, {}
    for where, more_fixed, more_grid in levels:
        for key, values in more_grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"{where}: grid: {key} must be a list of values, not {values!r}")
        if both := [key for key in more_fixed if key in more_grid]:
            raise ValueError(f"{where}: {both[0]} is both fixed and swept")
        if own := [key for key in OWN if key in more_fixed or key in more_grid]:
            raise ValueError(f"{where}: {own[0]} is set for each run by the sweep; take it out")
        fixed = {key: value for key, value in fixed.items() if key not in more_grid} | more_fixed
        grid = {key: value for key, value in grid.items() if key not in more_fixed} | more_grid
    return [(fixed, dict(zip(grid, values))) for values in itertools.product(*grid.values())]


# ------------------------------------------------------------------------------------------------------------- scripts


def words_of(flags: dict) -> list[str]:
    """{'lr': 0.001, 'world': True, 'top': [1, 2]} -> ['--lr', '0.001', '--world', '--top', '1', '2']; False is --no_world."""
    words = []
    for key, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no_{key}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words += [f"--{key}={value}"] if str(value).startswith("-") else [f"--{key}", str(value)]
    return words


def import_script(name: str, beside: Path | None = None) -> Script:
    """A script by its path: from here, from the folder `beside`, or from this file's. ValueError where a sweep can't drive it."""
    path = next((p for p in (Path(name), (beside or Path()) / name, Path(__file__).parent / name) if p.is_file()), None)
    if path is None:
        raise ValueError(f"script {name}: no such file")
    if (own := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, own)  # where Python looks when it runs the script
    module = sys.modules.get(path.stem)
    if module is None or Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not hasattr(module, "resolve") or not hasattr(module, "RESULT"):
        raise ValueError(f"script {name} lacks resolve(argv) or RESULT, by which a sweep knows its runs (docs/sweep.md)")
    return Script(path, module)


def _without_frame(printed: str) -> str:
    """The message in what tyro prints: a heading and a rule, or a box with its heading in the frame; message, rule, help."""
    blocks = [" ".join(part.replace("│", " ").split()) for part in re.split(r"^.*(?:──|---).*$", printed, flags=re.M)]
    blocks = [block for block in blocks if block] or ["refused without a word"]
    return blocks[min(1, len(blocks) - 1) if "---" in printed else 0]


def resolve(script: Script, words: list[str], where: str) -> tuple[Path, dict]:
    """(folder, config) by the script's own `resolve`; what it refuses, or prints and exits with, is a ValueError of one line."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), redirect_stdout(printed):
            folder, config = script.module.resolve(words)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except SystemExit:  # a flag parser's way
        raise ValueError(f"{where}: {_without_frame(printed.getvalue())}") from None
    return Path(folder), config


# ------------------------------------------------------------------------------------------------------------ the plan


def plan(file: dict, given: dict | None = None, swept: dict | None = None, evaluate: bool = True,
         root: str | Path = "") -> tuple[Path, list[Run]]:  # fmt: skip
    """(the experiment's folder, its runs in order), every flag of every run checked.

    Args:
        file: as `read_experiment` returns it; {} for none. An arm with a script of its own takes nothing of `fixed` and `grid`.
        given: flags that win over the file's in every run.
        swept: flag -> list of values, likewise.
        evaluate: plan the evaluation too, where the script names one.
        root: the experiment's folder; default: output/ and its name, which without a file is made of what is fixed.
    Raises:
        ValueError: in one line that names the arm and the flag.
    """
    drafts = []
    for arm, own in file.get("arms", {"": {}}).items():
        script = import_script(own.get("script", file.get("script", DEFAULT_SCRIPT)))
        where = f"arm {arm}" if arm else script.path.name
        common = {} if "script" in own else file  # another script's flags are others
        levels = [
            ("fixed", common.get("fixed", {}), common.get("grid", {})),
            (where, {key: value for key, value in own.items() if key not in ("grid", "script")}, own.get("grid", {})),
            ("command line", given or {}, swept or {}),
        ]
        for fixed, chosen in cells(levels):
            _, config = resolve(script, words_of(fixed | chosen), where)
            if "output_dir" not in config:
                raise ValueError(f"{script.path.name} has no --output_dir, without which its runs can't be told apart")
            threads = {"threads": 1} if "threads" in config and "threads" not in fixed | chosen else {}
            drafts.append((script, where, arm, fixed, chosen, threads, config))
    root = Path(root or Path("output") / (file.get("name") or _name_of(drafts[0])))
    planned, names = [], set()
    for script, where, arm, fixed, chosen, threads, config in drafts:
        parts = ({"arm": arm} if arm else {}) | {key: config.get(key, value) for key, value in chosen.items()}
        name = runs.run_name(parts, {}, LEAD)
        if name in names:
            raise ValueError(f"two runs would be called {name}: the grid holds a value twice")
        names.add(name)
        swept_here = {key: value for key, value in parts.items() if key not in ("arm", "seed")}
        words = words_of(fixed | chosen | threads | {"output_dir": str(root / name)})
        folder, config = resolve(script, words, where)
        flags = {key: config.get(key, value) for key, value in (fixed | chosen).items()}
        report, judge, judge_words, judge_config = folder / script.module.RESULT, None, [], {}
        if evaluate and hasattr(script.module, "EVALUATE") and not config.get("judges_itself"):
            judge = import_script(script.module.EVALUATE, script.path.parent)
            report, judge_words, judge_config = _plan_evaluation(judge, folder, file.get("eval", {}), config)
        run = Run(name, arm, swept_here, flags, config, folder, report, script, words, judge, judge_words, judge_config)
        planned.append(run)
    return root, planned


def _name_of(draft) -> str:
    script, _, _, fixed, _, _, config = draft
    stem = [] if script.path.name == DEFAULT_SCRIPT else [script.path.stem]
    return "_".join([*stem, runs.run_name({key: config.get(key, value) for key, value in fixed.items()}, {}, LEAD)])


def _plan_evaluation(judge: Script, folder: Path, flags: dict, config: dict) -> tuple[Path, list[str], dict]:
    """(its result file, words, resolved config), on the run's own device."""
    words = words_of({"model_path": str(folder)} | flags)
    out, resolved = resolve(judge, words, "eval")
    if "device" in config and "device" in resolved and "device" not in flags:
        words += ["--device", config["device"]]
        out, resolved = resolve(judge, words, "eval")
    return out / judge.module.RESULT, words, resolved


# --------------------------------------------------------------------------------------------------- what is left to do


def state_of(run: Run) -> str:
    """new, interrupted or finished. ValueError for a folder that holds something else, naming what differs."""
    if not run.folder.is_dir() or all(path.name.endswith(".tmp") for path in run.folder.iterdir()):
        return "new"
    if not (run.folder / "config.yaml").is_file():
        raise ValueError(f"{run.folder} holds files but no config.yaml, so no run: delete it, or choose another --output_dir")
    if differing := runs.differences(run.folder, run.config):
        other = "; ".join(differing)
        raise ValueError(f"{run.folder} holds a run with other flags: {other}. Delete it, or choose another --output_dir")
    return "finished" if (run.folder / run.script.module.RESULT).is_file() else "interrupted"


def evaluated(run: Run) -> bool:
    """Whether the run's report is there and was made with these flags (wherever the folder lay then)."""
    if not run.report.is_file():
        return False
    report = json.loads(run.report.read_text(encoding="utf-8"))
    made_with = report.get("args", {})
    keys = (made_with.keys() | run.judge_config.keys()) - {"model_path", "output_dir"}
    same = all(key in made_with and made_with[key] == run.judge_config.get(key) for key in keys)
    return same and report.get("finished", True)  # not what an interrupted run was like


def commands_of(run: Run) -> dict[str, list[str]]:
    """What is left to do: {"train": words, "eval": words}, less what is finished. An interrupted run goes on where it can."""
    state, commands = state_of(run), {}
    if state != "finished":
        resume = ["--resume"] if state == "interrupted" and "resume" in run.config else []
        commands["train"] = [sys.executable, str(run.script.path), *run.words, *resume]
    if run.judge and (commands or not evaluated(run)):
        commands["eval"] = [sys.executable, str(run.judge.path), *run.judge_words]
    return commands
