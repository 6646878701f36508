"""Run folders: names, config, logs that repeat bit for bit, a kill at any moment, Ctrl-C."""

import json
import os
import random
import signal
import string
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from checkpoints import complete_checkpoints, latest_checkpoint, load_checkpoint, restore_rng, rng_state
from runs import Run, interruptible, read_config, read_metrics, run_name

CONFIG = {"reward": "happy", "routing": "dual", "adapter": "dual_lora", "lr": 1e-3, "beta": 0.02, "steps": 10, "clip": True,
          "betas": (0.9, 0.999), "top_p": None, "resume": False, "output_dir": "output", "seed": 0}


# ---------------------------------------------------------------- names

def test_run_name_says_what_differs():
    assert run_name(CONFIG, CONFIG) == "happy_dual_dual_lora_lr1e-3_b0.02_s0"
    changed = CONFIG | {"steps": 2000, "clip": False, "top_p": 0.9, "seed": 3, "output_dir": "elsewhere", "resume": True}
    assert run_name(changed, CONFIG) == "happy_dual_dual_lora_lr1e-3_b0.02_steps2000_no_clip_top_p0.9_s3"
    assert run_name({"lr": 2.5e-4, "seed": 1}, {}) == "lr2.5e-4_s1"  # a train script without reward or routing
    assert run_name({"model": "some/where/stories3M"}, {}).startswith("modelstories3M-")


@pytest.mark.parametrize("value, name", [(1e-3, "1e-3"), (0.02, "0.02"), (1e-5, "1e-5"), (2.5e-4, "2.5e-4"), (1.0, "1"),
                                         (0.0, "0"), (-0.5, "-0.5"), (1e6, "1e6"), (1234567.0, "1.234567e6"),
                                         (100.0, "100"), (float("inf"), "inf")])
def test_numbers_are_short(value, name):
    assert run_name({"lr": value}, {}, lead=("lr",)) == "lr" + name


def test_run_names_are_distinct_safe_and_short():
    generator = random.Random(0)
    seen = {}
    for _ in range(3000):
        config = CONFIG | {"lr": generator.choice([1e-3, 0.00100000000000001, 1e-5, 1.0, 3]), "steps": generator.randrange(20),
                           "clip": generator.random() < .5, "top_p": generator.choice([None, 0.9, 0.95]),
                           "model": generator.choice(["a/b", "c/b", "b", "a b", "a-b", "", "ü", "x" * 300, "../x", "stories3M"]),
                           "layers": generator.choice([(), (1, 2), (12,)]), "seed": generator.randrange(3)}
        name = run_name(config, CONFIG)
        assert set(name) <= set(string.ascii_letters + string.digits + "._+=-") and len(name) <= 200, name
        key = repr({k: v for k, v in config.items() if k not in ("output_dir", "resume")})
        assert seen.setdefault(name, key) == key, name
    assert len(seen) > 2000


# ---------------------------------------------------------------- config

def test_config_round_trips_exactly(tmp_path):
    config = CONFIG | {"numbers": [1e-5, 1e22, -0.0, 0.1 + 0.2, float("inf"), 5e-324, 3, True, None],
                       "text": ["1e-5", "yes", "null", "", " a: b #c\n", "é😀", "0x1f"],
                       "nested": {"a": {"b": (1, (2, [3]))}},
                       "empty": [(), [], {}]}
    with Run.open(tmp_path / "run", config, tensorboard=False):
        pass
    assert repr(read_config(tmp_path / "run")) == repr(json.loads(json.dumps(config)))  # tuples come back as lists
    provenance = yaml.safe_load((tmp_path / "run/provenance.yaml").read_text())
    assert provenance[0]["torch"] == str(torch.__version__) and provenance[0]["command"]


def test_config_of_other_things_is_refused(tmp_path):
    with pytest.raises(ValueError, match="YAML"):
        Run.open(tmp_path / "run", {"device": torch.device("cpu")})
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="not a run folder"):
        read_config(tmp_path)


