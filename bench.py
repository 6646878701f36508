"""How fast a routed GRPO step is, and how much of the machine it uses; one JSON object a line.

    python bench.py                                     # the embedded model: GEMM rates, rollout, update, step, memory
    python bench.py --model some/folder --peer trl      # the same step beside TRL's, in turn, in one process
    python bench.py --random_config qwen3-4b --device cuda --dtype bfloat16     # a shape with random weights
    python bench.py --profile                           # the operators that one step spends its time in

The steps are rl_grpo's own (`Trainer.step`); what is made up is the input: prompts of exactly `prompt_len` random
tokens, completions that never stop, rewards from a seeded generator, about half of the samples flagged. docs/bench.md
explains each field. Run nothing beside it: a second busy process makes every figure here meaningless.
"""
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import tyro

from adapters import attach, branch_parameters, preset
from data import load_tokenizer
from envs import Scores
from model import Decoder, ModelConfig, load, product, projections, read_json
from rl_grpo import Config, Trainer

RANDOM_CONFIGS = {
    "qwen3-4b": ModelConfig(
        "qwen3", vocab_size=151936, width=2560, layers=36, heads=32, kv_heads=8, head_dim=128, ffn=9728, context=40960,
        norm_eps=1e-6, tied=True, rope_theta=1e6, rotary_dim=128, qk_norm=True,
    ),
    "qwen3-0.6b": ModelConfig(
        "qwen3", vocab_size=151936, width=1024, layers=28, heads=16, kv_heads=8, head_dim=128, ffn=3072, context=40960,
        norm_eps=1e-6, tied=True, rope_theta=1e6, rotary_dim=128, qk_norm=True,
    ),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Args:
    model: str = "tiny"
    """tiny (the embedded model), a local Hugging Face folder, or a Hub id"""
    random_config: str = ""
    """a named shape with random weights made on the device, in place of --model: qwen3-4b, qwen3-0.6b"""
    dtype: str = "float32"
    """of base weights and activations: float32 or bfloat16"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size: int = 32
    """completions a step"""
    num_generations: int = 16
    prompt_len: int = 8
    """tokens of every prompt"""
    max_new_tokens: int = 128
    """tokens of every completion: none ends early"""
    micro_batch_size: int = 0
    """as in rl_grpo.Config; 0: by tokens"""
    lora_config: str = "r8"
    routing: str = "dual"
    beta: float = 0.02
    """0: no reference pass"""
    repeats: int = 7
    """timed steps, after `warmup` untimed ones"""
    warmup: int = 2
    threads: int = 0
    """CPU threads; 0: torch's choice"""
    peer: str = ""
    """trl: alternate with TRL's GRPOTrainer, same model, batch, lengths and summed rank"""
    peer_bf16: bool = False
    """TRL under bfloat16 autocast (on a CPU plain float32 is faster)"""
    profile: bool = False
    """print the operators of one step, by their own time"""
    seed: int = 0


def emit(what: str, **values) -> None:
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"what": what} | rounded), flush=True)


# ------------------------------------------------------------------------------------------------ model, prompts, env


def random_model(name: str, device: str, dtype) -> Decoder:
    """A decoder of a named shape with N(0, .02) matrices, made on the device. Raises ValueError for an unknown name."""
    if name not in RANDOM_CONFIGS:
        raise ValueError(f"unknown --random_config {name!r}; known: {', '.join(RANDOM_CONFIGS)}")
    with torch.device("meta"):
        model = Decoder(RANDOM_CONFIGS[name])
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        p.normal_(0, 0.02, generator=generator) if p.dim() > 1 else p.fill_(1)
    return model


def make_prompts(args: Args, count: int, vocab: int, tokenizer=None) -> list[str]:
    """Distinct prompts of exactly prompt_len tokens: text with a tokenizer, else their ids spelled out."""
    generator, prompts = torch.Generator().manual_seed(args.seed), []
    for _ in range(1000 * count):
        ids = torch.randint(vocab, (args.prompt_len,), generator=generator).tolist()
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
        if tokenizer:  # random ids rarely survive a round trip: cut what the text encodes to, and see whether that does
            text = tokenizer.decode(tokenizer.encode(text)[: args.prompt_len])
        if text.strip() and (tokenizer is None or len(tokenizer.encode(text)) == args.prompt_len):
            prompts.append(text)
        if len(prompts) == count:
            return prompts
    raise ValueError(f"--prompt_len {args.prompt_len}: found {len(prompts)} of {count} such prompts: try another")


def endless(tokenizer=None):
    """What rl_grpo asks of a tokenizer, with a stop token that no model has."""
    encode = tokenizer.encode if tokenizer else lambda text: [int(word) for word in text.split()]
    decode = tokenizer.decode_completions if tokenizer else lambda prompts, completions: [""] * len(completions)
    pad = tokenizer.pad_id if tokenizer else 0
    return SimpleNamespace(encode_prompt=encode, decode_completions=decode, pad_id=pad, stop_ids=(-1,))


