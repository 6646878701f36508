"""fronts.py: which points no other beats, and what the table says of planted runs."""
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import analyze
from experiments import Run
from fronts import COST, GAIN, front, price_plane, price_table


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
    assert rows[0][2].startswith("0.300 ± ") and rows[0][3].startswith("0.200 ± ") and len(heads) == len(rows[0])
    assert [row[4] for row in rows] == ["1.50", "1.00", "–"], "a cost below 0 has no efficiency"
    axis = price_plane(runs, analyze.PALETTE).axes[0]
    labels = axis.get_legend_handles_labels()[1]
    assert labels == ["a", "b", "before"]
    drawn = {line.get_label(): line.get_xydata() for line in axis.lines}
    assert drawn["a"] == pytest.approx(np.array([(0.2, 0.3), (0.5, 0.5)]))


def test_runs_without_a_price_have_no_plane():
    runs = [Run("a", {}, 1, Path("a"), {}, {"both": {"task": 1.0}}, [], "")]
    assert price_plane(runs, analyze.PALETTE) is None and price_table(runs)[1] == []


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
    assert "## What the reward costs" in text and "1.50" in text and "price.png" in text
    assert (tmp_path / "x" / "analysis" / "price.png").is_file()
