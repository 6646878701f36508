"""Checkpoints that survive a kill, and everything random in a form that they can hold.

    path = write_checkpoint(folder, step, tensors, {"optimizer": optimizer.state_dict(), "rng": rng_state()})
    step, tensors, state = load_checkpoint(latest_checkpoint(folder))       # then restore_rng(state["rng"])

checkpoint-N/ holds tensors.safetensors, state.json, state.safetensors and manifest.json (step, sizes, length of the logs).

What departs from custom: no pickle and no torch.load anywhere (tensors are safetensors, the rest is JSON), and a checkpoint
becomes visible by one rename. A file name N.tmp is never content: it is what a killed process left behind.
"""
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# ---------------------------------------------------------------- files that are whole or not there


def fsync(path: Path) -> None:
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
    fsync(scratch)
    os.replace(scratch, path)
    fsync(path.parent)


# ---------------------------------------------------------------- any state as tensors + JSON


def pack(obj) -> tuple[dict[str, Tensor], object]:
    """Split nested state into tensors and JSON; `unpack` gives back equal values of equal types, bit for bit.

    Takes dict (any keys that are themselves packable, insertion order kept), list, tuple, Tensor, numpy array, str, int, float,
    bool and None: what `optimizer.state_dict()`, `rng_state()` and `random.getstate()` are made of.
    Tensors come back on the CPU, detached; two names of one tensor come back as two tensors.
    Raises ValueError that names the place of anything else.
    """
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor, place: str) -> str:
        name = f"{len(tensors)}.{place}"  # {"a.b": x, "a": {"b": y}} has one place twice
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
            return float(value)
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
            return tensors[content].clone()  # in a file's buffer it lies anywhere; products round by how a tensor is aligned
        if tag == "__ndarray__":
            return tensors[content].numpy()
        if tag == "__tuple__":
            return tuple(unpack(tensors, item) for item in content)
        if tag == "__dict__":
            return {unpack(tensors, key): unpack(tensors, item) for key, item in content}
    return {key: unpack(tensors, item) for key, item in plain.items()}


# ---------------------------------------------------------------- checkpoints


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # safetensors refuses views and tied tensors: each is written as its own contiguous copy
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)


def write_checkpoint(folder, step: int, tensors: dict[str, Tensor], state, log_bytes: dict[str, int] | None = None) -> Path:
    """Write `folder`/checkpoint-`step`/ so that it is there complete or not at all, whenever the process is killed.

    Args:
        step: the last step that is contained. An older checkpoint of the same step is replaced.
        tensors: name -> tensor, saved as tensors.safetensors under the names given.
        state: anything that `pack` takes.
        log_bytes: length of each log at this moment, for `Run.open(resume=True)`.
    """
    final = Path(folder) / f"checkpoint-{step}"
    scratch, replaced = (final.with_name(f"{final.name}.{word}.tmp") for word in ("new", "replaced"))
    state_tensors, plain = pack(state)  # complains before anything is written
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    _save_tensors(tensors, scratch / "tensors.safetensors")
    _save_tensors(state_tensors, scratch / "state.safetensors")
    (scratch / "state.json").write_text(json.dumps(plain), encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
    manifest = {"step": step, "bytes": sizes, "log_bytes": log_bytes or {}}
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in scratch.iterdir():
        fsync(path)
    fsync(scratch)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)  # `recover` puts it back if the process dies before the next line
    os.rename(scratch, final)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def recover(folder: Path) -> None:
    """Tidy what a killed process left: put back a checkpoint whose replacement never came, delete scratch."""
    for replaced in folder.glob("checkpoint-*.replaced.tmp"):
        final = folder / replaced.name.removesuffix(".replaced.tmp")
        if not final.exists() and (replaced / "manifest.json").is_file():
            os.rename(replaced, final)
    for path in folder.glob("*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def complete_checkpoints(folder) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first. Scratch and folders without a manifest don't count."""
    steps = {path: int(match[1]) for path in Path(folder).glob("checkpoint-*")
             if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "manifest.json").is_file()}
    return sorted(steps, key=steps.get)


def latest_checkpoint(folder) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return (complete_checkpoints(folder) or [None])[-1]


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; renamed first, since a half-deleted one must not look complete."""
    doomed = path.with_name(f"{path.name}.old.tmp")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def read_manifest(path: Path) -> dict:
    """{"step", "bytes", "log_bytes"} of a checkpoint. Raises ValueError where it is missing or damaged."""
    try:
        return json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a complete checkpoint: it has no manifest.json") from error
    except ValueError as error:
        raise ValueError(f"{path / 'manifest.json'} is damaged ({error}): delete {path} and resume from an older one") from error


def load_checkpoint(path) -> tuple[int, dict[str, Tensor], object]:
    """Read checkpoint-N/ -> (step, tensors, state), all on the CPU. ValueError names a file that is missing or cut short."""
    path = Path(path)
    manifest = read_manifest(path)
    for name, expected in manifest["bytes"].items():
        size = (path / name).stat().st_size if (path / name).is_file() else 0
        if size != expected:
            raise ValueError(f"{path / name} has {size} bytes, not {expected}: delete {path} and resume from an older checkpoint")
    plain = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return manifest["step"], load_file(path / "tensors.safetensors"), unpack(load_file(path / "state.safetensors"), plain)


# ---------------------------------------------------------------- random numbers


def rng_state() -> dict:
    """The global random state, ready for a checkpoint: torch (CPU, and every GPU in use), numpy and python.

    A generator of one's own is seeded by (seed, step) where it is used, so that it has no state to save.
    """
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate(), "cuda": None}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: dict) -> None:
    """Set everything random back to `state`. Raises ValueError where it was saved with another number of GPUs."""
    if state["cuda"] is not None:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found != len(state["cuda"]):
            raise ValueError(f"the state was saved with {len(state['cuda'])} GPUs, this process sees {found}: resume on the same "
                             "number (CUDA_VISIBLE_DEVICES)")
        torch.cuda.set_rng_state_all(state["cuda"])
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
