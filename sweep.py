"""Many runs from one command: a grid of flags, named arms, as many at once as there are slots, one summary over seeds.

    python sweep.py configs/routing.yaml                      # the experiment in the file; given again, it goes on
    python sweep.py configs/routing.yaml --dry_run            # the exact commands and run names; starts nothing
    python sweep.py --reward sentence_length_5 --grid seed=42,123,7 beta=0.01,0.02 --fixed lr=1e-5 batch_size=32 --per_gpu 12

In order: the plan (plans.py), the lock on the experiment's folder, what is finished already, the runs (jobs.py), the summary.
It knows run folders, not algorithms.
"""

import fcntl
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from checkpoints import atomic_write
from experiments import label_of, markdown, numbers, summarise, summary_rows
from jobs import Job, run_jobs
from mps import shared_gpus
from plans import Run, commands_of, plan, read_experiment

MEASURES = ("task", "hack", "reward", "unique", "jaccard", "degenerate")  # of the summary
PROGRESS = ("step", "reward", "task", "hack_rate")  # of the live table, from metrics.jsonl


@dataclass
class Args:
    config: tyro.conf.Positional[str] = ""
    """an experiment's YAML file: name, script, fixed, grid, arms, eval; the flags below win over it"""
    reward: str = ""
    """short for --fixed reward=NAME"""
    grid: tuple[str, ...] = ()
    """swept flags, flag=value,value ...: every combination is a run"""
    fixed: tuple[str, ...] = ()
    """flags of every run, flag=value ..."""
    eval: tuple[str, ...] = ()
    """flags of the evaluation that follows a run, flag=value ..."""
    script: str = ""
    """the train script; default: the file's, or train_grpo.py"""
    per_gpu: int = 1
    """runs at once on each GPU"""
    slots: int = 0
    """runs at once on a CPU; 0: one a core (each run has one thread)"""
    no_eval: bool = False
    """do not evaluate finished runs: the summary shows what they reported themselves"""
    dry_run: bool = False
    """print the commands and start nothing"""
    output_dir: str = ""
    """the experiment's folder; default: output/ and its name, which without a file is made of what is fixed"""


# --------------------------------------------------------------------------------------------------------- before it runs


def pairs(flag: str, words: tuple[str, ...]) -> dict[str, str]:
    """('lr=1e-5', ...) -> {'lr': '1e-5', ...}. ValueError for a word without '=', or a name given twice."""
    values = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not name or not sign:
            raise ValueError(f"--{flag} {word}: write flag=value{',value' if flag == 'grid' else ''}")
        if name in values:
            raise ValueError(f"--{flag}: {name} is given twice")
        values[name] = value
    return values


def typed(value: str) -> bool | str:
    """true and false as switches; the type of all else is the train script's matter."""
    return {"true": True, "false": False}.get(value.lower(), value)


def plan_of(args: Args) -> tuple[Path, list[Run]]:
    """The plan of the file and the command line together."""
    file = read_experiment(args.config) if args.config else {}
    given = {name: typed(value) for name, value in pairs("fixed", args.fixed).items()}
    swept = {name: [typed(v) for v in value.split(",")] for name, value in pairs("grid", args.grid).items()}
    if args.reward:
        if "reward" in given:
            raise ValueError("--reward and --fixed reward= are the same flag: give one")
        given = {"reward": args.reward} | given
    if not file and not given and not swept:
        raise ValueError("nothing to run: give an experiment's YAML file, or --grid flag=value,value")
    if args.script:
        file["script"] = args.script
    file["eval"] = file.get("eval", {}) | {name: typed(value) for name, value in pairs("eval", args.eval).items()}
    return plan(file, given, swept, not args.no_eval, args.output_dir)


