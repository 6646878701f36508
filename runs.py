"""Run folders: a name that says what differs, and a log that repeats bit for bit.

A run folder holds
    config.yaml        the whole resolved config (read it back with `read_config`)
    provenance.yaml    one entry per start: command line, versions, git commit
    train.log          everything printed, samples as "[Sample @ step] text"
    metrics.jsonl      one line of numbers per `log`, the same bytes for the same flags and seed
    timings.jsonl      the keys that begin with "time/", which no two runs share
    events.out...      tensorboard
    checkpoint-N/      see checkpoints.py

    run = Run.open(folder, config, resume=args.resume)
    if run.checkpoint:
        step, tensors, state = load_checkpoint(run.checkpoint)      # model, optimizer, restore_rng(state["rng"])
    with interruptible() as stop:
        for step in range(step + 1, steps + 1):
            ...
            run.log(step, metrics)                                  # everything of a step is logged before it is saved
            if stop.requested or step % save_every == 0:
                run.save_checkpoint(step, tensors, {"optimizer": optimizer.state_dict(), "rng": rng_state()})
            if stop.requested:
                run.print("stopped; go on with:", run.resume_command())
                break

A checkpoint remembers how long the logs were, so that a resumed run cuts them back and ends bytewise equal to an unbroken one.
"""
import hashlib
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from checkpoints import (
    atomic_write,
    complete_checkpoints,
    latest_checkpoint,
    read_manifest,
    recover,
    remove_checkpoint,
    write_checkpoint,
)

LOGS = ("metrics.jsonl", "timings.jsonl")


# ---------------------------------------------------------------- names

def _short_number(value: float) -> str:
    """0.001 -> '1e-3', 0.02 -> '0.02', 1.0 -> '1': exact (distinct floats keep distinct names), no zeros to count."""
    if value == 0 or not math.isfinite(value) or 0.01 <= abs(value) < 1e6:
        return repr(value).removesuffix(".0")
    return f"{Decimal(repr(value)).normalize():e}".replace("e+", "e")


def _spell(value) -> str:
    """A config value in file-name characters; whatever the cleaning loses comes back as a short hash."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _short_number(value)
    if isinstance(value, (list, tuple)) and value:
        return "+".join(_spell(item) for item in value)
    text = str(value)
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", text.rstrip("/").rsplit("/", 1)[-1] if isinstance(value, (str, Path)) else "")
    if name == text and name:
        return name
    return f"{name[:40].strip('-.')}-{hashlib.md5(text.encode()).hexdigest()[:6]}".lstrip("-")


def run_name(config: dict, defaults: dict, lead=("reward", "routing", "adapter", "lr", "beta"),
             ignore=frozenset({"output_dir", "resume"})) -> str:
    """`<reward>_<routing>_<adapter>_lr<lr>_b<beta>_<every other field that differs from its default>_s<seed>`.

    Args:
        config: the resolved config, field -> value. Lead fields that it lacks are left out.
        defaults: field -> default; a field without a default always appears.
        lead: fields that always appear, in this order: strings bare, `lr` and `beta` as lr1e-3 and b0.02, others as key + value.
        ignore: fields that do not change the result.
    Returns:
        A file name of at most 200 characters. A bool reads `key` or `no_key`, None `keynone`, a path its last part and a hash.
    """
    parts = []
    for key in lead:
        if key in config:
            value = config[key]
            bare = isinstance(value, str) and value
            parts.append(_spell(value) if bare else {"beta": "b"}.get(key, key) + _spell(value))
    for key, value in config.items():
        if key in lead or key in ignore or key == "seed" or (key in defaults and _plain(value) == _plain(defaults[key])):
            continue
        parts.append(("" if value else "no_") + key if isinstance(value, bool) else key + _spell(value))
    seed = [f"s{_spell(config['seed'])}"] if "seed" in config else []
    name = "_".join(parts + seed)
    if len(name) > 200:  # file systems stop at 255 bytes, and the event file's name needs no part of it
        digest = hashlib.md5(name.encode()).hexdigest()[:8]
        name = "_".join(["_".join(parts)[:180], digest] + seed)
    return name or "run"


# ---------------------------------------------------------------- config as YAML

def _plain(value):
    """A config as YAML holds it, and as two configs are compared: tuples are lists, paths strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(value) -> str:
    """A config as the text of its file. ValueError for a value that YAML can't keep."""
    try:
        return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=120)
    except yaml.representer.RepresenterError as error:
        raise ValueError(f"config holds a value that YAML can't keep: {error}. Use str, int, float, bool, None, list, "
                         "tuple, dict or Path") from error


