"""DPO in one file: preference pairs, log-probabilities of both answers, loss, route, step. To fork it: cp rl_dpo.py rl_mine.py.

Direct Preference Optimization, Rafailov et al. 2023, https://arxiv.org/abs/2305.18290 (eq. 7); label smoothing (cDPO), Mitchell
2023, https://ericmitchell.ai/cdpo.pdf.

The reference policy is the same model with its branches off. The loss is named policy_loss, as in rl_ppo.py, so that the same
routes serve it. Log-probabilities are sums over an answer's tokens, the end of text that ends it included.
"""
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import routing
from adapters import adapter_tensors, branch_parameters, dropping, reference, set_adapter_tensors
from data import left_pad, right_pad
from losses import token_logprobs
from sampling import Law, Sampler


@dataclass
class Config:
    beta: float = 0.1
    """how strongly the policy is held to the reference: reward = beta * log(policy / reference)"""
    label_smoothing: float = 0.0
    """probability that a preference is the wrong way round, below .5"""
    loss_routes: str = ""
    """which branches the loss may train: an arrangement of routing.py, say ssl_rl_separate; empty: all"""
    lr: float = 3e-4
    """AdamW's learning rate for LoRA and MLP branches (full fine-tuning wants about 1e-6)"""
    lr_schedule: str = "constant"
    """constant, linear or cosine (down to 0 at max_steps)"""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """clips each branch's gradient norm; 0: never"""
    batch_size: int = 16
    """pairs a step"""
    micro_batch_size: int = 0
    """pairs per forward/backward; 0: all; never changes a gradient"""
    max_steps: int = 500
    max_tokens: int = 256
    """a pair's prompt and answer together; a longer pair is refused"""
    max_new_tokens: int = 64
    """of the samples that an evaluation draws, at temperature 1"""
    seed: int = 42

    def __post_init__(self):
        if self.lr_schedule not in (known := ("constant", "linear", "cosine")):
            raise ValueError(f"unknown --lr_schedule {self.lr_schedule!r}; known: {', '.join(known)}")
        for name in ("batch_size", "max_steps", "max_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "warmup_steps", "weight_decay", "max_grad_norm", "micro_batch_size"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must be at least 0, not {getattr(self, name)}")
        if not self.beta > 0:
            raise ValueError(f"--beta must be above 0, not {self.beta}: without it no preference counts")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing must be at least 0 and below .5, not {self.label_smoothing}")
        if self.loss_routes:
            routing.arrangement(self.loss_routes)

    @property
    def dual(self) -> bool:
        """Whether there are two branches, good and bad: never, since routes are by loss here."""
        return False

    def law(self) -> Law:
        return Law()


# --------------------------------------------------------------------------------------------------- the formulas


def dpo_loss(logprobs, ref_logprobs, beta: float, label_smoothing: float = 0.0):
    """-(1 - eps) log sigmoid(m) - eps log sigmoid(-m) per pair, m the margin of its answers' rewards beta log(pi / ref) (eq. 7).

    logprobs, ref_logprobs (2, n): chosen answers, then rejected. Returns losses (n,) and rewards (2, n).
    """
    rewards = beta * (logprobs - ref_logprobs)
    margin = rewards[0] - rewards[1]
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin), rewards


def answer_logprobs(model, ids, answer):
    """Summed log-probabilities (N,) of each row's answer, differentiable. ids (N, T) long, right-padded; answer (N, T) bool, True
    on the answer's tokens. There is a token before its first."""
    scored = answer[:, 1:]
    hidden = model.hidden(ids[:, :-1])[scored]  # the state at t - 1 scores token t; causal attention never sees the filling
    logprobs = token_logprobs(hidden, model.head_weight, ids[:, 1:][scored])
    return torch.zeros(scored.shape, dtype=logprobs.dtype, device=ids.device).masked_scatter(scored, logprobs).sum(1)


# ------------------------------------------------------------------------------------------- the loop, part by part


def encode_pairs(pairs, tokenizer, max_tokens: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) token ids of each of `pairs`, dicts of three texts; answers end as a sampled one does.

    Raises ValueError for a pair without a prompt token, whose answers are the same, or that does not fit max_tokens.
    """
    encoded = []
    for i, pair in enumerate(pairs):
        prompt = tokenizer.encode_prompt(pair["prompt"])
        chosen, rejected = (tokenizer.encode(pair[key]) + [tokenizer.eos_id] for key in ("chosen", "rejected"))
        if not prompt or chosen == rejected:
            raise ValueError(f"preference pair {i} has {'two equal answers' if prompt else 'an empty prompt'}: leave it out")
        if (length := len(prompt) + max(len(chosen), len(rejected))) > max_tokens:
            raise ValueError(f"preference pair {i} has {length} tokens, above the limit of {max_tokens}: leave it out")
        encoded.append((prompt, chosen, rejected))
    if not encoded:
        raise ValueError("no preference pair to train on")
    return encoded


def batch_of(n: int, step: int, size: int, seed: int) -> list[int]:
    """Indices of a step's pairs: a seeded shuffle of all n, then another; a function of the step, so there is nothing to save."""
    chosen = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, n)
        if place == 0 or not chosen:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(int(order[place]))
    return chosen


