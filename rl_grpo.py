"""GRPO with routing, in one file: rollout, score, advantage, route, step. To fork it: cp rl_grpo.py rl_mine.py, change it,
python train_grpo.py --algorithm rl_mine.

Group Relative Policy Optimization, Shao et al. 2024, https://arxiv.org/abs/2402.03300 (eq. 3); Dr. GRPO, Liu et al. 2025,
https://arxiv.org/abs/2503.20783; DAPO's asymmetric clip and token mean, Yu et al. 2025, https://arxiv.org/abs/2503.14476.

Departures:
- pi_old is the law that was sampled (temperature, truncation), stored by the sampler, not a second forward pass.
- The reference policy is the same model with its branches off.
- Flagged samples may be left out of the statistics that honest samples are normalised with (`renormalise`): with them in
  the group, honest samples get negative advantages and push the protected branch toward the hack.
- Each branch's gradient is clipped by itself. A flagged sample's KL term is masked together with its policy term.
- --lora_dropout drops in the passes that make gradients alone: pi_old, reference, sampler, and what is logged of the first
  iteration drop nothing. The ratio of a dropped pass is to the law that was sampled, and is not quite 1.
"""
import copy
import math
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass

import torch

import monitor
import replay
import routing
from adapters import adapter_tensors, branch_parameters, dropping, reference, scaled, set_adapter_tensors
from data import left_pad
from envs import DetectorWatch
from losses import LOSS_TYPES, group_stats, k3, token_logprobs, token_weights
from pairs import authored
from projector import Flags, Projector
from sampling import Law, Rollout, Sampler

RENORMALISE = ("off", "good_only", "balanced")
LOSS_MODES = ("grpo", "nll")
RECENT = ("hack_rate", "task", "gap")  # whose means over the last five steps are logged


