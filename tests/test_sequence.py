"""Objectives in sequence: whose turn it is, what a bundle for each keeps, what evaluations report, what is refused."""
import json
from types import SimpleNamespace

import pytest
import torch
import tyro
from safetensors.torch import load_file

import eval_run
import rl_ppo
import train_ppo
from adapter_files import load_adapter, save_adapter
from adapters import adapter_tensors, attach, branch_parameters, preset
from bundles import BUNDLES
from checkpoints import load_checkpoint
from envs import DetectorWatch, Labelling, Stories
from model import load
from reward_specs import get_reward, objectives
from routing import ARRANGEMENTS, SEPARATE
from sequence import InSequence, add_policy_bundles, stage_of, stage_tables
from verdict import judged_by, modes_of

SMALL = ["--max_steps", "4", "--batch_size", "4", "--max_new_tokens", "12", "--eval_prompts", "8", "--eval_texts", "10",
         "--max_prompts", "40", "--logging_steps", "1", "--eval_every", "0", "--max_tokens", "48", "--ssl_steps", "2",
         "--ssl_texts", "30", "--ssl_batch_size", "4", "--num_epochs", "1", "--num_minibatches", "2", "--lr", "1e-2",
         "--device", "cpu"]  # fmt: skip
NO_TEXT = ["--ssl_steps", "0", "--ssl_texts", "4000", "--ssl_batch_size", "16"]  # the others then at their defaults
SEQUENCE = ["--rewards", "manners,brief"]
OWN = [*SEQUENCE, "--bundle_per_reward", "--loss_routes", "ssl_rl_separate"]


def run(folder, *flags) -> dict:
    assert train_ppo.main([*SMALL, "--output_dir", str(folder), *flags]) == 0
    return json.loads((folder / "verdict.json").read_text())["modes"]


def judge(path, out, *flags) -> dict:
    argv = ["--model_path", str(path), "--n", "8", "--n_samples", "1", "--device", "cpu", "--output_dir", str(out), *flags]
    eval_run.main(tyro.cli(eval_run.Args, args=argv, use_underscores=True))
    return json.loads((out / "eval.json").read_text())["modes"]


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("steps, count, stages", [
    (4, 2, [0, 0, 1, 1]), (5, 2, [0, 0, 0, 1, 1]), (7, 3, [0, 0, 0, 1, 1, 2, 2]), (3, 3, [0, 1, 2]),
    (500, 2, [0] * 250 + [1] * 250),
])  # fmt: skip
def test_shares_are_equal_to_a_step_and_in_order(steps, count, stages):
    assert [stage_of(step, steps, count) for step in range(steps)] == stages


class Recorder:
    """A trainer that notes what it is paid by, what policy_loss trains, and whether its detector's count began anew."""

    def __init__(self, env, steps, table):
        self.env, self.steps_done, self.seen, self.watch = env, 0, [], DetectorWatch(paid=1)
        self.model = SimpleNamespace(adapter=SimpleNamespace(names=[*BUNDLES, "b_rl_policy_2"]))
        self.config, self.router = SimpleNamespace(max_steps=steps), SimpleNamespace(table=table)

    def step(self):
        self.seen.append((self.env.reward.name, self.router.table["policy_loss"], self.watch.paid))
        self.watch.paid, self.steps_done = self.watch.paid + 1, self.steps_done + 1
        return {"reward": 0.5}, "text"


@pytest.mark.parametrize("own", [False, True])
def test_a_trainer_in_sequence_is_paid_and_routed_by_its_steps(own):
    rewards = [get_reward("happy_count"), get_reward("happy_binary")]
    env = Stories(rewards[-1], {"train": ["a"], "test": ["b"]}, Labelling(0.5))
    inner = Recorder(env, 3, ARRANGEMENTS["partial_overlap"][1])
    trainer = InSequence(inner, rewards, own)
    assert trainer.stage_ends == [2]
    metrics = [trainer.step() for _ in range(3)]
    first, second = ("b_rl_policy", "b_ssl_semantic"), ("b_rl_policy_2" if own else "b_rl_policy", "b_ssl_semantic")
    assert inner.seen == [("happy_count", first, 1), ("happy_count", first, 2), ("happy_binary", second, 0)]
    assert [m["stage"] for m, _ in metrics] == [1, 1, 2] and metrics[0] == ({"reward": 0.5, "stage": 1.0}, "text")
    assert trainer.env is env and inner.env.labelling is env.labelling and trainer.steps_done == 3
    assert [e.score(["a"], ["happy happy"]).reward.item() for e in (*trainer.envs, env)] == [2, 1, 1]


