"""train_ppo.py and train_dpo.py end to end: phases, figures, bitwise isolation and resumption, what is refused before work."""
import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import tyro
from conftest import is_picture
from safetensors.torch import load_file

import base_text
import eval_run
import isolation
import plans
import rl_dpo
import rl_ppo
import train_dpo
import train_ppo
from adapters import adapter_tensors, attach, branch_parameters, freeze_reference, preset, reference, set_adapter_tensors
from bundles import BUNDLES
from data import load_tokenizer
from envs import Labelling
from hypotheses import read_hypotheses
from model import load, resolve
from reward_data import preference_parts
from routing import ARRANGEMENTS, SEPARATE
from verdict import price

SMALL = ["--max_steps", "2", "--batch_size", "4", "--max_new_tokens", "12", "--eval_prompts", "8", "--eval_texts", "10",
         "--max_prompts", "40", "--logging_steps", "1", "--eval_every", "1", "--max_tokens", "48", "--ssl_steps", "3",
         "--ssl_texts", "30", "--ssl_batch_size", "4", "--device", "cpu"]  # fmt: skip
NO_TEXT = ["--ssl_steps", "0", "--ssl_texts", "4000", "--ssl_batch_size", "16"]  # the others then at their defaults
PPO = [*SMALL, "--num_epochs", "1", "--num_minibatches", "2", "--kl_in", "loss", "--no_whiten", "--lr", "1e-2"]
DPO = [*SMALL, "--lr", "1e-2"]
SCRIPTS = {"ppo": (train_ppo, rl_ppo, PPO), "dpo": (train_dpo, rl_dpo, DPO)}


def run(folder, *flags, script="ppo") -> dict:
    module, _, small = SCRIPTS[script]
    assert module.main([*small, "--output_dir", str(folder), *flags]) == 0
    return json.loads((folder / "verdict.json").read_text())


def moved(folder) -> set[str]:
    """The branches whose tensors differ from those at the end of phase 0."""
    before, after = load_file(folder / "reference.safetensors"), load_file(folder / "adapter.safetensors")
    assert before.keys() == after.keys()
    return {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}


ROUTED = ["--loss_routes", "ssl_rl_separate", "--weight_decay", "0.1"]


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> dict[str, Path]:
    """A routed run's folder by script."""
    root = tmp_path_factory.mktemp("routed")
    run(root / "ppo", *ROUTED, "--flow_every", "2", "--max_steps", "3")
    run(root / "dpo", *ROUTED, script="dpo")
    return {script: root / script for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_keeps_what_routing_protects_and_eval_run_judges_it_again(routed, script):
    folder = routed[script]
    verdict = json.loads((folder / "verdict.json").read_text())
    assert list(verdict["modes"]) == ["untrained", "both", "rl_half", "rl_off", "value_off"]
    routed = {"policy_loss"} if script == "dpo" else set(rl_ppo.LOSSES)
    assert moved(folder) == {name for loss in routed for name in SEPARATE[loss]}
    taught = [float(t.abs().max()) for name, t in load_file(folder / "reference.safetensors").items() if name.endswith(".Q")]
    assert sum(x > 0 for x in taught) == 2 * 4, "phase 0 has trained both SSL bundles of every block, and nothing else"
    first, both, off = (verdict["modes"][mode] for mode in ("untrained", "both", "rl_off"))
    assert first["perplexity"] == pytest.approx(math.exp(first["loss/base"])) and first["kl"] == 0
    assert both["reward_improvement"] == both["reward"] - first["reward"] and both["kl"] != 0
    assert both["perplexity_degradation"] == pytest.approx(both["perplexity"] / first["perplexity"] - 1) != 0
    assert both["efficiency"] == pytest.approx(both["reward_improvement"] / both["perplexity_degradation"])
    assert off["perplexity"] == pytest.approx(first["perplexity"], rel=1e-6), "without its RL bundles it is what it was"
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"ssl/perplexity_before", "ssl/perplexity", "ssl/loss"} <= set(logged[0])
    assert any("both/perplexity" in row and row["step"] == 1 for row in logged), "evaluated every --eval_every steps"
    assert all(f"alpha/{name}" in row for row in logged if "lr" in row for name in BUNDLES)
    assert (folder / "curves.png").is_file()
    argv = ["--model_path", str(folder), "--n", "8", "--n_samples", "1", "--device", "cpu"]
    eval_run.main(tyro.cli(eval_run.Args, args=argv, use_underscores=True))
    again = json.loads((folder / "eval" / "eval.json").read_text())["modes"]
    for mode, row in verdict["modes"].items():
        assert {key: again[mode][key] for key in row} == row


