"""Fresh samples from a finished or interrupted run, judged again: verdict table, diversity, samples, reward history.

    python eval_run.py --model_path output/RUN --n_samples 20
    python eval_run.py --model_path output/RUN/checkpoint-100 --eval_rewards sentence_length_5,happy_count

What the run was (model, dataset, reward, adapter) is read from its config.yaml. Always read the samples: the degeneracy
flag (unique < .5 or Jaccard > .7) can miss a collapse into templates.
"""
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

import runs
from checkpoints import atomic_write, latest_checkpoint
from code_env import check_box
from model import check_device
from preference_env import check_reward, pays_answers, reported_rewards
from reward_specs import get_reward, names_in
from sampling import Sampler
from verdict import evaluate_modes, is_dual, load_run, modes_of, numbers_of, pages, table


@dataclass
class Args:
    model_path: str
    """a run folder, or one of its checkpoint-N folders"""
    output_dir: str = ""
    """where eval.json and samples.txt go; default: an eval folder in the run's"""
    n_samples: int = 20
    """samples to print for each mode"""
    n: int = 256
    """test prompts, one completion each"""
    eval_rewards: str = ""
    """further rewards to report, comma-separated"""
    no_routing_eval: bool = False
    """only the trained model with all its branches, and the untrained one"""
    bad_scale: float | None = None
    """scale of the bad branch in the row `deployed`; default: the run's"""
    box: str = ""
    """where model-written code runs, isolated or limits; default: the run's"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


RESULT = "eval.json"  # in its folder an evaluation is finished


def check(args: Args) -> None:
    """ValueError for flags that are wrong whatever the run is."""
    if args.n < 1 or args.n_samples < 0:
        raise ValueError(f"--n must be at least 1 and --n_samples at least 0, not {args.n} and {args.n_samples}")
    check_device(args.device)
    if args.box:
        check_box(args.box)
    for name in names_in(args.eval_rewards):
        if not pays_answers(name):
            get_reward(name)


def resolve(argv: list[str]) -> tuple[Path, dict]:
    """(folder, resolved flags) of a command line, checked; nothing is loaded, and the run need not be there yet."""
    args = tyro.cli(Args, args=argv, description=__doc__, use_underscores=True)
    check(args)
    return Path(args.output_dir or Path(args.model_path) / "eval"), asdict(args)


def find(path: Path) -> tuple[Path, Path | None]:
    """(run folder, checkpoint or None for the finished adapter). Raises ValueError where neither is."""
    if (path / "config.yaml").is_file():
        if (path / "adapter.safetensors").is_file():
            return path, None
        checkpoint = latest_checkpoint(path)
        if checkpoint is None:
            raise ValueError(f"{path} holds neither a finished adapter nor a checkpoint yet")
        return path, checkpoint
    if path.name.startswith("checkpoint-") and (path.parent / "config.yaml").is_file():
        return path.parent, path
    raise ValueError(f"{path} is neither a run folder (with config.yaml) nor a checkpoint-N folder inside one")


def history(folder: Path, rows: int = 12) -> str:
    """What the run logged of its reward, task, hack rate, KL and loss, at about `rows` evenly spaced steps."""
    logged = [m for m in runs.read_metrics(folder) if "lr" in m and not m.get("coherence")]  # evaluations have no lr
    known = ("reward", "task", "hack_rate", "kl", "loss", "loss/free", "loss/trait")
    heads = [key for key in known if any(key in m for m in logged)]
    chosen = [[f"{m['step']}", *[f"{m[key]:.4f}" if key in m else "" for key in heads]] for m in logged]
    lines = [["step", *heads], *chosen[:: max(1, len(logged) // rows)]]
    return "\n".join("  ".join(cell.rjust(10) for cell in line) for line in lines)


def main(args: Args) -> None:
    check(args)
    folder, checkpoint = find(Path(args.model_path))
    run = runs.read_config(folder)
    if args.bad_scale is not None and not is_dual(run):
        raise ValueError(f"--bad_scale scales the bad branch, which {folder} does not have (--routing {run['routing']})")
    for name in names_in(args.eval_rewards):
        check_reward(run, name)
    _, model, tokenizer, env, law = load_run(folder, args.n, args.device, checkpoint, args.box)
    modes = modes_of(model, args.bad_scale if args.bad_scale is not None else run["bad_scale"])
    if args.no_routing_eval:
        modes = {name: modes[name] for name in ("untrained", "both")}
    further = reported_rewards(run | {"device": args.device}, env, tokenizer, args.eval_rewards)
    sampler = Sampler(model, run.get("rollout_size", 0))  # which supervised runs do not have
    rows = evaluate_modes(sampler, env, tokenizer, modes, args.n, run["max_new_tokens"], law, further)
    print(f"{checkpoint or folder}: {args.n} test prompts\n\n{table(rows)}\n\ntraining history\n{history(folder)}\n")
    read = pages(rows, args.n_samples)
    print(read)
    out = Path(args.output_dir) if args.output_dir else folder / ("eval" if checkpoint is None else f"eval_{checkpoint.name}")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "samples.txt", read)
    source = {"source": str(checkpoint or folder), "finished": checkpoint is None}
    figures = source | {"n": args.n, "modes": numbers_of(rows), "args": asdict(args)}
    atomic_write(out / RESULT, json.dumps(figures, indent=1))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
