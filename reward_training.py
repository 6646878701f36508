"""How a reward model learns, and how far it can be trusted: train_reward.py's work, for whoever needs a judge.

    settings = Settings(kind="sentiment", max_tokens=80)
    school = prepare(settings)                   # reads the texts, refuses what is wrong; nothing is written
    figures = learn(school, settings, log)       # school.model is trained, and carries its figures

The transformer is frozen and only the head learns, from states that are computed once; with a branch, it learns too.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import check_device
from reward_data import preference_parts, sentiment_parts
from reward_model import RewardModel, Row, check_kind, new_reward_model
from sft import batch_of


@dataclass
class Settings:
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
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "float32"
    """of the backbone: float32 or bfloat16; head and branch stay float32"""


PARTS = {"preference": preference_parts, "sentiment": sentiment_parts}
HELD_OUT = {"preference": "test", "sentiment": "validation"}  # the reviews' test part is the policy's, once, at the end


def check(settings: Settings) -> None:
    """What flags can get wrong before anything is loaded."""
    check_kind(settings.kind, settings.lora_config)
    check_device(settings.device)
    if settings.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown --dtype {settings.dtype!r}; known: float32, bfloat16")
    if settings.dataset and settings.train_split == settings.eval_split:
        raise ValueError(f"--eval_split {settings.eval_split!r} is the training split too: judge by texts of its own")
    for name in ("max_texts", "max_tokens", "batch_size", "max_steps", "bins", "logging_steps"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    for name in ("lr", "weight_decay"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise ValueError(f"--{name} must be at least 0, not {getattr(settings, name)}")


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


def fit(log: Callable, model: RewardModel, examples: Examples, settings: Settings, states: torch.Tensor | None) -> None:
    """Trains in place; log(step, metrics). states (N * K, C): what the frozen transformer makes of every text; None where a
    branch trains with it."""
    optimizer, (n, k) = torch.optim.AdamW(model.trainable(), weight_decay=settings.weight_decay), examples.signs.shape
    for step in tqdm(range(settings.max_steps), desc="train"):
        chosen = torch.tensor(batch_of(n, step, min(settings.batch_size, n), settings.seed))
        texts = (chosen[:, None] * k + torch.arange(k)).flatten()
        pooled = model.pooled(*model.padded([examples.rows[i] for i in texts])) if states is None else states[texts]
        margin = margins(model, pooled, examples.signs[chosen])
        loss = F.softplus(-margin).mean()
        if not math.isfinite(loss.item()):
            raise ValueError(f"step {step}: the loss is {loss.item()}; lower --lr {settings.lr}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.max_steps))
        optimizer.step()
        if (step + 1) % settings.logging_steps == 0 or step + 1 == settings.max_steps:
            log(step + 1, {"loss": loss.item(), "accuracy": (margin > 0).float().mean().item()})


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


# -------------------------------------------------------------------------------------------------------------- all of it


@dataclass
class School:
    """A reward model that has learned nothing yet, and its texts."""

    model: RewardModel
    train: Examples
    held_out: Examples
    about: str  # a line that says what was left out


def prepare(settings: Settings) -> School:
    """Raises ValueError for a dataset, a backbone or a flag that is wrong, and where no pair fits the context."""
    check(settings)
    parts, about = PARTS[settings.kind](settings.dataset, settings.train_split, settings.eval_split)
    parts["reward"] = parts["reward"][: settings.max_texts]
    model = new_reward_model(
        settings.kind, settings.model, settings.lora_config, settings.max_tokens, settings.seed, settings.dtype, settings.device
    )
    read = {name: read_examples(model, parts[name]) for name in ("reward", HELD_OUT[settings.kind])}
    for name, (examples, _) in read.items():
        if not len(examples.signs):
            raise ValueError(f"no pair of the part {name!r} fits the context of {settings.model}")
    (train, left_out), (held_out, more) = read.values()
    return School(model, train, held_out, f"{about}; {left_out + more} longer than the context")


def learn(school: School, settings: Settings, log: Callable) -> dict:
    """Trains school.model and judges it. Returns `judge`'s figures of the training part and the held-out one, by name."""
    model, train = school.model, school.train
    states = None if settings.lora_config else model.pool_all(train.rows)
    fit(log, model, train, settings, states)
    states = model.pool_all(train.rows) if states is None else states
    model.normalize(states)
    with torch.no_grad():
        scored = {"train": (states, train), HELD_OUT[settings.kind]: (model.pool_all(school.held_out.rows), school.held_out)}
        figures = {name: judge(margins(model, s, part.signs).cpu(), settings.bins) for name, (s, part) in scored.items()}
    model.figures = figures
    return figures
