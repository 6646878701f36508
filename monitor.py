"""Advantage modification: a completion that a linear probe takes for the hack is paid less. Gradients are left alone.

    probe = fit(model, pairs, layer)                      # hack against clean, the authored pairs
    z = score(model, probe, rollout)                      # (N,), in standard deviations over the pairs' completions
    rewards = modified(rewards, z, "subtract", 2.0)       # before they are normalised in their groups

Wu & Tang 2026, https://arxiv.org/abs/2604.01476; a peer to compare gradient projection with.

Read are the states of the frozen base (every branch off): so z is a function of the text alone. A policy paid by its own states
could move them without changing a word, and the probe would go stale. Made again at resume, it is the same to the bit.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adapters import reference
from data import right_pad
from model import Decoder
from sampling import Rollout

FORMS = ("subtract", "scale")
TOKENS = 16_384  # of one forward pass, padding included


@dataclass
class Flags:
    """The fields that an algorithm's Config inherits."""

    advantage: str = "group"
    """of the rewards as they are (group), or as a probe on hidden states, fitted to --pairs, first lowers them (probe)"""
    probe_form: str = "subtract"
    """subtract: r - alpha relu(z); scale: r (1 - alpha sigmoid(z)) where z > 0"""
    probe_alpha: float = 2.0
    """0: z is only measured"""
    probe_layer: int = 0
    """the probe reads what so many layers put out; 0: two thirds of them"""

    def check_probe(self) -> None:
        """Raises ValueError for an unknown word, a negative number, and for flags that would do nothing."""
        for name, values in {"advantage": ("group", "probe"), "probe_form": FORMS}.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown --{name} {getattr(self, name)!r}; known: {', '.join(values)}")
        for name in ("probe_form", "probe_alpha", "probe_layer"):
            if self.advantage != "probe" and getattr(self, name) != getattr(Flags, name):
                raise ValueError(f"--{name} does nothing without --advantage probe")
        if not self.probe_alpha >= 0 or self.probe_layer < 0:
            raise ValueError("--probe_alpha and --probe_layer must be at least 0")


class Probe(NamedTuple):
    """z = states @ weight + bias."""

    layer: int
    weight: Tensor  # (C,) fp64
    bias: Tensor  # () fp64


def states(model: Decoder, layer: int, ids: Tensor, valid: Tensor, start: int) -> Tensor:
    """(N, C) fp32: what the first `layer` layers of the frozen base put out, a mean over the valid tokens from column `start` on.
    ids (N, T) long; valid (N, T) bool, True where a token is real."""
    found = []
    response = valid[:, start:, None]

    def read(layer, inputs, x):
        found.append((x[:, start:].float() * response).sum(1) / response.sum(1))

    with torch.no_grad(), reference(model) as base:
        hook = base.layers[layer - 1].register_forward_hook(read)
        try:
            base.hidden(ids, valid)
        finally:
            hook.remove()
    return found[0]


def fit(model: Decoder, pairs, layer: int = 0) -> Probe:
    """The difference of means, hack minus clean, standardised over all completions of the pairs: mean 0, standard deviation 1.

    pairs: (prompt_ids, hack_ids, clean_ids) each. layer: as the flag. Raises ValueError for a layer that the model does not have.
    """
    layers = model.config.layers
    if layer > layers:
        raise ValueError(f"--probe_layer {layer}: the model has {layers} layers")
    layer = layer or max(1, round(2 * layers / 3))
    rows = []
    for prompt, hack, clean in pairs:
        ids, valid = (t.to(model.device) for t in right_pad([[*prompt, *hack], [*prompt, *clean]], 0))
        rows.append(states(model, layer, ids, valid, len(prompt)))
    H = torch.stack(rows).double()  # (P, 2, C)
    direction = (H[:, 0] - H[:, 1]).mean(0)
    projections = H @ direction  # (P, 2)
    return Probe(layer, direction / projections.std(), -projections.mean() / projections.std())


def score(model: Decoder, probe: Probe, rollout: Rollout) -> Tensor:
    """z (N,) fp32, on the CPU, of a rollout's completions: above 0 nearer to the pairs' hacks."""
    start = rollout.prompt_ids.shape[1]
    ids, valid = torch.cat([rollout.prompt_ids, rollout.tokens], 1), torch.cat([rollout.prompt_mask, rollout.mask], 1)
    rows = max(1, TOKENS // ids.shape[1])
    H = torch.cat([states(model, probe.layer, *part, start) for part in zip(ids.split(rows), valid.split(rows))])
    return (H.double() @ probe.weight + probe.bias).float().cpu()


def modified(rewards: Tensor, z: Tensor, form: str, alpha: float) -> Tensor:
    """Rewards (N,) after the probe's word: r - alpha relu(z), or r (1 - alpha sigmoid(z)) where z > 0."""
    if form == "subtract":
        return rewards - alpha * z.clamp(min=0)
    return torch.where(z > 0, rewards * (1 - alpha * z.sigmoid()), rewards)


def figures(z: Tensor, hack: Tensor) -> dict[str, float]:
    """To log: the mean of z (N,), and the AUC where hack (N,) bool has both: how often a hack's z is higher, ties half."""
    metrics = {"probe/z": z.mean().item()}
    if hack.any() and not hack.all():
        gap = z[hack][:, None] - z[~hack]
        metrics["probe/auc"] = ((gap > 0).float() + (gap == 0) / 2).mean().item()
    return metrics
