"""REINFORCE for language models with routing, in one file: rollout, score, subtract a baseline, route, step.
To fork it: cp rl_reinforce.py rl_mine.py, change it.

REINFORCE, Williams 1992, https://doi.org/10.1007/BF00992696; the leave-one-out baseline, Kool et al. 2019,
https://openreview.net/forum?id=r1lgTGL5DE; with language models, Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740.

    grad E[r(y)] - beta grad KL(policy || reference) = E[(r(y) - beta log pi(y) / ref(y) - b) grad log pi(y)],  b not of y

Departures:
- pi is the law that was sampled (temperature, truncation). The reference policy is the same model with its branches off.
- log pi(y) is a sum over tokens, and the mean is over completions: a mean over tokens too would be the gradient of something
  else. Advantages are neither whitened nor clipped, and a rollout is stepped on once.
- A baseline never holds the completion that it is subtracted from, or the estimate would be biased: `ema` is of earlier steps
  alone, `loo` of the prompt's other completions.
- Under routing unflagged completions have baselines of unflagged ones: paid hacks would else make what is honest negative.
- Each branch's gradient is clipped by itself. A flagged sample is masked whole, its KL with its reward.
- --lora_dropout drops in the passes that make gradients alone, not in the sampler, the reference and what is logged.
"""
import math
import time
from dataclasses import dataclass

import torch

import routing
from adapters import adapter_tensors, branch_parameters, dropping, reference, set_adapter_tensors
from data import left_pad
from envs import DetectorWatch, scored
from losses import group_stats, k1, token_law, token_logprobs
from projector import Flags, Projector
from sampling import Law, Rollout, Sampler

BASELINES = ("ema", "loo", "none")
LOGPROB_GAP = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 1.0}  # nats a token between sampler and training forward


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
    baseline: str = "ema"
    """ema: moving average of earlier steps' mean returns; loo: mean of the prompt's other completions; none: 0"""
    baseline_momentum: float = 0.9
    """what --baseline ema keeps of its value at each step; it is 0 at the first step, and at the second the first one's mean"""
    kl_in: str = "reward"
    """where KL(policy || reference) counts. reward: as k1, summed over the completion; loss: exact, over the vocabulary"""
    beta: float = 0.1
    """weight of that KL"""
    lr: float = 3e-4
    """AdamW's learning rate for LoRA and MLP branches (full fine-tuning wants about 1e-5)"""
    bad_lr_scale: float = 2.0
    """the bad branch's learning rate, in multiples of lr"""
    lr_schedule: str = "constant"
    """constant, linear or cosine (down to 0 at max_steps)"""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """clips each branch's gradient norm; 0: never"""
    batch_size: int = 64
    """completions a step"""
    num_generations: int = 1
    """completions a prompt; --baseline loo needs two or more"""
    micro_batch_size: int = 0
    """completions per forward/backward; 0: about 4,096 tokens on a CPU, 16,384 on a GPU; never changes a gradient"""
    max_steps: int = 500
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    seed: int = 42

    def __post_init__(self):
        known = {
            "routing": ("none", "dual"), "routing_mode": routing.ROUTING_MODES, "baseline": BASELINES,
            "kl_in": ("reward", "loss"), "lr_schedule": ("constant", "linear", "cosine"),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown --{name} {getattr(self, name)!r}; known: {', '.join(values)}")
        least = dict.fromkeys(("batch_size", "num_generations", "max_steps", "max_new_tokens"), 1)
        rates = ("beta", "lr", "bad_lr_scale", "weight_decay", "max_grad_norm", "micro_batch_size", "warmup_steps")
        for name, bound in (least | dict.fromkeys(rates, 0)).items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"--{name} must be at least {bound}, not {getattr(self, name)}")
        dual, group = self.routing == "dual", self.num_generations
        for message, wrong in {
            f"--num_generations {group} does not divide --batch_size {self.batch_size}": self.batch_size % group,
            "--baseline loo and --basis live compare the completions of a prompt: --num_generations 2 or more":
                group < 2 and (self.baseline == "loo" or self.basis == "live"),
            f"--baseline_momentum must lie in 0..1, not {self.baseline_momentum}": not 0 <= self.baseline_momentum <= 1,
            "--loss_routes routes by loss, --routing dual by sample: choose one": dual and self.loss_routes,
            "--removed route has a bad branch learn what projection removes: leave --routing and --loss_routes":
                self.removed == "route" and (dual or self.loss_routes),
        }.items():  # fmt: skip
            if wrong:
                raise ValueError(message)
        uses = {"routing_mode": (dual, "--routing dual"), "bad_lr_scale": (self.dual, "--routing dual"),
                "placebo": (self.uses_labels, "--routing dual"), "baseline_momentum": (self.baseline == "ema", "--baseline ema")}
        for name, (used, what) in uses.items():
            if not used and getattr(self, name) != getattr(Config, name):
                raise ValueError(f"--{name} does nothing without {what}: leave it out")
        if self.loss_routes:
            routing.arrangement(self.loss_routes)
        self.law()
        self.check_projection()

    @property
    def dual(self) -> bool:
        """Whether there are two branches, good and bad."""
        return self.routing == "dual" or self.removed == "route"

    @property
    def uses_labels(self) -> bool:
        return self.routing == "dual" or self.basis == "live"

    def law(self) -> Law:
        return Law(self.temperature, self.top_k, self.top_p, self.min_new_tokens)


