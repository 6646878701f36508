"""Slots, failures and stops, on processes that do next to nothing."""

import os
import signal
import sys
import time

import pytest

from jobs import Job, last_error, run_jobs

TRACE = """
import os, sys, time
with open(sys.argv[1], "a") as f: f.write(f"{time.time()} 1 {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
time.sleep(float(sys.argv[2]))
with open(sys.argv[1], "a") as f: f.write(f"{time.time()} -1 {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
"""


def python(code: str, *argv) -> list[str]:
    return [sys.executable, "-S", "-c", code, *map(str, argv)]


def job(tmp_path, name: str, *commands, **options) -> Job:
    return Job(name, {f"c{i}": c for i, c in enumerate(commands)}, tmp_path / f"{name}.log", **options)


def busiest(trace, place=None) -> int:
    """The most processes that were inside at once."""
    events = sorted((float(at), int(step)) for at, step, where in map(str.split, trace.read_text().splitlines())
                    if place in (None, where))  # fmt: skip
    inside = most = 0
    for _, step in events:
        inside += step
        most = max(most, inside)
    return most


@pytest.mark.parametrize("places", [{None: 3}, {None: 1}, {"0": 1, "5": 2}])
def test_no_more_than_its_slots_run_at_a_time_and_no_slot_is_idle(tmp_path, places):
    trace = tmp_path / "trace"
    hold = 0.2 if sum(places.values()) == 1 else 2  # on a busy machine a process takes its time to begin
    jobs = [job(tmp_path, f"j{i}", python(TRACE, trace, hold)) for i in range(5)]
    assert run_jobs(jobs, places) is None
    assert [j.status for j in jobs] == ["done"] * 5
    assert busiest(trace) == sum(places.values())
    for place, slots in places.items():
        if place is not None:
            assert busiest(trace, place) == slots


def test_a_job_goes_where_most_is_free_and_its_processes_inherit_what_is_kept_open(tmp_path):
    check = "import os, sys; os.fstat(int(sys.argv[1])); open(sys.argv[2], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    with open(tmp_path / "held", "w") as held:
        jobs = [job(tmp_path, str(i), python(check + "; import time; time.sleep(.5)", held.fileno(), tmp_path / f"{i}.gpu"),
                    keep_open=(held.fileno(),)) for i in range(4)]  # fmt: skip
        run_jobs(jobs, {"a": 1, "b": 3, "c": 1})
    assert [j.error for j in jobs] == [""] * 4
    assert [(tmp_path / f"{i}.gpu").read_text() for i in range(4)] == ["b", "b", "a", "b"]


def test_commands_of_a_job_follow_each_other_and_a_failure_ends_only_its_own(tmp_path):
    seen = tmp_path / "seen"
    say = "import sys, os; open(sys.argv[1], 'a').write(sys.argv[2] + os.environ['WHO'] + ' ')"
    fail = "import sys; print('Loss: 3'); print('error: the loss is nan', file=sys.stderr); print('bye'); sys.exit(1)"
    jobs = [job(tmp_path, "bad", python(fail), python(say, seen, "never"), environment={"WHO": "0"}),
            job(tmp_path, "good", python(say, seen, "a"), python(say, seen, "b"), environment={"WHO": "1"}),
            job(tmp_path, "nothing")]  # fmt: skip
    assert run_jobs(jobs, {None: 1}) is None
    assert seen.read_text() == "a1 b1 "
    assert [j.status for j in jobs] == ["failed", "done", "done"]
    assert jobs[0].error == "c0: error: the loss is nan" and list(jobs[1].seconds) == ["c0", "c1"]
    assert "bye" in jobs[0].log.read_text() and jobs[0].log.read_text().startswith("$ ")


@pytest.mark.parametrize("printed, code, error", [
    ("Traceback (most recent call last):\n  File x\nValueError: no such file\n", 1, "ValueError: no such file"),
    ("Traceback\ntorch.OutOfMemoryError: CUDA out of memory\nbar 3%\r bar 4%\n", 1, "torch.OutOfMemoryError: CUDA out of memory"),
    ("error: old\nerror: new\n", 2, "error: new"),
    ("the last thing\n\n", 3, "the last thing"),
    ("", 3, "exit status 3"),
    ("just a line\n", -9, "killed by SIGKILL"),
])  # fmt: skip
def test_the_last_error(printed, code, error):
    assert last_error(printed, code) == error


def test_an_error_is_sought_only_in_what_this_attempt_printed(tmp_path):
    (tmp_path / "j.log").write_text("error: of an earlier attempt\n")
    again = job(tmp_path, "j", python("import sys; print('plain'); sys.exit(4)"))
    run_jobs([again], {None: 1})
    assert again.error == "c0: plain"


SAVES = """
import signal, sys, time
def stop(*_):
    open(sys.argv[1], "a").write("saved ")
    if sys.argv[2] == "leaves": sys.exit(130)
signal.signal(signal.SIGINT, stop)
open(sys.argv[1], "a").write("up ")
time.sleep(60)
"""


@pytest.mark.parametrize("how, signals", [("leaves", 1), ("stays", 2)])
def test_the_first_ctrl_c_lets_runs_save_and_starts_nothing_more_and_the_second_kills(tmp_path, how, signals):
    before = signal.getsignal(signal.SIGINT)
    jobs = [job(tmp_path, str(i), python(SAVES, tmp_path / str(i), how), python("raise SystemExit(9)")) for i in range(3)]
    said, sent = [], []

    def watch():
        ready = [i for i in range(2) if (tmp_path / str(i)).is_file() and "up" in (tmp_path / str(i)).read_text()]
        stopped = all("saved" in (tmp_path / str(i)).read_text() for i in ready)
        if len(ready) == 2 and len(sent) < signals and (not sent or stopped):
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    began = time.monotonic()
    assert run_jobs(jobs, {None: 2}, watch, said.append) == signal.SIGINT
    assert time.monotonic() - began < 20
    assert [j.status for j in jobs] == ["interrupted", "interrupted", "waiting"] and not (tmp_path / "2").exists()
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == ["up saved ", "up saved "]
    assert len(said) == signals and not any(j.process for j in jobs)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_stops_as_ctrl_c_does(tmp_path):
    one = job(tmp_path, "a", python(SAVES, tmp_path / "a.txt", "leaves"))
    sent = []

    def watch():
        if (tmp_path / "a.txt").is_file() and "up" in (tmp_path / "a.txt").read_text() and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    assert run_jobs([one], {None: 1}, watch) == signal.SIGTERM and one.status == "interrupted"