def dummy_env(prompts: list[str]):
    """An environment that rewards and flags (about half of the samples) at random."""

    def score(prompts, completions, generator, recall=None) -> Scores:
        n = len(completions)
        reward, is_rh = torch.rand(n, generator=generator), torch.rand(n, generator=generator) < 0.5
        return Scores(reward, reward, is_rh, torch.zeros(n), is_rh, torch.ones(n, dtype=torch.bool), is_rh, {})

    return SimpleNamespace(prompts=lambda split: prompts, score=score, reward=SimpleNamespace(name="random"))


def build(args: Args):
    """(trainer, tokenizer or None, prompts, folder or None): rl_grpo's own Trainer on made-up input."""
    if args.dtype not in DTYPES:
        raise ValueError(f"unknown --dtype {args.dtype!r}; known: {', '.join(DTYPES)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no CUDA device here; use --device cpu")
    if args.peer not in ("", "trl"):
        raise ValueError(f"unknown --peer {args.peer!r}; known: trl")
    if args.peer and args.random_config:
        raise ValueError("--peer trl loads a model folder: give --model, not --random_config")
    if min(args.repeats, args.prompt_len) < 1 or args.warmup < 0:
        raise ValueError(f"--repeats {args.repeats} and --prompt_len {args.prompt_len} count from 1, --warmup from 0")
    config = Config(
        routing=args.routing, beta=args.beta, lr=1e-5, batch_size=args.batch_size, num_generations=args.num_generations,
        micro_batch_size=args.micro_batch_size, max_new_tokens=args.max_new_tokens, seed=args.seed,
    )  # fmt: skip # a small lr: weights drift too little over the repeats to change what a step costs
    spec = preset(args.lora_config, dual=args.routing == "dual")
    tokenizer = folder = None
    if args.random_config:
        model = random_model(args.random_config, args.device, DTYPES[args.dtype])
    else:
        model, folder = load(args.model, dtype=DTYPES[args.dtype], device=args.device)
        tokenizer = load_tokenizer(folder, read_json(folder / "config.json"))
    attach(model, spec, seed=args.seed)
    vocab = tokenizer.vocab_size if tokenizer else model.config.vocab_size
    prompts = make_prompts(args, 4 * args.batch_size // args.num_generations, vocab, tokenizer)
    return Trainer(model, dummy_env(prompts), endless(tokenizer), config), tokenizer, prompts, folder


# ------------------------------------------------------------------------------------------------ the machine's rates


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gemm_rate(shapes: list[tuple[int, int, int]], dtype, device: str, seconds: float = 0.3) -> float:
    """FLOP/s of the products (n, k) x (k, m), done one after another; shapes (n, k, m). The best of five rounds."""
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    pairs = [(draw(n, k), draw(m, k)) for n, k, m in shapes]
    flops, best, spent, rounds = sum(2 * n * k * m for n, k, m in shapes), float("inf"), 0.0, 0
    while spent < seconds or rounds < 5:
        synchronize(device)
        start = time.perf_counter()
        for x, w in pairs:
            product(x, w)
        synchronize(device)
        took = time.perf_counter() - start
        best, spent, rounds = min(best, took), spent + took, rounds + 1
    return flops / best


def layer_shapes(config: ModelConfig, rows: int, head_rows: int, fused: bool) -> list[tuple[int, int, int]]:
    """The products (n, k, m) of one layer on `rows` tokens, and one layer's share of the head's."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    one = len(projections(config)["qkv"]) == 1 or fused
    shapes = [(rows, config.width, q + 2 * kv)] if one else [(rows, config.width, q)] + [(rows, config.width, kv)] * 2
    ups = 2 if config.gated_mlp else 1
    shapes += [(rows, config.width, ups * config.ffn)] if fused else [(rows, config.width, config.ffn)] * ups
    shapes += [(rows, q, config.width), (rows, config.ffn, config.width)]
    return shapes + [(max(1, head_rows // config.layers), config.width, config.vocab_size)]


def matmul_parameters(model: Decoder) -> tuple[int, int]:
    """Parameters that every token meets (the base's matrices), and the head's, which only scored tokens meet."""
    adapted = {id(p) for group in branch_parameters(model).values() for p in group.values()}
    if model.adapter.spec.kind == "full":
        adapted = set()
    body = sum(p.numel() for p in model.layers.parameters() if p.dim() > 1 and id(p) not in adapted)
    return body, model.head_weight.numel()


def step_flops(model: Decoder, args: Args) -> dict[str, float]:
    """Model FLOPs of a step: 2 * parameters * tokens a pass; adapters, attention's own products and norms not counted.

    Rollout: each prompt once, then every completion token. Scoring passes (reference, forward, backward to the inputs;
    under full fine-tuning also backward to the weights) go over prompt and completion of every row. The head sees
    completion tokens alone.
    """
    body, head = matmul_parameters(model)
    new = args.batch_size * args.max_new_tokens
    rollout = 2 * body * (new + args.batch_size // args.num_generations * args.prompt_len) + 2 * head * new
    scoring = 2 * body * (new + args.batch_size * args.prompt_len) + 2 * head * new
    passes = 2 + (args.beta > 0) + (model.adapter.spec.kind == "full")
    return {"rollout": float(rollout), "update": float(passes * scoring), "step": float(rollout + passes * scoring)}


# -------------------------------------------------------------------------------------------------------- what is timed


def report_machine(args: Args, config: ModelConfig) -> dict[str, float]:
    """Prints the machine and its GEMM rates; returns the rates of this run's dtype by name, FLOP/s."""
    cuda = args.device.startswith("cuda")
    emit(
        "machine", torch=torch.__version__, device=torch.cuda.get_device_name() if cuda else "cpu",
        cores=os.cpu_count(), threads=torch.get_num_threads(), load_1min=os.getloadavg()[0],
    )  # fmt: skip
    side = 8192 if cuda else 1024
    scored = args.batch_size * (args.prompt_len + args.max_new_tokens)
    sizes = {
        "square": [(side, side, side)],
        "update": layer_shapes(config, scored, args.batch_size * args.max_new_tokens, fused=False),
        "rollout": layer_shapes(config, args.batch_size, args.batch_size, fused=True),
    }
    found = {}
    for name, dtype in DTYPES.items():
        rates = {size: gemm_rate(shapes, dtype, args.device) for size, shapes in sizes.items()}
        emit("gemm", dtype=name, **{f"{size}_gflops": rate / 1e9 for size, rate in rates.items()}, square_side=side)
        if name == args.dtype:
            found = rates
    return found


def timed_step(trainer: Trainer, device: str) -> dict[str, float]:
    """One step of rl_grpo: seconds of the whole, and of its parts as the trainer itself clocks them."""
    synchronize(device)
    start = time.perf_counter()
    metrics, _ = trainer.step()
    synchronize(device)
    names = {"rollout": "time/rollout", "score": "time/score", "update": "time/update"}
    return {"step": time.perf_counter() - start} | {ours: metrics[theirs] for ours, theirs in names.items()}


def peak_memory(device: str) -> dict[str, float]:
    if device.startswith("cuda"):
        return {
            "cuda_allocated_mb": torch.cuda.max_memory_allocated() / 2**20,
            "cuda_reserved_mb": torch.cuda.max_memory_reserved() / 2**20,
        }
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {"max_rss_mb": kilobytes / 1024}


def report_steps(times: list[dict[str, float]], trainer: Trainer, args: Args, rates: dict[str, float]) -> None:
    """Medians and minima of the timed steps, and the share of the machine's GEMM rate that they reach."""
    median = {name: statistics.median(t[name] for t in times) for name in times[0]}
    tokens, flops = args.batch_size * args.max_new_tokens, step_flops(trainer.model, args)
    for label, part in (("rollout", "rollout"), ("reference+update", "update")):
        emit(
            label, median_s=median[part], min_s=min(t[part] for t in times), tokens_per_s=tokens / median[part],
            gflops=flops[part] / median[part] / 1e9,
        )  # fmt: skip
    floor = flops["rollout"] / rates["rollout"] + flops["update"] / rates["update"]
    emit(
        "step", repeats=len(times), median_s=median["step"], min_s=min(t["step"] for t in times),
        max_s=max(t["step"] for t in times), tokens=tokens, tokens_per_s=tokens / median["step"],
        model_gflop=flops["step"] / 1e9, gflops=flops["step"] / median["step"] / 1e9,
        share_of_square=flops["step"] / median["step"] / rates["square"], floor_s=floor,
        share_of_floor=floor / median["step"],
    )  # fmt: skip


def report_profile(trainer: Trainer, device: str, rows: int = 20) -> None:
    """The operators of one step by their own time, one line each."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    cuda = device.startswith("cuda")
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        trainer.step()
        synchronize(device)
    own = (lambda e: e.self_device_time_total) if cuda else (lambda e: e.self_cpu_time_total)
    events = sorted(profiler.key_averages(), key=own, reverse=True)
    total = sum(map(own, events))
    for event in events[:rows]:
        emit("op", name=event.key, self_ms=own(event) / 1e3, share=own(event) / max(total, 1e-9), calls=event.count)


# -------------------------------------------------------------------------------------------------------------- a peer


def run_with_trl(args: Args, trainer: Trainer, tokenizer, prompts: list[str], folder):
    """Alternates our steps with TRL's and prints TRL's; returns the times of ours, and the median of TRL's in seconds.

    TRL's step runs from on_step_begin to on_step_end (generation, reference, loss, optimizer; fetching the batch is not
    counted); ours runs inside on_step_end. TRL has one PEFT LoRA of the summed rank on the same layers, transformers'
    generation (min_new_tokens keeps completions from ending), no logging and no saving.
    """
    try:
        import datasets
        import transformers
        from peft import LoraConfig
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise ValueError(f"--peer trl needs trl, peft and transformers (requirements-dev.txt): {error}") from error
    spec, names = trainer.model.adapter.spec, projections(trainer.model.config)
    if spec.kind != "lora" or spec.stride != 1:
        raise ValueError(f"--peer trl compares LoRA on every layer; --lora_config {args.lora_config} is something else")
    rank, cpu = sum(branch.rank for branch in spec.branches), not args.device.startswith("cuda")
    targets = sorted({*names["qkv"], names["out"], *names["up"], names["down"]})
    eos, pad = (tokenizer.backend.id_to_token(i) for i in (tokenizer.eos_id, tokenizer.pad_id))
    processing = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), padding_side="left", eos_token=eos, pad_token=pad
    )
    generator, ours, theirs, lengths = torch.Generator().manual_seed(args.seed), [], [], []

    def reward(completion_ids, **_):
        lengths.extend(len(ids) for ids in completion_ids)
        return torch.rand(len(completion_ids), generator=generator).tolist()

    class Alternate(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            synchronize(args.device)
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronize(args.device)
            theirs.append(time.perf_counter() - self.start)
            ours.append(timed_step(trainer, args.device))

    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=args.batch_size, num_generations=args.num_generations,
            gradient_accumulation_steps=1, max_completion_length=args.max_new_tokens, loss_type="grpo",
            max_steps=args.warmup + args.repeats, beta=args.beta, learning_rate=1e-5, temperature=1.0, use_vllm=False,
            bf16=args.peer_bf16, activation_checkpointing=False, use_cpu=cpu, report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True, seed=args.seed,
            generation_kwargs={"min_new_tokens": args.max_new_tokens},
            model_init_kwargs={"dtype": "bfloat16" if args.peer_bf16 else "float32"},
        )  # fmt: skip
        peer = GRPOTrainer(
            model=str(folder), reward_funcs=reward, args=config, processing_class=processing,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts * (args.warmup + args.repeats)}),
            peft_config=LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM"),
            callbacks=[Alternate()],
        )  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):  # its summary is no JSON line
            peer.train()
    if set(lengths) != {args.max_new_tokens}:
        raise ValueError(f"TRL's completions have {min(lengths)} to {max(lengths)} tokens, not {args.max_new_tokens}")
    theirs, ours = theirs[args.warmup :], ours[args.warmup :]
    tokens = args.batch_size * args.max_new_tokens
    emit(
        "trl", repeats=len(theirs), median_s=statistics.median(theirs), min_s=min(theirs), max_s=max(theirs),
        tokens_per_s=tokens / statistics.median(theirs), lora_rank=rank, bf16_autocast=config.bf16,
        dtype="bfloat16" if args.peer_bf16 else "float32",
    )  # fmt: skip
    return ours, statistics.median(theirs)


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, args=argv, use_underscores=True, description=__doc__)
    if args.threads:
        torch.set_num_threads(args.threads)
    trainer, tokenizer, prompts, folder = build(args)
    model = trainer.model
    rates = report_machine(args, model.config)
    body, head = matmul_parameters(model)
    emit(
        "setting", model=args.random_config or args.model, family=model.config.family, parameters_body=body,
        parameters_head=head, dtype=args.dtype, batch_size=args.batch_size, num_generations=args.num_generations,
        prompt_len=args.prompt_len, max_new_tokens=args.max_new_tokens, lora_config=args.lora_config,
        routing=args.routing, beta=args.beta,
    )  # fmt: skip
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()  # the GEMM rates' own matrices are not the step's
    if args.peer:
        times, peer_s = run_with_trl(args, trainer, tokenizer, prompts, folder)
    else:
        times = [timed_step(trainer, args.device) for _ in range(args.warmup + args.repeats)][args.warmup :]
    report_steps(times, trainer, args, rates)
    emit("memory", **peak_memory(args.device), with_peer=bool(args.peer))
    if args.profile:
        report_profile(trainer, args.device)
    if args.peer:
        ours_s = statistics.median(t["step"] for t in times)
        ratio = {"ratio_per_token": peer_s / ours_s, "trl_s": peer_s, "ours_s": ours_s}
        print(json.dumps({name: round(value, 5) for name, value in ratio.items()}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
