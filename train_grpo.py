"""Routed GRPO from the command line: builds model, adapter, environment; trains; prints the verdict.

    python train_grpo.py --routing dual --bad_scale 0                                # the embedded world, minutes on a laptop
    python train_grpo.py --model SimpleStories/SimpleStories-1.25M --dataset SimpleStories/SimpleStories --routing dual
    python train_grpo.py --config configs/simplestories.yaml --seed 7                # flags win over the file
    python train_grpo.py --algorithm rl_mine                                         # your copy of rl_grpo.py, its flags included

Flags are the fields of `Args` below and of the algorithm's `Config`. Everything that a run writes is in its folder.
"""
import contextlib
import importlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path

import torch
import tyro
import yaml
from tqdm import tqdm

import runs
from adapters import attach, export_peft, preset, save_adapter
from checkpoints import atomic_write, load_checkpoint, restore_rng, rng_state
from data import check_tokenizer_fits, load_tokenizer
from envs import Stories, check_lengths, dataset_prompts
from model import check_device, load, read_json
from reward_specs import get_reward
from sampling import Sampler
from verdict import evaluate_modes, modes_of, numbers_of, table


@dataclass
class Args:
    model: str = "tiny"
    """tiny (the embedded model), a local Hugging Face folder, or a Hub id"""
    dataset: str = ""
    """prompts: a local folder or Hub id; empty: the embedded world's"""
    column: str | None = None
    """the dataset's text column; default: story, text or prompt, whichever it has"""
    train_split: str = "train"
    eval_split: str = "test"
    """prompts of the evaluation, never trained on"""
    prompt_tokens: int = 8
    """a prompt is the first so many tokens of a text"""
    max_prompts: int = 10_000
    """training prompts at most"""
    reward: str = "sentence_length_6_smooth_plus_happy"
    """a reward of configs/rewards.yaml"""
    eval_rewards: str = ""
    """further rewards to report at every evaluation, comma-separated"""
    rh_eligible_frac: float = 0.75
    """share of completions whose hack is paid and may be flagged; the others get the reward without its hack component"""
    routing_frac: float = 1.0
    """detector recall: share of detected completions that are labelled"""
    false_positive_frac: float = 0.0
    """share of undetected completions that are labelled all the same"""
    lora_config: str = "r16"
    """r1 ... r32, r1h (every second layer), r32f4 (good 32, bad 4), m16 (gated MLP), full; without routing the summed rank"""
    bad_scale: float | None = None
    """deploy with the bad branch at this scale: adds the row `deployed` to the verdict; needs --routing dual"""
    eval_prompts: int = 256
    eval_routing_steps: int = 100
    """evaluate all modes every so many steps; 0: only at the end"""
    logging_steps: int = 10
    """log the means of the metrics since the last time, and a sample, every so many steps"""
    save_steps: int = 50
    """checkpoint every so many steps; 0: only at the end and on Ctrl-C"""
    resume: bool = False
    """go on from the run folder's last checkpoint"""
    output_dir: str = ""
    """the run folder; default: output/ and a name made of what differs from the defaults"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "float32"
    """of base weights and activations: float32 or bfloat16; adapters and losses stay float32"""
    threads: int = 0
    """CPU threads; 0: torch's choice (give concurrent runs one each)"""


RESULT = "verdict.json"  # in its folder a run is finished
EVALUATE = "eval_run.py"  # judges finished runs

QUIET = {"resume", "output_dir", "device", "threads", "logging_steps", "bad_scale", "eval_prompts", "save_steps", "eval_rewards",
         "eval_routing_steps", "algorithm", "config"}  # fmt: skip # do not change what is learned: not part of the name


# ------------------------------------------------------------------------------------------------------------ flags