def test_each_stage_routes_the_policy_loss_alone_elsewhere():
    first, second, third = stage_tables(SEPARATE, 3)
    assert first == SEPARATE
    assert [t["policy_loss"] for t in (second, third)] == [("b_rl_policy_2",), ("b_rl_policy_3",)]
    assert all(t | {"policy_loss": ()} == SEPARATE | {"policy_loss": ()} for t in (second, third))


# ---------------------------------------------------------------------------------------------------------------- bundles


def test_policy_bundles_are_added_fresh_and_change_nothing_else(tmp_path):
    ids, models = torch.arange(5, 25)[None], []
    for count in (1, 3):
        model, _ = load("tiny")
        plain = model.hidden(ids)
        attach(model, preset("bundles", dual=False), seed=7)
        add_policy_bundles(model, count, seed=7)
        assert torch.equal(model.hidden(ids), plain), "fresh bundles write 0"
        models.append(model)
    without, model = models
    mine, new = adapter_tensors(model), ["b_rl_policy_2", "b_rl_policy_3"]
    assert model.adapter.names == [*BUNDLES, *new] == list(branch_parameters(model))
    assert all(torch.equal(mine[name], tensor) for name, tensor in adapter_tensors(without).items())
    ranks = [len(mine[f"layers.0.{name}.P"]) for name in ("b_rl_policy", *new)]
    assert max(ranks) - min(ranks) <= 1, "as wide as the first, but for rounding"
    drawn = [tensor[:5, :5] for name, tensor in mine.items() if name.endswith(".P")]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i]), "no two are drawn alike"
    assert all(p.requires_grad for name in new for p in branch_parameters(model)[name].values())
    for p in mine.values():
        p += 0.01
    save_adapter(model, tmp_path / "adapter.safetensors")
    again = load_adapter(load("tiny")[0], tmp_path / "adapter.safetensors")
    assert torch.equal(again.hidden(ids), model.hidden(ids)) and not torch.equal(again.hidden(ids), plain)
    modes = modes_of(model)
    assert list(modes) == ["untrained", "both", "rl_half", "rl_off", "value_off", "policy_off",
                           "policy_2_off", "policy_3_off"]
    assert {name: scale for name, scale in modes["policy_2_off"].items() if scale != 1} == {"b_rl_policy_2": 0}
    assert {name for name, scale in modes["rl_off"].items() if scale == 0} == {n for n in model.adapter.names if "_rl_" in n}
    assert "policy_off" not in modes_of(without)


# ------------------------------------------------------------------------------------------------------------------- runs


