"""How noisy is each estimator's gradient, and does it point where the hard reward rises? Measured at a policy that never moves.

    python variance.py                                             # the embedded model, a fresh adapter moved off its start
    python variance.py --run results/ppo --checkpoint 500          # a run's policy as it was then
    python variance.py --flags "lora_config=r8 top_p=1"            # a fresh one, by more of train_reinforce.py's flags
    python variance.py --estimators grade,ste --taus 2,1,0.5       # a row for each temperature of the mixtures
    python variance.py --draws 0 --toy_draws 4096                  # the enumerable world alone

Every estimator makes --draws gradients of --batch_size completions each, under one law, beta and length. Each is what its
algorithm's `Trainer.step` leaves behind at learning rate 0, unclipped, without dropout. Reported are the relative variance (trace
of the covariance over the squared norm of the mean, see moments.py), the cosine of the mean to the gradient of the hard reward
(leave-one-out REINFORCE on --reference further batches), tokens and seconds. In the toy (toy.py) that gradient is exact.

grade, ste: at each of --taus. reinforce: the baseline is a moving average; reinforce_loo: the mean of a prompt's other
completions. ppo: the first step on a batch, where the ratio is 1, all of it one minibatch, with its value and entropy losses.
PPO's value head and the moving average settle on --warm batches first (0: they are 0). All aim at E[reward] - beta KL.
"""
import importlib
import json
import math
import random
import shlex
import sys
import time
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
import tyro
from tqdm import tqdm

import estimators
import runs
import toy
from adapters import branch_parameters, set_adapter_tensors
from checkpoints import atomic_write, latest_checkpoint, load_checkpoint
from experiments import markdown, plus_minus
from model import check_device
from moments import Moments, attenuation, bias, cosine, cosine_of, exact, halves, noise


