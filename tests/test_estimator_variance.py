"""What variance.py measured, over seeds: means by hand, hypothesis 1 of known differences, tables, the picture."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import estimator_figures as figures
from estimator_variance import (
    SEED_HEADS,
    by_method,
    file_rows,
    less_variance,
    measured_policies,
    pairs,
    seed_rows,
    variance_text,
)
from hypotheses import NOT_SUPPORTED, SUPPORTED, UNDECIDED

LOWER = {"grade 2": 1.0, "grade 0.5": 3.0, "ste 2": 4.0, "ste 0.5": 6.0, "reinforce": 8.0, "ppo": 10.0}
SCATTER = {42: 1.0, 1: 1.3, 2: 0.8, 3: 1.1, 4: 0.9}  # what a seed's policy multiplies all of its variances by


def row(ratio, low=None, high=None, **more) -> dict:
    ends = {"low": ratio, "high": ratio} if isinstance(ratio, str) else {"low": low or ratio / 2, "high": high or 2 * ratio}
    return {"ratio": ratio, "cosine": 0.5, "cosine_half": 0.1, "bias": 0.2, "tokens": 700, "seconds": 0.5} | ends | more


def plant(root: Path, rows: dict, seed: int | None = None, checkpoint: int = 40, flags: dict | None = None, **more) -> Path:
    """A variance.json of a seed's policy; numbers among `rows` are made rows."""
    where = {} if seed is None else {"run": f"reinforce_s{seed}", "method": "reinforce", "seed": seed, "checkpoint": checkpoint}
    found = {label: made if isinstance(made, dict) else row(made) for label, made in rows.items()}
    data = {"rows": found, "where": where | {"kl": 1.5}, "flags": {"batch_size": 16, "seed": 7} | (flags or {})}
    folder = root / "variance" / f"seed={seed}_{checkpoint}"
    folder.mkdir(parents=True)
    (folder / "variance.json").write_text(json.dumps(data | more))
    return root


def plant_seeds(root: Path, variances: dict = LOWER, noise: float = 0.05, seeds=tuple(SCATTER)) -> Path:
    """A policy a seed: `variances` times the seed's own factor, which pairs share, times noise, whose logs add up to 0 over five
    seeds: so a pair's mean difference is that of the logs of `variances`."""
    for place, seed in enumerate(seeds):
        shaken = [math.exp(noise * math.cos(2 * math.pi * place * (1 + i % 2) / 5 + i)) for i in range(len(variances))]
        plant(root, {label: x * SCATTER[seed] * by for (label, x), by in zip(variances.items(), shaken)}, seed)
    return root


# --------------------------------------------------------------------------------------------------- over seeds


def test_a_pair_is_the_difference_of_logs_at_the_same_policy(tmp_path):
    plant_seeds(tmp_path, noise=0.1)
    rows = {p.seed: p.rows for p in measured_policies(tmp_path)}
    found = {(p.a, p.b): p for p in pairs(measured_policies(tmp_path))}
    assert list(found) == [(a, b) for a in ("grade 2", "grade 0.5") for b in ("ppo", "reinforce")]
    pair = found["grade 0.5", "reinforce"]
    apart = [math.log(rows[s]["grade 0.5"]["ratio"] / rows[s]["reinforce"]["ratio"]) for s in (1, 2, 3, 4, 42)]
    test = scipy.stats.ttest_1samp(apart, 0).confidence_interval(0.95)
    assert pair.seeds == (1, 2, 3, 4, 42) and (pair.difference, pair.low, pair.high) == pytest.approx((np.mean(apart), *test))
    assert pair.difference == pytest.approx(math.log(3 / 8))
    assert pair.high - pair.low < 0.5, "what a policy's seed does to all of its rows is not in a paired difference"


def test_several_policies_of_a_seed_are_one_observation(tmp_path):
    plant(tmp_path, {"grade 1": 2.0, "ppo": 4.0}, seed=1, checkpoint=10)
    plant(tmp_path, {"grade 1": 32.0, "ppo": 4.0}, seed=1, checkpoint=20)
    for seed in (2, 3):
        plant(tmp_path, {"grade 1": 2.0, "ppo": 4.0}, seed)
    pair = pairs(policies := measured_policies(tmp_path))[0]
    assert pair.seeds == (1, 2, 3) and pair.difference == pytest.approx(math.log(2) * (1 - 1 - 1) / 3)  # of 1: (-1 + 3) / 2 = 1
    assert by_method(policies)["GRADE"] == pytest.approx({1: 8.0, 2: 2.0, 3: 2.0})
    line = dict(zip(SEED_HEADS, seed_rows(policies)[0]))
    assert line["seeds"] == "3" and line["policies"] == "4" and line["relative variance"].startswith("3.17 (")


