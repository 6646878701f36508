"""The verdict: what the model does with each branch on or off, on fixed prompts, judged by the true measures.

    rows = evaluate_modes(sampler, env, tokenizer, modes_of(model, bad_scale=0), n=256, max_new_tokens=64)
    print(table(rows), samples(rows), sep="\n\n")
    config, model, tokenizer, env, law = load_run("output/RUN", n=256)      # a finished run put together again
    curve = bad_scale_rows("output/RUN", [0, 0.25, 0.5, 0.75, 1])           # a row a scale of the bad branch

Modes: untrained (the reference policy: all branches off, or as they were frozen), both (all on), retain_only (good 1, bad 0),
forget_only (0, 1), deployed (1, bad_scale); of residual bundles rl_half and rl_off, those of RL at 1/2 and 0, and value_off, the
value loss's at 0; where several objectives have policy bundles of their own policy_off, policy_2_off, ..., one of them at 0.
Every mode sees the same prompts and random numbers. Evaluation has its own generator, apart from training's.
"""
import hashlib
import json
import math
import re
from dataclasses import fields
from pathlib import Path

import torch

from adapter_files import load_adapter, load_reference
from adapters import attach, reference, scaled, set_adapter_tensors, spec_of
from checkpoints import atomic_write, latest_checkpoint, load_checkpoint
from code_env import code_tasks
from data import left_pad, load_tokenizer, right_pad
from envs import Stories, check_lengths, dataset_prompts, imitation, scored
from losses import text_logprobs, token_logprobs
from model import load, read_json
from preference_env import with_base_text
from reward_specs import describe, get_reward, get_trait, objectives
from runs import read_config
from sampling import Law, Sampler
from sequence import POLICY, add_policy_bundles

REFERENCE = "reference.safetensors"  # the reference policy of a run whose branches were trained before it was one
EVAL_SEED = 20_000_003  # of the sampling; the same for every run, mode and step


def modes_of(model, bad_scale: float | None = None) -> dict[str, dict[str, float] | None]:
    """Scales by mode; None stands for the untrained policy. Without a bad branch there are untrained and both."""
    names = model.adapter.names
    modes = {"untrained": None, "both": {name: 1.0 for name in names}}
    if names == ["good", "bad"]:
        modes |= {"retain_only": {"good": 1.0, "bad": 0.0}, "forget_only": {"good": 0.0, "bad": 1.0}}
        if bad_scale is not None:
            modes["deployed"] = {"good": 1.0, "bad": bad_scale}
    if rl := [name for name in names if name.startswith("b_rl_")]:
        modes |= {mode: modes["both"] | dict.fromkeys(rl, scale) for mode, scale in (("rl_half", 0.5), ("rl_off", 0.0))}
        modes |= {"value_off": modes["both"] | {"b_rl_value": 0.0}}
    if len(policies := [name for name in names if name.startswith(POLICY)]) > 1:
        modes |= {f"{name.removeprefix('b_rl_')}_off": modes["both"] | {name: 0.0} for name in policies}
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
def score_tokens(model, rollout, temperature: float, rows: int = 32) -> torch.Tensor:
    """Log-probabilities (N, T) of a rollout's tokens under the model as its scales are, of all that any policy may write: under
    a minimum length, without top-k and top-p. 0 behind the end."""
    out = torch.zeros_like(rollout.logprobs)
    length = rollout.prompt_ids.shape[1]
    for i in range(0, len(out), rows):
        part = slice(i, i + rows)
        ids = torch.cat([rollout.prompt_ids[part], rollout.tokens[part]], dim=1)
        mask = torch.cat([rollout.prompt_mask[part], rollout.mask[part]], dim=1)
        padded = mask if not bool(rollout.prompt_mask[part].all()) else None
        hidden = model.hidden(ids[:, :-1], None if padded is None else mask[:, :-1])[:, length - 1 :]  # t-1 scores t
        valid = rollout.mask[part]
        tokens, allowed = rollout.tokens[part][valid], rollout.allowed_of(part)
        out[part][valid] = token_logprobs(hidden[valid], model.head_weight, tokens, temperature, allowed)
    return out


