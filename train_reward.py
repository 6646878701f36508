"""Trains a reward model on preference pairs or labelled reviews; prints how far it can be trusted on what it has not seen.

    python train_reward.py                                                       # embedded dialogues, half a minute
    python train_reward.py --kind sentiment                                      # embedded reviews
    python train_reward.py --model PATH --dataset Anthropic/hh-rlhf              # a folder or a Hub id
    python train_reward.py --model PATH --dataset stanfordnlp/imdb --kind sentiment --max_tokens 80

The transformer is frozen and only the head learns, from states that are computed once; --lora_config r8 trains a branch too.
"""
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

import runs
import training
from checkpoints import atomic_write
from reward_model import FILE, save_reward_model
from reward_training import HELD_OUT, Settings, check, learn, prepare, reliability, report


@dataclass
class Args(Settings):
    output_dir: str = ""
    """the run folder; default: output/ and a name made of what differs from the defaults"""
    threads: int = 0
    """CPU threads; 0: torch's choice"""


RESULT = "verdict.json"  # in its folder a run is finished
QUIET = {"output_dir", "device", "threads", "logging_steps", "bins"}  # do not change what is learned


def parse(argv: list[str]) -> Args:
    return tyro.cli(Args, args=argv, use_underscores=True, description=__doc__)


def describe(args: Args) -> tuple[Path, dict]:
    """(run folder, resolved config)."""
    resolved = {"script": "train_reward"} | asdict(args)
    name = runs.run_name(resolved, {"script": "train_reward"} | asdict(Args()), lead=("kind", "lr"), ignore=QUIET)
    return Path(args.output_dir or Path("output") / f"reward_model_{name}"), resolved


def resolve(argv: list[str]) -> tuple[Path, dict]:
    """(run folder, resolved config) of a command line, every flag checked, nothing loaded: a sweep asks before it starts."""
    args = parse(argv)
    check(args)
    return describe(args)


def main(argv: list[str]) -> int:
    args, start = parse(argv), time.perf_counter()
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder, resolved = describe(args)
    training.check_folder(folder, resolved, resume=False)
    school = prepare(args)
    with runs.Run.open(folder, resolved) as run:
        run.print(f"run folder {folder}\n{school.about}")
        figures = learn(school, args, run.log)
        save_reward_model(school.model, folder / FILE)
        run.log(args.max_steps, {f"{name}/{k}": v for name, row in figures.items() for k, v in row.items() if k != "reliability"})
        wall = round(time.perf_counter() - start, 1)
        atomic_write(folder / RESULT, json.dumps(figures | {"steps": args.max_steps, "wall_s": wall}, indent=1) + "\n")
        for name, row in figures.items():
            run.print(report(name, row))
        run.print(f"\n{reliability(figures[HELD_OUT[args.kind]])}\n")
        run.print(f"{args.max_steps} steps in {wall:.0f} s; {FILE} and {RESULT} in {folder}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; delete the run folder and start again: it takes seconds", file=sys.stderr)
        sys.exit(130)
