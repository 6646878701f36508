"""throughput.py counts steps of real runs in a window; how many a second is the machine's matter."""

import pytest

import throughput
from throughput import Args, main, measure, steps_of

SMALL = ("batch_size=4", "num_generations=2", "max_new_tokens=4", "lora_config=r1")


def test_steps_are_counted_in_the_window_and_the_runs_are_gone_after_it(tmp_path, monkeypatch):
    started, popen = [], throughput.subprocess.Popen
    monkeypatch.setattr(throughput.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    row = measure(2, Args(seconds=1.0, warmup=2, device="cpu", train_flags=SMALL), tmp_path)
    written = [steps_of(tmp_path / f"2_{i}") for i in range(2)]
    assert min(written) >= 2 and row["runs"] == 2
    assert 0 < row["steps_per_s"] <= sum(written) - 4 + 2  # about a second, and none of the warm-up's
    assert all(process.returncode is not None for process in started)


def test_a_run_that_fails_is_quoted(tmp_path):
    with pytest.raises(RuntimeError, match="status 2: error: .*nope"):
        measure(1, Args(device="cpu", train_flags=("reward=nope",)), tmp_path)


@pytest.mark.parametrize("flags", [{"runs": "0"}, {"seconds": 0.0}, {"train_flags": ("beta",)}])
def test_wrong_flags_are_refused(flags):
    with pytest.raises(ValueError, match="above 0|write flag=value"):
        main(Args(**flags))
