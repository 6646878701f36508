"""Makes the embedded model from nothing: text, tokenizer, model, loop (next-token loss, AdamW, cosine schedule).

    python train_tiny.py --output_dir output/tiny && python card.py --model output/tiny

Documents of corpus.py are joined as <s> text </s> and cut into blocks; nothing is seen twice unless there are fewer blocks than
steps ask for. To go on from a model, with or without routing: train_sft.py.
"""
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import corpus
import model as decoder
from checkpoints import atomic_write
from model import check_device
from runs import to_yaml

RESULT = "training.json"  # in its folder a run is finished
SPECIAL = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}


@dataclass
class Args:
    output_dir: str = "output/tiny"
    """where the Hugging Face folder is written"""
    documents: int = 1_000_000
    """documents to generate"""
    vocab_size: int = 2048
    """of the tokenizer"""
    width: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 512
    context: int = 512
    steps: int = 3000
    batch_size: int = 64
    """blocks a step"""
    block: int = 256
    """tokens a block"""
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    """processes that generate and tokenise text"""


# ------------------------------------------------------------------------------------------------------------- text


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with <s>, </s>, <pad> as ids 0, 1, 2; it adds no special token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_part(job) -> np.ndarray:
    """One worker's share of the embedded world as a stream of ids (generation and tokenising are most of the time)."""
    tokenizer_json, n, seed = job
    tokenizer = Tokenizer.from_str(tokenizer_json)
    texts = [d.prompt + d.completion for d in corpus.training_text(n, seed)]
    return join(tokenizer.encode_batch(texts, add_special_tokens=False), 0, 1)


def join(encodings, bos: int, eos: int) -> np.ndarray:
    return np.concatenate([np.array([bos, *e.ids, eos], dtype=np.uint16) for e in encodings])


def world_tokens(args: Args, tokenizer: Tokenizer) -> np.ndarray:
    part = 20_000
    seeds = range(math.ceil(args.documents / part))
    jobs = [(tokenizer.to_str(), min(part, args.documents - s * part), args.seed * 10_000 + s) for s in seeds]
    with Pool(args.workers) as pool:
        return np.concatenate(list(tqdm(pool.imap(encode_part, jobs), total=len(jobs), desc="text", smoothing=0)))


# ------------------------------------------------------------------------------------------------------------- loop


def loss_of(model, blocks) -> torch.Tensor:
    """Mean next-token loss of blocks (B, T + 1)."""
    logits = model(blocks[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), blocks[:, 1:].flatten())


def train(model, stream: np.ndarray, args: Args) -> float:
    """Trains in place; returns the mean loss of the last 50 steps. Raises ValueError when a loss is not finite."""
    length = args.block + 1
    blocks = torch.from_numpy(stream[: len(stream) // length * length].astype(np.int64)).view(-1, length)
    if len(blocks) < args.batch_size:
        raise ValueError(f"{len(blocks)} blocks of {args.block} tokens are less than one batch of {args.batch_size}: more text")
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=args.device != "cpu")
    on_gpu = args.device.startswith("cuda")
    compiled = torch.compile(model) if on_gpu else model
    generator = torch.Generator().manual_seed(args.seed)
    recent, order = [], torch.empty(0, dtype=torch.long)
    bar = tqdm(range(args.steps), desc="tiny", smoothing=0.05)
    for step in bar:
        if len(order) < args.batch_size:
            order = torch.randperm(len(blocks), generator=generator)
        batch, order = blocks[order[: args.batch_size]].to(args.device), order[args.batch_size :]
        rate = min((step + 1) / args.warmup, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        with torch.autocast("cuda" if on_gpu else "cpu", torch.bfloat16):
            loss = loss_of(compiled, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 9 or step == args.steps - 1:
            recent = [*recent[-4:], loss.item()]
            if not math.isfinite(recent[-1]):
                raise ValueError(f"the loss is {recent[-1]} at step {step}: lower --lr {args.lr}")
            bar.set_postfix(loss=f"{np.mean(recent):.3f}", lr=f"{args.lr * rate:.1e}")
    return float(np.mean(recent))


def check(args: Args) -> None:
    """What flags can get wrong, before anything is loaded."""
    for name in ("steps", "batch_size", "block", "warmup", "documents"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    check_device(args.device)


def resolve(argv: list[str]) -> tuple[Path, dict]:
    """(folder, resolved config) of a command line, every flag checked, nothing loaded: a sweep asks before it starts."""
    args = tyro.cli(Args, args=argv, description=__doc__.splitlines()[0], use_underscores=True)
    check(args)
    return Path(args.output_dir), asdict(args)


def main(args: Args) -> None:
    check(args)
    if Path(args.output_dir, "model.safetensors").exists():
        raise ValueError(f"{args.output_dir} holds a model already: delete it, or choose another --output_dir")
    torch.manual_seed(args.seed)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "config.yaml", to_yaml(asdict(args)))
    start = time.time()
    sample = (d.prompt + d.completion for d in corpus.training_text(60_000, args.seed * 10_000 + 9_999))
    tokenizer = train_tokenizer(sample, args.vocab_size)
    stream = world_tokens(args, tokenizer)
    config = decoder.ModelConfig(
        "llama", args.vocab_size, args.width, args.layers, args.heads, args.kv_heads, args.width // args.heads,
        args.ffn, args.context, rotary_dim=args.width // args.heads,
    )  # fmt: skip
    model = decoder.Decoder(config).to(args.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(stream):,} tokens, {count:,} parameters, "
          f"{args.steps} steps of {args.batch_size} x {args.block} on {args.device}")
    final = train(model, stream, args)
    model = model.float().cpu().requires_grad_(False)
    special = {name: tokenizer.token_to_id(token) for name, token in SPECIAL.items()}
    decoder.save(model, out, hf_extra=special)
    tokenizer.save(str(out / "tokenizer.json"))
    wall_s = round(time.time() - start)
    figures = {"loss": final, "tokens": int(len(stream)), "parameters": count, "wall_s": wall_s, "args": vars(args)}
    atomic_write(out / RESULT, json.dumps(figures, indent=1) + "\n")
    print(f"wrote {out}: training loss {final:.4f} nats a token, {figures['wall_s']} s")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.splitlines()[0], use_underscores=True))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
