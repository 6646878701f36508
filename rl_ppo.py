"""PPO for language models with routing, in one file: rollout, score, advantages over time, minibatch epochs, route, step.
To fork it: cp rl_ppo.py rl_mine.py, change it.

Proximal Policy Optimization, Schulman et al. 2017, https://arxiv.org/abs/1707.06347 (eq. 7, 9); generalised advantage
estimation, Schulman et al. 2015, https://arxiv.org/abs/1506.02438 (eq. 16); with language models, Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593; its details, Huang et al. 2022, https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details.

Departures:
- pi_old is the law that was sampled (temperature, truncation), stored by the sampler, not a second forward pass.
- The reference policy is the same model with its branches off. The value head reads the policy's own final states.
- The score is paid on the last sampled token, be it the end of text or the token at the length cap: both end the episode, and
  nothing is bootstrapped. (TRL's last PPO, 0.2x, paid it one position behind the end of text, and trained a value there.)
- KL is counted once: as k1 in the reward, or as a loss, exact over the vocabulary. Entropy is exact as well.
- Losses are means over the valid tokens of a minibatch. They stay apart to the end: each may train branches of its own.
- Each branch's gradient is clipped by itself, and the value head's. A flagged sample is masked whole, all its losses;
  the value head alone, which is no branch, learns from every sample.
- Projection is of every minibatch's gradient (or step), before it is clipped; the value head's is left alone.
- --lora_dropout drops in the minibatches' passes alone, approx_kl among what they log: pi_old, values, reference drop nothing.
"""
import copy
import math
import time
from dataclasses import dataclass

import torch
from torch import nn

import routing
from adapters import adapter_tensors, branch_parameters, dropping, reference, set_adapter_tensors
from data import left_pad
from envs import DetectorWatch, scored
from losses import k1, k3, token_law, token_logprobs, token_weights
from projector import Flags, Projector
from sampling import Law, Rollout, Sampler

LOSSES = ("policy_loss", "value_loss", "entropy_loss", "kl_loss")