@dataclass
class Config(Flags, monitor.Flags, replay.Flags):
    routing: str = "none"
    """none, or dual: two branches, flagged samples train only the bad one"""
    routing_mode: str = "exclusive"
    """exclusive: honest samples train only the good branch; classic: both"""
    passes: int = 1
    """1: one backward pass, routed by gates; 2: the slow reference, honest and flagged samples apart, protected by hooks"""
    treatment: str = "keep"
    """of flagged completions, in place of routing. filter: drop them, normalise the rest; zero, subtract: pay them less"""
    penalty: float = 1.0
    """what --treatment subtract takes off a flagged completion's reward"""
    placebo: bool = False
    """shuffle the labels over the batch: as many, on the wrong completions (a control)"""
    coherence_every: int = 3
    """under routing every so many steps are sampled and trained with the bad branch off (retain-only); 0: none are"""
    coherence_recall: float | None = None
    """detector recall on coherence steps, where it differs: 1 watches closely the policy that is to be deployed"""
    renormalise: str = "good_only"
    """advantages under routing. off: one group; good_only: unflagged among themselves; balanced: less the unflagged mean"""
    beta: float = 0.08
    """weight of the k3 estimate of KL(policy || reference) per token; 0: no reference forward"""
    lr: float = 3e-4
    """AdamW's learning rate for LoRA and MLP branches (full fine-tuning wants about 1e-5)"""
    bad_lr_scale: float = 2.0
    """the bad branch's learning rate, in multiples of lr: whoever learns the hack first leaves nothing of it to the other"""
    lr_schedule: str = "constant"
    """constant, linear or cosine (down to 0 at max_steps)"""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """clips each branch's gradient norm; 0: never"""
    batch_size: int = 64
    """completions a step"""
    num_generations: int = 16
    """completions a prompt: the group"""
    micro_batch_size: int = 0
    """completions per forward/backward; 0: about 4,096 tokens on a CPU, what memory holds on a GPU;
    never changes a gradient"""
    rollout_size: int = 0
    """completions sampled at once, in whole groups: the key-value cache holds so many; 0: all"""
    max_steps: int = 150
    max_new_tokens: int = 64
    loss_type: str = "grpo"
    """grpo: mean over sequences of token means; bnpo, dapo: mean over tokens; dr_grpo: sum / (N * max_new_tokens), no std"""
    loss_mode: str = "grpo"
    """nll: every completion has advantage 1, whose gradient is that of its negative log-likelihood (distillation)"""
    contributions: bool = False
    """write what each completion alone adds to the gradient, and its cosine with the basis: step_NNN.cos.jsonl.gz; slow"""
    epsilon: float = 0.2
    """clip range of the ratio, below"""
    epsilon_high: float = 0.0
    """clip range above; 0: as epsilon (DAPO's own is .28)"""
    num_iterations: int = 1
    """optimizer steps on each rollout (mu), with its log-probabilities as pi_old"""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    seed: int = 42

    def __post_init__(self):
        known = {
            "routing": ("none", "dual"), "routing_mode": routing.ROUTING_MODES, "treatment": routing.TREATMENTS,
            "renormalise": RENORMALISE, "loss_type": LOSS_TYPES,
            "lr_schedule": ("constant", "linear", "cosine"), "loss_mode": LOSS_MODES,
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown --{name} {getattr(self, name)!r}; known: {', '.join(values)}")
        rates = ("beta", "lr", "bad_lr_scale", "penalty", "weight_decay", "max_grad_norm", "epsilon", "epsilon_high")
        counts = ("micro_batch_size", "rollout_size", "warmup_steps", "coherence_every")
        least = dict.fromkeys(("batch_size", "num_generations", "max_steps", "max_new_tokens", "num_iterations"), 1)
        for name, bound in (least | dict.fromkeys((*rates, *counts), 0)).items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"--{name} must be at least {bound}, not {getattr(self, name)}")
        dual, recall, per_group = self.routing == "dual", self.coherence_recall, self.num_generations
        for message, wrong in {
            f"--passes must be 1, or 2 with --routing dual; it is {self.passes} with --routing {self.routing}":
                self.passes not in (1, 2) or (self.passes == 2 and not dual),
            "--num_generations must be at least 2: an advantage compares the completions of a group": per_group < 2,
            f"--num_generations {per_group} does not divide --batch_size {self.batch_size}": self.batch_size % per_group,
            "--treatment filter drops the samples that --routing dual would train the bad branch on: choose one":
                dual and self.treatment == "filter",
            "--treatment filter normalises the rest among themselves: leave --renormalise at good_only":
                self.treatment == "filter" and self.renormalise != "good_only",
            "--penalty is what --treatment subtract takes off: give that too": self.treatment != "subtract" and self.penalty != 1,
            "--coherence_every 1 never trains the bad branch: 0 (none), or every 2nd step or fewer":
                dual and self.coherence_every == 1,
            "--coherence_recall is of coherence steps, which only --routing dual with --coherence_every has":
                recall is not None and not (dual and self.coherence_every),
            f"--coherence_recall must lie in 0..1, not {recall}": recall is not None and not 0 <= recall <= 1,
            "--removed route has the bad branch learn what projection removes: leave --routing at none":
                dual and self.removed == "route",
            "--placebo shuffles labels, which only --routing dual, a --treatment or --basis live uses":
                self.placebo and not self.uses_labels,
            "--contributions are cosines with a basis: give one by --basis": self.contributions and not self.basis,
            "--contributions are of all completions: leave --treatment filter": self.contributions and self.treatment == "filter",
            "--loss_mode nll reads no reward: leave --treatment zero and subtract, and --advantage probe":
                self.loss_mode == "nll" and (self.treatment in ("zero", "subtract") or self.advantage == "probe"),
        }.items():  # fmt: skip
            if wrong:
                raise ValueError(message)
        idle = () if dual else ("routing_mode", "coherence_every", "renormalise")
        for name in idle if self.dual else (*idle, "bad_lr_scale"):  # --removed route has a bad branch too
            if getattr(self, name) != getattr(Config, name):
                raise ValueError(f"--{name} does nothing without --routing dual: leave it out")
        self.law()
        self.check_projection(pairs_read=self.advantage == "probe")
        self.check_probe()
        self.check_replay()

    @property
    def dual(self) -> bool:
        """Whether there are two branches, good and bad."""
        return self.routing == "dual" or self.removed == "route"

    @property
    def uses_labels(self) -> bool:
        return self.routing == "dual" or self.treatment != "keep" or self.basis == "live"

    def law(self) -> Law:
        return Law(self.temperature, self.top_k, self.top_p, self.min_new_tokens)