def test_a_method_is_its_row_of_the_lowest_temperature(tmp_path):
    found = by_method(measured_policies(plant_seeds(tmp_path, noise=0, seeds=(42,))))
    assert found == {"GRADE": {42: pytest.approx(3)}, "GRADE-STE": {42: pytest.approx(6)}, "PPO": {42: pytest.approx(10)},
                     "REINFORCE": {42: pytest.approx(8)}}  # fmt: skip


# ------------------------------------------------------------------------------------------------- hypothesis 1


@pytest.mark.parametrize("change, word", [
    ({}, SUPPORTED),
    ({"grade 0.5": 12.0}, NOT_SUPPORTED),  # above both rivals at one temperature
    ({"grade 2": 9.0, "grade 0.5": 9.0}, NOT_SUPPORTED),  # below one rival, above the other
    ({"grade 0.5": 8.0}, UNDECIDED),  # as high as one rival
    ({"grade 2": 20.0, "grade 0.5": 8.0}, NOT_SUPPORTED),
])  # fmt: skip
def test_the_first_hypothesis_of_known_variances(tmp_path, change, word):
    found, text = less_variance(measured_policies(plant_seeds(tmp_path, LOWER | change)))
    assert found == word, text
    assert text.startswith("5 policies of 5 seeds, KL 1.5 to 1.5 nats a completion; grade 2 has ")
    assert ("has 0.1 times ppo's, log -2.3 (95% " in text) == ("grade 2" not in change)
    assert text.count("5 seeds") == 5


def test_scatter_over_seeds_is_undecided_however_sharp_each_files_own_interval(tmp_path):
    for seed, factor in enumerate((0.1, 4.0, 0.2, 3.0)):
        plant(tmp_path, {"grade 2": row(factor, 0.99 * factor, 1.01 * factor), "ppo": 1.0, "reinforce": 1.0}, seed)
    assert less_variance(measured_policies(tmp_path))[0] == UNDECIDED


def test_two_seeds_are_too_few_and_each_files_interval_over_draws_is_shown(tmp_path):
    plant_seeds(tmp_path, {"grade 2": 1.0, "ste 2": 3.0, "ppo": 50.0, "reinforce": 50.0}, noise=0, seeds=(42, 1))
    plant(tmp_path, {"grade 2": 1.0, "ppo": row("not resolved"), "reinforce": row(9.0, high="open")})  # of no run
    word, text = less_variance(measured_policies(tmp_path))
    assert word == UNDECIDED and text.startswith("2 policies of 2 seeds, KL ")
    assert "and 1 of no seed's run, not counted, and it takes 3 seeds" in text
    assert "variance/seed=1_40 grade 2 0.65 to 2.6, ppo 32.5 to 130, reinforce 32.5 to 130;" in text and "ste" not in text
    assert "ppo not resolved to not resolved, reinforce 4.5 to open" in text


def test_what_is_not_resolved_is_left_out_and_counted(tmp_path):
    for seed in range(4):
        plant(tmp_path, {"grade 2": 1.0 + seed / 10, "ppo": row("not resolved") if seed < 1 else 9.0,
                         "reinforce": row("not resolved") if seed < 2 else 9.0}, seed)  # fmt: skip
    policies = measured_policies(tmp_path)
    word, text = less_variance(policies)
    assert [(p.seeds, p.unresolved) for p in pairs(policies)] == [((1, 2, 3), 1), ((2, 3), 2)]
    assert word == UNDECIDED and "3 seeds (1 not resolved)); grade 2 and reinforce: 2 seeds, and it takes 3" in text
    rows = {line[0]: dict(zip(SEED_HEADS, line)) for line in seed_rows(policies)}
    assert rows["ppo"]["policies"] == "3 of 4 resolved" and rows["grade 2"]["policies"] == "4"
    assert rows["reinforce"]["relative variance"] == "9", "two seeds have a mean and no interval"


def test_a_rival_that_was_not_measured_and_no_file_at_all_are_undecided(tmp_path):
    assert less_variance([]) == (UNDECIDED, "variance.py was run at no policy, and a spread of norms is no variance")
    plant_seeds(tmp_path, {"grade 2": 1.0, "reinforce": 9.0})
    word, text = less_variance(measured_policies(tmp_path))
    assert word == UNDECIDED and "grade 2 and ppo: 0 seeds, and it takes 3" in text
    plant_seeds(tmp_path / "b", {"ppo": 1.0, "reinforce": 9.0})
    word, text = less_variance(measured_policies(tmp_path / "b"))
    assert word == UNDECIDED and text.endswith("and GRADE was not measured")


