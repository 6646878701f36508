"""GRADE and GRADE-STE in one file: reward models differentiated through the tokens. Soft rollout, score, route, project, step.
To fork it: cp rl_gumbel.py rl_mine.py, change it.

Tokens are Gumbel-softmax mixtures (Jang et al. 2016, https://arxiv.org/abs/1611.01144) that the next step and the reward read
through their embeddings, so the gradient of the reward flows back through the whole completion. `--estimator ste` reads one-hot
tokens forward and is soft in the backward pass alone (straight-through). soft_rollout.py has the rollout.

    loss = mean over completions of  -reward(soft tokens) + beta * sum over tokens of KL(policy || reference)

- The prompt is hard: only completion tokens are mixtures. The first token's law depends on hard tokens alone.
- KL is exact over the vocabulary, of the law that is sampled to the reference's (minimum length kept, top-k and top-p not:
  certainty would cost nothing) on the same soft prefix, and differentiated through that prefix too. The reference is the same
  model with its branches off.
- A completion ends where its largest entry is a stop token, in both estimators. Under `soft`, the share of the end of text in
  earlier mixtures is read as any other token's. Where a completion ends is a constant to the gradient: length is learned only
  from what the tokens before an end do to reward and KL.
- The support (top-k, top-p, minimum length) is sampling.Law's, a constant to the gradient; the law is renormalised over it.
- `reward` is the environment's score of the decoded tokens, `soft_reward` what was differentiated.
- The soft rollout makes the gradients, so under --lora_dropout it drops, and its tokens are drawn from the dropped policy; under
  routing from the policy itself.
- A flagged sample trains the bad branch alone, with its whole loss. Labels come from the decoded tokens, so under routing these
  are drawn first, without gradients, and then again with the same noise.

docs/rl_gumbel.md says how this departs from the published method.
"""
import math
import time
from dataclasses import dataclass

import torch

import routing
from adapters import adapter_tensors, branch_parameters, dropping, reference, set_adapter_tensors
from data import left_pad
from envs import DetectorWatch, scored
from projector import Flags, Projector
from sampling import Law, Sampler
from soft_rollout import SoftRollout, noise_seeds, reference_law, soft_rollout

ESTIMATORS = ("soft", "ste")


