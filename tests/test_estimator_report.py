"""The estimators' analysis on planted results: measures by hand, verdicts of known effects, and what is missing named."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tyro
from conftest import is_picture
from test_estimator_variance import LOWER, plant_seeds

import analyze
import estimator_figures as figures
import estimator_report
import estimator_runs
import estimator_verdicts as verdicts
from estimator_runs import Run, common_kl, compared, first_reach, gap, load, reward_at_kl, roughness, spent, spread
from hypotheses import NOT_SUPPORTED, SUPPORTED, UNDECIDED

LIKE = {"final": 0.8, "rate": 40.0, "kl": 3.0, "spread": 0.5, "rough": 0.04, "gap": 0.02}
CONFIRMED = {  # with lower variances (LOWER) all five hypotheses as their seed has them
    "grade": {"rate": 15.0, "spread": 0.2, "rough": 0.01, "gap": 0.0}, "grade-ste": {"spread": 0.3, "gap": 0.008},
    "ppo": {"gap": 0.016}, "reinforce": {"spread": 0.7, "rough": 0.06, "gap": 0.024},
}  # fmt: skip
SEEDS = (42, 1, 2, 3, 4)
ONE_MICRO_BATCH = {"batch_size": 16, "micro_batch_size": 16}
TAU = {"tau_start": 2.0, "tau_end": 0.5, "tau_steps": 100}


def plant_run(folder: Path, method: str, seed: int, noise: float = 0.004, steps: int = 200, config=(), **how) -> dict:
    """A run's results.json with what LIKE and `how` say of it; its reward rises from .4 to `final`."""
    like = LIKE | how
    rng = np.random.default_rng([seed, *map(ord, method)])
    final, rate = like["final"] + noise * rng.normal(), like["rate"] * (1 + 5 * noise * rng.normal())
    at = lambda step: 0.4 + (final - 0.4) * (1 - math.exp(-step / rate))  # noqa: E731
    kl = lambda step: like["kl"] * (1 + 10 * noise * rng.normal()) * (1 - math.exp(-step / rate))  # noqa: E731
    norm = 2.0 if method == "ppo" else 0.3  # losses have scales of their own
    rows = [
        {"step": s, "reward": at(s) + like["rough"] * (-1) ** s * (1 + 0.2 * rng.normal()), "loss": -at(s), "kl": kl(s),
         "grad_norm_mean": norm, "grad_norm_std": norm * like["spread"] * (1 + 0.1 * rng.normal()), "tokens": 700 * s,
         "prompts": 16 * s, "seconds": 0.1} | ({"tau": max(0.5, 2 - s / 100)} if "grade" in method else {})
        for s in range(1, steps + 1)
    ]  # fmt: skip
    checks = [{"step": s, "val_reward": at(s), "val_reward_std": 0.2, "val_kl": kl(s)} for s in range(20, steps + 1, 20)]
    last = {"reward": checks[-1]["val_reward"] - like["gap"] + noise / 4 * rng.normal(), "kl": checks[-1]["val_kl"]}
    data = {
        "method": method, "seed": seed, "config": {"seed": seed, "lr": 1e-4} | dict(config), "untrained": {"val_reward": 0.4},
        "steps": rows, "validation": checks, "wall_s": 60.0,
        "test": {"last": last, "best": last | {"step": steps}, "untrained": {"reward": 0.41, "kl": 0.0}},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data))
    return data


def plant(root: Path, methods: dict = CONFIRMED, seeds=SEEDS, **common) -> Path:
    for method, how in methods.items():
        for seed in how.get("seeds", seeds):
            own = {key: value for key, value in how.items() if key != "seeds"}
            plant_run(root / f"{method}_s{seed}", method, seed, **common | own)
    return root


