"""Soft rollouts: completions as probabilities, each token differentiable in all that came before it.

    seeds = noise_seeds(rows, max_new_tokens, generator)
    rollout = soft_rollout(model, prompt_ids, prompt_mask, seeds, tau, law, stop_ids, pad_id, hard=False)
    loss_of(rollout.soft, rollout.log_law).backward()

A token is softmax((log p + g) / tau), p the law of sampling.Law and g Gumbel noise (Jang et al. 2016,
https://arxiv.org/abs/1611.01144; Maddison et al. 2016, https://arxiv.org/abs/1611.00712), and the next step reads that mixture of
embeddings. Its largest entry is a draw from p, whatever tau (the Gumbel-max trick). `hard` feeds that draw forward, one-hot, and
lets the gradient through as if it were the mixture (straight-through).

One step costs one token. The keys and values of earlier ones lie in memory that all steps share; a step keeps for its backward
pass only its own query, and hands on one gradient of that memory, to which it has added its share. Concatenating a cache would
keep a copy a step, and forwards of the whole prefix cost so much more: both grow with the square of the length.
"""
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from model import Decoder, attend, causal_bias, linear
from sampling import Law

CHECK_EVERY = 16  # tokens between two looks whether all rows are finished

# ------------------------------------------------------------------------------------------------- the cache


class CachedAttention(torch.autograd.Function):
    """Attention of T tokens to a memory that they have been written to, in memory of the order of the T tokens alone.

    `link` has no content and takes no room. It goes in from the step before and comes out for the step after, so that its
    gradient can be that of the whole memory: autograd runs the steps backward, each adds to it what its queries read, and takes
    out what its own keys and values are due, since everything that reads them came later and is done.
    """

    @staticmethod
    def forward(ctx, q, k, v, link, memory, slot: int, mask):
        """q (B, H, T, D), k and v (B, KV, T, D); memory (2, B, KV, S, D), written at slot .. slot + T - 1; link (None at first);
        mask (B, S) bool or None, False where nothing may look. Returns what the queries read (B, H, T, D), and the next link."""
        end = slot + k.shape[2]
        memory[0, :, :, slot:end], memory[1, :, :, slot:end] = k, v
        ctx.save_for_backward(q)
        ctx.memory, ctx.slots, ctx.mask = memory, (slot, end), mask  # not saved: later slots change, those read here do not
        ctx.set_materialize_grads(False)
        keys, values = memory[:, :, :, :end]
        exact = torch.promote_types(q.dtype, torch.float32)
        return attend(q, keys, values, bias_of(slot, end, mask, q), True), q.new_zeros((), dtype=exact).expand_as(memory)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, total):
        """grad (B, H, T, D) of what was read, total (2, B, KV, S, D) of the memory by all later steps; either may be None."""
        (q,), (slot, end) = ctx.saved_tensors, ctx.slots
        if total is None:
            total = torch.zeros_like(ctx.memory, dtype=torch.promote_types(q.dtype, torch.float32))
        grad_q = None
        if grad is not None:
            grad_q, grad_k, grad_v = attention_gradients(q, *ctx.memory[:, :, :, :end], bias_of(slot, end, ctx.mask, q), grad)
            total[0, :, :, :end] += grad_k  # in place: this step alone holds it now
            total[1, :, :, :end] += grad_v
        mine = total[:, :, :, slot:end].to(q.dtype, copy=True)
        return grad_q, mine[0], mine[1], total if ctx.needs_input_grad[3] else None, None, None, None


def bias_of(slot: int, end: int, mask, like) -> torch.Tensor | None:
    """What is added to scores: (1 or B, 1, end - slot, end), as `Decoder.hidden` makes it of a mask; None where all may look."""
    if mask is None and end - slot == 1:
        return None
    bias = causal_bias(end - slot, end, like.dtype, like.device)
    return bias if mask is None else bias.masked_fill(~mask[:, None, None, :end], torch.finfo(like.dtype).min)


