"""analyze.py: figures that show what was planted, tables and verdicts in files, and the bad-scale curve of a real run."""

import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tyro
import yaml
from conftest import ARMS, ROUTED, is_picture, plant

import analyze
import train_grpo
from experiments import finished, load
from runs import read_config
from verdict import bad_scale_rows

HYPOTHESES = {
    "gone": {"claim": "the hack is | gone", "measure": "hack", "of": {"arm": "routing", "mode": "retain_only"},
             "against": {"arm": "none", "mode": "both"}, "expect": "< -0.5"},
    "worse": {"claim": "routing hacks more", "measure": "hack", "of": {"arm": "routing", "mode": "both"},
              "against": {"arm": "none"}, "expect": "> 0"},
}  # fmt: skip
SWEPT = {
    "semantic": (lambda beta: {"both": (1 - 4 * beta, 0.0, 0.98, 0.2)}, {"beta": [0.1, 0.01, 0.05]}),
    "structural": (lambda beta: {"both": (0.9 - 5 * beta, 0.0, 0.2 + 7 * beta, 0.8 - 5 * beta)}, {"beta": [0.01, 0.1]}),
}


def run(folder, *flags) -> dict:
    analyze.main(tyro.cli(analyze.Args, args=[str(folder), *flags], use_underscores=True))
    return json.loads((folder / "analysis" / "results.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "hypotheses": HYPOTHESES}))
    return str(path)


def figure_of(draw, *args):
    with matplotlib.rc_context(analyze.STYLE):
        return draw(*args)


def drawn_lines(axis) -> list:
    return [line for line in axis.get_lines() if len(line.get_xdata()) > 1]


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ---------------------------------------------------------------------------------------------------- the whole


def test_everything_is_written_and_what_is_missing_is_named(tmp_path, config, capsys, painted):
    folder = plant(tmp_path / "x", ARMS | {"placebo": (ROUTED, {})}, failed=[("routing", 2), ("placebo", 1)])
    results = run(folder, "--config", config)
    names = ("learning_curves", "plane", "arms")
    expected = {"report.md", "summary.md", "summary.tex", "results.json", *[f"{name}.png" for name in names]}
    assert {path.name for path in (folder / "analysis").iterdir()} == expected
    for name in names:
        assert is_picture(folder / "analysis" / f"{name}.png"), name
    report, out = (folder / "analysis" / "report.md").read_text(), capsys.readouterr().out
    for text in (report, out):
        assert "routing, seed 2: failed: CUDA out of memory" in text and "placebo, seed 1: failed: CUDA" in text
    assert "13 of 15 runs have a result" in report and all(f"]({name}.png)" in report for name in names)
    assert re.search(r"\| gone +\| the hack is \\\| gone +\| \*\*supported\*\* +\|", report) and "**not supported**" in report
    assert "Left out: seed 2, routing failed: CUDA out of memory" in report and "SUPPORTED: gone" in out
    assert (folder / "analysis" / "summary.md").read_text() in report
    assert [m["label"] for m in results["missing"]] == ["routing", "placebo"]
    assert [(v["name"], v["verdict"], v["seeds"]) for v in results["verdicts"]] == [
        ("gone", "supported", [1, 3, 4, 42]), ("worse", "not supported", [1, 3, 4, 42])]  # fmt: skip
    tex = (folder / "analysis" / "summary.tex").read_text()
    assert all(line.count("&") == 10 for line in tex.splitlines() if line.endswith(r"\\")) and tex.count(r"\\") == 9


def test_the_same_folder_gives_the_same_bytes(tmp_path, config, painted):
    folder = plant(tmp_path / "x", ARMS, seeds=(1, 2, 3))
    texts = []
    for _ in range(2):
        run(folder, "--config", config)
        texts.append([(folder / "analysis" / name).read_bytes() for name in ("report.md", "results.json", "plane.png")])
    assert texts[0] == texts[1]


def test_one_seed_each_gives_figures_and_no_intervals(tmp_path, config):
    folder = plant(tmp_path / "x", ARMS, seeds=(1,))
    results = run(folder, "--config", config)
    assert {v["verdict"] for v in results["verdicts"]} == {"undecided"}
    assert results["summary"][1]["hack"][1] is None and "±" not in (folder / "analysis" / "summary.md").read_text()
    assert (folder / "analysis" / "learning_curves.png").is_file()


def test_curves_draws_the_metrics_it_names(tmp_path, config):
    folder = plant(tmp_path / "x", ARMS, seeds=(1, 2, 3))
    run(folder, "--config", config)
    assert not (folder / "analysis" / "curves.png").exists()
    run(folder, "--config", config, "--curves", "kl,hack_rate")
    assert (folder / "analysis" / "curves.png").is_file()
    figure = figure_of(analyze.learning_curves, load(folder), {"routing": "black"}, {"kl": "kl", "hack_rate": "hacks"})
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["kl", "hacks"]


@pytest.mark.parametrize("flags, message", [
    (["--config", "nowhere.yaml"], "no such file"), (["--arms", "rooting"], "known: none; routing"),
    (["--measures", "task,hacks"], "no run has it; known: task, hack"), (["--bad_scales", "0,half"], "must be numbers"),
    (["--curves", "kl,cin"], "--curves cin: no run has logged it; known: .*kl"),
    (["--device", "tpu"], "tpu"), (["--bad_scales", "0,1"], "holds no adapter.safetensors"),
])  # fmt: skip
def test_wrong_flags_are_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(plant(tmp_path / "x", ARMS, seeds=(1,)), *flags)


def test_a_bad_scale_needs_a_bad_branch_and_an_analysis_a_run(tmp_path):
    plant(tmp_path / "x", {"none": {"both": (0.9, 0.9)}}, seeds=(1, 2), failed=[("none", 1)])
    with pytest.raises(ValueError, match="no finished run of .* has a bad branch"):
        run(tmp_path / "x", "--bad_scales", "0")
    plant(tmp_path / "y", {"none": {"both": (0.9, 0.9)}}, seeds=(1,), failed=[("none", 1)])
    with pytest.raises(ValueError, match="none of its 1 runs has a result; the first: failed: CUDA"):
        run(tmp_path / "y")


def test_a_wrong_command_ends_with_one_line_and_status_2(tmp_path, command):
    done = command("analyze.py", tmp_path)
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "runs.json" in done.stderr
    )


def test_without_a_yaml_file_it_says_so(tmp_path, capsys):
    run(plant(tmp_path / "no_such_experiment", ARMS, seeds=(1,)))
    assert "no configs/no_such_experiment.yaml: no hypothesis to judge" in capsys.readouterr().out
    assert "## Verdicts" not in (tmp_path / "no_such_experiment" / "analysis" / "report.md").read_text()


# -------------------------------------------------------------------------------------------------- the figures


def test_arms_of_few_seeds_stay_grey_unless_named(tmp_path, capsys):
    plant(tmp_path, ARMS)
    few = plant(tmp_path / "few", {"map": ROUTED}, seeds=(1,))
    manifest = json.loads((tmp_path / "runs.json").read_text()) + json.loads((few / "runs.json").read_text())
    manifest[-1]["folder"] = "few/" + manifest[-1]["folder"]
    (tmp_path / "runs.json").write_text(json.dumps(manifest))
    runs = load(tmp_path)
    assert list(analyze.colours_of(runs, "")) == ["none", "routing"]
    assert list(analyze.colours_of(runs, "map, none")) == ["map", "none"]
    assert "other arms" in legend_of(figure_of(analyze.plane, runs, analyze.colours_of(runs, "")))
    labels = [tick.get_text() for tick in figure_of(analyze.arms_chart, runs).axes[0].get_yticklabels()]
    assert labels == ["none  (n = 5)", "routing  (n = 5)", "map  (n = 1)"]
    many = load(plant(tmp_path / "many", {f"a{i}": {"both": (0.9, 0.5)} for i in range(9)}, seeds=(1,)))
    assert len(analyze.colours_of(many, "")) == 8 and "9 arms, 8 colours" in capsys.readouterr().out


def test_learning_curves_show_means_bands_and_the_retained_policy_apart(tmp_path):
    runs = load(plant(tmp_path, ARMS))
    figure = figure_of(analyze.learning_curves, runs, analyze.colours_of(runs, ""))
    assert [axis.get_title(loc="left") for axis in figure.axes][:3] == ["reward", "task", "hack rate"] and len(figure.axes) == 4
    lines = drawn_lines(figure.axes[2])
    assert [line.is_dashed() for line in lines] == [False, False, True] and "bad branch off" in legend_of(figure)
    last = np.mean([run.metrics[-1]["hack_rate"] for run in runs if run.arm == "none"])
    assert lines[0].get_ydata()[-1] == pytest.approx(last) and lines[2].get_ydata()[-1] < 0.2
    assert len(figure.axes[2].collections) == 3  # a band each
    pair = [run for run in runs if run.arm == "none"][:2]
    bands = figure_of(analyze.learning_curves, pair, {"none": "black"}).axes[0].collections
    assert all(np.isnan(path.vertices).all() or len(path.vertices) == 0 for band in bands for path in band.get_paths())


def test_the_plane_has_a_point_a_run_and_an_arrow_where_a_branch_is_dropped(tmp_path):
    runs = load(plant(tmp_path, ARMS, failed=[("routing", 3)]))
    done = finished(runs)
    axis = figure_of(analyze.plane, done, analyze.colours_of(done, "")).axes[0]
    points = np.concatenate([points.get_offsets() for points in axis.collections])
    want = [[row["task"], row["hack"]] for r in done for mode, row in r.modes.items() if mode in ("both", "retain_only")]
    want.append([0.55, 0.04])  # the untrained model, once
    assert np.allclose(sorted(map(tuple, points)), sorted(map(tuple, want)))
    ends = [tuple((r.modes[m]["task"], r.modes[m]["hack"]) for m in ("both", "retain_only")) for r in done if r.arm == "routing"]
    assert [(note.xyann, note.xy) for note in axis.texts if note.arrow_patch] == ends and len(ends) == 4


def test_the_collapse_curve_orders_beta_and_marks_what_is_degenerate(tmp_path):
    runs = load(plant(tmp_path, SWEPT, seeds=(1, 2, 3), noise=0.001))
    figure = figure_of(analyze.collapse_curve, runs)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["reward", "unique share", "Jaccard similarity"]
    assert legend_of(figure) == ["semantic", "structural", "degenerate"]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0.01", "0.05", "0.1"]
    semantic, structural = drawn_lines(figure.axes[0])
    assert list(structural.get_xdata()) == [0, 2] and semantic.get_ydata() == pytest.approx([0.96, 0.8, 0.6], abs=0.02)
    assert drawn_lines(figure.axes[1])[1].get_ydata() == pytest.approx([0.27, 0.9])
    assert drawn_lines(figure.axes[2])[1].get_ydata() == pytest.approx([0.75, 0.3])
    assert analyze.collapse_curve(load(plant(tmp_path / "plain", ARMS, seeds=(1,)))) is None


def test_the_bad_scale_curve_takes_scales_that_all_seeds_have(tmp_path):
    runs = [run for run in load(plant(tmp_path, ARMS, seeds=(1, 2, 3))) if run.arm == "routing"]
    rows = {run.folder: {s: {"task": 0.9, "hack": s * (0.7 + 0.1 * i)} for s in (0.0, 0.5, 1.0)} for i, run in enumerate(runs)}
    rows[runs[0].folder][0.7] = {"task": 0.9, "hack": 0.5}
    axis = figure_of(analyze.bad_scale_curve, runs, rows, {"routing": "blue"}).axes[1]
    *thin, mean, untrained = drawn_lines(axis)
    assert list(mean.get_xdata()) == [0, 0.5, 1] and mean.get_ydata() == pytest.approx([0, 0.4, 0.8]) and len(thin) == 3
    assert set(untrained.get_ydata()) == {0.04}
    assert analyze.bad_scale_curve(runs, {run.folder: {} for run in runs}, {"routing": "blue"}) is None


# -------------------------------------------------------------------------------------------------- a real run


def test_bad_scales_of_a_real_run_are_its_verdict_at_the_ends_and_kept(tmp_path, monkeypatch):
    flags = {"routing": "dual", "max_steps": 2, "batch_size": 8, "num_generations": 4, "max_new_tokens": 10, "eval_prompts": 12,
             "logging_steps": 1, "eval_routing_steps": 0, "seed": 3, "lora_config": "r2", "lr": 0.05,
             "false_positive_frac": 0.5}  # fmt: skip
    folder = tmp_path / "sweep"
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    assert train_grpo.main([*words, "--output_dir", str(folder / "a")]) == 0
    entry = {"arm": "routing", "swept": {}, "flags": flags, "folder": "a", "status": "done", "wall_s": 1.0}
    (folder / "runs.json").write_text(json.dumps([entry]))
    results = run(folder, "--bad_scales", "1,0,.5", "--device", read_config(folder / "a")["device"])
    assert list(results["bad_scales"]["a"]) == ["0.0", "0.5", "1.0"] and (folder / "analysis" / "bad_scale.png").is_file()
    modes = json.loads((folder / "a" / "verdict.json").read_text())["modes"]
    rows = bad_scale_rows(folder / "a")
    assert rows[0.0] == modes["retain_only"] and rows[1.0] == modes["both"] and rows[0.5] not in (rows[0.0], rows[1.0])

    def fail(*args, **kwargs):
        raise AssertionError("evaluated again")

    monkeypatch.setattr("verdict.load_run", fail)
    assert bad_scale_rows(folder / "a", [0.5, 0]) == rows
    with pytest.raises(AssertionError, match="evaluated again"):
        bad_scale_rows(folder / "a", [0.25])
    adapter = folder / "a" / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes() + b" ")  # another adapter: none of the rows is its
    assert bad_scale_rows(folder / "a") == {}
    with pytest.raises(AssertionError, match="evaluated again"):
        bad_scale_rows(folder / "a", [0.5])


def test_the_docs_example_is_one_experiment(tmp_path):
    page = (Path(analyze.__file__).parent / "docs" / "analyze.md").read_text()
    entries = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["hypotheses"]
    arms = ARMS | {"placebo": {"both": (0.9, 0.9), "retain_only": (0.85, 0.8), "forget_only": (0.8, 0.8)},
                   "recall_0.2": ROUTED, "filter": {"both": (0.88, 0.3)}, "penalty": {"both": (0.86, 0.1)}}  # fmt: skip
    verdicts = analyze.judge_all(analyze.read_hypotheses(entries), load(plant(tmp_path, arms, noise=0.002)))
    assert len(verdicts) >= 5 and {v.verdict for v in verdicts} == {"supported"}
    assert all(math.isfinite(v.estimate) or v.why.count("supported") for v in verdicts)
