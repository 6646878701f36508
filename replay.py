"""Completions kept from other models, to be trained on beside the policy's own.

    write_lines("pools/teacher/step_007.jsonl.gz", samples)              # a pool: files of samples, a line each
    pools = Pools(["pools/teacher", "pools/base"])                       # the prompts that all of them have, in order
    samples = [s for prompt in pools.prompts(step, count) for s in pools.take(prompt, 8, 0)]
    rollout = interleaved(own, replayed(samples, tokenizer, max_new_tokens), groups)

A sample is a prompt and a completion; whatever else was noted of it when it was made, it is scored afresh where it is replayed.
A replayed token counts as sampled by the policy as it is now: its ratio is 1 where it is first used (REINFORCE).
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from checkpoints import atomic_write
from data import left_pad, right_pad
from sampling import Rollout

STUDENT = "student"  # the source of what the policy itself has sampled


@dataclass
class Flags:
    """The fields that an algorithm's Config inherits."""

    replay_dirs: str = ""
    """pools to replay from, comma-separated folders (probe.py makes some): the prompts are theirs; empty: none"""
    mix: float = 0.5
    """share of each group that is replayed, as much from each pool; 1: nothing is sampled"""

    def check_replay(self) -> None:
        """Raises ValueError for a mix that leaves no whole number, and for flags that would do nothing."""
        if not self.replay_dirs:
            if self.mix != Flags.mix:
                raise ValueError("--mix is the share of what is replayed: give --replay_dirs too")
            return
        pools, count = len(self.pools()), self.mix * self.num_generations
        if not 0 < self.mix <= 1 or count != int(count) or int(count) % pools:
            raise ValueError(
                f"--mix {self.mix} of --num_generations {self.num_generations} must be a whole number, shared by {pools} pools"
            )
        if self.law().truncated:
            raise ValueError("replayed tokens need a law that can sample them all: leave --top_k, --top_p and --min_new_tokens")

    def pools(self) -> list[str]:
        return [folder.strip() for folder in self.replay_dirs.split(",") if folder.strip()]

    @property
    def replayed(self) -> int:
        """How many completions of a group are replayed."""
        return int(self.mix * self.num_generations) if self.replay_dirs else 0


class Sample(NamedTuple):
    """One completion of a pool, and where it stands there."""

    pool: str
    step: int
    number: int
    prompt: str
    completion: str
    finished: bool  # ended by the model, not by a length cap


def write_lines(path: str | Path, rows: list[dict]) -> None:
    """Writes rows as gzipped JSON lines; the same rows, the same bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode("utf-8"), mtime=0))


def read_lines(path: str | Path) -> list[dict]:
    """Raises ValueError naming the file that can't be read."""
    try:
        return [json.loads(line) for line in gzip.decompress(Path(path).read_bytes()).decode("utf-8").splitlines()]
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def read_pool(folder: str | Path) -> list[Sample]:
    """Every sample of a pool, in order; a line has `prompt` and `completion`, and may have `finished` (true). Raises ValueError
    naming the file and line that is none."""
    files = sorted(Path(folder).glob("step_[0-9]*.jsonl.gz"))
    if not files:
        raise ValueError(f"{folder} is no pool: it holds no step_NNN.jsonl.gz (probe.py makes them)")
    samples = []
    for path in files:
        step = int(path.name.removeprefix("step_").split(".")[0])
        for number, row in enumerate(read_lines(path)):
            if lacking := [key for key in ("prompt", "completion") if not isinstance(row.get(key), str)]:
                raise ValueError(f"{path}, line {number + 1} has no text for {lacking[0]!r}")
            finished = bool(row.get("finished", True))
            if not finished and not row["completion"]:
                raise ValueError(f"{path}, line {number + 1} has no token: its completion is empty and was cut")
            samples.append(Sample(Path(folder).name, step, number, row["prompt"], row["completion"], finished))
    return samples


