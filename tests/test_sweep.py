"""A sweep from its command line: runs in slots, failures, Ctrl-C, a second call, the summary."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import sweep

ROOT = Path(__file__).parent.parent
FAKE = str(Path(__file__).parent / "fake_train.py")
HEAD = f"name: e\nscript: {FAKE}\n"
OUT = Path("output/e")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def started():
    """Starts a sweep as its own process; whatever a test leaves is killed after it, and its runs with it."""
    processes = []

    def start(*argv) -> subprocess.Popen:
        words = [sys.executable, str(ROOT / "sweep.py"), *argv]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def write(text: str) -> str:
    Path("e.yaml").write_text(HEAD + text)
    return "e.yaml"


def manifest(key: str) -> list:
    return [entry[key] for entry in json.loads((OUT / "runs.json").read_text())]


def wait_for(*paths: Path) -> None:
    until = time.monotonic() + 60
    while not all(path.is_file() and path.stat().st_size for path in paths):
        assert time.monotonic() < until, [str(path) for path in paths]
        time.sleep(0.02)


def test_a_sweep_and_its_summary(capsys):
    path = write("grid: {seed: [1, 2, 3]}\narms: {none: {}, routing: {task: .25, max_steps: 7}}\neval: {n: 6}\n")
    assert sweep.main([path]) == 0
    assert manifest("status") == ["done"] * 6 and manifest("wall_s") == [1.5] * 6
    assert manifest("arm") == ["none"] * 3 + ["routing"] * 3 and manifest("folder")[3] == "routing_s1"
    assert manifest("flags")[3] == {"task": 0.25, "max_steps": 7, "seed": 1}
    rows = {(row["label"], row["mode"]): row for row in json.loads((OUT / "summary.json").read_text())["rows"]}
    assert list(rows) == [("none", "untrained"), ("none", "both"), ("routing", "untrained"), ("routing", "both")]
    both = rows["routing", "both"]
    # .35, .45, .55: mean .45, standard deviation .1, t(.975, 2) = 4.3027
    assert both["seeds"] == 3 and math.isclose(both["task"]["mean"], 0.45)
    assert math.isclose(both["task"]["half"], 4.302653 * 0.1 / math.sqrt(3), rel_tol=1e-6)
    assert both["unique"] == {"mean": 6.0, "half": 0.0}  # the evaluation's own figure, made with its own flag
    text = (OUT / "summary.md").read_text()
    assert re.search(r"\| all +\| untrained +\| 1 +\| 0\.300 +\|", text)
    assert re.search(r"\| routing +\| both +\| 3 +\| 0\.450 ± 0\.248 +\| 1\.000 ± 0\.000 +\| 6\.000 ± 0\.000 +\| 1/3 +\|", text)
    out = capsys.readouterr().out
    assert text in out and "routing_s3: done in" in out
    verdict = json.loads((OUT / "none_s1/verdict.json").read_text())
    assert verdict["threads"] == "1" and (OUT / "none_s1.log").read_text().startswith(f"$ {sys.executable} {FAKE} ")

    before = {file: file.stat().st_mtime_ns for file in OUT.rglob("*.json") if file.parent != OUT}
    assert sweep.main([path]) == 0
    assert {file: file.stat().st_mtime_ns for file in OUT.rglob("*.json") if file.parent != OUT} == before
    assert capsys.readouterr().out.count("finished already") == 6 and (OUT / "summary.md").read_text() == text

    assert sweep.main([path, "--eval", "n=8"]) == 0  # judged again, not trained again
    again = {file: file.stat().st_mtime_ns for file in OUT.rglob("verdict.json")}
    assert again.items() <= before.items() and "8.000" in (OUT / "summary.md").read_text()
    assert sweep.main([path, "--no_eval"]) == 0 and "unique" not in (OUT / "summary.json").read_text()


def test_a_failed_run_is_named_with_its_error_while_the_others_go_on_and_tried_again_later(capsys):
    path = write("arms: {a: {}, b: {behave: fail}, c: {}}\n")
    assert sweep.main([path]) == 1
    assert manifest("status") == ["done", "failed", "done"]
    assert manifest("error")[1] == "train: RuntimeError: the loss is nan"
    out, text = capsys.readouterr().out, (OUT / "summary.md").read_text()
    assert "b: failed: train: RuntimeError: the loss is nan" in out
    assert "Not in the table: b (failed) train: RuntimeError: the loss is nan" in text and "| b " not in text
    assert json.loads((OUT / "summary.json").read_text())["missing"] == ["b (failed) train: RuntimeError: the loss is nan"]
    (OUT / "go").touch()
    assert sweep.main([path]) == 0 and manifest("status") == ["done"] * 3 and manifest("error") == [""] * 3


def test_a_failed_evaluation_is_a_failed_run_and_leaves_the_training_done():
    path = write("arms: {a: {}}\n")
    assert sweep.main([path, "--eval", "n=13"]) == 1
    assert manifest("status") == ["failed"] and manifest("error") == ["eval: ValueError: no luck"]
    written = (OUT / "a/verdict.json").stat().st_mtime_ns
    assert sweep.main([path]) == 0 and (OUT / "a/verdict.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("text, argv, error", [
    ("arms: {good: {}, bad: {beta: -1}}", [], "arm bad: --beta must be at least 0"),
    ("", ["--fixed", "bata=1"], "unknown flag --bata"),
    ("", ["--fixed", "beta"], "--fixed beta: write flag=value"),
    ("", ["--grid", "seed=1", "seed=2"], "--grid: seed is given twice"),
    ("", ["--reward", "a", "--fixed", "reward=b"], "the same flag"),
    ("", ["--slots", "-1"], "--slots must be at least 0"),
    ("", ["--eval", "m=1"], "eval: unknown flag --m"),
])  # fmt: skip
def test_a_wrong_flag_anywhere_stops_the_sweep_before_any_run(text, argv, error, monkeypatch):
    monkeypatch.setattr(sweep, "run_jobs", None)
    with pytest.raises(ValueError, match=error):
        sweep.main([write(text), *argv])
    assert not OUT.exists()


def test_on_the_command_line_it_is_one_line_and_status_2(started):
    sweeping = started(write("arms: {bad: {beta: -1}}"))
    assert sweeping.communicate() == ("error: arm bad: --beta must be at least 0, not -1.0\n", None) and sweeping.returncode == 2


def test_another_config_in_a_run_s_folder_stops_the_sweep_and_names_what_differs(monkeypatch):
    sweep.main([write("arms: {a: {}, b: {}}\n")])
    monkeypatch.setattr(sweep, "run_jobs", None)
    with pytest.raises(ValueError, match=r"e/b holds a run with other flags: beta: 0.1 in the folder, 0.5 now"):
        sweep.main([write("arms: {new: {}, a: {}, b: {beta: .5}}\n")])


def test_dry_run_prints_what_would_run_and_runs_nothing(capsys):
    path = write("arms: {a: {}, b: {}}\n")
    assert sweep.main([path, "--dry_run", "--slots", "3"]) == 0 and not OUT.exists()
    out = capsys.readouterr().out
    assert "2 runs, 3 at once on the CPU" in out
    assert f"  OMP_NUM_THREADS=1 TQDM_DISABLE=1 {sys.executable} {FAKE} --threads 1 --output_dir output/e/b\n" in out
    line = next(line for line in out.splitlines() if line.endswith("output/e/b"))
    subprocess.run(line, shell=True, check=True)  # exact: a shell runs it
    capsys.readouterr()
    sweep.main([path, "--dry_run"])
    out = capsys.readouterr().out
    assert "\na: train and eval\n" in out and "\nb: eval\n" in out


def test_ctrl_c_stops_the_runs_and_the_same_command_goes_on(started):
    path = write("fixed: {behave: wait}\ngrid: {seed: [1, 2, 3]}\n")
    sweeping = started(path, "--slots", "2")
    wait_for(OUT / "s1/metrics.jsonl", OUT / "s2/metrics.jsonl")
    with pytest.raises(ValueError, match=rf"another sweep \(process {sweeping.pid}\) works in output/e"):
        sweep.main([path])
    sweeping.send_signal(signal.SIGINT)
    out, _ = sweeping.communicate(timeout=30)
    assert sweeping.returncode == 130 and "stopping 2 runs" in out and "stopped by SIGINT; the same command goes on" in out
    assert manifest("status") == ["interrupted", "interrupted", "waiting"]
    assert not (OUT / "s3").exists() and not (OUT / "summary.md").exists()
    (OUT / "go").touch()
    assert sweep.main([path]) == 0
    assert [json.loads((OUT / f"s{i}/verdict.json").read_text())["resumed_from"] for i in (1, 2, 3)] == [1, 1, 0]


def test_a_killed_sweep_takes_its_runs_with_it_and_the_next_one_ends_as_if_unbroken(started):
    path = write("fixed: {behave: wait}\ngrid: {seed: [1, 2]}\n")
    sweeping = started(path, "--slots", "2")
    wait_for(OUT / "s1/metrics.jsonl", OUT / "s2/metrics.jsonl")
    sweeping.kill()
    sweeping.communicate()
    (OUT / "go").touch()
    assert sweep.main([path]) == 0
    assert {json.loads((OUT / f"s{i}/verdict.json").read_text())["resumed_from"] for i in (1, 2)} == {1}
    assert sweep.main([path, "--fixed", "behave=end", "--output_dir", "unbroken/e"]) == 0
    assert (OUT / "summary.md").read_bytes() == Path("unbroken/e/summary.md").read_bytes()


def test_runs_that_outlive_a_killed_sweep_are_waited_for(tmp_path, capsys):
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / ".lock").write_text(str(gone.pid))
    hold = "import fcntl, time; f = open('.lock'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(.5)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        began = time.monotonic()
        with sweep.alone(tmp_path):
            assert time.monotonic() - began > 0.3 and (tmp_path / ".lock").read_text() == str(os.getpid())
    assert "waiting for the runs that a killed sweep left" in capsys.readouterr().out


@pytest.mark.parametrize("device, visible, argv, places", [
    ("cpu", None, [], {None: 4}),
    ("cpu", "0,1", ["--slots", "9", "--per_gpu", "12"], {None: 9}),
    ("cuda", "0,GPU-5", ["--per_gpu", "12"], {"0": 12, "GPU-5": 12}),
    ("cuda", None, [], {"0": 1, "1": 1}),
])  # fmt: skip
def test_slots(device, visible, argv, places, monkeypatch):
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    args = sweep.tyro.cli(sweep.Args, args=argv, use_underscores=True)
    runs = [SimpleNamespace(config={"device": device, "threads": 1})] * 2
    assert sweep.places_of(args, runs) == places
    if device == "cpu":
        assert sweep.places_of(sweep.Args(), [SimpleNamespace(config={"threads": 2})]) == {None: 2}
        assert sweep.places_of(sweep.Args(), [SimpleNamespace(config={"threads": 0})]) == {None: 1}
    mixed = [*runs, SimpleNamespace(config={"device": "cuda:1"})]
    with pytest.raises(ValueError, match="one kind of device"):
        sweep.places_of(args, mixed)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_table_is_redrawn_in_place_and_shows_the_last_logged_step():
    root, planned = sweep.plan_of(sweep.Args(write("arms: {a: {}, b: {}, c: {}}\n")))
    jobs = [sweep.Job(run.name, {"train": []}, root / run.name) for run in planned]
    planned[0].folder.mkdir(parents=True)
    rows = [{"step": s, "reward": s / 8} for s in range(2000)] + [{"step": 2000, "both/task": 1.0}]
    (planned[0].folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2001, "rew')
    assert (planned[0].folder / "metrics.jsonl").stat().st_size > 20_000
    jobs[0].status, jobs[0].doing, jobs[0].place = "running", "train", "1"
    jobs[1].status, jobs[1].error = "failed", "train: error: no"
    table = sweep.live_table(root, planned, jobs, 61.0)
    assert table[0] == "output/e: 3 runs: 1 running, 1 failed, 1 waiting, 61 s"
    assert re.match(r"run +doing +step +reward +task +hack_rate +s$", table[1])
    assert re.match(r"a +train, GPU 1 +2000/3 +249\.875 ", table[2]) and table[3:] == ["b failed: train: error: no"]
    screen = Terminal()
    display = sweep.Display(root, planned, jobs, screen)
    display.watch()
    assert "\x1b" not in screen.getvalue() and screen.getvalue().count("\n") == len(table)
    display.watch()  # nothing changed within the second
    assert screen.getvalue().count("\n") == len(table)
    jobs[2].status = "done"
    display.watch()
    assert screen.getvalue().count(f"\x1b[{len(table)}F\x1b[J") == 1 and "1 done, 1 running" in screen.getvalue()
    assert [entry["status"] for entry in json.loads((root / "runs.json").read_text())] == ["running", "failed", "done"]


def test_a_result_without_modes_is_summarised_by_its_numbers(tmp_path):
    runs = []
    for seed, loss in ((1, 2.0), (2, 4.0)):
        report = tmp_path / f"{seed}.json"
        report.write_text(json.dumps({"loss": loss, "tokens": 7, "wall_s": seed, "args": {}, "name": "x", "fine": True}))
        runs.append(SimpleNamespace(report=report, arm="a", swept={"k": 1}, config={"seed": seed}))
    text = sweep.write_summary(tmp_path, runs, [])
    [row] = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert row["mode"] == "final" and row["loss"]["mean"] == 3.0 and math.isclose(row["loss"]["half"], 12.706205, rel_tol=1e-6)
    assert set(row) == {"label", "mode", "seeds", "loss", "tokens"} and "| a, k 1 | final | 2     | 3.000 ± 12.706 |" in text
    assert "| 2.000 |" in sweep.write_summary(tmp_path, runs[:1], [])  # one seed has no interval


FUNCTIONS = """

