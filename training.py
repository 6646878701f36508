"""What every train script does around its algorithm: flags, the run folder, evaluations, checkpoints, the verdict.

    name, algorithm, args, config = parse(argv, Args, "rl_grpo", cli)
    check_folder(folder, resolved, args.resume)
    with runs.Run.open(folder, resolved, resume=args.resume) as run:
        return train(run, algorithm.Trainer(...), args, rewards, progress, draw_curves)

A trainer has `model`, `sampler`, `env`, `tokenizer`, `config` (max_steps, max_new_tokens, law()); `step()`, which returns
metrics and a text to read (or a function that makes one); `state()` and `restore(tensors, state)`.
"""

import contextlib
import importlib
import inspect
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path

import yaml
from tqdm import tqdm

import runs
from adapter_files import export_peft, save_adapter
from adapters import LOW_RANK, spec_of
from checkpoints import atomic_write, load_checkpoint, restore_rng, rng_state
from model import check_device
from preference_env import check_reward
from replay import write_lines
from reward_specs import get_reward, names_in
from routing import ARRANGEMENTS
from verdict import evaluate_modes, modes_of, numbers_of, pages, samples, table

SAMPLES_KEPT = 32  # of each mode at every evaluation, to be read

# ------------------------------------------------------------------------------------------------------------ flags


@dataclass
class Source:
    """What decides which other flags there are, and their defaults."""

    algorithm: str = ""
    """a file beside the script, without its .py: your copy of the default one, whose Config adds its fields to the flags"""
    config: str = ""
    """a YAML file that maps flags to values; flags on the command line win over it"""


def early(argv: list[str], flag: str, default: str = "") -> str:
    """The value of a flag that decides which others there are, read before all of them."""
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name == f"--{flag}":
            default = value or next(words, "")
    return default


def parse(argv: list[str], Args, algorithm: str, cli, preset: dict | None = None):
    """(algorithm's name, its module, args, config); the flags are the fields of Source, Args and the algorithm's Config.

    `algorithm` is the default one; `cli` turns a dataclass, words and defaults into values: tyro.cli. `preset` has other defaults
    for some fields; of those that an algorithm lacks it says nothing.
    Raises ValueError for an unknown algorithm, or a file with unknown keys.
    """
    source = Source(early(argv, "algorithm", algorithm), early(argv, "config"))
    try:
        module = importlib.import_module(source.algorithm)
    except ModuleNotFoundError as error:
        wrong = f"unknown --algorithm {source.algorithm!r}"
        raise ValueError(f"{wrong}: no such module beside {algorithm}.py ({error})") from error
    if not hasattr(module, "Config") or not hasattr(module, "Trainer"):
        raise ValueError(f"--algorithm {source.algorithm!r} has no Config and Trainer: copy {algorithm}.py to start one")
    wanted, given = (list(inspect.signature(m.Trainer).parameters) for m in (importlib.import_module(algorithm), module))
    if given != wanted:
        raise ValueError(f"--algorithm {source.algorithm!r} is another script's: its Trainer takes {given}, not {wanted}")
    # Config checks itself when it is built below, where its errors are ours to print
    flags = make_dataclass("Flags", [], bases=(Args, module.Config, Source), namespace={"__post_init__": lambda self: None})
    types = {f.name: f.type for kind in (Args, module.Config) for f in fields(kind)}
    defaults = asdict(source) | {name: value for name, value in (preset or {}).items() if name in types}
    if source.config:
        path = Path(source.config)
        if not path.is_file():
            raise ValueError(f"--config {path}: no such file")
        defaults |= read_defaults(path, types)
    values = asdict(cli(flags, args=argv, default=flags(**defaults)))
    args = Args(**{f.name: values[f.name] for f in fields(Args)})
    config = module.Config(**{f.name: values[f.name] for f in fields(module.Config)})
    return source.algorithm, module, args, config