def leave_one_out(returns, num_generations: int, is_rh):
    """Returns (N,) less the mean of the others of their group of consecutive ones: r - mean_others = (r - mean) n / (n - 1).

    is_rh (N,) bool. The others of a flagged completion are its whole group, those of an unflagged one the unflagged; where
    there are none its advantage is 0.
    """
    mean, _, count = group_stats(returns, num_generations)
    mean_good, _, count_good = group_stats(returns, num_generations, ~is_rh)
    mean, count = torch.where(is_rh, mean, mean_good), torch.where(is_rh, count, count_good)
    return (returns - mean) * count / (count - 1).clamp(min=1)


@dataclass
class Ema:
    """Moving averages of the mean returns of earlier steps, of all completions and of the unflagged; none yet counts as 0."""

    everyone: float | None = None
    unflagged: float | None = None

    def advantages(self, returns, is_rh):
        """Returns (N,) less the average: of all for flagged completions (is_rh (N,) bool), of the unflagged for the others."""
        return torch.where(is_rh, returns - (self.everyone or 0.0), returns - (self.unflagged or 0.0))

    def add(self, returns, is_rh, momentum: float) -> None:
        """Takes in a step whose advantages are made: any sooner, they would hold their own returns."""
        for name, some in (("everyone", returns), ("unflagged", returns[~is_rh])):
            if len(some):
                old, new = getattr(self, name), some.double().mean().item()
                setattr(self, name, new if old is None else momentum * old + (1 - momentum) * new)


def summed(values, mask):
    """Sums over each completion's tokens (N,). values (n_valid,) in row-major order, mask (N, T) bool."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1)


# ------------------------------------------------------------------------------------------- the loop, part by part


def prompt_batch(prompts: list[str], step: int, count: int, seed: int) -> list[str]:
    """The prompts of a step: a seeded shuffle of all, then another; a function of the step, so there is nothing to save."""
    places = [divmod(i, len(prompts)) for i in range(step * count, (step + 1) * count)]
    generators = {epoch: torch.Generator().manual_seed(seed * 1_000_003 + epoch) for epoch, _ in places}
    shuffled = {epoch: torch.randperm(len(prompts), generator=g).tolist() for epoch, g in generators.items()}
    return [prompts[shuffled[epoch][place]] for epoch, place in places]


def rollout_batch(sampler: Sampler, tokenizer, prompts: list[str], config: Config, generator) -> tuple[Rollout, list[str]]:
    """num_generations completions of each prompt, and their texts (N,)."""
    encoded, count, law = [tokenizer.encode_prompt(p) for p in prompts], config.num_generations, config.law()
    ids, mask = left_pad(encoded, tokenizer.pad_id)
    rollout = sampler(ids, mask, count, config.max_new_tokens, tokenizer.stop_ids, tokenizer.pad_id, generator, law)
    completions = [t[m].tolist() for t, m in zip(rollout.tokens.cpu(), rollout.mask.cpu())]
    return rollout, tokenizer.decode_completions([e for e in encoded for _ in range(count)], completions)


def micro_batches(rollout: Rollout, size: int) -> list[torch.Tensor]:
    """Row indices, longest completions first, so that a micro-batch pads little. `size` 0 chooses by tokens."""
    if size == 0:
        budget = 16_384 if rollout.tokens.is_cuda else 4_096
        size = max(1, budget // (rollout.prompt_ids.shape[1] + rollout.tokens.shape[1]))
    return list(rollout.mask.sum(1).argsort(descending=True, stable=True).split(size))


def hidden_rows(model, rollout: Rollout, rows):
    """The final states (n_valid, C) that score the valid tokens of some rows, in row-major order, differentiable."""
    longest = int(rollout.mask[rows].sum(1).max())
    start = int((~rollout.prompt_mask[rows]).sum(1).min())  # columns that are padding for all of these rows
    valid, prompt_mask = rollout.mask[rows, :longest], rollout.prompt_mask[rows, start:]
    ids = torch.cat([rollout.prompt_ids[rows, start:], rollout.tokens[rows, :longest]], dim=1)
    mask = None if bool(prompt_mask.all()) else torch.cat([prompt_mask, valid], dim=1)[:, :-1]
    return model.hidden(ids[:, :-1], mask)[:, prompt_mask.shape[1] - 1 :][valid]  # the state at t - 1 scores token t


def law_of(model, rollout: Rollout, rows, hidden, law: Law, ref=None):
    """losses.token_law of the valid tokens of some rows."""
    valid = rollout.mask[rows]
    support = None if rollout.support is None else rollout.support[rows][valid]
    return token_law(hidden, model.head_weight, rollout.tokens[rows][valid], law.temperature, support, ref)


@torch.no_grad()
def look_at_reference(model, rollout: Rollout, batches, law: Law):
    """The reference's final states and output embedding for each micro-batch, and k1 summed over each completion (N,)."""
    refs, kl = [], rollout.logprobs.new_zeros(len(rollout.mask))
    with reference(model) as base:
        for rows in batches:
            hidden, allowed = hidden_rows(base, rollout, rows), rollout.allowed_of(rows)
            refs.append((hidden, base.head_weight, allowed))
            valid = rollout.mask[rows]
            tokens = rollout.tokens[rows][valid]
            ref_logprobs = token_logprobs(hidden, base.head_weight, tokens, law.temperature, allowed)
            kl[rows] = summed(k1(rollout.logprobs[rows][valid], ref_logprobs), valid).to(kl)
    return refs, kl


