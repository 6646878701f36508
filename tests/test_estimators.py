"""train_reinforce.py, train_gumbel.py and train_ppo.py --env sentiment end to end: phases, files, one test, resumption."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import corpus
import estimators
import plans
import train_gumbel
import train_ppo
import train_reinforce
from reward_model import FILE, load_reward_model
from sentiment_env import Sentiment

SMALL = ["--max_steps", "3", "--batch_size", "4", "--micro_batch_size", "2", "--max_new_tokens", "10", "--min_new_tokens", "3",
         "--validation_prompts", "4", "--test_prompts", "6", "--validate_every", "2", "--logging_steps", "1", "--save_steps", "2",
         "--lora_config", "r2", "--reward_steps", "5", "--device", "cpu", "--lr", "1e-2"]  # fmt: skip
SCRIPTS = {
    "reinforce": (train_reinforce, []), "ppo": (train_ppo, ["--env", "sentiment"]), "grade": (train_gumbel, []),
    "grade_ste": (train_gumbel, ["--estimator", "ste"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A small dataset in IMDB's layout."""
    folder = tmp_path_factory.mktemp("reviews")
    for split, n in (("train", 340), ("test", 30)):
        rows = [{"text": r.text, "label": r.labels["sentiment"]} for r in corpus.generate("reviews", split, n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def run(method, reviews, root, *flags):
    script, own = SCRIPTS[method]
    assert script.main([*own, *SMALL, "--dataset", reviews, "--results_dir", str(root), *flags]) == 0
    return json.loads((root / method / "results.json").read_text())


@pytest.fixture(scope="module")
def root(reviews, tmp_path_factory):
    """All four methods beside each other."""
    folder = tmp_path_factory.mktemp("results")
    for method in SCRIPTS:
        run(method, reviews, folder)
    return folder


@pytest.mark.parametrize("method", SCRIPTS)
def test_results_are_whole_and_agree_with_each_other(root, method):
    results = json.loads((root / method / "results.json").read_text())
    assert results["method"] == method and results["seed"] == 42 and results["config"]["max_steps"] == 3
    steps, validation, test = results["steps"], results["validation"], results["test"]
    assert [row["step"] for row in steps] == [1, 2, 3] and [row["prompts"] for row in steps] == [4, 8, 12]
    assert all(12 <= b["tokens"] - a["tokens"] <= 40 for a, b in zip([{"tokens": 0}, *steps], steps))
    assert all(row[key] is not None for row in steps for key in ("reward", "loss", "kl", "grad_norm_mean", "grad_norm_std"))
    assert all(row["kl"] > 0 for row in steps) and steps[0]["grad_norm_mean"] > 0
    assert all((row["tau"] is not None) == (row["soft_reward"] is not None) == method.startswith("grade") for row in steps)
    assert [row["seconds"] for row in steps] == sorted(row["seconds"] for row in steps)
    assert [row["step"] for row in validation] == [0, 2, 3] and results["untrained"] == validation[0]
    assert validation[0]["val_kl"] > 0 and all(0 < row["val_reward"] < 1 for row in validation)
    seen = [row["val_reward"] for row in validation]
    assert [row["best_val_reward"] for row in validation] == [max(seen[: i + 1]) for i in range(3)]
    assert test["best"]["step"] == validation[seen.index(max(seen))]["step"] and results["test_reward"] == test["last"]["reward"]
    assert set(test) == {"untrained", "last", "best"} and all(row["n"] == 6 and row["std"] > 0 for row in test.values())
    assert 0 < test["untrained"]["kl"] != test["last"]["kl"]
    verdict = json.loads((root / method / "verdict.json").read_text())
    assert {mode: row["reward"] for mode, row in verdict["modes"].items()} == {mode: row["reward"] for mode, row in test.items()}
    logged = [json.loads(line) for line in (root / method / "metrics.jsonl").read_text().splitlines()]
    assert all(row["kl"] == row.get("kl_completion", row["kl"]) for row in logged if "kl" in row), "PPO's own is a token's"
    assert logged[-1] == {"step": 3} | {f"test_reward/{mode}": row["reward"] for mode, row in sorted(test.items())}


def test_the_best_and_the_last_checkpoint_are_kept(root):
    for method in SCRIPTS:
        best, last = (load_file(root / method / "model" / f"{name}.safetensors") for name in ("best", "adapter"))
        assert best.keys() == last.keys() and (root / method / "model" / "peft" / "adapter").is_dir()
        step = json.loads((root / method / "results.json").read_text())["test"]["best"]["step"]
        zero = all(not t.any() for name, t in best.items() if name.endswith(".B"))
        assert zero == (step == 0) and all(torch.equal(best[name], last[name]) for name in best) == (step == 3)


def test_methods_are_compared_on_one_judge_and_the_same_prompts(root, reviews):
    comparison = json.loads((root / "comparison.json").read_text())
    assert set(comparison) == set(SCRIPTS) and len({row["test"]["untrained"]["reward"] for row in comparison.values()}) == 1
    assert {row["prompts"] for row in comparison.values()} == {12} and len({row["method"] for row in comparison.values()}) == 4
    judge = load_reward_model(root)
    assert judge.about.max_tokens == 42 and judge.figures["settings"]["dataset"] == reviews
    before = (root / FILE).read_bytes()
    with pytest.raises(ValueError, match="trained with max_steps 5, now 6: choose another --results_dir"):
        train_reinforce.main([*SMALL, "--dataset", reviews, "--output_dir", str(root / "x"), "--reward_steps", "6"])
    assert (root / FILE).read_bytes() == before and not (root / "x").exists()
    flags = [*SMALL, "--dataset", reviews, "--output_dir", str(root / "again"), "--reward_model", str(root)]
    at = flags.index("--reward_steps")
    assert train_reinforce.main(flags[:at] + flags[at + 2 :]) == 0
    once, again = (json.loads((root / name / "results.json").read_text())["test"] for name in ("reinforce", "again"))
    assert once == again


def test_test_data_is_touched_once_and_at_the_end(reviews, tmp_path, monkeypatch):
    asked, scored = [], []
    prompts, score = Sentiment.prompts, Sentiment.score
    monkeypatch.setattr(Sentiment, "prompts", lambda self, split: asked.append((split, len(scored))) or prompts(self, split))
    monkeypatch.setattr(Sentiment, "score", lambda self, ps, *a, **k: scored.extend(ps) or score(self, ps, *a, **k))
    run("reinforce", reviews, tmp_path)
    monkeypatch.undo()
    splits = [split for split, _ in asked]
    assert splits.count("test") == 1 and splits[-1] == "test"
    before = asked[-1][1]
    assert before == 3 * 4 + 3 * 4, "three steps and three validations of four"
    judge = load_reward_model(tmp_path)
    flags = {"dataset": reviews, "train_split": "train", "eval_split": "test", "max_prompts": 10_000, "validation_prompts": 4,
             "test_prompts": 6, "prompt_tokens": 32, "max_new_tokens": 10}  # fmt: skip
    tested = estimators.sentiment(flags, judge.tokenizer, judge).prompts("test")
    assert scored[before:] == tested * 3 and not set(scored[:before]) & set(tested), "untrained, last, best; and nowhere before"


@pytest.mark.parametrize("method", ["reinforce", "ppo", "grade"])
def test_a_killed_and_resumed_run_ends_bitwise_like_an_unbroken_one(root, reviews, tmp_path, monkeypatch, method):
    trainer = {"reinforce": "rl_reinforce", "ppo": "rl_ppo", "grade": "rl_gumbel"}[method]
    trainer = __import__(trainer).Trainer
    step, dying = trainer.step, [1, 2]

    def mortal(self):
        if dying and self.steps_done == dying[0]:  # before the first checkpoint, and behind it
            dying.pop(0)
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(trainer, "step", mortal)
    (tmp_path / FILE).write_bytes((root / FILE).read_bytes())
    for resume in ([], ["--resume"]):
        with pytest.raises(KeyboardInterrupt):
            run(method, reviews, tmp_path, *resume)
    run(method, reviews, tmp_path, "--resume")
    for name in ("metrics.jsonl", "model/adapter.safetensors", "model/best.safetensors"):
        assert (root / method / name).read_bytes() == (tmp_path / method / name).read_bytes(), name
    rows = [json.loads((folder / method / "results.json").read_text()) for folder in (root, tmp_path)]
    assert rows[0]["test"] == rows[1]["test"] and rows[0]["validation"] == rows[1]["validation"]
    assert all({**a, "seconds": 0} == {**b, "seconds": 0} for a, b in zip(rows[0]["steps"], rows[1]["steps"], strict=True))


def test_routing_by_sample_adds_its_modes(reviews, tmp_path):
    results = run("reinforce", reviews, tmp_path, "--routing", "dual", "--bad_scale", "0", "--false_positive_frac", "0.5")
    assert set(results["test"]) == {"untrained", "last", "retain_only", "forget_only", "deployed", "best"}


# ----------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("method", SCRIPTS)
def test_the_defaults_are_the_experiments(method):
    script, own = SCRIPTS[method]
    folder, config = script.resolve(own)
    assert folder == Path("results") / method
    want = {"batch_size": 16, "micro_batch_size": 4, "max_steps": 2000, "lr": 1e-4, "max_grad_norm": 1.0, "seed": 42, "beta": 0.1,
            "max_new_tokens": 48, "min_new_tokens": 16, "top_p": 0.9, "prompt_tokens": 32, "validate_every": 100,
            "validation_prompts": 100, "test_prompts": 500, "max_prompts": 10_000, "lora_config": "r8", "lora_alpha": 32,
            "lora_dropout": 0.05}  # fmt: skip
    want |= {"ppo": {"gamma": 0.99, "gae_lambda": 0.95, "num_epochs": 4, "epsilon": 0.2, "value_coef": 0.5, "entropy_coef": 0.01},
             "reinforce": {"baseline": "ema", "baseline_momentum": 0.9}}.get(  # fmt: skip
                 method, {"tau_start": 2.0, "tau_end": 0.5, "tau_steps": 1000})  # fmt: skip
    assert {name: config[name] for name in want} == want
    assert script.resolve([*own, "--batch_size", "8"])[1]["batch_size"] == 8, "the command line wins"
    assert script.resolve([*own, "--lora_dropout", "0"])[1]["lora_dropout"] == 0
    full = script.resolve([*own, "--lora_config", "full"])[1]
    assert full["lora_alpha"] == full["lora_dropout"] == 0, "what is no LoRA has neither"


def test_ppo_goes_the_estimators_way_with_env_sentiment_alone(tmp_path):
    (tmp_path / "c.yaml").write_text("env: sentiment\nmax_steps: 7\n")
    assert train_ppo.resolve(["--config", str(tmp_path / "c.yaml")])[1]["method"] == "ppo"
    assert train_ppo.resolve(["--config", str(tmp_path / "c.yaml")])[1]["max_steps"] == 7
    _, config = train_ppo.resolve(["--env", "preferences"])
    assert "method" not in config and config["gamma"] == 1.0 and config["ssl_steps"] == 200


@pytest.mark.parametrize("flags, said", [
    (["--env", "stories"], "known here: sentiment"), (["--reward_model", "nowhere"], "train_reward.py makes one"),
    (["--test_prompts", "0"], "--test_prompts must be at least 1"), (["--routing_frac", "0.5"], "only --routing dual"),
    (["--bad_scale", "0"], "--bad_scale"), (["--save_steps", "-1"], "--save_steps"), (["--lora_config", "r"], "r"),
    (["--dataset", "x", "--eval_split", "train"], "training split too"), (["--prompt_tokens", "505"], "the model's context"),
    (["--test_prompts", "31"], "--test_prompts 31: there are"),
])  # fmt: skip
def test_what_is_refused_before_there_is_a_run(reviews, tmp_path, flags, said):
    with pytest.raises(ValueError, match=said):
        train_reinforce.main([*SMALL, "--dataset", reviews, "--output_dir", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_judged_again(root):
    import verdict

    with pytest.raises(ValueError, match="touched once"):
        verdict.judged_as({"env": "sentiment"}, None, 8)


def test_the_experiment_is_planned_with_equal_budgets():
    file = plans.read_experiment(Path(train_ppo.__file__).parent / "configs" / "estimators.yaml")
    _, planned = plans.plan(file)
    methods, budgets = {}, set()
    budget = ("max_steps", "batch_size", "max_new_tokens", "min_new_tokens", "top_p", "beta", "lr", "lora_config",
              "prompt_tokens", "max_prompts", "test_prompts", "reward_steps", "dataset")  # fmt: skip
    for item in planned:
        methods.setdefault((item.arm, item.config["method"]), set()).add(item.config["seed"])
        assert item.judge is None and item.report.name == "verdict.json"
        budgets.add(tuple(item.config[name] for name in budget))
    assert len(budgets) == 1, "arms differ in the method alone"
    assert {arm: len(methods[arm, arm]) for arm in SCRIPTS} == dict.fromkeys(SCRIPTS, 5)
    assert {arm for arm, method in methods if arm != method} == {"tau_constant_0.5", "tau_constant_2", "tau_slower"}
