"""train_reward.py: what it learns on the embedded world, what it reports, and that the fast way is the slow one."""
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import reward_training
import train_reward
from reward_data import Pair, Review
from reward_model import FILE, load_reward_model, new_reward_model
from reward_training import Settings, fit, judge, margins, read_examples

SMALL = ["--max_texts", "500", "--max_steps", "60", "--logging_steps", "20"]
QUESTION = "user: how do i cook rice?\nassistant:"
PAIRS = [
    Pair(QUESTION, " sure. keep the heat low.", " whatever."),
    Pair("user: any advice?\nassistant:", " gladly! start early.", " boring."),
    Pair(QUESTION, " good question. stir it often. good luck!", " you are hopeless. burn it a bit."),
]
REVIEWS = [Review("review: a superb film.", 1), Review("review: a poor film.", 0), Review("review: it was great.", 1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    assert train_reward.main([*SMALL, "--output_dir", str(folder)]) == 0
    return folder


def test_the_embedded_preferences_are_learned_and_reported(trained, tmp_path):
    verdict = json.loads((trained / "verdict.json").read_text())
    assert verdict["test"]["n"] == 512 and verdict["test"]["accuracy"] > 0.97 and verdict["test"]["loss"] < 0.1
    assert verdict["steps"] == 60 and 0 <= verdict["test"]["ece"] < 0.1
    model = load_reward_model(trained)
    assert model.figures == {name: verdict[name] for name in ("train", "test")} and model.about.kind == "preference"
    good, bad = (model.scores([p.prompt for p in PAIRS], list(texts)) for texts in zip(*(p[1:] for p in PAIRS)))
    assert (good > bad).all() and good.mean() > 0 > bad.mean()
    log = (trained / "train.log").read_text()
    assert "test: accuracy " in log and "confidence  accuracy\n" in log and "left out: " in log
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [20, 40, 60, 60] and steps[-1]["test/accuracy"] == verdict["test"]["accuracy"]
    assert train_reward.main([*SMALL, "--output_dir", str(tmp_path / "again")]) == 0
    for name in (FILE, "metrics.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes(), f"{name} does not repeat"
    with pytest.raises(ValueError, match="already holds a run: choose another --output_dir"):
        train_reward.main([*SMALL, "--output_dir", str(trained)])


@pytest.mark.parametrize("kind, texts", [("preference", PAIRS), ("sentiment", REVIEWS)])
def test_both_losses_are_the_softplus_of_a_margin(kind, texts):
    model = new_reward_model(kind, "tiny", seed=3)
    examples, left_out = read_examples(model, texts)
    pooled = model.pool_all(examples.rows)
    loss = F.softplus(-margins(model, pooled, examples.signs))
    out = model.head(pooled)
    if kind == "preference":
        want = -(out[0::2, 0] - out[1::2, 0]).sigmoid().log()
    else:
        want = F.cross_entropy(out, torch.tensor([review.label for review in texts]), reduction="none")
    assert left_out == 0 and loss.tolist() == pytest.approx(want.tolist(), abs=1e-6)


def test_training_on_kept_states_is_training_on_whole_forwards():
    settings, heads = Settings(max_steps=6, batch_size=2, logging_steps=100), []
    for kept in (True, False):
        model = new_reward_model("preference", "tiny", seed=3)
        examples, _ = read_examples(model, PAIRS)
        fit(lambda *a: None, model, examples, settings, model.pool_all(examples.rows) if kept else None)
        heads.append(torch.cat([p.detach().flatten() for p in model.head.parameters()]))
    fresh = torch.cat([p.detach().flatten() for p in new_reward_model("preference", "tiny", seed=3).head.parameters()])
    assert (heads[0] - heads[1]).abs().max() < 1e-5 < 1e-3 < (heads[0] - fresh).abs().max()


def test_a_branch_learns_and_the_backbone_does_not(tmp_path):
    assert train_reward.main(["--kind", "sentiment", "--lora_config", "r2", "--max_steps", "3", "--batch_size", "4",
                              "--max_tokens", "24", "--max_texts", "40", "--output_dir", str(tmp_path / "run")]) == 0  # fmt: skip
    model = load_reward_model(tmp_path / "run")  # whose backbone's hash is that of the file
    learned = [p for name, p in model.transformer.adapter.groups["adapter"].items() if name.endswith(".B")]
    assert learned and all(p.any() for p in learned), "B starts at zero"
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert verdict["train"]["n"] == 40 and verdict["validation"]["n"] == 2000 and "test" not in verdict


def test_accuracy_loss_and_calibration_by_hand():
    odds = torch.tensor([0.55, 0.58, 0.2, 0.97, 0.99, 0.01], dtype=torch.float64)  # given to the truth
    figures = judge(odds.logit(), bins=5)
    rows = [(row["from"], row["to"], row["n"], row["confidence"], row["accuracy"]) for row in figures["reliability"]]
    assert [v for row in rows for v in row] == pytest.approx(
        [0.5, 0.6, 2, 0.565, 1, 0.8, 0.9, 1, 0.8, 0, 0.9, 1, 3, (0.97 + 0.99 + 0.99) / 3, 2 / 3]
    )
    assert figures["n"] == 6 and figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["standard_error"] == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)
    assert figures["loss"] == pytest.approx(-odds.log().mean().item())
    assert figures["ece"] == pytest.approx((2 * 0.435 + 0.8 + 3 * (2.95 / 3 - 2 / 3)) / 6)
    sure = judge(torch.tensor([1e4, -1e4]), bins=10)
    assert sure["ece"] == 0.5 and sure["loss"] == pytest.approx(5e3)


def test_a_pair_whose_answer_exceeds_the_context_is_left_out():
    model = new_reward_model("preference", "tiny", max_tokens=32)
    long = Pair(QUESTION, " stir it." * 300, " no.")
    examples, left_out = read_examples(model, [PAIRS[0], long, PAIRS[1]])
    assert left_out == 1 and examples.signs.tolist() == [[1, -1], [1, -1]] and len(examples.rows) == 4
    assert examples.rows[2] == model.encode(PAIRS[1].prompt, PAIRS[1].chosen)


def test_hh_rlhf_on_another_model(data_dir, tmp_path):
    flags = ["--model", str(data_dir / "models" / "stories260K"), "--dataset", str(data_dir / "datasets" / "hh_harmless")]
    flags += ["--max_texts", "60", "--max_steps", "3", "--max_tokens", "64"]
    assert train_reward.main([*flags, "--output_dir", str(tmp_path / "r")]) == 0
    verdict = json.loads((tmp_path / "r" / "verdict.json").read_text())
    assert 50 < verdict["train"]["n"] <= 60 and 300 < verdict["test"]["n"] <= 311
    assert sum(row["n"] for row in verdict["test"]["reliability"]) == verdict["test"]["n"]
    assert all(a["to"] <= b["from"] + 1e-9 for a, b in pairwise(verdict["test"]["reliability"]))


@pytest.mark.parametrize("flags, said", [
    (["--kind", "joy"], "unknown --kind 'joy'"), (["--lora_config", "full"], "frozen, or has a LoRA"),
    (["--dataset", "x", "--eval_split", "train"], "is the training split too"), (["--lr", "-1"], "--lr must be at least 0"),
    (["--max_steps", "0"], "--max_steps must be at least 1"), (["--dtype", "half"], "unknown --dtype"),
    (["--device", "moon"], "--device moon"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_loaded(flags, said, monkeypatch):
    monkeypatch.setattr(reward_training, "new_reward_model", None)
    with pytest.raises(ValueError, match=said):
        train_reward.resolve(flags)
    folder, resolved = train_reward.resolve(["--kind", "sentiment", "--max_steps", "7", "--bins", "3"])
    assert str(folder) == "output/reward_model_sentiment_lr1e-3_max_steps7_s42" and resolved["max_steps"] == 7