@dataclass
class Config(Flags):
    estimator: str = "soft"
    """soft: mixtures forward and backward (GRADE); ste: one-hot tokens forward, mixtures backward (GRADE-STE)"""
    tau_start: float = 2.0
    """temperature of the mixtures at the first step; the law that tokens are drawn from is that of --temperature"""
    tau_end: float = 0.5
    tau_steps: int = 1000
    """steps in which tau goes from start to end, linearly; 0: it is the end's from the first step"""
    recompute_every: int = 0
    """compute activations again in the backward pass, so many tokens at a time, in place of keeping all; 0: keep them"""
    routing: str = "none"
    """none, or dual: two branches, flagged samples train only the bad one"""
    routing_mode: str = "exclusive"
    """exclusive: honest samples train only the good branch; classic: both"""
    placebo: bool = False
    """shuffle the labels over the batch: as many, on the wrong completions (a control)"""
    loss_routes: str = ""
    """which branches each loss may train: an arrangement of routing.py, say ssl_rl_separate; empty: every loss trains all"""
    beta: float = 0.1
    """weight of KL(policy || reference), in nats a completion; 0: it is only measured"""
    lr: float = 1e-4
    """AdamW's learning rate"""
    bad_lr_scale: float = 2.0
    """the bad branch's learning rate, in multiples of lr"""
    lr_schedule: str = "constant"
    """constant, linear or cosine (down to 0 at max_steps)"""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """clips each branch's gradient norm; 0: never"""
    batch_size: int = 16
    """completions a step, each of a prompt of its own"""
    micro_batch_size: int = 4
    """completions per forward/backward; 0: about 4,096 tokens on a CPU, 16,384 on a GPU; never changes a gradient"""
    max_steps: int = 2000
    max_new_tokens: int = 48
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    min_new_tokens: int = 16
    seed: int = 42

    def __post_init__(self):
        known = {
            "estimator": ESTIMATORS, "routing": ("none", "dual"), "routing_mode": routing.ROUTING_MODES,
            "lr_schedule": ("constant", "linear", "cosine"),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown --{name} {getattr(self, name)!r}; known: {', '.join(values)}")
        least = dict.fromkeys(("batch_size", "max_steps", "max_new_tokens"), 1)
        rates = ("beta", "lr", "bad_lr_scale", "weight_decay", "max_grad_norm")
        least |= dict.fromkeys((*rates, "tau_steps", "recompute_every", "micro_batch_size", "warmup_steps"), 0)
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"--{name} must be at least {bound}, not {getattr(self, name)}")
        for name in ("tau_start", "tau_end"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be a number above 0, not {getattr(self, name)}")
        for message, wrong in {
            "--loss_routes routes by loss, --routing dual by sample: choose one": self.loss_routes and self.routing == "dual",
            "--removed route has the bad branch learn what projection removes: leave --routing at none and --loss_routes out":
                self.removed == "route" and (self.routing == "dual" or self.loss_routes),
            "--placebo shuffles labels, which only --routing dual or --basis live uses": self.placebo and not self.uses_labels,
        }.items():  # fmt: skip
            if wrong:
                raise ValueError(message)
        for name in (*([] if self.routing == "dual" else ["routing_mode"]), *([] if self.dual else ["bad_lr_scale"])):
            if getattr(self, name) != getattr(Config, name):
                raise ValueError(f"--{name} does nothing without --routing dual: leave it out")
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


# --------------------------------------------------------------------------------------------------- the formulas


def tau_at(step: int, config: Config) -> float:
    """The temperature of the mixtures at a step."""
    done = min(1.0, step / config.tau_steps) if config.tau_steps else 1.0
    return config.tau_start + done * (config.tau_end - config.tau_start)


def exact_kl(log_p, log_q) -> torch.Tensor:
    """KL(p || q) = sum p (log p - log q) (...) of laws (..., V). Outside p's support, which q's holds, log p is -inf: adds 0."""
    gap = (log_p - log_q).masked_fill(log_p == float("-inf"), 0)
    return (log_p.exp() * gap).sum(-1)


def losses_of(model, env, prompts: list[str], rollout: SoftRollout, config: Config, total: int):
    """The losses of a micro-batch as its part of a mean over `total` completions, by the names that routes know, differentiable;
    and sums over the micro-batch to log. A loss of weight 0 is not run: its zeros would still move what it routes to."""
    rewards = env.soft_reward(prompts, rollout.prompt_ids, rollout.prompt_mask, rollout.soft, rollout.mask)
    if rewards.shape != (len(prompts),) or not rewards.requires_grad:
        what = f"{tuple(rewards.shape)}{'' if rewards.requires_grad else ' without a gradient'}"
        raise ValueError(f"soft_reward must be differentiable, of shape ({len(prompts)},), not {what}")
    with torch.set_grad_enabled(config.beta > 0), reference(model) as base:
        kl = exact_kl(rollout.log_law, reference_law(base, rollout, config.law()))
        kl = torch.where(rollout.mask, kl, 0).sum(1)  # (N,) nats a completion
    losses = {"policy_loss": -rewards.sum() / total}
    if config.beta:
        losses["kl_loss"] = config.beta * kl.sum() / total
    with torch.no_grad():
        log_p = rollout.log_law[rollout.mask]
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == float("-inf"), 0)).sum()
        mixed = (1 - rollout.soft.amax(-1)[rollout.mask]).sum()
    return losses, {"soft_reward": rewards.detach().sum(), "kl": kl.detach().sum(), "entropy": entropy, "mixed": mixed}


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


