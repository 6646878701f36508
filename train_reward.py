"""Trains a reward model on preference pairs or labelled reviews; prints how far it can be trusted on what it has not seen.

    python train_reward.py                                                       # embedded dialogues, half a minute
    python train_reward.py --kind sentiment                                      # embedded reviews
    python train_reward.py --model PATH --dataset Anthropic/hh-rlhf              # a folder or a Hub id
    python train_reward.py --model PATH --dataset stanfordnlp/imdb --kind sentiment --max_tokens 80

The transformer is frozen and only the head learns, from states that are computed once; --lora_config r8 trains a branch too.
"""
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import runs
import training
from checkpoints import atomic_write
from model import check_device
from reward_data import preference_parts, sentiment_parts
from reward_model import FILE, RewardModel, Row, check_kind, new_reward_model, save_reward_model
from sft import batch_of


@dataclass
class Args:
    kind: str = "preference"
    """preference: a score, from pairs; sentiment: P(positive), from labelled texts"""
    model: str = "tiny"
    """the backbone, which must share the policy's vocabulary: tiny, a local Hugging Face folder, or a Hub id"""
    dataset: str = ""
    """pairs (chosen, rejected) or reviews (text, label): a local folder or Hub id; empty: the embedded world's"""
    train_split: str = "train"
    eval_split: str = "test"
    """pairs that are never trained on"""
    max_texts: int = 20_000
    """pairs, or reviews, to learn from at most"""
    max_tokens: int = 256
    """so many tokens are read of a text: a review's first ones; of a dialogue the whole answer and the end of the prompt"""
    lora_config: str = ""
    """a branch to train on the backbone (r8, m16, ...: as train_grpo.py's, without routing); empty: it is frozen"""
    lr: float = 1e-3
    """AdamW's learning rate, down to 0 at max_steps by a cosine"""
    weight_decay: float = 0.01
    batch_size: int = 32
    """pairs, or reviews, a step"""
    max_steps: int = 400
    bins: int = 10
    """of the reliability table"""
    seed: int = 42
    logging_steps: int = 50
    output_dir: str = ""
    """the run folder; default: output/ and a name made of what differs from the defaults"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "float32"
    """of the backbone: float32 or bfloat16; head and branch stay float32"""
    threads: int = 0
    """CPU threads; 0: torch's choice"""


RESULT = "verdict.json"  # in its folder a run is finished
QUIET = {"output_dir", "device", "threads", "logging_steps", "bins"}  # do not change what is learned
PARTS = {"preference": preference_parts, "sentiment": sentiment_parts}
HELD_OUT = {"preference": "test", "sentiment": "validation"}  # the reviews' test part is the policy's, once, at the end


def check(args: Args) -> None:
    """What flags can get wrong before anything is loaded."""
    check_kind(args.kind, args.lora_config)
    check_device(args.device)
    if args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown --dtype {args.dtype!r}; known: float32, bfloat16")
    if args.dataset and args.train_split == args.eval_split:
        raise ValueError(f"--eval_split {args.eval_split!r} is the training split too: judge by texts of its own")
    for name in ("max_texts", "max_tokens", "batch_size", "max_steps", "bins", "logging_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("lr", "weight_decay"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} must be at least 0, not {getattr(args, name)}")


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


# -------------------------------------------------------------------------------------------------------------- texts


@dataclass
class Examples:
    """N decisions between K texts: which of two answers is better, or whether one review is positive (K = 1)."""

    rows: list[Row]  # N * K texts
    signs: torch.Tensor  # (N, K): sum over k of sign * logit is the log-odds of the truth


def read_examples(model: RewardModel, texts: list) -> tuple[Examples, int]:
    """Pairs or reviews as the model reads them, and how many pairs were left out because an answer exceeds the context."""
    if model.about.kind == "sentiment":
        signs = torch.tensor([[2.0 * review.label - 1] for review in texts])
        return Examples([model.encode("", review.text) for review in texts], signs), 0
    rows = []
    for pair in texts:
        try:
            rows += [[model.encode(pair.prompt, pair.chosen), model.encode(pair.prompt, pair.rejected)]]
        except ValueError:  # cutting an answer would judge another one
            continue
    flat = [row for both in rows for row in both]
    return Examples(flat, torch.tensor([[1.0, -1.0]]).expand(len(rows), 2)), len(texts) - len(rows)