# --------------------------------------------------------------------------------------------------- the formulas


def group_advantages(rewards, num_generations: int, scale: bool = True, is_rh=None, renormalise: str = "off"):
    """(r - mean) / (std + 1e-4) within each group of consecutive rewards; without `scale` r - mean (Dr. GRPO).

    rewards (N,) fp32, is_rh (N,) bool -> (N,) fp32. good_only: flagged samples use their group's statistics, unflagged ones
    those of the group's unflagged samples (one alone gets 0). balanced: all subtract the unflagged mean (where all are flagged,
    their own) and divide by the std of the whole group.
    """
    mean, std, _ = group_stats(rewards, num_generations)
    if renormalise != "off" and is_rh is not None and bool(is_rh.any()):
        mean_good, std_good, count_good = group_stats(rewards, num_generations, ~is_rh)
        if renormalise == "good_only":
            mean, std = torch.where(is_rh, mean, mean_good), torch.where(is_rh, std, std_good)
        else:
            mean = torch.where(count_good > 0, mean_good, mean)
    return (rewards - mean) / (std + 1e-4) if scale else rewards - mean


def policy_loss(logprobs, old_logprobs, advantages, epsilon: float, epsilon_high: float):
    """-min(w A, clip(w, 1 - eps, 1 + eps_high) A), w = exp(log pi - log pi_old), per token (eq. 3); and where it clips."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages), clipped * advantages < ratio * advantages


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, weights, beta, epsilon, epsilon_high):
    """The GRPO loss of some of a batch's tokens; summed over a partition of the batch it is the loss of the batch.

    All (n,) fp32 per valid token; `weights` from losses.token_weights. Returns the loss (scalar) and detached sums to log.
    """
    loss, clipped = policy_loss(logprobs, old_logprobs, advantages, epsilon, epsilon_high)
    sums = {"clip_frac": clipped.float().sum(), "ratio_gap": (logprobs - old_logprobs).abs().max()}
    if beta:
        kl = k3(logprobs, ref_logprobs)
        loss = loss + beta * kl
        sums["kl"] = kl.sum()
    return (weights * loss).sum(), {name: value.detach() for name, value in sums.items()}


# ------------------------------------------------------------------------------------------- the loop, part by part


def prompt_batch(prompts: list[str], step: int, count: int, seed: int) -> list[str]:
    """The prompts of a step: a seeded shuffle of all, then another; a function of the step, so there is nothing to save."""
    chosen = []
    for i in range(step * count, (step + 1) * count):
        epoch, place = divmod(i, len(prompts))
        order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        if place == 0 or not chosen:
            shuffled = torch.randperm(len(prompts), generator=order)
        chosen.append(prompts[int(shuffled[place])])
    return chosen


def rollout_batch(sampler: Sampler, tokenizer, prompts: list[str], config: Config, generator) -> tuple[Rollout, list[str]]:
    """What the policy samples of each prompt's group, and their texts (N,)."""
    count = config.num_generations - config.replayed
    encoded = [tokenizer.encode_prompt(p) for p in prompts]
    ids, mask = left_pad(encoded, tokenizer.pad_id)
    rollout = sampler(
        ids, mask, count, config.max_new_tokens, tokenizer.stop_ids, tokenizer.pad_id, generator, config.law()
    )
    tokens, valid = rollout.tokens.cpu(), rollout.mask.cpu()
    completions = [t[m].tolist() for t, m in zip(tokens, valid)]
    return rollout, tokenizer.decode_completions([e for e in encoded for _ in range(count)], completions)


