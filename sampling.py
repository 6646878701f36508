"""The one token sampler: prefill each prompt once, decode its completions from a static cache, store what was sampled.

    sampler = Sampler(model)
    sampler.refresh()                                             # after every optimizer step or change of scales
    rollout = sampler(prompt_ids, prompt_mask, num_generations=16, max_new_tokens=64, ...)

It decodes on a *twin* of the model: few operations, q/k/v and gate/up fused, adapters merged into the weights (in bfloat16,
where merging would round a small update away, kept beside them in fp32). A CPU runs the twin eagerly and drops finished rows;
CUDA replays one captured graph per token. Rows that are finished are looked for every 16 tokens, so that no token waits for
the host. Random numbers are drawn per rollout, one per row and token, so dropping rows changes no sample.

The law that is sampled (temperature, top-k, top-p, minimum length, suppressed tokens) is the law that is scored: the
log-probabilities kept here are its own, and a truncated law keeps its support for whoever scores the tokens again.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import Decoder, attend, causal_bias
from twin import Twin

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

    @property
    def cut(self) -> bool:
        """Whether what may be drawn depends on the logits: the law is then not the model's own, nor the reference's."""
        return bool(self.top_k or self.top_p < 1)

    def allowed(self, steps: int, vocab: int, stop_ids) -> torch.Tensor | None:
        """(steps, vocab) bool: what any policy may write at each step, minimum length and suppressed tokens alone; None:
        everything. stop_ids a long tensor."""
        if not self.min_new_tokens and not self.suppress:
            return None
        allowed = torch.ones(steps, vocab, dtype=torch.bool, device=stop_ids.device)
        allowed[:, list(self.suppress)] = False
        allowed[: self.min_new_tokens, stop_ids] = False
        return allowed

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
    allowed: torch.Tensor | None = None  # (N, T, V) bool, Law.allowed: the support of a reference's law; None: everything

    def allowed_of(self, rows) -> torch.Tensor | None:
        """The support (n_valid, V) of a reference's law of the valid tokens of some rows; None: everything."""
        return None if self.allowed is None else self.allowed[rows][self.mask[rows]]

    def rows(self, index) -> "Rollout":
        """Some of its completions; `index` (n,) long or (N,) bool."""
        return Rollout(*(None if value is None else value[index] for value in vars(self).values()))

    def to(self, device) -> "Rollout":
        return Rollout(*(None if value is None else value.to(device) for value in vars(self).values()))


def joined(parts: list[Rollout], pad_id: int) -> Rollout:
    """Rollouts of prompts of one width, as one; shorter completions are filled up."""
    longest = max(part.tokens.shape[1] for part in parts)

    def column(name: str):
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        if name in ("tokens", "mask", "logprobs", "support", "allowed"):
            fill = pad_id if name == "tokens" else 0
            values = [torch.cat([v, v.new_full((len(v), longest - v.shape[1], *v.shape[2:]), fill)], dim=1) for v in values]
        return torch.cat(values)

    return parts[0] if len(parts) == 1 else Rollout(*map(column, Rollout.__dataclass_fields__))


# ------------------------------------------------------------------------------------------------------ the decoding


