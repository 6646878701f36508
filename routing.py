"""Where gradients go: which branch may learn from which sample, and from which loss.

    with gates(model, **sample_routes(is_rh, "classic")):     # one forward/backward, routed per sample
        loss.backward()
    clip_per_branch(model, 1.0)

    router = GradientRouter(model, {"policy_loss": ["b_rl_policy"], "value_loss": ["b_rl_value"]})
    with router.route_gradients("policy_loss"):               # routed per loss: one forward serves them all
        policy_loss.backward(retain_graph=True)

`classic`: honest samples train both branches, flagged ones only `bad`. `exclusive`: honest samples train only `good`, so that
none of the task goes where it will be dropped.
A flagged sample is masked whole, its KL term with its policy term: the protected branch learns nothing from it.

One pass must equal two: `two_pass_backward` is the slow reference, homogeneous batches whose protected gradients are
removed by parameter hooks, as in the experiments this follows (Cloud et al. 2024, https://arxiv.org/abs/2410.04332).
One routed backward per loss must equal `torch.autograd.grad(loss, the parameters it may train)`.
"""
import statistics
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext

import torch

from adapters import AdapterSpec, branch_parameters, parameters_of, preset
from bundles import BUNDLES
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


def check_branches(model: Decoder, dual: bool) -> None:
    """Raises ValueError where two branches are to learn apart (`dual`) and the adapter lacks good and bad."""
    if dual and not {"good", "bad"} <= set(model.adapter.names):
        has = ", ".join(model.adapter.names) or "none"
        raise ValueError(f"routing wants the branches good and bad; this {model.adapter.spec.kind} adapter has {has}")


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


# -------------------------------------------------------------------------------------------------------- per loss

SEPARATE = {
    "lm_loss": ("b_ssl_main", "b_ssl_semantic"), "policy_loss": ("b_rl_policy",), "value_loss": ("b_rl_value",),
    "entropy_loss": ("b_rl_explore",), "kl_loss": ("b_rl_anchor",),
}  # fmt: skip
RL = tuple(name for name in BUNDLES if name.startswith("b_rl_"))
ARRANGEMENTS = {  # which bundles there are, and which of them a loss trains
    "baseline": ("bundles", dict.fromkeys(SEPARATE, tuple(BUNDLES))),
    "single_adapter": ("one_bundle", dict.fromkeys(SEPARATE, ("b_all",))),
    "ssl_rl_separate": ("bundles", SEPARATE),
    "rl_shared": ("bundles", dict.fromkeys(SEPARATE, RL) | {"lm_loss": SEPARATE["lm_loss"]}),  # RL's losses together
    "larger_rl": ("bundles_rl2", SEPARATE),
    "partial_overlap": ("bundles", SEPARATE | {"policy_loss": ("b_rl_policy", "b_ssl_semantic")}),
    "value_head_only": ("bundles", SEPARATE | {"value_loss": ()}),  # the head learns, b_rl_value writes 0
    "baseline_value_head": ("bundles", dict.fromkeys(SEPARATE, tuple(BUNDLES)) | {"value_loss": ()}),
    "placebo": ("bundles", SEPARATE | {  # as many bundles, each loss apart, on the wrong side of the line
        "lm_loss": ("b_rl_policy", "b_rl_value"), "policy_loss": ("b_ssl_semantic",), "value_loss": ("b_ssl_main",),
    }),  # fmt: skip
    "placebo_shared": ("bundles", dict.fromkeys(SEPARATE, SEPARATE["lm_loss"]) | {"lm_loss": RL}),  # rl_shared, sides exchanged
}


def arrangement(name: str) -> tuple[AdapterSpec, dict[str, tuple[str, ...]]]:
    """The adapter and the loss -> bundles table of an arrangement of the isolation experiment.

    baseline and ssl_rl_separate are the same bundles: only their tables differ. Raises ValueError that lists the known.
    """
    if name not in ARRANGEMENTS:
        raise ValueError(f"unknown arrangement {name!r}; known: {', '.join(ARRANGEMENTS)}")
    bundles, table = ARRANGEMENTS[name]
    return preset(bundles, dual=False), dict(table)


