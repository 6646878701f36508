"""Run folders: a name that says what differs, a log that repeats bit for bit, checkpoints that survive a kill.

A run folder holds
    config.yaml        the whole resolved config (read it back with `read_config`)
    provenance.yaml    one entry per start: command line, versions, git commit
    train.log          everything printed, samples as "[Sample @ step] text"
    metrics.jsonl      one line of numbers per `log`, the same bytes for the same flags and seed
    timings.jsonl      the keys that begin with "time/", which no two runs share
    events.out...      tensorboard
    checkpoint-N/      tensors.safetensors, state.json, state.safetensors, manifest.json (step, sizes, SHA-256)

    run = Run.open(folder, config, resume=args.resume)
    if run.checkpoint:
        step, tensors, state = load_checkpoint(run.checkpoint)      # model, optimizer, restore_rng(state["rng"], ...)
    with interruptible() as stop:
        for step in range(step + 1, steps + 1):
            ...
            run.log(step, metrics)                                  # everything of a step is logged before it is saved
            if stop.requested or step % save_every == 0:
                run.save_checkpoint(step, tensors, {"optimizer": optimizer.state_dict(), "rng": rng_state({...})})
            if stop.requested:
                run.print("stopped; go on with:", run.resume_command())
                break

What departs from custom: no pickle and no torch.load anywhere (tensors are safetensors, the rest is JSON), a checkpoint becomes
visible by one rename, and it remembers how long the logs were, so that a resumed run cuts them back and ends bytewise equal to
an unbroken one. A file name N.tmp is never content: it is what a killed process left behind.
"""

import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

LOGS = ("metrics.jsonl", "timings.jsonl")


# ---------------------------------------------------------------- names

def _short_number(value: float) -> str:
    """0.001 -> '1e-3', 0.02 -> '0.02', 1.0 -> '1': exact (distinct floats keep distinct names), no zeros to count."""
    if not math.isfinite(value):
        return str(value)
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    if value == 0 or 0.01 <= abs(value) < 1e6:
        return format(Decimal(repr(value)).normalize(), "f")
    mantissa = "".join(map(str, digits))
    exponent += len(mantissa) - 1
    return f"{'-' if sign else ''}{mantissa[0]}{'.' + mantissa[1:] if mantissa[1:] else ''}e{exponent}"


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

class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):  # two fields with one list are two lists in the file
        return True


class _Loader(yaml.SafeLoader):
    pass


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("!tuple", value, flow_style=True))
_Loader.add_constructor("!tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True)))


def _without_paths(value):
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    return type(value)(map(_without_paths, value)) if type(value) in (list, tuple) else value


def _plain(value):
    """The form in which two configs are compared: tuples are lists, paths strings, NaN equals NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return str(value) if isinstance(value, Path) else value


def _to_yaml(value) -> str:
    try:
        return yaml.dump(_without_paths(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    except yaml.representer.RepresenterError as error:
        raise ValueError(f"config holds a value that YAML can't keep: {error}. Use str, int, float, bool, None, list, "
                         "tuple, dict or Path") from error


def read_config(folder) -> dict:
    """The config a run was started with, tuples as tuples. ValueError where `folder` is not a run folder."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml")
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)


def read_metrics(folder, file: str = "metrics.jsonl") -> list[dict]:
    """The lines of a run's metrics (or timings), oldest first. A last line that a kill cut short is left out."""
    path = Path(folder) / file
    if not path.is_file():
        raise ValueError(f"{folder} has no {file}: nothing was logged there, or it is not a run folder")
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is empty or cut short


def _differences(old: dict, new: dict, allow, prefix="") -> list[str]:
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        if prefix + str(key) in allow:
            continue
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            lines += _differences(old[key], new[key], allow, f"{prefix}{key}.")
        elif key not in old or key not in new or _plain(old[key]) != _plain(new[key]):
            was, now = (repr(side[key]) if key in side else "(absent)" for side in (old, new))
            lines.append(f"  {prefix}{key}: {was} in the folder, {now} now")
    return lines


# ---------------------------------------------------------------- files that are whole or not there

def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path, data: bytes | str) -> None:
    """Write `data` (str as UTF-8) so that a reader, or a kill, finds the old file or the new one and nothing between."""
    path = Path(path)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    _fsync(scratch)
    os.replace(scratch, path)
    _fsync(path.parent)


# ---------------------------------------------------------------- any state as tensors + JSON

