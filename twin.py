"""The model's function laid out for decoding: few operations, fused and merged weights, refilled after every step.

    twin = Twin(model)
    twin.refresh()                                   # takes over weights, adapters and scales
    hidden = twin.hidden(ids, positions, attention)  # (N,) -> (N, C)

sampling.py decodes on it; the tests hold it to the model's own forward.
"""
import math
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ACTIVATIONS, ONEDNN, Decoder, projections, rope_table


def keep(old: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """A copy of `value`, in the memory of `old` where it fits: a captured CUDA graph has read that address."""
    if old is None or old.shape != value.shape:
        return value.clone(memory_format=torch.contiguous_format)
    return old.copy_(value)


class Product:
    """Several projections of one input as one product x W^T + b, adapters included, its outputs in the order `order`.

    A source is an nn.Linear, or an adapted one: `source.base` the frozen nn.Linear, `source.low_rank()` its branches as
    (A (R, in), B (out, R)) with their scales in B. They are merged, W + BA; in bfloat16 y + B(Ax) in fp32.
    """

    def __init__(self, dtype: torch.dtype, sources: list[nn.Module], order=slice(None)):
        self.dtype, self.sources, self.order = dtype, sources, order
        self.weight = self.bias = self.A = self.B = None

    def refresh(self):
        bases = [getattr(source, "base", source) for source in self.sources]
        weights = [base.weight.to(self.dtype) for base in bases]
        empty = [(w.new_zeros(0, w.shape[1]).float(), w.new_zeros(w.shape[0], 0).float()) for w in weights]
        pairs = [s.low_rank() if hasattr(s, "low_rank") else e for s, e in zip(self.sources, empty)]
        merge = self.dtype != torch.bfloat16
        if merge:
            weights = [w.addmm(B, A) if A.shape[0] else w for w, (A, B) in zip(weights, pairs)]
        weight = torch.cat(weights)[self.order]
        # laid out once for many small products
        self.packed = ONEDNN and weight.device.type == "cpu" and self.dtype != torch.float64
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else keep(self.weight, weight)
        if getattr(bases[0], "bias", None) is not None:
            self.bias = keep(self.bias, torch.cat([base.bias.to(self.dtype) for base in bases])[self.order])
        self.beside = not merge and any(A.shape[0] for A, _ in pairs)
        if self.beside:
            self.A = keep(self.A, torch.cat([A for A, _ in pairs]))
            self.B = keep(self.B, torch.block_diag(*[B for _, B in pairs])[self.order])

    def __call__(self, x, residual=None):
        """x (N, in) -> (N, out), added to `residual` (N, out) where there is one."""
        if self.packed and residual is None:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        y = F.linear(x, self.weight, self.bias)
        if self.beside:
            y.add_(F.linear(F.linear(x.float(), self.A), self.B))
        return y if residual is None else y.add_(residual)


class TwinNorm:
    """A Norm of the model; or one for each of the heads that lie side by side, their numbers in the order `order`."""

    def __init__(self, dtype: torch.dtype, sources: list[nn.Module], order=slice(None)):
        self.dtype, self.sources, self.order, self.weight, self.floor = dtype, sources, order, None, None
        self.size, self.eps, self.rms = sources[0].width, sources[0].eps, sources[0].rms

    def refresh(self):
        weights = [source.weight.to(self.dtype) for source in self.sources]
        self.bias = None if self.rms else self.sources[0].bias.to(self.dtype)
        self.fused = not self.rms or (weights[0].is_cuda and len(weights) == 1)
        self.floor = keep(self.floor, weights[0].new_tensor(math.sqrt(self.size[0] * self.eps)))
        scaled = torch.stack(weights)[:, self.order] * math.sqrt(self.size[0])
        self.weight = weights[0] if self.fused else keep(self.weight, scaled)

    def __call__(self, x):
        if not self.fused:  # rms_norm is six operations on a CPU. x / sqrt(|x|^2 / n + eps) = sqrt(n) x / hypot(|x|, sqrt(n eps))
            return (x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)).mul_(self.weight)
        if self.rms:
            return F.rms_norm(x, self.size, self.weight, self.eps)
        return F.layer_norm(x, self.size, self.weight, self.bias, self.eps)


class Bundles:
    """The residual bundles behind a layer, as one pair of products beside the weights, in at least fp32."""

    def __init__(self, dtype: torch.dtype, source: nn.Module):
        self.source, self.dtype, self.sides = source, dtype, [SimpleNamespace(), SimpleNamespace()]
        self.P, self.Q = (Product(dtype, [side]) for side in self.sides)

    def refresh(self):
        for side, weight in zip(self.sides, self.source.stacked()):
            side.weight = weight
        self.P.refresh()
        self.Q.refresh()

    def __call__(self, x):
        """x (N, C) -> (N, C), x included."""
        exact = x.to(self.dtype)
        return self.Q(F.gelu(self.P(exact)), residual=exact).to(x.dtype)