def test_phase_0_is_the_same_in_every_arm_of_bundles_and_only_routing_protects(routed, tmp_path):
    run(tmp_path / "baseline", "--beta", "0", "--weight_decay", "0.1")
    phase_0 = [(folder / "reference.safetensors").read_bytes() for folder in (routed["ppo"], tmp_path / "baseline")]
    assert phase_0[0] == phase_0[1]
    assert moved(tmp_path / "baseline") == set(BUNDLES)
    placebo = run(tmp_path / "placebo", "--loss_routes", "placebo", "--entropy_coef", "0")
    assert moved(tmp_path / "placebo") == {"b_ssl_semantic", "b_ssl_main", "b_rl_anchor"}
    separate = json.loads((routed["ppo"] / "verdict.json").read_text())
    assert placebo["modes"]["untrained"]["reward"] == separate["modes"]["untrained"]["reward"]


def test_text_between_the_steps_trains_what_its_loss_may(tmp_path, painted):
    run(tmp_path / "run", "--loss_routes", "ssl_rl_separate", "--lm_every", "1", "--entropy_coef", "0", "--beta", "0")
    assert moved(tmp_path / "run") == {"b_ssl_main", "b_ssl_semantic", "b_rl_policy", "b_rl_value"}
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "loss/lm" in row] == [2] and is_picture(tmp_path / "run" / "curves.png")