@torch.no_grad()
def text_loss(model, texts: list[list[int]], pad_id: int, rows: int = 32) -> float:
    """Mean loss a token, in nats, over whole texts given as ids (Tokenizer.encode_text)."""
    ordered = sorted(texts, key=len)  # a batch of like lengths pads little
    batches = [right_pad(ordered[i : i + rows], pad_id) for i in range(0, len(ordered), rows)]
    total = sum(-text_logprobs(model, ids.to(model.device), mask.to(model.device)).double().sum().item() for ids, mask in batches)
    return total / sum(len(ids) - 1 for ids in texts)


def evaluate(
    sampler: Sampler, scales, env, tokenizer, n: int, max_new_tokens: int, law: Law = Law(), rewards=(), prompts=None
) -> dict:
    """One mode on the first n test prompts (or of `prompts`), one completion each.

    Returns task, hack, reward (means), every component as component/<label>, unique, unique_first, jaccard, degenerate,
    length (tokens), kl (sum over a completion's tokens of log pi - log ref, mean over completions: nats a completion; pi is what
    is sampled, ref the reference without top-k and top-p, under which the untrained model is not at 0 then), base_nll
    (mean loss a token under the untrained model, nats), sample, and the mean loss a token of the environment's held-out texts as
    loss/<name>. `rewards` are further RewardSpecs whose mean reward is reported as eval/<name>, and their components as
    eval_component/<name>/<label>.
    """
    model = sampler.model
    prompts = (env.prompts("test") if prompts is None else prompts)[:n]
    ids, mask = left_pad([tokenizer.encode_prompt(p) for p in prompts], tokenizer.pad_id)
    generator = torch.Generator().manual_seed(EVAL_SEED)
    modes = reference(model) if scales is None else scaled(model, **scales)
    with modes as policy:
        chosen = sampler if policy is model else Sampler(policy)
        chosen.refresh()
        rollout = chosen(ids, mask, 1, max_new_tokens, tokenizer.stop_ids, tokenizer.pad_id, generator, law)
        held_out = {f"loss/{name}": text_loss(policy, texts, tokenizer.pad_id) for name, texts in env.held_out.items()}
    with reference(model) as base:
        base_logprobs = score_tokens(base, rollout, law.temperature)
    texts = tokenizer.decode_completions(
        [tokenizer.encode_prompt(p) for p in prompts], [t[m].tolist() for t, m in zip(rollout.tokens.cpu(), rollout.mask.cpu())]
    )
    scores = scored(env, rollout, prompts, texts)
    lengths = rollout.mask.sum(1)
    row = {
        "task": scores.task.mean().item(), "hack": scores.hack.float().mean().item(), "reward": scores.reward.mean().item(),
        **diversity(texts), "length": lengths.float().mean().item(),
        "kl": (rollout.logprobs - base_logprobs).sum(1).mean().item() if scales is not None or law.cut else 0.0,
        "base_nll": (-base_logprobs.sum() / lengths.sum()).item(),
        **held_out,
    }  # fmt: skip
    row |= {f"component/{label}": part.mean().item() for label, part in scores.components.items()}
    for spec in rewards:
        values = spec.evaluate(texts, prompts)
        row[f"eval/{spec.name}"] = float(values.reward.mean())
        row |= {f"eval_component/{spec.name}/{label}": float(part.mean()) for label, part in values.components.items()}
    bad = [key for key, value in row.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"evaluation gave a non-finite {bad[0]}")
    lists = {"texts": texts, "prompts": prompts, "rewards": scores.reward.tolist()}
    return row | {"sample": prompts[0] + texts[0]} | lists