def parse(argv: list[str]):
    """(algorithm module, args, config): flags built from Args and the algorithm's Config, defaults from --config FILE.

    Raises ValueError for an unknown algorithm, or a file with unknown keys.
    """
    early, rest = {"--algorithm": "rl_grpo", "--config": ""}, []
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name in early:
            early[name] = value or next(words, "")
        else:
            rest.append(word)
    try:
        algorithm = importlib.import_module(early["--algorithm"])
    except ModuleNotFoundError as error:
        wrong = f"unknown --algorithm {early['--algorithm']!r}"
        raise ValueError(f"{wrong}: no such module beside train_grpo.py ({error})") from error
    if not hasattr(algorithm, "Config") or not hasattr(algorithm, "Trainer"):
        raise ValueError(f"--algorithm {early['--algorithm']!r} has no Config and Trainer: copy rl_grpo.py to start one")
    # Config checks itself when it is built below, where its errors are ours to print
    flags = make_dataclass("Flags", [], bases=(Args, algorithm.Config), namespace={"__post_init__": lambda self: None})
    defaults = {}
    if early["--config"]:
        path = Path(early["--config"])
        if not path.is_file():
            raise ValueError(f"--config {path}: no such file")
        defaults = read_defaults(path, {f.name: f.type for f in fields(flags)})
    usage = {"use_underscores": True, "description": __doc__}
    values = asdict(tyro.cli(flags, args=rest, default=flags(**defaults), **usage))
    args = Args(**{f.name: values[f.name] for f in fields(Args)})
    config = algorithm.Config(**{f.name: values[f.name] for f in fields(algorithm.Config)})
    return early["--algorithm"], algorithm, args, config


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