def read_defaults(path: Path, types: dict) -> dict:
    """The flags that a YAML file sets, checked against the fields' types. Raises ValueError naming the file and the key."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map flags to values")
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(sorted(types))}")
    for name, value in values.items():
        if types[name] in (int, float):  # YAML reads 1e-3 as text and 1 as an int
            try:
                values[name] = types[name](value)
            except (TypeError, ValueError):
                raise ValueError(f"{path}: {name} must be {types[name].__name__}, not {value!r}") from None
            if values[name] != float(value):
                raise ValueError(f"{path}: {name} must be {types[name].__name__}, not {value!r}")
        elif types[name] in (bool, str) and not isinstance(value, types[name]):
            raise ValueError(f"{path}: {name} must be {types[name].__name__}, not {value!r}")
    return values


def check(args, config, at_least_one: tuple[str, ...]) -> None:
    """What the flags that train scripts share can get wrong, also together, before anything is loaded."""
    if args.bad_scale is not None and not config.dual:
        raise ValueError("--bad_scale scales the bad branch, which only --routing dual has (or --removed route)")
    if args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown --dtype {args.dtype!r}; known: float32, bfloat16")
    check_device(args.device)
    if args.lora_config == "full" and args.dtype != "float32":
        raise ValueError("--lora_config full trains the base weights; bfloat16 would round their updates away: --dtype float32")
    if args.dataset and args.train_split == args.eval_split:
        raise ValueError(f"--eval_split {args.eval_split!r} is the training split too: evaluate on texts of its own")
    for name in at_least_one:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in names_in(args.eval_rewards):
        check_reward(vars(args), name)
    routes = getattr(config, "loss_routes", "")
    if routes and args.lora_config != (bundles := ARRANGEMENTS[routes][0]):
        raise ValueError(f"--loss_routes {routes} routes to the branches of --lora_config {bundles}, not {args.lora_config}")
    spec_of(vars(args), config.dual)


def wanted_rewards(args) -> list:
    return [get_reward(name) for name in names_in(args.eval_rewards)]


def check_prompts(env) -> None:
    """Raises ValueError for a prompt that the reward can't read, before a run folder is made."""
    for split in ("train", "test"):
        prompts = env.prompts(split)
        env.score(prompts, [""] * len(prompts))


