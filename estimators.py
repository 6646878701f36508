"""What train_gumbel.py, train_reinforce.py and train_ppo.py --env sentiment do alike: flags, the reward model, the phases, files.

    resolve(argv, "rl_reinforce", cli)     # (run folder, resolved config), nothing loaded
    main(argv, "rl_reinforce", cli)        # all of a run

Phases: train the reward model, or read it; validate the untrained policy; train, and validate every so many steps; at the end,
once, judge the untrained policy, the last and the one that validated best on the same test prompts. A method is compared with
others on one reward model, one set of prompts and one budget: see docs/estimators.md, which also says what each figure means.
"""
import contextlib
import fcntl
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

import runs
import training
from adapter_files import export_peft, save_adapter
from adapters import LOW_RANK, AdapterFlags, adapter_tensors, attach, preset, set_adapter_tensors, spec_of
from checkpoints import atomic_write, load_checkpoint, restore_rng, rng_state
from data import check_tokenizer_fits, load_tokenizer
from envs import Labelling
from model import load, read_json
from reward_model import FILE, RewardModel, load_reward_model, save_reward_model
from reward_training import Settings, learn, prepare
from sentiment_env import sentiment
from verdict import evaluate, modes_of, numbers_of, pages, samples, table

RESULT = "verdict.json"  # in its folder a run is finished
RESULTS = "results.json"
SAMPLES_KEPT = 32  # of each mode, to be read

# the experiment's settings, where an algorithm's own defaults are others
PRESET = {
    "batch_size": 16, "micro_batch_size": 4, "max_steps": 2000, "lr": 1e-4, "max_grad_norm": 1.0, "seed": 42, "beta": 0.1,
    "max_new_tokens": 48, "min_new_tokens": 16, "top_p": 0.9,
    "tau_start": 2.0, "tau_end": 0.5, "tau_steps": 1000,  # GRADE
    "baseline": "ema", "baseline_momentum": 0.9,  # REINFORCE
    "num_epochs": 4, "num_minibatches": 1, "target_kl": 0.0, "epsilon": 0.2, "value_epsilon": 0.2, "value_coef": 0.5,
    "entropy_coef": 0.01, "gamma": 0.99, "gae_lambda": 0.95,  # PPO: a batch is one minibatch, as the others step on it
}  # fmt: skip
LORA = {"lora_alpha": 32.0, "lora_dropout": 0.05}  # of --lora_config where it is one
STEP = ("reward", "loss", "kl", "grad_norm_mean", "tokens", "prompts")  # of every method
OWN = ("grad_norm_std", "tau", "soft_reward")  # a single micro-batch has no deviation, and GRADE alone the others
VALIDATION = ("val_reward", "val_reward_std", "val_kl", "best_val_reward")
TEST = ("reward", "std", "kl", "n", "task", "hack", "length", "unique", "jaccard")


