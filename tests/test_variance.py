"""variance.py: the algorithms' own steps, at a policy that does not move; their bias in the toy; the report."""
import json
import math

import pytest
import torch

import runs
import toy
import train_reinforce
import variance
from adapters import adapter_tensors
from checkpoints import load_checkpoint
from reward_model import new_reward_model, save_reward_model
from variance import Args, World, check, draw, measure, perturb

SMALL = {"draws": 16, "toy_draws": 16, "reference": 16, "groups": 8, "warm": 3, "batch_size": 8, "perturb": 0.3}


def world(**flags) -> World:
    model = toy.policy(1)
    perturb(model, 0.3, 1)
    shared = {"batch_size": 8, "beta": 0.1, "seed": 0, "max_new_tokens": 3, "top_p": 1.0, "min_new_tokens": 0} | flags
    return World(model, toy.Toy(), toy.TOKENIZER, shared, "a policy")


def test_a_row_for_each_estimator_and_each_tau_of_those_that_have_one():
    rows = check(Args(estimators="ste, ppo,grade", taus="2,0.5"))
    assert rows == [("ste 2", "ste", 2.0), ("ste 0.5", "ste", 0.5), ("ppo", "ppo", None), ("grade 2", "grade", 2.0),
                    ("grade 0.5", "grade", 0.5)]  # fmt: skip


@pytest.mark.parametrize("label, name, tau", check(Args()))
def test_draws_leave_the_policy_bitwise_as_it_is_and_repeat(label, name, tau):
    place, args = world(), Args(**SMALL)
    before = {key: value.clone() for key, value in adapter_tensors(place.model).items()}
    first, again = (draw(place, name, tau, 8, 1 + args.warm, args) for _ in range(2))
    assert all(torch.equal(value, before[key]) for key, value in adapter_tensors(place.model).items())
    assert torch.equal(first.moments.sums, again.moments.sums) and first.moments.count == 8
    other = draw(place, name, tau, 8, variance.REFERENCE_FROM, args)
    assert not torch.equal(first.moments.sums, other.moments.sums)
    assert first.moments.squares.min() > 0 and 8 < first.tokens <= 24 and first.seconds > 0 and first.kl > 0
    assert 0 < first.reward < 1


def test_every_estimator_has_a_steps_prompts_drawn_with_replacement(monkeypatch):
    asked = {}

    def noted(trainer, step, prompts):
        asked.setdefault(step, set()).add(tuple(prompts))
        return torch.ones(len(variance.flat_gradient(trainer.model))), dict.fromkeys(("length", "reward", "kl"), 1.0), 0.0

    monkeypatch.setattr(variance, "one_gradient", noted)
    for name in ("reinforce", "ppo", "reinforce_loo"):
        draw(world(), name, None, 8, 4, Args(**SMALL))
    assert sorted(asked) == list(range(1, 12))  # three to settle on, which leave-one-out needs none of, and eight
    assert all(len(batches) == 1 and len(prompts) == 8 for batches in asked.values() for prompts in batches)
    assert len({prompts for batches in asked.values() for prompts in batches}) == 11


def test_ppos_value_head_learns_while_it_settles_and_then_no_more(monkeypatch):
    heads, own = [], variance.one_gradient

    def watched(trainer, *rest):
        found = own(trainer, *rest)
        heads.append(trainer.value_head.weight.detach().clone())
        return found

    monkeypatch.setattr(variance, "one_gradient", watched)
    draw(world(), "ppo", None, 8, 4, Args(**SMALL))
    assert len(heads) == 11 and not torch.equal(heads[0], heads[2]) and heads[2].norm() > 0
    assert all(torch.equal(head, heads[2]) for head in heads[3:])


def test_in_the_toy_reinforce_is_unbiased_and_grade_is_not():
    """Bias as a share of the exact gradient's squared norm, with its 95% interval."""
    args = Args(toy_draws=64, groups=16, warm=3, estimators="grade,ste,reinforce_loo", taus="2")
    found = variance.measure_toy(check(args), args)["toy"]
    for label in ("grade 2", "ste 2"):
        assert found[label]["bias"] - found[label]["bias_half"] > 0.1
        assert found[label]["cosine"] + found[label]["cosine_half"] < 0.95
    unbiased = found["reinforce_loo"]
    assert abs(unbiased["bias"]) < 2 * unbiased["bias_half"] < 0.4
    assert abs(unbiased["cosine"] - 1) < 2 * unbiased["cosine_half"] < 0.2
    assert found["ste 2"]["ratio"] < unbiased["ratio"]