class Pools:
    """Several pools' samples of the prompts that all of them have. Raises ValueError where there is no such prompt, and for two
    pools of one name, which the figures could not tell apart."""

    def __init__(self, folders: list[str]):
        self.names = [Path(folder).name for folder in folders]
        if len({STUDENT, *self.names}) <= len(self.names):
            raise ValueError(f"two pools are called the same, or {STUDENT!r} like the policy itself: {', '.join(folders)}")
        self.samples = [{} for _ in folders]  # by pool: prompt -> samples
        for folder, mine in zip(folders, self.samples):
            for sample in read_pool(folder):
                mine.setdefault(sample.prompt, []).append(sample)
        self.order = [prompt for prompt in self.samples[0] if all(prompt in mine for mine in self.samples)]
        if not self.order:
            raise ValueError(f"the pools {', '.join(folders)} have no prompt in common")

    def check(self, prompts, each: int) -> None:
        """Raises ValueError unless every prompt is among the environment's `prompts`, with `each` samples in every pool."""
        for prompt in self.order:
            if prompt not in prompts:
                raise ValueError(f"the pools' prompt {prompt[:60]!r} is none of the training prompts: pools of other tasks?")
            for name, mine in zip(self.names, self.samples):
                if (found := len(mine[prompt])) < each:
                    raise ValueError(f"pool {name} has {found} samples of a prompt, {each} are asked for: {prompt[:60]!r}")

    def prompts(self, step: int, count: int) -> list[str]:
        """The prompts of a step: all in order, then from the first again."""
        return [self.order[i % len(self.order)] for i in range(step * count, (step + 1) * count)]

    def take(self, prompt: str, count: int, group: int) -> list[Sample]:
        """`count` samples of a prompt, as many from each pool; other ones when it returns, as far as there are. group: how many
        groups the run has had before this one."""
        each, turn = count // len(self.names), group // len(self.order)
        return [mine[prompt][(turn * each + i) % len(mine[prompt])] for mine in self.samples for i in range(each)]


def replayed(samples: list[Sample], tokenizer, max_new_tokens: int) -> Rollout:
    """Samples as a Rollout (N,) whose log-probabilities are NaN: nobody has sampled them yet. A completion longer than
    max_new_tokens is cut, as the sampler would have cut it."""
    prompt_ids, prompt_mask = left_pad([tokenizer.encode_prompt(s.prompt) for s in samples], tokenizer.pad_id)
    full = [tokenizer.encode(s.completion) + [tokenizer.eos_id] * s.finished for s in samples]
    tokens, mask = right_pad([ids[:max_new_tokens] for ids in full], tokenizer.pad_id)
    finished = torch.tensor([s.finished and len(ids) <= max_new_tokens for s, ids in zip(samples, full)])
    return Rollout(prompt_ids, prompt_mask, tokens, mask, torch.full(mask.shape, float("nan")).where(mask, 0.0), None, finished)


def interleaved(own: Rollout, other: Rollout, groups: int) -> Rollout:
    """The rows of two rollouts, in `groups` groups each of which has its share of the first, then of the second."""
    device = own.tokens.device
    columns = {}
    for name, at_left in (("prompt_ids", True), ("prompt_mask", True), ("tokens", False), ("mask", False), ("logprobs", False)):
        pair = [getattr(own, name), getattr(other, name).to(device)]
        width = max(part.shape[1] for part in pair)
        gaps = [width - part.shape[1] for part in pair]
        pair = [F.pad(part, (gap, 0) if at_left else (0, gap)) for part, gap in zip(pair, gaps)]
        columns[name] = torch.cat([part.view(groups, -1, width) for part in pair], dim=1).flatten(0, 1)
    pair = [own.finished, other.finished.to(device)]
    finished = torch.cat([part.view(groups, -1) for part in pair], dim=1).flatten()
    return Rollout(**columns, support=None, finished=finished)


def annotated(origins: list, rollout: Rollout, scores, projector, metrics: dict[str, float], step: int) -> list[dict]:
    """What --contributions writes of each completion of a step: where it is from (its Sample; None: sampled now), its scores, the
    signed cosine and the norm of what it alone added to the gradient, and the whole step's cosines. [] without a basis."""
    whole, compiles = {"mean_cos_in": "cin", "mean_cos_out": "cout", "frac_fired": "fired"}, scores.components.get("compiles")
    rows = []
    for i, origin in enumerate(origins if projector.basis else []):
        pool, made, number = (origin.pool, origin.step, origin.number) if origin else (STUDENT, step, i)
        alone = projector.contributions[i]
        row = {"step": step, "sample_id": i, "src_pool": pool, "src_step": made, "src_sample": number}
        row |= {"reward": scores.reward[i].item(), "hacked": bool(scores.hack[i]), "gt_pass": bool(scores.task[i] > 0)}
        row |= {"fmt_ok": None if compiles is None else bool(compiles[i]), "comp_len": int(rollout.mask[i].sum())}
        row |= {"cos_S_contrib": alone["signed"], "grad_norm_contrib": alone["norm"]}
        rows.append(row | {name: metrics[f"projection/{key}"] for name, key in whole.items()} | {"arm": projector.arm})
    return rows