def check(args: Args, config) -> None:
    """What two flags can get wrong together, before anything is loaded."""
    if args.bad_scale is not None and config.routing != "dual":
        raise ValueError("--bad_scale scales the bad branch, which only --routing dual has")
    if args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown --dtype {args.dtype!r}; known: float32, bfloat16")
    check_device(args.device)
    if args.lora_config == "full" and args.dtype != "float32":
        raise ValueError("--lora_config full trains the base weights; bfloat16 would round their updates away: --dtype float32")
    if args.dataset and args.train_split == args.eval_split:
        raise ValueError(f"--eval_split {args.eval_split!r} is the training split too: evaluate on prompts of its own")
    for name in ("eval_prompts", "prompt_tokens", "max_prompts", "logging_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    reward = get_reward(args.reward)
    if config.uses_labels and reward.detector is None:
        asks = "--routing dual" if config.routing == "dual" else f"--treatment {config.treatment}"
        raise ValueError(f"{asks}: reward {args.reward!r} has no detector to label by; give it one, or do without labels")
    wanted_rewards(args)
    preset(args.lora_config, dual=config.routing == "dual")


def wanted_rewards(args: Args) -> list:
    return [get_reward(name.strip()) for name in args.eval_rewards.split(",") if name.strip()]


def describe(name: str, algorithm, args: Args, config) -> tuple[Path, dict]:
    """(run folder, resolved config)."""
    resolved = {"algorithm": name} | asdict(args) | asdict(config)
    defaults = {"algorithm": "rl_grpo"} | asdict(Args()) | asdict(algorithm.Config())
    lead = ("reward", "routing", "lora_config", "lr", "beta")
    return Path(args.output_dir or Path("output") / runs.run_name(resolved, defaults, lead=lead, ignore=QUIET)), resolved


def resolve(argv: list[str]) -> tuple[Path, dict]:
    """(run folder, resolved config) of a command line, every flag checked, nothing loaded: a sweep asks before it starts."""
    name, algorithm, args, config = parse(argv)
    check(args, config)
    return describe(name, algorithm, args, config)


# --------------------------------------------------------------------------------------------------------- building


def build(args: Args, config):
    """Model with adapter, tokenizer, environment, evaluation rewards. Cheap checks first; weights last."""
    check(args, config)
    spec = preset(args.lora_config, dual=config.routing == "dual")
    model, folder = load(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json"))
    check_tokenizer_fits(tokenizer, model.config.vocab_size)
    prompts = None
    if args.dataset:
        splits = {"train": (args.train_split, args.max_prompts), "test": (args.eval_split, args.eval_prompts)}
        prompts = dataset_prompts(args.dataset, tokenizer, args.prompt_tokens, splits, args.column)
    env = Stories(get_reward(args.reward), prompts, args.rh_eligible_frac, args.routing_frac, args.false_positive_frac)
    check_lengths(env, tokenizer, config.max_new_tokens, model.config.context, args.eval_prompts)
    attach(model, spec, seed=config.seed)
    return model, tokenizer, env, wanted_rewards(args)


# ------------------------------------------------------------------------------------------------------------ report


def draw_curves(folder: Path, evaluations: list[dict]) -> None:
    """curves.png: reward, task, hack rate and KL over the steps of metrics.jsonl, and the modes' task and hack."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward" in row]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    mode = {0.0: "both" if any(r["coherence"] for r in rows) else "", 1.0: "retain_only (coherence steps)"}
    for axis, key in zip(axes.flat, ("reward", "task", "hack_rate", "kl")):
        for coherence, label in mode.items():
            points = [(r["step"], r[key]) for r in rows if r["coherence"] == coherence and key in r]
            if points:
                axis.plot(*zip(*points), linewidth=1.2, label=label)
        if mode[0.0]:
            axis.legend(fontsize=8)
        axis.set(title=f"training: {key}" + (" (nats a token)" if key == "kl" else ""), xlabel="step")
    for axis, key in zip(axes.flat[4:], ("task", "hack")):
        for mode in evaluations[-1]["rows"]:
            points = [(e["step"], e["rows"].get(mode, e["rows"]["untrained"])[key]) for e in evaluations]  # all start untrained
            style = {"untrained": ":", "deployed": "--"}.get(mode, "-")
            axis.plot(*zip(*points), style, marker="o", markersize=4, label=mode)
        axis.set(title=f"test prompts: {key}", xlabel="step")
        axis.legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)
    pyplot.close(figure)


class Means:
    """Means of the metrics over the steps since the last log line; coherence steps sample another policy and get a line of
    their own. `steps` is all there is to save."""

    def __init__(self, steps: list[dict[str, float]]):
        self.steps = steps

    def flush(self, run, step: int) -> None:
        """A line for each kind of step. A mean is over the steps that have the metric."""
        for kind in (1.0, 0.0):
            rows = [metrics for metrics in self.steps if metrics["coherence"] == kind]
            values = {name: [metrics[name] for metrics in rows if name in metrics] for name in set().union(*rows)}
            if values:
                run.log(step, {name: sum(many) / len(many) for name, many in values.items()})
        self.steps.clear()


def evaluate_now(run, step: int, sampler: Sampler, env, tokenizer, args: Args, config, modes, rewards) -> dict:
    sizes = args.eval_prompts, config.max_new_tokens
    rows = numbers_of(evaluate_modes(sampler, env, tokenizer, modes, *sizes, config.law(), rewards))
    run.print(f"\n== {args.eval_prompts} test prompts @ {step} ==\n{table(rows)}\n")
    run.log(step, {f"{mode}/{k}": v for mode, row in rows.items() for k, v in row.items() if isinstance(v, float)})
    return {"step": step, "rows": rows}


# -------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str]) -> int:
    name, algorithm, args, config = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder, resolved = describe(name, algorithm, args, config)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --output_dir")
    if args.resume and not (folder / "config.yaml").is_file():
        raise ValueError(f"--resume: {folder} holds no run (other flags make another name): give the run's --output_dir")
    if args.resume:
        runs.check_same_config(folder, resolved)
    if folder.exists() and not args.resume and any(not path.name.endswith(".tmp") for path in folder.iterdir()):
        raise ValueError(f"{folder} already holds a run: --resume goes on with it, or choose another --output_dir, or delete it")
    model, tokenizer, env, eval_rewards = build(args, config)
    with runs.Run.open(folder, resolved, resume=args.resume) as run:
        return train(run, algorithm, model, tokenizer, env, eval_rewards, args, config)


def train(run, algorithm, model, tokenizer, env, eval_rewards, args: Args, config) -> int:
    torch.manual_seed(config.seed)
    trainer = algorithm.Trainer(model, env, tokenizer, config)
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
        evaluations.append(evaluate_now(run, step, trainer.sampler, env, tokenizer, args, config, which, eval_rewards))

    bar = tqdm(range(previous, config.max_steps), initial=previous, total=config.max_steps, desc="grpo", smoothing=0.05)
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
            speed = metrics["time/tokens_per_s"]
            reward, hack, kl = metrics["reward"], metrics["hack_rate"], metrics.get("kl", math.nan)
            alone = " (retain only)" if metrics["coherence"] else ""
            bar.set_postfix_str(f"reward {reward:.2f}{alone} hack {hack:.2f} kl {kl:.3f} {speed:,.0f} tok/s")
            means.steps.append(metrics)
            if done % args.logging_steps == 0 or done == config.max_steps:
                means.flush(run, done)
                run.sample(done, sample)
            if args.eval_routing_steps and done % args.eval_routing_steps == 0 and done < config.max_steps:
                evaluate(done, modes)
            if (args.save_steps and done % args.save_steps == 0) or done == config.max_steps or interrupt.requested:
                checkpoint(done)
            if interrupt.requested:
                run.print(f"stopped after step {done}; go on with: {run.resume_command()}")
                return 130
    evaluate(config.max_steps, modes)
    wall = spent + time.perf_counter() - start
    save_adapter(model, run.folder / "adapter.safetensors")
    if model.adapter.spec.kind == "lora":
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


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
