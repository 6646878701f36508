"""What train_ppo.py and train_dpo.py do alike: flags, checks, building, the phases, the picture.

Phase 0 teaches base text (base_text.py) and evaluates: reward on sample outputs, perplexity on held-out base text. Phase 1 trains
and evaluates every --eval_every steps, phase 2 evaluates what it came to, phase 3 is in the rows of verdict.json.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import runs
import training
from adapters import AdapterFlags, attach, branch_parameters, spec_of
from base_text import Interleaved, TextTrainer, teach, text_branches
from data import check_tokenizer_fits, load_tokenizer
from envs import Labelling, check_lengths
from model import load, read_json
from preference_env import base_texts, check_reward, reported_rewards, with_base_text
from reward_specs import get_reward, objectives


@dataclass
class Flags(AdapterFlags):
    model: str = "tiny"
    """tiny (the embedded model), a local Hugging Face folder, or a Hub id"""
    env: str = "preferences"
    """preferences: dialogues; or stories, rewarded as train_grpo.py's"""
    dataset: str = ""
    """preference pairs, or stories: a local folder or Hub id; empty: the embedded world's"""
    column: str | None = None
    """of stories, the dataset's text column; default: story, text or prompt, whichever it has"""
    train_split: str = "train"
    eval_split: str = "test"
    """prompts of the evaluation, never trained on"""
    max_prompts: int = 10_000
    """training prompts at most; DPO learns from the pairs on them"""
    prompt_tokens: int = 64
    """dialogues: longer prompts are left out; stories: a prompt is the first so many tokens of a text"""
    reward: str = ""
    """dialogues: manners (the default), brief, steps, or the folder of a run of train_reward.py; stories: a reward of
    configs/rewards.yaml"""
    base_text: str = ""
    """what must stay: a dataset (WikiText-2, say) by folder or Hub id; empty: the embedded world's texts"""
    max_tokens: int = 256
    """base texts, and DPO's pairs, are of so many tokens at most"""
    ssl_steps: int = 200
    """phase 0: steps on base text before anything else; 0: none"""
    ssl_texts: int = 4000
    """base texts to learn from"""
    ssl_split: str = "train"
    """the split of --base_text that they are of; test: what is behind the texts that the perplexity is measured on"""
    ssl_batch_size: int = 16
    ssl_lr: float = 1e-3
    """AdamW's learning rate on base text"""
    lm_every: int = 0
    """a step on base text before every so many steps of training; 0: none"""
    lora_config: str = "bundles"
    """bundles, bundles_rl2, one_bundle (docs/bundles.md), or any of train_grpo.py's: r6f7 has as many parameters on tiny; full"""
    bad_scale: float | None = None
    """deploy with the bad branch at this scale: adds the row `deployed` to the verdict; needs --routing dual"""
    eval_rewards: str = ""
    """further rewards to report at every evaluation, comma-separated; names as --reward takes them"""
    eval_prompts: int = 128
    eval_texts: int = 128
    """held-out base texts that the perplexity is measured on"""
    eval_every: int = 50
    """evaluate reward, KL and perplexity every so many steps; 0: only at the end"""
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

    def __post_init__(self):
        self.reward = self.reward or "manners"

    @property
    def eval_routing_steps(self) -> int:  # as training.py calls it
        return self.eval_every


QUIET = {"resume", "output_dir", "device", "threads", "logging_steps", "bad_scale", "eval_prompts", "eval_texts", "save_steps",
         "eval_rewards", "eval_every", "flow_every", "algorithm", "config"}  # fmt: skip # do not change what is learned
LEAD = ("env", "reward", "loss_routes", "lora_config", "lr", "beta")


def check(args: Flags, config) -> None:
    """What flags can get wrong, also together, before anything is loaded."""
    sizes = ("eval_prompts", "eval_texts", "prompt_tokens", "max_prompts", "logging_steps", "ssl_texts", "ssl_batch_size")
    training.check(args, config, (*sizes, "max_tokens"))
    for name in ("ssl_steps", "ssl_lr", "lm_every", "eval_every", "save_steps"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name} must be at least 0, not {getattr(args, name)}")
    if config.dual and (args.ssl_steps or args.lm_every):
        raise ValueError("--routing dual has no branch for base text: --ssl_steps 0, --lm_every 0")
    texts = ("ssl_texts", "ssl_split", "ssl_batch_size", "ssl_lr")
    idle = [name for name in texts if getattr(args, name) != getattr(Flags, name)]
    if idle and not args.ssl_steps and not args.lm_every:
        raise ValueError(f"--{idle[0]} does nothing with --ssl_steps 0 and --lm_every 0: leave it out")
    if args.ssl_split != "train" and not args.base_text:
        raise ValueError("--ssl_split is a flag of --base_text: the embedded world's texts to learn from are those of train")
    if args.env not in ("preferences", "stories"):
        raise ValueError(f"unknown --env {args.env!r}; known: preferences, stories")
    if args.env == "preferences" and args.column is not None:
        raise ValueError("--column is a flag of --env stories: pairs are in columns chosen and rejected")
    for name in objectives(asdict(args)):
        check_reward(asdict(args), name)
        if args.env == "stories" and getattr(config, "uses_labels", False) and get_reward(name).detector is None:
            raise ValueError(f"--routing dual: reward {name!r} has no detector to label by; give it one")


