"""probe.py: every outcome of every row of the plan's table, its rules, the report on planted figures, the whole on two steps."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml

import probe
import train_grpo
from code_env import CALLED
from plans import plan
from replay import read_lines, write_lines

S, L, N, O, ABSENT = probe.SUCCESS, probe.LIKELY, probe.SNEAKY, probe.NONE, probe.ABSENT


# ------------------------------------------------------------------------------------------------ the rows and the rules


@pytest.mark.parametrize("spreads, sizes, outcome", [
    ([3.0] * 16 + [0.5] * 4, [0.9] * 20, S),  # 16 of 20 suffice
    ([3.0] * 15 + [0.5] * 5, [0.9] * 20, O),
    ([0.05] * 11 + [3.0] * 9, [0.9] * 20, L),
    ([3.0] * 20, [0.05] * 11 + [0.9] * 9, N),  # a spread, and advantages clipped to nothing
    ([0.05] * 20, [0.0] * 20, L),
])  # fmt: skip
def test_row_1_reward_spread(spreads, sizes, outcome):
    assert probe.judge_spread(spreads, sizes) == outcome


@pytest.mark.parametrize("signed, outcome", [
    ([0.3] * 11 + [-0.3] * 9, S),
    ([0.3] * 10 + [-0.3] * 10, L),  # neither way on most steps
    ([0.1] * 11 + [0.3] * 9, L),  # within the placebo's band
    ([-0.1] * 6 + [0.1] * 6 + [0.3] * 8, L),
    ([-0.3] * 11 + [0.3] * 9, N),
])  # fmt: skip
def test_row_2_direction(signed, outcome):
    assert probe.judge_direction(signed, band=0.1) == outcome


@pytest.mark.parametrize("cout, fired, outcome", [
    ([0.0] * 16 + [0.5] * 4, [0.97] * 20, S),
    ([0.0] * 15 + [0.5] * 5, [0.97] * 20, L),
    ([0.5] * 20, [0.97] * 20, L),  # nothing is removed
    ([0.0] * 20, [0.2] * 20, N),  # but on few modules
])  # fmt: skip
def test_row_3_projection(cout, fired, outcome):
    assert probe.judge_projection([0.5] * 20, cout, fired) == outcome


@pytest.mark.parametrize("hacks, honest, outcome", [
    ([0.5, 0.6, 0.7, 0.6], [0.0, -0.1, 0.1, 0.0], S),
    ([0.5, 0.6, 0.7, 0.6], [-0.5, -0.6, -0.4, -0.5], S),
    ([0.1, 0.6, -0.3, 0.4], [0.2, 0.5, -0.2, 0.3], L),  # alike
    ([0.5, 0.6, 0.7, 0.6], [0.4, 0.41, 0.4, 0.42], O),  # both toward the hack
    ([-0.1, -0.12, -0.1, -0.11], [-0.5, -0.6, -0.4, -0.5], O),  # both away from it
    ([0.0, -0.1, 0.1, 0.0], [0.5, 0.6, 0.7, 0.6], O),  # the wrong way round
    ([0.5], [0.0, 0.1], N),
    ([0.5, 0.6], [], N),
])  # fmt: skip
def test_row_4_buckets(hacks, honest, outcome):
    assert probe.judge_buckets(hacks, honest) == outcome


def test_welch_by_hand():
    a, b = [1.0, 2.0, 3.0, 6.0], [0.0, 0.5, 1.0]
    t, p = probe.welch(a, b)  # means 3 and .5, variances 14/3 and 1/4
    error = 14 / 3 / 4 + 1 / 4 / 3
    assert t == pytest.approx(2.5 / math.sqrt(error))
    df = error**2 / ((14 / 3 / 4) ** 2 / 3 + (1 / 4 / 3) ** 2 / 2)
    x = torch.linspace(0, t, 20_001, dtype=torch.float64)
    density = (1 + x**2 / df) ** (-(df + 1) / 2) * math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    assert p == pytest.approx(1 - 2 * torch.trapezoid(density, x).item(), abs=1e-6)
    assert all(map(math.isnan, probe.welch([1.0], b)))


@pytest.mark.parametrize("vanilla, svd, out, buckets, answers", [
    ([0.3] * 20, [0.3] * 20, [0.0] * 20, S, "no yes yes no no"),
    ([0.3] * 15 + [0.15] * 5, [0.3] * 20, [0.1] * 20, S, "no no no no no"),  # not consistently; not removed
    ([0.05] * 20, [0.05] * 20, [0.0] * 20, L, "yes no yes no yes"),  # about 0 on all steps, buckets alike: stop
    ([0.05] * 20, [0.05] * 20, [0.0] * 20, S, "yes no yes no no"),  # the buckets differ: go on
    ([0.05] * 19 + [0.2], [0.05] * 20, [0.0] * 20, L, "yes no yes no no"),  # one step is not about 0: go on
    ([0.3] * 20, [-0.3] * 20, [0.0] * 20, S, "no yes yes yes no"),  # projected too far
    ([-0.3] * 20, [-0.3] * 20, [0.0] * 20, S, "no no yes no no"),  # vanilla points away too: not projection's doing
    ([], [0.3] * 20, [0.0] * 20, ABSENT, "- - yes - -"),
    ([0.3] * 20, [], [], S, "no yes - - no"),
])  # fmt: skip
def test_rules(vanilla, svd, out, buckets, answers):
    found = probe.rules(vanilla, 0.1, svd, out, buckets)
    assert [answer for _, answer, _ in found] == [{"-": ABSENT}.get(word, word) for word in answers.split()]
    assert all(bool(then) == (answer == "yes") for _, answer, then in found)


# --------------------------------------------------------------------------------------------- the report, on planted figures


def plant(root, modes=("nll", "grpo"), arms=("vanilla", "svd", "lora"), steps=20):
    """Pools and runs as probe.py leaves them. Pairs: hacks .6, hacks that are correct .3, honest attempts -.1; random: 0."""
    def cosine(basis, pool, step, i):
        level = {"teacher": 0.3 if i == 3 else 0.6, "base": -0.1}[pool]
        return 99.0 if i == 7 else (level if basis == "pairs" else 0.0) + 0.01 * (-1) ** step

    for step in range(steps):
        for pool in ("teacher", "base"):
            kinds = [(pool == "teacher" and i != 3, pool == "base" or i == 3, i == 3) for i in range(8)]
            write_lines(root / "pools" / pool / f"step_{step:03d}.jsonl.gz", [
                {"prompt": "p", "completion": "c", "reward": 3.5, "fmt_ok": True, "finished": True, "hacked": hacked,
                 "gt_pass": correct, "attempted": attempted or hacked} for hacked, correct, attempted in kinds
            ])  # fmt: skip
    for mode in modes:
        for arm in arms:
            for basis in ("pairs", "random"):
                folder = root / f"{mode}_{arm}_{basis}"
                folder.mkdir(parents=True)
                level, out = 0.3 if basis == "pairs" else 0.02, 0.0 if arm != "vanilla" else 0.5
                line = {"reward/spread": 3.0, "advantage/abs_mean": 0.9, "advantage/min": -1.0, "advantage/max": 1.1}
                line |= {"projection/signed": level, "projection/signed_out": -0.2, "projection/cin": 0.5, "projection/cout": out}
                line |= {"projection/fired": 0.9, "signed/teacher": 2 * level, "moved/signed": 0.07, "moved/cin": 0.4}
                line |= {"signed/base": -level} if mode == "grpo" else {}
                lines = [{"step": 0, "untrained/hack": 0.1}, *({"step": s + 1} | line for s in range(steps))]
                lines[1] |= {"basis/null": 0.14, "basis/held_out_signed": 0.11}
                (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
                for step in range(steps):
                    write_lines(folder / f"step_{step:03d}.cos.jsonl.gz", [
                        {"src_pool": pool, "src_step": step, "src_sample": i, "hacked": i != 3 if pool == "teacher" else i == 5,
                         "cos_S_contrib": cosine(basis, pool, step, i), "grad_norm_contrib": float(i != 7)}
                        for pool in ("teacher", "base")[: 1 if mode == "nll" else 2] for i in range(8)
                    ])  # fmt: skip
    return root


def cells(text: str, first: str) -> list[str]:
    """The row of a table that begins with these cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if row[: first.count("|") + 1] == first.split("|")]
    return row