def gradients(model, rollout: Rollout, advantages, is_rh, batches, refs, config: Config, router=None) -> dict[str, float]:
    """Adds the gradients of a batch: advantages, is_rh (N,); batches, refs as in `look_at_reference`. Returns what to log."""
    routes = routing.sample_routes(is_rh, config.routing_mode) if config.routing == "dual" else {}
    if config.removed == "route":  # the bad branch learns what is removed from the good one's gradient, nothing else
        routes["bad"] = torch.zeros(len(is_rh), device=is_rh.device)
    count, tokens, sums, gaps, norms = len(rollout.mask), rollout.mask.sum(), [], [], []
    for rows, ref in zip(batches, refs):
        valid = rollout.mask[rows]
        logprobs, entropy, kl = policy = law_of(model, rollout, rows, hidden_rows(model, rollout, rows), config.law(), ref)
        if model.adapter.spec.dropout:  # the policy itself, of which figures are, drops nothing
            with torch.no_grad():
                policy = law_of(model, rollout, rows, hidden_rows(model, rollout, rows), config.law(), ref)
        losses = {"policy_loss": -(advantages[rows] * summed(logprobs, valid)).sum() / count}
        if config.kl_in == "loss" and config.beta:  # one of weight 0 is not run: its zeros would still move what it routes to
            losses["kl_loss"] = config.beta * kl.sum() / count
        measured = routing.measured(model, norms, len(rows) / count)
        with measured, routing.gates(model, **{name: w if w is None else w[rows] for name, w in routes.items()}):
            routing.backward(losses, router)
        shown = losses | {"loss": sum(losses.values()), "kl": policy[2].sum() / count, "entropy": policy[1].sum() / tokens}
        sums.append({name: x.detach() for name, x in shown.items()})
        gaps.append((policy[0].detach() - rollout.logprobs[rows][valid]).abs().max())
    totals = {name: torch.stack([s[name] for s in sums]).sum().item() for name in sums[0]}
    return totals | {"logprob_gap": torch.stack(gaps).max().item()} | routing.norm_figures(norms)


