"""PPO with residual bundles from the command line: what does the reward cost in perplexity, and does routing lower the price?

    python train_ppo.py --loss_routes ssl_rl_separate --beta 0                # the embedded dialogues; no KL at all
    python train_ppo.py --beta 0.1                                            # the same bundles, every loss trains all
    python train_ppo.py --lora_config r6f7 --reward output/MY_REWARD_MODEL    # one LoRA, a reward model of train_reward.py
    python train_ppo.py --model PATH --dataset Anthropic/hh-rlhf --base_text Salesforce/wikitext:wikitext-2-raw-v1
    python train_ppo.py --rewards manners,brief --bundle_per_reward --loss_routes ssl_rl_separate --beta 0
    python train_ppo.py --env stories --reward sentence_length_6_smooth_plus_happy --lora_config r16 --routing dual --ssl_steps 0
    python train_ppo.py --env sentiment                                       # one of the methods of configs/estimators.yaml

Flags are the fields of `Args` below, of isolation.Flags, and of the algorithm's `Config` (rl_ppo.py); with --env sentiment those
of estimators.Flags in place of the first two, and estimators.PRESET's defaults: phases, files and flags are then those of
train_reinforce.py and train_gumbel.py (--env sentiment --help).
"""

import contextlib
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
import yaml

import estimators
import isolation
import runs
import sequence
import training
from envs import Labelling
from reward_specs import objectives


@dataclass
class Args(isolation.Flags):
    rewards: str = ""
    """several objectives, comma-separated, in place of --reward: in this order each pays an equal share of --max_steps"""
    bundle_per_reward: bool = False
    """each of them trains a policy bundle of its own: --loss_routes ssl_rl_separate, or another that sets b_rl_policy apart"""
    rh_eligible_frac: float = 1.0
    """share of completions whose hack is paid and may be flagged; the others get the reward without its hack component"""
    routing_frac: float = 1.0
    """detector recall: share of detected completions that are labelled"""
    false_positive_frac: float = 0.0
    """share of undetected completions that are labelled all the same"""


    def __post_init__(self):
        if not self.rewards:
            super().__post_init__()


RESULT = "verdict.json"  # in its folder a run is finished
EVALUATE = "eval_run.py"  # judges finished runs
CLI = partial(tyro.cli, use_underscores=True, description=__doc__)


def env_of(argv: list[str]) -> str:
    """--env, or what the --config file says of it: it decides which other flags there are. Wrong files are `parse`'s to name."""
    file, said = Path(training.early(argv, "config")), None
    if file.is_file():
        with contextlib.suppress(yaml.YAMLError):
            said = yaml.safe_load(file.read_text())
    return training.early(argv, "env", said.get("env", "") if isinstance(said, dict) else "")


def parse(argv: list[str]):
    """(algorithm's name, its module, args, config)."""
    name, algorithm, args, config = training.parse(argv, Args, "rl_ppo", CLI)
    if not hasattr(config, "loss_routes"):
        raise ValueError(f"--algorithm {name} has no loss_routes: copy rl_ppo.py to start one")
    return name, algorithm, args, config


def labelling(args: Args) -> Labelling:
    return Labelling(args.rh_eligible_frac, args.routing_frac, args.false_positive_frac)


def resolve(argv: list[str]):
    """(run folder, resolved config) of a command line, every flag checked, nothing loaded: a sweep asks before it starts."""
    if env_of(argv) == "sentiment":
        return estimators.resolve(argv, "rl_ppo", CLI)
    name, algorithm, args, config = parse(argv)
    check(args, config)
    return isolation.describe(name, "rl_ppo", algorithm, args, config)


def check(args: Args, config) -> None:
    for name in ("routing_frac", "false_positive_frac"):
        if getattr(args, name) != getattr(Args, name) and not config.uses_labels:
            raise ValueError(f"--{name} thins labels, which only --routing dual uses")
    labelling(args)
    isolation.check(args, config)
    sequence.check(asdict(args) | asdict(config))


def progress(metrics: dict[str, float]) -> str:
    reward, kl, speed = (metrics.get(key, math.nan) for key in ("reward", "kl", "time/tokens_per_s"))
    return f"reward {reward:.2f} kl {kl:.3f} {speed:,.0f} tok/s"


def main(argv: list[str]) -> int:
    if env_of(argv) == "sentiment":
        return estimators.main(argv, "rl_ppo", CLI)
    name, algorithm, args, config = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    check(args, config)
    folder, resolved = isolation.describe(name, "rl_ppo", algorithm, args, config)
    training.check_folder(folder, resolved, args.resume)
    model, tokenizer, env, texts, rewards = isolation.build(args, config, labelling(args))
    count = len(objectives(asdict(args)))
    if args.bundle_per_reward:
        sequence.add_policy_bundles(model, count, config.seed)
    torch.manual_seed(config.seed)
    trainer = algorithm.Trainer(model, env, tokenizer, config)  # what it refuses, it refuses before there is a folder
    if args.rewards:
        trainer = sequence.InSequence(trainer, rewards[:count], args.bundle_per_reward)
        for paying in trainer.envs:
            training.check_prompts(paying)
    with runs.Run.open(folder, resolved, resume=args.resume) as run:
        if env.about:
            run.print(env.about)
        return isolation.run_phases(run, trainer, texts, rewards, args, config, progress)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