def evaluate_modes(sampler: Sampler, env, tokenizer, modes: dict, n: int, max_new_tokens: int, law=Law(), rewards=()) -> dict:
    """Every mode by name; see `evaluate`."""
    rows = {name: evaluate(sampler, s, env, tokenizer, n, max_new_tokens, law, rewards) for name, s in modes.items()}
    sampler.refresh()
    return price(rows)


def price(rows: dict[str, dict]) -> dict[str, dict]:
    """Adds, in place, to rows with a loss on base text: perplexity and, over the untrained row, reward_improvement and
    perplexity_degradation (perplexity / untrained - 1); to `both` efficiency, their ratio, unless perplexity stayed."""
    for row in rows.values():
        if "loss/base" not in row:
            return rows
        row["perplexity"] = math.exp(row["loss/base"])
    first = rows.get("untrained")
    for row in rows.values() if first else ():
        row["reward_improvement"] = row["reward"] - first["reward"]
        row["perplexity_degradation"] = row["perplexity"] / first["perplexity"] - 1
    if first and (last := rows.get("both")) and last["perplexity_degradation"]:
        last["efficiency"] = last["reward_improvement"] / last["perplexity_degradation"]
    return rows


def numbers_of(rows: dict[str, dict]) -> dict[str, dict]:
    """The rows without their lists (texts, prompts, rewards): what verdict.json and the checkpoints keep, one sample included."""
    return {mode: {k: v for k, v in row.items() if not isinstance(v, list)} for mode, row in rows.items()}


def judged_as(run: dict, tokenizer, n: int):
    """The environment in which a run, given by its config, is judged, with its first n test prompts."""
    if run.get("env") == "sentiment":
        raise ValueError("a run of --env sentiment has judged itself on test data that is touched once: read its results.json")
    if "trait" in run:
        return imitation(run, tokenizer, n)
    if run.get("env") == "code":  # runs from before there was this flag are of stories
        return code_tasks(run, tokenizer, n)
    if "base_text" in run:
        return with_base_text(run, tokenizer, n)
    prompts = None
    if run["dataset"]:
        splits = {"train": (run["train_split"], n), "test": (run["eval_split"], n)}
        prompts = dataset_prompts(run["dataset"], tokenizer, run["prompt_tokens"], splits, run["column"])
    return Stories(get_reward(run["reward"]), prompts)


def is_dual(run: dict) -> bool:
    """Whether a run, given by its config, trained two branches."""
    return run.get("routing") == "dual" or run.get("removed") == "route"


def load_run(folder: str | Path, n: int, device: str = "cpu", checkpoint: Path | None = None, box: str = ""):
    """A run put together again from its folder: (config, model with the trained adapter, tokenizer, environment, law).

    n test prompts are asked for. `checkpoint` is one of the run's checkpoint-N folders; None stands for the finished adapter.
    `box`, where it is given, stands in for the run's own. Raises ValueError for a folder that holds no run, and for prompts that
    do not fit or are too few.
    """
    folder = Path(folder)
    config = read_config(folder)
    if box:
        if config.get("env") != "code":
            raise ValueError(f"--box is where model-written code runs; {folder} has none (--env stories)")
        config["box"] = box
    model, path = load(config["model"], dtype=getattr(torch, config["dtype"]), device=device)
    tokenizer = load_tokenizer(path, read_json(path / "config.json"))
    if checkpoint is None and config["lora_config"] != "full":
        load_adapter(model, folder / "adapter.safetensors")
    else:
        attach(model, spec_of(config, is_dual(config)), seed=config["seed"])
        if config.get("bundle_per_reward"):
            add_policy_bundles(model, len(objectives(config)), config["seed"])
        chosen = checkpoint or latest_checkpoint(folder)
        set_adapter_tensors(model, load_checkpoint(chosen)[1], str(chosen))
    if (reference_file := folder / REFERENCE).is_file():
        load_reference(model, reference_file)
    env = judged_as(config | {"device": device}, tokenizer, n)
    check_lengths(env, tokenizer, config["max_new_tokens"], model.config.context, n)
    law = Law(**{f.name: config[f.name] for f in fields(Law) if f.name in config})  # train_sft.py has no such flags
    return config, model, tokenizer, env, law


