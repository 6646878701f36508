"""What a run of train_grpo.py needs of a GPU's memory, part by part, before there is a GPU or a weight.

    python memory.py --config configs/code_full.yaml                       # any flag of train_grpo.py may follow
    python memory.py --config configs/code_full.yaml --lora_config ds32 --memory_gib 96
    python memory.py --config configs/code_full.yaml --measure             # beside one real step, of random weights, on CUDA

Nothing is computed by formula. Decoder, adapter, sampler, loss and optimizer run as they are on the meta device, where tensors
have shapes and no numbers, and a `Ledger` hears of every storage that is made and freed. All completions are of full length.

What is not in it: CUDA's context, the libraries' workspaces (about 1 GiB together), and what the allocator loses between blocks.
"""
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch
from weakref import finalize

import torch
import torch.nn.functional as F
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import train_grpo
import training
from adapters import LoRALinear, attach, branch_parameters, preset, reference
from losses import token_logprobs
from model import ASSETS, Decoder, ModelConfig, config_from_hf, read_json, resolve
from rl_grpo import grpo_loss, update
from sampling import Sampler

GIB = 2**30


@dataclass
class Args(train_grpo.Args):
    memory_gib: float = 80.0
    """of the GPU; the largest micro-batch that fits into it is looked for"""
    prompt_length: int = 1281
    """tokens of the longest prompt (1,281: LeetCode's medium and hard problems as Qwen3 reads them)"""
    measure: bool = False
    """take one step on CUDA with random weights and singular vectors, and report what it took"""


class Ledger(TorchDispatchMode):
    """Bytes on a device: `now` in use, and the `peak` of them since `mark` was called."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.alive, self.now, self.peak = device, set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return tree_map_only(torch.Tensor, self.enter, function(*args, **(kwargs or {})))

    def enter(self, tensor):
        if tensor.device.type == self.device and (key := tensor.untyped_storage()._cdata) not in self.alive:
            self.alive.add(key)
            self.now += (size := tensor.untyped_storage().nbytes())
            self.peak = max(self.peak, self.now)
            finalize(tensor.untyped_storage(), self.leave, key, size)
        return tensor

    def leave(self, key: int, size: int):
        self.alive.discard(key)
        self.now -= size

    def mark(self) -> int:
        self.peak = self.now
        return self.now


# ---------------------------------------------------------------------------------- what CUDA does, without numbers


class FusedNorm(torch.autograd.Function):
    """CUDA's rms_norm: keeps its input and a number a row."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), None, None, None


def fused_attention(math, q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """The kernel that CUDA chooses: flash without a mask, memory-efficient with one; in fp32 the plain one where heads share keys."""
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if attn_mask is None and enable_gqa:
        return math(q, k, v, is_causal=is_causal, enable_gqa=True)
    bias = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, q.requires_grad, 0.0, is_causal)[0]