def pack(obj) -> tuple[dict[str, Tensor], object]:
    """Split nested state into tensors and JSON; `unpack` gives back equal values of equal types, bit for bit.

    Takes dict (any keys that are themselves packable, insertion order kept), list, tuple, Tensor, numpy array, str, int of any size,
    float, bool and None: what `optimizer.state_dict()`, `rng_state(...)` and `random.getstate()` are made of.
    Tensors come back on the CPU, detached; two names of one tensor come back as two tensors.
    Raises ValueError that names the place of anything else.
    """
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor, place: str) -> str:
        name = place
        while name in tensors:  # {"a.b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = tensor
        return name

    def walk(value, place):
        if isinstance(value, Tensor):
            return {"__tensor__": keep(value.detach(), place)}
        if isinstance(value, np.ndarray):
            return {"__ndarray__": keep(torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape), place)}
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"__float__": str(float(value))}
        if type(value) is list:
            return [walk(item, f"{place}.{i}") for i, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"__tuple__": [walk(item, f"{place}.{i}") for i, item in enumerate(value)]}
        if isinstance(value, dict):
            if all(type(key) is str and not key.startswith("__") for key in value):
                return {key: walk(item, f"{place}.{key}") for key, item in value.items()}
            return {"__dict__": [[walk(key, f"{place}.key"), walk(item, f"{place}.{key}")] for key, item in value.items()]}
        raise ValueError(f"a checkpoint can't hold {type(value).__name__} at {place!r}: turn it into tensors, numbers, strings, "
                         "lists, tuples or dicts first")

    return tensors, walk(obj, "state")


def unpack(tensors: dict[str, Tensor], plain):
    """The inverse of `pack`."""
    if isinstance(plain, list):
        return [unpack(tensors, item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if len(plain) == 1:
        (tag, content), = plain.items()
        if tag == "__tensor__":
            return tensors[content]
        if tag == "__ndarray__":
            return tensors[content].numpy()
        if tag == "__float__":
            return float(content)
        if tag == "__tuple__":
            return tuple(unpack(tensors, item) for item in content)
        if tag == "__dict__":
            return {unpack(tensors, key): unpack(tensors, item) for key, item in content}
    return {key: unpack(tensors, item) for key, item in plain.items()}


# ---------------------------------------------------------------- checkpoints

def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # safetensors refuses views and tied tensors: each is written as its own contiguous copy
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checkpoint(folder, step: int, tensors: dict[str, Tensor], state, log_bytes: dict[str, int] | None = None) -> Path:
    """Write `folder`/checkpoint-`step`/ so that it is there complete or not at all, whenever the process is killed.

    Args:
        step: the last step that is contained, >= 0. An older checkpoint of the same step is replaced.
        tensors: name -> tensor, saved as tensors.safetensors under the names given.
        state: anything that `pack` takes.
        log_bytes: length of each log at this moment, for `Run.open(resume=True)`.
    """
    if step < 0:
        raise ValueError(f"checkpoint step {step} is negative")
    final = Path(folder) / f"checkpoint-{step}"
    scratch, replaced = (final.with_name(f"{final.name}.{word}.tmp") for word in ("new", "replaced"))
    state_tensors, plain = pack(state)  # complains before anything is written
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    _save_tensors(tensors, scratch / "tensors.safetensors")
    _save_tensors(state_tensors, scratch / "state.safetensors")
    (scratch / "state.json").write_text(json.dumps(plain), encoding="utf-8")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(scratch.iterdir())}
    manifest = {"step": step, "files": files, "log_bytes": log_bytes or {}}
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in scratch.iterdir():
        _fsync(path)
    _fsync(scratch)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)  # `_recover` puts it back if the process dies before the next line
    os.rename(scratch, final)
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _recover(folder: Path) -> None:
    """Tidy what a killed process left: put back a checkpoint whose replacement never came, delete scratch."""
    for replaced in folder.glob("checkpoint-*.replaced.tmp"):
        final = folder / replaced.name.removesuffix(".replaced.tmp")
        if not final.exists() and (replaced / "manifest.json").is_file():
            os.rename(replaced, final)
    for path in folder.glob("*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoints(folder) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first. Scratch and folders without a manifest don't count."""
    steps = {path: int(match[1]) for path in Path(folder).glob("checkpoint-*")
             if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "manifest.json").is_file()}
    return sorted(steps, key=steps.get)


def latest_checkpoint(folder) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return (checkpoints(folder) or [None])[-1]


def _manifest(path: Path) -> dict:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return {"step": manifest["step"], "files": manifest["files"], "log_bytes": manifest["log_bytes"]}
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a complete checkpoint: it has no manifest.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'manifest.json'} is damaged ({error}): delete {path} and resume from an older one") from error


def load_checkpoint(path) -> tuple[int, dict[str, Tensor], object]:
    """Read checkpoint-N/ -> (step, tensors, state), all on the CPU. ValueError names a file that is missing or damaged."""
    path = Path(path)
    manifest = _manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: delete {path} and resume from an older checkpoint")
        if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise ValueError(f"{file} is damaged ({file.stat().st_size} bytes, {expected['bytes']} expected, or another SHA-256): "
                             f"delete {path} and resume from an older checkpoint")
    plain = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return manifest["step"], load_file(path / "tensors.safetensors"), unpack(load_file(path / "state.safetensors"), plain)


# ---------------------------------------------------------------- random numbers