@dataclass
class Flags(AdapterFlags):
    model: str = "tiny"
    """policy and reward model's backbone: tiny (the embedded model), a local Hugging Face folder, or a Hub id"""
    env: str = "sentiment"
    dataset: str = ""
    """reviews (text, label): a local folder or Hub id, such as stanfordnlp/imdb; empty: the embedded world's"""
    train_split: str = "train"
    eval_split: str = "test"
    """of the test prompts, which are read once, at the end"""
    reward_model: str = ""
    """file or run folder of train_reward.py --kind sentiment; empty: reward_model.safetensors beside the run folder, which the
    first run there trains"""
    reward_steps: int = 400
    """steps of that training"""
    max_prompts: int = 10_000
    """training prompts at most"""
    prompt_tokens: int = 32
    """a prompt, the first sentences of a review, has so many tokens at most"""
    validation_prompts: int = 100
    """one completion each"""
    validate_every: int = 100
    """validate every so many steps, before the first and after the last"""
    test_prompts: int = 500
    rh_eligible_frac: float = 1.0
    """share of completions whose hack is paid and may be flagged; the others, where they hack, are paid 0"""
    routing_frac: float = 1.0
    """detector recall: share of detected completions that are labelled"""
    false_positive_frac: float = 0.0
    """share of undetected completions that are labelled all the same"""
    lora_config: str = "r8"
    """the adapter, as train_grpo.py takes it (r8: one LoRA of rank 16, with --routing dual two of 8); full: every weight"""
    lora_alpha: float | None = None
    """a LoRA's output is scaled by alpha / rank; default: 32 with a LoRA"""
    lora_dropout: float | None = None
    """share of a LoRA's inputs dropped in the passes that make gradients, in no other; default: 0.05 with a LoRA"""
    bad_scale: float | None = None
    """deploy with the bad branch at this scale: adds the row `deployed`; needs two branches"""
    logging_steps: int = 10
    """a sample in train.log every so many steps; metrics are logged at each"""
    save_steps: int = 100
    """checkpoint every so many steps; 0: only at the end and on Ctrl-C"""
    resume: bool = False
    """go on from the run folder's last checkpoint"""
    results_dir: str = "results"
    """the run folder is RESULTS_DIR/METHOD"""
    output_dir: str = ""
    """the run folder, in place of that; what the runs share lies beside it"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "float32"
    """of base weights and activations: float32 or bfloat16; adapters and losses stay float32"""
    threads: int = 0
    """CPU threads; 0: torch's choice (give concurrent runs one each)"""

    eval_rewards = ""  # as training.check calls it: no flag


def parse(argv: list[str], algorithm: str, cli):
    """(algorithm's name, its module, args, config); arguments as training.parse takes them."""
    name, module, args, config = training.parse(argv, Flags, algorithm, cli, PRESET)
    lora = preset(args.lora_config, dual=False).kind in LOW_RANK
    for flag, usual in LORA.items():
        if getattr(args, flag) is None:
            setattr(args, flag, usual if lora else 0.0)
    return name, module, args, config


def labelling(args: Flags) -> Labelling:
    return Labelling(**{f.name: getattr(args, f.name) for f in fields(Labelling)})


def check(args: Flags, config) -> None:
    """What flags can get wrong, also together, before anything is loaded."""
    if args.env != "sentiment":
        raise ValueError(f"unknown --env {args.env!r}; known here: sentiment (train_ppo.py has others)")
    counts = ("max_prompts", "prompt_tokens", "validation_prompts", "validate_every", "test_prompts", "reward_steps")
    training.check(args, config, (*counts, "logging_steps"))
    if args.save_steps < 0:
        raise ValueError(f"--save_steps must be at least 0, not {args.save_steps}")
    for name in ("routing_frac", "false_positive_frac"):
        if getattr(args, name) != getattr(Flags, name) and not config.uses_labels:
            raise ValueError(f"--{name} thins labels, which only --routing dual uses")
    labelling(args)
    if args.reward_model and not Path(args.reward_model).exists():
        raise ValueError(f"--reward_model {args.reward_model}: no such file or folder; train_reward.py makes one")
    if args.reward_model and args.reward_steps != Flags.reward_steps:
        raise ValueError(f"--reward_steps trains a reward model, and --reward_model {args.reward_model} is one: leave one out")


def method_of(name: str, config) -> str:
    """What a run is called: grade, grade_ste, reinforce, ppo; a fork by its file's name."""
    if name == "rl_gumbel":
        return "grade_ste" if config.estimator == "ste" else "grade"
    return name.removeprefix("rl_")


def describe(name: str, args: Flags, config) -> tuple[Path, dict]:
    """(run folder, resolved config)."""
    method = method_of(name, config)
    folder = Path(args.output_dir) if args.output_dir else Path(args.results_dir) / method
    own = {"method": method, "algorithm": name, "judges_itself": True}  # on test data that nobody reads a second time
    return folder, own | asdict(args) | asdict(config)


