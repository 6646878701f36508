"""The verdict: what the model does with each branch on or off, on fixed prompts, judged by the true measures.

    rows = evaluate_modes(sampler, env, tokenizer, modes_of(model, bad_scale=0), n=256, max_new_tokens=64)
    print(table(rows))

Modes: untrained (all branches off), both (1, 1), retain_only (1, 0), forget_only (0, 1), deployed (1, bad_scale). Every mode
sees the same prompts and the same random numbers. Evaluation has its own generator and never touches training's.
"""
import math
import re

import torch

from adapters import reference, scaled
from data import left_pad
from losses import token_logprobs
from sampling import Law, Sampler

EVAL_SEED = 20_000_003  # of the sampling; the same for every run, mode and step


def modes_of(model, bad_scale: float | None = None) -> dict[str, dict[str, float] | None]:
    """Scales by mode; None stands for the untrained policy. Without a bad branch there are untrained and both."""
    names = model.adapter.names
    modes = {"untrained": None, "both": {name: 1.0 for name in names}}
    if names == ["good", "bad"]:
        modes |= {"retain_only": {"good": 1.0, "bad": 0.0}, "forget_only": {"good": 0.0, "bad": 1.0}}
        if bad_scale is not None:
            modes["deployed"] = {"good": 1.0, "bad": bad_scale}
    return modes


def diversity(texts: list[str], pairs: int = 4000) -> dict[str, float]:
    """Unique share, share of unique first sentences, mean Jaccard similarity of word sets over (up to `pairs`) pairs, and
    `degenerate`: 1 where unique < .5 or Jaccard > .7. The thresholds can miss template collapse: read samples too."""
    bags = [frozenset(re.findall(r"[a-z']+", text.lower())) for text in texts]
    n = len(texts)
    every = [(i, j) for i in range(n) for j in range(i)]
    step = max(1, len(every) // pairs)
    scores = [len(bags[i] & bags[j]) / max(1, len(bags[i] | bags[j])) for i, j in every[::step]]
    unique, jaccard = len(set(texts)) / n, sum(scores) / max(1, len(scores))
    first = len({re.split(r"[.!?]", text, maxsplit=1)[0].strip() for text in texts}) / n
    return {"unique": unique, "unique_first": first, "jaccard": jaccard, "degenerate": float(unique < 0.5 or jaccard > 0.7)}


@torch.no_grad()
def score_tokens(model, rollout, law: Law, rows: int = 32) -> torch.Tensor:
    """Log-probabilities (N, T) of a rollout's tokens under the model as its scales are; 0 behind the end."""
    out = torch.zeros_like(rollout.logprobs)
    length = rollout.prompt_ids.shape[1]
    for i in range(0, len(out), rows):
        part = slice(i, i + rows)
        ids = torch.cat([rollout.prompt_ids[part], rollout.tokens[part]], dim=1)
        mask = torch.cat([rollout.prompt_mask[part], rollout.mask[part]], dim=1)
        padded = mask if not bool(rollout.prompt_mask[part].all()) else None
        hidden = model.hidden(ids[:, :-1], None if padded is None else mask[:, :-1])[:, length - 1 :]  # t-1 scores t
        valid = rollout.mask[part]
        support = None if rollout.support is None else rollout.support[part][valid]
        out[part][valid] = token_logprobs(hidden[valid], model.head_weight, rollout.tokens[part][valid], law.temperature, support)
    return out


def evaluate(sampler: Sampler, scales, env, tokenizer, n: int, max_new_tokens: int, law: Law = Law(), rewards=()) -> dict:
    """One mode on the first n test prompts, one completion each.

    Returns task, hack, reward (means), every component as component/<label>, unique, unique_first, jaccard, degenerate,
    length (tokens), kl (sum over a completion's tokens of log pi - log ref, mean over completions: nats a completion), base_nll
    (mean loss a token under the untrained model, nats), sample. `rewards` are further RewardSpecs whose mean reward is
    reported as eval/<name>, and their components as eval_component/<name>/<label>.
    """
    model = sampler.model
    prompts = env.prompts("test")[:n]
    ids, mask = left_pad([tokenizer.encode_prompt(p) for p in prompts], tokenizer.pad_id)
    generator = torch.Generator().manual_seed(EVAL_SEED)
    modes = reference(model) if scales is None else scaled(model, **scales)
    with modes as policy:
        chosen = sampler if policy is model else Sampler(policy)
        chosen.refresh()
        rollout = chosen(ids, mask, 1, max_new_tokens, tokenizer.stop_ids, tokenizer.pad_id, generator, law)
    with reference(model) as base:
        base_logprobs = score_tokens(base, rollout, law)
    texts = tokenizer.decode_completions(
        [tokenizer.encode_prompt(p) for p in prompts], [t[m].tolist() for t, m in zip(rollout.tokens.cpu(), rollout.mask.cpu())]
    )
    scores = env.score(prompts, texts)
    lengths = rollout.mask.sum(1)
    row = {
        "task": scores.task.mean().item(), "hack": scores.hack.float().mean().item(), "reward": scores.reward.mean().item(),
        **diversity(texts), "length": lengths.float().mean().item(),
        "kl": (rollout.logprobs - base_logprobs).sum(1).mean().item() if scales is not None else 0.0,
        "base_nll": (-base_logprobs.sum() / lengths.sum()).item(),
    }  # fmt: skip
    row |= {f"component/{label}": part.mean().item() for label, part in scores.components.items()}
    for spec in rewards:
        values = spec.evaluate(texts, prompts)
        row[f"eval/{spec.name}"] = float(values.reward.mean())
        row |= {f"eval_component/{spec.name}/{label}": float(part.mean()) for label, part in values.components.items()}
    bad = [key for key, value in row.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"evaluation gave a non-finite {bad[0]}")
    return row | {"sample": prompts[0] + texts[0], "texts": texts, "prompts": prompts}


def evaluate_modes(sampler: Sampler, env, tokenizer, modes: dict, n: int, max_new_tokens: int, law=Law(), rewards=()) -> dict:
    """Every mode by name; see `evaluate`."""
    rows = {name: evaluate(sampler, s, env, tokenizer, n, max_new_tokens, law, rewards) for name, s in modes.items()}
    sampler.refresh()
    return rows


def numbers_of(rows: dict[str, dict]) -> dict[str, dict]:
    """The rows without their texts, of which one sample stays: what verdict.json and the checkpoints keep."""
    return {mode: {k: v for k, v in row.items() if k not in ("texts", "prompts")} for mode, row in rows.items()}


COLUMNS = ("task", "hack", "reward", "unique", "jaccard", "kl", "base_nll")


def table(rows: dict[str, dict]) -> str:
    """The verdict as aligned text, with one sample a mode below."""
    extra = [key for key in next(iter(rows.values())) if key.startswith("eval/")]
    heads = ["mode", *COLUMNS, *[key.removeprefix("eval/") for key in extra]]
    lines = [[name, *[f"{row[key]:.3f}" for key in (*COLUMNS, *extra)]] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    text = "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
                     for line in [heads, *lines])  # fmt: skip
    samples = "\n".join(f"{name}: {' '.join(row['sample'].split())[:300]}" for name, row in rows.items())
    return f"{text}\n\n{samples}"
