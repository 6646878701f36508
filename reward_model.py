"""Reward models: a frozen transformer, the mean of its states, two layers; read from ids or from soft tokens.

    judge = new_reward_model("preference", "tiny")                     # train_reward.py trains it
    save_reward_model(judge, "reward_model.safetensors")
    judge = load_reward_model("output/RUN")                            # refuses a backbone with other weights
    rewards = judge.scores(prompts, completions)                       # (N,) fp32
    rewards = judge(mask=mask, soft=probabilities)                     # (B,), differentiable in (B, T, V) probabilities
    rewards = judge(prompt_ids, mask, soft=probabilities)              # likewise, of soft tokens behind a prompt

kind         outputs                              reward         trained on                                 mean over
preference   one score s                          s / spread     -log sigmoid(s(chosen) - s(rejected))      the answer
sentiment    two logits, negative and positive    P(positive)    cross-entropy                              the whole text

Pairs leave a score's zero free, and their log-odds its scale: the zero is the mean of the training texts' scores, the spread
their standard deviation, so that every preference model pays in the same unit.

The mean leaves out the prompt of an answer, whose states have read it anyway: of hh-rlhf's held-out pairs that ranks .67 right,
a mean over the whole dialogue .62 (stories3M, frozen, 311 pairs, means of three seeds).

Both losses are softplus(-margin), with the margin the log-odds that the model gives to the truth: s(chosen) - s(rejected), and
the true label's logit minus the other's. Bradley and Terry 1952; as a reward model: Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155.
"""
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from adapters import adapter_tensors, attach, parameters_of, preset, set_adapter_tensors
from checkpoints import atomic_write
from data import check_tokenizer_fits, load_tokenizer, right_pad
from model import load, read_json
from svd import tensor_hash

FILE = "reward_model.safetensors"
OUTPUTS = {"preference": 1, "sentiment": 2}
POOLING = {"preference": "answer", "sentiment": "text"}  # what the mean is over
ADAPTERS = ("lora", "lora_b", "mlp")  # the others' tensors mean nothing without more of the backbone than its hash


@dataclass(frozen=True)
class Description:
    """What a reward model's file says of it."""

    kind: str
    backbone: str  # as model.load takes it
    dtype: str
    weights: str  # hash of the backbone's weights
    max_tokens: int  # how much is read of a text
    lora_config: str  # of a branch on the backbone; empty: it is frozen
    pooling: str  # POOLING of its kind


class Row(NamedTuple):
    """A text as the model reads it."""

    ids: list[int]
    start: int  # the mean is over ids[start:]


