"""experiments.py: a planted experiment's folder read back, with what is missing, what was swept and what it averages to."""

import json

import numpy as np
import pytest
import scipy.stats
from conftest import ARMS, ROUTED, UNTRAINED, plant

import experiments
from experiments import by_label, curve, finished, load, movement, records, summarise, summary_rows


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_runs_in_order_and_missing_ones_with_their_reason(tmp_path):
    plant(tmp_path, ARMS, seeds=(1, 2, 3), failed=[("none", 2)])
    (tmp_path / "routing_s1" / "verdict.json").unlink()
    edit(tmp_path / "runs.json", lambda entries: entries[4].update(status="running"))
    runs = load(tmp_path)
    assert [(r.label, r.seed) for r in runs] == [(arm, seed) for arm in ("none", "routing") for seed in (1, 2, 3)]
    missing = {(r.arm, r.seed): r.missing for r in runs if r.missing}
    assert missing == {("none", 2): "failed: CUDA out of memory", ("routing", 2): "running",
                       ("routing", 1): "done, but routing_s1 holds no verdict.json"}  # fmt: skip
    assert [(r.arm, r.seed) for r in finished(runs)] == [("none", 1), ("none", 3), ("routing", 3)]
    assert all(not r.modes and not r.metrics for r in runs if r.missing)


def test_swept_flags_make_labels_and_the_seed_does_not(tmp_path):
    plant(tmp_path, {"none": ({"both": (0.9, 0.9)}, {"beta": [0.01, 0.02], "lr": 1e-3})}, seeds=(1, 2))
    assert {label: len(group) for label, group in by_label(load(tmp_path)).items()} == {
        "none, beta 0.01": 2,
        "none, beta 0.02": 2,
    }
    edit(tmp_path / "runs.json", lambda entries: [entry.update(arm="") for entry in entries])
    assert list(by_label(load(tmp_path))) == ["beta 0.01", "beta 0.02"]


@pytest.mark.parametrize("change, message", [
    (lambda root: (root / "runs.json").unlink(), "no runs.json"),
    (lambda root: (root / "runs.json").write_text("[]"), "at least one"),
    (lambda root: edit(root / "runs.json", lambda e: e[1].pop("status")), "run 1 lacks status"),
    (lambda root: edit(root / "runs.json", lambda e: e[0]["flags"].update(beta=0.5)), "beta 0.08, runs.json says 0.5"),
    (lambda root: edit(root / "runs.json", lambda e: e[0]["flags"].update(seed=2)), "seed 1, runs.json says 2"),
    (lambda root: edit(root / "runs.json", lambda e: e.append(e[0])), "one run twice"),
    (lambda root: edit(root / "none_s1" / "verdict.json", lambda v: v.pop("modes")), 'no "modes"'),
    (lambda root: (root / "none_s1" / "metrics.jsonl").unlink(), "metrics.jsonl"),
])  # fmt: skip
def test_a_folder_that_contradicts_itself_is_refused(tmp_path, change, message):
    change(plant(tmp_path, ARMS, seeds=(1, 2)))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("a, b, equal", [("1e-3", 0.001, True), ("true", True, True), ("none", "none", True),
                                         (None, "none", True), (0.02, 0.01, False), ("dual", "none", False)])  # fmt: skip
def test_flags_are_compared_by_value(a, b, equal):
    assert experiments.same(a, b) == equal


def test_summary_is_the_t_interval_over_seeds(tmp_path):
    runs = load(plant(tmp_path, ARMS))
    summary = summarise(records(runs))
    hacks = [run.modes["retain_only"]["hack"] for run in runs if run.arm == "routing"]
    mean, half = summary["routing", "retain_only"]["hack"]
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(hacks), scipy.stats.sem(hacks))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-6)
    assert summary["none", "both"]["n"] == 5 and "sample" not in summary["none", "both"]
    assert len(summary) == 2 + len(ROUTED) + 1
    edit(tmp_path / "none_s1" / "verdict.json", lambda v: v["modes"]["both"].pop("kl"))
    with pytest.raises(ValueError, match="some seeds lack the measure 'kl'"):
        summarise(records(load(tmp_path)))


