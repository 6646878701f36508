"""What bundles and routes cost in time: PPO's step with a LoRA, with as many parameters in bundles, and with every loss routed.

    python overhead.py                            # the embedded model; one JSON object a line, then the table
    python overhead.py --model FOLDER --kl_in reward

The steps are rl_ppo's own (`Trainer.step`), in turn, in one process; the input is bench.py's: prompts and completions of fixed
length, random rewards. Ratios are medians of the ratios of neighbours in time. Run nothing beside it.
"""

import statistics
import sys
from dataclasses import dataclass

import torch
import tyro

from adapters import attach, preset
from bench import dummy_env, emit, endless, make_prompts, timed_step
from data import load_tokenizer
from experiments import markdown
from model import check_device, load, read_json
from rl_ppo import Config, Trainer

ARMS = {  # --lora_config, --loss_routes
    "lora": ("r6f7", ""),
    "bundles": ("bundles", ""),
    "ssl_rl_separate": ("bundles", "ssl_rl_separate"),
}


@dataclass
class Args:
    model: str = "tiny"
    """tiny (the embedded model), a local Hugging Face folder, or a Hub id"""
    batch_size: int = 32
    """completions a step"""
    prompt_len: int = 16
    """tokens of every prompt"""
    max_new_tokens: int = 32
    """tokens of every completion: none ends early"""
    num_epochs: int = 2
    num_minibatches: int = 2
    kl_in: str = "loss"
    """loss: exact, a loss more to route; reward: k1"""
    entropy_coef: float = 0.01
    """0: a loss less"""
    repeats: int = 9
    """timed steps of each, after `warmup` untimed ones"""
    warmup: int = 2
    threads: int = 0
    """CPU threads; 0: torch's choice"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seed: int = 0


def build(args: Args, lora_config: str, routes: str) -> Trainer:
    config = Config(
        loss_routes=routes, kl_in=args.kl_in, entropy_coef=args.entropy_coef, batch_size=args.batch_size, lr=1e-5, value_lr=1e-5,
        num_epochs=args.num_epochs, num_minibatches=args.num_minibatches, max_new_tokens=args.max_new_tokens, seed=args.seed,
        target_kl=0, flow_every=0,
    )  # fmt: skip # a small lr: weights drift too little over the repeats to change what a step costs
    model, folder = load(args.model, device=args.device)
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json"))
    attach(model, preset(lora_config, dual=False), seed=args.seed)
    prompts = make_prompts(args, 4 * args.batch_size, tokenizer.vocab_size, tokenizer)
    return Trainer(model, dummy_env(prompts), endless(tokenizer), config)


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, args=argv, use_underscores=True, description=__doc__)
    if min(args.repeats, args.prompt_len) < 1 or args.warmup < 0:
        raise ValueError(f"--repeats {args.repeats} and --prompt_len {args.prompt_len} count from 1, --warmup from 0")
    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    trainers = {arm: build(args, *flags) for arm, flags in ARMS.items()}
    times = [{arm: timed_step(t, args.device) for arm, t in trainers.items()} for _ in range(args.warmup + args.repeats)]
    rows = []
    for arm, trainer in trainers.items():
        steps = [turn[arm] for turn in times[args.warmup :]]
        median = {f"{part}_s": statistics.median(step[part] for step in steps) for part in ("rollout", "update", "step")}
        pairs = [turn[arm]["step"] / turn["lora"]["step"] for turn in times[args.warmup :]]
        count = sum(p.numel() for group in trainer.model.adapter.groups.values() for p in group.values())
        emit(arm, parameters=count, backward_passes=len(trainer.config.weights()) if trainer.router else 1, **median,
             to_lora=statistics.median(pairs))  # fmt: skip
        rows.append([arm, f"{count:,}", *[f"{seconds:.3f}" for seconds in median.values()], f"{statistics.median(pairs):.2f}"])
    print("\n" + markdown(["arm", "parameters", "rollout s", "update s", "step s", "to lora"], rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