class Decoding:
    """Rows in flight: all that one step reads and writes. On CUDA the tensors are static and the step is one graph. `cache` is
    where their keys and values go; None: memory of their own."""

    def __init__(self, twin: Twin, rows: int, slots: int, padded: bool, cache=None):
        c, device = twin.config, twin.model.device
        self.config, self.upto, self.slots = c, slots, slots  # attention reads slots 0 .. upto - 1
        # key and value side by side: one write for both, and the second read finds what the first one fetched
        shape = (c.layers, rows, c.kv_heads, slots, 2 * c.head_dim)
        self.cache = torch.zeros(shape, dtype=twin.dtype, device=device) if cache is None else cache
        self.slot = torch.zeros(1, dtype=torch.long, device=device)  # where the next token goes
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self.place = torch.zeros(rows, dtype=torch.long, device=device)  # where its next token goes in the flat output
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        shape = (rows, c.kv_heads, 1, slots) if padded else ()
        self.bias = torch.zeros(shape, dtype=twin.dtype, device=device)
        self.padded, self.graph = padded, None

    def take(self, other: "Decoding", chosen: torch.Tensor, width: int):
        """Copies the rows `chosen` (n,) of another decoding into the first n of this one; the rest idle and write to the last
        of the output's `width` rows."""
        n = len(chosen)
        for mine, theirs in zip(self.cache, other.cache):  # a layer at a time: the copy between them is large
            mine[:n, :, : other.upto] = theirs[chosen, :, : other.upto]
        for name in ("token", "position", "place", "done"):
            getattr(self, name)[:n] = getattr(other, name)[chosen]
        # idle rows count on too: from 0, or their position would leave the context after a few calls
        self.place[n:], self.done[n:], self.position[n:] = other.place[0] // width * width + width - 1, True, 0
        if self.padded:
            self.bias[:n] = other.bias[chosen]
        self.slot.copy_(other.slot)

    def attention(self, eager: bool):
        """What `Twin` asks for one token per row: attends to slots 0 .. slot (eager: by slicing; in a graph: by a mask)."""
        dim, groups, bias = self.config.head_dim, self.config.heads // self.config.kv_heads, self.bias
        if self.padded:
            bias = bias[..., : self.upto].flatten(0, 1)  # (N * KV, 1, S)
        if not eager:
            ahead = torch.arange(self.upto, device=self.slot.device) > self.slot
            bias = bias.masked_fill(ahead, torch.finfo(bias.dtype).min)
        cache = self.cache.flatten(1, 2)  # (layers, N * KV, slots, 2 D)
        seen, exact = cache[:, :, : self.upto], torch.promote_types(bias.dtype, torch.float32) if bias.is_cuda else None
        cache, keys, values = cache.unbind(), seen[..., :dim].transpose(2, 3).unbind(), seen[..., dim:].unbind()

        def attention(layer: int, qkv):
            cache[layer].index_copy_(1, self.slot, qkv[:, groups:].flatten(1).unsqueeze(1))
            scores = torch.baddbmm(bias, qkv[:, :groups], keys[layer], beta=int(self.padded), alpha=dim**-0.5)  # (N * KV, G, S)
            probs = scores.softmax(-1, dtype=exact).to(qkv.dtype)
            return torch.bmm(probs, values[layer]).view(len(self.token), -1)

        return attention