def places_of(args: Args, planned: list[Run]) -> dict[str | None, int]:
    """Slots by GPU id, or {None: slots} on a CPU."""
    for name, least in (("per_gpu", 1), ("slots", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    devices = {run.config.get("device", "cpu") for run in planned}
    if devices == {"cuda"}:
        if args.slots:
            raise ValueError("--slots counts runs on a CPU and these run on GPUs: give --per_gpu, or --fixed device=cpu")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        return {gpu.strip(): args.per_gpu for gpu in visible.split(",")}
    if devices != {"cpu"}:
        found = ", ".join(sorted(devices))
        raise ValueError(f"a sweep runs on one kind of device, cpu or cuda (it gives each run its GPU), not on {found}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(run.config.get("threads", 1) or cores for run in planned)  # threads 0: torch takes every core
    return {None: args.slots or max(1, cores // threads)}


def environment_of(run: Run) -> dict[str, str]:
    """No more threads than the run asks for: those that wait spin, and slow down every other run. No progress bars in the log."""
    threads = run.config.get("threads", 1)
    return ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | {"TQDM_DISABLE": "1"}


@contextmanager
def alone(root: Path):
    """Holds the folder's lock; yields its file descriptor, for the runs to hold it too: a lock ends with its last holder, so
    runs that outlive a killed sweep are waited for. ValueError while another sweep works there."""
    with open(root / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            if _is_alive(holder := file.read()):
                raise ValueError(f"another sweep (process {holder}) works in {root}: wait for it, or stop it") from None
            print(f"waiting for the runs that a killed sweep left in {root} to save and stop", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):  # another user's; or one that has not written its number yet
        return True
    return True


def dry_run(root: Path, planned: list[Run], places: dict) -> None:
    where = ", ".join(f"{slots} at once on {'the CPU' if place is None else f'GPU {place}'}" for place, slots in places.items())
    print(f"{root}: {len(planned)} runs, {where}")
    for run in planned:
        commands = commands_of(run)
        goes_on = " (goes on)" if "--resume" in commands.get("train", []) else ""
        print(f"\n{run.name}: {' and '.join(commands) or 'finished'}{goes_on}")
        for words in commands.values():
            print("  " + " ".join([*(f"{k}={v}" for k, v in environment_of(run).items()), shlex.join(words)]))


# ------------------------------------------------------------------------------------------------------------ while it runs


def latest(folder: Path) -> dict:
    """The last value of everything in the end of metrics.jsonl; {} before anything is logged."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        start = max(0, path.stat().st_size - 20_000)
        file.seek(start)
        lines = file.read().split(b"\n")[1 if start else 0 : -1]  # without a first and a last one that may be cut
    values = {}
    for line in lines:
        values |= json.loads(line)
    return values


def live_table(root: Path, planned: list[Run], jobs: list[Job], seconds: float) -> list[str]:
    """How many runs are where; then what is running, with its last logged step, and what failed, with its error."""
    counts = Counter(job.status for job in jobs)
    counted = ", ".join(f"{counts[status]} {status}" for status in ("done", "running", "failed", "waiting") if counts[status])
    rows = [["run", "doing", *PROGRESS, "s"]]
    for run, job in zip(planned, jobs):
        if job.status == "running":
            values = latest(run.folder)
            shown = ["" if key not in values else str(values[key]) if key == "step" else f"{values[key]:.3f}" for key in PROGRESS]
            if shown[0] and "max_steps" in run.config:
                shown[0] += f"/{run.config['max_steps']}"
            doing = job.doing if job.place is None else f"{job.doing}, GPU {job.place}"
            rows.append([run.name, doing, *shown, f"{time.monotonic() - job.started:.0f}"])
    failed = [f"{job.name} failed: {job.error}" for job in jobs if job.status == "failed"]
    return [f"{root}: {len(jobs)} runs: {counted}, {seconds:.0f} s", *(aligned(rows) if rows[1:] else []), *failed]


def aligned(rows: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows]


class Display:
    """Shows the sweep while it runs and keeps runs.json: on a terminal a table redrawn in place, else a line for every change."""

    def __init__(self, root: Path, planned: list[Run], jobs: list[Job], out):
        self.root, self.planned, self.jobs, self.out = root, planned, jobs, out
        self.began, self.drawn_at, self.lines = time.monotonic(), -math.inf, 0
        self.known = {}  # job -> what was last said of it

    def watch(self) -> None:
        """To be called often: cheap unless something changed or a second went by."""
        changed = [job for job in self.jobs if self.known.get(job.name) != (job.status, job.doing)]
        if changed:
            write_manifest(self.root, self.planned, self.jobs)
        for job in changed:
            self.known[job.name] = job.status, job.doing
            if not self.out.isatty() and job.status != "waiting":
                self.say(self._event(job))
        if self.out.isatty() and (changed or time.monotonic() - self.drawn_at > 1):
            self._draw()

    def _event(self, job: Job) -> str:
        done = sum(job.status in ("done", "failed") for job in self.jobs)
        what = {"running": f"{job.doing}{'' if job.place is None else f' on GPU {job.place}'}", "failed": f"failed: {job.error}",
                "done": f"done in {sum(job.seconds.values()):.0f} s" if job.seconds else "finished already"}  # fmt: skip
        return f"[{done}/{len(self.jobs)}, {time.monotonic() - self.began:.0f} s] {job.name}: {what.get(job.status, job.status)}"

    def say(self, line: str) -> None:
        self._erase()
        print(line, file=self.out, flush=True)

    def _erase(self) -> None:
        if self.lines:
            self.out.write(f"\x1b[{self.lines}F\x1b[J")  # up, and clear to the end
            self.lines = 0

    def _draw(self) -> None:
        width, height = shutil.get_terminal_size()
        table = live_table(self.root, self.planned, self.jobs, time.monotonic() - self.began)[: height - 1]
        self._erase()
        print("\n".join(line[: width - 1] for line in table), file=self.out, flush=True)
        self.lines, self.drawn_at = len(table), time.monotonic()


def write_manifest(root: Path, planned: list[Run], jobs: list[Job]) -> None:
    """runs.json: [{"arm", "swept" (but the seed), "flags", "folder" (relative), "status", "wall_s" (of training, or null),
    "error"}, ...]."""
    entries = []
    for run, job in zip(planned, jobs):
        result = run.folder / run.script.module.RESULT
        reported = json.loads(result.read_text(encoding="utf-8")).get("wall_s") if result.is_file() else None
        wall_s = job.seconds.get("train") if reported is None else reported
        seconds = wall_s if wall_s is None else round(wall_s, 1)
        entries.append({"arm": run.arm, "swept": run.swept, "flags": run.flags, "folder": os.path.relpath(run.folder, root),
                        "status": job.status, "wall_s": seconds, "error": job.error})  # fmt: skip
    atomic_write(root / "runs.json", json.dumps(entries, indent=1, default=str) + "\n")


# -------------------------------------------------------------------------------------------------------------- the summary


def reported(planned: list[Run]) -> list[dict]:
    """A record per run and mode, as experiments.records has them, of what the runs' evaluations measured.

    A report without "modes" (a script with another result) gives one, "final", of all its numbers but the wall time, which a
    sweep that was stopped would have another of.
    """
    table = []
    for run in planned:
        who = {"label": label_of(run.arm, run.swept), "arm": run.arm, "seed": run.config.get("seed")}
        report = json.loads(run.report.read_text(encoding="utf-8"))
        for mode, row in report.get("modes", {"final": report}).items():
            values = {key: value for key, value in numbers(row).items() if key != "wall_s"}
            table.append(who | {"mode": mode} | ({key: values[key] for key in MEASURES if key in values} or values))
    return table


def write_summary(root: Path, planned: list[Run], missing: list[str]) -> str:
    """summary.md and summary.json: mean and 95% interval over seeds, and what is not in them. Returns the text."""
    summary = summarise(reported(planned))
    measures = list({key: None for cell in summary.values() for key in cell if key != "n"})
    note = "Mean ± 95% interval (Student's t over seeds; one seed has none)."
    if "degenerate" in measures:
        note += " degenerate: runs with unique < .5 or Jaccard > .7."
    table = markdown(["arm", "mode", "seeds", *measures], summary_rows(summary, measures))
    text = "\n".join([f"# {root.name}", "", table, note, *[f"\nNot in the table: {text}" for text in missing], ""])
    rows = [
        {"label": label, "mode": mode, "seeds": cell["n"]}
        | {key: {"mean": cell[key][0], "half": None if math.isnan(cell[key][1]) else cell[key][1]} for key in cell if key != "n"}
        for (label, mode), cell in summary.items()
    ]
    atomic_write(root / "summary.md", text)
    atomic_write(root / "summary.json", json.dumps({"rows": rows, "missing": missing}, indent=1) + "\n")
    return text


# -------------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__, use_underscores=True)
    root, planned = plan_of(args)
    places = places_of(args, planned)
    if args.dry_run:
        dry_run(root, planned, places)
        return 0
    root.mkdir(parents=True, exist_ok=True)
    with alone(root) as lock:
        jobs = [Job(run.name, commands_of(run), root / f"{run.name}.log", environment_of(run), (lock,)) for run in planned]
        display = Display(root, planned, jobs, sys.stdout)
        sharing = shared_gpus(display.say) if None not in places and args.per_gpu > 1 else nullcontext()
        with sharing:
            stopped_by = run_jobs(jobs, places, display.watch, display.say)
        if stopped_by:
            print(f"stopped by {stopped_by.name}; the same command goes on", flush=True)
            return 128 + stopped_by
        missing = [f"{job.name} ({job.status}) {job.error}".rstrip() for job in jobs if job.status != "done"]
        text = write_summary(root, [run for run, job in zip(planned, jobs) if job.status == "done"], missing)
        print(f"\n{text}\n{time.monotonic() - display.began:.0f} s; summary.md, summary.json, runs.json and the runs in {root}")
        return 1 if missing else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