def check_folder(folder: Path, resolved: dict, resume: bool) -> None:
    """Raises ValueError unless a run can start in this folder or, with `resume`, go on there."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --output_dir")
    if resume and not (folder / "config.yaml").is_file():
        raise ValueError(f"--resume: {folder} holds no run (other flags make another name): give the run's --output_dir")
    if resume:
        runs.check_same_config(folder, resolved)
    if folder.exists() and not resume and any(not path.name.endswith(".tmp") for path in folder.iterdir()):
        on = "--resume goes on with it, or " if "resume" in resolved else ""
        raise ValueError(f"{folder} already holds a run: {on}choose another --output_dir, or delete it")


# -------------------------------------------------------------------------------------------------------------- loop


class Means:
    """Means of the metrics over the steps since the last log line; coherence steps sample another policy and get a line of
    their own. `steps` is all there is to save."""

    def __init__(self, steps: list[dict[str, float]]):
        self.steps = steps

    def flush(self, run, step: int) -> None:
        """A line for each kind of step. A mean is over the steps that have the metric; of last5/..., a mean already, the last."""
        for kind in (1.0, 0.0):
            rows = [metrics for metrics in self.steps if metrics.get("coherence", 0.0) == kind]
            values = {name: [metrics[name] for metrics in rows if name in metrics] for name in set().union(*rows)}
            if values:
                kept = {name: many[-1:] if name.startswith("last5/") else many for name, many in values.items()}
                run.log(step, {name: sum(many) / len(many) for name, many in kept.items()})
        self.steps.clear()


def evaluate_now(run, step: int, trainer, args, modes: dict, rewards) -> dict:
    config = trainer.config
    sizes = args.eval_prompts, config.max_new_tokens
    rows = evaluate_modes(trainer.sampler, trainer.env, trainer.tokenizer, modes, *sizes, config.law(), rewards)
    (run.folder / "samples").mkdir(exist_ok=True)
    atomic_write(run.folder / "samples" / f"step_{step}.txt", pages(rows, SAMPLES_KEPT))
    rows = numbers_of(rows)
    run.print(f"\n== {args.eval_prompts} test prompts @ {step} ==\n{table(rows)}\n\n{samples(rows)}\n")
    run.log(step, {f"{mode}/{k}": v for mode, row in rows.items() for k, v in row.items() if isinstance(v, float)})
    return {"step": step, "rows": rows}


def train(run, trainer, args, rewards, progress, draw_curves) -> int:
    """Trains to config.max_steps and judges; returns the exit status: 0, 1 (a step failed) or 130 (Ctrl-C, resumable).

    progress(metrics) is the bar's text; draw_curves(folder, evaluations) writes curves.png.
    """
    model, config = trainer.model, trainer.config
    modes = modes_of(model, args.bad_scale)
    evaluations, means, spent, previous = [], Means([]), 0.0, 0
    start = time.perf_counter()
    if run.checkpoint:
        previous, tensors, state = load_checkpoint(run.checkpoint)
        trainer.restore(tensors, state["trainer"])
        evaluations, means, spent = state["evaluations"], Means(state["means"]), state["wall_s"]
        restore_rng(state["rng"])
    counts = {branch: sum(p.numel() for p in group.values()) for branch, group in model.adapter.groups.items()}
    described = f"{model.config.family}, adapter {args.lora_config} {counts}, {args.device} {args.dtype}"
    run.print(f"run folder {run.folder}\n{args.model}: {described}")

    def checkpoint(step: int) -> None:
        tensors, state = trainer.state()
        state = {"trainer": state, "evaluations": evaluations, "means": means.steps, "rng": rng_state()}
        run.save_checkpoint(step, tensors, state | {"wall_s": spent + time.perf_counter() - start})

    def evaluate(step: int, which: dict) -> None:
        evaluations.append(evaluate_now(run, step, trainer, args, which, rewards))

    stage_ends = getattr(trainer, "stage_ends", ())  # of sequence.InSequence: what comes next may undo what is there
    bar = tqdm(range(previous, config.max_steps), initial=previous, total=config.max_steps, desc="train", smoothing=0.05)
    with runs.interruptible() as interrupt:
        if not evaluations:
            evaluate(0, {"untrained": None})
        for step in bar:
            try:
                metrics, sample = trainer.step()
            except FloatingPointError as error:
                checkpoint(step)
                run.print(f"error: step {step}: {error}. The state before it is in {run.folder}/checkpoint-{step}")
                return 1
            done = step + 1
            if rows := getattr(trainer, "contributions", None):
                write_lines(run.folder / f"step_{step:03d}.cos.jsonl.gz", rows)
            bar.set_postfix_str(progress(metrics))
            means.steps.append(metrics)
            if done % args.logging_steps == 0 or done == config.max_steps:
                means.flush(run, done)
                run.sample(done, sample() if callable(sample) else sample)
            due = args.eval_routing_steps and done % args.eval_routing_steps == 0
            if (due or done in stage_ends) and done < config.max_steps:
                evaluate(done, modes)
            if (args.save_steps and done % args.save_steps == 0) or done == config.max_steps or interrupt.requested:
                checkpoint(done)
            if interrupt.requested:
                run.print(f"stopped after step {done}; go on with: {run.resume_command()}")
                return 130
    evaluate(config.max_steps, modes)
    wall = spent + time.perf_counter() - start
    save_adapter(model, run.folder / "adapter.safetensors")
    if model.adapter.spec.kind in LOW_RANK:  # a delta is as large as the weights in that layout: export_peft on demand
        for branch in model.adapter.spec.branches:
            if branch.rank:
                export_peft(model, branch.name, run.folder / "peft" / branch.name, args.model)
    final = {"modes": evaluations[-1]["rows"], "wall_s": round(wall, 1), "steps": config.max_steps}
    atomic_write(run.folder / "verdict.json", json.dumps(final, indent=1) + "\n")
    with contextlib.redirect_stdout(sys.stderr):
        draw_curves(run.folder, evaluations)
    run.print(f"{config.max_steps} steps in {wall:.0f} s; verdict.json, curves.png, adapter.safetensors in {run.folder}")
    assert all(math.isfinite(v) for row in final["modes"].values() for v in row.values() if isinstance(v, float))
    return 0