def micro_batches(rollout: Rollout, size: int, shape) -> list[torch.Tensor]:
    """Row indices, longest completions first, so that a micro-batch pads little. `size` 0 chooses by tokens: as many as a CPU's
    cache likes, or as a GPU's memory holds activations for (about 40% of it, by the ModelConfig `shape`)."""
    lengths = rollout.mask.sum(1)
    if size == 0:
        budget = 4_096
        if rollout.tokens.is_cuda:
            per_token = 4 * shape.layers * (6 * shape.width + 5 * shape.ffn + 4 * shape.heads * shape.head_dim)  # bytes, about
            budget = min(65_536, int(0.4 * torch.cuda.get_device_properties(rollout.tokens.device).total_memory / per_token))
        size = max(1, budget // (rollout.prompt_ids.shape[1] + rollout.tokens.shape[1]))
    return list(lengths.argsort(descending=True, stable=True).split(size))


def score_rows(model, rollout: Rollout, rows, law: Law, whole: bool = False):
    """Log-probabilities (n_valid,) of the valid tokens of some rows, in row-major order, differentiable; by the law that was
    sampled or, for a reference, by its `whole` one, of all that any policy may write: see losses.token_law."""
    width = rollout.prompt_ids.shape[1]
    longest = int(rollout.mask[rows].sum(1).max())
    prompt_mask = rollout.prompt_mask[rows]
    start = int((~prompt_mask).sum(1).min())  # columns that are padding for all of these rows
    ids = torch.cat([rollout.prompt_ids[rows, start:], rollout.tokens[rows, :longest]], dim=1)
    valid = rollout.mask[rows, :longest]
    mask = None
    if not bool(prompt_mask[:, start:].all()):
        mask = torch.cat([prompt_mask[:, start:], valid], dim=1)[:, :-1]
    hidden = model.hidden(ids[:, :-1], mask)[:, width - start - 1 :][valid]  # the state at t - 1 scores token t
    support = rollout.allowed if whole else rollout.support
    support = None if support is None else support[rows, :longest][valid]
    return token_logprobs(hidden, model.head_weight, rollout.tokens[rows, :longest][valid], law.temperature, support)


def update(model, optimizer, rollout: Rollout, advantages, is_rh, config: Config, projector=None, sources=None) -> dict:
    """num_iterations optimizer steps on a rollout. advantages (N,), is_rh (N,) bool; sources: N names, what is not the student's
    is replayed, and a projector tells their gradients apart. Returns means to log."""
    law, device = config.law(), rollout.tokens.device
    sources = sources or [replay.STUDENT] * len(is_rh)
    sampled = torch.tensor([source == replay.STUDENT for source in sources], device=device)
    if not bool(rollout.logprobs[sampled].isfinite().all()):
        raise FloatingPointError("a sampled token's log-probability is not finite; the weights are as before this step")
    advantages = advantages.to(device)
    weights = token_weights(rollout.mask, config.loss_type, config.max_new_tokens)
    is_rh = is_rh.to(device)
    routes = routing.sample_routes(is_rh, config.routing_mode) if config.routing == "dual" else {}
    if config.removed == "route":  # the bad branch learns what is removed from the good one's gradient, nothing else
        routes["bad"] = torch.zeros(len(is_rh), device=device)
    batches = micro_batches(rollout, 1 if config.contributions else config.micro_batch_size, model.config)
    if config.passes == 2:  # homogeneous micro-batches
        batches = [part for rows in batches for flag in (False, True) if len(part := rows[is_rh[rows] == flag])]
    if projector and len(set(sources)) > 1:
        places = {source: torch.tensor([s == source for s in sources], device=device) for source in dict.fromkeys(sources)}
        batches = [part for rows in batches for there in places.values() if len(part := rows[there[rows]])]
    pieces = [rollout.mask[rows] for rows in batches]
    old = [rollout.logprobs[rows][valid] for rows, valid in zip(batches, pieces)]
    ref = [None] * len(batches)
    if config.beta:
        with torch.no_grad(), reference(model) as base:
            ref = [score_rows(base, rollout, rows, law, whole=True) for rows in batches]
    totals, tokens, parameters = {}, int(rollout.mask.sum()), [p for g in optimizer.param_groups for p in g["params"]]
    if config.num_iterations > 1:  # a later iteration may fail: this step is then undone as a whole
        before = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())
    for iteration in range(config.num_iterations):
        optimizer.zero_grad(set_to_none=True)
        sums = []
        for i, (rows, valid, ref_logprobs) in enumerate(zip(batches, pieces, ref)):
            logprobs = policy = score_rows(model, rollout, rows, law)
            if dropped := iteration == 0 and model.adapter.spec.dropout > 0:  # the policy itself drops nothing
                with torch.no_grad():
                    policy = score_rows(model, rollout, rows, law)
            if iteration == 0:  # what is replayed counts as sampled by the policy as it is now
                old[i] = torch.where(sampled[rows][:, None].expand_as(valid)[valid], old[i], policy.detach())
            a = advantages[rows][:, None].expand_as(valid)[valid]
            clip = config.epsilon, config.epsilon_high or config.epsilon
            rest = old[i], ref_logprobs, a, weights[rows][valid], config.beta, *clip
            loss, parts = grpo_loss(logprobs, *rest)
            if dropped:
                parts = grpo_loss(policy, *rest)[1]
            if config.passes == 2:
                with routing.hooked_shut(model, routing.protected(config.routing_mode, flagged=bool(is_rh[rows[0]]))):
                    loss.backward()
            else:
                with routing.gates(model, **{name: w if w is None else w[rows] for name, w in routes.items()}):
                    loss.backward()
            sums.append(parts | {"loss": loss.detach()})
            if projector:
                projector.note(sources[rows[0]], rows)
        stacked = {name: torch.stack([s[name] for s in sums]) for name in sums[0]}
        if iteration == 0:  # the sampled law and this forward must be the same policy
            totals["logprob_gap"] = stacked["ratio_gap"].max().item()
            totals["kl"] = stacked["kl"].sum().item() / tokens if config.beta else 0.0
        totals["loss"] = stacked["loss"].sum().item()
        totals["clip_frac"] = stacked["clip_frac"].sum().item() / tokens
        if config.passes == 2:
            routing.drop_protected(model, config.routing_mode, is_rh)
        if projector:
            totals |= projector.project()
        norms = routing.clip_per_branch(model, config.max_grad_norm)
        totals |= {f"grad_norm/{branch}": norm for branch, norm in norms.items()}
        if culprit := fault(totals, model.dtype):
            if iteration:
                for p, old_value in zip(parameters, before[0]):
                    p.data.copy_(old_value)
                optimizer.load_state_dict(before[1])
            raise FloatingPointError(f"{culprit} (lower --lr {config.lr}?); the weights are as before this step")
        if projector:
            totals |= projector.step(optimizer)
        else:
            optimizer.step()
    return totals


