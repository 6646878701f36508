"""overhead.py: the arms it compares are equal but for what they are compared in, and it reports each."""
import json

import pytest

import overhead
from rl_ppo import LOSSES


def test_it_reports_each_arm_and_its_passes(capsys):
    flags = "--batch_size 4 --prompt_len 4 --max_new_tokens 4 --repeats 2 --warmup 0 --num_epochs 1 --num_minibatches 1"
    assert overhead.main(flags.split()) == 0
    printed = capsys.readouterr().out
    rows = {row["what"]: row for row in map(json.loads, filter(lambda line: line.startswith("{"), printed.splitlines()))}
    assert list(rows) == ["lora", "bundles", "ssl_rl_separate"] and rows["lora"]["to_lora"] == 1
    assert [row["backward_passes"] for row in rows.values()] == [1, 1, len(LOSSES)]
    assert rows["bundles"]["parameters"] == rows["ssl_rl_separate"]["parameters"]
    assert abs(rows["lora"]["parameters"] / rows["bundles"]["parameters"] - 1) < 0.02, "as many parameters"
    assert all(row["step_s"] >= row["rollout_s"] + row["update_s"] for row in rows.values())
    assert "| ssl_rl_separate |" in printed


def test_what_can_be_got_wrong_is_named():
    with pytest.raises(ValueError, match="--repeats 0"):
        overhead.main(["--repeats", "0"])
    with pytest.raises(ValueError, match="--device moon"):
        overhead.main(["--device", "moon"])