@contextmanager
def as_on_cuda():
    """Tensors on the meta device take the branches that the code has for CUDA, and its fused kernels."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "is_cuda", True))
        stack.enter_context(patch.object(F, "rms_norm", FusedNorm.apply))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", partial(fused_attention, F.scaled_dot_product_attention)))
        yield


def no_decomposition(weight, rank: int):
    """As svd.singular_vectors, by shape alone; where there are numbers, random ones of the right size."""
    (outputs, inputs), k = weight.shape, min(rank, *weight.shape)
    U, V = (torch.empty(shape, device=weight.device) for shape in ((outputs, k), (k, inputs)))
    return U.normal_(0, outputs**-0.5), V.normal_(0, inputs**-0.5)


# ---------------------------------------------------------------------------------------------- a step, part by part


def decoder(shape: ModelConfig, args: Args, device: str) -> Decoder:
    with torch.device(device):
        return Decoder(shape).to(getattr(torch, args.dtype)).requires_grad_(False)


def adapt(model: Decoder, args: Args, config) -> list[torch.nn.Parameter]:
    """Attaches the adapter; what of it trains."""
    with patch("adapters.singular_vectors", no_decomposition):
        attach(model, preset(args.lora_config, config.dual), seed=config.seed)
    return [p for group in branch_parameters(model).values() for p in group.values()]


def score(model, ids, mask, completion: int, temperature: float):
    """rl_grpo.score_rows where every completion has `completion` tokens. ids (m, T), mask (m, T - 1) -> (m * completion,)."""
    rows = torch.arange(len(ids), device=ids.device).repeat_interleave(completion)
    columns = torch.arange(ids.shape[1] - completion, ids.shape[1], device=ids.device).repeat(len(ids))
    hidden = model.hidden(ids[:, :-1], mask)[rows, columns - 1]
    return token_logprobs(hidden, model.head_weight, ids[rows, columns], temperature)


def learn(model, optimizer, config, size: int, prompt_length: int, ledger: Ledger) -> tuple[int, int]:
    """rl_grpo.update on one micro-batch of `size` rows: (peak of it, what the forward pass keeps for the backward pass)."""
    ledger.mark()
    ids = torch.zeros(size, prompt_length + config.max_new_tokens, dtype=torch.long, device=model.device)
    mask = torch.ones(size, ids.shape[1] - 1, dtype=torch.bool, device=model.device) if size > 1 else None  # prompts differ
    old = torch.zeros(size * config.max_new_tokens, device=model.device)
    ref, before = None, ledger.now
    if config.beta:
        with torch.no_grad(), reference(model) as base:
            ref = score(base, ids, mask, config.max_new_tokens, config.temperature)
    logprobs = score(model, ids, mask, config.max_new_tokens, config.temperature)
    saved = ledger.now - before
    grpo_loss(logprobs, old, ref, old, old, config.beta, config.epsilon, config.epsilon_high or config.epsilon)[0].backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return ledger.peak, saved


def roll_out(sampler: Sampler, config, prompt_length: int, ledger: Ledger, pools: list | None, shrinks: bool) -> int:
    """Sampler.__call__ as rows finish one by one (or, without `shrinks`, all at the end): its peak. `pools` takes what each captured
    graph keeps; None: they were captured before."""
    ledger.mark()
    sampler.refresh()
    rows, law, device = config.batch_size, config.law(), sampler.model.device
    whole, out = sampler._session((rows, config.max_new_tokens, law, (0,), 0), prompt_length)
    length = whole.slots - config.max_new_tokens
    ids = torch.zeros(rows // config.num_generations, length, dtype=torch.long, device=device)
    stop = torch.zeros(1, dtype=torch.long, device=device)
    sampler._prefill(whole, out, ids, torch.ones_like(ids, dtype=torch.bool), config.num_generations, law, stop, 0)
    decoding, peak = whole, ledger.peak
    while True:
        if pools is not None:
            ledger.mark()
            sampler._step(decoding, out, law, stop, 0)
            pools.append(torch.empty(ledger.peak - ledger.now, dtype=torch.uint8, device=device))
        if (size := len(decoding.token)) < 32 or not shrinks:
            return max(peak, ledger.peak)
        decoding = sampler._shrink(decoding, torch.arange(size // 2, device=device), out.width, whole)


@dataclass
class Estimate:
    """Bytes. kept: what a run holds from its second step on, by part."""

    modules: int
    trained: int
    kept: dict[str, int]
    rollout: int
    update: int
    saved: int
    logits: int
    largest: int


def estimate(shape: ModelConfig, args: Args, config, device: str = "meta") -> Estimate:
    """What train_grpo.py needs with these flags; `largest` is the largest micro-batch that fits args.memory_gib, 0 where none does.
    With micro_batch_size 0 the update's figures are those of the largest, or of one row."""
    kept, pools = {}, []
    no_autocast = patch("torch.is_autocast_enabled", lambda kind: False)  # it does not know of meta
    with Ledger(device) as ledger, no_autocast:
        keep = lambda name: kept.update({name: ledger.now - sum(kept.values())})  # noqa: E731
        model = decoder(shape, args, device)
        keep("base weights")
        parameters = adapt(model, args, config)
        kept["trained numbers"] = sum(p.nbytes for p in parameters)
        keep("frozen tensors of the adapter (U and V)")
        with torch.no_grad():
            sampler = Sampler(model)
            sampler.static = True
            sampler.refresh()
            keep("the sampler's weights, fused, and branches")
            roll_out(sampler, config, args.prompt_length, ledger, pools, not args.measure)
            caches = [d for whole, _ in sampler.sessions.values() for d in (whole, *whole.smaller.values())]
            kept["key-value cache"] = caches[0].cache.nbytes
            kept["key-value caches for fewer rows"] = sum(d.cache.nbytes for d in caches[1:])
            kept["captured graphs' memory"] = sum(pool.nbytes for pool in pools)
            keep("the rollout's other tensors")
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, foreach=True)  # CUDA's default
        learn(model, optimizer, config, 1, args.prompt_length, ledger)
        keep("AdamW's moments")
        with torch.no_grad():
            rollout = roll_out(sampler, config, args.prompt_length, ledger, None, not args.measure)
        peaks = {}

        def fits(size: int) -> bool:
            peaks[size] = learn(model, optimizer, config, size, args.prompt_length, ledger)
            return peaks[size][0] <= args.memory_gib * GIB

        low, high = 0, config.batch_size + 1  # low fits, high does not
        while high - low > 1:
            middle = min((low + high) // 2, max(2 * low, 1))
            low, high = (middle, high) if fits(middle) else (low, middle)
        size = config.micro_batch_size or max(low, 1)
        update, saved = learn(model, optimizer, config, size, args.prompt_length, ledger)
        now, hidden = ledger.mark(), model.embed_tokens.weight.new_zeros(size * config.max_new_tokens, shape.width)
        token_logprobs(hidden.requires_grad_(), model.head_weight, torch.zeros(len(hidden), dtype=torch.long, device=device))
        logits = ledger.peak - now - 2 * hidden.nbytes  # less what goes in, and the Jacobian that stays
    modules = sum(isinstance(module, LoRALinear) for module in model.modules())
    return Estimate(modules, sum(p.numel() for p in parameters), kept, rollout, update, saved, logits, low)


def take_steps(shape: ModelConfig, args: Args, config, device: str, mark, peak) -> tuple[int, int]:
    """(rollout's peak, update's) of the second of two steps, taken by the sampler and rl_grpo.update with random weights. No
    completion ends early. `mark()` forgets the peak, `peak()` reads it."""
    model = decoder(shape, args, device)
    optimizer = torch.optim.AdamW(adapt(model, args, config), lr=config.lr, foreach=True)
    sampler, generator = Sampler(model), torch.Generator().manual_seed(config.seed)
    sampler.static = True
    ids = torch.randint(shape.vocab_size, (config.batch_size // config.num_generations, args.prompt_length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::2, 0] = False  # prompts of different lengths
    for _ in range(2):
        mark()
        sampler.refresh()
        rollout = sampler(ids, mask, config.num_generations, config.max_new_tokens, (), 0, generator, config.law())
        rollout_peak = peak()
        mark()
        advantages = torch.randn(config.batch_size, generator=generator)
        update(model, optimizer, rollout, advantages, torch.zeros(config.batch_size, dtype=torch.bool), config)
        optimizer.zero_grad(set_to_none=True)
    return rollout_peak, peak()


# -------------------------------------------------------------------------------------------------------------- main


def shape_of(name: str) -> ModelConfig:
    """Of `tiny`, a local folder, a model whose config.json is kept in assets/shapes, or a Hub id, of which no weight is loaded."""
    known = ASSETS / "shapes" / f"{name.split('/')[-1]}.json"
    if name == "tiny" or Path(name).is_dir():
        known = resolve(name) / "config.json"
    elif not known.is_file():
        from huggingface_hub import hf_hub_download

        try:
            known = Path(hf_hub_download(name, "config.json"))
        except Exception as error:  # whatever the network or the Hub answers: say it in one line
            raise ValueError(f"model {name!r}: no local folder, no shape in assets/shapes, and the Hub did not serve it") from error
    return config_from_hf(read_json(known))


def report(found: Estimate, args: Args, config) -> str:
    size = config.micro_batch_size or max(found.largest, 1)
    lines = [
        f"{args.model}, {args.dtype}, --lora_config {args.lora_config}: {found.modules} adapted layers, {found.trained:,} trained numbers",
        f"{config.batch_size} completions of {config.max_new_tokens} tokens to prompts of {args.prompt_length}",
        "",
        "| held from step to step | GiB |",
        "|---|---|",
        *(f"| {name} | {size / GIB:.2f} |" for name, size in found.kept.items()),
        f"| together | {sum(found.kept.values()) / GIB:.2f} |",
        "",
        "| peak, what is held included | GiB |",
        "|---|---|",
        f"| rollout | {found.rollout / GIB:.2f} |",
        f"| update, micro-batch of {size} | {found.update / GIB:.2f} |",
        f"| of it kept for the backward pass | {found.saved / GIB:.2f} |",
        f"| of it a chunk of logits | {found.logits / GIB:.2f} |",
        "",
    ]
    if found.rollout > args.memory_gib * GIB:
        lines.append(f"the rollout does not fit {args.memory_gib:g} GiB: fewer completions or tokens, or another --lora_config")
    largest = f"--micro_batch_size {found.largest} is the largest whose update fits" if found.largest else "no update fits"
    return "\n".join([*lines, f"{largest} {args.memory_gib:g} GiB"])


def main(argv: list[str]) -> None:
    _, _, args, config = training.parse(argv, Args, "rl_grpo", partial(tyro.cli, use_underscores=True, description=__doc__))
    if args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown --dtype {args.dtype!r}; known: float32, bfloat16")
    if not args.memory_gib > 0 or args.prompt_length < 1:
        raise ValueError("--memory_gib and --prompt_length must be above 0")
    if args.measure and not torch.cuda.is_available():
        raise ValueError("--measure takes a step on CUDA, which torch does not have here")
    shape = shape_of(args.model)
    with as_on_cuda():
        found = estimate(shape, args, config)
    print(report(found, args, config))
    if args.measure:
        config.micro_batch_size = config.micro_batch_size or max(found.largest, 1)
        mark, peak = torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated
        measured = take_steps(shape, args, config, "cuda", mark, peak)
        for name, got, wanted in zip(("rollout", "update"), measured, (found.rollout, found.update)):
            print(f"measured, {name}: {got / GIB:.2f} GiB, {got / wanted:.3f} of the estimate")
        print(f"reserved by torch's allocator: {torch.cuda.max_memory_reserved() / GIB:.2f} GiB")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