def read_config(folder) -> dict:
    """The config a run was started with, tuples as lists. ValueError where `folder` is not a run folder."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_metrics(folder, file: str = "metrics.jsonl") -> list[dict]:
    """The lines of a run's metrics (or timings), oldest first. A last line that a kill cut short is left out."""
    path = Path(folder) / file
    if not path.is_file():
        raise ValueError(f"{folder} has no {file}: nothing was logged there, or it is not a run folder")
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is empty or cut short


def differences(folder, config: dict, allow=frozenset({"resume", "output_dir"})) -> list[str]:
    """"lr: 0.001 in the folder, 0.002 now", for every field but those in `allow` in which a run folder's config differs."""
    old, new, lines = read_config(folder), _plain(config), []
    for key in old | new:
        if key not in allow and (key not in old or key not in new or old[key] != new[key]):
            was, now = (repr(side[key]) if key in side else "(absent)" for side in (old, new))
            lines.append(f"{key}: {was} in the folder, {now} now")
    return lines


# ---------------------------------------------------------------- Ctrl-C

@contextmanager
def interruptible():
    """`with interruptible() as stop`: the first Ctrl-C sets `stop.requested`, the second raises KeyboardInterrupt.

    The loop looks at the end of a step, saves and leaves, so that no half-done step is lost or saved.
    """
    stop = SimpleNamespace(requested=False)

    def handler(signum, frame):
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        # not print: the signal may have come in the middle of one, and buffered output can't be entered twice
        os.write(2, b"\nstopping at the end of this step; Ctrl-C again stops at once and loses it\n")

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


# ---------------------------------------------------------------- the run