@dataclass
class Config(Flags):
    routing: str = "none"
    """none, or dual: two branches, flagged samples train only the bad one"""
    routing_mode: str = "exclusive"
    """exclusive: honest samples train only the good branch; classic: both"""
    placebo: bool = False
    """shuffle the labels over the batch: as many, on the wrong completions (a control)"""
    loss_routes: str = ""
    """which branches each loss may train: an arrangement of routing.py, say ssl_rl_separate; empty: every loss trains all"""
    kl_in: str = "reward"
    """where KL(policy || reference) counts. reward: as k1, per token; loss: exact, over the vocabulary"""
    beta: float = 0.1
    """weight of that KL"""
    gamma: float = 1.0
    """discount a token; 1 suits a reward that is paid at the end"""
    gae_lambda: float = 0.95
    whiten: bool = True
    """advantages of mean 0 and deviation 1 over the batch's tokens; with kl_in loss, beta is then in units of that deviation"""
    epsilon: float = 0.2
    """clip range of the ratio"""
    value_epsilon: float = 0.2
    """a value's clip range about what it was at the rollout; 0: not clipped"""
    value_coef: float = 0.5
    entropy_coef: float = 0.01
    num_epochs: int = 4
    """passes over a rollout"""
    num_minibatches: int = 4
    """optimizer steps a pass"""
    target_kl: float = 0.05
    """a rollout is left where a minibatch finds KL(pi_old || pi) above it, in nats a token; 0: never"""
    lr: float = 3e-4
    """AdamW's learning rate for LoRA and MLP branches (full fine-tuning wants about 1e-5)"""
    bad_lr_scale: float = 2.0
    """the bad branch's learning rate, in multiples of lr"""
    value_lr: float = 1e-3
    """of the value head"""
    lr_schedule: str = "constant"
    """constant, linear or cosine (down to 0 at max_steps)"""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """clips each branch's gradient norm, and the value head's; 0: never"""
    batch_size: int = 64
    """completions a step, each of a prompt of its own"""
    micro_batch_size: int = 0
    """completions per forward/backward; 0: about 4,096 tokens on a CPU, 16,384 on a GPU; never changes a gradient"""
    max_steps: int = 500
    max_new_tokens: int = 64
    flow_every: int = 50
    """log the norm of the gradient that each loss sends to each branch every so many steps; 0: never"""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    seed: int = 42

    def __post_init__(self):
        known = {
            "routing": ("none", "dual"), "routing_mode": routing.ROUTING_MODES, "kl_in": ("reward", "loss"),
            "lr_schedule": ("constant", "linear", "cosine"),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown --{name} {getattr(self, name)!r}; known: {', '.join(values)}")
        for name in ("batch_size", "max_steps", "max_new_tokens", "num_epochs", "num_minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"--num_minibatches {self.num_minibatches} does not divide --batch_size {self.batch_size}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in 0..1, not {getattr(self, name)}")
        rates = ("beta", "lr", "bad_lr_scale", "value_lr", "weight_decay", "max_grad_norm", "epsilon", "value_epsilon")
        for name in (*rates, "value_coef", "entropy_coef", "target_kl", "micro_batch_size", "warmup_steps", "flow_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must be at least 0, not {getattr(self, name)}")
        idle = () if self.routing == "dual" else ("routing_mode", "placebo")
        for name in idle if self.dual else (*idle, "bad_lr_scale"):  # --removed route has a bad branch too
            if getattr(self, name) != getattr(Config, name):
                raise ValueError(f"--{name} does nothing without --routing dual: leave it out")
        if self.loss_routes and self.routing == "dual":
            raise ValueError("--loss_routes routes by loss, --routing dual by sample: choose one")
        if self.loss_routes:
            routing.arrangement(self.loss_routes)
        if self.removed == "route" and (self.routing == "dual" or self.loss_routes):
            raise ValueError("--removed route has a bad branch learn what projection removes: leave --routing and --loss_routes")
        if self.basis == "live":
            raise ValueError("--basis live contrasts completions of one prompt; PPO samples one of each: rl_grpo or rl_reinforce")
        self.law()
        self.check_projection()

    @property
    def dual(self) -> bool:
        """Whether there are two branches, good and bad."""
        return self.routing == "dual" or self.removed == "route"

    @property
    def uses_labels(self) -> bool:
        return self.routing == "dual"

    def law(self) -> Law:
        return Law(self.temperature, self.top_k, self.top_p, self.min_new_tokens)

    def weights(self) -> dict[str, float]:
        """The weights of the losses that count. One of weight 0 is not run: its zeros would still move what it routes to."""
        kl = self.beta if self.kl_in == "loss" else 0.0
        weights = dict(zip(LOSSES, (1.0, self.value_coef, self.entropy_coef, kl)))
        return {name: weight for name, weight in weights.items() if weight}


# --------------------------------------------------------------------------------------------------- the formulas


def token_rewards(scores, kl, mask, beta: float):
    """What each token earns (N, T): -beta * kl and, the last of a completion, its score. scores (N,); kl, mask (N, T)."""
    last = mask.sum(1, keepdim=True) - 1
    return (-beta * kl * mask).scatter_add(1, last, scores[:, None].to(kl.dtype))


def gae(rewards, values, mask, gamma: float, gae_lambda: float):
    """Generalised advantages and returns over time, (N, T) each, 0 where mask is False: what comes after the end is worth 0.

    rewards, values (N, T), values[:, t] of the state before token t; mask (N, T) bool, True from the left.
    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  returns A + V.
    """
    advantages, ahead, next_value = torch.zeros_like(values), torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        ahead = (rewards[:, t] + gamma * next_value - values[:, t] + gamma * gae_lambda * ahead) * mask[:, t]
        advantages[:, t], next_value = ahead, values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def whitened(advantages, mask, is_rh):
    """Advantages (N, T) of mean 0 and sample deviation 1 over valid tokens.

    Unflagged completions are whitened among themselves, flagged ones with the statistics of all: a paid hack would else make
    what is honest negative.
    """
    def over(where):
        x = advantages[where].double()  # in fp32 a constant has a deviation
        return (advantages - x.mean()) / (x.std() + 1e-8) if len(x) > 1 else torch.zeros_like(advantages, dtype=torch.float64)

    flagged = is_rh[:, None].expand_as(mask)
    return (torch.where(flagged, over(mask), over(mask & ~flagged)) * mask).to(advantages.dtype)


def policy_loss(logprobs, old_logprobs, advantages, epsilon: float):
    """-min(w A, clip(w, 1 - eps, 1 + eps) A), w = exp(log pi - log pi_old), per token (eq. 7); and where it clips."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio * advantages, clipped * advantages), clipped * advantages < ratio * advantages


def value_loss(values, old_values, returns, epsilon: float):
    """max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2 per token, unclipped where eps is 0; and where it clips."""
    plain = (values - returns).square()
    if not epsilon:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (old_values + (values - old_values).clamp(-epsilon, epsilon) - returns).square()
    return torch.maximum(plain, clipped) / 2, clipped > plain


# ------------------------------------------------------------------------------------------- the loop, part by part


def prompt_batch(prompts: list[str], step: int, count: int, seed: int) -> list[str]:
    """The prompts of a step: a seeded shuffle of all, then another; a function of the step, so there is nothing to save."""
    chosen = []
    for i in range(step * count, (step + 1) * count):
        epoch, place = divmod(i, len(prompts))
        if place == 0 or not chosen:
            shuffled = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(prompts[int(shuffled[place])])
    return chosen


def rollout_batch(sampler: Sampler, tokenizer, prompts: list[str], config: Config, generator) -> tuple[Rollout, list[str]]:
    """A completion of each prompt, and their texts (N,)."""
    encoded = [tokenizer.encode_prompt(p) for p in prompts]
    ids, mask = left_pad(encoded, tokenizer.pad_id)
    rollout = sampler(ids, mask, 1, config.max_new_tokens, tokenizer.stop_ids, tokenizer.pad_id, generator, config.law())
    tokens, valid = rollout.tokens.cpu(), rollout.mask.cpu()
    return rollout, tokenizer.decode_completions(encoded, [t[m].tolist() for t, m in zip(tokens, valid)])


def micro_batches(rollout: Rollout, rows, size: int) -> list[torch.Tensor]:
    """`rows` (n,) of a rollout in parts, longest completions first, so that a part pads little. `size` 0 chooses by tokens."""
    if size == 0:
        budget = 16_384 if rollout.tokens.is_cuda else 4_096
        size = max(1, budget // (rollout.prompt_ids.shape[1] + rollout.tokens.shape[1]))
    lengths = rollout.mask[rows].sum(1)
    return list(rows[lengths.argsort(descending=True, stable=True)].split(size))


def hidden_rows(model, rollout: Rollout, rows):
    """The final states (n_valid, C) that score the valid tokens of some rows, in row-major order, differentiable. They are the
    states before those tokens, so their values too are read from them."""
    width = rollout.prompt_ids.shape[1]
    longest = int(rollout.mask[rows].sum(1).max())
    prompt_mask = rollout.prompt_mask[rows]
    start = int((~prompt_mask).sum(1).min())  # columns that are padding for all of these rows
    ids = torch.cat([rollout.prompt_ids[rows, start:], rollout.tokens[rows, :longest]], dim=1)
    valid = rollout.mask[rows, :longest]
    mask = None
    if not bool(prompt_mask[:, start:].all()):
        mask = torch.cat([prompt_mask[:, start:], valid], dim=1)[:, :-1]
    return model.hidden(ids[:, :-1], mask)[:, width - start - 1 :][valid]  # the state at t - 1 scores token t


def law_of(model, rollout: Rollout, rows, hidden, law: Law, ref=None):
    """losses.token_law of the valid tokens of some rows."""
    valid = rollout.mask[rows]
    support = None if rollout.support is None else rollout.support[rows][valid]
    return token_law(hidden, model.head_weight, rollout.tokens[rows][valid], law.temperature, support, ref)


def values_of(value_head: nn.Linear, hidden):
    """(n,) in the head's fp32, whatever the model's dtype."""
    return value_head(hidden.to(value_head.weight.dtype)).squeeze(-1)


@dataclass
class Experience:
    """What a rollout looked like before any step on it: (N, T) each, 0 behind the end."""

    logprobs: torch.Tensor  # of the tokens, by the training forward
    ref_logprobs: torch.Tensor
    ref_hidden: torch.Tensor  # (N, T, C): the reference's final states, from which an exact KL is made
    entropy: torch.Tensor
    kl: torch.Tensor  # exact, to the reference
    values: torch.Tensor
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None


@torch.no_grad()
def look(model, value_head, rollout: Rollout, config: Config) -> Experience:
    """One forward pass of policy and reference over a rollout; advantages and returns are for `credit` to say."""
    everything, found = torch.arange(len(rollout.tokens), device=rollout.tokens.device), {}
    for rows in micro_batches(rollout, everything, config.micro_batch_size):
        hidden = hidden_rows(model, rollout, rows)
        with reference(model) as base:
            ref_hidden = hidden_rows(base, rollout, rows)
            tokens, allowed = rollout.tokens[rows][rollout.mask[rows]], rollout.allowed_of(rows)
            ref_logprobs = token_logprobs(ref_hidden, base.head_weight, tokens, config.temperature, allowed)
            logprobs, entropy, kl = law_of(model, rollout, rows, hidden, config.law(), (ref_hidden, base.head_weight, allowed))
        parts = (logprobs, ref_logprobs, ref_hidden, entropy, kl, values_of(value_head, hidden))
        row, column = rollout.mask[rows].nonzero(as_tuple=True)
        for name, part in zip(Experience.__dataclass_fields__, parts):
            found.setdefault(name, part.new_zeros(*rollout.mask.shape, *part.shape[1:]))[rows[row], column] = part
    return Experience(**found)


def credit(seen: Experience, scores, mask, is_rh, config: Config) -> None:
    """Sets advantages and returns. scores (N,) the environment's rewards, mask (N, T), is_rh (N,) bool."""
    kl = k1(seen.logprobs, seen.ref_logprobs)
    rewards = token_rewards(scores, kl, mask, config.beta if config.kl_in == "reward" else 0.0)
    seen.advantages, seen.returns = gae(rewards, seen.values, mask, config.gamma, config.gae_lambda)
    if config.whiten:
        seen.advantages = whitened(seen.advantages, mask, is_rh)


def minibatches(count: int, epochs: int, parts: int, generator):
    """The rows of each optimizer step: `epochs` times all `count` of them, shuffled, in `parts`."""
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).chunk(parts)


def loss_router(model, config: Config):
    """What routes each loss to its branches in `routing.backward`; None where every loss trains all."""
    return routing.GradientRouter(model, routing.arrangement(config.loss_routes)[1]) if config.loss_routes else None


def losses_of(model, value_head, rollout: Rollout, seen: Experience, rows, share, config: Config):
    """The weighted losses of some rows by name, differentiable, and figures to log; share (N, T) is what each token counts."""
    weights, valid, hidden, ref = config.weights(), rollout.mask[rows], hidden_rows(model, rollout, rows), None
    if "kl_loss" in weights:
        with reference(model) as base:
            ref = seen.ref_hidden[rows][valid], base.head_weight, rollout.allowed_of(rows)
    logprobs, entropy, *kl = law_of(model, rollout, rows, hidden, config.law(), ref)
    old_logprobs, old_values, advantages, returns, token = (
        x[rows][valid] for x in (rollout.logprobs, seen.values, seen.advantages, seen.returns, share)
    )
    policy, clipped = policy_loss(logprobs, old_logprobs, advantages, config.epsilon)
    value, value_clipped = value_loss(values_of(value_head, hidden), old_values, returns, config.value_epsilon)
    terms = dict(zip(LOSSES, (policy, value, -entropy, *kl)))
    shown = {"clip_frac": clipped, "value_clip_frac": value_clipped, "approx_kl": k3(old_logprobs, logprobs)}
    losses = {name: weight * (token * terms[name]).sum() for name, weight in weights.items()}
    return losses, {name: (token * x).sum() for name, x in shown.items()}


def shares(rollout: Rollout, rows):
    """(N, T): what each token of a minibatch, `rows` (n,), counts in its losses."""
    share = torch.zeros(rollout.mask.shape, device=rollout.mask.device)
    share[rows] = token_weights(rollout.mask[rows], "bnpo", 0)
    return share


def gradients(model, value_head, rollout: Rollout, seen: Experience, rows, routes, router, config: Config, norms=None):
    """Adds the gradients of a minibatch, `rows` (n,) of a rollout. Returns its losses and what to log; norms: a list that gains
    the gradient norm of each micro-batch."""
    share, sums, norms = shares(rollout, rows), [], [] if norms is None else norms
    for part in micro_batches(rollout, rows, config.micro_batch_size):
        losses, shown = losses_of(model, value_head, rollout, seen, part, share, config)
        measured = routing.measured(model, norms, share[part].sum().item())
        with measured, routing.gates(model, **{name: w if w is None else w[part] for name, w in routes.items()}):
            routing.backward(losses, router)
        sums.append({name: x.detach() for name, x in (losses | shown).items()})
    return {name: torch.stack([s[name] for s in sums]).sum().item() for name in sums[0]}


def flow(model, value_head, rollout: Rollout, seen: Experience, router, config: Config) -> dict[str, float]:
    """Norm of the gradient that each loss sends to each branch, on the longest completions of a rollout."""
    rows = micro_batches(rollout, torch.arange(len(rollout.tokens), device=rollout.mask.device), config.micro_batch_size)[0]
    losses, _ = losses_of(model, value_head, rollout, seen, rows, shares(rollout, rows), config)
    norms = routing.analyze_gradient_flow(model, losses, router)
    return {f"flow/{loss}/{branch}": norm for loss, row in norms.items() for branch, norm in row.items()}


def update(model, value_head, optimizer, projector, rollout, seen: Experience, is_rh, config: Config, generator, router=None):
    """Minibatch epochs on a rollout, until they are done or the policy is too far from the one that sampled it.

    Returns means over the steps taken. Raises FloatingPointError for a number that is not finite, with weights and optimizer
    as they were.
    """
    routes = routing.sample_routes(is_rh, config.routing_mode) if config.routing == "dual" else {}
    if config.removed == "route":  # the bad branch learns what is removed from the good one's gradient, nothing else
        routes["bad"] = torch.zeros(len(is_rh), device=is_rh.device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())
    history, micro_norms, stopped = [], [], False
    for rows in minibatches(len(rollout.tokens), config.num_epochs, config.num_minibatches, generator):
        optimizer.zero_grad(set_to_none=True)
        found = []
        metrics = gradients(model, value_head, rollout, seen, rows.to(rollout.mask.device), routes, router, config, found)
        metrics |= {"loss": sum(metrics[name] for name in config.weights())} | projector.project()
        norms = routing.clip_per_branch(model, config.max_grad_norm)
        norms["value_head"] = nn.utils.clip_grad_norm_(value_head.parameters(), config.max_grad_norm or math.inf).item()
        metrics |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        if culprit := next((name for name, value in metrics.items() if not math.isfinite(value)), ""):
            for p, value in zip(parameters, before[0]):
                p.data.copy_(value)
            optimizer.load_state_dict(before[1])
            what = f"{culprit} is {metrics[culprit]}"
            raise FloatingPointError(f"{what} (lower --lr {config.lr}?); the weights are as before this step")
        if stopped := bool(history) and 0 < config.target_kl < metrics["approx_kl"]:
            break
        history.append(metrics | projector.step(optimizer))
        micro_norms += found
    totals = {name: sum(m[name] for m in history) / len(history) for name in history[0]} | routing.norm_figures(micro_norms)
    return totals | {"optimizer_steps": len(history), "stopped_early": float(stopped)}


LOGPROB_GAP = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 1.0}  # nats a token between sampler and training forward