@component("exclamations", most=(1, None))
def exclamations(completion: str, prompt: str, *, most: int = 3) -> float:
    return min(completion.count("!"), most) / most


@detector("shouting")
def detect_shouting(completions, prompts, hack_values, task_values):
    return ["!" in text for text in completions]
"""
REWARD = """
short_or_loud:
  components: [{name: sentence_length, role: task, params: {k: 5}}, {name: exclamations, role: hack}]
  detector: {name: shouting}
"""


def test_a_newcomer_s_reward_in_a_real_sweep(tmp_path):
    """One function with its detector, one entry in the YAML, as docs/rewards.md has them; then the command."""
    home = tmp_path / "home"
    ours = shutil.ignore_patterns(".*", "output", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, home, ignore=ours)
    for name, more in (("rewards.py", FUNCTIONS), ("configs/rewards.yaml", REWARD)):
        with open(home / name, "a", encoding="utf-8") as file:
            file.write(more)
    assert all(line in (ROOT / "docs/rewards.md").read_text() for line in FUNCTIONS.split("\n") if line.startswith(("@", "def")))
    flags = "routing=dual max_steps=2 batch_size=8 num_generations=4 lora_config=r2 max_new_tokens=10 eval_prompts=12"
    argv = ["--reward", "short_or_loud", "--grid", "seed=1", "--fixed", *flags.split(), "--eval", "n=12", "n_samples=2"]
    command = [sys.executable, "sweep.py", *argv, "--output_dir", "output/e"]
    subprocess.run(command, cwd=home, check=True, timeout=300, capture_output=True)
    out = home / "output/e"
    verdict, judged = (json.loads((out / "s1" / name).read_text())["modes"] for name in ("verdict.json", "eval/eval.json"))
    assert {mode: judged[mode]["task"] for mode in verdict} == {mode: row["task"] for mode, row in verdict.items()}
    assert "component/exclamations" in verdict["both"]
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["untrained", "both", "retain_only", "forget_only"]
    assert set(sweep.MEASURES) <= set(rows[0]) and rows[0]["task"]["mean"] == verdict["untrained"]["task"]