def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), *words], check=False,
                              capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine: the entry says null
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _provenance(resumed_from: str | None) -> dict:
    return {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "resumed_from": resumed_from,
            "command": shlex.join([sys.executable, *sys.argv]), "git_commit": _git("rev-parse", "HEAD"),
            "git_modified": None if (changed := _git("status", "--porcelain")) is None else bool(changed),
            "python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "platform": platform.platform(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def _number(value, key: str, step: int) -> float | int | bool:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if math.prod(value.shape) != 1:
            raise ValueError(f"metric {key!r} at step {step} has shape {tuple(value.shape)}: log one number")
        value = value.item()
    is_number = isinstance(value, (bool, int, float))
    if not is_number:
        raise ValueError(f"metric {key!r} at step {step} is {value!r} ({type(value).__name__}): log one number")
    if not math.isfinite(value):
        raise ValueError(f"metric {key!r} at step {step} is {value}: the run has diverged, or a mean was taken over nothing; "
                         "leave out a metric that is not defined")
    return value


def check_same_config(folder: Path, config: dict, allow=frozenset({"resume", "output_dir"})) -> None:
    """Raises ValueError, in one line, unless a run folder was made with this config, but for the fields in `allow`."""
    if differing := differences(folder, config, allow):
        raise ValueError(f"can't resume {folder} with other flags: {'; '.join(differing)}. Give the folder's own, or start a new "
                         "run under another --output_dir")


class Run:
    """An open run folder. Made by `Run.open`; `checkpoint` is what to resume from, or None; `step` its step, or 0."""

    def __init__(self, folder: Path, config: dict, checkpoint: Path | None, step: int, keep_last: int, tensorboard: bool):
        self.folder, self.config, self.checkpoint, self.step, self.keep_last = folder, config, checkpoint, step, keep_last
        self._last_step = step
        self._train_log = open(folder / "train.log", "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self._logs = {name: open(folder / name, "ab") for name in LOGS}  # noqa: SIM115
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # two seconds to import
            self._board = SummaryWriter(folder, purge_step=step + 1 if checkpoint else None)

    @classmethod
    def open(cls, folder, config: dict, resume: bool = False, allow=frozenset({"resume", "output_dir"}),
             keep_last: int = 2, tensorboard: bool = True) -> Self:
        """Start a run in a new folder, or go on in an old one.

        Args:
            folder: made if it is not there.
            config: the whole resolved config, YAML-able values.
            resume: continue from the last complete checkpoint; with none there the run starts anew and says so.
            allow: fields that may differ from the folder's config on resume, such as the number of steps.
            keep_last: checkpoints kept; 0 keeps all.
        Raises:
            ValueError: the folder holds something and `resume` is off; the config differs; the folder is no run folder.
        """
        folder = Path(folder)
        config_text = to_yaml(config)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: choose another --output_dir")
        used = folder.exists() and any(not path.name.endswith(".tmp") for path in folder.iterdir())
        if used and not resume:
            raise ValueError(f"{folder} already holds a run: --resume goes on with it, another --output_dir (or seed) starts "
                             "beside it, or delete it first")
        checkpoint, step, entries, message = None, 0, [], None
        if used:
            check_same_config(folder, config, allow)
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        if used:
            if (folder / "provenance.yaml").is_file():
                entries = yaml.safe_load((folder / "provenance.yaml").read_text(encoding="utf-8"))
            checkpoint = latest_checkpoint(folder)
        if checkpoint:
            manifest = read_manifest(checkpoint)
            step = manifest["step"]
            _cut_logs(folder, manifest["log_bytes"])
            message = f"resuming {folder} from step {step}"
        elif resume:
            for path in [*(folder / name for name in LOGS), *folder.glob("events.out.tfevents*")]:
                path.unlink(missing_ok=True)
            message = f"nothing to resume in {folder} (no complete checkpoint): starting at step 0"
        atomic_write(folder / "config.yaml", config_text)
        atomic_write(folder / "provenance.yaml", to_yaml([*entries, _provenance(checkpoint.name if checkpoint else None)]))
        run = cls(folder, config, checkpoint, step, keep_last, tensorboard)
        if message:
            run.print(message)
        return run

    def print(self, *values, sep: str = " ") -> None:
        """To stdout (above any progress bar) and to train.log."""
        text = sep.join(map(str, values))
        tqdm.write(text, file=sys.stdout)
        self._train_log.write(text + "\n")
        self._train_log.flush()

    def log(self, step: int, metrics: dict) -> None:
        """One line of numbers to metrics.jsonl (keys sorted, floats exact) and to tensorboard; "time/..." to timings.jsonl.

        Values are numbers or one-element tensors or arrays. Several calls may share a step; steps never go back. Log a
        step before saving it: a resumed run cuts the logs back to what stood there when its checkpoint was written.
        Raises ValueError for a value that is not one finite number (nothing of the call is written), or a step that goes back.
        """
        if step < self._last_step:
            raise ValueError(f"log of step {step} after step {self._last_step}: steps never go back")
        numbers = {key: _number(value, key, step) for key, value in sorted(metrics.items())}
        if "step" in numbers:
            raise ValueError("a metric can't be called 'step': that is the line's own first key")
        self._last_step = step
        for name, timing in zip(LOGS, (False, True)):
            part = {key: value for key, value in numbers.items() if key.startswith("time/") == timing}
            if part:
                self._logs[name].write((json.dumps({"step": step, **part}) + "\n").encode())
                self._logs[name].flush()
        if self._board:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)

    def sample(self, step: int, text: str) -> None:
        """A generated text, on one line of train.log (line breaks written as \\n) and in tensorboard."""
        self.print(f"[Sample @ {step}] " + text.replace("\r", "\\r").replace("\n", "\\n"))
        if self._board:
            self._board.add_text("sample", text, step)

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], state) -> Path:
        """Write checkpoint-`step`/ (see `write_checkpoint`), then remove all but the newest `keep_last`."""
        for file in self._logs.values():
            os.fsync(file.fileno())  # the lines that the checkpoint counts on are on the disk before it is
        path = write_checkpoint(self.folder, step, tensors, state, {name: file.tell() for name, file in self._logs.items()})
        for old in complete_checkpoints(self.folder)[: -self.keep_last]:  # none where keep_last is 0
            if old != path:
                remove_checkpoint(old)
        return path

    def resume_command(self) -> str:
        """The command line that goes on with this run."""
        words = ["python", *sys.argv]
        return shlex.join(words if "--resume" in words else [*words, "--resume"])

    def close(self) -> None:
        for file in [self._train_log, *self._logs.values()]:
            file.close()
        if self._board:
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _cut_logs(folder: Path, log_bytes: dict[str, int]) -> None:
    """Cut metrics and timings back to their length at the checkpoint: the steps after it will be logged again."""
    for name, length in log_bytes.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            raise ValueError(f"{path} has {size} bytes, {length} when the checkpoint was written: it was edited or lost, and the "
                             "run can't be resumed to the same log. Restore it, or start a new run under another --output_dir")
        if path.exists():
            os.truncate(path, length)