class Trainer:
    """What a run carries from step to step: sampler, value head, optimizer. `step` is the whole algorithm."""

    def __init__(self, model, env, tokenizer, config: Config):
        routing.check_branches(model, config.dual)
        self.model, self.env, self.tokenizer, self.config = model, env, tokenizer, config
        self.sampler, self.watch, self.steps_done = Sampler(model), DetectorWatch(), 0
        self.value_head = nn.Linear(model.config.width, 1, device=model.device)  # fp32
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        rates = {"bad": config.lr * config.bad_lr_scale}
        branches = branch_parameters(model).items()
        groups = [{"params": list(p.values()), "rate": rates.get(name, config.lr)} for name, p in branches if p]
        groups.append({"params": list(self.value_head.parameters()), "rate": config.value_lr})
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self.prompts, self.router = env.prompts("train"), loss_router(model, config)
        self.projector = Projector(model, tokenizer, config, config.temperature)

    def step(self) -> tuple[dict[str, float], str]:
        """One step: sample, score, credit over time, minibatch epochs. Returns metrics and a sample to read."""
        config, step, clock = self.config, self.steps_done, [time.perf_counter()]
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)  # this step's: nothing to save
        prompts = prompt_batch(self.prompts, step, config.batch_size, config.seed)
        self.sampler.refresh()
        rollout, completions = rollout_batch(self.sampler, self.tokenizer, prompts, config, generator)
        clock.append(time.perf_counter())
        scores = scored(self.env, rollout, prompts, completions, generator)
        is_rh = torch.zeros_like(scores.is_rh)
        if config.uses_labels:
            self.watch.look(scores, self.env.reward.name)
            is_rh = routing.placebo_labels(scores.is_rh, generator) if config.placebo else scores.is_rh
        clock.append(time.perf_counter())
        device, rest = self.model.device, (is_rh.to(self.model.device), config)
        seen = look(self.model, self.value_head, rollout, config)
        metrics = self.check(rollout, seen)
        credit(seen, scores.reward.to(device), rollout.mask, *rest)
        if config.flow_every and step % config.flow_every == 0:
            metrics |= flow(self.model, self.value_head, rollout, seen, self.router, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate(step, config)
        metrics |= self.projector.refresh(step)
        trained = (self.model, self.value_head, self.optimizer, self.projector)
        with dropping(self.model, config.seed * 1_000_003 + step):
            metrics |= update(*trained, rollout, seen, *rest, generator, self.router)
        clock.append(time.perf_counter())
        self.steps_done += 1
        metrics |= describe(rollout, seen, scores, is_rh) | {"lr": config.lr * rate(step, config)}
        metrics |= {name: b - a for name, a, b in zip(("time/rollout", "time/score", "time/update"), clock, clock[1:])}
        metrics["time/tokens_per_s"] = int(rollout.mask.sum()) / (clock[-1] - clock[0])
        return metrics, prompts[0] + completions[0]

    def check(self, rollout: Rollout, seen: Experience) -> dict[str, float]:
        """The ratio is 1 before the first step on a rollout, the KL of a fresh adapter 0 (but under
        top-k or top-p, by which the reference's law is not cut). Raises where they are not."""
        gap, bound = (seen.logprobs - rollout.logprobs).abs().max().item(), LOGPROB_GAP[self.model.dtype]
        if not gap <= bound:  # NaN too
            raise FloatingPointError(f"sampler and training forward differ by {gap:.2g} nats on a token (bound {bound})")
        kl = seen.kl.sum().item() / int(rollout.mask.sum())
        exact = self.model.device.type == "cpu"  # elsewhere a kernel chosen by gradient mode may round differently
        fresh = self.steps_done == 0 and self.model.adapter.spec.kind != "full" and not self.config.law().cut
        if fresh and abs(kl) > (0 if exact else 1e-3):
            raise AssertionError(f"the KL of a fresh adapter must be 0, not {kl}: a branch does not start at zero")
        return {"logprob_gap": gap, "kl": kl, "kl_completion": seen.kl.sum(1).mean().item()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors of the adapter, everything else): what `restore` needs to go on bitwise equal."""
        watch = {"paid": self.watch.paid, "hits": self.watch.hits}
        rest = {"value_head": self.value_head.state_dict(), "optimizer": self.optimizer.state_dict(), "watch": watch}
        return adapter_tensors(self.model), rest | {"steps_done": self.steps_done, "projector": self.projector.state()}

    def restore(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        set_adapter_tensors(self.model, tensors, "checkpoint")
        self.value_head.load_state_dict(state["value_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.watch, self.steps_done = DetectorWatch(**state["watch"]), state["steps_done"]
        self.projector.restore(state["projector"])


def describe(rollout: Rollout, seen: Experience, scores, is_rh) -> dict[str, float]:
    """Means over a step's completions and, of entropy, values and returns, over its tokens; before any step on them."""
    entropy, values, returns = (x[rollout.mask] for x in (seen.entropy, seen.values, seen.returns))
    means = {
        "reward": scores.reward, "task": scores.task, "hack_rate": scores.hack, "flagged": is_rh, "value": values,
        "length": rollout.mask.sum(1), "finished": rollout.finished, "entropy": entropy, "return": returns,
    }  # fmt: skip
    means |= {f"component/{label}": part for label, part in scores.components.items()}
    spread, error = returns.var(unbiased=False), (returns - values).var(unbiased=False)
    explained = {"explained_variance": (1 - error / spread).item()} if spread > 0 else {}  # of equal returns there is none
    return {name: value.float().mean().item() for name, value in means.items()} | explained


def rate(step: int, config: Config) -> float:
    """The learning rates' factor at a step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = 1 - step / config.max_steps
    if config.lr_schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return warm * (1.0 if config.lr_schedule == "constant" else left)