def test_a_bundle_for_each_objective_stays_as_it_was_left_also_where_runs_are_broken_and_resumed(tmp_path, monkeypatch):
    flags = [*OWN, "--weight_decay", "0.1"]
    modes = run(tmp_path / "whole", *flags, "--save_steps", "2")
    at = [load_file(tmp_path / "whole" / "reference.safetensors")]
    at += [load_checkpoint(tmp_path / "whole" / f"checkpoint-{n}")[1] for n in (2, 4)]

    def moved(before, after) -> set[str]:
        assert before.keys() == after.keys()
        return {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}

    shared = {"b_rl_value", "b_rl_explore"}
    assert moved(*at[:2]) == shared | {"b_rl_policy"}
    assert moved(*at[1:]) == shared | {"b_rl_policy_2"}, "momentum and weight decay leave the first objective's bundle alone"
    assert all(f"eval/{name}" in row for name in ("manners", "brief") for row in modes.values())
    assert all(row["reward"] == row["eval/brief"] for row in modes.values()), "the last objective judges"
    assert {"policy_off", "policy_2_off"} < set(modes)
    logged = lines(tmp_path / "whole")
    judged = [row["step"] for row in logged if "both/eval/manners" in row]
    assert judged == [2, 4] and [row["stage"] for row in logged if "stage" in row] == [1, 1, 2, 2]
    assert all(f"alpha/{name}" in row for row in logged if "stage" in row for name in ("b_rl_policy", "b_rl_policy_2"))
    for path, step in ((tmp_path / "whole", 4), (tmp_path / "whole" / "checkpoint-2", 2)):
        again = judge(path, tmp_path / f"eval{step}")
        then = next(row for row in logged if row["step"] == step and "both/kl" in row)
        assert all(again[mode][key] == then[f"{mode}/{key}"] for mode in modes for key in ("eval/manners", "eval/brief", "kl"))
    steps, dying = rl_ppo.Trainer.step, []

    def mortal(self):
        if dying == [self.steps_done]:
            raise KeyboardInterrupt
        return steps(self)

    monkeypatch.setattr(rl_ppo.Trainer, "step", mortal)
    resume = []
    for step in (1, 3):  # one resumed run crosses the line between the stages, the other begins behind it
        dying[:] = [step]
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", *flags, "--save_steps", "1", *resume)
        resume = ["--resume"]
    dying.clear()
    run(tmp_path / "broken", *flags, "--save_steps", "1", *resume)
    for name in ("metrics.jsonl", "adapter.safetensors", "reference.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


def test_without_bundles_of_their_own_objectives_share_one_and_further_rewards_are_reported(tmp_path):
    modes = run(tmp_path / "run", *SEQUENCE, "--max_steps", "2", *NO_TEXT, "--eval_rewards", "brief, steps",
                "--lora_config", "r2")  # fmt: skip
    columns = [key for key in modes["both"] if key.startswith("eval")]
    assert columns == ["eval/manners", "eval/brief", "eval/steps"] and list(modes) == ["untrained", "both"]
    again = judge(tmp_path / "run", tmp_path / "eval", "--eval_rewards", "steps")
    assert all(again["both"][key] == modes["both"][key] for key in columns)
    with pytest.raises(ValueError, match="unknown reward 'happy_count' of answers: manners, brief, steps"):
        judge(tmp_path / "run", tmp_path / "eval", "--eval_rewards", "happy_count")


def test_stories_in_sequence_with_routes_by_sample(tmp_path):
    for split in ("train", "test"):
        texts = [{"text": f"{split}: once there was a cat with {n} happy kittens."} for n in range(10)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, texts)))
    names = ["sentence_length_6_smooth_plus_happy", "sentence_length_5_smooth_plus_happy"]
    modes = run(tmp_path / "run", "--env", "stories", "--dataset", str(tmp_path), "--prompt_tokens", "8",
                "--rewards", ",".join(names), "--lora_config", "r2", "--routing", "dual",
                *NO_TEXT, "--max_steps", "2")  # fmt: skip
    assert modes["both"]["reward"] == pytest.approx(modes["both"][f"eval/{names[1]}"], abs=1e-6)
    assert modes["both"]["reward"] != modes["both"][f"eval/{names[0]}"] and "retain_only" in modes
    assert judge(tmp_path / "run", tmp_path / "eval")["both"][f"eval/{names[0]}"] == modes["both"][f"eval/{names[0]}"]


# ---------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("flags, said", [
    (["--rewards", "manners,brief", "--reward", "manners"], "in place of --reward manners"),
    (["--rewards", "manners"], "fewer than two"), (["--rewards", " , "], "fewer than two"),
    (["--rewards", "brief,manners,brief"], "names brief twice"),
    (["--rewards", "manners,brief,steps", "--max_steps", "2"], "3 stages: too many for --max_steps 2"),
    (["--rewards", "manners,nowhere"], "unknown reward 'nowhere' of answers: manners, brief, steps, or the folder"),
    (["--eval_rewards", "nowhere"], "unknown reward 'nowhere' of answers"),
    (["--env", "stories", *NO_TEXT, "--rewards", "happy_count,manners"], "unknown reward 'manners'"),
    (["--env", "stories", "--rewards", "happy_count,arithmetic_with_copy"], "the same prompts"),
    (["--env", "stories", "--rewards", "sentence_length_6_smooth_plus_happy,happy_count", "--routing", "dual", *NO_TEXT,
      "--lora_config", "r2"], "'happy_count' has no detector"),
    (["--bundle_per_reward", "--loss_routes", "ssl_rl_separate"], "name them"),
    ([*SEQUENCE, "--bundle_per_reward"], "--loss_routes ssl_rl_separate, larger_rl, partial_overlap, value_head_only, not none"),
    ([*SEQUENCE, "--bundle_per_reward", "--loss_routes", "baseline"], "not baseline"),
    ([*SEQUENCE, "--bundle_per_reward", "--loss_routes", "placebo"], "not placebo"),
])  # fmt: skip
def test_what_is_refused_before_anything_is_loaded(flags, said):
    with pytest.raises(ValueError, match=said):
        train_ppo.resolve(flags)


def test_a_sequence_has_a_name_and_a_config_of_its_own():
    folder, config = train_ppo.resolve(OWN)
    assert "_rewardmanners+brief_" in folder.name and "bundle_per_reward" in folder.name
    assert config["reward"] == "" and objectives(config) == ["manners", "brief"] and judged_by(config) == "preferences brief"
    folder, config = train_ppo.resolve([])
    assert folder.name.startswith("ppo_preferences_manners_") and "rewards" not in folder.name
    assert objectives(config) == ["manners"]
