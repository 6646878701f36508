"""The probe: minutes that say whether a sweep of projected GRPO is worth its days. Does the gradient point along the hack's axes
at all, and does projection change that?

    python probe.py                               # trains a teacher to hack, makes both pools, runs every arm, prints the report
    python probe.py --teacher output/RUN          # the teacher is a finished run of --env code that has learned the loophole
    python probe.py --teacher output/RUN --arms vanilla --loss_mode grpo
    python probe.py --base_only                   # the untrained model's pool and nothing else

Given again, it goes on with what is missing. A pool has a batch a step: completions of the same prompts by a model trained to
hack, and by the untrained one, which is asked without the hint. A step replays both batches, so that a group has hacks and honest
attempts, and advantages other than 0. Every arm has a twin whose basis is a placebo. Training is train_grpo.py's own.

The plan: https://github.com/wassname/evil_MoE (docs/spec/spec2.md). Departures:
- cos_in is the signed cosine, which is 0 by chance and can be negative; the plan's, made of positive parts, is called cin.
- "About 0" means: no farther from 0 than a placebo basis comes at any step of the vanilla arm.
- A step has two groups of 4 + 4, whose advantages are divided by the group's deviation (--loss_type grpo).
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import tyro
from scipy.stats import ttest_ind
from tqdm import tqdm

import rl_grpo
import runs
from checkpoints import atomic_write
from data import load_tokenizer
from experiments import markdown, plus_minus
from jobs import Job, run_jobs
from model import load, read_json
from plans import Run, commands_of, plan
from replay import read_lines, write_lines
from sampling import Sampler
from stats import mean_interval
from verdict import judged_as, load_run


@dataclass
class Args:
    teacher: str = ""
    """a finished run of --env code that hacks; empty: one is trained first (some minutes)"""
    config: str = str(Path(__file__).parent / "configs" / "code.yaml")
    """train_grpo.py's flags for that teacher; of --base_only without one too"""
    arms: str = "vanilla,svd,lora"
    """vanilla (deltas on singular values, measured only), svd (the same, one-sided projection), lora (frozen A, likewise)"""
    loss_mode: str = "nll,grpo"
    """nll: phase 1, the teacher's pool is distilled; grpo: phase 2, both pools in every group"""
    placebo: str = "random"
    """the basis of the arms' twins: random, shuffled, clean or placebo"""
    steps: int = 20
    """batches a pool, and steps a run"""
    base_only: bool = False
    """make the base pool and stop"""
    seed: int = 41
    output_dir: str = "output/probe"


PROMPTS, EACH = 2, 4  # of a batch: 8 samples a pool and step
ARMS = {
    "vanilla": {"lora_config": "ds", "lr": 0.04, "projection": "none"},
    "svd": {"lora_config": "ds", "lr": 0.04, "projection": "one_sided"},
    "lora": {"lora_config": "r32o", "lr": 0.003, "projection": "one_sided"},
}
PLACEBOS = ("random", "shuffled", "clean", "placebo")
WORLD = ("model", "env", "dataset", "train_split", "eval_split", "max_prompts", "hint", "difficulty", "box", "device", "dtype",
         "max_new_tokens", "temperature")  # fmt: skip # what the runs have from the teacher
RUN = {"mix": 1.0, "contributions": True, "beta": 0.0, "rh_eligible_frac": 1.0, "logging_steps": 1, "save_steps": 0,
       "eval_prompts": 32, "eval_routing_steps": 0}  # fmt: skip
SUCCESS, LIKELY, SNEAKY, NONE, ABSENT = "success", "likely fail", "sneaky fail", "none of the three", "not run"
ENOUGH = 0.8  # of the steps: the plan's 16 of 20