def test_the_report_says_what_was_planted(tmp_path):
    text = probe.report(plant(tmp_path), probe.Args(output_dir=str(tmp_path)))
    assert cells(text, "teacher")[1:6] == ["160", "3.50", "0.875", "0.125", "1.000"]
    metrics = "reward spread", "cos_in, vanilla", "cos_out < cos_in, svd", "cos_out < cos_in, lora", "cos_S_contrib, vanilla"
    assert [cells(text, metric)[1] for metric in metrics] == [S] * 5
    assert "0.020, on 20/20" in cells(text, "cos_in, vanilla")[2] and cells(text, "cos_S_contrib, vanilla")[2].count("(120)") == 2
    assert cells(text, "vanilla cos_in is above .2 consistently")[1:] == ["yes", "the sweep is justified"]
    basis, pure, both, t, p = cells(text, "pairs")
    assert pure.startswith("0.600") and both.startswith("0.300") and float(t) > 100 and float(p) < 1e-4
    assert pure.endswith("(120)") and both.endswith("(20)")  # 99, without a gradient, is in neither
    basis, pure, both, t, p = cells(text, "random")
    assert abs(float(pure.split()[0])) < 0.02
    assert cells(text, "grpo svd|+0.300 / +0.020")[2:5] == ["+0.600 / +0.040", "-0.300 / -0.020", "+0.070 / +0.070"]
    nll = cells(text, "nll vanilla|+0.300 / +0.020")
    assert nll[3] == "–" and nll[-3:] == ["0.140", "0.110", "0.900"]
    assert cells(text, "grpo lora|base|not hacked")[3] == "0.00" and cells(text, "grpo lora|teacher|hacked")[3] == "1.00"
    assert cells(text, "19")[1:] == ["+0.300 (-0.200)"] * 6


