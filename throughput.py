"""Steps a second in all of several runs beside each other: how many to start at once on this machine.

    python throughput.py                                    # 1, 2, 4 and 8 runs of the main job, one thread each
    python throughput.py --runs 1,2,4,8,16 --device cuda    # under CUDA MPS where it can be started
    python throughput.py --train_flags batch_size=256 lr=1.2e-3

The runs are train_grpo.py's own, in processes of their own, that log every step; what is counted is the lines that all of them
write in a window that begins when the last of them has taken its first steps. One JSON object a line. Run nothing beside it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from mps import shared_gpus

MAIN_JOB = {"routing": "dual", "bad_scale": "0"}
NEVER = 10**6  # steps: the runs are stopped from here


@dataclass
class Args:
    runs: str = "1,2,4,8"
    """how many at once, comma-separated"""
    seconds: float = 30.0
    """length of the window"""
    warmup: int = 3
    """steps that every run takes before it"""
    threads: int = 1
    """CPU threads of each run"""
    train_flags: tuple[str, ...] = ()
    """flags of the runs, flag=value ..., besides the main job's"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def command(folder: Path, args: Args, seed: int) -> list[str]:
    """train_grpo.py with the main job's flags, to log each step and do nothing else but step."""
    flags = MAIN_JOB | dict(word.split("=", 1) for word in args.train_flags)
    flags |= {"seed": seed, "device": args.device, "threads": args.threads, "output_dir": folder, "logging_steps": 1,
              "max_steps": NEVER, "save_steps": 0, "eval_routing_steps": 0, "eval_prompts": 1}  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(Path(__file__).with_name("train_grpo.py")), *words]


def steps_of(folder: Path) -> int:
    """Steps that a run has logged so far."""
    path = folder / "metrics.jsonl"
    return sum('"lr"' in line for line in path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def measure(count: int, args: Args, root: Path) -> dict[str, float]:
    """`steps_per_s` of `count` runs in all, `s_a_step` of each. Raises RuntimeError with a run's last line where one ends."""
    folders = [root / f"{count}_{i}" for i in range(count)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TQDM_DISABLE": "1"}
    processes = []
    try:
        for seed, folder in enumerate(folders):
            with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
                words = command(folder, args, seed)
                processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT))

        def wait_until(ready) -> None:
            while not ready():
                for process, folder in zip(processes, folders):
                    if process.poll() is not None:
                        said = folder.with_suffix(".log").read_text(encoding="utf-8").strip().splitlines() or ["nothing"]
                        raise RuntimeError(f"a run ended with status {process.returncode}: {said[-1]}")
                time.sleep(0.02)

        wait_until(lambda: min(map(steps_of, folders)) >= args.warmup)
        start, before = time.perf_counter(), sum(map(steps_of, folders))
        wait_until(lambda: time.perf_counter() - start >= args.seconds)
        seconds, steps = time.perf_counter() - start, sum(map(steps_of, folders)) - before
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    return {"runs": count, "steps_per_s": round(steps / seconds, 3), "s_a_step": round(count * seconds / max(steps, 1), 3)}


def main(args: Args) -> None:
    counts = [int(word) for word in args.runs.split(",")]
    if min(counts) < 1 or args.seconds <= 0 or args.warmup < 1:
        raise ValueError("--runs, --seconds and --warmup must be above 0")
    if odd := [word for word in args.train_flags if "=" not in word]:
        raise ValueError(f"--train_flags {odd[0]}: write flag=value")
    print(json.dumps({"cores": os.cpu_count(), "load_before": os.getloadavg()[0], "device": args.device, "threads": args.threads,
                      "train_flags": args.train_flags}), flush=True)  # fmt: skip
    sharing = shared_gpus(lambda line: print(line, flush=True)) if args.device.startswith("cuda") else nullcontext()
    with sharing, tempfile.TemporaryDirectory() as root:
        for count in counts:
            print(json.dumps(measure(count, args, Path(root))), flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