@dataclass
class Batch:
    """What a step's completions are made of."""

    prompts: list[str]
    ids: torch.Tensor  # (N, P) long, left-padded
    mask: torch.Tensor  # (N, P) bool
    seeds: torch.Tensor  # (N, max_new_tokens) long: of the noise
    tau: float

    def parts(self, size: int, cuda: bool) -> list[slice]:
        """Its micro-batches of `size` rows; 0 chooses by tokens."""
        size = size or max(1, (16_384 if cuda else 4_096) // (self.ids.shape[1] + self.seeds.shape[1]))
        return [slice(i, min(i + size, len(self.prompts))) for i in range(0, len(self.prompts), size)]

    def rollout(self, model, rows: slice, tokenizer, config: Config, tokens=None) -> SoftRollout:
        """Some of its completions; `tokens` (n, T) where they are known."""
        mask = self.mask[rows]
        start = int((~mask).sum(1).min())  # columns that are padding for all of these rows
        return soft_rollout(
            model, self.ids[rows, start:], mask[:, start:], self.seeds[rows], self.tau, config.law(), tokenizer.stop_ids,
            tokenizer.pad_id, config.estimator == "ste", config.recompute_every, tokens,
        )  # fmt: skip


@dataclass
class Hard:
    """The decoded side of a step's completions, on the CPU; as much of a sampling.Rollout as Projector.observe reads."""

    prompt_ids: torch.Tensor  # (N, P) long
    prompt_mask: torch.Tensor  # (N, P) bool
    tokens: torch.Tensor  # (N, T) long
    mask: torch.Tensor  # (N, T) bool
    finished: torch.Tensor  # (N,) bool

    def texts(self, tokenizer) -> list[str]:
        prompts, tokens = (
            [row[there].tolist() for row, there in zip(*both)]
            for both in ((self.prompt_ids, self.prompt_mask), (self.tokens, self.mask))
        )
        return tokenizer.decode_completions(prompts, tokens)


def hard_side(batch: Batch, parts: list[tuple], pad_id: int) -> Hard:
    """parts: (tokens, mask, finished) of each micro-batch."""
    longest = max(tokens.shape[1] for tokens, *_ in parts)
    fill = lambda x, value: torch.nn.functional.pad(x.cpu(), (0, longest - x.shape[1]), value=value)  # noqa: E731
    tokens, mask, finished = zip(*parts)
    tokens, mask = torch.cat([fill(x, pad_id) for x in tokens]), torch.cat([fill(x, False) for x in mask])
    return Hard(batch.ids, batch.mask, tokens, mask, torch.cat([x.cpu() for x in finished]))


def gradients(model, env, tokenizer, batch: Batch, routes, router, config: Config, known=None):
    """Adds the gradients of a batch. routes: gate weights (N,) by branch, of sample_routes; known: the tokens of each
    micro-batch, where they are drawn already. Returns what to log, and (tokens, mask, finished) of each micro-batch."""
    total, sums, drawn, norms = len(batch.prompts), [], [], []
    parts = batch.parts(config.micro_batch_size, model.device.type == "cuda")
    for rows, tokens in zip(parts, known or [None] * len(parts)):
        rollout = batch.rollout(model, rows, tokenizer, config, tokens)
        losses, shown = losses_of(model, env, batch.prompts[rows], rollout, config, total)
        measured = routing.measured(model, norms, (rows.stop - rows.start) / total)
        with measured, routing.gates(model, **{name: w if w is None else w[rows] for name, w in routes.items()}):
            routing.backward(losses, router)
        sums.append({name: x.detach() for name, x in (losses | shown).items()})
        drawn.append((rollout.tokens, rollout.mask, rollout.finished))
        del rollout, losses  # or their graph would live through the next forward pass
    metrics = {name: torch.stack([s[name] for s in sums]).sum().item() for name in sums[0]}
    count = sum(int(mask.sum()) for _, mask, _ in drawn)
    metrics |= {name: metrics[name] / total for name in ("soft_reward", "kl")}
    metrics |= {name: metrics[name] / count for name in ("entropy", "mixed")}
    metrics["loss"] = metrics["policy_loss"] + metrics.get("kl_loss", 0.0)
    return metrics | routing.norm_figures(norms), drawn


KL_AT_START = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1.0}  # nats a token: cached steps round unlike one pass