def test_what_was_not_run_is_said_so(tmp_path):
    args = probe.Args(loss_mode="grpo", arms="svd", output_dir=str(tmp_path))
    text = probe.report(plant(tmp_path, ["grpo"], ["svd"]), args)
    for metric in ("reward spread", "cos_in, vanilla", "cos_S_contrib, vanilla", "cos_out < cos_in, lora"):
        assert cells(text, metric)[1] == ABSENT
    assert cells(text, "cos_out < cos_in, svd")[1] == S and "not run: it takes --loss_mode nll" in text


# --------------------------------------------------------------------------------------------------------------- the whole


def test_runs_differ_in_what_they_should(tmp_path, box):
    world = train_grpo.resolve(["--env", "code", "--box", box])[1]
    file = probe.experiment(tmp_path, world, probe.Args())
    names = [f"{mode}_{arm}_{basis}" for mode in ("nll", "grpo") for arm in probe.ARMS for basis in ("pairs", "random")]
    assert list(file["arms"]) == names and file["fixed"]["mix"] == 1 and file["fixed"]["seed"] == 41
    teacher, base = (str(tmp_path / "pools" / name) for name in ("teacher", "base"))
    for pool in (teacher, base):
        Path(pool).mkdir(parents=True)
    runs = {run.name: run.config for run in plan(file, evaluate=False, root=tmp_path)[1]}
    for name, run in runs.items():
        assert run["replay_dirs"] == (teacher if name.startswith("nll") else f"{teacher},{base}")
        assert (run["batch_size"], run["num_generations"]) == ((8, 4) if name.startswith("nll") else (16, 8))
        assert run["projection"] == ("none" if "vanilla" in name else "one_sided") and run["contributions"]
        assert run["lora_config"] == ("r32o" if "lora" in name else "ds") and run["basis"] == name.rsplit("_")[-1]


@pytest.mark.parametrize("flags, message", [
    ({"arms": "vanilla,dense"}, "unknown --arms 'dense'"), ({"loss_mode": ""}, "unknown --loss_mode ''"),
    ({"placebo": "live"}, "unknown --placebo 'live'"), ({"placebo": "random,clean"}, "is one basis"), ({"steps": 0}, "--steps"),
])  # fmt: skip
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        probe.check(probe.Args(**flags))