class RewardModel(nn.Module):
    """`transformer` (frozen, perhaps with a branch), `head` (fp32), `tokenizer` and `about`, its Description."""

    def __init__(self, transformer, tokenizer, about: Description, seed: int = 0):
        super().__init__()
        self.transformer, self.tokenizer, self.about = transformer, tokenizer, about
        width = transformer.config.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, OUTPUTS[about.kind]))
        self.head.to(transformer.device)
        self.register_buffer("spread", torch.ones((), device=transformer.device))  # of the training texts' scores
        self.figures: dict = {}  # what train_reward.py measured

    def pooled(self, ids=None, mask=None, pool=None, soft=None) -> torch.Tensor:
        """The mean of the states of some tokens (B, C) fp32.

        ids (B, T) long, or soft (B, T, V) probabilities, which read the embedding's weighted mean; or both: soft tokens behind
        ids, T in all. mask (B, T) bool, True on real tokens, with filling anywhere; pool (B, T) bool, the tokens that the mean
        is over (None: all real ones).
        """
        weight, embeds = self.transformer.embed_tokens.weight, None
        if soft is not None:
            embeds = soft.to(weight.dtype) @ weight
            embeds = embeds if ids is None else torch.cat([self.transformer.embed_tokens(ids), embeds], 1)
        states, chosen = self.transformer.hidden(ids, mask, embeds=embeds).float(), (mask if pool is None else pool)[..., None]
        return (states * chosen).sum(1) / chosen.sum(1)

    def logit(self, pooled: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (...): the score, or the positive logit minus the negative one."""
        outputs = self.head(pooled)
        return outputs[..., 0] if self.about.kind == "preference" else outputs[..., 1] - outputs[..., 0]

    def forward(self, ids=None, mask=None, pool=None, soft=None) -> torch.Tensor:
        """Rewards (B,); arguments as `pooled`."""
        return self.reward(self.logit(self.pooled(ids, mask, pool, soft)))

    def reward(self, logit: torch.Tensor) -> torch.Tensor:
        return logit / self.spread if self.about.kind == "preference" else logit.sigmoid()  # of two logits the softmax

    @torch.no_grad()
    def normalize(self, pooled: torch.Tensor) -> None:
        """Gives a preference model's rewards mean 0 and deviation 1 over the training texts, (N, C)."""
        if self.about.kind == "preference":
            scores = self.logit(pooled)
            self.head[-1].bias -= scores.mean()
            self.spread.copy_(scores.std())

    def encode(self, prompt: str, completion: str) -> Row:
        """A text as the model reads it, in training and in use; no end of text, for a completion may be cut off.

        At most max_tokens. Of a review its beginning. Of a dialogue its end: the prompt gives way, from its left, and the
        answer, which is what is judged, never does. An empty one is read off the end of its prompt. Raises ValueError for an
        answer that the context does not hold.
        """
        tokenizer, most, context = self.tokenizer, self.about.max_tokens, self.transformer.config.context
        if self.about.kind == "sentiment":
            return Row(tokenizer.encode_prompt(prompt + completion)[:most], 0)
        first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        whole = tokenizer.encode(prompt + completion)  # an answer encoded alone could begin with a blank too many
        cut = len(os.path.commonprefix([whole, tokenizer.encode(prompt)]))
        before, answer = whole[:cut], whole[cut:]
        room = max(0, most - len(first) - len(answer))
        before = [*first, *before[max(0, len(before) - room) :]]
        if len(before) + len(answer) > context:
            tokens = f"{len(answer)} tokens does not fit the reward model's context of {context}"
            raise ValueError(f"an answer of {tokens}: {completion[:60]!r}")
        return Row([*before, *answer], min(len(before), len(before) + len(answer) - 1))

    @torch.no_grad()
    def pool_all(self, rows: list[Row], batch_size: int = 32) -> torch.Tensor:
        """`pooled` of N rows (N, C), in batches of like lengths, which pad little."""
        out = torch.zeros(len(rows), self.transformer.config.width, device=self.transformer.device)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        for i in range(0, len(order), batch_size):
            part = order[i : i + batch_size]
            out[part] = self.pooled(*self.padded([rows[j] for j in part]))
        return out

    def padded(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids, mask and pool (B, T) of rows, filled up on the right."""
        ids, mask = right_pad([row.ids for row in rows], self.tokenizer.pad_id)
        place, start = torch.arange(ids.shape[1]), torch.tensor([row.start for row in rows])
        pool = mask & (place >= start[:, None])
        return tuple(tensor.to(self.transformer.device) for tensor in (ids, mask, pool))

    @torch.no_grad()
    def scores(self, prompts: list[str], completions: list[str]) -> torch.Tensor:
        """Rewards of N texts, (N,) fp32 on the CPU."""
        rows = [self.encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return self.reward(self.logit(self.pool_all(rows))).cpu()

    def trainable(self) -> list[nn.Parameter]:
        return [*self.head.parameters(), *(parameters_of(self.transformer, "adapter") if self.about.lora_config else [])]


# ------------------------------------------------------------------------------------------------- making, saving, loading


def new_reward_model(
    kind: str, backbone: str, lora_config: str = "", max_tokens: int = 256, seed: int = 0, dtype: str = "float32", device="cpu"
) -> RewardModel:
    """An untrained reward model on `tiny`, a local Hugging Face folder or a Hub id. Raises ValueError for what `check_kind`
    refuses, and for max_tokens beyond the context."""
    check_kind(kind, lora_config)
    transformer, tokenizer = load_backbone(backbone, dtype, device)
    if not 1 <= max_tokens <= transformer.config.context:
        raise ValueError(f"--max_tokens {max_tokens} must lie in 1..{transformer.config.context}, the model's context")
    about = Description(kind, str(backbone), dtype, weights_hash(transformer), max_tokens, lora_config, POOLING[kind])
    return assembled(transformer, tokenizer, about, seed)


def check_kind(kind: str, lora_config: str) -> None:
    """Raises ValueError for an unknown kind, and for an adapter whose file would not say all of it."""
    if kind not in OUTPUTS:
        raise ValueError(f"unknown --kind {kind!r}; known: {', '.join(OUTPUTS)}")
    if lora_config and preset(lora_config, dual=False).kind not in ADAPTERS:
        raise ValueError(f"--lora_config {lora_config}: a reward model's backbone is frozen, or has a LoRA or an MLP branch")


def load_backbone(name: str, dtype: str, device):
    transformer, folder = load(name, dtype=getattr(torch, dtype), device=device)
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json"))
    check_tokenizer_fits(tokenizer, transformer.config.vocab_size)
    return transformer, tokenizer


def weights_hash(transformer) -> str:
    return tensor_hash(*transformer.state_dict().values())


def assembled(transformer, tokenizer, about: Description, seed: int = 0) -> RewardModel:
    if about.lora_config:
        attach(transformer, preset(about.lora_config, dual=False), seed=seed)
    return RewardModel(transformer, tokenizer, about, seed)


def save_reward_model(model: RewardModel, path: str | Path) -> None:
    """Writes head and branch with their Description and figures into one file; the backbone stays where it is."""
    tensors = {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()} | {"spread": model.spread}
    tensors |= adapter_tensors(model.transformer) if model.about.lora_config else {}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = json.dumps(asdict(model.about) | {"figures": model.figures})  # one entry: safetensors writes several in any order
    atomic_write(path, save(tensors, metadata={"reward_model": said}))


def load_reward_model(path: str | Path, backbone: str = "", device="cpu") -> RewardModel:
    """A trained reward model, frozen, from its file or its run folder.

    `backbone` stands in for the name in the file, where the folder has moved. Raises ValueError for a file that is no reward
    model, and for a backbone with other weights than it was trained on.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            metadata = tensors.metadata() or {}
            state = {key: tensors.get_tensor(key) for key in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read reward model {file}: {error}; python train_reward.py makes one") from error
    if "reward_model" not in metadata:
        raise ValueError(f"{file} is no reward model: python train_reward.py makes one")
    said = json.loads(metadata["reward_model"])
    figures, about = said.pop("figures"), Description(**said)
    check_kind(about.kind, about.lora_config)
    if about.pooling != POOLING[about.kind]:
        raise ValueError(f"{file} takes the mean over {about.pooling!r}; here it is over the {POOLING[about.kind]}")
    transformer, tokenizer = load_backbone(backbone or about.backbone, about.dtype, device)
    if weights_hash(transformer) != about.weights:
        wrong = backbone or about.backbone
        raise ValueError(f"{file} was trained on {about.backbone}; {wrong} has other weights, whose states it can't read")
    model = assembled(transformer, tokenizer, about)
    head = {name.removeprefix("head."): state.pop(name) for name in list(state) if name.startswith("head.")}
    model.head.load_state_dict(head)
    model.spread.copy_(state.pop("spread"))
    if about.lora_config:
        set_adapter_tensors(transformer, state, str(file))
    model.figures = figures
    return model.requires_grad_(False)


def check_vocabulary(model: RewardModel, tokenizer) -> None:
    """Raises ValueError unless the policy writes in the reward model's vocabulary: soft tokens mean nothing in another."""
    if model.tokenizer.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise ValueError(f"the reward model reads the vocabulary of {model.about.backbone}, the policy writes in another: train "
                         "one with train_reward.py --model, given the policy's model")