@pytest.fixture
def pictures(painted):
    """Asked for by the tests that draw: a picture takes longer than all the rest."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(estimator_report, "draw", lambda *_: [])


def analyse(root: Path, *flags) -> tuple[dict, str]:
    analyze.main(tyro.cli(analyze.Args, args=["--results_dir", str(root), *flags], use_underscores=True))
    numbers = json.loads((root / "analysis" / "results.json").read_text(), parse_constant=pytest.fail)
    return numbers, (root / "analysis" / "report.md").read_text()


def words(numbers: dict) -> list[str]:
    return [v["verdict"] for v in numbers["verdicts"]]


def curve(**columns) -> Run:
    """A run of validations alone, or of steps alone, for measures by hand."""
    columns = {key: np.array(column, float) for key, column in columns.items()}
    columns.setdefault("step", np.arange(len(next(iter(columns.values()))), dtype=float) * 10)
    test = {"last": {"reward": 0.5, "kl": 1}, "best": {"reward": 0.6, "kl": 1, "step": 10}, "untrained": {"reward": 0.1, "kl": 0}}
    return Run("GRADE", "GRADE", 1, Path("r"), {}, columns, columns, test, 1.0)


# ------------------------------------------------------------------------------------------- measures, by hand


def test_the_first_reach_is_linear_between_validations_and_never_is_never():
    run = curve(val_reward=[0.2, 0.4, 0.3, 0.8])
    reached = [first_reach(run, "val_reward", level) for level in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.81, math.nan)]
    assert reached == pytest.approx([0, 0, 5, 10, 26, 30, math.inf, math.inf])


def test_tokens_are_counted_from_the_start_and_between_logged_steps():
    run = curve(step=[10, 20], tokens=[1000, 1600])
    assert [spent(run, "tokens", step) for step in (0, 5, 10, 15, math.inf)] == pytest.approx([0, 500, 1000, 1300, math.inf])


def test_roughness_is_blind_to_a_trend_and_sees_an_oscillation():
    steps = np.arange(1, 41)
    line = curve(reward=0.01 * steps)
    wave = curve(reward=0.01 * steps + 0.05 * (-1.0) ** steps)
    assert roughness(line) == pytest.approx(0, abs=1e-12) and roughness(wave) == pytest.approx(0.1)
    kinked = curve(step=[1, 2, 3, 4], reward=[0, 0, 1, 1])  # |0 - 1/2| and |1 - 1/2|
    assert roughness(kinked) == pytest.approx(0.5) and roughness(kinked, until=3) == pytest.approx(0.5)
    assert math.isnan(roughness(kinked, until=2))
    assert estimator_runs.drawdown(curve(val_reward=[0.2, 0.7, 0.4, 0.6, 0.1, 0.9])) == pytest.approx(0.6)


def test_spread_is_free_of_the_loss_scale_and_leaves_out_what_is_not_logged():
    std, mean = np.array([1.0, 3.0, math.nan]), np.array([2.0, 6.0, 4.0])
    one = curve(step=[1, 2, 3], grad_norm_std=std, grad_norm_mean=mean)
    assert spread(one) == 0.5 == spread(curve(step=[1, 2, 3], grad_norm_std=9 * std, grad_norm_mean=9 * mean))
    assert math.isnan(spread(curve(step=[1], grad_norm_std=[math.nan], grad_norm_mean=[1])))


def test_the_gap_is_of_the_checkpoint_that_was_tested():
    run = curve(val_reward=[0.2, 0.7, 0.9, 0.55])
    assert gap(run, "last") == pytest.approx(0.05) and gap(run, "best") == pytest.approx(0.1)


def test_reward_at_a_kl_is_on_the_runs_way_and_nowhere_else():
    run = curve(val_kl=[0, 2, 4, 1, 3], val_reward=[0.1, 0.4, 0.8, 0.5, 0.9])  # the first is the untrained model
    crossings = [0.6, 0.7, 0.9]  # at KL 3: going up, coming back, at the end
    assert reward_at_kl(run, 3) == pytest.approx(np.mean(crossings))
    assert reward_at_kl(run, 4) == 0.8 and reward_at_kl(run, 1) == 0.5
    assert math.isnan(reward_at_kl(run, 0.5)) and math.isnan(reward_at_kl(run, 4.1))


@pytest.mark.parametrize("paths, expected", [
    ([[0, 1, 5], [0, 2, 3]], 3), ([[0, 1, 5], [0, 2, 8, 4]], 4), ([[0, 4, 6], [0, 5, 2]], 4), ([[0, 1, 2], [0, 3, 4]], None),
    ([[0, 1, 2]], 2),
])  # fmt: skip
def test_the_common_kl_is_the_least_final_one_that_all_have_had(paths, expected):
    assert common_kl([curve(val_kl=path, val_reward=[0.5] * len(path)) for path in paths]) == expected


def test_a_learning_curve_is_made_of_means_of_stretches():
    run = curve(step=np.arange(1, 121), reward=np.arange(1, 121))
    middles, table = figures.binned([run], "reward")
    assert len(middles) == 60 and middles[:2] == pytest.approx([1, 3]) and table[0, :2] == pytest.approx([1.5, 3.5])
    run = curve(step=[10, 20], reward=[5, 7])
    assert figures.binned([run], "reward")[1] == pytest.approx(np.array([[5, 7]]))


# --------------------------------------------------------------------------------------------------- known effects


def test_planted_effects_are_found(tmp_path, capsys, pictures):
    numbers, report = analyse(plant_seeds(plant(tmp_path)))
    assert words(numbers) == [SUPPORTED] * 5, numbers["verdicts"]
    out = tmp_path / "analysis"
    drawn = ("learning", "validation", "gradients", "variance", "efficiency", "final", "differences")
    assert {p.name for p in out.iterdir()} == {"report.md", "estimators.tex", "results.json", *[f"{name}.png" for name in drawn]}
    for name in drawn:
        assert f"]({name}.png)" in report and is_picture(out / f"{name}.png"), name
    sections = ("Verdicts", "1. Learning curves", "2. Validation and generalisation gap",
                "3. Gradients and stability", "4. Sample efficiency", "5. Final comparison", "6. Temperature ablation",
                "7. Tests over seeds", "8. LaTeX")  # fmt: skip
    assert re.findall(r"^## (.+)$", report, re.M) == list(sections)
    tex = [line for line in (out / "estimators.tex").read_text().splitlines() if line.endswith(r"\\")]
    assert len(tex) == 6 and all(line.count(" & ") == 7 for line in tex) and tex[1].startswith("untrained & 1 & 0.410 & --")
    assert "None: all runs of a method have one schedule" in report and "SUPPORTED: H1" in capsys.readouterr().out
    assert numbers["targets"]["0.8"] == pytest.approx(0.4 + 0.8 * 0.4, abs=0.01)


@pytest.mark.parametrize("change, at", [
    ({"grade": {"rate": 90.0}}, 1), ({"ppo": {"final": 0.6}}, 2), ({"grade": {"gap": 0.03}}, 3),
    ({"grade": {"rough": 0.1}}, 4),
])  # fmt: skip
def test_the_opposite_effect_is_not_supported(tmp_path, change, at):
    methods = {method: how | change.get(method, {}) for method, how in CONFIRMED.items()}
    numbers, _ = analyse(plant(tmp_path, methods))
    assert words(numbers)[at] == NOT_SUPPORTED, numbers["verdicts"][at]


def test_no_effect_is_undecided_and_equal_rewards_are_equivalent(tmp_path):
    numbers, _ = analyse(plant(tmp_path, dict.fromkeys(CONFIRMED, {}), noise=0.006))
    assert words(numbers)[0] == words(numbers)[1] == words(numbers)[4] == UNDECIDED and words(numbers)[2] == SUPPORTED
    scattered, _ = analyse(plant(tmp_path / "b", dict.fromkeys(CONFIRMED, {}), noise=0.05))
    assert words(scattered)[2] == UNDECIDED, "scatter is no equivalence"


def test_what_holds_over_whole_runs_but_not_at_matched_kl_is_undecided(tmp_path):
    methods = CONFIRMED | {"grade": CONFIRMED["grade"] | {"kl": 6.0, "rate": 40.0}}  # as good, at twice the price
    numbers, _ = analyse(plant(tmp_path, methods))
    third = numbers["verdicts"][2]
    assert third["verdict"] == UNDECIDED and "(supported)" in third["why"] and "(not supported)" in third["why"]
    matched = numbers["comparisons"]["validation reward at matched KL"]
    first = next(row for row in matched if (row["a"], row["b"]) == ("GRADE", "PPO"))
    assert first["pairs"] == 5 and first["difference"] < -0.05 and first["kl"] == pytest.approx([2.9, 2.9], abs=0.3)


def test_the_first_hypothesis_is_of_measured_variances_and_the_spread_has_no_say(tmp_path):
    methods = CONFIRMED | {"grade": CONFIRMED["grade"] | {"spread": 0.9}}  # the norms' spread is the largest
    numbers, report = analyse(plant_seeds(plant(tmp_path, methods)))
    assert words(numbers)[0] == SUPPORTED and len(numbers["variance_pairs"]) == 4 and len(numbers["variance"]) == 5
    table = report.split("(variance.py)")[1].split("## 4")[0]
    assert table.count("| policy |") == 5 * len(LOWER) and re.search(r"\| grade 0\.5 +\| 5 +\| 5 +\| 3\.\d* \(", table)
    higher, _ = analyse(plant_seeds(plant(tmp_path / "higher"), LOWER | {"grade 0.5": 20.0}))
    assert words(higher)[0] == NOT_SUPPORTED
    unmeasured, _ = analyse(plant(tmp_path / "unmeasured"))
    assert words(unmeasured)[0] == UNDECIDED and "a spread of norms is no variance" in unmeasured["verdicts"][0]["why"]


def test_the_gap_is_ranked_with_measured_variances_or_else_with_the_spread(tmp_path):
    def fourth(root: Path) -> tuple[str, str]:
        verdict = analyse(root)[0]["verdicts"][3]
        return verdict["verdict"], verdict["why"]

    methods = CONFIRMED | {"grade": CONFIRMED["grade"] | {"spread": 0.9}}  # least gap, largest spread, least variance
    word, why = fourth(plant(tmp_path / "spread", methods))
    assert word != SUPPORTED and why.startswith("spread of norms and absolute gap: rank correlation over 4 methods")
    word, why = fourth(plant_seeds(plant(tmp_path / "variance", methods)))
    assert word == SUPPORTED and why.startswith("relative variance and absolute gap: rank correlation over 4 methods 0.800")
    word, why = fourth(plant_seeds(plant(tmp_path / "two", methods), seeds=(42, 1)))
    assert word != SUPPORTED and why.startswith("spread of norms"), "of two seeds there is no ranking"
    word, why = fourth(plant(tmp_path / "neither", methods, config=ONE_MICRO_BATCH))
    assert word == UNDECIDED and "relative variance: 0 methods, and a ranking takes 3, spread of norms: 0 methods" in why


def test_comparisons_equal_scipy(tmp_path):
    runs = load(plant(tmp_path, noise=0.02))
    found = verdicts.values(compared(runs), lambda run: run.test["last"]["reward"])
    rows = verdicts.compare(found, equivalence=True)
    assert [(row.a, row.b) for row in rows][:2] == [("GRADE", "GRADE-STE"), ("GRADE", "PPO")] and len(rows) == 6
    x, y = ([found[m][s] for s in SEEDS] for m in ("GRADE", "PPO"))
    test, row = scipy.stats.ttest_ind(x, y, equal_var=False), rows[1]
    margin = 0.05 * (np.mean(x) + np.mean(y)) / 2
    low, high = (scipy.stats.ttest_ind(np.array(x) + s * margin, y, equal_var=False, alternative=way).pvalue
                 for s, way in ((1, "greater"), (-1, "less")))  # fmt: skip
    assert (row.p, row.low, row.high) == pytest.approx((test.pvalue, *test.confidence_interval()))
    assert (row.margin, row.p_equivalent) == pytest.approx((margin, max(low, high)))
    assert row.pairs == 5 and row.p_paired == pytest.approx(scipy.stats.ttest_rel(x, y).pvalue)
    by_hand = sorted(r.p for r in rows)
    assert min(r.p_holm for r in rows) == pytest.approx(min(1, 6 * by_hand[0])) and all(r.p_holm >= r.p for r in rows)
    assert math.isnan(verdicts.compare(found)[0].p_equivalent)


# --------------------------------------------------------------------------------------------- what is not there


def test_one_seed_each_gives_pictures_and_no_test(tmp_path, pictures):
    numbers, report = analyse(plant(tmp_path, seeds=(42,)))
    assert words(numbers) == [UNDECIDED] * 5 and "no test: 1 and 1 seeds, and it takes 3 of each" in report
    assert not (tmp_path / "analysis" / "differences.png").exists() and (tmp_path / "analysis" / "final.png").exists()
    assert all(row["p"] is None for rows in numbers["comparisons"].values() for row in rows)
    assert "±" not in report.split("## 7")[0]


def test_missing_methods_are_named_and_nothing_is_claimed_of_them(tmp_path):
    methods = {name: how for name, how in CONFIRMED.items() if name != "ppo"}
    numbers, report = analyse(plant(tmp_path, methods | {"reinforce": CONFIRMED["reinforce"] | {"seeds": (1, 2)}}))
    assert "No run of PPO." in report and words(numbers)[1] == UNDECIDED
    assert "no test: 5 and 2 seeds, and it takes 3 of each" in report
    assert "GRADE − PPO no test: 5 and 0 seeds, and it takes 3 of each" in numbers["verdicts"][1]["why"]
    assert "fewer than 3 seeds of PPO, REINFORCE" in numbers["verdicts"][2]["why"] and words(numbers)[2] == UNDECIDED


def test_without_grade_there_is_still_a_report(tmp_path):
    numbers, report = analyse(plant(tmp_path, {"reinforce": {}}, seeds=(1, 2, 3)))
    assert words(numbers) == [UNDECIDED] * 5 and "No run of GRADE, GRADE-STE, PPO." in report


def test_pairs_without_a_common_kl_are_said_to_and_the_others_are_compared(tmp_path):
    methods = CONFIRMED | {"grade": CONFIRMED["grade"] | {"kl": 90.0}}
    numbers, report = analyse(plant(tmp_path, methods))
    rows = {(row["a"], row["b"]): row for row in numbers["comparisons"]["validation reward at matched KL"]}
    assert [row["pairs"] for (a, _), row in rows.items() if a == "GRADE"] == [0] * 3 and rows["PPO", "REINFORCE"]["pairs"] == 5
    assert report.count("no test: 0 seeds of 5 with a common KL, and it takes 3") == 7  # 3 rows; H2 and H5, 2 rivals each
    assert words(numbers)[4] == UNDECIDED and "(supported); matched KL: GRADE − PPO no test" in numbers["verdicts"][4]["why"]
    assert words(numbers)[3] == SUPPORTED  # a gap is of a run's end alone


def test_matched_pairs_are_of_one_seed_at_their_own_kl_by_hand():
    def run(method: str, seed: int, kl: list, reward: list) -> Run:
        one = curve(val_kl=[0, *kl], val_reward=[0.4, *reward], reward=[0.1, 0.2, 0.1], step=[0, 10, 20])
        return dataclasses.replace(one, method=method, label=method, seed=seed)

    groups = {
        "GRADE": [run("GRADE", s, [1, 3], [0.5, 0.5 + s / 10]) for s in (1, 2, 3)] + [run("GRADE", 4, [50, 60], [0.9, 0.9])],
        "PPO": [run("PPO", s, [2, 4], [0.4, 0.8]) for s in (3, 1, 2, 4)],
    }
    [row] = verdicts.compare_matched(groups, verdicts.rewards, equivalence=True)
    x, y = np.array([0.6, 0.7, 0.8]), np.array([0.6] * 3)  # at KL 3, the least final one; seed 4 has none in common
    assert (row.pairs, row.kl, row.seeds) == (3, (3, 3), (4, 4)) and row.means == pytest.approx((0.7, 0.6))
    test = scipy.stats.ttest_rel(x, y)
    assert (row.difference, row.p_paired, row.low) == pytest.approx((0.1, test.pvalue, test.confidence_interval().low))
    apart, margin = x - y, 0.05 * (0.7 + 0.6) / 2
    ways = [scipy.stats.ttest_1samp(apart, end, alternative=way).pvalue for end, way in ((-margin, "greater"), (margin, "less"))]
    assert row.p_equivalent == pytest.approx(max(ways)) and math.isnan(row.p)
    [steps] = verdicts.compare_matched(groups, verdicts.steps_to_the_better)  # 80% of the better one's gain at that KL
    assert steps.means[1] == pytest.approx(np.mean([10 + 10 * (t - 0.4) / 0.4 for t in (0.56, 0.64, 0.72)]))


def test_a_threshold_that_is_never_reached_is_counted(tmp_path):
    methods = CONFIRMED | {"reinforce": {"final": 0.6}, "ppo": {"final": 0.72}}
    numbers, report = analyse(plant(tmp_path, methods, noise=0.01))
    target = numbers["targets"]["0.8"]
    groups = compared(load(tmp_path))
    reached = {m: sum(run.validation["val_reward"].max() >= target for run in group) for m, group in groups.items()}
    assert reached["REINFORCE"] == 0 < reached["PPO"] < 5 == reached["GRADE"]
    rows = [line for line in report.splitlines() if line.startswith(f"| 80%: {target:.3f}")]
    assert "never (0 of 5)" in rows[3] and f"{reached['PPO']} of 5 reached" in rows[2] and "±" in rows[0]
    assert "REINFORCE 0 of 5" in numbers["verdicts"][1]["why"] and words(numbers)[1] == SUPPORTED
    by_label = {(run["label"], run["seed"]): run["steps to 80% of the best gain"] for run in numbers["runs"]}
    assert by_label["REINFORCE", 42] == 200, "the horizon, not nothing"


def test_where_nothing_is_gained_there_is_no_threshold(tmp_path):
    numbers, report = analyse(plant(tmp_path, dict.fromkeys(CONFIRMED, {"final": 0.3})))
    assert "there is no threshold to reach" in report and words(numbers)[1] == UNDECIDED
    assert "No method gained anything" in numbers["verdicts"][1]["why"] and numbers["targets"]["0.8"] is None


def test_the_temperature_ablation_is_of_real_runs_and_the_main_setting_has_the_most_seeds(tmp_path):
    plant(tmp_path, CONFIRMED | {"grade": CONFIRMED["grade"] | {"config": TAU}})
    for end in (0.1, 2.0):
        plant_run(tmp_path / f"a_tau{end}", "grade", 42, config=TAU | {"tau_end": end}, final=0.5)
    plant_run(tmp_path / "a_lr", "grade", 42, config=TAU | {"lr": 1e-3}, final=0.5)
    runs = load(tmp_path)
    assert list(compared(runs)) == ["GRADE", "GRADE-STE", "PPO", "REINFORCE"] and len(compared(runs)["GRADE"]) == 5
    settings = estimator_runs.tau_settings(runs)
    expected = {"GRADE, τ 2 to 0.1 in 100": 1, "GRADE, τ 2 to 2 in 100": 1, "GRADE, τ 2 to 0.5 in 100": 5}
    assert {name: len(group) for name, group in settings.items()} == expected
    assert figures.tau(settings) is not None is figures.tau({})
    _, report = analyse(tmp_path)
    assert "GRADE, lr 0.001; GRADE, tau_end 0.1; GRADE, tau_end 2.0." in report
    assert re.search(r"\| GRADE, tau_end 0.1 +\| 1 +\| 0.4\d\d", report.split("## 5")[1])
    assert re.search(r"\| GRADE, τ 2 to 0.1 in 100 +\| 1 ", report.split("## 6")[1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("at_all", [False, True])
def test_runs_without_a_spread_of_norms_have_no_empty_picture_and_no_gap_in_a_table(tmp_path, pictures, at_all):
    """GRADE leaves it out, REINFORCE logs 0 and PPO that of its epochs, where a step is one micro-batch."""
    for method in CONFIRMED:
        more = {} if at_all and method == "ppo" else {"config": ONE_MICRO_BATCH}
        plant(tmp_path, {method: CONFIRMED[method] | more}, seeds=(1, 2, 3))
    for path in tmp_path.glob("grade*/results.json"):
        data = json.loads(path.read_text())
        path.write_text(json.dumps(data | {"steps": [row | {"grad_norm_std": None} for row in data["steps"]]}))
    numbers, report = analyse(tmp_path)
    section, axes = report.split("## 3")[1].split("## 4")[0], figures.gradients(compared(load(tmp_path))).axes
    assert all(axis.lines or axis.collections for axis in axes) and len(axes) == (3 if at_all else 1)
    assert ("| spread" in section) == at_all == ("so it is no variance" in section) and "nan" not in report
    assert ("No spread of micro-batch norms was logged" in section) != at_all and "spread" not in report.split("## 4")[1]
    has = {run["label"] for run in numbers["runs"] if run["gradient spread"] is not None}
    assert has == ({"PPO"} if at_all else set())


def test_a_sweeps_failures_and_unequal_budgets_are_named(tmp_path):
    plant(tmp_path, CONFIRMED, steps=100)
    plant_run(tmp_path / "ppo_s42", "ppo", 42, steps=200)
    entry = {"arm": "ppo", "swept": {}, "flags": {}, "status": "failed", "error": "CUDA"}
    (tmp_path / "runs.json").write_text(json.dumps([entry | {"folder": "ppo_s42"}, entry | {"folder": "ppo_s9"}]))
    numbers, report = analyse(tmp_path)
    assert numbers["missing"] == ["ppo_s9: failed: CUDA"] and "- ppo_s9: failed: CUDA" in report
    assert "**The budgets are not equal: prompts and tokens" in report
    assert max(run["steps to 80% of the best gain"] for run in numbers["runs"]) <= 100


def test_runs_without_a_result_are_named_with_the_step_that_they_are_at(tmp_path):
    def plant_unfinished(name: str, step: int) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("method: ppo\nmax_steps: 2000\n")
        lines = [json.dumps({"step": at, "reward": 0.5}) for at in range(1, step + 1)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99']))

    plant(tmp_path, seeds=(1,))
    for name, step in (("ppo_s2", 30), ("by_hand", 7)):
        plant_unfinished(name, step)
    (tmp_path / "ppo_s5").mkdir()
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.yaml").write_text("kind: sentiment\n")  # train_reward.py's, no run of the experiment
    entry = {"arm": "ppo", "swept": {}, "flags": {}, "error": ""}
    states = {"ppo_s1": "done", "ppo_s2": "running", "ppo_s3": "waiting", "ppo_s5": "done"}
    manifest = [entry | {"folder": name, "status": status} for name, status in states.items()]
    (tmp_path / "runs.json").write_text(json.dumps(manifest))
    expected = ["ppo_s2: running, step 30 of 2000", "ppo_s3: waiting", "ppo_s5: done, but it holds no results.json",
                "by_hand: running, or stopped, step 7 of 2000"]  # fmt: skip
    numbers, report = analyse(tmp_path)
    assert numbers["missing"] == expected and all(f"- {line}" in report for line in expected)
    for path in tmp_path.glob("*/results.json"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no results.json of a run: .*ppo_s2: running, step 30 of 2000; ppo_s3: waiting"):
        analyse(tmp_path)


# --------------------------------------------------------------------------------------------------- reading


def test_the_same_folder_gives_the_same_bytes_and_its_own_analysis_is_no_run(tmp_path):
    plant(tmp_path, seeds=(1, 2, 3))
    texts = []
    for _ in range(2):
        analyse(tmp_path)
        texts.append([(tmp_path / "analysis" / name).read_bytes() for name in ("report.md", "results.json", "estimators.tex")])
    assert texts[0] == texts[1]


def test_a_validation_at_step_0_is_the_untrained_model(tmp_path):
    data = plant_run(tmp_path, "ppo", 1)
    assert load(tmp_path)[0].validation["val_reward"][0] == 0.4
    data["validation"].insert(0, {"step": 0, "val_reward": 0.35, "val_kl": 0.0})
    data["test"]["best"]["step"] = 0  # it has never been better
    (tmp_path / "results.json").write_text(json.dumps(data))
    run = load(tmp_path)[0]
    assert gap(run, "best") == pytest.approx(0.35 - data["test"]["best"]["reward"])
    assert run.validation["val_reward"][0] == 0.35 and (run.validation["step"] == 0).sum() == 1


@pytest.mark.parametrize("change, message", [
    (lambda d: d.pop("test"), "lacks test"), (lambda d: d["test"].pop("best"), "test lacks best"),
    (lambda d: d["test"]["last"].pop("kl"), "test last needs reward and kl"),
    (lambda d: d["steps"][3].pop("loss"), "row 3 lacks loss"), (lambda d: d.update(steps=[]), "steps must be a list"),
    (lambda d: d["steps"][3].update(tokens=5), "tokens must count from the start"),
    (lambda d: d["steps"].pop(4), "evenly spaced"), (lambda d: d["validation"].reverse(), "in the order of their steps"),
    (lambda d: d["validation"][0].update(val_kl=None), "without a number"),
    (lambda d: d["untrained"].clear(), "no validation at step 0"),
    (lambda d: d["test"]["best"].update(step=7), "must name the step of a validation"),
])  # fmt: skip
def test_results_that_are_not_as_agreed_are_refused(tmp_path, change, message):
    data = plant_run(tmp_path / "r", "ppo", 1)
    change(data)
    (tmp_path / "r" / "results.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"r/results\.json: .*{message}"):
        analyse(tmp_path)
    assert not (tmp_path / "analysis").exists()


def test_one_run_twice_and_no_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no results.json"):
        analyse(tmp_path)
    plant_run(tmp_path / "a", "ppo", 1)
    plant_run(tmp_path / "b", "ppo", 1)
    with pytest.raises(ValueError, match=r"a and .*b are one run twice \(PPO, seed 1\)"):
        analyse(tmp_path)
    (tmp_path / "a" / "results.json").write_text("{")
    with pytest.raises(ValueError, match="a/results.json: no JSON"):
        analyse(tmp_path)


def test_the_command_knows_which_experiment_a_folder_is(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    plant(tmp_path / "x", seeds=(1,))
    assert command("analyze.py", "x").returncode == 0 and (tmp_path / "x" / "analysis" / "estimators.tex").is_file()
    done = command("analyze.py", "--results_dir", "y")
    assert done.returncode == 2 and done.stderr == "error: y: no such folder\n"


@pytest.mark.parametrize("flags, message", [
    ({}, "give an experiment's folder"), ({"folder": "x", "results_dir": "x"}, "give an experiment's folder"),
    ({"folder": "x", "arms": "ppo"}, "--arms has no meaning"),
])  # fmt: skip
def test_wrong_flags_are_refused(tmp_path, monkeypatch, flags, message):
    plant_run(tmp_path / "x", "ppo", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        analyze.main(analyze.Args(**flags))
