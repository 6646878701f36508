"""A train script for the tests of sweeps: a run folder in milliseconds, which succeeds, fails or waits as its flags say."""

import json
import os
import signal
import sys
import time
from pathlib import Path

RESULT, EVALUATE = "verdict.json", "fake_eval.py"
DEFAULTS = {"seed": 0, "beta": 0.1, "task": 0.5, "text": "", "behave": "end", "verbose": False, "max_steps": 3, "resume": False,
            "output_dir": "", "threads": 0, "device": "cpu"}  # fmt: skip


def parse(argv, defaults):
    values, words = dict(defaults), list(argv)
    while words:
        name, sign, value = words.pop(0).removeprefix("--").partition("=")
        flag = name.removeprefix("no_")
        if flag not in defaults:
            raise ValueError(f"unknown flag --{name}")
        if isinstance(defaults[flag], bool):
            values[flag] = not name.startswith("no_")
        else:
            values[flag] = type(defaults[flag])(value if sign else words.pop(0))
    return values


def resolve(argv):
    config = parse(argv, DEFAULTS)
    if config["beta"] < 0:
        raise ValueError(f"--beta must be at least 0, not {config['beta']}")
    return Path(config["output_dir"] or "default"), config


def main(argv):
    folder, config = resolve(argv)
    go = folder.parent / "go"  # for what waits
    if folder.exists() and not config["resume"]:
        raise ValueError(f"{folder} already holds a run")
    folder.mkdir(parents=True, exist_ok=True)
    saved = folder / "checkpoint"
    start = int(saved.read_text()) if saved.exists() else 0
    (folder / "config.yaml").write_text(json.dumps(config))
    stops = []
    signal.signal(signal.SIGINT, lambda *_: stops.append(1))
    with open(folder / "metrics.jsonl", "a") as log:
        for step in range(start + 1, config["max_steps"] + 1):
            log.write(json.dumps({"step": step, "reward": step / 10}) + "\n")
            log.flush()
            while config["behave"] == "wait" and not go.exists() and not stops:
                time.sleep(0.01)
            if stops:
                saved.write_text(str(step))
                return 130
            if config["behave"] == "fail" and step == 2 and not go.exists():
                raise RuntimeError("the loss is nan")
    both = {"task": config["task"] + config["beta"] * config["seed"], "hack": 1.0, "degenerate": float(config["seed"] == 2)}
    rows = {"untrained": {"task": 0.3, "hack": 0.0, "length": 9.0, "sample": "x"}, "both": both | {"length": 9.0}}
    notes = {"resumed_from": start, "threads": os.environ.get("OMP_NUM_THREADS"), "pid": os.getpid()}
    (folder / RESULT).write_text(json.dumps({"modes": rows, "wall_s": 1.5} | notes))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
