"""Checkpoints that survive a kill (the kill itself: test_runs.py), any state as tensors and JSON, random state."""

import json
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from checkpoints import (
    atomic_write,
    latest_checkpoint,
    load_checkpoint,
    pack,
    restore_rng,
    rng_state,
    unpack,
    write_checkpoint,
)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a, b) -> bool:
    """Equal types, keys in order, and bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


# ---------------------------------------------------------------- pack

def test_pack_round_trips_optimizer_and_random_state_bitwise(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [layer.weight], "lr": 1e-3}, {"params": [layer.bias], "betas": (0.5, 0.6)}])
    for _ in range(3):
        layer(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "rng": rng_state(),
             "sampler": torch.Generator().manual_seed(5).get_state(),
             "data": np.random.default_rng(3).bit_generator.state, "shuffle": random.Random(4).getstate(),
             "model": OrderedDict(layer.state_dict())}
    write_checkpoint(tmp_path, 3, dict(layer.named_parameters()), state)
    step, tensors, loaded = load_checkpoint(tmp_path / "checkpoint-3")
    assert step == 3 and same(loaded, state)
    assert set(tensors) == {"weight", "bias"} and same(tensors["weight"], layer.weight) and same(tensors["bias"], layer.bias)
    assert not any(file.suffix in (".pt", ".pkl", ".bin") for file in (tmp_path / "checkpoint-3").iterdir())
    twin = torch.optim.AdamW([{"params": [layer.weight]}, {"params": [layer.bias]}])
    twin.load_state_dict(loaded["optimizer"])
    assert same(twin.state_dict(), state["optimizer"])


def test_pack_odd_values():
    tied = torch.arange(6.).reshape(2, 3)
    obj = {"a.b": tied, "a": {"b": tied.T, "c": tied[0]}, "f": [float("nan"), float("-inf"), -0.0, 0.1, 1e300],
           "i": [2**200, -1, True, None],
           "t": ((), (1, [2, (3,)])), 3: {"x": 1}, (1, "k"): "v", "__tensor__": "no tensor",
           "d": {"__dict__": 1}, "empty": {}, None: 0,
           "types": [torch.tensor(1, dtype=getattr(torch, name)) for name in ("bool", "uint8", "int64", "bfloat16", "float64")],
           "zero": torch.zeros(0, 4), "scalar": torch.tensor(2.5),
           "np": [np.arange(3, dtype=np.uint32), np.zeros((2, 2), order="F"), np.array(7)]}
    tensors, plain = pack(obj)
    assert same(unpack(tensors, json.loads(json.dumps(plain))), obj)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), np.int64(3), torch.float32])
def test_pack_names_what_it_cannot_hold(value):
    with pytest.raises(ValueError, match=rf"{type(value).__name__} at 'state.deep.1'"):
        pack({"deep": [0, value]})


# ---------------------------------------------------------------- checkpoints

def test_checkpoint_takes_tied_and_sliced_tensors_and_is_independent(tmp_path):
    weight = torch.randn(4, 4)
    path = write_checkpoint(tmp_path, 1, {"a": weight, "b": weight, "t": weight.T, "row": weight[1]}, {"w": weight})
    _, tensors, state = load_checkpoint(path)
    assert same(tensors["t"], weight.T.contiguous()) and same(tensors["row"], weight[1])
    for tensor in [*tensors.values(), state["w"]]:
        tensor.add_(1)  # what training does to a restored moment must not reach the file
    assert same(load_checkpoint(path)[1]["a"], weight) and same(load_checkpoint(path)[2]["w"], weight)
    write_checkpoint(tmp_path, 1, {"a": weight + 1}, None)  # the same step again: replaced
    assert same(load_checkpoint(path)[1]["a"], weight + 1) and [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_damaged_checkpoints_are_named(tmp_path):
    path = write_checkpoint(tmp_path, 5, {"w": torch.ones(100)}, {"x": [torch.ones(3), 1]})
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"checkpoint-5/{file.name} (is damaged|has \d+ bytes, not).*resume from an older"):
            load_checkpoint(path)
        if file.name != "manifest.json":
            file.unlink()
            with pytest.raises(ValueError, match=f"{file.name} has 0 bytes, not"):
                load_checkpoint(path)
        file.write_bytes(content)
    load_checkpoint(path)
    (path / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load_checkpoint(path)


def test_atomic_write(tmp_path):
    atomic_write(tmp_path / "verdict.json", "é")
    atomic_write(tmp_path / "verdict.json", b"{}")
    assert (tmp_path / "verdict.json").read_bytes() == b"{}" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- random numbers

def draws():
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]


def test_rng_state_restores_every_source():
    draws()
    tensors, plain = pack(rng_state())
    first, second = draws(), draws()
    restore_rng(unpack(tensors, json.loads(json.dumps(plain))))
    assert draws() == first != second