def resolve(argv: list[str], algorithm: str, cli):
    """(run folder, resolved config) of a command line, every flag checked, nothing loaded: a sweep asks before it starts."""
    name, _, args, config = parse(argv, algorithm, cli)
    check(args, config)
    return describe(name, args, config)


# ------------------------------------------------------------------------------------------------- the reward model


@contextlib.contextmanager
def alone(root: Path):
    """One run at a time does what several share: the reward model, the comparison."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def reward_settings(args: Flags, config) -> Settings:
    """How the runs' own reward model is trained: the same for every method and seed."""
    most = args.prompt_tokens + config.max_new_tokens  # it learns from texts as long as those that it will judge
    shared = {name: getattr(args, name) for name in ("model", "dataset", "train_split", "eval_split", "device", "dtype")}
    return Settings(kind="sentiment", max_tokens=most, max_steps=args.reward_steps, **shared)


def reward_model(args: Flags, config, root: Path) -> RewardModel:
    """The judge, frozen: --reward_model, or the one of `root`, which is trained where there is none.

    Raises ValueError for one of `root` that was trained otherwise than these flags say.
    """
    if args.reward_model:
        return load_reward_model(args.reward_model, device=args.device)
    file, settings = root / FILE, reward_settings(args, config)
    how = {key: value for key, value in asdict(settings).items() if key not in ("device", "bins", "logging_steps")}
    with alone(root):
        if not file.is_file():
            school = prepare(settings)
            print(f"training {file}: {school.about}")
            figures = learn(school, settings, lambda step, metrics: None)
            school.model.figures = figures | {"settings": how}
            save_reward_model(school.model, file)
    judge = load_reward_model(file, device=args.device)
    was = judge.figures.get("settings", {})
    if differing := [f"{key} {was.get(key)!r}, now {value!r}" for key, value in how.items() if was.get(key) != value]:
        raise ValueError(f"{file} was trained with {'; '.join(differing)}: choose another --results_dir (or folder), or name it "
                         "by --reward_model to take it as it is")
    return judge


# ------------------------------------------------------------------------------------------------------- the phases


