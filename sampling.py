"""The one token sampler: prefill each prompt once, decode its completions from a static cache, store what was sampled.

    sampler = Sampler(model)
    sampler.refresh()                                             # after every optimizer step or change of scales
    rollout = sampler(prompt_ids, prompt_mask, num_generations=16, max_new_tokens=64, ...)

It decodes on a *twin* of the model: q/k/v and gate/up fused, adapters merged into the weights (in bfloat16, where merging
would round a small update away, kept beside them in fp32). A CPU runs the twin eagerly and drops finished rows; CUDA
replays one captured graph per token. Rows that are finished are looked for every 16 tokens, so that no token waits for
the host. Random numbers are drawn per rollout, one per row and token, so dropping rows changes no sample.

The law that is sampled (temperature, top-k, top-p, minimum length, suppressed tokens) is the law that is scored: the
log-probabilities kept here are its own, and a truncated law keeps its support for whoever scores the tokens again.
"""
import copy
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ONEDNN, Cache, Decoder, product, projections

CHECK_EVERY = 16  # tokens between two looks at which rows are finished


@dataclass(frozen=True)
class Law:
    """The distribution that tokens are drawn from, given logits."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_new_tokens: int = 0  # stop tokens are forbidden before
    suppress: tuple[int, ...] = ()  # never sampled

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature} (greedy decoding: top_k=1)")
        if not 0 < self.top_p <= 1 or self.top_k < 0 or self.min_new_tokens < 0:
            raise ValueError(f"top_p must be in (0, 1], top_k and min_new_tokens at least 0: {self}")

    @property
    def truncated(self) -> bool:
        """Whether some tokens may have probability 0: then the support must be kept to score them again."""
        return bool(self.top_k or self.top_p < 1 or self.min_new_tokens or self.suppress)

    def support(self, logits, young, stop_ids) -> torch.Tensor:
        """Which tokens may be drawn. logits (N, V) at temperature; `young` (1,) bool: no stop token yet; stop_ids a long
        tensor -> (N, V) bool."""
        allowed = torch.ones_like(logits, dtype=torch.bool)
        for token in self.suppress:  # one by one: no graph captures the copy of a list from the host
            allowed[:, token] = False
        if self.min_new_tokens:
            allowed[:, stop_ids] &= ~young
        if self.top_k and self.top_k < logits.shape[-1]:
            kth = logits.masked_fill(~allowed, float("-inf")).topk(self.top_k, dim=-1).values[:, -1:]
            allowed &= logits >= kth
        if self.top_p < 1:
            ordered, index = logits.masked_fill(~allowed, float("-inf")).sort(dim=-1, descending=True)
            probs = ordered.softmax(-1)
            keep = probs.cumsum(-1) - probs < self.top_p  # the token that crosses the threshold is still in
            allowed &= torch.zeros_like(allowed).scatter_(1, index, keep)
        return allowed


def draw(logits, uniform, law: Law, young, stop_ids):
    """One token per row by inverting the cumulative distribution (several times faster than multinomial on a CPU).

    logits (N, V) any float dtype, uniform (N,) in (0, 1]. Returns token (N,) long, its log-probability under the law
    (N,) fp32, and the support (N, V) bool or None.
    """
    logits = logits.float()
    if law.temperature != 1:
        logits = logits / law.temperature
    support = None
    if law.truncated:
        support = law.support(logits, young, stop_ids)
        logits = logits.masked_fill(~support, float("-inf"))
    probs = logits.softmax(-1)
    cumulative = probs.cumsum(-1)
    # first index whose cumulative probability reaches uniform * total: never one of probability 0, since uniform > 0
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:])
    token = token.clamp_(max=logits.shape[-1] - 1)  # NaN logits: the token's log-probability is NaN, and the step stops there
    picked = probs.gather(1, token)
    if logits.is_cuda:  # its parallel sum may rise by a rounding where a probability is 0
        token = torch.where(picked > 0, token, probs.argmax(-1, keepdim=True))
        picked = probs.gather(1, token)
    return token.squeeze(1), picked.squeeze(1).log(), support


@dataclass
class Rollout:
    """N = P * num_generations completions; rows p * num_generations .. belong to prompt p."""

    prompt_ids: torch.Tensor  # (N, L) long, left-padded
    prompt_mask: torch.Tensor  # (N, L) bool
    tokens: torch.Tensor  # (N, T) long; pad_id behind the end
    mask: torch.Tensor  # (N, T) bool: True for every sampled token, the stop token that ends a completion included
    logprobs: torch.Tensor  # (N, T) fp32, of the law that was sampled; 0 behind the end
    support: torch.Tensor | None  # (N, T, V) bool where the law is truncated
    finished: torch.Tensor  # (N,) bool: ended by a stop token, not by the length cap

    def rows(self, index) -> "Rollout":
        """Some of its completions; `index` (n,) long or (N,) bool."""
        return Rollout(*(None if value is None else value[index] for value in vars(self).values()))


# --------------------------------------------------------------------------------------------------------- the twin


class TwinLinear(nn.Module):
    """Several projections of one input as one product, adapters included.

    A source is an nn.Linear, or an adapted one: `source.base` the frozen nn.Linear, `source.low_rank()` its branches as
    (A (R, in), B (out, R)) with their scales in B. In fp32 they are merged, W + BA; otherwise y + B(Ax) in fp32.
    """

    def __init__(self, dtype: torch.dtype, *sources: nn.Module):
        super().__init__()
        self.dtype, self.sources, self.bias, self.buffers_by_name = dtype, sources, None, {}

    def keep(self, name, value):
        """Copies into the buffer of that name, whose address a captured CUDA graph has read. A new shape is a new buffer."""
        if name in self.buffers_by_name and self.buffers_by_name[name].shape == value.shape:
            self.buffers_by_name[name].copy_(value)
        else:
            self.buffers_by_name[name] = value.clone(memory_format=torch.contiguous_format)
        return self.buffers_by_name[name]

    def refresh(self):
        bases = [getattr(source, "base", source) for source in self.sources]
        weights = [base.weight.to(self.dtype) for base in bases]
        empty = [(w.new_zeros(0, w.shape[1]).float(), w.new_zeros(w.shape[0], 0).float()) for w in weights]
        pairs = [s.low_rank() if hasattr(s, "low_rank") else e for s, e in zip(self.sources, empty)]
        merge = self.dtype != torch.bfloat16
        if merge:
            weights = [w.addmm(B, A) if A.shape[0] else w for w, (A, B) in zip(weights, pairs)]
        self.weight = self.keep("weight", torch.cat(weights))
        if getattr(bases[0], "bias", None) is not None:
            self.bias = self.keep("bias", torch.cat([base.bias.to(self.dtype) for base in bases]))
        self.packed = None
        if ONEDNN and not self.weight.is_cuda and self.dtype != torch.float64:  # laid out once for many small products
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        self.beside = not merge and any(A.shape[0] for A, _ in pairs)
        if self.beside:
            self.A = self.keep("A", torch.cat([A for A, _ in pairs]))
            self.B = self.keep("B", torch.block_diag(*[B for _, B in pairs]))

    def forward(self, x):
        y = product(x, self.weight if self.packed is None else self.packed, self.bias)
        return y.add_(F.linear(F.linear(x.float(), self.A), self.B)) if self.beside else y


class TwinMLP(nn.Module):
    """A fused MLP with the gated branches of its source, which run as they are."""

    def __init__(self, mlp: nn.Module, source: nn.Module):
        super().__init__()
        self.mlp, self.source = mlp, source

    def forward(self, x):
        return self.mlp(x) + self.source.branches(x)


def build_twin(model: Decoder) -> Decoder:
    """A decoder of the same function with q/k/v and gate/up fused where the family keeps them apart, filled by `refresh`.

    Norms and embeddings are the model's own, except that a bfloat16 model on a CPU gets a twin in fp32: at a few dozen rows
    its bfloat16 kernels are no faster, and in fp32 branches can be merged without being rounded away.
    `twin.copies` lists what `refresh` must copy then.
    """
    config = replace(model.config, fused=model.config.gated_mlp)
    with torch.device("meta"):
        twin = Decoder(config)
    raised = model.dtype == torch.bfloat16 and model.device.type == "cpu"
    dtype = torch.float32 if raised else model.dtype
    twin.copies = []

    def own(module: nn.Module) -> nn.Module:
        if not raised:
            return module
        twin.copies.append((copy.deepcopy(module).float().requires_grad_(False), module))
        return twin.copies[-1][0]

    for name in ("embed_tokens", "embed_positions", "norm", "lm_head"):
        if hasattr(model, name):
            setattr(twin, name, own(getattr(model, name)))
    ours, theirs = projections(config), projections(model.config)
    for layer, source in zip(twin.layers, model.layers):
        attention, mlp = source.self_attn, getattr(source.mlp, "base", source.mlp)
        layer.input_layernorm, layer.post_attention_layernorm = own(source.input_layernorm), own(source.post_attention_layernorm)
        if config.qk_norm:
            layer.self_attn.q_norm, layer.self_attn.k_norm = own(attention.q_norm), own(attention.k_norm)
        setattr(layer.self_attn, ours["qkv"][0], TwinLinear(dtype, *[getattr(attention, n) for n in theirs["qkv"]]))
        setattr(layer.self_attn, ours["out"], TwinLinear(dtype, getattr(attention, theirs["out"])))
        setattr(layer.mlp, ours["up"][0], TwinLinear(dtype, *[getattr(mlp, n) for n in theirs["up"]]))
        setattr(layer.mlp, ours["down"], TwinLinear(dtype, getattr(mlp, theirs["down"])))
        if hasattr(source.mlp, "branches"):
            layer.mlp = TwinMLP(layer.mlp, source.mlp)
    return twin


# ------------------------------------------------------------------------------------------------------ the decoding


class Decoding:
    """Rows in flight: all that one step reads and writes. On CUDA the tensors are static and the step is one graph."""

    def __init__(self, twin: Decoder, rows: int, slots: int, padded: bool):
        device = twin.device
        self.cache = Cache(twin.config, rows, slots, twin.dtype, device)
        self.cache.upto = slots
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self.row = torch.zeros(rows, dtype=torch.long, device=device)  # where its tokens go in the output
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.pad_bias = torch.zeros(rows, 1, 1, slots, dtype=twin.dtype, device=device) if padded else None
        self.graph = None

    def take(self, other: "Decoding", keep: torch.Tensor, nowhere: int):
        """Copies the rows `keep` (n,) of another decoding into the first n of this one; the rest idle and write to `nowhere`."""
        n, filled = len(keep), int(other.cache.slot)
        for mine, theirs in zip(self.cache.keys + self.cache.values, other.cache.keys + other.cache.values):
            mine[:n, :, :filled] = theirs[keep, :, :filled]
        for name in ("token", "position", "row", "done"):
            getattr(self, name)[:n] = getattr(other, name)[keep]
        # idle rows count on too: from 0, or their position would leave the context after a few calls
        self.row[n:], self.done[n:], self.position[n:] = nowhere, True, 0
        if self.pad_bias is not None:
            self.pad_bias[:n] = other.pad_bias[keep]
        self.step.copy_(other.step)
        self.cache.slot.copy_(other.cache.slot)


class Output:
    """Where a rollout is written, (T, N + 1): tokens, mask, logprobs, support, and the uniform numbers it is drawn with.
    The last column takes what idle rows write."""

    def __init__(self, steps: int, rows: int, vocab: int, truncated: bool, device):
        self.tokens = torch.zeros(steps, rows + 1, dtype=torch.long, device=device)
        self.mask = torch.zeros(steps, rows + 1, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(steps, rows + 1, device=device)
        self.uniform = torch.zeros(steps, rows + 1, device=device)
        self.support = torch.zeros(steps, rows + 1, vocab, dtype=torch.bool, device=device) if truncated else None


class Sampler:
    """Samples from a decoder; see the module's docstring. Call `refresh` whenever its weights or scales have changed."""

    def __init__(self, model: Decoder):
        self.model, self.twin = model, build_twin(model)
        self.head = TwinLinear(self.twin.dtype, self.twin.embed_tokens if model.config.tied else self.twin.lm_head)
        self.adapter = getattr(model, "adapter", None)
        self.static = model.device.type == "cuda"  # fixed shapes, one captured graph per token
        self.sessions = {}  # static: captured decodings by shape
        self.captured = None  # what a captured graph holds fast: the scales of gated branches, the ranks kept beside

    @torch.no_grad()
    def refresh(self):
        """Takes over the model's present weights and scales. Raises ValueError if branches were attached since."""
        if getattr(self.model, "adapter", None) is not self.adapter:
            raise ValueError("the model got its adapter after this Sampler was built: attach first, then build the Sampler")
        for mine, theirs in self.twin.copies:
            for a, b in zip(mine.parameters(), theirs.parameters()):
                a.copy_(b)
        linears = [self.head, *(module for module in self.twin.modules() if isinstance(module, TwinLinear))]
        for module in linears:
            module.refresh()
        scales = dict(self.adapter.scales) if self.adapter and self.adapter.spec.kind == "mlp" else None
        captured = (scales, [module.A.shape if module.beside else None for module in linears])
        if captured != self.captured:
            self.sessions.clear()
        self.captured = captured

    @torch.no_grad()
    def __call__(
        self, prompt_ids, prompt_mask, num_generations: int, max_new_tokens: int, stop_ids: tuple[int, ...], pad_id: int,
        generator: torch.Generator, law: Law = Law(),
    ) -> Rollout:  # fmt: skip
        """Samples `num_generations` completions of each prompt.

        prompt_ids (P, L) long, left-padded; prompt_mask (P, L) bool. `generator` is a CPU generator: the same numbers are
        drawn on every device. Raises ValueError for no prompt, an empty or right-padded one, no token to sample, a prompt
        and completion that do not fit the context, and before the first `refresh`.
        """
        if self.captured is None:
            raise ValueError("the sampler holds no weights yet: call refresh() first, and after every change of weights")
        device, config = self.model.device, self.model.config
        prompts, length = prompt_ids.shape
        if prompts == 0:
            raise ValueError("no prompt to sample from")
        if length + max_new_tokens > config.context:
            raise ValueError(
                f"prompts of {length} tokens and max_new_tokens={max_new_tokens} exceed the model's context of {config.context}"
            )
        if num_generations < 1 or max_new_tokens < 1:
            raise ValueError(f"num_generations={num_generations} and max_new_tokens={max_new_tokens} must be at least 1")
        if prompt_mask.dtype != torch.bool or prompt_mask.shape != prompt_ids.shape:
            raise ValueError(f"prompt_mask is {prompt_mask.dtype} {tuple(prompt_mask.shape)}, not bool {tuple(prompt_ids.shape)}")
        if not length or not prompt_mask[:, -1].all() or (prompt_mask[:, :-1] & ~prompt_mask[:, 1:]).any():
            raise ValueError("prompts must be left-padded and not empty: a row of prompt_mask has False behind its first True")
        rows = prompts * num_generations
        uniform = 1 - torch.rand(max_new_tokens, rows, generator=generator)  # in (0, 1]
        if self.static:
            decoding, out = self._session((rows, max_new_tokens, law, tuple(stop_ids), pad_id), length)
            extra = decoding.cache.upto - max_new_tokens - length  # static shapes: pad the prompts further
            prompt_ids, prompt_mask = F.pad(prompt_ids, (extra, 0), value=pad_id), F.pad(prompt_mask, (extra, 0))
        else:
            decoding = Decoding(self.twin, rows, length + max_new_tokens, not bool(prompt_mask.all()))
            out = Output(max_new_tokens, rows, config.vocab_size, law.truncated, device)
        out.tokens.fill_(pad_id)
        out.mask.zero_()
        out.logprobs.zero_()
        out.uniform[:, :rows] = uniform.to(device)
        out.uniform[:, rows] = 1
        prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
        stop = torch.tensor(stop_ids, dtype=torch.long, device=device)
        self._prefill(decoding, out, prompt_ids, prompt_mask, num_generations, law, stop, pad_id)
        eager = not self.static
        whole, slots, used = decoding, decoding.cache.upto, 1
        while used < max_new_tokens:
            for _ in range(min(CHECK_EVERY, max_new_tokens - used)):
                if eager:
                    decoding.cache.upto = prompt_ids.shape[1] + used
                    self._step(decoding, out, law, stop, pad_id, eager=True)
                else:
                    self._replay(decoding, out, law, stop, pad_id)
                used += 1
            alive = (~decoding.done).nonzero().squeeze(1)
            if len(alive) == 0:
                break
            decoding = self._shrink(decoding, alive, rows, slots, eager, whole)
        support = out.support[:used, :rows].transpose(0, 1) if law.truncated else None
        own = {"memory_format": torch.contiguous_format}  # a copy always: the next call writes where this one did
        return Rollout(
            prompt_ids.repeat_interleave(num_generations, 0), prompt_mask.repeat_interleave(num_generations, 0),
            out.tokens[:used, :rows].t().clone(**own), out.mask[:used, :rows].t().clone(**own),
            out.logprobs[:used, :rows].t().clone(**own), None if support is None else support.clone(**own),
            torch.isin(out.tokens[:used, :rows], stop).logical_and(out.mask[:used, :rows]).any(0),
        )  # fmt: skip

    def _prefill(self, d: Decoding, out: Output, ids, mask, copies: int, law: Law, stop, pad_id: int):
        """Runs each prompt once, hands its cache to its `copies` rows and draws their first token."""
        prompts, length = ids.shape
        lowest = torch.finfo(self.twin.dtype).min
        padded = d.pad_bias is not None
        cache = Cache(self.twin.config, prompts, length, self.twin.dtype, ids.device)
        cache.upto = length
        hidden = self.twin.hidden(ids, mask if padded else None, cache=cache)[:, -1]
        logits = self.head(hidden).repeat_interleave(copies, 0)  # (N, V)
        for mine, theirs in zip(d.cache.keys + d.cache.values, cache.keys + cache.values):
            mine[:, :, :length] = theirs.repeat_interleave(copies, 0)
        d.row.copy_(torch.arange(len(d.row), device=ids.device))
        d.position.copy_(mask.sum(-1).repeat_interleave(copies, 0))
        d.done.zero_()
        d.step.zero_()
        d.cache.slot.fill_(length)
        if padded:
            d.pad_bias.zero_()
            d.pad_bias[..., :length].masked_fill_(~mask.repeat_interleave(copies, 0)[:, None, None], lowest)
        self._write(d, out, logits, law, stop, pad_id)

    def _write(self, d: Decoding, out: Output, logits, law: Law, stop, pad_id: int):
        """Draws a token per row and writes it; finished rows go on with pad_id and leave no trace."""
        step = d.step.expand(len(d.row))
        uniform = out.uniform[d.step, d.row]
        token, logprob, support = draw(logits, uniform, law, d.step < law.min_new_tokens, stop)
        alive = ~d.done
        token = torch.where(alive, token, pad_id)
        out.tokens.index_put_((step, d.row), token)
        out.mask.index_put_((step, d.row), alive)
        out.logprobs.index_put_((step, d.row), logprob * alive)
        if support is not None:
            out.support.index_put_((step, d.row), support)
        d.token.copy_(token)
        d.done |= torch.isin(token, stop)
        d.step += 1

    def _step(self, d: Decoding, out: Output, law: Law, stop, pad_id: int, eager: bool):
        """One token for every row: attention reads slots 0 .. slot (eager: by slicing; in a graph: by a mask)."""
        if eager:
            bias = None if d.pad_bias is None else d.pad_bias[..., : d.cache.upto]
        else:
            ahead = torch.arange(d.cache.upto, device=d.token.device) > d.cache.slot
            bias = d.pad_bias.masked_fill(ahead, torch.finfo(self.twin.dtype).min)
        hidden = self.twin.hidden(d.token[:, None], position_ids=d.position[:, None], cache=d.cache, bias=bias)[:, 0]
        logits = self.head(hidden)
        d.position += 1
        d.cache.slot += 1
        self._write(d, out, logits, law, stop, pad_id)

    def _shrink(self, d: Decoding, alive, rows: int, slots: int, eager: bool, whole: Decoding) -> Decoding:
        """Drops finished rows: on a CPU all of them, on CUDA when half or more of a captured size are idle."""
        if eager:
            if len(alive) > 0.9 * len(d.row):
                return d
            smaller = Decoding(self.twin, len(alive), slots, d.pad_bias is not None)
        else:
            size = len(d.row)
            while size >= 2 * len(alive) and size >= 32:
                size //= 2
            if size == len(d.row):
                return d
            if size not in whole.smaller:
                whole.smaller[size] = Decoding(self.twin, size, slots, True)
            smaller = whole.smaller[size]
        smaller.take(d, alive, nowhere=rows)
        return smaller

    def _session(self, key: tuple, length: int) -> tuple[Decoding, Output]:
        """The static decoding of these settings; prompts are padded to the longest seen so far, in steps of 16."""
        (rows, steps, law, *_), length = key, -(-length // 16) * 16
        limit = self.model.config.context - steps
        if key not in self.sessions or self.sessions[key][0].cache.upto < min(length, limit) + steps:
            decoding = Decoding(self.twin, rows, min(length, limit) + steps, True)
            decoding.smaller = {}
            self.sessions[key] = decoding, Output(steps, rows, self.model.config.vocab_size, law.truncated, self.model.device)
        return self.sessions[key]

    def _replay(self, d: Decoding, out: Output, law: Law, stop, pad_id: int):
        if d.token.device.type != "cuda":  # the tests run the static path without graphs
            return self._step(d, out, law, stop, pad_id, eager=False)
        if d.graph is None:  # the first token of a shape runs eagerly, which also warms the kernels up; then capture
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(d, out, law, stop, pad_id, eager=False)
            torch.cuda.current_stream().wait_stream(stream)
            d.graph = torch.cuda.CUDAGraph()
            d.constants = stop  # read by the graph: must outlive this call
            with torch.cuda.graph(d.graph):
                self._step(d, out, law, stop, pad_id, eager=False)
            return  # capturing does not run
        d.graph.replay()