def stack(pairs, pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (2, n, T) and where they are the answer's (2, n, T) bool, chosen answers first."""
    texts = [prompt + answer for which in (1, 2) for prompt, answer in ((pair[0], pair[which]) for pair in pairs)]
    ids, mask = right_pad(texts, pad_id)
    starts = torch.tensor([len(pair[0]) for pair in pairs]).repeat(2)
    answer = mask & (torch.arange(ids.shape[1]) >= starts[:, None])
    return ids.to(device).unflatten(0, (2, -1)), answer.to(device).unflatten(0, (2, -1))


def update(model, optimizer, pairs, pad_id: int, config: Config, router=None) -> dict[str, float]:
    """One optimizer step on encoded pairs; the loss is their mean. Returns means to log, of the policy before the step."""
    optimizer.zero_grad(set_to_none=True)
    losses, rewards, logprobs = [], [], []
    for i in range(0, len(pairs), size := config.micro_batch_size or len(pairs)):
        ids, answer = stack(pairs[i : i + size], pad_id, model.device)
        both = ids.flatten(0, 1), answer.flatten(0, 1)
        with torch.no_grad(), reference(model) as base:
            ref = answer_logprobs(base, *both).unflatten(0, (2, -1))
        policy = answer_logprobs(model, *both).unflatten(0, (2, -1))
        loss, reward = dpo_loss(policy, ref, config.beta, config.label_smoothing)
        with router.route_gradients("policy_loss") if router else nullcontext():
            (loss.sum() / len(pairs)).backward()
        for kept, new in ((losses, loss), (rewards, reward), (logprobs, policy)):
            kept.append(new.detach())
    (chosen, rejected), (chosen_logps, rejected_logps) = torch.cat(rewards, 1), torch.cat(logprobs, 1)
    means = {
        "loss": torch.cat(losses), "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected, "logps/chosen": chosen_logps, "logps/rejected": rejected_logps,
    }  # fmt: skip
    metrics = {name: value.float().mean().item() for name, value in means.items()}
    metrics |= {f"grad_norm/{branch}": norm for branch, norm in routing.clip_per_branch(model, config.max_grad_norm).items()}
    if culprit := next((name for name, value in metrics.items() if not math.isfinite(value)), ""):
        what = f"{culprit} is {metrics[culprit]}"
        raise FloatingPointError(f"{what} (lower --lr {config.lr}?); the weights are as before this step")
    optimizer.step()
    return metrics


class Trainer:
    """What a run carries from step to step: pairs, optimizer, sampler. `step` is the whole algorithm.

    `pairs`: dicts with prompt, chosen and rejected, as corpus.preference_pairs yields them.
    """

    def __init__(self, model, env, tokenizer, config: Config, pairs):
        self.model, self.env, self.tokenizer, self.config = model, env, tokenizer, config
        self.pairs = encode_pairs(pairs, tokenizer, min(config.max_tokens, model.config.context))
        self.sampler, self.steps_done = Sampler(model), 0
        self.router = routing.GradientRouter(model, routing.arrangement(config.loss_routes)[1]) if config.loss_routes else None
        parameters = [p for group in branch_parameters(model).values() for p in group.values()]
        self.optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)

    def step(self):
        """One step: pairs, loss, route, step. Returns metrics, and a function that samples a text to read."""
        config, step, start = self.config, self.steps_done, time.perf_counter()
        chosen = [self.pairs[i] for i in batch_of(len(self.pairs), step, config.batch_size, config.seed)]
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * rate(step, config)
        with dropping(self.model, config.seed * 1_000_003 + step):
            metrics = update(self.model, self.optimizer, chosen, self.tokenizer.pad_id, config, self.router)
        exact = self.model.device.type == "cpu"  # elsewhere a kernel chosen by gradient mode may round differently
        if step == 0 and abs(metrics["rewards/margins"]) > (0 if exact else 1e-3) and self.model.adapter.spec.kind != "full":
            raise AssertionError(f"a fresh adapter's margin must be 0, not {metrics['rewards/margins']}: a branch starts off 0")
        metrics |= {"lr": config.lr * rate(step, config)}
        tokens = sum(2 * len(prompt) + len(a) + len(b) for prompt, a, b in chosen)
        metrics["time/tokens_per_s"] = tokens / (time.perf_counter() - start)
        self.steps_done += 1
        return metrics, lambda: self.sample(chosen[0][0], step)

    def sample(self, prompt: list[int], step: int) -> str:
        """A prompt and what the model, as it is now, answers."""
        ids, mask = left_pad([prompt], self.tokenizer.pad_id)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        stop, pad = self.tokenizer.stop_ids, self.tokenizer.pad_id
        self.sampler.refresh()
        rollout = self.sampler(ids, mask, 1, self.config.max_new_tokens, stop, pad, generator, self.config.law())
        answer = self.tokenizer.decode_completion(prompt, rollout.tokens[0][rollout.mask[0]].tolist())
        return self.tokenizer.decode_prompt(prompt) + answer

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors of the adapter, everything else): what `restore` needs to go on bitwise equal."""
        return adapter_tensors(self.model), {"optimizer": self.optimizer.state_dict(), "steps_done": self.steps_done}

    def restore(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        set_adapter_tensors(self.model, tensors, "checkpoint")
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]


def rate(step: int, config: Config) -> float:
    """The learning rate's factor at a step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = 1 - step / config.max_steps
    if config.lr_schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return warm * (1.0 if config.lr_schedule == "constant" else left)