LOGPROB_GAP = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 1.0}  # nats a token between sampler and training forward


def fault(totals: dict[str, float], dtype: torch.dtype) -> str:
    """What makes a step unusable, in words; empty where nothing does."""
    for name, value in totals.items():
        if not math.isfinite(value):
            return f"{name} is {value}"
    if totals["logprob_gap"] > LOGPROB_GAP[dtype]:
        gap = totals["logprob_gap"]
        return f"sampler and training forward differ by {gap:.2g} nats on a token (bound {LOGPROB_GAP[dtype]})"
    return ""


def describe(rollout: Rollout, scores, rewards, advantages, is_rh, kept, num_generations: int, sources) -> dict[str, float]:
    """Means over a step's completions, to log; `reward` is what the environment paid, before any treatment.

    Those of completions are the student's; of each pool that is replayed three stand apart, by its name. Those of groups and
    advantages are of all.
    """
    means = {
        "reward": scores.reward, "task": scores.task, "hack_rate": scores.hack, "flagged": is_rh, "kept": kept,
        "label_accuracy": is_rh == (scores.detected & scores.eligible), "length": rollout.mask.sum(1),
        "finished": rollout.finished, "gap": scores.hack.float() - scores.task,
    } | {f"component/{label}": part for label, part in scores.components.items()}  # fmt: skip
    metrics = {}
    for source in dict.fromkeys(sources):
        rows = torch.tensor([s == source for s in sources])
        few = {f"{name}/{source}": means[name] for name in ("reward", "task", "hack_rate")}
        shown = means if source == replay.STUDENT else few
        metrics |= {name: value.cpu()[rows].float().mean().item() for name, value in shown.items()}
    _, spread, _ = group_stats(rewards, num_generations, kept)
    groups = rewards.view(-1, num_generations)
    whole = {
        "zero_variance_groups": spread == 0, "dead_advantages": advantages == 0, "advantage/abs_mean": advantages.abs(),
        "advantage/min": advantages.min(), "advantage/max": advantages.max(), "reward/spread": groups.amax(1) - groups.amin(1),
    }  # fmt: skip
    return metrics | {name: value.float().mean().item() for name, value in whole.items()}