class Trainer:
    """What a run carries from step to step: sampler, baseline, optimizer. `step` is the whole algorithm."""

    def __init__(self, model, env, tokenizer, config: Config):
        routing.check_branches(model, config.dual)
        self.model, self.env, self.tokenizer, self.config = model, env, tokenizer, config
        self.sampler, self.watch, self.ema, self.steps_done = Sampler(model), DetectorWatch(), Ema(), 0
        scales, branches = {"bad": config.bad_lr_scale}, branch_parameters(model).items()
        groups = [{"params": list(p.values()), "scale": scales.get(name, 1.0)} for name, p in branches if p]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self.prompts, self.projector = env.prompts("train"), Projector(model, tokenizer, config, config.temperature)
        table = routing.arrangement(config.loss_routes)[1] if config.loss_routes else None
        self.router = routing.GradientRouter(model, table) if table else None  # None: every loss trains all

    def step(self) -> tuple[dict[str, float], str]:
        """One step: sample, score, route, step. Returns metrics and a sample to read."""
        config, step, clock = self.config, self.steps_done, [time.perf_counter()]
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)  # this step's: nothing to save
        prompts = prompt_batch(self.prompts, step, config.batch_size // config.num_generations, config.seed)
        repeated = [p for p in prompts for _ in range(config.num_generations)]
        self.sampler.refresh()
        rollout, completions = rollout_batch(self.sampler, self.tokenizer, prompts, config, generator)
        clock.append(time.perf_counter())
        scores = scored(self.env, rollout, repeated, completions, generator)
        is_rh = torch.zeros_like(scores.is_rh)
        if config.uses_labels:
            self.watch.look(scores, self.env.reward.name)
            is_rh = routing.placebo_labels(scores.is_rh, generator) if config.placebo else scores.is_rh
        clock.append(time.perf_counter())
        self.projector.observe(rollout, is_rh)
        metrics = self.learn(rollout, scores.reward.to(self.model.device), is_rh.to(self.model.device))
        clock.append(time.perf_counter())
        self.steps_done += 1
        means = {"reward": scores.reward, "task": scores.task, "hack_rate": scores.hack, "flagged": is_rh,
                 "length": rollout.mask.sum(1), "finished": rollout.finished}  # fmt: skip
        means |= {f"component/{label}": part for label, part in scores.components.items()}
        metrics |= {name: x.float().mean().item() for name, x in means.items()} | {"lr": config.lr * rate(step, config)}
        metrics |= {name: b - a for name, a, b in zip(("time/rollout", "time/score", "time/update"), clock, clock[1:])}
        metrics["time/tokens_per_s"] = int(rollout.mask.sum()) / (clock[-1] - clock[0])
        return metrics, repeated[0] + completions[0]

    def learn(self, rollout: Rollout, scores, is_rh) -> dict[str, float]:
        """The optimizer's step on a rollout with its scores (N,) and labels is_rh (N,) bool; returns what to log.

        Raises FloatingPointError for a number that is not finite, or a sampler that is not the policy, with weights, optimizer
        and baseline as they were.
        """
        config, batches = self.config, micro_batches(rollout, self.config.micro_batch_size)
        refs, kl = look_at_reference(self.model, rollout, batches, config.law())
        returns = scores - config.beta * kl if config.kl_in == "reward" else scores
        advantages = returns
        if config.baseline == "ema":
            advantages = self.ema.advantages(returns, is_rh)
        elif config.baseline == "loo":
            advantages = leave_one_out(returns, config.num_generations, is_rh)
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * config.lr * rate(self.steps_done, config)
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self.projector.refresh(self.steps_done)
        with dropping(self.model, config.seed * 1_000_003 + self.steps_done):
            metrics |= gradients(self.model, rollout, advantages, is_rh, batches, refs, config, self.router)
        metrics |= {"return": returns.mean().item(), "baseline": (returns - advantages).mean().item()} | self.projector.project()
        norms = routing.clip_per_branch(self.model, config.max_grad_norm)
        metrics |= {f"grad_norm/{branch}": norm for branch, norm in norms.items()}
        gap, bound = metrics["logprob_gap"], LOGPROB_GAP[self.model.dtype]
        wrong = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        wrong += [f"sampler and training forward differ by {gap:.2g} nats on a token (bound {bound})"] if gap > bound else []
        if wrong:
            raise FloatingPointError(f"{wrong[0]} (lower --lr {config.lr}?); the weights are as before this step")
        exact = self.model.device.type == "cpu"  # elsewhere a kernel chosen by gradient mode may round differently
        fresh = self.steps_done == 0 and self.model.adapter.spec.kind != "full" and not config.law().cut
        if fresh and abs(metrics["kl"]) > (0 if exact else 1e-3):
            raise AssertionError(f"the KL of a fresh adapter must be 0, not {metrics['kl']}: a branch does not start at zero")
        self.ema.add(returns, is_rh, config.baseline_momentum)
        return metrics | self.projector.step(self.optimizer)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors of the adapter, everything else): what `restore` needs to go on bitwise equal."""
        rest = {"optimizer": self.optimizer.state_dict(), "watch": dict(vars(self.watch)), "steps_done": self.steps_done}
        return adapter_tensors(self.model), rest | {"ema": dict(vars(self.ema)), "projector": self.projector.state()}

    def restore(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        set_adapter_tensors(self.model, tensors, "checkpoint")
        self.optimizer.load_state_dict(state["optimizer"])
        self.watch, self.ema, self.steps_done = DetectorWatch(**state["watch"]), Ema(**state["ema"]), state["steps_done"]
        self.projector.restore(state["projector"])


def rate(step: int, config: Config) -> float:
    """The learning rate's factor at a step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = 1 - step / config.max_steps
    return warm * {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[config.lr_schedule]