def test_used_folder_is_refused_with_remedies(tmp_path):
    Run.open(tmp_path / "run", CONFIG, tensorboard=False).close()
    with pytest.raises(ValueError, match=r"run already holds a run.*--resume.*--output_dir.*delete"):
        Run.open(tmp_path / "run", CONFIG, tensorboard=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a run folder"):
        Run.open(tmp_path / "other", CONFIG, resume=True, tensorboard=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml.77.tmp").write_text("left by a kill")
    Run.open(tmp_path / "empty", CONFIG, tensorboard=False).close()
    assert not list((tmp_path / "empty").glob("*.tmp"))


def test_resume_lists_every_difference(tmp_path):
    Run.open(tmp_path / "run", CONFIG | {"spec": {"rank": 8, "alpha": 1.0}, "gone": 1}, tensorboard=False).close()
    other = CONFIG | {"spec": {"rank": 16, "alpha": 1}, "lr": 1e-4, "new": "x", "resume": True, "betas": [0.9, 0.999]}
    with pytest.raises(ValueError) as error:
        Run.open(tmp_path / "run", other, resume=True, tensorboard=False)
    assert "\n" not in str(error.value)
    parts = str(error.value).split("other flags: ")[1].split(". Give")[0].split("; ")
    assert sorted(parts) == ["gone: 1 in the folder, (absent) now", "lr: 0.001 in the folder, 0.0001 now",
                             "new: (absent) in the folder, 'x' now",
                             "spec: {'rank': 8, 'alpha': 1.0} in the folder, {'rank': 16, 'alpha': 1} now"]


def test_resume_allows_named_fields_and_keeps_the_new_value(tmp_path):
    Run.open(tmp_path / "run", CONFIG, tensorboard=False).close()
    Run.open(tmp_path / "run", CONFIG | {"steps": 20}, resume=True, allow={"steps"}, tensorboard=False).close()
    assert read_config(tmp_path / "run")["steps"] == 20
    assert len(yaml.safe_load((tmp_path / "run/provenance.yaml").read_text())) == 2


def test_resume_without_checkpoint_starts_anew_and_says_so(tmp_path, capsys):
    with Run.open(tmp_path / "run", CONFIG, tensorboard=False) as run:
        run.log(1, {"loss": 1.0})
    with Run.open(tmp_path / "run", CONFIG | {"resume": True}, resume=True, tensorboard=False) as run:
        assert run.checkpoint is None and run.step == 0
        run.log(1, {"loss": 2.0})
    assert "starting at step 0" in capsys.readouterr().out
    assert read_metrics(tmp_path / "run") == [{"step": 1, "loss": 2.0}]


# ---------------------------------------------------------------- logs

def test_log_lines(tmp_path, capsys):
    with Run.open(tmp_path / "run", CONFIG, tensorboard=False) as run:
        run.log(1, {"reward": torch.tensor(0.1), "kl": np.float64(0.1) + 0.2, "n": np.int64(3), "done": True, "time/step": 0.25})
        run.log(1, {"eval/reward": 1e-17})
        run.print("hello", 3)
        run.sample(1, "a\nb\r\nc")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "done": true, "kl": 0.30000000000000004, "n": 3, "reward": 0.10000000149011612}',
                     '{"step": 1, "eval/reward": 1e-17}']
    assert read_metrics(tmp_path / "run", "timings.jsonl") == [{"step": 1, "time/step": 0.25}]
    assert (tmp_path / "run/train.log").read_text() == "hello 3\n[Sample @ 1] a\\nb\\r\\nc\n" == capsys.readouterr().out


@pytest.mark.parametrize("value, message", [(float("nan"), "'loss' at step 7 is nan"),
                                            (torch.tensor(float("inf")), "'loss' at step 7 is inf"),
                                            (torch.zeros(2), r"'loss' at step 7 has shape \(2,\)"),
                                            ("x", "'loss' at step 7 is 'x'"),
                                            (None, "'loss' at step 7 is None")])
def test_what_is_no_finite_number_is_refused(tmp_path, value, message):
    with Run.open(tmp_path / "run", CONFIG, tensorboard=False) as run:
        with pytest.raises(ValueError, match=message):
            run.log(7, {"kl": 0.0, "loss": value})
        run.log(8, {"kl": 0.0})
        with pytest.raises(ValueError, match="steps never go back"):
            run.log(7, {"kl": 0.0})
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [8]


def test_tensorboard_has_the_scalars_and_is_purged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = Run.open(tmp_path / "run", CONFIG)
    for step in (1, 2, 3):
        run.log(step, {"loss": step + 0.5})
        if step == 1:
            run.save_checkpoint(step, {}, None)
    run.sample(3, "once upon a time")
    run.close()
    time.sleep(1.1)  # event files are ordered by the second of their name, then by a counter without leading zeros
    with Run.open(tmp_path / "run", CONFIG, resume=True) as run:
        run.log(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.5), (2, 20.0)]


# ---------------------------------------------------------------- checkpoints

def test_only_the_last_are_kept_and_order_is_numeric(tmp_path):
    with Run.open(tmp_path / "run", CONFIG, keep_last=2, tensorboard=False) as run:
        for step in (2, 9, 10, 100):
            run.save_checkpoint(step, {}, None)
        assert [p.name for p in complete_checkpoints(run.folder)] == ["checkpoint-10", "checkpoint-100"]
        (run.folder / "checkpoint-200").mkdir()  # no manifest: half-copied
        (run.folder / "checkpoint-300.new.tmp").mkdir()
        assert latest_checkpoint(run.folder).name == "checkpoint-100"