@dataclass
class Args:
    run: str = ""
    """a run of train_gumbel.py, train_reinforce.py or train_ppo.py --env sentiment: its policy, prompts, judge, law and beta"""
    checkpoint: int = 0
    """the step of that run's checkpoint; 0: its last one"""
    model: str = "tiny"
    """without --run, a fresh adapter on this model: tiny, a local Hugging Face folder, or a Hub id"""
    flags: str = ""
    """without --run, more of train_reinforce.py's flags, such as "lora_config=r8 top_p=1": adapter, reviews, judge, law"""
    estimators: str = "grade,ste,reinforce,reinforce_loo,ppo"
    taus: str = "2"
    """temperatures of the mixtures, comma-separated: a row of grade and of ste for each"""
    draws: int = 32
    """gradients an estimator; 0: the toy alone"""
    reference: int = 256
    """batches of the reference, the gradient of the hard reward"""
    toy_draws: int = 512
    """gradients an estimator in the enumerable world; 0: none"""
    groups: int = 16
    """sums that draws are gathered in, an interval's observations; so many gradients in fp64 are in memory, twice"""
    warm: int = 50
    """batches on which PPO's value head and REINFORCE's moving average settle"""
    batch_size: int = 16
    """completions a gradient"""
    num_generations: int = 4
    """completions a prompt of reinforce_loo and of the reference; the others sample one of each"""
    beta: float | None = None
    """weight of the KL in every estimator's objective; default: the run's"""
    perturb: float = 0.02
    """deviation of the noise that moves a fresh adapter off its start, where half of a LoRA has no gradient"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    output_dir: str = "output/variance"
    seed: int = 42


TAKEN = ("temperature", "top_k", "top_p", "min_new_tokens", "max_new_tokens", "beta")  # of a run
FIXED = {"lr": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "micro_batch_size": 0}  # a step then leaves the policy as it is
ESTIMATORS = {
    "grade": ("rl_gumbel", {"estimator": "soft"}), "ste": ("rl_gumbel", {"estimator": "ste"}),
    "reinforce": ("rl_reinforce", {}), "reinforce_loo": ("rl_reinforce", {"baseline": "loo"}),
    "ppo": ("rl_ppo", {"num_epochs": 1, "num_minibatches": 1, "flow_every": 0}),
}  # fmt: skip
TOY_BETA = 0.1  # where --beta is not given
TOY_PERTURB = 0.3  # the toy's adapter is small: this moves it by about two nats a completion
REFERENCE_FROM = 500_000  # the reference's first step: whoever counts from 1 draws other numbers


def check(args: Args) -> list[tuple[str, str, float | None]]:
    """The rows to measure: (label, estimator, tau). Raises ValueError for flags that are wrong whatever is loaded."""
    chosen = [name.strip() for name in args.estimators.split(",")]
    if odd := [name for name in chosen if name not in ESTIMATORS]:
        raise ValueError(f"unknown --estimators {odd[0]!r}; known: {', '.join(ESTIMATORS)}")
    try:
        taus = [float(tau) for tau in args.taus.split(",")]
    except ValueError:
        taus = [math.nan]
    if not all(0 < tau < math.inf for tau in taus):
        raise ValueError(f"--taus {args.taus!r}: numbers above 0 with commas between, such as 2,1,0.5")
    if args.groups < 4 or args.groups % 2:
        raise ValueError(f"--groups must be even and at least 4, not {args.groups}")
    for name in ("draws", "reference", "toy_draws"):
        if (count := getattr(args, name)) < 0 or count % args.groups:
            raise ValueError(f"--{name} {count} is no multiple of --groups {args.groups}")
    if not args.draws and not args.toy_draws:
        raise ValueError("--draws 0 and --toy_draws 0 leave nothing to measure")
    if args.draws and not args.reference:
        raise ValueError("--reference 0: the cosines need at least --groups batches of it")
    for name in ("warm", "perturb"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name} must be at least 0, not {getattr(args, name)}")
    if args.beta is not None and not args.beta >= 0:
        raise ValueError(f"--beta must be at least 0, not {args.beta}")
    if args.run and (args.flags or args.model != Args.model):
        raise ValueError("--run has a model and flags of its own: leave --model and --flags out")
    if odd := [word for word in shlex.split(args.flags) if "=" not in word]:
        raise ValueError(f"--flags {odd[0]!r}: name=value, with blanks between, such as 'lora_config=r8 top_p=1'")
    if args.checkpoint < 0 or (args.checkpoint and not args.run):
        raise ValueError(f"--checkpoint {args.checkpoint} is a step of a --run")
    check_device(args.device)
    if args.num_generations < 2 or args.batch_size < 1 or args.batch_size % args.num_generations:
        raise ValueError(f"--num_generations {args.num_generations} must be 2 or more and divide --batch_size {args.batch_size}")
    relaxed = [name for name in chosen if ESTIMATORS[name][0] == "rl_gumbel"]
    return [(label_of(name, tau), name, tau) for name in chosen for tau in (taus if name in relaxed else [None])]


def label_of(name: str, tau: float | None) -> str:
    return name if tau is None else f"{name} {tau:g}"


# ----------------------------------------------------------------------------------------------- one estimator's gradients


@dataclass
class World:
    """Where gradients are measured: a policy, its environment, and flags that all algorithms get, over estimators.PRESET's."""

    model: torch.nn.Module
    env: object
    tokenizer: object
    flags: dict
    policy: str  # in words
    where: dict = field(default_factory=dict)  # the run that the policy is of: run, method, seed, checkpoint; empty: of no run


