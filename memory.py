"""What a run of train_grpo.py needs of a GPU's memory, part by part, before there is a GPU or a weight.

    python memory.py --config configs/code_full.yaml                       # any flag of train_grpo.py may follow
    python memory.py --config configs/code_full.yaml --lora_config ds32 --memory_gib 96
    python memory.py --config configs/code_full.yaml --measure             # beside two real steps, of random weights, on CUDA

Nothing is computed by formula: decoder, adapter, sampler, loss and optimizer run as they are on the meta device, and a `Ledger`
hears of every storage that is made and freed. All completions have full length.

Left out: CUDA's context and the libraries' workspaces (about 1 GiB), what the allocator loses between blocks, a basis' axes.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import tyro

import train_grpo
import training
from adapters import LoRALinear, attach, branch_parameters, dropping, reference, spec_of
from ledger import Ledger, as_on_cuda
from losses import token_logprobs
from model import ASSETS, Decoder, ModelConfig, config_from_hf, read_json, resolve
from rl_grpo import grpo_loss, update
from sampling import Sampler
from verdict import score_tokens

GIB = 2**30
EVALUATED = 32  # completions scored at once


@dataclass
class Args(train_grpo.Args):
    memory_gib: float = 80.0
    """of the GPU; the largest micro-batch that fits into it is looked for"""
    prompt_length: int = 1281
    """tokens of the longest prompt (1,281: LeetCode's medium and hard problems as Qwen3 reads them)"""
    measure: bool = False
    """take two steps on CUDA with random weights and singular vectors, and report what the second took"""


def no_decomposition(weight, rank: int):
    """svd.singular_vectors by shape alone; where there are numbers, random ones of the right size."""
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
        attach(model, spec_of(vars(args), config.dual), seed=config.seed)
    return [p for group in branch_parameters(model).values() for p in group.values()]


def prefill(sampler: Sampler, rows: int, copies: int, args: Args, config):
    """The first half of Sampler._sample: (decoding, its output) after the first token of `rows` completions."""
    law, steps, device = config.law(), config.max_new_tokens, sampler.model.device
    decoding, out = sampler._session((rows, steps, law, (0,), 0), args.prompt_length)
    ids = torch.zeros(rows // copies, decoding.slots - steps, dtype=torch.long, device=device)
    sampler._prefill(decoding, out, ids, torch.ones_like(ids, dtype=torch.bool), copies, law, ids[0, :1], 0)
    return decoding, out


def captured(sampler: Sampler, decoding, out, config, ledger: Ledger):
    """What each captured graph keeps for its intermediates: of all rows, and of fewer as they finish."""
    whole, stop = decoding, torch.zeros(1, dtype=torch.long, device=sampler.model.device)
    while True:
        ledger.mark()
        sampler._step(decoding, out, config.law(), stop, 0)
        yield torch.empty(ledger.peak - ledger.now, dtype=torch.uint8, device=stop.device)
        if (size := len(decoding.token)) < 32:
            return
        decoding = sampler._shrink(decoding, torch.arange(size // 2, device=stop.device), out.width, whole)


def score(model, size: int, args: Args, config):
    """rl_grpo.score_rows on `size` rows of full length, prompts of different ones: log-probabilities (n,)."""
    new, total = config.max_new_tokens, args.prompt_length + config.max_new_tokens
    ids = torch.zeros(size, total, dtype=torch.long, device=model.device)
    mask = torch.ones(size, total - 1, dtype=torch.bool, device=model.device) if size > 1 else None
    rows, columns = torch.zeros(2, size * new, dtype=torch.long, device=model.device)  # of what is valid: all
    hidden = model.hidden(ids[:, :-1], mask)[:, args.prompt_length - 1 :][rows, columns]
    return token_logprobs(hidden, model.head_weight, ids[:, args.prompt_length :][rows, columns], config.temperature)


def learn(model, optimizer, size: int, args: Args, config, ledger: Ledger) -> tuple[int, int]:
    """rl_grpo.update on one micro-batch of `size` rows: (its peak, what forward keeps for backward)."""
    ledger.mark()
    old, ref, before = torch.zeros(size * config.max_new_tokens, device=model.device), None, ledger.now
    if config.beta:
        with torch.no_grad(), reference(model) as base:
            ref = score(base, size, args, config)
    with dropping(model, 0):
        logprobs = score(model, size, args, config)
    saved = ledger.now - before
    grpo_loss(logprobs, old, ref, old, old, config.beta, config.epsilon, config.epsilon_high or config.epsilon)[0].backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return ledger.peak, saved


# ------------------------------------------------------------------------------------------------- all of it, twice


class Estimate(NamedTuple):
    """All in bytes but modules and trained (counts) and largest (rows)."""

    modules: int
    trained: int
    kept: dict[str, int]  # from the second step on, by part
    peaks: dict[str, int]
    largest: int  # micro-batch whose update fits; 0: none does


def estimate(shape: ModelConfig, args: Args, config, device: str = "meta") -> Estimate:
    """What a run of these flags takes from its second step on. With micro_batch_size 0 the update is that of the largest
    micro-batch that fits args.memory_gib, or of one row."""
    kept, peaks = {}, {}
    with Ledger(device) as ledger, patch("torch.is_autocast_enabled", lambda kind: False):  # which does not know of meta
        keep = lambda name: kept.update({name: ledger.now - sum(kept.values())})  # noqa: E731
        model = decoder(shape, args, device)
        keep("base weights")
        parameters = adapt(model, args, config)
        kept["trained numbers"] = sum(p.nbytes for p in parameters)
        keep("frozen tensors of the adapter (U and V)")
        with torch.no_grad():
            sampler = Sampler(model, config.rollout_size)
            sampler.static = True
            sampler.refresh()
            keep("the sampler's weights, fused, and branches")
            prompts, copies = config.batch_size // config.num_generations, config.num_generations
            sizes = dict.fromkeys((n, copies) for n in sampler.parts(prompts, copies))
            sizes |= dict.fromkeys((n, 1) for n in sampler.parts(args.eval_prompts, 1))
            graphs = [g for size in sizes for g in captured(sampler, *prefill(sampler, *size, args, config), config, ledger)]
            kept["key-value caches"] = sum(d.cache.nbytes for d, _ in sampler.sessions.values())
            kept["captured graphs' memory"] = sum(graph.nbytes for graph in graphs)
            keep("the rollout's other tensors")
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, foreach=True)  # CUDA's default
        learn(model, optimizer, 1, args, config, ledger)
        keep("AdamW's moments")
        with torch.no_grad():  # now with all of that in place
            for name, groups in (("rollout", copies), ("evaluation", 1)):
                ledger.mark()
                sampler.refresh()
                for size in [size for size in sizes if size[1] == groups]:
                    prefill(sampler, *size, args, config)
                peaks[name] = ledger.peak
            score(model, min(EVALUATED, args.eval_prompts), args, config)
            peaks["evaluation"] = ledger.peak
        low, high = 0, config.batch_size + 1  # low fits, high does not
        while high - low > 1:
            middle = min((low + high) // 2, max(2 * low, 1))
            fits = learn(model, optimizer, middle, args, config, ledger)[0] <= args.memory_gib * GIB
            low, high = (middle, high) if fits else (low, middle)
        size = config.micro_batch_size or max(low, 1)
        peaks["update"], peaks["... of which forward keeps for backward"] = learn(model, optimizer, size, args, config, ledger)
        hidden = model.head_weight.new_zeros(size * config.max_new_tokens, shape.width)
        ledger.mark()
        with torch.no_grad():
            token_logprobs(hidden, model.head_weight, torch.zeros(len(hidden), dtype=torch.long, device=device))
        peaks["... of which a chunk of logits"] = ledger.peak - ledger.now
    modules = sum(isinstance(module, LoRALinear) for module in model.modules())
    return Estimate(modules, sum(p.numel() for p in parameters), kept, peaks, low)


def take_steps(shape: ModelConfig, args: Args, config, device: str, mark, peak) -> dict[str, int]:
    """Peaks of the second of two steps, taken by the sampler and rl_grpo.update with random weights; no completion ends early.
    `mark()` forgets the peak, `peak()` reads it."""
    model = decoder(shape, args, device)
    optimizer = torch.optim.AdamW(adapt(model, args, config), lr=config.lr)
    sampler, generator, peaks = Sampler(model, config.rollout_size), torch.Generator().manual_seed(config.seed), {}
    sampler.static = True  # as it is on CUDA

    def roll_out(prompts: int, copies: int):
        ids = torch.randint(shape.vocab_size, (prompts, args.prompt_length), generator=generator)
        real = torch.ones_like(ids, dtype=torch.bool)
        real[::2, 0] = False  # prompts of different lengths
        mark()
        sampler.refresh()
        return sampler(ids, real, copies, config.max_new_tokens, (), 0, generator, config.law())

    for _ in range(2):
        rollout = roll_out(args.eval_prompts, 1)
        with reference(model) as base:
            score_tokens(base, rollout, config.temperature, EVALUATED)
        peaks["evaluation"] = peak()
        rollout = roll_out(config.batch_size // config.num_generations, config.num_generations)
        peaks["rollout"] = peak()
        mark()
        advantages = torch.randn(config.batch_size, generator=generator)
        update(model, optimizer, rollout, advantages, torch.zeros(config.batch_size, dtype=torch.bool), config)
        peaks["update"] = peak()
        optimizer.zero_grad(set_to_none=True)
    return peaks


# -------------------------------------------------------------------------------------------------------------- main


def shape_of(name: str) -> ModelConfig:
    """Of `tiny`, a folder, a name in assets/shapes (the part behind the owner's), or a Hub id. No weight is loaded."""
    path = ASSETS / "shapes" / f"{name.split('/')[-1]}.json"
    if name in ("tiny", "random") or Path(name).is_dir():
        path = resolve(name) / "config.json"
    elif not path.is_file():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(name, "config.json"))
        except Exception as error:  # whatever the network or the Hub answers: say it in one line
            raise ValueError(f"model {name!r}: no local folder, none of assets/shapes, and the Hub did not serve it") from error
    return config_from_hf(read_json(path))


def report(found: Estimate, args: Args, config) -> str:
    size, together, limit = config.micro_batch_size or max(found.largest, 1), sum(found.kept.values()), args.memory_gib * GIB
    table = lambda rows: "".join(f"| {name} | {size / GIB:.2f} |\n" for name, size in rows.items())  # noqa: E731
    over = [name for name in ("rollout", "evaluation") if found.peaks[name] > limit]
    verdict = [f"{name} does not fit {args.memory_gib:g} GiB: lower --rollout_size, or another --lora_config\n" for name in over]
    largest = f"the largest micro-batch whose update fits {args.memory_gib:g} GiB: {found.largest or 'none'}"
    return (
        f"{args.model}, {args.dtype}, {args.lora_config}: {found.modules} modules, {found.trained:,} numbers trained\n"
        f"prompts of {args.prompt_length} and completions of {config.max_new_tokens} tokens; micro-batches of {size}\n\n"
        f"| held from step to step | GiB |\n|---|---|\n{table(found.kept | {'together': together})}\n"
        f"| peak, with what is held | GiB |\n|---|---|\n{table(found.peaks)}\n{''.join(verdict)}{largest}"
    )


def parse(argv: list[str]):
    """(args, config) of train_grpo.py's flags and our own. Raises ValueError for values that can't be."""
    _, _, args, config = training.parse(argv, Args, "rl_grpo", partial(tyro.cli, use_underscores=True, description=__doc__))
    if args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown --dtype {args.dtype!r}; known: float32, bfloat16")
    if not args.memory_gib > 0 or args.prompt_length < 1:
        raise ValueError("--memory_gib and --prompt_length must be above 0")
    if args.measure and not torch.cuda.is_available():
        raise ValueError("--measure takes steps on CUDA, which torch does not have here: leave it out")
    return args, config


def main(argv: list[str]) -> None:
    args, config = parse(argv)
    shape = shape_of(args.model)
    with as_on_cuda():
        found = estimate(shape, args, config)
    print(report(found, args, config))
    if args.measure:
        config.micro_batch_size = config.micro_batch_size or max(found.largest, 1)
        mark, peak = torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated
        for name, size in take_steps(shape, args, config, "cuda", mark, peak).items():
            print(f"measured, {name}: {size / GIB:.2f} GiB, {size / found.peaks[name]:.3f} of the estimate")
        print(f"torch's allocator reserved {torch.cuda.max_memory_reserved() / GIB:.2f} GiB")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