def test_a_replacement_that_was_cut_short_is_undone(tmp_path):
    with Run.open(tmp_path / "run", CONFIG, tensorboard=False) as run:
        path = run.save_checkpoint(4, {"w": torch.ones(2)}, None)
    os.rename(path, path.with_name("checkpoint-4.replaced.tmp"))
    with Run.open(tmp_path / "run", CONFIG, resume=True, tensorboard=False) as run:
        assert run.step == 4 and load_checkpoint(run.checkpoint)[0] == 4


def test_latest_checkpoint_loads_whenever_the_process_is_killed(tmp_path):
    """SIGKILL a child that does nothing but save, at random moments: what is there always loads and never goes back."""
    delays, last = random.Random(0), 0
    for _ in range(12):
        child = os.fork()
        if child == 0:  # no import, no test machinery: only the loop
            try:
                run = Run.open(tmp_path / "run", CONFIG, resume=True, tensorboard=False)
                for step in range(run.step + 1, 10**6):
                    run.log(step, {"loss": float(step)})
                    run.save_checkpoint(step, {"w": torch.full((2000,), step)},
                                        {"step": step, "moments": [torch.full((10,), step)]})
            finally:
                os._exit(1)
        before, deadline = last, time.time() + 20
        while time.time() < deadline:  # let it get somewhere, then strike in the midst of a write
            path = latest_checkpoint(tmp_path / "run")
            if path and int(path.name.split("-")[1]) >= before + 2:
                break
            time.sleep(0.002)
        time.sleep(delays.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step, tensors, state = load_checkpoint(latest_checkpoint(tmp_path / "run"))
        assert step >= before + 2 and step == state["step"]
        assert (tensors["w"] == step).all() and (state["moments"][0] == step).all()
        last = step
    Run.open(tmp_path / "run", CONFIG, resume=True, tensorboard=False).close()
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, last + 1))
    assert not list((tmp_path / "run").glob("*.tmp"))


# ---------------------------------------------------------------- a killed and resumed run ends bytewise equal

def train(folder, die_after=None, resume=False, steps=12):
    """A tiny loop with every kind of state: weights, moments, schedule, three random sources. Returns its weights."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    layer = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run = Run.open(folder, CONFIG, resume=resume, tensorboard=False)
    if run.checkpoint:
        _, tensors, state = load_checkpoint(run.checkpoint)
        layer.load_state_dict(tensors)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        restore_rng(state["rng"])
    for step in range(run.step + 1, steps + 1):
        x = torch.randn(8, 4) * np.random.rand() + random.random()
        loss = layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.log(step, {"loss": loss, "lr": schedule.get_last_lr()[0], "time/step": time.perf_counter()})
        if step % 5 == 0:
            run.log(step, {"eval": torch.rand((), generator=torch.Generator().manual_seed(9))})
            run.save_checkpoint(step, layer.state_dict(), {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                                                           "rng": rng_state()})
        if step == die_after:
            return None  # as a kill leaves it: nothing closed
    run.close()
    return layer.state_dict()


@pytest.mark.parametrize("die_after", [3, 5, 7, 9, 10, 12])
def test_resumed_run_equals_unbroken_run(tmp_path, die_after):
    whole = train(tmp_path / "whole")
    train(tmp_path / "broken", die_after=die_after)
    with open(tmp_path / "broken/metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # a line that the kill cut short
    if die_after > 5:
        assert len(read_metrics(tmp_path / "broken")) == die_after + die_after // 5
    resumed = train(tmp_path / "broken", resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert (tmp_path / "broken/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert len(read_metrics(tmp_path / "broken", "timings.jsonl")) == 12


def test_resume_refuses_logs_that_lost_lines(tmp_path):
    train(tmp_path / "run", die_after=7)
    (tmp_path / "run/metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl has 0 bytes.*edited or lost"):
        Run.open(tmp_path / "run", CONFIG, resume=True, tensorboard=False)


# ---------------------------------------------------------------- Ctrl-C

def test_first_interrupt_asks_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_command(tmp_path, monkeypatch):
    with Run.open(tmp_path / "run", CONFIG, tensorboard=False) as run:
        monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--reward", "two words"])
        assert run.resume_command() == "python train_grpo.py --reward 'two words' --resume"
        monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--resume"])
        assert run.resume_command() == "python train_grpo.py --resume"