def open_world(args: Args) -> World:
    """A run's policy, or a fresh one moved off its start; its judge is the run's. Raises ValueError for what can't be loaded."""
    if args.run:
        run = runs.read_config(args.run)
        if run.get("env") != "sentiment":
            raise ValueError(f"{args.run} is no run of --env sentiment")
        module, root = importlib.import_module(run["algorithm"]), Path(args.run).parent
        flags, config = (kind(**{f.name: run[f.name] for f in fields(kind)}) for kind in (estimators.Flags, module.Config))
        chosen = Path(args.run) / f"checkpoint-{args.checkpoint}" if args.checkpoint else latest_checkpoint(args.run)
        if chosen is None:
            raise ValueError(f"{args.run} holds no checkpoint")
        step, tensors, _ = load_checkpoint(chosen)
    else:
        words = [f"--{word}" for word in [f"model={args.model}", *shlex.split(args.flags)]]
        _, _, flags, config = estimators.parse(words, "rl_reinforce", partial(tyro.cli, use_underscores=True))
        root = Path(flags.results_dir)
    flags.device, flags.lora_dropout = args.device, 0.0  # gradients of the policy that is sampled, without the noise of masks
    model, tokenizer, env = estimators.build(flags, config, root)
    if args.run:
        set_adapter_tensors(model, tensors, str(chosen))
        policy, where = str(chosen), {"run": args.run, "method": run["method"], "seed": run["seed"], "checkpoint": step}
    else:
        perturb(model, args.perturb, args.seed)
        policy, where = f"a fresh {flags.lora_config} on {flags.model}, moved by {args.perturb:g}", {}
    taken = {name: getattr(config, name) for name in TAKEN if hasattr(config, name)}
    taken |= {"batch_size": args.batch_size, "seed": args.seed} | ({} if args.beta is None else {"beta": args.beta})
    return World(model, env, tokenizer, taken, policy, where)


@dataclass
class Drawn:
    """An estimator's draws: their moments, and means over them."""

    moments: Moments
    seconds: float  # a gradient; the median
    tokens: float  # a gradient
    reward: float  # hard
    kl: float  # to the reference policy, nats a completion


def perturb(model, deviation: float, seed: int) -> None:
    """Moves every trainable tensor by Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    for group in branch_parameters(model).values():
        for p in group.values():
            p.data += deviation * torch.randn(p.shape, generator=generator).to(p)


def flat_gradient(model) -> torch.Tensor:
    """(D,): the gradients of all trainable parameters, 0 where there is none."""
    parameters = [p for group in branch_parameters(model).values() for p in group.values()]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def make_trainer(world: World, name: str, tau: float | None, num_generations: int):
    """An estimator's own Trainer, at learning rate 0."""
    module, own = ESTIMATORS[name]
    module = importlib.import_module(module)
    if tau is not None:
        own = own | {"tau_start": tau, "tau_end": tau}
    if own.get("baseline") == "loo":
        own = own | {"num_generations": num_generations}
    preset = {flag: value for flag, value in estimators.PRESET.items() if flag in module.Config.__dataclass_fields__}
    return module.Trainer(world.model, world.env, world.tokenizer, module.Config(**(preset | own | world.flags | FIXED)))


def one_gradient(trainer, step: int, prompts: list[str]) -> tuple[torch.Tensor, dict[str, float], float]:
    """(gradient (D,), the step's metrics, seconds) of a batch of these prompts; `step` is what its random numbers come from."""
    count = len(prompts) // getattr(trainer.config, "num_generations", 1)
    trainer.prompts, trainer.steps_done = prompts[:count], step
    start = time.perf_counter()
    metrics, _ = trainer.step()
    return flat_gradient(trainer.model), metrics, time.perf_counter() - start


def draw(world: World, name: str, tau, count: int, first: int, args: Args) -> Drawn:
    """`count` gradients of an estimator at steps first, first + 1, ... after --warm others. Its prompts are the step's, whatever
    the estimator, and drawn with replacement: the moments are of independent draws."""
    trainer, pool = make_trainer(world, name, tau, args.num_generations), world.env.prompts("train")

    def gradient(step: int):
        return one_gradient(trainer, step, random.Random(f"{args.seed} {step}").choices(pool, k=args.batch_size))

    for step in range(first - args.warm, first) if name in ("reinforce", "ppo") else ():
        gradient(step)
    for group in trainer.optimizer.param_groups:
        group["rate"] = 0.0  # PPO's value head stays as it is from here on
    moments, seconds, logged = Moments(len(flat_gradient(world.model)), args.groups), [], []
    for step in tqdm(range(first, first + count), desc=label_of(name, tau)):
        found, metrics, took = gradient(step)
        moments.add(found)
        seconds.append(took)
        metrics = estimators.seed_names(metrics, trainer.config)
        logged.append((metrics["length"] * args.batch_size, metrics["reward"], metrics["kl"]))
    return Drawn(moments, median(seconds), *map(fmean, zip(*logged)))