def attention_gradients(q, k, v, bias, grad):
    """Gradients of `model.attend` by q (B, H, T, D), k and v (B, KV, S, D), given that of its result."""
    (batch, heads, length, dim), groups = q.shape, k.shape[1]
    fold = lambda x: x.reshape(batch, groups, -1, dim)  # noqa: E731 the queries of a group share its keys
    q, grad = fold(q), fold(grad)
    scores = q @ k.transpose(2, 3) * dim**-0.5  # (B, KV, G T, S)
    if bias is not None:
        scores = scores + bias.expand(-1, heads // groups, -1, -1).reshape(len(bias), 1, -1, k.shape[2])
    p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    slope = grad @ v.transpose(2, 3)
    slope = p * (slope - (p * slope).sum(-1, keepdim=True)) * dim**-0.5
    return (slope @ k).view(batch, heads, length, dim), slope.transpose(2, 3) @ q, p.transpose(2, 3) @ grad


@dataclass
class SoftCache:
    """A cache for `Decoder.hidden` that a backward pass may go through."""

    memory: list[torch.Tensor]  # of each layer (2, B, KV, S, D): keys and values
    links: list[torch.Tensor | None]  # of each layer, see CachedAttention
    slot: int  # where the next token goes
    mask: torch.Tensor | None  # (B, S) bool; None: everything may be looked at

    def attend(self, layer: int, q, k, v, bias, causal: bool):
        y, self.links[layer] = CachedAttention.apply(q, k, v, self.links[layer], self.memory[layer], self.slot, self.mask)
        return y


# ------------------------------------------------------------------------------------------------- the tokens


def noise_seeds(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, length) long: what each token's noise is drawn from. So a row's noise is the same in any micro-batch, and is drawn
    again, not kept, where activations are. 32 bits: a CPU generator's seed has no more."""
    return torch.randint(2**32, (rows, length), generator=generator)


def gumbel(seeds: torch.Tensor, vocab: int) -> torch.Tensor:
    """-log(-log u) of u uniform in (0, 1), (N, vocab) fp32, a row for each of the seeds (N,).

    u in fp64: of fp32's 24 bits a token of probability 1e-6 would be drawn some hundredths too seldom.
    """
    generator = torch.Generator()
    uniform = [torch.rand(vocab, dtype=torch.float64, generator=generator.manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(uniform).log_().neg_().log_().neg_().float()


class OneHot(torch.autograd.Function):
    """One-hot `tokens` (N,) in place of `soft` (N, V), exactly; the gradient passes through to `soft` (straight-through,
    Bengio et al. 2013, https://arxiv.org/abs/1308.3432)."""

    @staticmethod
    def forward(ctx, soft, tokens):
        return torch.zeros_like(soft).scatter_(1, tokens[:, None], 1)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def soft_embeds(model: Decoder, soft) -> torch.Tensor:
    """The embeddings' means (..., C) under probabilities (..., V)."""
    weight = model.embed_tokens.weight
    return linear(soft.to(weight.dtype), weight.t())


def log_law(logits, law: Law, support=None) -> torch.Tensor:
    """log p (..., V) in fp32 (float64 stays), -inf outside the support (..., V) bool; None: everything."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / law.temperature
    return (logits if support is None else logits.masked_fill(~support, float("-inf"))).log_softmax(-1)


# ------------------------------------------------------------------------------------------------- the rollout


@dataclass
class SoftRollout:
    """N completions of at most T tokens; T is the longest one's length."""

    prompt_ids: torch.Tensor  # (N, P) long, left-padded
    prompt_mask: torch.Tensor  # (N, P) bool
    tokens: torch.Tensor  # (N, T) long, each the largest entry of its mixture; pad_id behind the end
    mask: torch.Tensor  # (N, T) bool: True up to the first stop token, that included
    finished: torch.Tensor  # (N,) bool: ended by a stop token, not by the length cap
    soft: torch.Tensor  # (N, T, V) fp32, differentiable: what the next step read; means nothing behind the end
    log_law: torch.Tensor  # (N, T, V) fp32, differentiable: the law that each was drawn from, -inf outside its support
    allowed: torch.Tensor | None  # (T, V) bool, Law.allowed: the support of a reference's law; None: everything


def soft_rollout(
    model: Decoder, prompt_ids, prompt_mask, seeds, tau: float, law: Law, stop_ids, pad_id: int, hard: bool = False,
    recompute_every: int = 0, tokens=None,
) -> SoftRollout:  # fmt: skip
    """Completions of some prompts, differentiable in the model's trainable parameters.

    prompt_ids (N, P) long, left-padded, prompt_mask (N, P) bool, seeds (N, most tokens) of `noise_seeds`. tau > 0: near 0 a
    mixture is nearly one-hot. hard: one-hot tokens forward, soft ones backward. recompute_every: the backward pass computes so
    many steps again in place of keeping what they computed; 0: keeps everything. tokens (N, T) long: what the tokens are where
    that is known already, filled up behind the end.
    Raises ValueError for a tau that is not positive and for what does not fit the context.
    """
    if not tau > 0:
        raise ValueError(f"tau must be above 0, not {tau}")
    device, c, (rows, width) = model.device, model.config, prompt_ids.shape
    most = seeds.shape[1] if tokens is None else tokens.shape[1]
    if width + most > c.context:
        raise ValueError(f"prompts of {width} tokens and {most} new ones exceed the model's context of {c.context}")
    prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
    lengths, stop = prompt_mask.sum(1, keepdim=True), torch.tensor(stop_ids, dtype=torch.long, device=device)
    mask = None if bool(prompt_mask.all()) else torch.cat([prompt_mask, prompt_mask.new_ones(rows, most)], 1)
    shape = (2, rows, c.kv_heads, width + most, c.head_dim)
    memory = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(c.layers)]

    def step(t: int, embeds, cache: SoftCache):
        """Token t of all rows: (N,) long, soft (N, V), its log law (N, V), and what it is read as (N, 1, C)."""
        positions = lengths + t - 1 if t else (prompt_mask.long().cumsum(1) - 1).clamp_(min=0)
        logits = linear(model.hidden(embeds=embeds, position_ids=positions, cache=cache)[:, -1], model.head_weight)
        cache.slot += embeds.shape[1]
        support = None
        if law.truncated:
            young = torch.tensor([t < law.min_new_tokens], device=device)
            support = law.support(logits.detach().float() / law.temperature, young, stop)
        log_p = log_law(logits, law, support)
        noisy = log_p + gumbel(seeds[:, t], c.vocab_size).to(device)
        token = noisy.detach().argmax(-1) if tokens is None else tokens[:, t]
        soft = (noisy / tau).softmax(-1)
        soft = OneHot.apply(soft, token) if hard else soft
        return token, soft, log_p, soft_embeds(model, soft)[:, None]

    def steps(start: int, end: int, embeds, *links):
        cache, found = SoftCache(memory, list(links), width + start - 1 if start else 0, mask), []
        for t in range(start, end):
            *one, embeds = step(t, embeds, cache)
            found.append(one)
        return *(torch.stack(column, 1) for column in zip(*found)), embeds, *cache.links

    again = recompute_every and torch.is_grad_enabled()
    run, every = (partial(checkpoint, steps, use_reentrant=False), recompute_every) if again else (steps, CHECK_EVERY)
    parts, state = [], (model.embed_tokens(prompt_ids), *[None] * c.layers)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for start in range(0, most, every):
        token, soft, log_p, *state = run(start, min(start + every, most), *state)
        parts.append((token, soft, log_p))
        ended |= torch.isin(token, stop).any(1)
        if bool(ended.all()):
            break
    drawn, soft, log_p = (torch.cat(column, 1) for column in zip(*parts))
    stops = torch.isin(drawn, stop).long()
    valid = stops.cumsum(1) == stops  # none before it
    longest = int(valid.sum(1).max())
    drawn, valid, soft, log_p = (x[:, :longest] for x in (drawn.where(valid, pad_id), valid, soft, log_p))
    allowed = law.allowed(longest, c.vocab_size, stop)
    return SoftRollout(prompt_ids, prompt_mask, drawn, valid, ended, soft, log_p, allowed)


def reference_law(base: Decoder, rollout: SoftRollout, law: Law) -> torch.Tensor:
    """log p (N, T, V) of another policy on the same soft prefixes, of all that any may write (see losses.token_law), by one
    forward pass. Differentiable in them: what a mixture does to the reference's law is part of a loss that reads it."""
    width = rollout.prompt_ids.shape[1]
    embeds = torch.cat([base.embed_tokens(rollout.prompt_ids), soft_embeds(base, rollout.soft[:, :-1])], 1)
    mask = None
    if not bool(rollout.prompt_mask.all()):
        mask = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.mask)], 1)[:, :-1]
    states = base.hidden(embeds=embeds, attention_mask=mask)[:, width - 1 :]
    return log_law(linear(states, base.head_weight), law, rollout.allowed)