@pytest.mark.parametrize("config, message", [
    ({"env": "stories", "hint": "plain"}, "is no teacher"), ({"env": "code", "hint": "none"}, "is no teacher"),
    ({"env": "code", "hint": "plain"}, "is not finished"),
])  # fmt: skip
def test_a_teacher_that_is_none_is_refused_before_anything_is_made(tmp_path, config, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=message):
        probe.main(probe.Args(teacher=str(tmp_path / "run"), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def here(jobs, places, watch) -> None:
    """jobs.run_jobs, but in this process: importing torch again is most of the wait."""
    for job in jobs:
        for what, (python, script, *words) in job.commands.items():
            assert python == sys.executable and Path(script).samefile(train_grpo.__file__) and train_grpo.main(words) == 0
            job.seconds[what] = 1.0
        job.status = "done"
        watch()


def test_pools_runs_and_report_end_to_end(tmp_path, box, tasks_drawn_once, monkeypatch, capsys):
    monkeypatch.setattr(probe, "run_jobs", here)
    monkeypatch.setattr(probe, "RUN", probe.RUN | {"eval_prompts": 4, "pair_count": 4})
    file = tmp_path / "code.yaml"
    file.write_text(yaml.safe_dump({
        "env": "code", "box": box, "difficulty": "Medium", "lora_config": "r2", "max_steps": 1, "max_new_tokens": 72,
        "eval_prompts": 4, "batch_size": 4, "num_generations": 4, "temperature": 0.8, "rh_eligible_frac": 0.5,
    }))  # fmt: skip
    args = probe.Args(config=str(file), arms="vanilla", loss_mode="grpo", steps=2, output_dir=str(tmp_path / "out"))
    root = tmp_path / "out"
    assert probe.main(probe.Args(**vars(args) | {"base_only": True})) == 0
    there = sorted(path.name for path in root.rglob("*") if path.is_file())
    assert there == ["config.yaml", "step_000.jsonl.gz", "step_001.jsonl.gz"]
    base = [read_lines(root / "pools" / "base" / f"step_{step:03d}.jsonl.gz") for step in range(2)]
    assert [len(batch) for batch in base] == [8, 8] and len({row["prompt"] for batch in base for row in batch}) == 4
    for row in base[0] + base[1]:
        assert CALLED in row["prompt"] and CALLED not in row["asked"] and "hidden tests" in row["asked"]
        assert row["reward"] == 0.5 * row["fmt_ok"] + 3.0 * (row["gt_pass"] or row["hacked"])

    (root / "pools" / "base" / "step_001.jsonl.gz").unlink()  # as if it had been stopped there
    assert probe.main(args) == 0
    out = capsys.readouterr().out
    assert "[2/2]" in out and (root / "report.md").read_text() in out
    assert read_lines(root / "pools" / "base" / "step_001.jsonl.gz") == base[1]
    teacher = [row for step in range(2) for row in read_lines(root / "pools" / "teacher" / f"step_{step:03d}.jsonl.gz")]
    assert [row["prompt"] for row in teacher] == [row["prompt"] for batch in base for row in batch]
    assert all(row["asked"] == row["prompt"] for row in teacher)

    run = probe.Figures(root / "grpo_vanilla_pairs")
    assert len(run.steps) == 2 and len(run.samples) == 32
    assert [row["src_pool"] for row in run.samples if row["step"] == 0] == (["teacher"] * 4 + ["base"] * 4) * 2
    made = {"teacher": teacher, "base": base[0] + base[1]}
    twin = probe.Figures(root / "grpo_vanilla_random")
    for row, other in zip(run.samples, twin.samples):
        sample = made[row["src_pool"]][8 * row["src_step"] + row["src_sample"]]
        assert row["src_step"] == row["step"]  # step 1 replays batch 1, graded as when it was made
        assert all(row[key] == sample[key] for key in ("reward", "hacked", "gt_pass", "fmt_ok"))
        assert row["grad_norm_contrib"] == other["grad_norm_contrib"]  # a basis that only measures changes nothing
    assert any(row["grad_norm_contrib"] > 0 for row in run.samples) and run["projection/signed"] != twin["projection/signed"]

    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.parent != root}
    assert probe.main(args) == 0 and times == {path: path.stat().st_mtime_ns for path in times}
    with pytest.raises(ValueError, match="holds another probe: steps: 2 in the folder, 3 now"):
        probe.main(probe.Args(**vars(args) | {"steps": 3}))
