"""Supervised gradient routing from the command line: fine-tunes on texts, some with an unwanted trait; prints the verdict.

    python train_sft.py --routing dual                                               # the embedded fables, a minute
    python train_sft.py --routing dual --labelled_frac 0.1                           # nine of ten labels unknown
    python train_sft.py --model PATH --dataset PATH --trait "dragon,dragons" --routing dual
    python train_sft.py --model PATH --dataset PATH --lora_config full --lr 1e-4     # plain fine-tuning, a Hugging Face folder

Flags are the fields of `Args` below and of the algorithm's `Config` (sft.py). Everything that a run writes is in its folder.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

import runs
import training
from adapters import AdapterFlags, attach, spec_of
from data import check_tokenizer_fits, load_tokenizer
from envs import check_lengths, imitation, read_texts
from model import load, read_json, save
from reward_specs import get_trait


@dataclass
class Args(AdapterFlags):
    model: str = "tiny"
    """tiny (the embedded model), a local Hugging Face folder, or a Hub id"""
    dataset: str = ""
    """texts: a local folder or Hub id; empty: the embedded world's fables"""
    column: str | None = None
    """the dataset's text column; default: story, text or prompt, whichever it has"""
    train_split: str = "train"
    eval_split: str = "test"
    """texts of the evaluation, never trained on"""
    trait: str = "fable_unkind"
    """what is not wanted: a reward of configs/rewards.yaml with a detector, or single words parted by commas"""
    max_texts: int = 10_000
    """training texts at most"""
    max_tokens: int = 256
    """a text is cut after so many tokens"""
    prompt_tokens: int = 8
    """a prompt of the evaluation is the first so many tokens of a text"""
    lora_config: str = "r16"
    """r1 ... r32, r1h (every second layer), r32f4 (good 32, bad 4), m16 (gated MLP), full; without routing the summed rank"""
    bad_scale: float | None = None
    """deploy with the bad branch at this scale: adds the row `deployed` to the verdict; needs --routing dual"""
    eval_rewards: str = ""
    """further rewards to report of the samples, comma-separated"""
    eval_prompts: int = 256
    eval_texts: int = 256
    """held-out texts whose loss every evaluation measures"""
    eval_routing_steps: int = 0
    """evaluate all modes every so many steps; 0: only at the end"""
    logging_steps: int = 10
    """log metrics and a sample every so many steps"""
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

QUIET = {"resume", "output_dir", "device", "threads", "logging_steps", "bad_scale", "eval_prompts", "eval_texts", "save_steps",
         "eval_rewards", "eval_routing_steps", "algorithm", "config"}  # fmt: skip # do not change what is learned


def parse(argv: list[str]):
    """(algorithm's name, its module, args, config)."""
    return training.parse(argv, Args, "sft", partial(tyro.cli, use_underscores=True, description=__doc__))


def check(args: Args, config) -> None:
    """What flags can get wrong, also together, before anything is loaded."""
    training.check(args, config, ("max_texts", "max_tokens", "prompt_tokens", "eval_prompts", "eval_texts", "logging_steps"))
    get_trait(args.trait)


def describe(name: str, algorithm, args: Args, config) -> tuple[Path, dict]:
    """(run folder, resolved config)."""
    resolved = {"algorithm": name} | asdict(args) | asdict(config)
    defaults = {"algorithm": "sft"} | asdict(Args()) | asdict(algorithm.Config())
    lead = ("trait", "routing", "lora_config", "lr")
    return Path(args.output_dir or Path("output") / runs.run_name(resolved, defaults, lead=lead, ignore=QUIET)), resolved


def resolve(argv: list[str]) -> tuple[Path, dict]:
    """(run folder, resolved config) of a command line, every flag checked, nothing loaded: a sweep asks before it starts."""
    name, algorithm, args, config = parse(argv)
    check(args, config)
    return describe(name, algorithm, args, config)


# --------------------------------------------------------------------------------------------------------- building


def build(args: Args, config):
    """Model with adapter, its folder, tokenizer, texts, environment. Cheap checks first; weights last."""
    check(args, config)
    spec = spec_of(vars(args), config.dual)
    model, folder = load(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json"))
    check_tokenizer_fits(tokenizer, model.config.vocab_size)
    if args.max_tokens > model.config.context:
        raise ValueError(f"--max_tokens {args.max_tokens} exceeds the model's context of {model.config.context}")
    texts = read_texts(get_trait(args.trait), tokenizer, asdict(args), args.train_split, args.max_texts)
    found = int(texts.detected.sum())
    if not 0 < found < len(texts.ids) and config.uses_labels:
        which = "none" if found == 0 else "every one"
        raise ValueError(f"{which} of {len(texts.ids)} training texts has the trait {args.trait!r}: nothing to tell apart")
    env = imitation(asdict(args), tokenizer, args.eval_prompts)
    check_lengths(env, tokenizer, config.max_new_tokens, model.config.context, args.eval_prompts)
    training.check_prompts(env)
    attach(model, spec, seed=config.seed)
    return model, folder, tokenizer, texts, env


# ------------------------------------------------------------------------------------------------------------ report


def draw_curves(folder: Path, evaluations: list[dict]) -> None:
    """curves.png: training loss and, by mode, what the samples have and the loss of held-out texts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logged = [row for row in runs.read_metrics(folder) if "lr" in row]
    last = evaluations[-1]["rows"]
    measures = ["hack", "task", *[key for key in last["both"] if key.startswith("loss/")]]
    figure, axes = pyplot.subplots(1, 1 + len(measures), figsize=(4.2 * (1 + len(measures)), 3.6), layout="constrained")
    for key in ("loss/free", "loss/trait"):
        points = [(row["step"], row[key]) for row in logged if key in row]
        if points:
            axes[0].plot(*zip(*points), linewidth=1.2, label=key)
    axes[0].set(title="training: loss (nats a token)")
    titles = {"hack": "samples: share with the trait", "task": "samples: task"}
    for axis, key in zip(axes[1:], measures):
        for mode in last:
            points = [(e["step"], e["rows"].get(mode, e["rows"]["untrained"])[key]) for e in evaluations]  # fresh: the base model
            axis.plot(*zip(*points), marker="o", markersize=4, label=mode)
        axis.set(title=titles.get(key, f"held out: {key} (nats a token)"))
    for axis in axes:
        axis.set(xlabel="step")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)
    pyplot.close(figure)


def progress(metrics: dict[str, float]) -> str:
    return f"loss {metrics['loss']:.3f} {metrics['time/tokens_per_s']:,.0f} tok/s"


# -------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str]) -> int:
    name, algorithm, args, config = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder, resolved = describe(name, algorithm, args, config)
    training.check_folder(folder, resolved, args.resume)
    model, source, tokenizer, texts, env = build(args, config)
    with runs.Run.open(folder, resolved, resume=args.resume) as run:
        torch.manual_seed(config.seed)
        trainer = algorithm.Trainer(model, env, tokenizer, config, texts)
        count = {"texts": len(texts.ids), "with the trait": int(texts.detected.sum()), "labelled so": int(trainer.is_bad.sum())}
        run.print(json.dumps(count))
        status = training.train(run, trainer, args, training.wanted_rewards(args), progress, draw_curves)
        if status == 0 and args.lora_config == "full":
            del model.adapter
            run.print(f"wrote {save(model.requires_grad_(False), folder / 'model', tokenizer_from=source)}")
        return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
