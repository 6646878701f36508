"""Where gradients go: which branch may learn from which sample.

    with gates(model, **sample_routes(is_rh, "classic")):     # one forward/backward, routed per sample
        loss.backward()
    clip_per_branch(model, 1.0)

`classic`: honest samples train both branches, flagged ones only `bad`. `exclusive`: honest samples train only `good`, so that
none of the task goes where it will be dropped.
A flagged sample is masked whole, its KL term with its policy term: the protected branch learns nothing from it.

One pass must equal two: `two_pass_backward` is the slow reference, homogeneous batches whose protected gradients are
removed by parameter hooks, as in the experiments this follows (Cloud et al. 2024, https://arxiv.org/abs/2410.04332).
"""
from contextlib import contextmanager

import torch

from adapters import branch_parameters, parameters_of
from model import Decoder

ROUTING_MODES = ("classic", "exclusive")
TREATMENTS = ("keep", "filter", "zero", "subtract")

# ---------------------------------------------------------------------------------- what routing is compared with


def placebo_labels(is_rh: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The labels (N,) shuffled over the batch: as many as before, on samples they say nothing about."""
    return is_rh[torch.randperm(len(is_rh), generator=generator)]


def treated_rewards(rewards: torch.Tensor, is_rh: torch.Tensor, treatment: str, penalty: float) -> torch.Tensor:
    """Rewards (N,) after what is done to flagged samples: `zero` pays them nothing, `subtract` pays `penalty` less; `keep`
    and `filter` (which drops them later) leave rewards as they are."""
    if treatment not in TREATMENTS:
        raise ValueError(f"unknown treatment {treatment!r}; known: {', '.join(TREATMENTS)}")
    if treatment == "zero":
        return torch.where(is_rh, 0.0, rewards)
    return torch.where(is_rh, rewards - penalty, rewards) if treatment == "subtract" else rewards


# ------------------------------------------------------------------------------------------------------ per sample


def sample_routes(is_rh: torch.Tensor, mode: str) -> dict[str, torch.Tensor | None]:
    """Gate weights by branch for samples labelled is_rh (N,) bool: 1 where the branch may learn from the sample."""
    if mode not in ROUTING_MODES:
        raise ValueError(f"unknown routing mode {mode!r}; known: {', '.join(ROUTING_MODES)}")
    if is_rh.dtype != torch.bool:  # ~ of an integer label would be a weight of -1 or -2
        raise ValueError(f"is_rh must be bool, not {is_rh.dtype}: pass is_rh.bool(), or soft weights to gates() itself")
    return {"good": (~is_rh).float(), "bad": None if mode == "classic" else is_rh.float()}


@contextmanager
def gates(model: Decoder, **weights):
    """Gate weights by branch (number, (N,), (N, T) or None) for the backward passes inside the block.

    Branches that are not named keep the weights they have, and all are as before when the block ends: blocks can be nested.
    """
    known = model.adapter.gates
    before = {name: gate.weight for name, gate in known.items()}
    if unknown := sorted(set(weights) - set(known)):
        raise ValueError(f"no branch {unknown[0]!r} to route to; this adapter has {', '.join(known) or 'none'}")
    try:
        for name, weight in weights.items():
            known[name].set(weight)
        yield
    finally:
        for name, weight in before.items():
            known[name].weight = weight


@contextmanager
def hooked_shut(model: Decoder, branches: list[str]):
    """The slow way to protect branches: hooks that turn their parameters' gradients into zeros."""
    hooks = [p.register_hook(torch.zeros_like) for name in branches for p in parameters_of(model, name)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def protected(mode: str, flagged: bool) -> list[str]:
    """The branches that may not learn from a homogeneous batch of flagged or of honest samples."""
    table = {("classic", False): [], ("exclusive", False): ["bad"], ("classic", True): ["good"], ("exclusive", True): ["good"]}
    if (mode, flagged) not in table:
        raise ValueError(f"unknown routing mode {mode!r}; known: {', '.join(ROUTING_MODES)}")
    return table[mode, flagged]


def drop_protected(model: Decoder, mode: str, is_rh: torch.Tensor) -> None:
    """Zeros to None for branches that no sample was allowed to train: a zero gradient still moves by momentum and decay."""
    for name in model.adapter.names:
        if all(name in protected(mode, bool(flag)) for flag in is_rh.unique()):
            for p in parameters_of(model, name):
                p.grad = None


def two_pass_backward(model: Decoder, loss_of, is_rh: torch.Tensor, mode: str) -> None:
    """The reference for one-pass routing: honest and flagged samples in backward passes of their own.

    `loss_of(rows)` returns the loss of the samples `rows` (n,) as their share of the whole batch's loss: with a batch mean
    that is n_sub / n_total times their own mean (completions for grpo and dr_grpo, valid tokens for bnpo and dapo).
    """
    for flagged in (False, True):
        rows = (is_rh == flagged).nonzero().squeeze(1)
        with hooked_shut(model, protected(mode, flagged)):
            if len(rows):
                loss_of(rows).backward()


def gradient_flow(model: Decoder) -> dict[str, float]:
    """Norm of the present gradient of each branch; a branch without any gradient has norm 0."""
    flow = {}
    for branch, parameters in branch_parameters(model).items():
        norms = [p.grad.norm() for p in parameters.values() if p.grad is not None]
        flow[branch] = torch.stack(norms).norm().item() if norms else 0.0
    return flow


def clip_per_branch(model: Decoder, max_norm: float) -> dict[str, float]:
    """Clips each branch's gradient to max_norm by itself (joint clipping would let one branch's norm shrink the other's
    step); 0 clips nothing. Returns the norms before clipping."""
    flow = gradient_flow(model)
    for branch, norm in flow.items():
        if max_norm and norm > max_norm:
            for p in parameters_of(model, branch):
                if p.grad is not None:
                    p.grad.mul_(max_norm / norm)
    return flow


@contextmanager
def assert_isolated(model: Decoder, *branches: str):
    """Raises AssertionError unless the named branches, and every frozen tensor, leave the block equal to the bit."""
    for branch in branches:
        parameters_of(model, branch)  # raises ValueError for a branch that the adapter does not have
    trainable = {id(p) for group in branch_parameters(model).values() for p in group.values()}
    guarded = {name: p for name, p in model.named_parameters() if id(p) not in trainable}
    for branch in branches:
        guarded |= branch_parameters(model)[branch]
    before = {name: p.detach().clone() for name, p in guarded.items()}
    yield
    moved = [name for name, p in guarded.items() if not torch.equal(p, before[name])]
    assert not moved, f"{len(moved)} protected tensors moved, {moved[0]} first"
