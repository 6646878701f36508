"""Pools: completions kept from other models, to be trained on beside the policy's own.

    write_batch("pools/teacher", step, samples)                          # step_007.jsonl.gz, a line a sample
    pools = Pools(["pools/teacher", "pools/base"])                       # prompts that all of them have, in order
    for prompt in pools.prompts(step, count): pools.take(prompt, 8, step)

A sample is a prompt, a completion, and what was said of it when it was made; it is scored afresh where it is replayed. A replayed
token counts as sampled by the policy as it is now: its ratio is 1 where it is first used (REINFORCE, as in the probe's plan).
"""

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoints import atomic_write
from sampling import Rollout

NEEDED = ("prompt", "completion")


class Sample(NamedTuple):
    """One completion of a pool, and where it stands there."""

    pool: str
    step: int
    number: int
    prompt: str
    completion: str


def write_batch(folder: str | Path, step: int, samples: list[dict]) -> Path:
    """Writes a batch of samples (each with at least `prompt` and `completion`) as step_NNN.jsonl.gz; returns its path."""
    path = Path(folder) / f"step_{step:03d}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    atomic_write(path, gzip.compress(lines.encode("utf-8"), mtime=0))  # the same samples, the same bytes
    return path


def read_pool(folder: str | Path) -> list[Sample]:
    """Every sample of a pool, in order. Raises ValueError naming the file and line that is none."""
    folder = Path(folder)
    files = sorted(folder.glob("step_*.jsonl.gz"))
    if not files:
        raise ValueError(f"{folder} is no pool: it holds no step_NNN.jsonl.gz (probe.py makes them)")
    samples = []
    for path in files:
        try:
            rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()]
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        step = int(path.name.removeprefix("step_").split(".")[0])
        for number, row in enumerate(rows):
            if lacking := [key for key in NEEDED if not isinstance(row.get(key), str)]:
                raise ValueError(f"{path}, line {number + 1} has no text for {lacking[0]!r}")
            samples.append(Sample(folder.name, step, number, row["prompt"], row["completion"]))
    return samples


class Pools:
    """Several pools' samples of the prompts that all of them have. Raises ValueError where there is none, and for two pools of one
    name, which the figures could not tell apart."""

    def __init__(self, folders: list[str]):
        self.names = [Path(folder).name for folder in folders]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"two pools are called the same: {', '.join(folders)}")
        self.samples = [{}, *[{} for _ in folders[1:]]]  # by pool: prompt -> samples
        for folder, mine in zip(folders, self.samples):
            for sample in read_pool(folder):
                mine.setdefault(sample.prompt, []).append(sample)
        self.order = [prompt for prompt in self.samples[0] if all(prompt in mine for mine in self.samples)]
        if not self.order:
            raise ValueError(f"the pools {', '.join(folders)} have no prompt in common")

    def prompts(self, step: int, count: int) -> list[str]:
        """The prompts of a step: all in order, then from the first again."""
        return [self.order[i % len(self.order)] for i in range(step * count, (step + 1) * count)]

    def take(self, prompt: str, count: int, step: int) -> list[Sample]:
        """`count` samples of a prompt, as many from each pool, the next ones each time that its turn comes. Raises ValueError where
        a pool has too few, or count can't be shared out."""
        if count % len(self.names):
            raise ValueError(f"{count} replayed samples a group can't be shared out among {len(self.names)} pools")
        each, chosen = count // len(self.names), []
        for name, mine in zip(self.names, self.samples):
            found = mine[prompt]
            if len(found) < each:
                raise ValueError(f"pool {name} has {len(found)} samples of a prompt of which {each} are asked for: {prompt[:60]!r}")
            chosen += [found[(step * each + i) % len(found)] for i in range(each)]
        return chosen


def replayed(samples: list[Sample], tokenizer, max_new_tokens: int) -> Rollout:
    """Samples as a Rollout (N,) without log-probabilities (NaN): score them before use. Completions longer than max_new_tokens are
    cut, as the sampler would have cut them."""
    from data import left_pad, right_pad

    end = tokenizer.stop_ids[0]
    prompt_ids, prompt_mask = left_pad([tokenizer.encode_prompt(s.prompt) for s in samples], tokenizer.pad_id)
    full = [[*tokenizer.encode(s.completion), end] for s in samples]
    tokens, mask = right_pad([ids[:max_new_tokens] for ids in full], tokenizer.pad_id)
    finished = torch.tensor([len(ids) <= max_new_tokens for ids in full])
    return Rollout(prompt_ids, prompt_mask, tokens, mask, torch.full(mask.shape, float("nan")), None, finished)