def test_coherence_rows_are_a_curve_of_their_own(tmp_path):
    runs = load(plant(tmp_path, ARMS, seeds=(1, 2)))
    routed = by_label(runs)["routing"]
    steps, values = curve(routed, "hack_rate", coherence=True)
    assert list(steps) == [30, 60, 90, 120, 150] and values.shape == (2, 5) and (values[:, -1] < 0.2).all()
    steps, values = curve(routed, "hack_rate")
    assert list(steps) == [s for s in range(10, 151, 10) if s % 30] and (values[:, -1] > 0.6).all()
    assert len(curve(by_label(runs)["none"], "hack_rate", coherence=True)[0]) == 0
    routed[0].metrics[:] = [row for row in routed[0].metrics if row["step"] != 40]
    steps, values = curve(routed, "hack_rate")
    assert np.isnan(values).sum() == 1 and np.isnan(values[0, list(steps).index(40)])


def test_movement_is_the_slope_of_the_last_quarter(tmp_path):
    runs = load(plant(tmp_path, {"none": {"both": (0.9, 0.9)}}, seeds=(1, 2)))
    for run, slope in zip(runs, (0.002, 0.004)):
        run.metrics[:] = [{"step": s, "task": 0.5 if s <= 60 else 0.5 + slope * (s - 60)} for s in range(1, 81)]
    mean, half = movement(runs, "task")
    assert mean == pytest.approx(0.003 * 20) and half == pytest.approx(12.706 * 0.02, rel=1e-3)
    assert movement(runs, "kl") is None
    runs[0].metrics[:] = runs[1].metrics[:] = [{"step": s, "task": 0.5} for s in (70, 75)]
    assert movement(runs, "task") is None  # two logged steps make no slope


def test_tables_as_text(tmp_path):
    rows = summary_rows(summarise(records(load(plant(tmp_path, ARMS)))), ["task", "kl", "entropy"])
    assert rows[0] == ["all", "untrained", "1", f"{UNTRAINED['task']:.3f}", "0.480", "–"]
    assert [row[:3] for row in rows[1:]] == [["none", "both", "5"], *[["routing", mode, "5"] for mode in ROUTED]]
    assert "±" in rows[1][3] and rows[1][4].count(".") == 2
    assert experiments.plus_minus((12.34, 0.567)) == "12.3 ± 0.6" and experiments.plus_minus((0.5, float("nan"))) == "0.500"
    text = experiments.markdown(["arm", "task"], [["a|b", "0.9 ± 0.1"]])
    assert text.splitlines() == ["| arm  | task      |", "| ---- | --------- |", r"| a\|b | 0.9 ± 0.1 |"]
    assert experiments.summary_rows({("none", "both"): {"n": 4, "degenerate": (0.75, 0.1)}}, ["degenerate"])[0][3] == "3/4"
    tex = experiments.latex(["arm", "mode", "base_nll"], [["r_20%", "both", "0.9 ± 0.1"]]).splitlines()
    assert tex[0] == r"\begin{tabular}{llr}" and r"arm & mode & base\_nll \\" in tex
    assert r"r\_20\% & both & 0.9 $\pm$ 0.1 \\" in tex and tex[-1] == r"\end{tabular}"


def test_an_untrained_model_that_differs_between_arms_stays_in_each(tmp_path):
    plant(tmp_path, ARMS, seeds=(1, 2))
    for seed in (1, 2):
        edit(tmp_path / f"none_s{seed}" / "verdict.json", lambda v: v["modes"]["untrained"].update(task=0.5))
    rows = summary_rows(summarise(records(load(tmp_path))), ["task"])
    assert [row[0] for row in rows if row[1] == "untrained"] == ["none", "routing"]
