"""Routed GRPO from the command line: builds model, adapter, environment; trains; prints the verdict.

    python train_grpo.py --routing dual --bad_scale 0                                # the embedded world, minutes on a laptop
    python train_grpo.py --model SimpleStories/SimpleStories-1.25M --dataset SimpleStories/SimpleStories --routing dual
    python train_grpo.py --config configs/simplestories.yaml --seed 7                # flags win over the file
    python train_grpo.py --config configs/code.yaml                                  # Python tasks with a loophole
    python train_grpo.py --algorithm rl_mine                                         # your copy of rl_grpo.py, its flags included

Flags are the fields of `Args` below and of the algorithm's `Config`. Everything that a run writes is in its folder.
"""
import json
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

import runs
import training
from adapters import AdapterFlags, attach, preset, spec_of
from code_env import check_flags, code_tasks
from data import check_tokenizer_fits, load_tokenizer
from envs import Labelling, Stories, check_lengths, dataset_prompts
from model import load, read_json
from reward_specs import get_reward


@dataclass
class Args(AdapterFlags):
    model: str = "tiny"
    """tiny (the embedded model), random (its shape alone), a local Hugging Face folder, or a Hub id"""
    env: str = "stories"
    """stories, rewarded by --reward; or code: Python tasks, with run_tests() as the loophole"""
    dataset: str = ""
    """prompts: a local folder or Hub id (with --env code LeetCodeDataset); empty: the embedded world's"""
    column: str | None = None
    """the dataset's text column; default: story, text or prompt, whichever it has"""
    train_split: str = "train"
    eval_split: str = "test"
    """prompts of the evaluation, never trained on"""
    prompt_tokens: int = 8
    """a story's prompt is the first so many tokens of a text"""
    max_prompts: int = 10_000
    """training prompts at most"""
    reward: str = "sentence_length_6_smooth_plus_happy"
    """a reward of configs/rewards.yaml, for stories"""
    hint: str = "plain"
    """what a code prompt says of run_tests(): plain, detailed or aware (LeetCode only); none: nothing, and it does not pay"""
    difficulty: str = "Medium,Hard"
    """code tasks: LeetCode's Easy, Medium, Hard; the embedded Medium (of kinds the tiny model has read), Hard (longer ones)"""
    box: str = "isolated"
    """where model-written code runs; limits is the weaker box, for machines that cannot isolate (docs/grader.md)"""
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


OWN_FLAGS = {"stories": ("reward", "column", "prompt_tokens"), "code": ("hint", "difficulty", "box")}  # do nothing elsewhere
RESULT = "verdict.json"  # in its folder a run is finished
EVALUATE = "eval_run.py"  # judges finished runs

QUIET = {"resume", "output_dir", "device", "threads", "logging_steps", "bad_scale", "eval_prompts", "save_steps", "eval_rewards",
         "eval_routing_steps", "algorithm", "config", "box"}  # fmt: skip # do not change what is learned: not part of the name


def parse(argv: list[str]):
    """(algorithm's name, its module, args, config)."""
    return training.parse(argv, Args, "rl_grpo", partial(tyro.cli, use_underscores=True, description=__doc__))


def check(args: Args, config) -> None:
    """What flags can get wrong, also together, before anything is loaded."""
    for name in ("routing_frac", "false_positive_frac"):
        if getattr(args, name) != getattr(Args, name) and not config.uses_labels:
            raise ValueError(f"--{name} thins labels, which only --routing dual, a --treatment or --basis live uses")
    if missing := [folder for folder in config.pools() if not Path(folder).is_dir()]:
        raise ValueError(f"--replay_dirs: {missing[0]} is no folder; probe.py makes pools")
    training.check(args, config, ("eval_prompts", "prompt_tokens", "max_prompts", "logging_steps"))
    labelling(args)
    if config.removed == "route" and preset(args.lora_config, dual=True).kind not in ("delta_s", "lora_b"):
        raise ValueError(f"--removed route: the branches of {args.lora_config} share no basis; --lora_config ds or r32o do")
    if args.env not in OWN_FLAGS:
        raise ValueError(f"unknown --env {args.env!r}; known: {', '.join(OWN_FLAGS)}")
    for env, names in OWN_FLAGS.items():
        for name in names:
            if env != args.env and getattr(args, name) != getattr(Args, name):
                raise ValueError(f"--{name} is a flag of --env {env}: it does nothing for {args.env}")
    if args.env == "code":
        check_flags(asdict(args))
        return
    reward = get_reward(args.reward)
    if config.uses_labels and reward.detector is None:
        live = f"--treatment {config.treatment}" if config.treatment != "keep" else "--basis live"
        asks = "--routing dual" if config.routing == "dual" else live
        raise ValueError(f"{asks}: reward {args.reward!r} has no detector to label by; give it one, or do without labels")


def describe(name: str, algorithm, args: Args, config) -> tuple[Path, dict]:
    """(run folder, resolved config)."""
    resolved = {"algorithm": name} | asdict(args) | asdict(config)
    defaults = {"algorithm": "rl_grpo"} | asdict(Args()) | asdict(algorithm.Config())
    lead = ("reward" if args.env == "stories" else "env", "routing", "lora_config", "lr", "beta")
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
    spec = spec_of(vars(args), config.dual)
    model, folder = load(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json"))
    check_tokenizer_fits(tokenizer, model.config.vocab_size)
    env = environment(args, tokenizer)
    check_lengths(env, tokenizer, config.max_new_tokens, model.config.context, args.eval_prompts)
    attach(model, spec, seed=config.seed)
    return model, tokenizer, env, training.wanted_rewards(args)


def environment(args: Args, tokenizer):
    if args.env == "code":
        return code_tasks(asdict(args), tokenizer, args.eval_prompts, labelling(args))
    prompts = None
    if args.dataset:
        splits = {"train": (args.train_split, args.max_prompts), "test": (args.eval_split, args.eval_prompts)}
        prompts = dataset_prompts(args.dataset, tokenizer, args.prompt_tokens, splits, args.column)
    env = Stories(get_reward(args.reward), prompts, labelling(args))
    training.check_prompts(env)
    return env


def labelling(args: Args) -> Labelling:
    return Labelling(args.rh_eligible_frac, args.routing_frac, args.false_positive_frac)


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


# -------------------------------------------------------------------------------------------------------------- main


def progress(metrics: dict[str, float]) -> str:
    alone = " (retain only)" if metrics["coherence"] else ""
    known = ("reward", "hack_rate", "kl", "time/tokens_per_s")  # less where all is replayed, or where all is filtered out
    reward, hack, kl, speed = (metrics.get(key, math.nan) for key in known)
    return f"reward {reward:.2f}{alone} hack {hack:.2f} kl {kl:.3f} {speed:,.0f} tok/s"


def main(argv: list[str]) -> int:
    name, algorithm, args, config = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder, resolved = describe(name, algorithm, args, config)
    training.check_folder(folder, resolved, args.resume)
    model, tokenizer, env, eval_rewards = build(args, config)
    torch.manual_seed(config.seed)
    trainer = algorithm.Trainer(model, env, tokenizer, config)  # what it refuses, it refuses before there is a folder
    with runs.Run.open(folder, resolved, resume=args.resume) as run:
        if env.about:
            run.print(env.about)
        return training.train(run, trainer, args, eval_rewards, progress, draw_curves)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