class Twin:
    """The model's function laid out for decoding, in straight-line code over few operations; filled by `refresh`.

    All families share one layout of queries, keys and values: by key head, the G queries of its group, the key, the value.
    In queries and keys, the numbers i and i + R/2 that rotary embedding turns together lie side by side, so that turning is
    one complex product; both being permuted alike, their products stay the same.

    A bfloat16 model on a CPU gets a twin in fp32, where branches can be merged without being rounded away; only its head,
    which has none, is bfloat16. Embeddings and norms are the model's own where they need no change.
    """

    def __init__(self, model: Decoder):
        c, device, names = model.config, model.device, projections(model.config)
        self.model, self.config, self.groups = model, c, c.heads // c.kv_heads
        self.dtype = dtype = torch.float32 if model.dtype == torch.bfloat16 and device.type == "cpu" else model.dtype
        self.exact = torch.promote_types(dtype, torch.float32)  # of rotation: there are no complex numbers of bfloat16
        pairs = torch.arange(c.rotary_dim, device=device).view(2, -1).t().flatten()
        pairs = torch.cat((pairs, torch.arange(c.rotary_dim, c.head_dim, device=device)))
        rows = torch.arange((c.heads + 2 * c.kv_heads) * c.head_dim, device=device).view(-1, c.head_dim)
        if c.family == "gpt_neox":  # laid out head by head: q, k, v of head 0, then of head 1, ...
            rows = rows.view(c.heads, 3, c.head_dim)
        else:
            q, k, v = rows.split((c.heads, c.kv_heads, c.kv_heads))
            rows = torch.cat((q.view(c.kv_heads, -1, c.head_dim), k[:, None], v[:, None]), dim=1)  # (KV, G + 2, D)
        rows = torch.cat((rows[:, :-1, pairs], rows[:, -1:]), dim=1).flatten()
        self.norm = TwinNorm(dtype, [model.norm])
        self.head = Product(model.dtype, [model.embed_tokens if c.tied else model.lm_head])
        self.layers, self.parts = [], [self.norm, self.head]
        for bundled in model.layers:
            source = getattr(bundled, "base", bundled)
            layer, attention, mlp = SimpleNamespace(), source.self_attn, getattr(source.mlp, "base", source.mlp)
            layer.norm = TwinNorm(dtype, [source.input_layernorm])
            layer.qkv = Product(dtype, [getattr(attention, name) for name in names["qkv"]], rows)
            if c.qk_norm:
                layer.qk_norm = TwinNorm(self.exact, [attention.q_norm] * self.groups + [attention.k_norm], pairs)
            layer.out = Product(dtype, [getattr(attention, names["out"])])
            layer.mlp_norm = TwinNorm(dtype, [source.post_attention_layernorm])
            layer.up = Product(dtype, [getattr(mlp, name) for name in names["up"]])
            layer.down = Product(dtype, [getattr(mlp, names["down"])])
            self.parts += vars(layer).values()
            layer.branches = getattr(source.mlp, "branches", None)  # gated ones run as they are
            layer.bundles = Bundles(self.exact, bundled) if bundled is not source else None
            self.parts += [layer.bundles] if layer.bundles else []
            self.layers.append(layer)
        if c.rotary_dim:
            self.rope = torch.complex(*rope_table(c, device).to(self.exact).unbind(1))[:, None]  # (context, 1, R/2)

    def refresh(self):
        for part in self.parts:
            part.refresh()
        self.embed_tokens = self.model.embed_tokens.weight.to(self.dtype)
        if not self.config.rotary_dim:
            self.embed_positions = self.model.embed_positions.weight.to(self.dtype)

    def hidden(self, ids, positions, attention) -> torch.Tensor:
        """Final normed hidden states (N, C) of the tokens ids (N,) at positions (N,).

        `attention(layer, qkv)`, qkv (N * KV, G + 2, D), keeps the keys and values and returns what the queries read (N, H * D).
        """
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        x = F.embedding(ids, self.embed_tokens)
        if c.rotary_dim:
            turn = self.rope.index_select(0, positions[:, None].expand(-1, c.kv_heads).flatten())  # (N * KV, 1, R/2)
        else:
            x = x + F.embedding(positions, self.embed_positions)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norm(x)).view(-1, self.groups + 2, c.head_dim)
            if c.rotary_dim:
                exact = qkv.to(self.exact)
                if c.qk_norm:
                    exact[:, :-1] = layer.qk_norm(exact[:, :-1])
                torch.view_as_complex(exact.view(*qkv.shape[:2], -1, 2))[:, :-1, : c.rotary_dim // 2].mul_(turn)
                qkv = exact.to(self.dtype)
            y = layer.out(attention(i, qkv), residual=x)
            normed = layer.mlp_norm(x if c.parallel_residual else y)
            inner = layer.up(normed)
            if c.gated_mlp:
                gate, up = inner.chunk(2, dim=-1)
                inner = activation(gate).mul_(up)
            else:
                inner = activation(inner)
            x = layer.down(inner, residual=y)
            if layer.branches is not None:
                x += layer.branches(normed)
            if layer.bundles is not None:
                x = layer.bundles(x)
        return self.norm(x)

    def logits(self, hidden) -> torch.Tensor:
        """hidden (N, C) -> (N, V), in the model's dtype."""
        return self.head(hidden.to(self.head.dtype))
