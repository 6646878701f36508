"""Residual bundles: small nonlinear branches that write to the residual stream behind a block.

    h <- h + sum_k sigmoid(a_k) s_k Q_k GELU(P_k h)   # h a block's output, bundles k, s_k the branch's scale

Every bundle has P, Q and a of its own in every block: nothing is shared, so what trains one moves no other. P is random, Q and a
are zero: a fresh bundle changes no bit of the output, and Q has a gradient at the first step. adapters.py attaches them as it
does every branch (`preset("bundles", dual=False)`); routing.py says which loss trains which.

A bundle's rank is a share of the model's width. It is no linear map, so it can't be merged into a weight: the sampler's twin runs
bundles beside the weights.
"""
import math
from itertools import accumulate, pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gates import Gate
from model import product

BUNDLES = {  # share of the model's width
    "b_ssl_main": 0.18, "b_ssl_semantic": 0.12,
    "b_rl_policy": 0.10, "b_rl_value": 0.08, "b_rl_explore": 0.05, "b_rl_anchor": 0.06,
}  # fmt: skip
BUNDLE_PRESETS = {
    "bundles": BUNDLES,
    "bundles_rl2": {name: share * (2 if name.startswith("b_rl_") else 1) for name, share in BUNDLES.items()},
    "one_bundle": {"b_all": [*accumulate(BUNDLES.values())][-1]},  # added as bundle_ranks adds: the ranks are equal too
}


def bundle_ranks(shares: list[float], width: int) -> list[int]:
    """Units of each bundle. Rounded cumulatively, so that they add up to those of one bundle of the summed share; at least 1."""
    edges = [round(share * width) for share in accumulate(shares, initial=0.0)]
    return [max(1, b - a) for a, b in pairwise(edges)]


class AddBundles(torch.autograd.Function):
    """h + sum_k s_k sigmoid(a_k) Q_k GELU(P_k h), all bundles in one pair of products; gates weight the gradients of P, Q and a.

    h (..., C); P_k (r_k, C), Q_k (C, r_k) and a_k () follow in *parts as P_1, Q_1, a_1, P_2, ... They are fp32 also where h is
    bfloat16: the sum is then rounded once. A closed bundle costs no product in backward.
    """

    @staticmethod
    def forward(ctx, h, scales: list[float], gates: list[Gate], *parts):
        P, Q, alphas = torch.cat(parts[0::3]), torch.cat(parts[1::3], dim=1), torch.stack(parts[2::3]).sigmoid()
        ctx.ranks, ctx.shape, ctx.scales, ctx.gates = [len(p) for p in parts[0::3]], h.shape, scales, gates
        weights = column_weights(alphas, scales, ctx.ranks)
        flat = h.reshape(-1, h.shape[-1]).to(P.dtype)
        z = product(flat, P)  # (N, R)
        ctx.save_for_backward(flat, z, P, Q, alphas, weights)
        return (flat + product(F.gelu(z), Q * weights)).to(h.dtype).view(h.shape)

    @staticmethod
    @once_differentiable  # P, Q and z are saved as constants: a second derivative would silently be wrong
    def backward(ctx, grad):
        flat, z, P, Q, alphas, weights = ctx.saved_tensors
        exact = grad.reshape(flat.shape).to(P.dtype)
        grad_g = product(exact, Q.t())  # (N, R), of GELU(z) but for the weights
        grad_z = torch.ops.aten.gelu_backward(grad_g * weights, z)
        grad_h = (exact + product(grad_z, P.t())).to(grad.dtype).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grads, columns = [], [slice(a, b) for a, b in pairwise(accumulate(ctx.ranks, initial=0))]
        for k, gate, scale, alpha in zip(columns, ctx.gates, ctx.scales, alphas):
            if gate.closed:
                grads += [None, None, None]
                continue
            rows = gate.rows(ctx.shape, exact)
            g, dz = F.gelu(z[:, k]), grad_z[:, k]
            if rows is not None:
                g, dz = g * rows, dz * rows
            grad_P = product(dz.t(), flat.t())  # (r, C)
            grad_Q = product(exact.t(), g.t()) * (scale * alpha)  # (C, r)
            grads += [grad_P, grad_Q, scale * alpha * (1 - alpha) * (g * grad_g[:, k]).sum()]
        return grad_h, None, None, *grads


def column_weights(alphas: torch.Tensor, scales: list[float], ranks: list[int]) -> torch.Tensor:
    """(R,): s_k sigmoid(a_k) for each unit of each bundle; alphas (K,) after the sigmoid."""
    return torch.cat([(scale * alpha).expand(rank) for alpha, scale, rank in zip(alphas, scales, ranks)])


class Bundle(nn.Module):
    """P (r, C) ~ U(-1/sqrt(C), 1/sqrt(C)), Q (C, r) = 0: exactly one side starts at zero. a = 0, so that alpha is 1/2. fp32."""

    def __init__(self, rank: int, width: int, generator, device):
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.P = nn.Parameter(torch.empty(rank, width).uniform_(-bound, bound, generator=generator).to(device))
        self.Q = nn.Parameter(torch.zeros(width, rank, device=device))
        self.a = nn.Parameter(torch.zeros((), device=device))


class BundledLayer(nn.Module):
    """A frozen layer of a decoder with bundles on its output. `adapter` (adapters.Adapter) holds their scales and gates."""

    def __init__(self, base: nn.Module, width: int, adapter, generator):
        super().__init__()
        self.base, self.adapter, self.width, self.parts = base, adapter, width, nn.ModuleDict()
        self.grow(generator)

    def grow(self, generator) -> None:
        """Draws the bundles that are in the adapter's spec and not here yet."""
        branches, device = [b for b in self.adapter.spec.branches if b.rank], next(self.base.parameters()).device
        for branch, rank in zip(branches, bundle_ranks([b.rank for b in branches], self.width)):
            if branch.name not in self.parts:
                self.parts[branch.name] = Bundle(rank, self.width, generator, device)

    def forward(self, *inputs):
        h = self.base(*inputs)
        active = [(self.adapter.scales[name], self.adapter.gates[name], part) for name, part in self.parts.items()
                  if self.adapter.scales[name] != 0]
        if not active:
            return h
        scales, gates, bundles = zip(*active)
        return AddBundles.apply(h, scales, gates, *(side for bundle in bundles for side in (bundle.P, bundle.Q, bundle.a)))

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All bundles as one: P (R, C) and Q (C, R), with alphas and scales in Q; what is off is zero there."""
        bundles, scales = list(self.parts.values()), [self.adapter.scales[name] for name in self.parts]
        weights = column_weights(torch.stack([b.a for b in bundles]).sigmoid(), scales, [len(b.P) for b in bundles])
        return torch.cat([b.P for b in bundles]), torch.cat([b.Q for b in bundles], dim=1) * weights


def bundle_alphas(model: nn.Module) -> dict[str, float]:
    """alpha = sigmoid(a) of each bundle, the mean over blocks."""
    layers = [layer for layer in model.modules() if isinstance(layer, BundledLayer)]
    return {name: sum(layer.parts[name].a.sigmoid().item() for layer in layers) / len(layers) for name in layers[0].parts}