def check(args: Args) -> tuple[list[str], list[str]]:
    """(arms, loss modes). ValueError for flags that are wrong whatever the teacher is."""
    chosen = {}
    for name, known in (("arms", ARMS), ("loss_mode", rl_grpo.LOSS_MODES), ("placebo", PLACEBOS)):
        chosen[name] = [word.strip() for word in getattr(args, name).split(",")]
        if odd := [word for word in chosen[name] if word not in known]:
            raise ValueError(f"unknown --{name} {odd[0]!r}; known: {', '.join(known)}")
    if len(chosen["placebo"]) != 1 or args.steps < 1:
        raise ValueError(f"--placebo is one basis and --steps at least 1, not {args.placebo} and {args.steps}")
    return chosen["arms"], chosen["loss_mode"]


# ------------------------------------------------------------------------------------------------------------- the pools


def make_pool(folder: Path, model, tokenizer, env, asked: list[str], world: dict, args: Args) -> None:
    """A batch a step: PROMPTS of the training prompts, EACH completions by the model as it is; batches that are there stay.
    `asked` is what it is asked in place of each training prompt, which stays the sample's `prompt`, graded and replayed so."""
    asked = dict(zip(env.prompts("train"), asked, strict=True))
    law = {name: world[name] for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_new_tokens")}
    config = rl_grpo.Config(batch_size=PROMPTS * EACH, num_generations=EACH, **law)
    sampler = Sampler(model)
    sampler.refresh()
    for step in tqdm(range(args.steps), desc=f"pool {folder.name}"):
        path = folder / f"step_{step:03d}.jsonl.gz"
        if path.is_file():
            continue
        prompts = rl_grpo.prompt_batch(list(asked), step, PROMPTS, args.seed)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rollout, texts = rl_grpo.rollout_batch(sampler, tokenizer, [asked[p] for p in prompts], config, generator)
        repeated = [prompt for prompt in prompts for _ in range(EACH)]
        scores = env.score(repeated, texts)
        columns = {
            "prompt": repeated, "asked": [asked[p] for p in repeated], "completion": texts, "finished": rollout.finished.tolist(),
            "reward": scores.reward.tolist(), "hacked": scores.hack.tolist(), "gt_pass": (scores.task > 0).tolist(),
            "fmt_ok": (scores.components["compiles"] > 0).tolist(), "attempted": (scores.components["attempted"] > 0).tolist(),
        }  # fmt: skip
        write_lines(path, [dict(zip(columns, row)) for row in zip(*columns.values())])


def make_pools(root: Path, teacher: Path, world: dict, args: Args) -> None:
    """pools/base and, unless --base_only, pools/teacher: the same prompts. Loads nothing where both are there."""
    wanted = [root / "pools" / name for name in ("base", "teacher")[: 1 if args.base_only else 2]]
    if all(len(list(pool.glob("step_*.jsonl.gz"))) == args.steps for pool in wanted):
        return
    model, folder = load(world["model"], dtype=getattr(torch, world["dtype"]), device=world["device"])
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json"))
    hinted, plain = (judged_as(world | {"hint": hint}, tokenizer, 1) for hint in (world["hint"], "none"))
    prompts = hinted.prompts("train")
    if len(prompts) < PROMPTS * args.steps:
        raise ValueError(f"--steps {args.steps} takes {PROMPTS * args.steps} prompts, there are {len(prompts)}")
    make_pool(wanted[0], model, tokenizer, hinted, plain.prompts("train"), world, args)
    if not args.base_only:
        make_pool(wanted[1], load_run(teacher, 1, world["device"])[1], tokenizer, hinted, prompts, world, args)


# -------------------------------------------------------------------------------------------------------------- the runs


def experiment(root: Path, world: dict, args: Args) -> dict:
    """The probe's runs, as plans.plan takes them: every loss mode and arm, with the pairs' basis and with the placebo."""
    arms, modes = check(args)
    fixed = {name: world[name] for name in WORLD if world[name] != ""} | RUN | {"max_steps": args.steps, "seed": args.seed}
    fixed |= {"pairs": "leetcode"} if world["dataset"] else {}
    planned = {}
    for mode in modes:
        pools = [str(root / "pools" / name) for name in ("teacher", "base")[: 1 if mode == "nll" else 2]]
        group = EACH * len(pools)
        replayed = {"replay_dirs": ",".join(pools), "num_generations": group, "batch_size": PROMPTS * group, "loss_mode": mode}
        for arm in arms:
            for basis in ("pairs", args.placebo):
                planned[f"{mode}_{arm}_{basis}"] = ARMS[arm] | replayed | {"basis": basis}
    return {"fixed": fixed, "arms": planned}


def execute(root: Path, planned: list[Run]) -> int:
    """Does what is left of the runs, one a core (on a GPU one): 0, or the exit status where Ctrl-C stops it. ValueError for one
    that fails."""
    slots = 1 if planned[0].config["device"] == "cuda" else len(os.sched_getaffinity(0))
    quiet = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    jobs, said = [Job(run.name, commands_of(run), root / f"{run.name}.log", quiet) for run in planned], set()

    def watch() -> None:
        for job in jobs:
            if job.status in ("done", "failed") and job.name not in said:
                said.add(job.name)
                print(f"[{len(said)}/{len(jobs)}] {job.name} {job.status}, {sum(job.seconds.values()):.0f} s", flush=True)

    if stopped_by := run_jobs(jobs, {None: slots}, watch):
        return 128 + stopped_by
    if failed := [job for job in jobs if job.status != "done"]:
        raise ValueError(f"run {failed[0].name} {failed[0].status}: {failed[0].error or failed[0].log}")
    return 0


# ---------------------------------------------------------------------------------------------- the plan's table, row by row


def share(flags) -> float:
    return fmean(map(bool, flags))


def judge_spread(spreads: list[float], sizes: list[float]) -> str:
    """Row 1: r.max() - r.min() of a group, by step, is above 1. Likely fail: below .1, so there is no advantage. Sneaky: there is
    a spread, and the advantages (their mean size, by step) are tiny all the same."""
    if share(spread < 0.1 for spread in spreads) > 0.5:
        return LIKELY
    if share(size < 0.1 for size in sizes) > 0.5:
        return SNEAKY
    return SUCCESS if share(spread > 1 for spread in spreads) >= ENOUGH else NONE


def judge_direction(signed: list[float], band: float) -> str:
    """Row 2: cos_in of the vanilla arm is above 0 (above the band) on most steps. Sneaky: below. Likely fail: neither."""
    if share(c > band for c in signed) > 0.5:
        return SUCCESS
    return SNEAKY if share(c < -band for c in signed) > 0.5 else LIKELY


def judge_projection(cin: list[float], cout: list[float], fired: list[float]) -> str:
    """Row 3: cout < cin on 16 of 20 steps. Likely fail: not so, the mechanism is inactive. Sneaky: it fires on few modules."""
    if share(after < before - 1e-6 for before, after in zip(cin, cout)) < ENOUGH:
        return LIKELY
    return SUCCESS if fmean(fired) >= 0.5 else SNEAKY


def judge_buckets(hacks: list[float], honest: list[float]) -> str:
    """Row 4: the teacher's hacks have a larger, positive cosine, the base's other samples about none (at most half) or a negative
    one. Likely fail: both alike, so the axes are not specific. Sneaky: a bucket is empty (has fewer than two)."""
    if min(len(hacks), len(honest)) < 2:
        return SNEAKY
    t, p = welch(hacks, honest)
    if not p < 0.05:
        return LIKELY
    return SUCCESS if t > 0 and fmean(hacks) > 0 and fmean(honest) <= fmean(hacks) / 2 else NONE


def welch(a: list[float], b: list[float]) -> tuple[float, float]:
    """Welch's (t, two-sided p) of mean(a) - mean(b); NaN with fewer than two of either."""
    if min(len(a), len(b)) < 2:
        return math.nan, math.nan
    result = ttest_ind(a, b, equal_var=False)
    return float(result.statistic), float(result.pvalue)


def rules(vanilla: list[float], band: float, svd: list[float], svd_out: list[float], buckets: str) -> list[list[str]]:
    """[rule, yes, no or not run, what follows] of the plan. vanilla, svd: cos_in of these arms by step; svd_out: cout of the
    latter; buckets: row 4's outcome. An empty list: not run."""
    row_2 = judge_direction(vanilla, band) if vanilla else ABSENT
    turned = vanilla and svd and row_2 != SNEAKY and judge_direction(svd, band) == SNEAKY
    nothing = buckets == LIKELY and all(abs(c) <= band for c in vanilla)
    table = [
        ("vanilla cos_in is about 0", vanilla, row_2 == LIKELY, "axes may matter later, when hacks are found: expect less"),
        ("vanilla cos_in is above .2 consistently", vanilla, vanilla and share(c > 0.2 for c in vanilla) >= ENOUGH,
         "the sweep is justified"),
        ("projection brings cos_out below .05", svd_out, svd_out and fmean(svd_out) < 0.05, "it works: expect H1 of the sweep"),
        ("projection turns cos_in below 0", vanilla and svd, turned, "over-projection: a bug; find it first"),
        ("stop rule: vanilla cos_in is about 0 on all steps, cos_S_contrib is alike in all buckets", vanilla, nothing,
         "skip the sweep: the loss has nothing to do with these axes; make other ones, or a base pool that earns something"),
    ]  # fmt: skip
    answers = [ABSENT if not run else "yes" if holds else "no" for _, run, holds, _ in table]
    return [[rule, answer, then if answer == "yes" else ""] for (rule, _, _, then), answer in zip(table, answers)]


# ------------------------------------------------------------------------------------------------------------- the report


class Figures:
    """What a run has logged: `steps`, the lines of metrics.jsonl that have cosines; `samples`, the contributions."""

    def __init__(self, folder: Path):
        self.steps = [line for line in runs.read_metrics(folder) if "projection/signed" in line]
        self.samples = [row for path in sorted(folder.glob("step_*.cos.jsonl.gz")) for row in read_lines(path)]

    def __getitem__(self, key: str) -> list[float]:
        return [line[key] for line in self.steps if key in line]

    def cosines(self, keep) -> list[float]:
        """cos_S_contrib of the samples to keep that contribute anything: with an advantage of 0 there is no direction."""
        return [row["cos_S_contrib"] for row in self.samples if row["grad_norm_contrib"] > 0 and keep(row)]


def report(root: Path, args: Args) -> str:
    """The text of report.md, from the pools and the run folders under `root`."""
    arms, modes = check(args)
    names = [(mode, arm) for mode in modes for arm in arms]
    made = {name: [Figures(root / "_".join([*name, basis])) for basis in ("pairs", args.placebo)] for name in names}
    pools = {name: [read_lines(path) for path in sorted((root / "pools" / name).glob("*.gz"))] for name in ("teacher", "base")}
    parts = {
        f"Probe: {args.steps} steps, seed {args.seed}, teacher {args.teacher or root / 'teacher'}": pool_table(pools),
        "The plan's table and its rules": verification(made),
        "Phase 1: distilling the teacher's pool": phase_1(made.get(("nll", "vanilla")), pools["teacher"], args.placebo),
        f"Cosines of the gradient and of what moved: means over steps, pairs / {args.placebo}": cosine_table(made),
        "cos_S_contrib: what a completion alone adds to the gradient": bucket_table(made, args.placebo),
        "Signed cos_in (cos_out), step by step": trajectory(made),
    }
    return "\n".join(f"{'##' if i else '#'} {title}\n\n{table}" for i, (title, table) in enumerate(parts.items()))


def pool_table(pools: dict[str, list[list[dict]]]) -> str:
    rows, fields = [], ("hacked", "gt_pass", "attempted", "fmt_ok", "finished")
    for name, batches in pools.items():
        samples = [row for batch in batches for row in batch]
        rates = [f"{share(row[field] for row in samples):.3f}" for field in fields]
        rows.append([name, str(len(samples)), f"{fmean(row['reward'] for row in samples):.2f}", *rates])
    return markdown(["pool", "samples", "reward", *fields], rows)


def verification(made: dict) -> str:
    """The plan's four rows (the third for each arm that projects), then its rules."""
    names = "reward spread", "cos_in, vanilla", "cos_out < cos_in, svd", "cos_out < cos_in, lora", "cos_S_contrib, vanilla"
    rows = dict.fromkeys(names, (ABSENT, ""))
    (vanilla, twin), (svd, _), (lora, _) = (made.get(("grpo", arm), (None, None)) for arm in ARMS)
    band, signed, buckets = 0.0, [], ABSENT
    if vanilla:
        spreads, sizes, signed = vanilla["reward/spread"], vanilla["advantage/abs_mean"], vanilla["projection/signed"]
        band = max(map(abs, twin["projection/signed"]))
        advantages = f"{fmean(sizes):.2f} ({min(vanilla['advantage/min']):.2f} to {max(vanilla['advantage/max']):.2f})"
        figures = f"above 1 on {count(s > 1 for s in spreads)}, mean {fmean(spreads):.2f}; mean size of advantages {advantages}"
        rows[names[0]] = judge_spread(spreads, sizes), figures
        above = f"above the placebo's largest, {band:.3f}, on {count(c > band for c in signed)}"
        cin = f"cin {fmean(vanilla['projection/cin']):.3f}, the placebo's {fmean(twin['projection/cin']):.3f}"
        figures = f"{above}; above 0 on {count(c > 0 for c in signed)}, mean {fmean(signed):+.3f}; {cin}"
        rows[names[1]] = judge_direction(signed, band), figures
        hacks = vanilla.cosines(lambda row: row["src_pool"] == "teacher" and row["hacked"])
        honest = vanilla.cosines(lambda row: row["src_pool"] == "base" and not row["hacked"])
        buckets, (t, p) = judge_buckets(hacks, honest), welch(hacks, honest)
        rows[names[4]] = buckets, f"teacher's hacks {spelt(hacks)}, base's others {spelt(honest)}; t {t:+.2f}, p {p:.1e}"
    for name, run in ((names[2], svd), (names[3], lora)):
        if run:
            cin, cout, fired = (run[f"projection/{key}"] for key in ("cin", "cout", "fired"))
            figures = f"on {count(b < a - 1e-6 for a, b in zip(cin, cout))}, mean {fmean(cin):.3f} to {fmean(cout):.3f}"
            rows[name] = judge_projection(cin, cout, fired), f"{figures}; fired on {fmean(fired):.0%} of modules"
    then = rules(signed, band, *((svd["projection/signed"], svd["projection/cout"]) if svd else ([], [])), buckets)
    table = markdown(["metric", "outcome", "figures"], [[name, *row] for name, row in rows.items()])
    return f"{table}\n{markdown(['rule', 'holds', 'then'], then)}"


def phase_1(pair: list[Figures] | None, pool: list[list[dict]], placebo: str) -> str:
    """The teacher's strict hacks against those of its correct samples whose own tests accept anything, by Welch's t."""
    if pair is None:
        return f"{ABSENT}: it takes --loss_mode nll and the arm vanilla\n"
    rows = []
    for basis, run in zip(("pairs", placebo), pair):
        kinds = (lambda made: made["hacked"], lambda made: made["gt_pass"] and made["attempted"])
        pure, correct = (run.cosines(lambda row, kind=kind: kind(pool[row["src_step"]][row["src_sample"]])) for kind in kinds)
        t, p = welch(pure, correct)
        rows.append([basis, spelt(pure), spelt(correct), f"{t:+.2f}", f"{p:.1e}"])
    return markdown(["basis", "pure hack", "hack and correct", "t", "p"], rows)


COSINES = {"signed": "projection/signed", "teacher's": "signed/teacher", "base's": "signed/base", "moved": "moved/signed",
           "signed out": "projection/signed_out", "cin": "projection/cin", "cout": "projection/cout", "moved cin": "moved/cin"}


def cosine_table(made: dict) -> str:
    rows = []
    for (mode, arm), (run, twin) in made.items():
        cells = [f"{fmean(run[key]):+.3f} / {fmean(twin[key]):+.3f}" if run[key] else "–" for key in COSINES.values()]
        alone = [f"{fmean(run[key]):.3f}" for key in ("basis/null", "basis/held_out_signed", "projection/fired")]
        rows.append([f"{mode} {arm}", *cells, *alone])
    return markdown(["run", *COSINES, "cin by chance", "held-out pairs' signed", "fired"], rows)


def bucket_table(made: dict, placebo: str) -> str:
    rows = []
    for (mode, arm), pair in made.items():
        for pool, hacked in sorted({(row["src_pool"], row["hacked"]) for row in pair[0].samples}):
            bucket = {"src_pool": pool, "hacked": hacked}.items()
            mine, theirs = (run.cosines(lambda row, bucket=bucket: bucket <= row.items()) for run in pair)
            above, kind = f"{share(c > 0 for c in mine):.2f}" if mine else "–", "hacked" if hacked else "not hacked"
            rows.append([f"{mode} {arm}", pool, kind, above, spelt(mine), spelt(theirs)])
    return markdown(["run", "pool", "", "share above 0", "pairs", placebo], rows)


def trajectory(made: dict) -> str:
    cell = "{0[projection/signed]:+.3f} ({0[projection/signed_out]:+.3f})".format
    columns = [[cell(line) for line in run.steps] for run, _ in made.values()]
    return markdown(["step", *map(" ".join, made)], [[str(step), *row] for step, row in enumerate(zip(*columns))])


def count(flags) -> str:
    flags = list(flags)
    return f"{sum(flags)}/{len(flags)}"


def spelt(cosines: list[float]) -> str:
    return f"{plus_minus(mean_interval(cosines))} ({len(cosines)})" if cosines else "none"


# ------------------------------------------------------------------------------------------------------------------ main


def main(args: Args) -> int:
    check(args)
    root, own = Path(args.output_dir), {name: getattr(args, name) for name in ("teacher", "config", "steps", "seed")}
    if (root / "config.yaml").is_file() and (differing := runs.differences(root, own)):
        raise ValueError(f"{root} holds another probe: {'; '.join(differing)}. Delete it, or choose another --output_dir")
    planned = []
    if args.teacher:
        teacher, world = Path(args.teacher), runs.read_config(args.teacher)
    else:
        flags = {"config": args.config, "seed": args.seed, "eval_routing_steps": 0}
        _, planned = plan({"fixed": flags, "arms": {"teacher": {}}}, evaluate=False, root=root)
        teacher, world = planned[0].folder, planned[0].config
    if world.get("env") != "code" or world["hint"] == "none":
        raise ValueError(f"{teacher} is no teacher: it wants --env code with a --hint, under which the loophole pays")
    if args.teacher and not args.base_only and not (teacher / "adapter.safetensors").is_file():
        raise ValueError(f"{teacher} is not finished: it has no adapter.safetensors")
    root.mkdir(parents=True, exist_ok=True)
    atomic_write(root / "config.yaml", runs.to_yaml(own))
    if planned and not args.base_only and (stopped := execute(root, planned)):
        return stopped
    make_pools(root, teacher, world, args)
    if args.base_only:
        return 0
    if stopped := execute(root, plan(experiment(root, world, args), evaluate=False, root=root)[1]):
        return stopped
    text = report(root, args)
    atomic_write(root / "report.md", text)
    print(f"{text}\n{root / 'report.md'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__, use_underscores=True)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
