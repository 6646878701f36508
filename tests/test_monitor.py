"""monitor.py: what the probe reads, how it is standardised, what it takes off a reward, and that in rl_grpo's loop."""

import copy
import dataclasses
import itertools

import pytest
import torch
from test_adapters import FAMILIES, rand, shake, tiny
from test_projector import same, trainer_of, values
from torch import nn

import monitor
import rl_grpo
import train_grpo
from adapters import attach, preset
from data import left_pad, right_pad
from monitor import figures, fit, modified, score
from rl_grpo import Config, group_advantages
from sampling import Rollout

PAIRS = [([1, 2, 3], [4, 5, 6, 7], [8, 9]), ([3, 3], [5], [6, 7, 8]), ([9], [4, 4], [2, 1]), ([7, 1, 2, 4], [5, 30], [31, 5])]


def rollout_of(rows) -> Rollout:
    """(prompt, completion) ids each."""
    (prompt_ids, prompt_mask), (tokens, mask) = left_pad([p for p, _ in rows], 0), right_pad([c for _, c in rows], 0)
    return Rollout(prompt_ids, prompt_mask, tokens, mask, torch.zeros(mask.shape), None, torch.ones(len(rows)).bool())


def alone(base, layer: int, prompt, completion) -> torch.Tensor:
    """The mean state of one completion, by a model that ends after `layer` layers, without any padding."""
    short = copy.deepcopy(base)
    short.layers, short.norm = short.layers[:layer], nn.Identity()
    return short.hidden(torch.tensor([[*prompt, *completion]]))[0, len(prompt) :].mean(0).double()