def figures_of(drawn: Drawn, reference: Moments) -> dict[str, float]:
    """What is reported of an estimator."""
    found = noise(drawn.moments)
    found |= dict(zip(("cosine", "cosine_half"), cosine(drawn.moments, reference)))
    found |= dict(zip(("bias", "bias_half"), bias(drawn.moments, reference)))
    found["cosine_of_means"] = cosine_of(drawn.moments.mean, reference.mean)
    found["attenuation"] = attenuation(drawn.moments) * attenuation(reference)
    return found | {name: getattr(drawn, name) for name in ("tokens", "seconds", "reward", "kl")}


def measure(world: World, rows, args: Args) -> dict:
    """{"rows": figures by label, "reference": figures, "where": the policy's run, seed, checkpoint and KL in nats a completion},
    against a large batch's gradient of the hard reward."""
    for _, name, tau in rows:
        make_trainer(world, name, tau, args.num_generations)  # what it refuses, it refuses before hours of drawing
    drawn = draw(world, "reinforce_loo", None, args.reference, REFERENCE_FROM, args)
    split, by_halves = halves(drawn.moments)
    about = {"halves": split, "attenuation_by_halves": by_halves, "attenuation": attenuation(drawn.moments)}
    about |= noise(drawn.moments) | {"reward": drawn.reward, "kl": drawn.kl}
    measured = ((label, draw(world, name, tau, args.draws, 1 + args.warm, args)) for label, name, tau in rows)
    return {"rows": {label: figures_of(one, drawn.moments) for label, one in measured}, "reference": about,
            "policy": world.policy, "where": world.where | {"kl": drawn.kl}, "flags": world.flags}  # fmt: skip


def measure_toy(rows, args: Args) -> dict:
    """{"toy": figures by label}, against the exact gradient of the enumerable world."""
    env, model = toy.Toy(), toy.policy(args.seed)
    perturb(model, TOY_PERTURB, args.seed)
    beta = TOY_BETA if args.beta is None else args.beta
    flags = {"batch_size": args.batch_size, "beta": beta, "seed": args.seed, "max_new_tokens": env.length, "min_new_tokens": 0}
    world = World(model, env, toy.TOKENIZER, flags | {"top_p": 1.0}, "toy")
    toy.exact_loss(model, env, beta).backward()
    truth = exact(flat_gradient(model), args.groups)
    drawn = ((label, draw(world, name, tau, args.toy_draws, 1 + args.warm, args)) for label, name, tau in rows)
    return {"toy": {label: figures_of(one, truth) for label, one in drawn}, "toy_beta": beta}


# ------------------------------------------------------------------------------------------------------------- the report


def spelt(row: dict) -> str:
    """The relative variance and its interval; nan is no number."""
    value, low, high = (row[key] for key in ("ratio", "low", "high"))
    return "not resolved" if math.isnan(value) else f"{value:.3g} [{low:.3g}, {'open' if math.isinf(high) else f'{high:.3g}'}]"


def either(pair: tuple[float, float]) -> str:
    return "not resolved" if math.isnan(pair[0]) else plus_minus(pair)


def cells(label: str, row: dict, of_toy: bool) -> list[str]:
    """An estimator's row of a table."""
    measured = [label, spelt(row), f"{row['uncorrected']:.3g}"]
    measured += [either((row["cosine"], row["cosine_half"])), f"{row['cosine_of_means']:.3f}"]
    if of_toy:  # PPO's advantages are whitened, and its losses means over tokens: its gradient has a length of its own
        return [*measured, "–" if label == "ppo" else either((row["bias"], row["bias_half"]))]
    cost = "not resolved" if math.isnan(row["ratio"]) else f"{row['seconds'] * row['ratio']:.3g}"
    return [*measured, either((row["attenuation"], math.inf)), f"{row['tokens']:,.0f}", f"{row['seconds']:.3g}", cost]


