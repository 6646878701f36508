"""fronts.py: which points no other beats, and what the table says of planted runs."""
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

import analyze
from experiments import Run
from fronts import COST, GAIN, cost_at, equal_gain_table, front, joint_front, price_paths, price_plane, price_table

COLOURS = {"a": "#0072B2", "b": "#D55E00"}


def test_a_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    for _ in range(30):
        points = [tuple(map(float, p)) for p in rng.integers(0, 6, size=(8, 2))]
        beaten = {p for p, q in itertools.permutations(points, 2) if p != q and q[0] <= p[0] and q[1] >= p[1]}
        assert front(points) == sorted(set(points) - beaten)


def planted(prices: dict[str, list[tuple[float, float]]]) -> list[Run]:
    return [
        Run(label.split(",")[0], {"beta": label.split()[-1]}, seed, Path(f"{label}{seed}"), {},
            {"both": {COST: cost, GAIN: gain}}, [], "")
        for label, points in prices.items() for seed, (cost, gain) in enumerate(points)
    ]  # fmt: skip


def test_the_table_and_the_plane_of_planted_runs():
    runs = planted({"a, beta 0.1": [(0.1, 0.2), (0.3, 0.4), (0.2, 0.3)], "a, beta 0": [(0.5, 0.5)], "b, beta 0": [(-0.1, 0.2)]})
    heads, rows = price_table(runs)
    assert [row[0] for row in rows] == ["a, beta 0.1", "a, beta 0", "b, beta 0"] and [row[1] for row in rows] == ["3", "1", "1"]
    assert rows[0][2].startswith("0.300 ± ") and rows[0][3].startswith("0.197 (") and len(heads) == len(rows[0])
    low, high = (float(word) for word in rows[0][3].split("(")[1].rstrip(")").split(" to "))
    assert -0.05 < low < 0.0 < 0.4 < high < 0.5, "1.197 over and times 1.23"
    assert [row[4] for row in rows] == ["1.52", "1.00", "–"], "a cost below 0 has no efficiency"
    assert joint_front(runs) == ["b, beta 0", "a, beta 0.1", "a, beta 0"]
    beaten = planted({"a, beta 0": [(0.5, 0.5)], "b, beta 0": [(0.4, 0.6)], "c, beta 0": [(0.1, 0.1)]})
    assert joint_front(beaten) == ["c, beta 0", "b, beta 0"]
    axis = price_plane(runs, COLOURS).axes[0]
    labels = axis.get_legend_handles_labels()[1]
    assert labels == ["a", "b", "before"]
    drawn = {line.get_label(): line.get_xydata() for line in axis.lines}
    middle = np.expm1(np.log1p([0.1, 0.3, 0.2]).mean())
    assert drawn["a"] == pytest.approx(np.array([(middle, 0.3), (0.5, 0.5)]))
    grey = price_plane(runs, {"a": "#0072B2"}).axes[0]
    assert grey.get_legend_handles_labels()[1] == ["a", "before"]
    assert "b, beta 0" in [text.get_text() for text in grey.texts], "an arm without a colour is called by its whole name"


def test_the_cost_of_a_gain_is_read_off_the_path():
    points = [(0.0, 0.0), (0.5, 1.0), (0.2, 0.8), (3.0, 2.0)]
    assert cost_at(points, 1.0) == pytest.approx(0.5) and cost_at(points, 2.0) == pytest.approx(3.0)
    assert cost_at(points, 0.5) == pytest.approx(math.sqrt(1.5) - 1), "halfway in log(1 + cost)"
    assert cost_at(points, 1.4) == pytest.approx(math.sqrt(1.2 * 4) - 1) and math.isnan(cost_at(points, 2.1))


def test_equal_gains_and_paths_of_planted_runs():
    def run(arm, seed, points):
        lines = [{"step": i, f"both/{COST}": cost, f"both/{GAIN}": gain} for i, (cost, gain) in enumerate(points, 1)]
        return Run(arm, {}, seed, Path(f"{arm}{seed}"), {}, {"both": {COST: points[-1][0], GAIN: points[-1][1]}}, lines, "")

    runs = [run("a", 1, [(0.1, 0.5), (0.5, 1.0)]), run("a", 2, [(0.3, 0.5), (0.5, 1.0)]), run("b", 1, [(0.0, 0.25), (0.0, 0.6)]),
            run("b", 2, [(0.0, 0.1), (0.1, 0.4)])]  # fmt: skip
    heads, rows = equal_gain_table(runs)
    assert heads[2:] == ["at gain 0.25", "at gain 0.50", "at gain 0.75", "at gain 1.00"]
    assert rows[0][3].startswith("0.196 (") and rows[0][5].startswith("0.5 (")
    assert rows[1][3].endswith("(1 of 2)") and rows[1][4:] == ["never (0 of 2)"] * 2
    axes = price_paths(runs, COLOURS).axes
    own = {line.get_label(): line.get_xydata() for line in axes[0].lines}
    first = np.expm1(np.log1p([0.1, 0.3]).mean())
    assert own["a"] == pytest.approx(np.array([(0, 0), (first, 0.5), (0.5, 1.0)]))
    assert [axis.get_title() for axis in axes] == ["a", "b"]


def test_runs_without_a_price_have_no_plane():
    assert price_paths([], COLOURS) is None and equal_gain_table([])[1] == []
    runs = [Run("a", {}, 1, Path("a"), {}, {"both": {"task": 1.0}}, [], "")]
    assert price_plane(runs, COLOURS) is None and price_table(runs)[1] == []


def test_the_report_has_it(tmp_path):
    entries = []
    for seed in (1, 2, 3):
        folder = tmp_path / "x" / f"a_s{seed}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"seed: {seed}\nbeta: 0.1\n")
        rows = {"untrained": {"reward": 0.1, "task": 0.1}, "both": {"reward": 0.4, "task": 0.4, COST: 0.1 * seed, GAIN: 0.3}}
        (folder / "verdict.json").write_text(json.dumps({"modes": rows, "wall_s": 1.0, "steps": 2}))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "lr": 1, "reward": 0.2}) + "\n")
        flags = {"seed": seed, "beta": 0.1}
        entries.append({"arm": "a", "swept": {}, "flags": flags, "folder": folder.name, "status": "done"})
    (tmp_path / "x" / "runs.json").write_text(json.dumps(entries))
    analyze.main(analyze.Args(str(tmp_path / "x"), measures="reward,task"))
    text = (tmp_path / "x" / "analysis" / "report.md").read_text()
    assert "## What the reward costs" in text and "On the front of all, by their means: a." in text
    assert "1.52" in text and "price.png" in text
    assert (tmp_path / "x" / "analysis" / "price.png").is_file()