@pytest.mark.parametrize("name", ["r4", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_standardised_projections_of_the_frozen_bases_states(family, name, monkeypatch):
    base = tiny(family)
    model = shake(attach(tiny(family), preset(name, dual=False)))  # the policy has moved on
    layer = base.config.layers - 1
    probe = fit(model, PAIRS, layer)
    H = [[alone(base, layer, prompt, completion) for completion in two] for prompt, *two in PAIRS]
    direction = sum(hack - clean for hack, clean in H) / len(H)
    p = torch.stack([state @ direction for two in H for state in two])
    new = [([5, 6], [7, 8, 9, 1]), ([2], [3]), ([4, 4, 4, 4, 4], [6, 6])]
    rows = [(prompt, completion) for prompt, *two in PAIRS for completion in two] + new
    expected = torch.stack([(alone(base, layer, *row) @ direction - p.mean()) / p.std() for row in rows]).float()
    monkeypatch.setattr(monitor, "TOKENS", 20)  # several forward passes
    z = score(model, probe, rollout_of(rows))
    torch.testing.assert_close(z, expected, atol=2e-4, rtol=1e-4)
    assert abs(z[:8].mean()) < 1e-4 and abs(z[:8].std() - 1) < 1e-4 and z[0:8:2].mean() > z[1:8:2].mean()
    assert not any(block._forward_hooks for block in model.layers)


@pytest.mark.parametrize("layers, layer", [(1, 1), (2, 1), (3, 2), (6, 4), (36, 24)])
def test_the_default_layer_is_at_two_thirds_of_the_depth(layers, layer, monkeypatch):
    model = tiny("llama")
    model.config = dataclasses.replace(model.config, layers=layers)
    monkeypatch.setattr(monitor, "states", lambda model, layer, ids, valid, start: rand(2, 5, seed=len(ids[0])).float())
    assert fit(model, PAIRS).layer == layer and fit(model, PAIRS, layers).layer == layers
    with pytest.raises(ValueError, match=f"--probe_layer {layers + 1}: the model has {layers} layers"):
        fit(model, PAIRS, layers + 1)


def test_what_the_probe_takes_off_a_reward():
    rewards, z = torch.tensor([3.5, 3.5, 0.5, -1.0, 2.0]), torch.tensor([1.0, -2.0, 0.25, 0.5, 0.0])
    assert modified(rewards, z, "subtract", 2.0).tolist() == [1.5, 3.5, 0.0, -2.0, 2.0]
    sigmoid = [0.7310586, 0.5621765, 0.6224593]
    wanted = [3.5 * (1 - 2 * sigmoid[0]), 3.5, 0.5 * (1 - 2 * sigmoid[1]), -1 * (1 - 2 * sigmoid[2]), 2.0]
    assert modified(rewards, z, "scale", 2.0).tolist() == pytest.approx(wanted, abs=1e-6)
    for form in monitor.FORMS:
        assert torch.equal(modified(rewards, z, form, 0.0), rewards)


def test_auc_counts_pairs_of_a_hack_and_an_honest_completion():
    z = torch.tensor([1.0, 1.0, 3.0, -2.0, 0.5, 1.0])
    for labels in itertools.product([False, True], repeat=6):
        found = figures(z, torch.tensor(labels))
        two = [(a, b) for a, hack in zip(z.tolist(), labels) for b, other in zip(z.tolist(), labels) if hack and not other]
        wanted = [(a > b) + (a == b) / 2 for a, b in two]
        assert found["probe/z"] == pytest.approx(0.75) and ("probe/auc" in found) == bool(two)
        assert not two or found["probe/auc"] == pytest.approx(sum(wanted) / len(two))


@pytest.mark.parametrize("settings, message", [
    ({"advantage": "judge"}, "unknown --advantage 'judge'; known: group, probe"),
    ({"advantage": "probe", "probe_form": "square"}, "unknown --probe_form 'square'; known: subtract, scale"),
    ({"probe_alpha": 1.0}, "--probe_alpha does nothing without --advantage probe"),
    ({"probe_layer": 1}, "--probe_layer does nothing without --advantage probe"),
    ({"probe_form": "scale"}, "--probe_form does nothing without --advantage probe"),
    ({"advantage": "probe", "probe_alpha": -1.0}, "must be at least 0"),
    ({"advantage": "probe", "probe_layer": -1}, "must be at least 0"),
    ({"advantage": "probe", "pair_count": -1}, "must be at least 0"),
    ({"advantage": "probe", "pair_count": 4, "basis_use": 3}, "--basis_use does nothing without a --basis"),
    ({"pair_count": 4}, "--pair_count does nothing without a --basis"),
])  # fmt: skip
def test_wrong_flags_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


@pytest.mark.parametrize("flags, message", [
    (["--probe_layer", "99"], "--probe_layer 99: the model has"), (["--pair_count", "999"], "a width of 999 hack pairs"),
    (["--pairs", "nowhere.yaml"], "cannot read pairs from nowhere.yaml"),
])  # fmt: skip
def test_what_only_the_model_or_the_file_can_refuse_is_refused_before_there_is_a_run_folder(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        train_grpo.main(["--advantage", "probe", *flags, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", monitor.FORMS)
@pytest.mark.parametrize("routing", ["none", "dual"])
def test_advantages_are_of_the_modified_rewards_and_the_log_has_the_environments(form, routing, monkeypatch):
    settings = {"routing": routing, "renormalise": "off"} if routing == "dual" else {}
    plain = trainer_of("r4", **settings).step()[0]
    trainer, seen = trainer_of("r4", advantage="probe", probe_form=form, pair_count=8, **settings), {}
    update, credit = rl_grpo.update, trainer.credit

    def watched(scores, generator, z):
        seen.update(reward=scores.reward.clone(), hack=scores.hack, z=z)
        return credit(scores, generator, z)

    def learn(model, optimizer, rollout, advantages, *rest):
        seen["advantages"] = advantages
        assert torch.equal(score(model, trainer.probe, rollout), seen["z"])
        return update(model, optimizer, rollout, advantages, *rest)

    monkeypatch.setattr(trainer, "credit", watched)
    monkeypatch.setattr(rl_grpo, "update", learn)
    metrics, _ = trainer.step()
    assert (seen["z"] > 0).any(), "the case is one in which something is taken off"
    assert torch.equal(seen["advantages"], group_advantages(modified(seen["reward"], seen["z"], form, 2.0), 4))
    assert not torch.equal(seen["advantages"], group_advantages(seen["reward"], 4))
    assert metrics["reward"] == plain["reward"] == seen["reward"].mean().item() and "probe/z" not in plain
    assert {k: v for k, v in metrics.items() if k.startswith("probe/")} == figures(seen["z"], seen["hack"])


def test_a_probe_that_only_measures_changes_no_bit():
    plain, watched = trainer_of("r4"), trainer_of("r4", advantage="probe", probe_alpha=0.0)
    for _ in range(2):
        plain.step()
        assert "probe/z" in watched.step()[0]
    assert same(values(plain), values(watched))


def test_a_restored_trainer_has_the_probe_it_had():
    settings = {"advantage": "probe", "pair_count": 8}
    unbroken = trainer_of("full", **settings)
    for _ in range(2):
        unbroken.step()
    tensors, state = copy.deepcopy(unbroken.state())
    resumed = trainer_of("full", **settings)
    resumed.restore(tensors, state)
    assert torch.equal(unbroken.probe.weight, resumed.probe.weight) and torch.equal(unbroken.probe.bias, resumed.probe.bias)
    a, b = unbroken.step()[0], resumed.step()[0]
    assert same(values(unbroken), values(resumed)) and a["probe/z"] == b["probe/z"]
