"""Commands in slots: as many processes at once as there are slots, stopped together by one Ctrl-C.

    jobs = [Job("routing_s42", {"train": ["python", "train.py"], "eval": ["python", "eval.py"]}, Path("routing_s42.log"))]
    stopped_by = run_jobs(jobs, {"0": 12, "1": 12}, watch=lambda: print(jobs))

A job is commands that run one after the other in one slot; the first that fails ends it, and the other jobs go on. Slots
belong to places: GPUs by their id, which a process gets as CUDA_VISIBLE_DEVICES, or {None: n} for a CPU. What a job prints is
appended to its log. Processes have sessions of their own, so that a Ctrl-C in the terminal reaches them once, through here.
"""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ERROR_LINE = re.compile(r"^(error: |[\w.]*(Error|Exception)\b)")  # of a script's own, and of a traceback's end


@dataclass
class Job:
    name: str
    commands: dict[str, list[str]]
    """what is done -> words; none: the job is done before it starts"""
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    """beside the caller's own"""
    keep_open: tuple[int, ...] = ()
    """file descriptors that the processes inherit"""
    status: str = "waiting"
    """waiting, running, done, failed or interrupted"""
    doing: str = ""
    """the command that runs, or ran last"""
    error: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """wall time of each command"""
    place: str | None = None
    process: subprocess.Popen | None = None
    started: float = 0.0
    offset: int = 0
    """where the running command's part of the log begins"""


def last_error(printed: str, code: int) -> str:
    """Why a process failed, in one line: the signal that killed it, the last error it printed, else its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]", printed) if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    if code < 0:
        return ": ".join([f"killed by {signal.Signals(-code).name}", *errors[-1:]])[:500]
    return (errors or lines or [f"exit status {code}"])[-1][:500]


def _end_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGINT)  # killed, this process can't stop the others: the kernel does


def _start(job: Job, place: str | None) -> None:
    job.doing = next(label for label in job.commands if label not in job.seconds)
    words = job.commands[job.doing]
    with open(job.log, "ab") as log:
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        job.offset = log.tell()
        visible = {} if place is None else {"CUDA_VISIBLE_DEVICES": place}
        job.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | job.environment | visible, pass_fds=job.keep_open,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
    job.place, job.status, job.started = place, "running", time.monotonic()


def _finish(job: Job, code: int, stopping: bool) -> None:
    job.seconds[job.doing] = time.monotonic() - job.started
    job.process = None
    if code == 0:
        left = len(job.seconds) < len(job.commands)
        job.status = ("interrupted" if stopping else "waiting") if left else "done"
    elif stopping or code in (130, -signal.SIGINT):
        job.status = "interrupted"
    else:
        with open(job.log, "rb") as log:
            log.seek(job.offset)
            job.error = f"{job.doing}: {last_error(log.read().decode(errors='replace'), code)}"
        job.status = "failed"


@contextmanager
def _counted_stops():
    """Counts SIGINT and SIGTERM instead of dying of them."""
    stops = SimpleNamespace(count=0, signal=None)

    def handler(number, frame):
        stops.count, stops.signal = stops.count + 1, number

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def run_jobs(jobs: list[Job], places: dict[str | None, int], watch=lambda: None, say=print) -> signal.Signals | None:
    """Runs every job that waits, in order, and returns when all have ended: None, or the signal that stopped them.

    Args:
        places: slots per place.
        watch: called about twenty times a second, and after every change.
        say: takes one line for the reader.
    The first SIGINT or SIGTERM starts nothing more and sends each process one SIGINT, which lets it save and leave; the second
    kills them.
    """
    for job in jobs:
        job.status = "waiting" if job.commands else "done"
    sent = 0
    with _counted_stops() as stops:
        while True:
            active = [job for job in jobs if job.process]
            waiting = [job for job in jobs if job.status == "waiting"]
            if stops.count > sent:
                sent = stops.count
                if active:
                    how = "at the end of their step; Ctrl-C again kills them" if sent == 1 else "at once"
                    say(f"stopping {len(active)} runs {how}")
                for job in active:
                    if sent == 1:
                        job.process.send_signal(signal.SIGINT)
                    else:
                        os.killpg(job.process.pid, signal.SIGKILL)  # with what it started itself
            busy = Counter(job.place for job in active)
            free = [place for place, slots in places.items() for _ in range(slots - busy[place])]
            if waiting and free and not stops.count:
                _start(waiting[0], max(free, key=free.count))  # where most is free
                watch()
                continue
            if not active:
                watch()
                return signal.Signals(stops.signal) if stops.count else None
            time.sleep(0.05)
            for job in active:
                if (code := job.process.poll()) is not None:
                    _finish(job, code, stopping=stops.count > 0)
            watch()