def judged_by(run: dict) -> str:
    """What decides a run's scores beside its flags: the trait or reward as the YAML has it now; a code task's is in the code."""
    if run.get("env") in ("code", "preferences"):
        return f"preferences {objectives(run)[-1]}" if run["env"] == "preferences" else "code"
    return describe(get_trait(run["trait"]) if "trait" in run else get_reward(objectives(run)[-1]))


def bad_scale_rows(folder: str | Path, scales=(), device: str = "cpu") -> dict[float, dict]:
    """Rows of `evaluate` with the good branch on and the bad one at each scale, on the prompts and random numbers of the run's
    own verdict: 0 gives its retain_only, 1 its both.

    Rows are kept in the run's bad_scales.json beside a hash of adapter, config and reward; what is there is not evaluated again,
    and without `scales` only read. Rows of another adapter, config or reward are dropped. Returns all of them by ascending scale.
    """
    folder = Path(folder)
    cache, files = folder / "bad_scales.json", [folder / "config.yaml", folder / "adapter.safetensors"]
    if not cache.is_file() and not scales:
        return {}
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} holds no {absent[0]}: there is no finished run to scale the bad branch of")
    config = read_config(folder)
    judged = judged_by(config)
    source = hashlib.sha256(b"".join([*[file.read_bytes() for file in files], judged.encode()])).hexdigest()
    kept = json.loads(cache.read_text()) if cache.is_file() else {}
    rows = {float(scale): row for scale, row in kept["rows"].items()} if kept.get("source") == source else {}
    if new := sorted({float(scale) for scale in scales} - set(rows)):
        n = config["eval_prompts"]
        _, model, tokenizer, env, law = load_run(folder, n, device)
        if model.adapter.names != ["good", "bad"]:
            raise ValueError(f"{folder} has no bad branch to scale: its branches are {', '.join(model.adapter.names)}")
        modes = {scale: {"good": 1.0, "bad": scale} for scale in new}
        found = evaluate_modes(Sampler(model), env, tokenizer, modes, n, config["max_new_tokens"], law)
        rows |= numbers_of(found)
        atomic_write(cache, json.dumps({"source": source, "rows": dict(sorted(rows.items()))}, indent=1) + "\n")
    return dict(sorted(rows.items()))


COLUMNS = ("task", "hack", "reward", "unique", "jaccard", "kl", "base_nll")


def table(rows: dict[str, dict]) -> str:
    """The verdict as aligned text."""
    extra = [key for key in next(iter(rows.values())) if key.startswith(("loss/", "eval/", "perplexity"))]
    heads = ["mode", *COLUMNS, *[key.removeprefix("eval/") for key in extra]]
    lines = [[name, *[f"{row[key]:.3f}" for key in (*COLUMNS, *extra)]] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
                     for line in [heads, *lines])  # fmt: skip


def pages(rows: dict[str, dict], count: int) -> str:
    """The first `count` samples of each mode, with its diversity: what is to be read with one's own eyes."""
    found = []
    for mode, row in rows.items():
        flag = "DEGENERATE" if row["degenerate"] else "not degenerate"
        variety = f"unique {row['unique']:.2f}, unique first {row['unique_first']:.2f}, Jaccard {row['jaccard']:.2f}"
        texts = [f"- {prompt}{text}" for prompt, text in zip(row["prompts"], row["texts"])]
        found.append("\n".join([f"=== {mode}: {flag}, {variety}", *texts[:count]]))
    return "\n\n".join(found) + "\n"


def samples(rows: dict[str, dict]) -> str:
    """One sample a mode, a line each."""
    return "\n".join(f"{name}: {' '.join(row['sample'].split())[:300]}" for name, row in rows.items())