def describe(name: str, default: str, algorithm, args: Flags, config) -> tuple[Path, dict]:
    """(run folder, resolved config)."""
    resolved = {"algorithm": name} | asdict(args) | asdict(config)
    defaults = {"algorithm": default} | asdict(type(args)()) | asdict(algorithm.Config())
    paid, lead = objectives(resolved), [name for name in LEAD if resolved[name] != ""]
    shown = resolved | {"reward": paid if len(paid) > 1 else paid[0]}
    called = runs.run_name(shown, defaults, lead=lead, ignore=QUIET | {"rewards"})
    return Path(args.output_dir or Path("output") / f"{default.removeprefix('rl_')}_{called}"), resolved


def build(args: Flags, config, labelling: Labelling = Labelling()):
    """Model with adapter, tokenizer, environment, base texts to learn from, rewards to report. Cheap checks first; weights
    last."""
    check(args, config)
    spec = spec_of(vars(args), config.dual)
    model, folder = load(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json"))
    check_tokenizer_fits(tokenizer, model.config.vocab_size)
    if args.max_tokens > model.config.context:
        raise ValueError(f"--max_tokens {args.max_tokens} exceeds the model's context of {model.config.context}")
    env = with_base_text(asdict(args), tokenizer, args.eval_prompts, labelling)
    rewards = reported_rewards(asdict(args), env, tokenizer, args.eval_rewards)
    if args.env == "stories":  # dialogues are checked as they are made
        training.check_prompts(env)
    check_lengths(env, tokenizer, config.max_new_tokens, model.config.context, args.eval_prompts)
    attach(model, spec, seed=config.seed)
    return model, tokenizer, env, texts_to_learn(args, tokenizer), rewards


def texts_to_learn(args: Flags, tokenizer) -> list[list[int]]:
    """Base texts that the perplexity is not measured on. Raises ValueError where there are none."""
    if not args.ssl_steps and not args.lm_every:
        return []
    measured = args.eval_texts if args.ssl_split == "test" else 0
    found = base_texts(args.base_text, tokenizer, measured + args.ssl_texts, args.max_tokens, args.ssl_split)[measured:]
    if not found:
        remedy = "but the texts that the perplexity is measured on: lower --eval_texts" if measured else "to learn from"
        raise ValueError(f"--base_text {args.base_text} has nothing in its split {args.ssl_split!r} {remedy}")
    return found


def run_phases(run, trainer, texts, rewards, args: Flags, config, progress) -> int:
    """All of a run, given its folder, the algorithm's trainer and what `build` made; returns the exit status."""
    model, pad_id, held_out = trainer.model, trainer.tokenizer.pad_id, trainer.env.held_out["base"]
    taught = text_branches(model)
    if args.ssl_steps:
        text = TextTrainer(model, texts, pad_id, taught, args.ssl_lr, args.ssl_batch_size, config.seed)
        teach(run, text, args.ssl_steps, held_out)
    table = dict(trainer.router.table) if trainer.router else {}
    between = table.get("lm_loss", tuple(branch_parameters(model)))
    text = TextTrainer(model, texts, pad_id, between, args.ssl_lr, args.ssl_batch_size, config.seed + 1)
    trainer = Interleaved(trainer, text, args.lm_every)
    return training.train(run, trainer, args, rewards, progress, draw_curves)


def draw_curves(folder: Path, evaluations: list[dict]) -> None:
    """curves.png: reward, perplexity and KL on held-out prompts and texts, the reward-perplexity plane, alphas and norms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logged = [row for row in runs.read_metrics(folder) if "lr" in row]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.8), layout="constrained")
    for axis, key in zip(axes.flat, ("reward", "perplexity", "kl")):
        for mode in evaluations[-1]["rows"]:
            points = [(e["step"], e["rows"].get(mode, e["rows"]["untrained"])[key]) for e in evaluations]
            axis.plot(*zip(*points), ":" if mode == "untrained" else "-", marker="o", markersize=3, label=mode)
        axis.set(title=f"held out: {key}", xlabel="step")
    for key in (key for key in evaluations[-1]["rows"]["untrained"] if key.startswith("eval/")):
        points = [(e["step"], e["rows"].get("both", e["rows"]["untrained"])[key]) for e in evaluations]
        axes.flat[0].plot(*zip(*points), "--", linewidth=1.2, label=f"both: {key}")
    axes.flat[1].set_yscale("log")  # a mode may have lost a thousandfold
    plane = [e["rows"].get("both", e["rows"]["untrained"]) for e in evaluations]
    axes.flat[3].plot([row["perplexity"] for row in plane], [row["reward"] for row in plane], "-o", markersize=3)
    axes.flat[3].set(title="the plane", xlabel="perplexity", ylabel="reward")
    for axis, prefix in zip(axes.flat[4:], ("alpha/", "grad_norm/")):
        for key in dict.fromkeys(key for row in logged for key in row if key.startswith(prefix)):
            points = [(row["step"], row[key]) for row in logged if key in row]
            axis.plot(*zip(*points), linewidth=1.2, label=key.removeprefix(prefix))
        axis.set(title=prefix.rstrip("/"), xlabel="step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(folder / "curves.png", dpi=110)
    pyplot.close(figure)
