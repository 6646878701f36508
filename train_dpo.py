"""DPO with residual bundles from the command line: the same pairs, base text and figures as train_ppo.py, without a reward.

    python train_dpo.py --loss_routes ssl_rl_separate                  # the embedded dialogues
    python train_dpo.py --beta 0.01                                    # the same bundles, the loss trains all
    python train_dpo.py --model PATH --dataset Anthropic/hh-rlhf --base_text Salesforce/wikitext:wikitext-2-raw-v1

Flags are the fields of isolation.Flags and of the algorithm's `Config` (rl_dpo.py). --reward judges answers, and trains nothing.
"""

import sys
from functools import partial

import torch
import tyro

import isolation
import runs
import training
from isolation import Flags as Args
from reward_data import preference_parts

RESULT = "verdict.json"  # in its folder a run is finished
EVALUATE = "eval_run.py"  # judges finished runs


def parse(argv: list[str]):
    """(algorithm's name, its module, args, config)."""
    return training.parse(argv, Args, "rl_dpo", partial(tyro.cli, use_underscores=True, description=__doc__))


def check(args: Args, config) -> None:
    isolation.check(args, config)
    if args.env != "preferences":
        raise ValueError(f"--env {args.env} has no pairs to prefer from: --env preferences")


def resolve(argv: list[str]):
    """(run folder, resolved config) of a command line, every flag checked, nothing loaded: a sweep asks before it starts."""
    name, algorithm, args, config = parse(argv)
    check(args, config)
    return isolation.describe(name, "rl_dpo", algorithm, args, config)


def pairs_of(args: Args, prompts: list[str], tokenizer) -> tuple[list[dict], int]:
    """The policy's pairs on its training prompts that fit --max_tokens, and how many others there are."""
    pairs, known = preference_parts(args.dataset, args.train_split, args.eval_split)[0]["policy"], set(prompts)

    def fits(pair) -> bool:
        if pair.prompt not in known:
            return False
        answers = [tokenizer.encode(text) for text in (pair.chosen, pair.rejected)]
        longest = len(tokenizer.encode_prompt(pair.prompt)) + max(map(len, answers)) + 1  # and the end of text
        return longest <= args.max_tokens and answers[0] != answers[1]

    kept = [pair._asdict() for pair in pairs if fits(pair)]
    return kept, len(pairs) - len(kept)


def progress(metrics: dict[str, float]) -> str:
    return f"loss {metrics['loss']:.3f} accuracy {metrics['rewards/accuracies']:.2f} {metrics['time/tokens_per_s']:,.0f} tok/s"


def main(argv: list[str]) -> int:
    name, algorithm, args, config = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    check(args, config)
    folder, resolved = isolation.describe(name, "rl_dpo", algorithm, args, config)
    training.check_folder(folder, resolved, args.resume)
    model, tokenizer, env, texts, rewards = isolation.build(args, config)
    pairs, left_out = pairs_of(args, env.prompts("train"), tokenizer)
    torch.manual_seed(config.seed)
    trainer = algorithm.Trainer(model, env, tokenizer, config, pairs)  # what it refuses, it refuses before there is a folder
    with runs.Run.open(folder, resolved, resume=args.resume) as run:
        run.print(f"{env.about}\n{len(pairs)} pairs to learn from; {left_out} do not fit "
                  "--max_prompts, --prompt_tokens and --max_tokens")
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