class Trainer:
    """What a run carries from step to step. `step` is the whole algorithm. `sampler` is for whoever evaluates the policy."""

    def __init__(self, model, env, tokenizer, config: Config):
        if not callable(getattr(env, "soft_reward", None)):
            raise ValueError(
                f"{type(env).__name__} has no soft_reward(prompts, ids, prompt_mask, soft, mask); rl_gumbel.py differentiates "
                "the reward by the tokens: it takes an environment whose reward is a model of them, such as --env sentiment"
            )
        routing.check_branches(model, config.dual)
        self.model, self.env, self.tokenizer, self.config = model, env, tokenizer, config
        self.sampler, self.watch, self.steps_done = Sampler(model), DetectorWatch(), 0
        rates = {"bad": config.lr * config.bad_lr_scale}
        branches = branch_parameters(model).items()
        groups = [{"params": list(p.values()), "rate": rates.get(name, config.lr)} for name, p in branches if p]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self.router = None
        if config.loss_routes:
            self.router = routing.GradientRouter(model, routing.arrangement(config.loss_routes)[1])
        self.prompts = env.prompts("train")
        self.projector = Projector(model, tokenizer, config, config.temperature) if config.basis else None

    def step(self) -> tuple[dict[str, float], str]:
        """One step: soft rollout, score, route, project, step. Returns metrics and a sample to read."""
        config, step, clock = self.config, self.steps_done, time.perf_counter()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)  # this step's: nothing to save
        batch = self.batch(generator)
        known, hard, scores, routes = None, None, None, {}
        if config.uses_labels:  # they say where gradients go, so the tokens must be there before
            known, hard = self.look_ahead(batch)
            scores, is_rh = self.score(batch, hard, generator)
            if config.routing == "dual":
                routes = routing.sample_routes(is_rh.to(self.model.device), config.routing_mode)
            if self.projector:
                self.projector.observe(hard, is_rh)
        if config.removed == "route":  # the bad branch learns what is removed from the good one's gradient, nothing else
            routes = {"good": None, "bad": torch.zeros(config.batch_size, device=self.model.device)}
        metrics = self.projector.refresh(step) if self.projector else {}
        self.optimizer.zero_grad(set_to_none=True)
        with dropping(self.model, config.seed * 1_000_003 + step):
            learned, drawn = gradients(self.model, self.env, self.tokenizer, batch, routes, self.router, config, known)
        metrics |= learned
        if not config.uses_labels:
            hard = hard_side(batch, drawn, self.tokenizer.pad_id)
            scores, is_rh = self.score(batch, hard, generator)
        metrics |= self.update(metrics)
        self.steps_done += 1
        metrics |= describe(hard, scores, is_rh) | {"lr": config.lr * rate(step, config), "tau": batch.tau}
        metrics["time/tokens_per_s"] = int(hard.mask.sum()) / (time.perf_counter() - clock)
        return metrics, batch.prompts[0] + hard.texts(self.tokenizer)[0]

    def batch(self, generator) -> Batch:
        config = self.config
        prompts = prompt_batch(self.prompts, self.steps_done, config.batch_size, config.seed)
        ids, mask = left_pad([self.tokenizer.encode_prompt(p) for p in prompts], self.tokenizer.pad_id)
        seeds = noise_seeds(len(prompts), config.max_new_tokens, generator)
        return Batch(prompts, ids, mask, seeds, tau_at(self.steps_done, config))

    @torch.no_grad()
    def look_ahead(self, batch: Batch) -> tuple[list[torch.Tensor], Hard]:
        """The tokens of each micro-batch, and all of them decoded."""
        drawn = []
        for rows in batch.parts(self.config.micro_batch_size, self.model.device.type == "cuda"):
            rollout = batch.rollout(self.model, rows, self.tokenizer, self.config)
            drawn.append((rollout.tokens, rollout.mask, rollout.finished))
        return [tokens for tokens, *_ in drawn], hard_side(batch, drawn, self.tokenizer.pad_id)

    def score(self, batch: Batch, hard: Hard, generator):
        """(the environment's Scores of the decoded tokens, the labels (N,) that route)."""
        scores = scored(self.env, hard, batch.prompts, hard.texts(self.tokenizer), generator)
        if not self.config.uses_labels:
            return scores, torch.zeros_like(scores.is_rh)
        self.watch.look(scores, self.env.reward.name)
        return scores, routing.placebo_labels(scores.is_rh, generator) if self.config.placebo else scores.is_rh

    def update(self, metrics: dict[str, float]) -> dict[str, float]:
        """Project, clip, step. Raises FloatingPointError for a number that is not finite, weights and optimizer as they were."""
        config, step = self.config, self.steps_done
        bound, whole = KL_AT_START[self.model.dtype] * config.max_new_tokens, not config.law().cut
        if step == 0 and whole and metrics["kl"] > bound and self.model.adapter.spec.kind != "full":
            raise AssertionError(f"the KL of a fresh adapter must be 0, not {metrics['kl']}: a branch does not start at zero")
        figures = self.projector.project() if self.projector else {}
        norms = routing.clip_per_branch(self.model, config.max_grad_norm)
        figures |= {f"grad_norm/{branch}": norm for branch, norm in norms.items()}
        for name, value in (metrics | figures).items():
            if not math.isfinite(value):
                what = f"{name} is {value}"
                raise FloatingPointError(f"{what} (lower --lr {config.lr}?); the weights are as before this step")
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate(step, config)
        if self.projector:
            return figures | self.projector.step(self.optimizer)
        self.optimizer.step()
        return figures

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors of the adapter, everything else): what `restore` needs to go on bitwise equal."""
        watch = {"paid": self.watch.paid, "hits": self.watch.hits}
        rest = {"optimizer": self.optimizer.state_dict(), "watch": watch, "steps_done": self.steps_done}
        return adapter_tensors(self.model), rest | ({"projector": self.projector.state()} if self.projector else {})

    def restore(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        set_adapter_tensors(self.model, tensors, "checkpoint")
        self.optimizer.load_state_dict(state["optimizer"])
        self.watch, self.steps_done = DetectorWatch(**state["watch"]), state["steps_done"]
        if self.projector:
            self.projector.restore(state["projector"])


def describe(hard: Hard, scores, is_rh) -> dict[str, float]:
    """Means over a step's completions, by the environment's score of the decoded tokens."""
    means = {
        "reward": scores.reward, "task": scores.task, "hack_rate": scores.hack, "flagged": is_rh,
        "length": hard.mask.sum(1), "finished": hard.finished,
    }  # fmt: skip
    means |= {f"component/{label}": part for label, part in scores.components.items()}
    return {name: value.float().mean().item() for name, value in means.items()}


def rate(step: int, config: Config) -> float:
    """The learning rates' factor at a step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = 1 - step / config.max_steps
    if config.lr_schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return warm * (1.0 if config.lr_schedule == "constant" else left)