HEADS = ["estimator", "relative variance", "uncorrected", "cosine", "of the means"]


def report(found: dict, args: Args) -> str:
    """The text of report.md."""
    settings = f"{args.batch_size} completions a gradient, {args.warm} batches to settle on, {args.groups} groups of draws"
    lines = ["# Gradients at a policy that does not move", f"{settings}, seed {args.seed}. Intervals at 95%."]
    if "rows" in found:
        about, heads = found["reference"], [*HEADS, "attenuation", "tokens", "seconds", "seconds x variance"]
        by_halves, by_pairs = (either((about[key], math.inf)) for key in ("attenuation_by_halves", "attenuation"))
        lines += [
            f"## {args.draws} draws at {found['policy']}, beta {found['flags']['beta']:g}",
            markdown(heads, [cells(*row, False) for row in found["rows"].items()]),
            f"Reference: leave-one-out REINFORCE, {args.reference * args.batch_size:,} completions; relative variance of one of "
            f"its batches {spelt(about)}. The cosine of its halves is {about['halves']:.3f}: its noise makes a cosine to it "
            f"{by_halves} of what it is (by pairs of batches {by_pairs}). The policy's hard reward is {about['reward']:.3f}, its "
            f"KL {about['kl']:.3f} nats a completion.",
        ]
    if "toy" in found:
        table = markdown([*HEADS, "squared bias"], [cells(*row, True) for row in found["toy"].items()])
        lines += [f"## {args.toy_draws} draws in the toy, beta {found['toy_beta']:g}, against its exact gradient", table]
    return "\n\n".join(line.rstrip() for line in lines) + "\n"


def draw_bars(found: dict, path: Path) -> None:
    """A picture: relative variances, cosines, and in the toy cosines and squared biases, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (rows, *panel)
        for rows, where in ((found.get("rows"), ""), (found.get("toy"), "toy: "))
        for panel in ((f"{where}relative variance", "ratio"), (f"{where}cosine to the gradient", "cosine"),
                      (f"{where}squared bias", "bias"))
        if rows and (where or panel[1] != "bias")
    ]  # fmt: skip
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (rows, title, key) in zip(axes.flat, panels):
        rows = {label: row for label, row in rows.items() if key != "bias" or label != "ppo"}
        for place, row in enumerate(rows.values()):
            value = row[key]
            if math.isnan(value):
                axis.text(place, 0.5, "not resolved", rotation=90, ha="center", va="center", transform=axis.get_xaxis_transform())
                continue
            half = row.get(f"{key}_half")
            low, high = (value - half, value + half) if half is not None else (row["low"], row["high"])
            axis.bar(place, value, color=f"C{place}", alpha=0.6)
            axis.vlines(place, low, high if math.isfinite(high) else 10 * value, "black", "--" if math.isinf(high) else "-")
        axis.set_xticks(range(len(rows)), rows, rotation=45, ha="right")
        axis.set(title=title, xlim=(-0.6, len(rows) - 0.4), yscale="log" if key == "ratio" else "linear")
        axis.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plain(value):
    """For JSON, which has no nan: what is not resolved is said so, and an open end too."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "not resolved" if math.isnan(value) else "open"
    return value


# ------------------------------------------------------------------------------------------------------------------ main


def main(args: Args) -> int:
    rows, folder, found = check(args), Path(args.output_dir), {"args": vars(args).copy()}
    if args.draws:
        found |= measure(open_world(args), rows, args)
    if args.toy_draws:
        found |= measure_toy(rows, args)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "variance.json", json.dumps(plain(found), indent=1, allow_nan=False) + "\n")
    draw_bars(found, folder / "variance.png")
    text = report(found, args)
    atomic_write(folder / "report.md", text)
    print(f"{text}\n{folder}/variance.json, variance.png, report.md")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__, use_underscores=True)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