def test_an_estimator_against_the_reference_agrees_with_itself_and_is_reported(tmp_path, painted):
    args = Args(**SMALL | {"draws": 32, "reference": 32, "groups": 16, "batch_size": 16, "estimators": "reinforce_loo"})
    found = measure(world(batch_size=16), check(args), args)
    row, about = found["rows"]["reinforce_loo"], found["reference"]
    assert abs(row["cosine"] - 1) < 2 * row["cosine_half"] < 0.8
    assert row["cosine_of_means"] == pytest.approx(row["cosine"] * row["attenuation"])
    assert about["attenuation_by_halves"] == pytest.approx(about["attenuation"], abs=0.1)
    unresolved = {key: math.nan for key in ("ratio", "low", "high", "cosine", "cosine_half", "attenuation", "bias", "bias_half")}
    found["rows"] |= {"noise": row | unresolved, "open": row | {"high": math.inf}}
    found |= {"toy": found["rows"], "toy_beta": 0.1}
    text = variance.report(found, args)
    line = next(line for line in text.splitlines() if line.startswith("| noise"))
    assert line.count("not resolved") == 4 and "nan" not in text and ", open]" in text
    variance.draw_bars(found, tmp_path / "variance.png")
    assert (tmp_path / "variance.png").stat().st_size > 10_000
    kept = json.loads(json.dumps(variance.plain(found), allow_nan=False))
    assert kept["rows"]["noise"]["ratio"] == "not resolved" and kept["rows"]["open"]["high"] == "open"


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory):
    """A run of one step on embedded reviews, with an untrained judge."""
    root = tmp_path_factory.mktemp("results")
    save_reward_model(new_reward_model("sentiment", "tiny", max_tokens=40, seed=1), root / "judge.safetensors")
    words = ["--results_dir", str(root), "--reward_model", str(root / "judge.safetensors"), "--device", "cpu"]
    words += ["--max_prompts", "20", "--validation_prompts", "2", "--test_prompts", "2", "--lora_config", "r1"]
    words += ["--max_new_tokens", "4", "--min_new_tokens", "2", "--batch_size", "4", "--max_steps", "1"]
    assert train_reinforce.main(words) == 0
    return root / "reinforce", " ".join(f"{name[2:]}={value}" for name, value in zip(words[::2], words[1::2]))


def test_a_runs_policy_and_a_fresh_one_are_measured_from_the_command_line(judged_run, tmp_path, capsys):
    run, flags = judged_run
    small = {"draws": 4, "reference": 4, "groups": 4, "toy_draws": 0, "warm": 1, "batch_size": 4, "num_generations": 2}
    trained = variance.open_world(Args(run=str(run), device="cpu", **small))
    kept = load_checkpoint(run / "checkpoint-1")[1]
    assert all(torch.equal(value, kept[name]) for name, value in adapter_tensors(trained.model).items())
    assert runs.read_config(run)["lora_dropout"] > 0 == trained.model.adapter.spec.dropout, "or no gradient were unbiased"
    assert trained.flags == {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_new_tokens": 2, "max_new_tokens": 4, "beta": 0.1,
                             "batch_size": 4, "seed": 42}  # fmt: skip
    fresh = variance.open_world(Args(flags=flags, beta=0.3, device="cpu", **small))
    assert fresh.flags == trained.flags | {"beta": 0.3} and fresh.env.prompts("train") == trained.env.prompts("train")
    assert all(value.std() > 0.01 for value in adapter_tensors(fresh.model).values()) and not fresh.model.adapter.spec.dropout
    assert variance.main(Args(run=str(run), checkpoint=1, taus="1", device="cpu", output_dir=str(tmp_path), **small)) == 0
    found = json.loads((tmp_path / "variance.json").read_text())
    assert list(found["rows"]) == ["grade 1", "ste 1", "reinforce", "reinforce_loo", "ppo"] and "toy" not in found
    assert found["where"] == {"run": str(run), "method": "reinforce", "seed": 42, "checkpoint": 1, "kl": found["reference"]["kl"]}
    assert set(fresh.where) == set() and trained.where == {key: x for key, x in found["where"].items() if key != "kl"}
    assert found["policy"].endswith("checkpoint-1") and all(row["tokens"] <= 16 for row in found["rows"].values())
    assert (tmp_path / "variance.png").is_file() and (tmp_path / "report.md").read_text() in capsys.readouterr().out
    with pytest.raises(ValueError, match="checkpoint-7"):
        variance.open_world(Args(run=str(run), checkpoint=7, device="cpu"))


@pytest.mark.parametrize("flags, message", [
    ({"estimators": "grade,trpo"}, "unknown --estimators 'trpo'; known: grade, ste, reinforce, reinforce_loo, ppo"),
    ({"taus": "2;1"}, "--taus '2;1': numbers above 0 with commas between"),
    ({"taus": "2,0"}, "--taus '2,0': numbers above 0"),
    ({"groups": 5}, "--groups must be even and at least 4, not 5"),
    ({"draws": 40}, "--draws 40 is no multiple of --groups 16"),
    ({"draws": 0, "toy_draws": 0}, "leave nothing to measure"),
    ({"reference": 0}, "--reference 0"),
    ({"num_generations": 3}, "--num_generations 3 must be 2 or more and divide --batch_size 16"),
    ({"perturb": math.nan}, "--perturb must be at least 0, not nan"),
    ({"beta": -1.0}, "--beta must be at least 0, not -1.0"),
    ({"checkpoint": 5}, "--checkpoint 5 is a step of a --run"),
    ({"run": "results/ppo", "flags": "top_p=1"}, "--run has a model and flags of its own"),
    ({"flags": "--top_p 1"}, "--flags '--top_p': name=value, with blanks between"),
])  # fmt: skip
def test_flags_that_cannot_work_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        check(Args(**flags))