def build(args: Flags, config, root: Path):
    """(model with adapter, tokenizer, environment)."""
    spec = spec_of(vars(args), config.dual)
    model, folder = load(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json"))
    check_tokenizer_fits(tokenizer, model.config.vocab_size)
    if args.prompt_tokens + config.max_new_tokens > model.config.context:
        both = f"--prompt_tokens {args.prompt_tokens} and --max_new_tokens {config.max_new_tokens}"
        raise ValueError(f"{both} exceed the model's context of {model.config.context}")
    flags = asdict(args) | {"max_new_tokens": config.max_new_tokens}
    env = sentiment(flags, tokenizer, reward_model(args, config, root), labelling(args))
    attach(model, spec, seed=config.seed)
    return model, tokenizer, env


def seed_names(metrics: dict[str, float], config) -> dict[str, float]:
    """A step's metrics under the names that all methods share: kl in nats a completion (PPO's own is a token's)."""
    return metrics | {"kl": metrics["kl_completion"]} if "kl_completion" in metrics else metrics


def judged(trainer, args: Flags, prompts: list[str], modes: dict) -> dict[str, dict]:
    """verdict.evaluate's rows on some prompts, by mode, each with the rewards' sample deviation and their number."""
    size, law = trainer.config.max_new_tokens, trainer.config.law()
    rows = {}
    for mode, scales in modes.items():
        row = evaluate(trainer.sampler, scales, trainer.env, trainer.tokenizer, len(prompts), size, law, prompts=prompts)
        rewards = row["rewards"]
        rows[mode] = row | {"n": len(rewards), "std": statistics.stdev(rewards) if len(rewards) > 1 else 0.0}
    return rows


@dataclass
class Best:
    """The checkpoint with the highest validation reward so far; of equals the earliest. Step 0 is the untrained policy."""

    step: int
    val_reward: float
    tensors: dict[str, torch.Tensor]


def train(run, trainer, args: Flags, root: Path) -> int:
    """All of a run but its reward model; returns the exit status: 0, 1 (a step failed) or 130 (Ctrl-C, resumable)."""
    model, config, start = trainer.model, trainer.config, time.perf_counter()
    prompts, on = trainer.env.prompts("validation"), modes_of(model)["both"]
    best, spent, counts, previous = None, 0.0, {"tokens": 0, "prompts": 0, "seconds": 0.0}, 0
    if run.checkpoint:
        previous, tensors, state = load_checkpoint(run.checkpoint)
        trainer.restore(tensors, state["trainer"])
        best, spent, counts = Best(**state["best"]), state["wall_s"], state["counts"]
        restore_rng(state["rng"])
    about = f"{model.config.family}, adapter {args.lora_config}, {args.device} {args.dtype}"
    run.print(f"run folder {run.folder}\n{args.model}: {about}")

    def wall() -> float:
        return spent + time.perf_counter() - start

    def checkpoint(step: int) -> None:
        tensors, state = trainer.state()
        state = {"trainer": state, "best": vars(best), "counts": counts, "rng": rng_state()}
        run.save_checkpoint(step, tensors, state | {"wall_s": wall()})

    def validate(step: int) -> Best:
        mode = "validation" if step else "untrained"
        rows = judged(trainer, args, prompts, {mode: on if step else None})
        row, now = rows[mode], best
        if best is None or row["reward"] > best.val_reward:
            now = Best(step, row["reward"], {name: t.detach().clone() for name, t in adapter_tensors(model).items()})
        figures = dict(zip(VALIDATION, (row["reward"], row["std"], row["kl"], now.val_reward)))
        run.log(step, figures)
        run.print(f"{len(prompts)} validation prompts @ {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        run.print(samples(numbers_of(rows)))
        return now

    per_step = config.batch_size // getattr(config, "num_generations", 1)
    bar = tqdm(range(previous, config.max_steps), initial=previous, total=config.max_steps, desc="train", smoothing=0.05)
    with runs.interruptible() as interrupt:
        best = best or validate(0)
        for step in bar:
            began = time.perf_counter()
            try:
                metrics, sample = trainer.step()
            except FloatingPointError as error:
                checkpoint(step)
                run.print(f"error: step {step}: {error}. The state before it is in {run.folder}/checkpoint-{step}")
                return 1
            done = step + 1
            counts["tokens"] += round(metrics["length"] * config.batch_size)  # a mean in fp32, of whole numbers
            counts["prompts"] += per_step
            counts["seconds"] += time.perf_counter() - began
            shown = {name: counts[name] for name in ("tokens", "prompts")} | {"time/seconds": counts["seconds"]}
            run.log(done, seed_names(metrics, config) | shown)
            bar.set_postfix_str(f"reward {metrics['reward']:.2f}")
            if done % args.logging_steps == 0 or done == config.max_steps:
                run.sample(done, sample() if callable(sample) else sample)
            if done % args.validate_every == 0 or done == config.max_steps:
                best = validate(done)
            if (args.save_steps and done % args.save_steps == 0) or done == config.max_steps or interrupt.requested:
                checkpoint(done)
            if interrupt.requested:
                run.print(f"stopped after step {done}; go on with: {run.resume_command()}")
                return 130
    finish(run, trainer, args, best, wall)
    with alone(root):
        atomic_write(root / "comparison.json", json.dumps(compare(root), indent=1) + "\n")
    return 0


def finish(run, trainer, args: Flags, best: Best, wall) -> None:
    """The test, and the run's files; RESULT last."""
    model, config, folder = trainer.model, trainer.config, run.folder
    prompts = trainer.env.prompts("test")  # here and nowhere else
    modes = {"last" if mode == "both" else mode: scales for mode, scales in modes_of(model, args.bad_scale).items()}
    rows = judged(trainer, args, prompts, modes)
    (folder / "model").mkdir(exist_ok=True)
    save_adapter(model, folder / "model" / "adapter.safetensors")
    if model.adapter.spec.kind in LOW_RANK:
        for branch in (b for b in model.adapter.spec.branches if b.rank):
            export_peft(model, branch.name, folder / "model" / "peft" / branch.name, args.model)
    last = {name: t.detach().clone() for name, t in adapter_tensors(model).items()}
    set_adapter_tensors(model, best.tensors, "the best checkpoint")
    rows |= judged(trainer, args, prompts, {"best": modes["last"] if best.step else None})
    save_adapter(model, folder / "model" / "best.safetensors")
    set_adapter_tensors(model, last, "the last checkpoint")
    atomic_write(folder / "samples.txt", pages(rows, SAMPLES_KEPT))
    rows = numbers_of(rows)
    run.print(f"\n== {len(prompts)} test prompts ==\n{table(rows)}\n\n{samples(rows)}\n")
    run.log(config.max_steps, {f"test_reward/{mode}": row["reward"] for mode, row in rows.items()})
    steps, validation = logged(folder)
    test = {mode: {key: row[key] for key in TEST} for mode, row in rows.items()}
    test["best"]["step"] = best.step
    wall_s = round(wall(), 1)
    results = {
        "method": run.config["method"], "seed": config.seed, "config": run.config, "untrained": validation[0], "steps": steps,
        "validation": validation, "test": test, "test_reward": test["last"]["reward"], "wall_s": wall_s,
    }  # fmt: skip
    atomic_write(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    atomic_write(folder / RESULT, json.dumps({"modes": rows, "wall_s": wall_s, "steps": config.max_steps}, indent=1) + "\n")
    run.print(f"{config.max_steps} steps in {wall_s:.0f} s; {RESULTS}, {RESULT} and model/ in {folder}")
    assert all(math.isfinite(v) for row in rows.values() for v in row.values() if isinstance(v, float))


def logged(folder: Path) -> tuple[list[dict], list[dict]]:
    """(a row a step, a row a validation) of a run's logs, as results.json has them; null where a method lacks a figure."""
    metrics = runs.read_metrics(folder)
    seconds = {row["step"]: row["time/seconds"] for row in runs.read_metrics(folder, "timings.jsonl") if "time/seconds" in row}
    steps = [
        {key: row[key] for key in ("step", *STEP)} | {key: row.get(key) for key in OWN} | {"seconds": seconds[row["step"]]}
        for row in metrics
        if "tokens" in row
    ]
    return steps, [{key: row[key] for key in ("step", *VALIDATION)} for row in metrics if "val_reward" in row]


def compare(root: Path) -> dict[str, dict]:
    """The finished runs beside each other, by folder: what each began with, came to and used."""
    found = {}
    for path in sorted(root.glob(f"*/{RESULTS}")):
        if not (path.parent / "config.yaml").is_file():
            continue  # no run: analyze.py calls its own numbers so too
        results = json.loads(path.read_text(encoding="utf-8"))
        last = results["steps"][-1]
        found[path.parent.name] = (
            {key: results[key] for key in ("method", "seed", "test", "wall_s")}
            | {"best_val_reward": results["validation"][-1]["best_val_reward"]}
            | {key: last[key] for key in ("step", "tokens", "prompts", "seconds")}
        )
    return found


def main(argv: list[str], algorithm: str, cli) -> int:
    name, module, args, config = parse(argv, algorithm, cli)
    if args.threads:
        torch.set_num_threads(args.threads)
    check(args, config)
    folder, resolved = describe(name, args, config)
    training.check_folder(folder, resolved, args.resume)
    model, tokenizer, env = build(args, config, folder.parent)
    torch.manual_seed(config.seed)
    trainer = module.Trainer(model, env, tokenizer, config)  # what it refuses, it refuses before there is a folder
    with runs.Run.open(folder, resolved, resume=args.resume) as run:
        run.print(env.about)
        return train(run, trainer, args, folder.parent)