def margins(model: RewardModel, pooled: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """(N,) log-odds that the model gives to the truth; pooled (N * K, C), signs (N, K)."""
    return (model.logit(pooled).view(signs.shape) * signs.to(pooled.device)).sum(1)


# ----------------------------------------------------------------------------------------------------------- training


def fit(run, model: RewardModel, examples: Examples, args: Args, states: torch.Tensor | None) -> None:
    """Trains in place. states (N * K, C): what the frozen transformer makes of every text; None where a branch trains with it."""
    optimizer, (n, k) = torch.optim.AdamW(model.trainable(), weight_decay=args.weight_decay), examples.signs.shape
    for step in tqdm(range(args.max_steps), desc="train"):
        chosen = torch.tensor(batch_of(n, step, min(args.batch_size, n), args.seed))
        texts = (chosen[:, None] * k + torch.arange(k)).flatten()
        pooled = model.pooled(*model.padded([examples.rows[i] for i in texts])) if states is None else states[texts]
        margin = margins(model, pooled, examples.signs[chosen])
        loss = F.softplus(-margin).mean()
        if not math.isfinite(loss.item()):
            raise ValueError(f"step {step}: the loss is {loss.item()}; lower --lr {args.lr}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * step / args.max_steps))
        optimizer.step()
        if (step + 1) % args.logging_steps == 0 or step + 1 == args.max_steps:
            run.log(step + 1, {"loss": loss.item(), "accuracy": (margin > 0).float().mean().item()})


def judge(margin: torch.Tensor, bins: int) -> dict:
    """How often N decisions are right, and whether the model knows how often. margin (N,): log-odds of the truth.

    Returns n, accuracy and its standard error, loss (nats a decision), ece (expected calibration error: the mean over
    decisions of |accuracy - confidence| of their bin; Guo et al. 2017, https://arxiv.org/abs/1706.04599), and reliability, a row
    for each of the bins of equal width between .5 and 1 that has a decision.
    """
    confidence, right = margin.double().abs().sigmoid(), (margin > 0).double()
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table, n, accuracy = [], len(margin), right.mean().item()
    for b in bin_of.unique().tolist():
        inside = bin_of == b
        row = {"from": 0.5 + b / (2 * bins), "to": 0.5 + (b + 1) / (2 * bins), "n": int(inside.sum())}
        table.append(row | {"confidence": confidence[inside].mean().item(), "accuracy": right[inside].mean().item()})
    ece = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in table) / n
    loss, error = F.softplus(-margin.double()).mean().item(), math.sqrt(accuracy * (1 - accuracy) / n)
    return {"n": n, "accuracy": accuracy, "standard_error": error, "loss": loss, "ece": ece, "reliability": table}


def report(name: str, figures: dict) -> str:
    head = f"{name}: accuracy {figures['accuracy']:.3f} ± {figures['standard_error']:.3f} of {figures['n']}, "
    return head + f"loss {figures['loss']:.3f}, expected calibration error {figures['ece']:.3f}"


def reliability(figures: dict) -> str:
    line = "{from:.2f}-{to:.2f} {n:8d} {confidence:11.3f} {accuracy:9.3f}"
    return "\n".join(["bin              n  confidence  accuracy", *(line.format(**row) for row in figures["reliability"])])


# -------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str]) -> int:
    args, start = parse(argv), time.perf_counter()
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder, resolved = describe(args)
    training.check_folder(folder, resolved, resume=False)
    parts, about = PARTS[args.kind](args.dataset, args.train_split, args.eval_split)
    parts["reward"] = parts["reward"][: args.max_texts]
    model = new_reward_model(args.kind, args.model, args.lora_config, args.max_tokens, args.seed, args.dtype, args.device)
    read = {name: read_examples(model, parts[name]) for name in ("reward", HELD_OUT[args.kind])}
    for name, (examples, _) in read.items():
        if not len(examples.signs):
            raise ValueError(f"no pair of the part {name!r} fits the context of {args.model}")
    with runs.Run.open(folder, resolved) as run:
        run.print(f"run folder {folder}\n{about}; {sum(too_long for _, too_long in read.values())} longer than the context")
        (train, _), (held_out, _) = read.values()
        states = None if args.lora_config else model.pool_all(train.rows)
        fit(run, model, train, args, states)
        states = model.pool_all(train.rows) if states is None else states
        model.normalize(states)
        with torch.no_grad():
            scored = {"train": (states, train), HELD_OUT[args.kind]: (model.pool_all(held_out.rows), held_out)}
            figures = {name: judge(margins(model, s, part.signs).cpu(), args.bins) for name, (s, part) in scored.items()}
        model.figures = figures
        save_reward_model(model, folder / FILE)
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