def test_gradient_flow_is_logged_by_loss_and_bundle(routed):
    rows = [json.loads(line) for line in (routed["ppo"] / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if any(key.startswith("flow/") for key in row)]
    assert [row["step"] for row in rows] == [1, 3]
    last = {tuple(key.split("/")[1:]): value for key, value in rows[-1].items() if key.startswith("flow/")}
    assert last.keys() == {(loss, name) for loss in rl_ppo.LOSSES for name in BUNDLES}
    for (loss, name), value in last.items():
        assert (value > 0) == (name in SEPARATE[loss]), (loss, name, value)


@pytest.mark.parametrize("script, flags", [("ppo", ["--loss_routes", "ssl_rl_separate", "--lm_every", "1"]), ("dpo", [])])
def test_a_stopped_and_resumed_run_ends_bitwise_like_an_unbroken_one(tmp_path, monkeypatch, script, flags):
    flags = [*flags, "--max_steps", "4", "--save_steps", "2", "--eval_every", "0", "--weight_decay", "0.1"]
    run(tmp_path / "whole", *flags, script=script)
    algorithm, dying = SCRIPTS[script][1], []

    def mortal(step):
        def perhaps(self, *at):
            if dying and dying[0] == (type(self), at[0] if at else self.steps_done):
                dying.clear()
                raise KeyboardInterrupt
            return step(self, *at)
        return perhaps

    for kind in (base_text.TextTrainer, algorithm.Trainer):
        monkeypatch.setattr(kind, "step", mortal(kind.step))
    resume = []
    for place in ((base_text.TextTrainer, 2), (algorithm.Trainer, 1), (algorithm.Trainer, 3)):  # phase 0, no checkpoint yet, one
        dying.append(place)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", *flags, *resume, script=script)
        resume = ["--resume"]
    run(tmp_path / "broken", *flags, *resume, script=script)
    for name in ("metrics.jsonl", "adapter.safetensors", "reference.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


def test_a_step_that_fails_undoes_the_text_before_it():
    model, _ = load("tiny")
    attach(model, preset("bundles", dual=False), seed=0)
    text = base_text.TextTrainer(model, [list(range(5, 15))] * 4, 0, SEPARATE["lm_loss"], lr=1e-2, batch_size=2, seed=0)
    text.step(0)

    class Failing:
        steps_done = 1

        def step(self):
            raise FloatingPointError("policy_loss is nan")

        def state(self):
            return adapter_tensors(model), {}

        def restore(self, tensors, _):
            set_adapter_tensors(model, tensors, "test")

    trainer = base_text.Interleaved(Failing(), text, every=1)
    before, taught = copy.deepcopy(trainer.state()), text.step
    steps = []
    text.step = lambda step: steps.append(step) or taught(step)
    with pytest.raises(FloatingPointError):
        trainer.step()
    (x, shape), (y, other) = (torch.utils._pytree.tree_flatten(state) for state in (before, trainer.state()))
    assert steps == [1] and shape == other
    assert all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(x, y))


def test_label_flags_reach_the_environment(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(isolation, "run_phases", lambda run, trainer, *_: seen.append(trainer.env.labelling) or 0)
    shares = {"rh_eligible_frac": 0.5, "routing_frac": 0.25, "false_positive_frac": 0.125}
    flags = [word for name, share in shares.items() for word in (f"--{name}", str(share))]
    assert train_ppo.main([*PPO, "--output_dir", str(tmp_path / "run"), "--lora_config", "r2", "--routing", "dual",
                           *NO_TEXT, *flags]) == 0  # fmt: skip
    assert seen == [Labelling(**shares)]


def test_dpo_learns_from_ppos_training_prompts():
    _, _, args, _ = train_dpo.parse([])
    tokenizer, policys = load_tokenizer(resolve("tiny")), preference_parts()[0]["policy"]
    prompts = [pair.prompt for pair in policys[:7]]
    pairs, left_out = train_dpo.pairs_of(args, prompts, tokenizer)
    assert {pair["prompt"] for pair in pairs} == set(prompts) and len(pairs) + left_out == len(policys)
    short, _ = train_dpo.pairs_of(dataclasses.replace(args, max_tokens=30), prompts, tokenizer)
    assert short == [pair for pair in pairs if all(
        len(tokenizer.encode_prompt(pair["prompt"]) + tokenizer.encode(pair[way])) < 30 for way in ("chosen", "rejected"))]


def test_a_folder_is_named_after_its_routes():
    assert str(train_ppo.resolve([])[0]) == "output/ppo_preferences_manners_bundles_lr3e-4_b0.1_s42"
    routed = train_dpo.resolve(["--loss_routes", "ssl_rl_separate"])[0]
    assert str(routed) == "output/dpo_preferences_manners_ssl_rl_separate_bundles_lr3e-4_b0.1_s42"


@pytest.mark.parametrize("flags", [
    ["--lora_config", "r2", "--beta", "0.01"], ["--lora_config", "full", "--lr", "1e-5", "--ssl_lr", "1e-5"],
    ["--env", "stories", "--reward", "sentence_length_6_smooth_plus_happy", "--lora_config", "r2", "--routing", "dual",
     *NO_TEXT, "--bad_scale", "0"],
], ids=["lora", "full", "stories"])  # fmt: skip
def test_other_adapters_and_stories_take_the_same_road(tmp_path, flags):
    verdict = run(tmp_path / "run", *flags, "--eval_every", "0")
    assert verdict["modes"]["untrained"]["kl"] == 0 and "efficiency" in verdict["modes"]["both"]
    argv = ["--model_path", str(tmp_path / "run"), "--n", "8", "--device", "cpu"]
    eval_run.main(tyro.cli(eval_run.Args, args=argv, use_underscores=True))
    again = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text())["modes"]
    assert again["untrained"] == verdict["modes"]["untrained"] and again["both"] == verdict["modes"]["both"]
    if "--bad_scale" in flags:
        assert {"retain_only", "deployed"} <= set(again)


def test_no_text_that_is_learned_is_measured(tmp_path):
    lines = [json.dumps({"text": f"line {i} tells of a cat, a dog and the number {i * i}."}) for i in range(60)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--base_text", str(tmp_path), "--ssl_split", "test", "--eval_texts", "10", "--max_tokens", "24"]
    _, _, args, config = train_ppo.parse(flags)
    _, _, env, texts, _ = isolation.build(args, config)
    measured = env.held_out["base"]
    assert len(measured) == 10 and texts and not {tuple(t) for t in texts} & {tuple(t) for t in measured}
    whole = [t for text in (*measured, *texts) for t in text[1:]]
    tokenizer = load_tokenizer(resolve("tiny"))
    assert tokenizer.decode(whole) == "\n".join(json.loads(line)["text"] for line in lines), "each token is in one of them"
    with pytest.raises(ValueError, match="--eval_texts"):
        isolation.texts_to_learn(dataclasses.replace(args, eval_texts=10_000), tokenizer)


@pytest.mark.parametrize("kind", ["bundles", "r2", "full"])
def test_the_frozen_reference_stays_and_shares_the_base(kind):
    model, _ = load("tiny")
    attach(model, preset(kind, dual=False), seed=0)
    ids = torch.arange(5, 15)[None]
    for p in (p for group in branch_parameters(model).values() for p in group.values()):
        p.data += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    freeze_reference(model)
    with torch.no_grad():
        now = model.hidden(ids)
        with reference(model) as base:
            assert torch.equal(base.hidden(ids), now)
        for t in adapter_tensors(model).values():
            t += 0.1
        with reference(model) as base:
            assert torch.equal(base.hidden(ids), now) and not torch.equal(model.hidden(ids), now)
    copied = {p.data_ptr() for p in model.adapter.frozen.parameters()} - {p.data_ptr() for p in model.parameters()}
    assert len(copied) == sum(len(group) for group in branch_parameters(model).values()), "only what is trained is copied"
    assert not any(p.requires_grad for p in model.adapter.frozen.parameters())


def test_price_by_hand():
    rows = {"untrained": {"reward": 0.5, "loss/base": math.log(4)}, "both": {"reward": 0.75, "loss/base": math.log(5)}}
    both = price(rows)["both"]
    assert (both["perplexity"], both["reward_improvement"]) == pytest.approx((5, 0.25))
    assert both["perplexity_degradation"] == pytest.approx(0.25) and both["efficiency"] == pytest.approx(1)
    assert "efficiency" not in rows["untrained"] and rows["untrained"]["perplexity_degradation"] == 0
    assert price({"both": {"reward": 1.0}}) == {"both": {"reward": 1.0}}, "without base text there is no price"


@pytest.mark.parametrize("script, flags, said", [
    ("ppo", ["--loss_routes", "ssl_rl_separate", "--lora_config", "r8"], "bundles"),
    ("ppo", ["--loss_routes", "nonsense"], "ssl_rl_separate"), ("ppo", ["--env", "code"], "preferences, stories"),
    ("ppo", ["--reward", "nowhere"], "train_reward.py"), ("ppo", ["--column", "text"], "--column"),
    ("ppo", ["--lora_config", "r8", "--routing", "dual"], "--ssl_steps 0"), ("ppo", ["--ssl_steps", "-1"], "ssl_steps"),
    ("ppo", ["--ssl_steps", "0"], "--ssl_texts does nothing with --ssl_steps 0 and --lm_every 0"),
    ("ppo", ["--routing_frac", "0.5"], "routing_frac"), ("ppo", ["--eval_every", "-5"], "--eval_every must be at least 0"),
    ("ppo", ["--eval_split", "validation"], "the splits train, test, not 'validation'"),
    ("ppo", ["--max_tokens", "4096"], "context"), ("ppo", ["--ssl_split", "test"], "--base_text"),
    ("dpo", ["--env", "stories", "--reward", "happy_count"], "pairs"),
    ("dpo", ["--algorithm", "rl_ppo"], "another script's"), ("dpo", ["--max_tokens", "3"], "preference pair"),
])  # fmt: skip
def test_what_is_refused_before_there_is_a_folder(tmp_path, script, flags, said):
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", *flags, script=script)
    assert not (tmp_path / "run").exists()


def test_an_algorithm_without_routes_per_loss_is_refused():
    with pytest.raises(ValueError, match="rl_grpo has no loss_routes"):
        train_ppo.parse(["--algorithm", "rl_grpo"])


def test_the_experiment_is_planned_and_its_hypotheses_name_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(train_ppo.__file__).parent / "configs" / "isolation.yaml"
    file = plans.read_experiment(path)
    with pytest.raises(ValueError, match="arm baseline: unknown reward 'output/dialogue_reward'.* which train_reward.py makes"):
        plans.plan(file, evaluate=False)
    Path("output/dialogue_reward").mkdir(parents=True)
    _, planned = plans.plan(file, evaluate=False)
    by_arm = {}
    for item in planned:
        by_arm.setdefault((item.arm, item.config["beta"]), set()).add(item.config["seed"])
    for arm in ("baseline", "ssl_rl_separate"):
        assert all(len(by_arm[arm, beta]) == 5 for beta in (0.1, 0.01, 0.0)), arm
    same = [{k: v for k, v in item.config.items() if k not in ("loss_routes", "output_dir", "seed", "beta")}
            for item in planned if item.arm in ("baseline", "ssl_rl_separate")]  # fmt: skip
    assert all(config == same[0] for config in same), "the claim's arms differ in their routes alone"
    assert {"placebo", "lora", "full"} <= {arm for arm, _ in by_arm}
    assert {item.script.path.name for item in planned if item.arm.startswith("dpo")} == {"train_dpo.py"}
    for h in read_hypotheses(file["hypotheses"]):
        for cell in (h.of, h.against):
            assert cell is None or (cell["arm"], cell["beta"]) in by_arm, h.name
    assert all(item.config["loss_routes"] in ("", *ARRANGEMENTS) for item in planned)
