"""hypotheses.py: planted effects are found, planted absences are not, and whatever is left out is named."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import yaml
from conftest import ARMS, ROUTED, plant

import hypotheses
from experiments import load
from hypotheses import NOT_SUPPORTED, SUPPORTED, UNDECIDED, judge_all, parse_bound, read_hypotheses

RETAIN = "of: {arm: routing, mode: retain_only}"


def judged(runs, text: str):
    """The verdict of one hypothesis, as YAML writes it."""
    return judge_all(read_hypotheses({"h": {"claim": "c"} | yaml.safe_load(f"{{{text}}}")}), runs)[0]


def setting(runs, arm: str, mode: str, measure: str, values) -> None:
    for run, value in zip([run for run in runs if run.arm == arm], values):
        run.modes[mode][measure] = value


@pytest.fixture
def runs(tmp_path):
    return load(plant(tmp_path, ARMS))


@pytest.mark.parametrize("text, inside, outside", [
    ("< -0.5", [-0.51, -9], [-0.5, 0]), ("<=.03", [0.03, -1], [0.031]), ("> 0", [1e-9], [0, -1]), (">= 1e-1", [0.1], [0.09]),
    ("-.05 .. .05", [-0.05, 0, 0.05], [-0.051, 0.051]), ("0..1", [0, 1], [-0.1, 1.1]),
])  # fmt: skip
def test_bounds(text, inside, outside):
    bound = parse_bound(text)
    assert all(bound.holds(x) for x in inside) and not any(bound.holds(x) for x in outside)


@pytest.mark.parametrize("text, low, high, word", [
    ("< 0", -2, -1, SUPPORTED), ("< 0", -1, 0, UNDECIDED), ("< 0", 0, 1, NOT_SUPPORTED), ("<= 0", -1, 0, SUPPORTED),
    ("<= 0", 0, 1, UNDECIDED), ("<= 0", 0.1, 1, NOT_SUPPORTED), ("> 0", -1, 1, UNDECIDED), (">= 0", 0, 0, SUPPORTED),
    ("-1 .. 1", -1, 1, SUPPORTED), ("-1 .. 1", 0, 2, UNDECIDED), ("-1 .. 1", -2, 2, UNDECIDED), ("-1 .. 1", 2, 3, NOT_SUPPORTED),
])  # fmt: skip
def test_an_interval_meets_a_bound_wholly_in_part_or_not_at_all(text, low, high, word):
    assert parse_bound(text).judge(low, high) == word


@pytest.mark.parametrize("entry, message", [
    ("measure: hack, " + RETAIN + ", expect: about 1", "is no bound"),
    ("measure: hack, " + RETAIN + ", expect: '1 .. -1'", "is no bound"),
    ("measure: hack, " + RETAIN + ", expect: '> 0', when: now", "unknown key 'when'"),
    ("measure: hack, expect: '> 0'", "needs of"),
    ("measure: hack, of: {arm: routing}, expect: '> 0'", "of must be"),
    ("measure: hack, " + RETAIN + ", as: ratio, expect: '> 0'", "needs a cell to stand against"),
    ("measure: hack, " + RETAIN + ", against: {mode: both}, as: value, expect: '> 0'", "takes no `against`"),
    ("measure: hack, " + RETAIN + ", against: {mode: both}, as: quotient, expect: '> 0'", "known: value, difference, ratio"),
    ("measure: hack, " + RETAIN + ", against: {mode: retain_only}, expect: '> 0'", "the same cell"),
    ("all: [g]", "must list other hypotheses"), ("all: [h]", "must list other hypotheses"),
])  # fmt: skip
def test_what_cannot_be_judged_is_refused_by_name(runs, entry, message):
    with pytest.raises(ValueError, match=f"hypothesis h: .*{message}"):
        judged(runs, entry)


@pytest.mark.parametrize("entry, message", [
    ("measure: hack, of: {arm: rooting, mode: both}, expect: '> 0'", "unknown arm 'rooting'; known: none, routing"),
    ("measure: hack, of: {arm: none, mode: retain_only}, expect: '> 0'", "no mode 'retain_only'; known: untrained, both"),
    ("measure: hacks, of: {arm: none, mode: both}, expect: '> 0'", "no measure 'hacks'; known: task"),
    ("measure: sample, of: {arm: none, mode: both}, expect: '> 0'", "no measure 'sample'"),
    ("measure: hack, of: {arm: none, mode: both, gamma: 1}, expect: '> 0'", "no flag 'gamma'"),
    ("measure: hack, of: {arm: none, mode: both, beta: 1}, expect: '> 0'", "no run of arm none has beta 1"),
])  # fmt: skip
def test_what_the_experiment_does_not_have_is_refused_by_name(runs, entry, message):
    with pytest.raises(ValueError, match=f"hypothesis h: .*{message}"):
        judged(runs, entry)


@pytest.mark.parametrize("entry, word", [
    ("measure: hack, " + RETAIN + ", against: {arm: none, mode: both}, expect: '< -0.5'", SUPPORTED),
    ("measure: hack, " + RETAIN + ", against: {arm: none, mode: both}, expect: '> -0.5'", NOT_SUPPORTED),
    ("measure: hack, of: {arm: routing, mode: both}, against: {arm: none}, expect: '< -0.5'", NOT_SUPPORTED),
    ("measure: task, of: {arm: routing, mode: both}, against: {arm: none}, expect: '-.05 .. .05'", SUPPORTED),
    ("measure: task, " + RETAIN + ", against: {mode: both}, as: ratio, expect: '>= 0.8'", SUPPORTED),
    ("measure: task, of: {arm: routing, mode: forget_only}, against: {mode: both}, as: ratio, expect: '>= 0.8'", NOT_SUPPORTED),
    ("measure: hack, of: {arm: routing, mode: forget_only}, expect: '>= 0.5'", SUPPORTED),
    ("measure: hack, of: {arm: routing, mode: forget_only}, expect: '>= 0.62'", UNDECIDED),
])  # fmt: skip
def test_planted_effects_are_found_and_absent_ones_are_not(runs, entry, word):
    verdict = judged(runs, entry)
    assert verdict.verdict == word and "5 seeds" in verdict.why and not verdict.unpaired
    assert verdict.interval[0] <= verdict.estimate <= verdict.interval[1]
    share = {SUPPORTED: "all of them", NOT_SUPPORTED: "nothing of them", UNDECIDED: "a part of them"}[word]
    assert share in verdict.why and f"{verdict.interval[0]:.3f} to {verdict.interval[1]:.3f}" in verdict.why


def test_seeds_are_paired(runs):
    entry = "measure: hack, " + RETAIN + ", against: {arm: none, mode: both}, expect: '< 0'"
    shared = np.array([0.0, 0.05, 0.1, 0.15, 0.2])
    setting(runs, "none", "both", "hack", 0.7 + shared)
    setting(runs, "routing", "retain_only", "hack", 0.1 + shared)
    verdict = judged(runs, entry)
    assert verdict.interval == pytest.approx((-0.6, -0.6)) and verdict.p == 0
    setting(runs, "routing", "retain_only", "hack", 0.1 + shared[::-1])
    low, high = judged(runs, entry).interval
    assert high - low > 0.2
    runs.reverse()  # the order of the manifest says nothing
    assert judged(runs, entry).interval == (low, high)


def test_the_ratio_is_of_gains_over_each_runs_own_untrained_row(runs):
    setting(runs, "routing", "untrained", "task", [0.5, 0.5, 0.6, 0.5, 0.5])
    setting(runs, "routing", "both", "task", [0.9, 0.8, 0.9, 0.9, 1.0])
    setting(runs, "routing", "retain_only", "task", [0.8, 0.8, 0.8, 0.9, 0.9])
    entry = "measure: task, " + RETAIN + ", against: {mode: both}, as: ratio, expect: '>= 0.8'"
    verdict = judged(runs, entry)
    assert verdict.estimate == pytest.approx(np.mean([0.3, 0.3, 0.2, 0.4, 0.4]) / np.mean([0.4, 0.3, 0.3, 0.4, 0.5]))
    contrast = np.array([0.3, 0.3, 0.2, 0.4, 0.4]) - 0.8 * np.array([0.4, 0.3, 0.3, 0.4, 0.5])
    assert verdict.p == pytest.approx(scipy.stats.ttest_1samp(contrast, 0, alternative="greater").pvalue)
    for mode in ("untrained", "both", "retain_only"):  # a measure that falls keeps its share just so
        setting(runs, "routing", mode, "length", [-run.modes[mode]["task"] for run in runs if run.arm == "routing"])
    fallen = judged(runs, entry.replace("task", "length"))
    assert fallen.interval == pytest.approx(verdict.interval) and fallen.p == pytest.approx(verdict.p)
    assert fallen.t_interval == pytest.approx(verdict.t_interval) and fallen.verdict == verdict.verdict
    setting(runs, "routing", "both", "task", [0.55, 0.48, 0.61, 0.5, 0.49])
    verdict = judged(runs, entry)
    assert verdict.verdict == UNDECIDED and "no clear gain in task" in verdict.why and math.isnan(verdict.estimate)


def test_a_missing_run_is_named_and_its_partner_left_out(tmp_path):
    runs = load(plant(tmp_path, ARMS, failed=[("none", 2), ("routing", 4)]))
    verdict = judged(runs, "measure: hack, " + RETAIN + ", against: {arm: none, mode: both}, expect: '< -.5'")
    assert verdict.verdict == SUPPORTED and verdict.seeds == (1, 3, 42) and "3 seeds" in verdict.why
    assert "Left out: seed 2, none failed: CUDA out of memory; seed 4, routing failed: CUDA out of memory." in verdict.why
    manifest = [e for e in json.loads((tmp_path / "runs.json").read_text()) if (e["arm"], e["flags"]["seed"]) != ("none", 1)]
    (tmp_path / "runs.json").write_text(json.dumps(manifest))
    verdict = judged(load(tmp_path), "measure: hack, " + RETAIN + ", against: {arm: none, mode: both}, expect: '< -.5'")
    assert verdict.verdict == UNDECIDED and verdict.seeds == (3, 42) and "seed 1, none both was not run with it" in verdict.why


@pytest.mark.parametrize("seeds", [0, 1, 2, 3])
def test_fewer_than_three_seeds_decide_nothing(tmp_path, seeds):
    arms = {"none": ({"both": (0.9, 0.9)}), "routing": ROUTED}
    runs = load(plant(tmp_path, arms, seeds=(1, 2, 3), failed=[("routing", seed) for seed in (3, 2, 1)[: 3 - seeds]]))
    verdict = judged(runs, "measure: hack, " + RETAIN + ", expect: '< 0.5'")
    assert verdict.verdict == (SUPPORTED if seeds == 3 else UNDECIDED) and len(verdict.seeds) == seeds
    assert f"{seeds} seed{'s' * (seeds != 1)}" in verdict.why and ("a verdict takes 3" in verdict.why) == (seeds in (1, 2))


def test_both_intervals_must_agree(runs):
    """A bootstrap of five seeds is too narrow to decide alone."""
    setting(runs, "routing", "retain_only", "hack", [0.02, 0.0, 0.0, 0.01, 0.05])
    verdict = judged(runs, "measure: hack, " + RETAIN + ", expect: '<= 0.04'")
    assert verdict.interval[1] < 0.04 < verdict.t_interval[1] and verdict.verdict == UNDECIDED
    assert judged(runs, "measure: hack, " + RETAIN + ", expect: '<= 0.2'").verdict == SUPPORTED


def test_flags_pick_the_runs_of_a_swept_arm(tmp_path):
    arms = {"none": (lambda beta: {"both": (0.9, 0.9 if beta < 0.05 else 0.1)}, {"beta": [0.01, 0.1]}), "routing": ROUTED}
    runs = load(plant(tmp_path, arms))
    entry = "measure: hack, of: {arm: none, mode: both, beta: %s}, expect: '> 0.5'"
    assert judged(runs, entry % "0.01").verdict == SUPPORTED and judged(runs, entry % "1e-1").verdict == NOT_SUPPORTED
    other = "measure: hack, of: {arm: none, mode: both, beta: .01}, against: {beta: .1}, expect: '> 0.5'"
    assert judged(runs, other).verdict == SUPPORTED
    with pytest.raises(ValueError, match="takes in none, beta 0.01; none, beta 0.1: add the flag"):
        judged(runs, "measure: hack, of: {arm: none, mode: both}, expect: '> 0.5'")


def test_p_values_are_of_the_t_test_and_corrected_together(runs):
    text = f"""
      low: {{claim: c, measure: hack, {RETAIN}, expect: "< 0.06"}}
      apart: {{claim: c, measure: hack, {RETAIN}, against: {{arm: none, mode: both}}, expect: "< -0.9"}}
      alike: {{claim: c, measure: task, of: {{arm: routing, mode: both}}, against: {{arm: none}}, expect: "-.02 .. .02"}}
    """
    by_name = {v.name: v for v in judge_all(read_hypotheses(yaml.safe_load(text)), runs)}

    def cell(arm, mode, measure):
        return np.array([run.modes[mode][measure] for run in runs if run.arm == arm])

    retained, task = cell("routing", "retain_only", "hack"), cell("routing", "both", "task") - cell("none", "both", "task")
    p = {
        "low": scipy.stats.ttest_1samp(retained, 0.06, alternative="less").pvalue,
        "apart": scipy.stats.ttest_rel(retained, cell("none", "both", "hack") - 0.9, alternative="less").pvalue,
        "alike": max(
            scipy.stats.ttest_1samp(task, end, alternative=way).pvalue for end, way in ((-0.02, "greater"), (0.02, "less"))
        ),
    }
    assert {name: v.p for name, v in by_name.items()} == pytest.approx(p)
    smallest = min(p, key=p.get)
    assert by_name[smallest].p_holm == pytest.approx(min(1, 3 * p[smallest]))
    assert all(v.p_holm >= v.p for v in by_name.values()) and max(v.p_holm for v in by_name.values()) < 1


@pytest.mark.parametrize("parts, word", [(["yes_", "yes_"], SUPPORTED), (["yes_", "part"], UNDECIDED), (["yes_", "part", "no_"],
                                         NOT_SUPPORTED)])  # fmt: skip
def test_a_conjunction_is_as_good_as_its_parts(runs, parts, word):
    bounds = {"yes_": ">= 0.5", "part": ">= 0.62", "no_": "> 0.9"}
    cell = {"claim": "c", "measure": "hack", "of": {"arm": "routing", "mode": "forget_only"}}
    entries = {"outer": {"claim": "c", "all": ["inner"]}, "inner": {"claim": "c", "all": parts}}
    entries |= {name: cell | {"expect": bound} for name, bound in bounds.items()}
    verdicts = judge_all(read_hypotheses(entries), runs)
    assert [v.name for v in verdicts] == list(entries) and verdicts[0].verdict == verdicts[1].verdict == word
    assert verdicts[1].why == "; ".join(f"{p} {dict(yes_=SUPPORTED, part=UNDECIDED, no_=NOT_SUPPORTED)[p]}" for p in parts)
    entries["inner"]["all"] = ["outer"]
    with pytest.raises(ValueError, match="in a circle"):
        judge_all(read_hypotheses(entries), runs)


def test_the_examples_in_the_docstring_are_judged(runs):
    setting(runs, "routing", "retain_only", "hack", [0.0, 0.01, 0.0, 0.01, 0.0])
    text = hypotheses.__doc__.split("hypotheses:\n")[1].split("\n\n")[0].replace("..,", "c,")
    verdicts = {v.name: v.verdict for v in judge_all(read_hypotheses(yaml.safe_load(text)), runs)}
    assert verdicts == dict.fromkeys(("gone", "kept", "clean", "there", "alike", "works"), SUPPORTED)


def logged(runs, arm: str, lines: list[dict]) -> None:
    for run in runs:
        if run.arm == arm:
            run.metrics[:] = lines


def test_a_mode_may_be_of_a_step_and_measures_of_one_line_may_stand_against_each_other(runs):
    early = {"step": 20, "both/hack": 0.1, "both/task": 0.5, "retain_only/hack": 0.2}
    trained = {"step": 20, "lr": 1e-3, "cin/teacher": 0.3, "cin/student": 0.1, "coherence": 0.0}
    alone = trained | {"coherence": 1.0, "cin/teacher": 9.0}
    logged(runs, "routing", [{"step": 2, "both/hack": 0.9}, alone, trained, early])
    verdict = judged(runs, "measure: hack, of: {arm: routing, mode: both@20}, expect: '.09 .. .11'")
    assert verdict.verdict == SUPPORTED and verdict.estimate == 0.1
    verdict = judged(runs, "measure: hack, of: {arm: routing, mode: retain_only@20}, against: {mode: both@20}, expect: '> 0'")
    assert verdict.verdict == SUPPORTED and verdict.estimate == pytest.approx(0.1)
    text = "measure: cin/teacher, of: {arm: routing, mode: training@20}, against: {measure: cin/student}, expect: '> 0'"
    verdict = judged(runs, text)
    assert verdict.estimate == pytest.approx(0.2) and "difference in cin/teacher against cin/student 0.200" in verdict.why
    for mode in ("both@30", "training@2", "bot@20", "deployed@20"):
        with pytest.raises(ValueError, match=f"no mode '{mode}'; known: untrained, both.*training@20"):
            judged(runs, f"measure: hack, of: {{arm: routing, mode: {mode}}}, expect: '> 0'")
    with pytest.raises(ValueError, match="no measure 'reward'; known: step, lr, cin/teacher"):
        judged(runs, "measure: reward, of: {arm: routing, mode: training@20}, expect: '> 0'")