class Trainer:
    """What a run carries from step to step: sampler, optimizer, the detector's watch. `step` is the whole algorithm."""

    def __init__(self, model, env, tokenizer, config: Config):
        routing.check_branches(model, config.dual)
        self.model, self.env, self.tokenizer, self.config = model, env, tokenizer, config
        self.sampler, self.watch, self.steps_done = Sampler(model, config.rollout_size), DetectorWatch(), 0
        scales = {"bad": config.bad_lr_scale}
        groups = [
            {"params": list(p.values()), "scale": scales.get(branch, 1.0)} for branch, p in branch_parameters(model).items() if p
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self.prompts, self.pools = env.prompts("train"), None
        if config.replay_dirs:
            self.pools = replay.Pools(config.pools())
            self.pools.check(set(self.prompts), config.replayed // len(self.pools.names))
        self.recent, self.contributions = deque(maxlen=5), []
        self.projector = Projector(model, tokenizer, config, config.temperature) if config.basis else None
        self.probe = None
        if config.advantage == "probe":
            self.probe = monitor.fit(model, authored(tokenizer, config.pairs, config.pair_count)[0], config.probe_layer)

    def step(self) -> tuple[dict[str, float], str]:
        """One step: sample, score, route, step. Returns metrics and a sample to read.

        A coherence step does all of it with the bad branch off. Without them the good branch only ever learns what is best
        beside the bad one, and the two may drift apart, each making up for the other.
        """
        config, step, clock = self.config, self.steps_done, [time.perf_counter()]
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)  # this step's: nothing to save
        count = config.batch_size // config.num_generations
        prompts = self.pools.prompts(step, count) if self.pools else prompt_batch(self.prompts, step, count, config.seed)
        repeated = [p for p in prompts for _ in range(config.num_generations)]
        coherent = config.routing == "dual" and config.coherence_every and (step + 1) % config.coherence_every == 0
        with scaled(self.model, good=1.0, bad=0.0) if coherent else nullcontext():
            self.sampler.refresh()
            rollout, completions, origins = self.groups(prompts, generator)
            clock.append(time.perf_counter())
            sources = [origin.pool if origin else replay.STUDENT for origin in origins]
            scores = self.env.score(repeated, completions, generator, config.coherence_recall if coherent else None)
            z = monitor.score(self.model, self.probe, rollout) if self.probe else None
            rewards, advantages, is_rh, kept = self.credit(scores, generator, z)
            if self.projector:
                self.projector.observe(rollout, is_rh)
            clock.append(time.perf_counter())
            metrics = self.learn(rollout, advantages, is_rh, kept, sources)
            clock.append(time.perf_counter())
        self.steps_done += 1
        metrics |= {"coherence": float(bool(coherent)), "lr": config.lr * rate(step, config)}
        metrics |= describe(rollout, scores, rewards, advantages, is_rh, kept, config.num_generations, sources)
        if not coherent and config.replayed < config.num_generations:
            self.recent.append([metrics[name] for name in RECENT])
            metrics |= {f"last5/{name}": sum(column) / len(column) for name, column in zip(RECENT, zip(*self.recent))}
        if config.contributions:
            self.contributions = replay.annotated(origins, rollout, scores, self.projector, metrics, step)
        metrics |= monitor.figures(z, scores.hack) if self.probe else {}
        names = ("time/rollout", "time/score", "time/update")
        metrics |= {name: b - a for name, a, b in zip(names, clock, clock[1:])}
        metrics["time/tokens_per_s"] = int(rollout.mask.sum()) / (clock[-1] - clock[0])
        return metrics, repeated[0] + completions[0]

    def groups(self, prompts: list[str], generator) -> tuple[Rollout, list[str], list]:
        """A group of completions of each prompt, their texts, and the sample that each was replayed from (None: sampled now)."""
        config = self.config
        if config.replayed < config.num_generations:
            rollout, texts = rollout_batch(self.sampler, self.tokenizer, prompts, config, generator)
        if not config.replayed:
            return rollout, texts, [None] * len(texts)
        numbered = enumerate(prompts, self.steps_done * len(prompts))
        samples = [sample for group, prompt in numbered for sample in self.pools.take(prompt, config.replayed, group)]
        other = replay.replayed(samples, self.tokenizer, config.max_new_tokens).to(self.model.device)
        if config.replayed == config.num_generations:
            return other, [sample.completion for sample in samples], samples
        rollout, own = replay.interleaved(rollout, other, len(prompts)), config.num_generations - config.replayed
        mine, theirs = iter(texts), iter(samples)
        origins = [next(theirs) if i >= own else None for _ in prompts for i in range(config.num_generations)]
        return rollout, [origin.completion if origin else next(mine) for origin in origins], origins

    def credit(self, scores, generator, z=None):
        """Rewards after any treatment, advantages, the labels routed by, and what is trained on at all; all (N,). z (N,): the
        probe's."""
        config, is_rh = self.config, torch.zeros_like(scores.is_rh)
        if config.uses_labels:
            self.watch.look(scores, self.env.reward.name)
            is_rh = routing.placebo_labels(scores.is_rh, generator) if config.placebo else scores.is_rh
        rewards = routing.treated_rewards(scores.reward, is_rh, config.treatment, config.penalty)
        rewards = rewards if z is None else monitor.modified(rewards, z, config.probe_form, config.probe_alpha)
        filtered, routed = config.treatment == "filter", config.routing == "dual"
        renormalise = "good_only" if filtered else config.renormalise if routed else "off"
        advantages = group_advantages(rewards, config.num_generations, config.loss_type != "dr_grpo", is_rh, renormalise)
        if config.loss_mode == "nll":
            advantages = torch.ones_like(advantages)
        return rewards, advantages, is_rh, ~is_rh if filtered else torch.ones_like(is_rh)

    def learn(self, rollout: Rollout, advantages, is_rh, kept, sources) -> dict[str, float]:
        """The optimizer's steps on the completions that are kept; metrics of `update`, none where none is kept."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self.config.lr * rate(self.steps_done, self.config)
        if not bool(kept.any()):
            return {}
        if not bool(kept.all()):
            rollout, advantages, is_rh = rollout.rows(kept.to(rollout.mask.device)), advantages[kept], is_rh[kept]
            sources = [source for source, there in zip(sources, kept.tolist()) if there]
        metrics = self.projector.refresh(self.steps_done) if self.projector else {}
        with dropping(self.model, self.config.seed * 1_000_003 + self.steps_done):
            metrics |= update(self.model, self.optimizer, rollout, advantages, is_rh, self.config, self.projector, sources)
        exact = self.model.device.type == "cpu"  # elsewhere a kernel chosen by gradient mode may round differently
        fresh = self.steps_done == 0 and self.model.adapter.spec.kind != "full" and not self.config.law().cut
        if fresh and metrics["kl"] > (0 if exact else 1e-3):
            raise AssertionError(f"the KL of a fresh adapter must be 0, not {metrics['kl']}: a branch does not start at zero")
        return metrics

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors of the adapter, everything else): what `restore` needs to go on bitwise equal."""
        watch = {"paid": self.watch.paid, "hits": self.watch.hits}
        rest = {"optimizer": self.optimizer.state_dict(), "watch": watch, "steps_done": self.steps_done}
        rest |= {"recent": list(self.recent)}
        rest |= {"projector": self.projector.state()} if self.projector else {}
        return adapter_tensors(self.model), rest

    def restore(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        set_adapter_tensors(self.model, tensors, "checkpoint")
        self.optimizer.load_state_dict(state["optimizer"])
        self.watch, self.steps_done = DetectorWatch(**state["watch"]), state["steps_done"]
        self.recent.extend(state["recent"])
        if self.projector:
            self.projector.restore(state["projector"])


def rate(step: int, config: Config) -> float:
    """The learning rate's factor at a step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = 1 - step / config.max_steps
    if config.lr_schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return warm * (1.0 if config.lr_schedule == "constant" else left)