# ----------------------------------------------------------------------------------------------- table, picture


def test_the_table_over_seeds_by_hand(tmp_path):
    for seed, (x, seconds) in enumerate([(1.0, 2.0), (4.0, 0.5), (16.0, 2.0)]):
        grade = row(x, seconds=seconds, cosine=0.4 + seed / 10, bias=0.1 * seed)
        plant(tmp_path, {"grade 2": grade, "ppo": row(8.0)}, seed)
    grade, ppo = (dict(zip(SEED_HEADS, line)) for line in seed_rows(measured_policies(tmp_path)))
    half = scipy.stats.t.ppf(0.975, 2) * math.log(4) / math.sqrt(3)
    assert grade["relative variance"] == f"4 ({4 * math.exp(-half):.3g} to {4 * math.exp(half):.3g})"
    assert grade["cosine"] == "0.500 ± 0.248" and grade["squared bias"].startswith("0.100 ±")
    assert grade["seconds"].startswith("1.500 ±")
    assert grade["seconds x variance"].startswith("5.04 (")  # the cube root of 2 * 2 * 32
    assert ppo["squared bias"] == "–" and ppo["relative variance"] == "8 (8 to 8)" and ppo["tokens"] == "700.0 ± 0.0"


def test_files_of_no_run_are_in_the_table_of_files_alone(tmp_path):
    plant(tmp_path, {"grade 2": row(2.0, 1.0, "open")}, toy={"ste 1": row(3.0)})
    policies = measured_policies(tmp_path)
    assert seed_rows(policies) == [] and [line[1:5] for line in file_rows(policies)] == [
        ["–", "1.5", "policy", "grade 2"], ["–", "–", "toy", "ste 1"]]  # fmt: skip
    text = "\n".join(variance_text(policies, []))
    assert "1 to open" in text and "Over seeds" not in text and "variance.png" not in text and variance_text([], []) == []


def test_the_picture_has_a_row_an_estimator_and_a_point_a_policy(tmp_path):
    plant_seeds(tmp_path, {"grade 2": 1.0, "reinforce": 8.0}, noise=0.1)
    plant(tmp_path, {"grade 2": 1.0, "reinforce": row("not resolved"), "ste 1": 2.0}, seed=1, checkpoint=80)
    axes = figures.variance(measured_policies(tmp_path)).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["grade 2", "reinforce", "ste 1"] and len(axes) == 3
    dots = [[line for line in axis.lines if line.get_marker() == "o"] for axis in axes]
    assert [sum(dot.get_markersize() < 5 for dot in of) for of in dots] == [12, 13, 13]  # one not resolved
    means = [dot.get_xdata()[0] for dot in dots[0] if dot.get_markersize() > 5]
    centre = math.prod(SCATTER.values()) ** 0.2
    moved = math.exp(-math.log(SCATTER[1] * math.exp(0.1 * math.cos(2 * math.pi / 5))) / 2 / 5)  # seed 1 was also measured at 1
    assert means == pytest.approx([centre * moved, 8 * centre])
    assert axes[0].get_xscale() == "log" and [text.get_text() for text in axes[0].texts] == ["1 not resolved"]
    assert figures.variance([]) is None


# ------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("change, message", [
    ({"flags": {"batch_size": 64}}, "batch_size 64 in variance/seed=1_40, batch_size 16 in variance/seed=2_40: keep"),
    ({"rows": {"ppo": {"ratio": 1.0}}}, "row ppo lacks cosine, cosine_half, high, low, seconds, tokens"),
    ({"rows": {"ppo": row(-1.0)}}, "row ppo has a relative variance of -1.0"),
])  # fmt: skip
def test_files_that_cannot_be_compared_are_refused(tmp_path, change, message):
    plant(tmp_path, {"ppo": 1.0}, seed=2)
    plant(tmp_path, {"ppo": 1.0}, seed=1, **change) if "rows" not in change else plant(tmp_path, change["rows"], seed=1)
    with pytest.raises(ValueError, match=message):
        measured_policies(tmp_path)


def test_other_random_numbers_are_no_other_setting_and_broken_json_is_named(tmp_path):
    plant(tmp_path, {"ppo": 1.0}, seed=2, flags={"seed": 1})
    plant(tmp_path, {"ppo": 1.0}, seed=1, flags={"seed": 2})
    plant(tmp_path, {"ppo": 1.0}, flags={"batch_size": 64})  # of no run: it is in no mean
    assert len(measured_policies(tmp_path)) == 3
    (tmp_path / "variance" / "seed=1_40" / "variance.json").write_text("{")
    with pytest.raises(ValueError, match="seed=1_40/variance.json: no JSON"):
        measured_policies(tmp_path)