class Output:
    """Where a rollout is written, place step * (N + 1) + row: tokens, mask, logprobs, support, and the uniform numbers it is
    drawn with. The last row takes what idle rows write."""

    def __init__(self, steps: int, rows: int, vocab: int, truncated: bool, device):
        self.width, places = rows + 1, steps * (rows + 1)
        self.tokens = torch.zeros(places, dtype=torch.long, device=device)
        self.mask = torch.zeros(places, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(places, device=device)
        self.uniform = torch.zeros(places, device=device)
        self.support = torch.zeros(places, vocab, dtype=torch.bool, device=device) if truncated else None

    def rows(self, values: torch.Tensor, steps: int) -> torch.Tensor:
        """(N, steps, ...). A copy always: the next call writes where this one did."""
        return values.unflatten(0, (-1, self.width))[:steps, :-1].transpose(0, 1).clone(memory_format=torch.contiguous_format)


class Sampler:
    """Samples from a decoder; see the module's docstring. Call `refresh` whenever its weights or scales have changed.

    rows: how many completions are decoded at once (whole groups, one at least), which bounds the cache; 0: all.
    """

    def __init__(self, model: Decoder, rows: int = 0):
        self.model, self.twin, self.rows = model, Twin(model), rows
        self.adapter = getattr(model, "adapter", None)
        self.static = model.device.type == "cuda"  # fixed shapes, one captured graph per token
        self.sessions = {}  # static: captured decodings by shape
        self.captured = None  # what a captured graph holds fast: the scales of gated branches, the ranks kept beside

    def refresh(self):
        """Takes over the model's present weights and scales. Raises ValueError if branches were attached since."""
        if getattr(self.model, "adapter", None) is not self.adapter:
            raise ValueError("the model got its adapter after this Sampler was built: attach first, then build the Sampler")
        with torch.inference_mode(False), torch.no_grad():  # a caller's inference mode must not get into the buffers
            self.twin.refresh()
        scales = dict(self.adapter.scales) if self.adapter and self.adapter.spec.kind == "mlp" else None
        captured = (scales, [part.A.shape if getattr(part, "beside", False) else None for part in self.twin.parts])
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
        config, (prompts, length) = self.model.config, prompt_ids.shape
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
        uniform = 1 - torch.rand(max_new_tokens, prompts * num_generations, generator=generator)  # in (0, 1]
        rows = self.parts(prompts, num_generations)
        prompts = [count // num_generations for count in rows]
        parts = zip(prompt_ids.split(prompts), prompt_mask.split(prompts), uniform.split(rows, dim=1))
        return joined([self._sample(*part, num_generations, stop_ids, pad_id, law) for part in parts], pad_id)

    def parts(self, prompts: int, num_generations: int) -> list[int]:
        """How many completions are decoded at once, part by part."""
        most = max(1, self.rows // num_generations) if self.rows else prompts
        return [min(most, prompts - first) * num_generations for first in range(0, prompts, most)]

    def _sample(self, prompt_ids, prompt_mask, uniform, num_generations: int, stop_ids, pad_id: int, law: Law) -> Rollout:
        """The rollout of some prompts, with the numbers uniform (max_new_tokens, P * num_generations) that it is drawn with."""
        device, config, length, (max_new_tokens, rows) = self.model.device, self.model.config, prompt_ids.shape[1], uniform.shape
        with torch.inference_mode():  # a fifteenth faster than no_grad; what is returned is copied outside, fit for autograd
            if self.static:
                decoding, out = self._session((rows, max_new_tokens, law, tuple(stop_ids), pad_id), length)
                extra = decoding.slots - max_new_tokens - length  # static shapes: pad the prompts further
                prompt_ids, prompt_mask = F.pad(prompt_ids, (extra, 0), value=pad_id), F.pad(prompt_mask, (extra, 0))
            else:
                decoding = Decoding(self.twin, rows, length + max_new_tokens, not bool(prompt_mask.all()))
                out = Output(max_new_tokens, rows, config.vocab_size, law.truncated, device)
            out.tokens.fill_(pad_id)
            out.mask.zero_()
            out.logprobs.zero_()
            out.uniform.copy_(F.pad(uniform, (0, 1), value=1).flatten())
            prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
            stop = torch.tensor(stop_ids, dtype=torch.long, device=device)
            self._prefill(decoding, out, prompt_ids, prompt_mask, num_generations, law, stop, pad_id)
            whole, used = decoding, 1
            while used < max_new_tokens:
                for _ in range(min(CHECK_EVERY, max_new_tokens - used)):
                    if self.static:
                        self._replay(decoding, out, law, stop, pad_id)
                    else:
                        decoding.upto = prompt_ids.shape[1] + used
                        self._step(decoding, out, law, stop, pad_id)
                    used += 1
                alive = (~decoding.done).nonzero().squeeze(1)
                if len(alive) == 0:
                    break
                decoding = self._shrink(decoding, alive, out.width, whole)
        tokens, mask, logprobs = (out.rows(values, used) for values in (out.tokens, out.mask, out.logprobs))
        ids, real = (values[:, -length:].repeat_interleave(num_generations, 0) for values in (prompt_ids, prompt_mask))
        allowed = law.allowed(used, config.vocab_size, stop)
        return Rollout(
            ids, real, tokens, mask, logprobs, out.rows(out.support, used) if law.truncated else None,
            torch.isin(tokens, stop).logical_and(mask).any(1), None if allowed is None else allowed.expand(rows, -1, -1),
        )  # fmt: skip

    def _prefill(self, d: Decoding, out: Output, ids, mask, copies: int, law: Law, stop, pad_id: int):
        """Runs each prompt once, hands its keys and values to its `copies` rows and draws their first token."""
        (prompts, length), dim, bias = ids.shape, d.config.head_dim, None
        if d.padded:
            pad_bias = torch.zeros(mask.shape, dtype=self.twin.dtype, device=ids.device)
            pad_bias = pad_bias.masked_fill_(~mask, torch.finfo(self.twin.dtype).min)[:, None, None]
            bias = torch.minimum(causal_bias(length, length, self.twin.dtype, ids.device), pad_bias)
            d.bias.zero_()
            d.bias[..., :length] = pad_bias.repeat_interleave(copies, 0)
        cache = d.cache.unflatten(1, (prompts, copies)).unflatten(-1, (2, dim))

        def attention(layer: int, qkv):
            qkv = qkv.view(prompts, length, d.config.kv_heads, -1, dim).transpose(1, 2)  # (P, KV, L, G + 2, D)
            cache[layer, :, :, :, :length] = qkv[:, None, :, :, -2:]
            queries = qkv[..., :-2, :].transpose(2, 3).flatten(1, 2)  # (P, H, L, D)
            read = attend(queries, qkv[..., -2, :], qkv[..., -1, :], bias, causal=True)
            return read.transpose(1, 2).reshape(prompts * length, -1)

        positions = (mask.long().cumsum(-1) - 1).clamp_(min=0)
        hidden = self.twin.hidden(ids.flatten(), positions.flatten(), attention).view(prompts, length, -1)[:, -1]
        d.place.copy_(torch.arange(len(d.place), device=ids.device))
        d.position.copy_(mask.sum(-1).repeat_interleave(copies, 0))
        d.done.zero_()
        d.slot.fill_(length)
        self._write(d, out, self.twin.logits(hidden).repeat_interleave(copies, 0), law, stop, pad_id)

    def _write(self, d: Decoding, out: Output, logits, law: Law, stop, pad_id: int):
        """Draws a token per row and writes it; finished rows go on with pad_id and leave no trace."""
        young = d.place[:1] < law.min_new_tokens * out.width
        token, logprob, support = draw(logits, out.uniform.index_select(0, d.place), law, young, stop)
        alive = ~d.done
        token = torch.where(alive, token, pad_id)
        out.tokens.index_copy_(0, d.place, token)
        out.mask.index_copy_(0, d.place, alive)
        out.logprobs.index_copy_(0, d.place, logprob * alive)
        if support is not None:
            out.support.index_copy_(0, d.place, support)
        d.token.copy_(token)
        d.done |= (token[:, None] == stop).any(1)
        d.place += out.width

    def _step(self, d: Decoding, out: Output, law: Law, stop, pad_id: int):
        """One token for every row."""
        hidden = self.twin.hidden(d.token, d.position, d.attention(eager=not self.static))
        d.position += 1
        d.slot += 1
        self._write(d, out, self.twin.logits(hidden), law, stop, pad_id)

    def _shrink(self, d: Decoding, alive, width: int, whole: Decoding) -> Decoding:
        """Drops finished rows: on a CPU all of them, on CUDA when half or more of a captured size are idle."""
        if not self.static:
            if len(alive) > 0.9 * len(d.token):
                return d
            smaller = Decoding(self.twin, len(alive), d.slots, d.padded)
        else:
            size = len(d.token)
            while size >= 2 * len(alive) and size >= 32:
                size //= 2
            if size == len(d.token):
                return d
            if size not in whole.smaller:
                whole.smaller[size] = Decoding(self.twin, size, d.slots, True, whole.cache[:, :size])  # whose rows are done with
            smaller = whole.smaller[size]
        smaller.take(d, alive, width)
        return smaller

    def _session(self, key: tuple, length: int) -> tuple[Decoding, Output]:
        """The static decoding of these settings; prompts are padded to the longest seen so far, in steps of 16."""
        (rows, steps, law, *_), length = key, -(-length // 16) * 16
        limit = self.model.config.context - steps
        if key not in self.sessions or self.sessions[key][0].slots < min(length, limit) + steps:
            decoding = Decoding(self.twin, rows, min(length, limit) + steps, True)
            decoding.smaller = {}
            self.sessions[key] = decoding, Output(steps, rows, self.model.config.vocab_size, law.truncated, self.model.device)
        return self.sessions[key]

    def _replay(self, d: Decoding, out: Output, law: Law, stop, pad_id: int):
        if d.token.device.type != "cuda":  # the tests run the static path without graphs
            return self._step(d, out, law, stop, pad_id)
        if d.graph is None:  # the first token of a shape runs eagerly, which also warms the kernels up; then capture
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(d, out, law, stop, pad_id)
            torch.cuda.current_stream().wait_stream(stream)
            d.graph = torch.cuda.CUDAGraph()
            d.constants = stop  # read by the graph: must outlive this call
            with torch.cuda.graph(d.graph):
                self._step(d, out, law, stop, pad_id)
            return  # capturing does not run
        d.graph.replay()