def _generator_state(name: str, generator):
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    raise ValueError(f"generator {name!r} is a {type(generator).__name__}: give a torch.Generator, numpy.random.Generator "
                     "or random.Random")


def rng_state(generators: dict | None = None) -> dict:
    """Everything random, ready for a checkpoint: torch (CPU, and every GPU in use), numpy, python, and named generators.

    `generators`: name -> torch.Generator (any device), numpy.random.Generator or random.Random.
    """
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate(), "cuda": None}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    state["generators"] = {}
    for name, generator in (generators or {}).items():
        state["generators"][name] = _generator_state(name, generator)
    return state


def restore_rng(state: dict, generators: dict | None = None) -> None:
    """Set everything random back to `state`. The named generators must be those that were saved, else ValueError."""
    generators = generators or {}
    if set(generators) != set(state["generators"]):
        raise ValueError(f"the state holds generators {sorted(state['generators'])}, asked for {sorted(generators)}: "
                         "restore exactly those that were saved")
    if state["cuda"] is not None:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found != len(state["cuda"]):
            raise ValueError(f"the state was saved with {len(state['cuda'])} GPUs, this process sees {found}: resume on the same "
                             "number (CUDA_VISIBLE_DEVICES)")
        torch.cuda.set_rng_state_all(state["cuda"])
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    for name, generator in generators.items():
        saved = state["generators"][name]
        if isinstance(generator, torch.Generator):
            generator.set_state(saved)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = saved
        else:
            generator.setstate(saved)


@contextmanager
def preserve_rng(generators: dict | None = None):
    """What runs inside may draw or seed as it likes; afterwards everything random stands where it stood before."""
    state = rng_state(generators)
    try:
        yield
    finally:
        restore_rng(state, generators)


# ---------------------------------------------------------------- Ctrl-C

@contextmanager
def interruptible():
    """`with interruptible() as stop`: the first Ctrl-C sets `stop.requested`, the second raises KeyboardInterrupt.

    The loop looks at the end of a step, saves and leaves, so that no half-done step is lost or saved. Signals reach the main
    thread alone: elsewhere `requested` stays False.
    """
    stop = SimpleNamespace(requested=False)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

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
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)


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


class Run:
    """An open run folder. Made by `Run.open`; `checkpoint` is what to resume from, or None; `step` its step, or 0."""

    def __init__(self, folder: Path, config: dict, checkpoint: Path | None, step: int, keep_last: int | None, tensorboard: bool):
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
             keep_last: int | None = 2, tensorboard: bool = True) -> Self:
        """Start a run in a new folder, or go on in an old one.

        Args:
            folder: made if it is not there.
            config: the whole resolved config, YAML-able values.
            resume: continue from the last complete checkpoint; with none there the run starts anew and says so.
            allow: fields (dotted where nested) that may differ from the folder's config on resume, such as the number of steps.
            keep_last: checkpoints kept; None keeps all.
        Raises:
            ValueError: the folder holds something and `resume` is off; the config differs; the folder is no run folder.
        """
        folder = Path(folder)
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}: keep at least 1 checkpoint, or None for all")
        config_text = _to_yaml(config)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: choose another --output_dir")
        used = folder.exists() and any(not path.name.endswith(".tmp") for path in folder.iterdir())
        if used and not resume:
            raise ValueError(f"{folder} already holds a run: --resume goes on with it, another --output_dir (or seed) starts "
                             "beside it, or delete it first")
        checkpoint, step, entries, message = None, 0, [], None
        if used and (differing := _differences(read_config(folder), _without_paths(config), allow)):
            raise ValueError(f"can't resume {folder} with another config:\n" + "\n".join(differing) +
                             "\nGive the folder's values, or start a new run under another --output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        _recover(folder)
        if used:
            if (folder / "provenance.yaml").is_file():
                entries = yaml.load((folder / "provenance.yaml").read_text(encoding="utf-8"), Loader=_Loader)
            checkpoint = latest_checkpoint(folder)
        if checkpoint:
            manifest = _manifest(checkpoint)
            step = manifest["step"]
            _cut_logs(folder, manifest["log_bytes"])
            message = f"resuming {folder} from step {step}"
        elif resume:
            for path in [*(folder / name for name in LOGS), *folder.glob("events.out.tfevents*")]:
                path.unlink(missing_ok=True)
            message = f"nothing to resume in {folder} (no complete checkpoint): starting at step 0"
        atomic_write(folder / "config.yaml", config_text)
        atomic_write(folder / "provenance.yaml", _to_yaml([*entries, _provenance(checkpoint.name if checkpoint else None)]))
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
        for old in checkpoints(self.folder)[:-self.keep_last] if self.keep_last else []:
            if old != path:
                doomed = old.with_name(f"{old.name}.old.tmp")  # renamed first: a half-deleted one must not look complete
                os.rename(old, doomed)
                shutil.rmtree(doomed)
        return path

    def latest_checkpoint(self) -> Path | None:
        return latest_checkpoint(self.folder)

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
