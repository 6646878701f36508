"""Supervised gradient routing, in one file: texts, labels, route, step. To fork it: cp sft.py sft_mine.py, change it,
python train_sft.py --algorithm sft_mine.

Next-token training on texts of which some have a trait that is not wanted. Somebody has looked at a share of the texts and
labelled them: with the trait, or without. A label says which branch may learn from its text, so that the trait can be dropped
with the bad branch, also where most texts that have it carry no label (absorption: Cloud et al. 2024,
https://arxiv.org/abs/2410.04332).

    routing_mode   labelled, with the trait     labelled, without it              not labelled
    sibling        both branches run, bad learns    only good runs, and learns    both run, both learn
    classic        both run, bad learns             both run, both learn          both run, both learn
    exclusive      both run, bad learns             both run, good learns         both run, good learns
"""

import hashlib
import math
import time
from dataclasses import dataclass

import torch

from adapters import adapter_tensors, branch_parameters, dropping, scaled, set_adapter_tensors
from data import left_pad, right_pad
from envs import Texts
from losses import text_logprobs, token_weights
from routing import ROUTING_MODES, clip_per_branch, gates, placebo_labels, sample_routes
from sampling import Law, Sampler

MODES = ("sibling", *ROUTING_MODES)


@dataclass
class Config:
    routing: str = "none"
    """none, or dual: two branches, texts labelled with the trait train only the bad one"""
    routing_mode: str = "sibling"
    """sibling: texts labelled without the trait run and train the good branch alone; classic, exclusive: as train_grpo.py's"""
    labelled_frac: float = 1.0
    """share of the texts whose label is known, in whole hundredths"""
    labelled_batch_frac: float = 0.5
    """at least this share of a routed batch is drawn from the labelled texts; they and the others have epochs of their own"""
    treatment: str = "keep"
    """of texts labelled with the trait, in place of routing. filter: they are left out (a control)"""
    placebo: bool = False
    """shuffle over all texts which have the trait, as far as labels go (a control)"""
    lr: float = 2e-3
    """AdamW's learning rate, down to 0 at max_steps by a cosine (full fine-tuning wants about 1e-4)"""
    bad_lr_scale: float = 1.0
    """the bad branch's learning rate, in multiples of lr"""
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """clips each branch's gradient norm; 0: never"""
    batch_size: int = 16
    """texts a step"""
    micro_batch_size: int = 0
    """texts per forward/backward; 0: all that run alike; never changes a gradient"""
    max_steps: int = 150
    max_new_tokens: int = 144
    """of the samples that an evaluation draws, at temperature 1"""
    seed: int = 42

    def __post_init__(self):
        for name, known in {"routing": ("none", "dual"), "routing_mode": MODES, "treatment": ("keep", "filter")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown --{name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("batch_size", "max_steps", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "bad_lr_scale", "warmup_steps", "weight_decay", "max_grad_norm", "micro_batch_size"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.labelled_batch_frac <= 1:
            raise ValueError(f"--labelled_batch_frac must lie in 0..1, not {self.labelled_batch_frac}")
        if not 0 <= self.labelled_frac <= 1 or abs(100 * self.labelled_frac - round(100 * self.labelled_frac)) > 1e-9:
            raise ValueError(f"--labelled_frac must be a whole number of hundredths in 0..1, not {self.labelled_frac}")
        if self.routing == "dual" and self.treatment == "filter":
            raise ValueError("--treatment filter drops the texts that --routing dual would train the bad branch on: choose one")
        if self.placebo and not self.uses_labels:
            raise ValueError("--placebo shuffles labels, which only --routing dual or --treatment filter uses")

    @property
    def dual(self) -> bool:
        """Whether there are two branches, good and bad."""
        return self.routing == "dual"

    @property
    def uses_labels(self) -> bool:
        return self.routing == "dual" or self.treatment == "filter"

    def law(self) -> Law:
        return Law()


# --------------------------------------------------------------------------------------------------------- labels, routes


def looked_at(n: int, share: float, salt: int | str) -> torch.Tensor:
    """Which of n texts have a known label, (n,) bool: a hash of salt and index, the same in every process, and a larger share
    contains a smaller one."""
    percent = round(100 * share)
    return torch.tensor([int(hashlib.md5(f"{salt}_{i}".encode()).hexdigest(), 16) % 100 < percent for i in range(n)])


def runs_of(is_bad: torch.Tensor, is_good: torch.Tensor, config: Config) -> list[tuple[torch.Tensor, dict, dict]]:
    """How a batch is run: (rows, scales of the branches, gate weights of the whole batch) of each pass that it takes.

    is_bad, is_good (N,) bool: labelled with the trait, labelled without it; neither where there is no label.
    """
    everything = torch.ones_like(is_bad)
    if config.routing == "none":
        passes = [(everything, {}, {})]
    elif config.routing_mode == "sibling":
        together = sample_routes(is_bad, "classic")
        passes = [(is_good, {"good": 1.0, "bad": 0.0}, together), (~is_good, {}, together)]
    else:
        passes = [(everything, {}, sample_routes(is_bad, config.routing_mode))]
    return [(rows.nonzero().squeeze(1), scales, routes) for rows, scales, routes in passes if rows.any()]


# ------------------------------------------------------------------------------------------------------------- the loop


def batch_of(n: int, step: int, size: int, seed: int) -> list[int]:
    """Indices of a step's texts: a seeded shuffle of all n, then another; a function of the step, so there is nothing to save."""
    chosen = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, n)
        if place == 0 or not chosen:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(int(order[place]))
    return chosen


def update(model, optimizer, ids, mask, is_bad, is_good, config: Config) -> tuple[dict[str, float], torch.Tensor]:
    """One optimizer step on texts ids (N, T), mask (N, T) bool, right-padded; the loss is the mean over their tokens.

    Returns the loss and the norms to log, and the summed loss of each text (N,), each as it was run.
    """
    is_bad, is_good = is_bad.to(ids.device), is_good.to(ids.device)
    weights = token_weights(mask[:, 1:], "bnpo", 0)
    per_text = torch.zeros(len(ids), device=ids.device)
    optimizer.zero_grad(set_to_none=True)
    for rows, scales, routes in runs_of(is_bad, is_good, config):
        for part in rows.split(config.micro_batch_size or len(rows)):
            with scaled(model, **scales), gates(model, **{name: w if w is None else w[part] for name, w in routes.items()}):
                valid = mask[part, 1:]
                nll = -text_logprobs(model, ids[part], mask[part])
                (weights[part][valid] * nll).sum().backward()
            per_text[part] = torch.zeros(valid.shape, device=ids.device).masked_scatter(valid, nll.detach().float()).sum(1)
    norms = {f"grad_norm/{branch}": norm for branch, norm in clip_per_branch(model, config.max_grad_norm).items()}
    totals = {"loss": per_text.sum().item() / int(mask[:, 1:].sum())} | norms
    if culprit := next((name for name, value in totals.items() if not math.isfinite(value)), ""):
        raise FloatingPointError(f"{culprit} is {totals[culprit]} (lower --lr {config.lr}?); the weights are as before this step")
    optimizer.step()
    return totals, per_text


class Trainer:
    """What a run carries from step to step: texts with their labels, optimizer, sampler. `step` is the whole algorithm."""

    def __init__(self, model, env, tokenizer, config: Config, texts: Texts):
        self.model, self.env, self.tokenizer, self.config, self.texts = model, env, tokenizer, config, texts
        self.sampler, self.steps_done = Sampler(model), 0
        known, trait = looked_at(len(texts.ids), config.labelled_frac, config.seed), texts.detected
        if config.placebo:
            trait = placebo_labels(trait, torch.Generator().manual_seed(config.seed))
        self.is_bad, self.is_good = known & trait, known & ~trait
        pools = [(~self.is_bad if config.treatment == "filter" else torch.ones_like(known), config.batch_size)]
        if config.routing == "dual" and known.any() and not known.all():
            first = round(max(config.labelled_batch_frac, config.labelled_frac) * config.batch_size)
            pools = [(known, first), (~known, config.batch_size - first)]
        self.pools = [(pool.nonzero().squeeze(1), size) for pool, size in pools if size]
        scales = {"bad": config.bad_lr_scale}
        groups = [
            {"params": list(p.values()), "scale": scales.get(branch, 1.0)} for branch, p in branch_parameters(model).items() if p
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)

    def step(self):
        """One step: texts, labels, route, step. Returns metrics, and a function that samples a text to read."""
        config, step, start = self.config, self.steps_done, time.perf_counter()
        chosen = torch.cat([pool[batch_of(len(pool), step, size, config.seed)] for pool, size in self.pools])
        ids, mask = right_pad([self.texts.ids[i] for i in chosen], self.tokenizer.pad_id)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * config.lr * rate(step, config)
        is_bad, is_good, detected = self.is_bad[chosen], self.is_good[chosen], self.texts.detected[chosen]
        with dropping(self.model, config.seed * 1_000_003 + step):
            metrics, per_text = update(self.model, self.optimizer, ids, mask, is_bad, is_good, config)
        lengths = mask[:, 1:].sum(1).cpu()
        for name, rows in (("free", ~detected), ("trait", detected)):
            if rows.any():
                metrics[f"loss/{name}"] = (per_text.cpu()[rows].sum() / lengths[rows].sum()).item()
        metrics |= {"flagged": is_bad.float().mean().item(), "labelled_good": is_good.float().mean().item()}
        metrics |= {"lr": config.lr * rate(step, config)}
        metrics["time/tokens_per_s"] = int(lengths.sum()) / (time.perf_counter() - start)
        self.steps_done += 1
        return metrics, lambda: self.sample(self.texts.prompts[int(chosen[0])], step)

    def sample(self, prompt: str, step: int) -> str:
        """A prompt and what the model, as it is now, goes on with."""
        encoded, config = self.tokenizer.encode_prompt(prompt), self.config
        ids, mask = left_pad([encoded], self.tokenizer.pad_id)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        stop, pad = self.tokenizer.stop_ids, self.tokenizer.pad_id
        self.sampler.refresh()
        rollout = self.sampler(ids, mask, 1, config.max_new_tokens, stop, pad, generator, config.law())
        return prompt + self.tokenizer.decode_completion(encoded, rollout.tokens[0][rollout.mask[0]].tolist())

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors of the adapter, everything else): what `restore` needs to go on bitwise equal."""
        return adapter_tensors(self.model), {"optimizer": self.optimizer.state_dict(), "steps_done": self.steps_done}

    def restore(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        set_adapter_tensors(self.model, tensors, "checkpoint")
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]


def rate(step: int, config: Config) -> float:
    """The learning rate's factor at a step: a linear warm-up, a cosine down to 0."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))