class GradientRouter:
    """Which branches of an adapter, of any kind, each loss may train."""

    def __init__(self, model: Decoder, table: dict[str, Iterable[str]]):
        """`table`: the branches that each loss trains, by the loss's name. Raises ValueError for a branch that is not there."""
        self.model, self.table = model, {loss: tuple(branches) for loss, branches in table.items()}
        known = model.adapter.names
        for loss, branches in self.table.items():
            if unknown := [name for name in branches if name not in known]:
                raise ValueError(f"{loss} is to train {unknown[0]!r}; this adapter has {', '.join(known) or 'no branches'}")

    @contextmanager
    def route_gradients(self, loss: str):
        """Backward passes inside the block train the branches of `loss` alone: what is in any other keeps `.grad` as it was,
        None too. Branches of `loss` keep the gate weights they have, so per-sample `gates` around the block still hold.

        Raises ValueError for a loss that the table does not have.
        """
        if loss not in self.table:
            raise ValueError(f"no route for {loss!r}; this router has {', '.join(self.table) or 'none'}")
        with gates(self.model, **{name: 0.0 for name in self.model.adapter.names if name not in self.table[loss]}):
            yield


def backward(losses: dict[str, torch.Tensor], router: GradientRouter | None = None) -> None:
    """Gradients of losses that share a forward pass: each to its own branches, or without a router one pass of their sum."""
    if router is None:
        sum(losses.values()).backward()
        return
    for left, (name, loss) in zip(reversed(range(len(losses))), losses.items()):
        with router.route_gradients(name):
            loss.backward(retain_graph=left > 0)


def analyze_gradient_flow(model: Decoder, losses: dict[str, torch.Tensor], router: GradientRouter | None = None):
    """{loss: {branch: norm of the gradient that this loss alone sends there}}, through the routes of `router`; without one,
    through the gates as they are, open outside of any block. `losses` are scalars by name, and their graph is kept. `.grad` stays
    as it was: `gradient_flow` reads what a backward pass has put there."""
    groups, flow = branch_parameters(model), {}
    for name, loss in losses.items():
        with router.route_gradients(name) if router else nullcontext():
            grads = iter(torch.autograd.grad(loss, [p for group in groups.values() for p in group.values()],
                                             retain_graph=True, allow_unused=True))  # fmt: skip
        flow[name] = {branch: norm([next(grads) for _ in group]) for branch, group in groups.items()}
    return flow


# ---------------------------------------------------------------------------------------------- norms, what must stay


def norm(gradients: list[torch.Tensor | None]) -> float:
    """Of all of them together; None counts as zero."""
    norms = [g.norm() for g in gradients if g is not None]
    return torch.stack(norms).norm().item() if norms else 0.0


def gradient_flow(model: Decoder) -> dict[str, float]:
    """Norm of the present gradient of each branch; a branch without any gradient has norm 0."""
    return {branch: norm([p.grad for p in group.values()]) for branch, group in branch_parameters(model).items()}


@contextmanager
def measured(model: Decoder, norms: list[float], share: float = 1.0):
    """Appends to `norms` the norm of the gradient that backward passes inside the block add, of all branches together, over
    `share`: what the micro-batch counts in its batch, so that the norm is that of its own mean loss. `.grad` ends as without the
    block, to the bit.
    """
    parameters = [p for group in branch_parameters(model).values() for p in group.values()]
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    yield
    norms.append(norm([p.grad for p in parameters]) / share)
    for p, old in zip(parameters, before):
        if old is not None:
            p.grad = old if p.grad is None else old.add_(p.grad)


def norm_figures(norms: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation of the gradient norms of a step's micro-batches; one has no deviation."""
    mean = {"grad_norm_mean": statistics.fmean(norms)}
    return mean | {"grad_norm_std": statistics.stdev(norms)} if len(norms) > 1 else mean


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
