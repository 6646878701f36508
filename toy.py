"""A world small enough to enumerate: the exact gradient of E[reward] - beta KL, to hold estimators of it against.

    env, model = Toy(), policy(seed=0)                    # six tokens, completions of at most three: 156 of each prompt
    exact_loss(model, env, beta=0.1).backward()           # every completion, weighted by its probability; no sampling

The law is the model's own (temperature 1, nothing truncated). The score is a bounded function of which token stands where, not
linear in any of them: a relaxed token is worth something else than the tokens that it is a mean of, so that relaxing costs bias.
"""
from types import SimpleNamespace

import torch

from adapters import attach, preset, reference
from data import left_pad, right_pad
from envs import Scores
from model import Decoder, ModelConfig

PAD, EOS, VOCAB, LENGTH = 0, 1, 6, 3  # the padding token may be sampled as any other
TOKENIZER = SimpleNamespace(
    pad_id=PAD, eos_id=EOS, stop_ids=(EOS,), encode_prompt=lambda text: [int(digit) for digit in text],
    decode_completions=lambda prompts, completions: ["".join(map(str, ids)) for ids in completions],
)  # fmt: skip


class Toy:
    """An environment whose texts are digits, a token each. `prompts`: of one token or more. `length`: tokens of a completion at
    most. `seed` draws the reward, sigmoid(w . tanh(sum over t of W[t, token_t])); an end of text adds nothing to it."""

    reward, held_out, about = SimpleNamespace(name="toy"), {}, ""

    def __init__(self, prompts: tuple[str, ...] = ("2", "34", "5"), length: int = LENGTH, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self._prompts, self.length = list(prompts), length
        self.W = 2 * torch.randn(length, VOCAB, 8, generator=generator)
        self.W[:, EOS] = 0
        self.w = torch.randn(8, generator=generator)

    def prompts(self, split: str) -> list[str]:
        return self._prompts

    def soft_reward(self, prompts, ids, prompt_mask, soft, mask) -> torch.Tensor:
        """Rewards (N,) of soft tokens (N, T, V), valid where mask (N, T); those of `score` where they are one-hot."""
        W = self.W[: soft.shape[1]].to(soft)
        return (torch.einsum("ntv,tvh->nh", soft * mask[..., None], W).tanh() @ self.w.to(soft)).sigmoid()

    def score(self, prompts: list[str], completions: list[str], generator=None) -> Scores:
        tokens, mask = right_pad([[int(digit) for digit in text] for text in completions], PAD)
        soft = torch.nn.functional.one_hot(tokens, VOCAB).float()
        reward, none = self.soft_reward(prompts, None, None, soft, mask), torch.zeros(len(completions), dtype=torch.bool)
        return Scores(reward, reward, none, torch.zeros_like(reward), none, ~none, none, {})


def policy(seed: int = 0, lora_config: str = "r2") -> Decoder:
    """A random decoder of two layers with a fresh adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(ModelConfig("llama", VOCAB, 16, 2, 4, 2, 4, 24, 16, tied=False, rotary_dim=4))
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, 0, 0.3)
    return attach(model, preset(lora_config, dual=False), seed=seed)


def completions(length: int) -> list[list[int]]:
    """All that can be sampled: each ended by an end of text, or of `length` tokens."""
    if length == 0:
        return [[]]
    return [[EOS], *([token, *rest] for token in range(VOCAB) if token != EOS for rest in completions(length - 1))]


def log_probabilities(model: Decoder, prompts: list[str], answers: list[list[int]]) -> torch.Tensor:
    """(P, A): log p(answer | prompt), end of text included, by a plain forward pass; differentiable."""
    ids, mask = (x.repeat_interleave(len(answers), 0) for x in left_pad([TOKENIZER.encode_prompt(p) for p in prompts], PAD))
    tokens, valid = (x.repeat(len(prompts), 1) for x in right_pad(answers, PAD))
    logits = model(torch.cat([ids, tokens], 1), torch.cat([mask, valid], 1))[:, ids.shape[1] - 1 : -1]
    picked = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return (picked * valid).sum(1).view(len(prompts), -1)


def exact_loss(model: Decoder, env: Toy, beta: float) -> torch.Tensor:
    """-(E[reward] - beta KL(policy || reference)), a mean over prompts; every expectation a sum over all completions."""
    prompts, answers = env.prompts("train"), completions(env.length)
    rewards = env.score(prompts, TOKENIZER.decode_completions(prompts, answers)).reward  # the same after every prompt
    log_p = log_probabilities(model, prompts, answers)
    with torch.no_grad(), reference(model) as base:
        log_q = log_probabilities(base, prompts, answers)
    return -(log_p.exp() * (rewards - beta * (log_p - log_q))).sum(1).mean()
