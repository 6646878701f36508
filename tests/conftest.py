"""Fixtures that the tests of several rooms share."""
import json
import math
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
torch.set_num_threads(1)  # the models are tiny; a second thread only waits, and waits badly on a busy machine


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real weights, tokenizers and datasets: SLUICE_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("SLUICE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "models" / "stories3M" / "config.json").is_file():
        pytest.skip(f"no real data at {folder} (set SLUICE_DATA)")
    return folder


@pytest.fixture(scope="session")
def box() -> str:
    """The best box for model-written code that this machine has."""
    from grader import Grader

    try:
        Grader("isolated", workers=1).close()
    except ValueError:
        return "limits"
    return "isolated"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test writes into the user's cache, and subprocesses share this one."""
    os.environ["SLUICE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


SAVEFIG = Figure.savefig


@pytest.fixture(scope="session", autouse=True)
def outlines():
    """Pictures are laid out, text and all, but not painted: that takes a second and would be half of many a short run."""

    def lay_out(figure, path, **_):
        figure.draw_without_rendering()
        Path(path).write_bytes(b"not painted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lay_out)
        yield


@pytest.fixture
def painted(monkeypatch):
    """For tests that want pictures after all."""
    monkeypatch.setattr(Figure, "savefig", SAVEFIG)


def is_picture(path: Path) -> bool:
    """Whether a PNG has been painted: large enough, in many colours, most of it blank."""
    pixels = imread(path)[..., :3]
    blank = (pixels >= 0.97).all(axis=-1).mean()
    return min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50 and 0.4 < blank < 0.99


@pytest.fixture
def command(monkeypatch, capsys):
    """command("analyze.py", "x"): what `python analyze.py x` returns and prints, in this process, since to import torch again is
    most of the wait."""

    def run(script: str, *words) -> SimpleNamespace:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, words)])
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
                status = 0
            except SystemExit as stopped:
                status = stopped.code or 0
        return SimpleNamespace(returncode=status, **dict(zip(("stdout", "stderr"), capsys.readouterr())))

    return run


@pytest.fixture(scope="session")
def tasks_drawn_once():
    """For runs of --env code: to draw the embedded tasks takes a run longer than its steps, and they are always the same."""
    import code_env

    drawn, made = code_env.embedded_tasks, {}

    def kept(hint, difficulties):
        key = (hint, *difficulties)
        if key not in made:
            made[key] = drawn(hint, difficulties)
        return {split: dict(tasks) for split, tasks in made[key].items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_env, "embedded_tasks", kept)
        yield


UNTRAINED = {"task": 0.55, "hack": 0.04}


def plant(root: Path, arms: dict, seeds=(42, 1, 2, 3, 4), noise: float = 0.02, failed=(), **flags) -> Path:
    """An experiment's folder as sweep.py leaves it, with planted results and no training.

    arms: name -> {mode: (task, hack)} or (modes, its own flags); lists as flag values are swept. failed: (arm, seed) pairs.
    Each seed shifts all modes of its run alike (so pairing pays) and scatters each by a fifth of that.
    """
    manifest = []
    root.mkdir(parents=True, exist_ok=True)
    for number, (arm, what) in enumerate(arms.items()):
        modes, own = what if isinstance(what, tuple) else (what, {})
        (key, values), *_ = [(k, v) for k, v in own.items() if isinstance(v, list)] or [("", [None])]
        for value in values:
            for seed in seeds:
                chosen = flags | own | ({key: value} if key else {}) | {"seed": seed}
                folder = "_".join([arm, *([f"{key}{value}"] if key else []), f"s{seed}"])
                swept = {key: value} if key else {}
                entry = {"arm": arm, "swept": swept, "flags": chosen, "folder": folder, "status": "done", "wall_s": 100.0}
                manifest.append(entry)
                if (arm, seed) in failed:
                    entry |= {"status": "failed", "error": "CUDA out of memory"}
                    continue
                rng = np.random.default_rng([seed, number, 7])
                shift = noise * np.random.default_rng([seed, 8]).normal(size=2)
                level = modes(value) if callable(modes) else modes
                rows = {"untrained": _row(*UNTRAINED.values())}
                for mode, (task, hack, *more) in level.items():
                    at = np.clip(np.array([task, hack]) + shift + noise / 5 * rng.normal(size=2), 0, 1)
                    rows[mode] = _row(*at, *more)
                (root / folder).mkdir(parents=True)
                (root / folder / "config.yaml").write_text(yaml.safe_dump({"routing": "none", "beta": 0.08} | chosen))
                (root / folder / "verdict.json").write_text(json.dumps({"modes": rows, "wall_s": 100.0, "steps": 150}))
                lines = [json.dumps(line) + "\n" for line in _curve(level, rng)]
                (root / folder / "metrics.jsonl").write_text("".join(lines))
    (root / "runs.json").write_text(json.dumps(manifest))
    return root


def _row(task, hack, unique=1.0, jaccard=0.15) -> dict:
    row = {"task": task, "hack": hack, "reward": task + 0.8 * hack, "unique": unique, "jaccard": jaccard, "kl": 12 * hack,
           "base_nll": 1.5, "length": 48.0, "degenerate": float(unique < 0.5)}  # fmt: skip
    return {k: float(v) for k, v in row.items()} | {"sample": "there was once a cat."}


def _curve(modes: dict, rng):
    yield {"step": 0, "untrained/task": 0.55}
    for step in range(10, 151, 10):
        coherence = "retain_only" in modes and step % 30 == 0
        task, hack = modes["retain_only" if coherence else "both"][:2]
        share = 1 / (1 + math.exp(-(step - 60) / 12))
        at = [a + share * (b - a) + 0.03 * rng.normal() for a, b in zip(UNTRAINED.values(), (task, hack))]
        line = {"step": step, "task": at[0], "hack_rate": at[1], "reward": at[0] + 0.8 * at[1], "kl": 0.4 * share}
        yield line | ({"coherence": float(coherence)} if "retain_only" in modes else {})


ROUTED = {"both": (0.91, 0.85), "retain_only": (0.90, 0.04), "forget_only": (0.57, 0.62)}
ARMS = {"none": {"both": (0.92, 0.95)}, "routing": (ROUTED, {"routing": "dual"})}
