"""Projection inside the loops, on the embedded model: what is removed, from what, where it goes, and that runs repeat."""

import math

import pytest
import torch

import rl_grpo
import rl_ppo
import rl_reinforce
from adapters import attach, branch_parameters, preset
from checkpoints import load_checkpoint, write_checkpoint
from data import load_tokenizer
from envs import Labelling, Stories, embedded_prompts
from model import load, read_json
from projection import WHOLE, agem, null_of, pair_gradients
from projector import SOURCES
from reward_specs import get_reward
from rl_grpo import Config

SMALL = {"batch_size": 8, "num_generations": 4, "max_new_tokens": 24, "lr": 1e-2, "weight_decay": 0.1, "beta": 0.01}
PROMPTS = {split: texts[:8] for split, texts in embedded_prompts().items()}


def trainer_of(lora_config="ds", algorithm=rl_grpo, **settings):
    shared = {name: value for name, value in SMALL.items() if name in algorithm.Config.__dataclass_fields__}
    config = algorithm.Config(**shared | settings)
    model, folder = load("tiny")
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json"))
    attach(model, preset(lora_config, config.dual), seed=0)
    env = Stories(get_reward("sentence_length_5_smooth_plus_happy"), PROMPTS, Labelling(0.9))
    return algorithm.Trainer(model, env, tokenizer, config)


def values(trainer, branch=None) -> dict[str, torch.Tensor]:
    groups = branch_parameters(trainer.model)
    return {name: p.detach().clone() for key, group in groups.items() if branch in (None, key) for name, p in group.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("settings, message", [
    ({"basis": "authored"}, "unknown --basis 'authored'; known: pairs, random"),
    ({"basis": "pairs", "projection": "half"}, "unknown --projection 'half'; known: none, one_sided"),
    ({"basis": "pairs", "projection": "no_gate", "project_on": "both"}, "unknown --project_on 'both'"),
    ({"projection": "no_gate"}, "--projection does nothing without a --basis"),
    ({"basis": "pairs", "overshoot": 1.5}, "--overshoot is of a projection"),
    ({"basis": "pairs", "projection": "no_gate", "project_on": "update", "removed": "route"}, "leave --project_on at gradient"),
    ({"basis": "pairs", "projection": "no_gate", "removed": "route", "routing": "dual"}, "leave --routing at none"),
    *[({"basis": "pairs", "projection": "agem", name: value}, f"--{name} is of one_sided, no_gate, reverse: it does nothing for")
      for name, value in {"project_on": "update", "removed": "route", "overshoot": 1.5, "norm_rescale": True}.items()],
    ({"basis": "random", "projection": "complement"}, "complement takes gradients of pairs, --basis random is of none"),
    ({"projection": "pcgrad"}, "--projection does nothing without a --basis"),
    ({"basis": "live"}, "say how often by --basis_refresh"),
    ({"basis": "live", "basis_refresh": 2, "pair_count": 12}, "--pair_count is of authored pairs, --basis live"),
    ({"basis": "pairs", "projection": "no_gate", "project_on": "update", "norm_rescale": True}, "--norm_rescale gives a"),
    ({"basis": "pairs", "basis_use": 9, "basis_keep": 5}, "--basis_use <= --basis_keep"),
])  # fmt: skip
def test_wrong_flags_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_flags_of_what_there_is_are_taken():
    assert Config(basis="live", basis_refresh=2, advantage="probe", pair_count=12).pair_count == 12, "the probe's"
    assert Config(basis="pairs", projection="no_gate", removed="route", bad_lr_scale=1.0).bad_lr_scale == 1, "it has a bad branch"


def test_a_basis_that_only_measures_changes_no_bit():
    bare, watched = trainer_of(), trainer_of(basis="pairs", pair_count=6)
    for _ in range(2):
        plain, _ = bare.step()
        metrics, _ = watched.step()
    assert same(values(bare), values(watched)) and plain["loss"] == metrics["loss"]
    assert metrics["projection/cin"] == metrics["projection/cout"] > 0
    assert metrics["projection/signed"] == metrics["projection/signed_out"]
    assert "moved/cin" in metrics and "projection/cin" not in plain


@pytest.mark.parametrize("lora_config", ["ds", "r4o", "r2"])
@pytest.mark.parametrize("project_on", ["gradient", "update"])
def test_what_is_projected_has_nothing_along_the_axes(lora_config, project_on):
    trainer = trainer_of(lora_config, basis="pairs", pair_count=6, projection="no_gate", project_on=project_on)
    for _ in range(3):
        before = values(trainer)
        metrics, _ = trainer.step()
    stats, other = ("projection", "moved") if project_on == "gradient" else ("moved", "projection")
    assert abs(metrics[f"{stats}/signed_out"]) < 1e-5 and metrics[f"{stats}/cout"] < 1e-5 < metrics[f"{stats}/cin"]
    assert metrics[f"{other}/cout"] == metrics[f"{other}/cin"] > 1e-5  # AdamW turns back a projected gradient's step
    moved = {name: before[name] - p for name, p in values(trainer).items()}
    left = [(V @ moved[name].reshape(-1)).abs().max() / moved[name].norm() for name, V in trainer.projector.basis.rows.items()]
    assert (max(left) < 1e-4) == (project_on == "update")


def test_the_removed_part_trains_the_bad_branch_alone():
    trainer = trainer_of(basis="pairs", pair_count=6, projection="one_sided", removed="route", max_grad_norm=0.0)
    seen, clip = {}, trainer.projector.project

    def spy():
        seen["before"] = {name: p.grad.clone() for name, p in trainer.projector.parameters.items()}
        assert all(p.grad is None for p in branch_parameters(trainer.model)["bad"].values())
        return clip()

    trainer.projector.project = spy
    bad = values(trainer, "bad")
    trainer.step()
    for name, V in trainer.projector.basis.rows.items():
        good, other = trainer.projector.parameters[name], branch_parameters(trainer.model)["bad"][name.replace(".good.", ".bad.")]
        removed = V.t() @ (V @ seen["before"][name]).clamp(min=0)
        torch.testing.assert_close(other.grad, removed)
        torch.testing.assert_close(good.grad, seen["before"][name] - removed)
    assert not same(values(trainer, "bad"), bad)


@pytest.mark.parametrize("basis", ["pairs", "shuffled"])
@pytest.mark.parametrize("mode", WHOLE)
def test_baselines_take_the_whole_gradient_and_leave_held_out_pairs_alone(mode, basis):
    trainer = trainer_of(basis=basis, pair_count=4, projection=mode, max_grad_norm=0.0, seed=1)
    projector, parameters = trainer.projector, trainer.projector.parameters
    gradients = pair_gradients(trainer.model, parameters, projector.pairs)  # the first step makes its basis from the same weights
    D = torch.cat(list(gradients.values()), dim=1)[:4]
    if basis == "shuffled":
        D = D * (torch.randint(0, 2, (6, 1), generator=torch.Generator().manual_seed(1)) * 2 - 1)[:4]
    seen, project = {}, projector.project

    def spy():
        seen["g"] = torch.cat([p.grad.reshape(-1) for p in parameters.values()])
        return project()

    projector.project = spy
    metrics, _ = trainer.step()
    g, h = seen["g"], -D.mean(0)
    if mode == "complement":
        wanted = g - D.t() @ torch.linalg.lstsq(D.double().t(), g.double()[:, None]).solution.squeeze(1).float()
    else:
        wanted = agem(g, h) + (agem(h, g) if mode == "pcgrad" else 0)
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in parameters.values()]), wanted, atol=1e-6, rtol=1e-4)
    assert (wanted - g).norm() > 1e-3 * g.norm() or mode == "agem" and g @ h >= 0
    assert {"projection/signed", "projection/signed_out", "projection/cout", "moved/cin", "basis/held_out_cin"} <= metrics.keys()


def add_contrasts(trainer) -> None:
    prompt = trainer.tokenizer.encode_prompt("there was once a cat")
    trainer.projector.live.extend((prompt, [5 + i, 9, 8], [6 + i, 7, 8]) for i in range(9))


@pytest.mark.parametrize("basis", SOURCES)
def test_every_source_makes_axes_and_a_refresh_makes_them_afresh(basis):
    trainer = trainer_of(basis=basis, pair_count=0 if basis == "live" else 4, basis_refresh=2)
    if basis == "live":
        add_contrasts(trainer)
    first, _ = trainer.step()
    kept = trainer.projector.basis
    second, _ = trainer.step()
    assert trainer.projector.basis is kept and "basis/overlap" not in first
    third, _ = trainer.step()
    assert trainer.projector.basis is not kept and -1e-6 <= third["basis/overlap"] <= 1 + 1e-6 and "basis/null" not in second
    assert first["basis/null"] == pytest.approx(null_of(kept)) and all(math.isfinite(v) for v in third.values())
    assert ("basis/held_out_cin" in first) == (basis not in ("live", "random"))
    if basis == "random":
        assert third["basis/overlap"] > 0.999  # the same draw: what is placebo at first stays so


def test_live_contrasts_are_a_flagged_and_an_honest_completion_of_one_prompt():
    trainer = trainer_of(basis="live", basis_refresh=1)
    ids, mask = torch.tensor([[0, 5, 6]] * 4 + [[7, 8, 9]] * 4), torch.tensor([[0, 1, 1]] * 4 + [[1, 1, 1]] * 4).bool()
    tokens = torch.arange(10, 26).view(8, 2)
    rollout = type("R", (), {"prompt_ids": ids, "prompt_mask": mask, "tokens": tokens, "mask": torch.ones(8, 2).bool()})
    trainer.projector.observe(rollout, torch.tensor([False, True, True, False] + [False] * 4))
    assert list(trainer.projector.live) == [([5, 6], [12, 13], [10, 11])]
    assert trainer.projector.refresh(0) == {} and trainer.projector.basis is None  # one contrast is no basis


MODES = [("pairs", "one_sided"), ("random", "no_gate"), ("live", "no_gate"), *(("pairs", mode) for mode in WHOLE)]


@pytest.mark.parametrize("basis, mode", MODES)
def test_a_restored_trainer_goes_on_with_the_basis_it_had(tmp_path, basis, mode):
    settings = {"basis": basis, "pair_count": 0 if basis == "live" else 4, "projection": mode, "basis_refresh": 3}
    unbroken = trainer_of(**settings)
    if basis == "live":
        add_contrasts(unbroken)
    for _ in range(2):
        unbroken.step()
    _, *saved = load_checkpoint(write_checkpoint(tmp_path, 2, *unbroken.state()))  # a file forgets how tensors lay in memory
    resumed = trainer_of(**settings)
    resumed.restore(*saved)
    for _ in range(2):
        old = unbroken.projector.directions
        a, b = ({k: v for k, v in t.step()[0].items() if not k.startswith("time/")} for t in (unbroken, resumed))
        assert a == b and same(values(unbroken), values(resumed))
    assert mode not in WHOLE or not torch.equal(unbroken.projector.directions, old), "a refresh makes them afresh"


# ---------------------------------------------------------------------------------------------------- PPO and REINFORCE

OTHERS = {rl_ppo: {"num_epochs": 2, "num_minibatches": 2, "target_kl": 0.0}, rl_reinforce: {}}  # four optimizer steps, and one


@pytest.mark.parametrize("algorithm", OTHERS)
@pytest.mark.parametrize("lora_config, routed, project_on", [
    ("ds", "none", "gradient"), ("ds", "none", "update"), ("r4o", "none", "gradient"), ("r2", "dual", "update"),
])  # fmt: skip
def test_other_algorithms_project_each_of_their_steps(algorithm, lora_config, routed, project_on):
    settings = {"basis": "pairs", "pair_count": 6, "projection": "no_gate", "project_on": project_on, "routing": routed}
    trainer = trainer_of(lora_config, algorithm, **settings, **OTHERS[algorithm])
    for _ in range(2):
        before, bad = values(trainer), values(trainer, "bad")
        metrics, _ = trainer.step()
    stats, other = ("projection", "moved") if project_on == "gradient" else ("moved", "projection")
    assert abs(metrics[f"{stats}/signed_out"]) < 1e-5 and metrics[f"{stats}/cout"] < 1e-5 < metrics[f"{stats}/cin"]
    assert metrics[f"{other}/cout"] == metrics[f"{other}/cin"] > 1e-5 and metrics.get("optimizer_steps", 1) in (1, 4)
    moved = {name: before[name] - p for name, p in values(trainer).items()}
    left = [(V @ moved[name].reshape(-1)).abs().max() / moved[name].norm() for name, V in trainer.projector.basis.rows.items()]
    assert (max(left) < 1e-4) == (project_on == "update"), "AdamW turns back a projected gradient's step"
    assert not any(name in trainer.projector.basis.rows for name in bad), "the bad branch may learn along the axes"


@pytest.mark.parametrize("algorithm", OTHERS)
def test_other_algorithms_measure_without_changing_a_bit_and_are_clipped_after(algorithm):
    basis = {"basis": "pairs", "pair_count": 6}
    bare, watched = (trainer_of("r2", algorithm, **flags, **OTHERS[algorithm]) for flags in ({}, basis))
    for _ in range(2):
        plain, _ = bare.step()
        metrics, _ = watched.step()
    assert same(values(bare), values(watched)) and plain["loss"] == metrics["loss"]
    assert metrics["projection/cin"] == metrics["projection/cout"] > 0 and "projection/cin" not in plain
    clipped = trainer_of("r2", algorithm, projection="no_gate", max_grad_norm=1e-3, **basis)
    metrics, _ = clipped.step()
    assert 1e-3 < metrics["grad_norm/adapter"] < 0.999 * metrics["grad_norm_mean"], "what is clipped is what is left"


@pytest.mark.parametrize("algorithm", OTHERS)
def test_other_algorithms_route_the_removed_part(algorithm):
    settings = {"basis": "pairs", "pair_count": 6, "removed": "route", "weight_decay": 0.0, "projection": "one_sided"}
    trainer = trainer_of("ds", algorithm, **settings)
    assert trainer.config.dual
    before = values(trainer, "bad")
    trainer.step()
    moved = [name for name, p in values(trainer, "bad").items() if not torch.equal(p, before[name])]
    assert moved and {name.replace(".bad.", ".good.") for name in moved} <= set(trainer.projector.basis.rows)
    with pytest.raises(ValueError, match="--removed route: the branches of this adapter share no basis"):
        trainer_of("r2", algorithm, **settings)


def test_bundles_are_projected_all_of_them():
    """Whatever a loss may train, it learns nothing along the axes."""
    settings = {"basis": "pairs", "pair_count": 4, "projection": "no_gate", "loss_routes": "ssl_rl_separate", "kl_in": "loss"}
    trainer = trainer_of("bundles", rl_ppo, **settings, **OTHERS[rl_ppo])
    metrics, _ = trainer.step()
    assert metrics["projection/cout"] < 1e-5 < metrics["projection/cin"]
    for bundle in ("b_rl_policy", "b_rl_value", "b_rl_anchor", "b_rl_explore"):
        assert any(f".{bundle}." in name for name in trainer.projector.basis.rows), bundle


@pytest.mark.parametrize("algorithm, basis", [(rl_ppo, "pairs"), (rl_reinforce, "pairs"), (rl_reinforce, "live")])
def test_other_algorithms_go_on_bitwise_from_a_checkpoint(tmp_path, algorithm, basis):
    settings = {"basis": basis, "projection": "one_sided", "basis_refresh": 3} | OTHERS[algorithm]
    settings |= {"num_generations": 4} if basis == "live" else {"pair_count": 4}
    unbroken = trainer_of("ds", algorithm, **settings)
    if basis == "live":
        add_contrasts(unbroken)
    for _ in range(2):
        unbroken.step()
    assert unbroken.projector.basis is not None
    _, *saved = load_checkpoint(write_checkpoint(tmp_path, 2, *unbroken.state()))
    resumed = trainer_of("ds", algorithm, **settings)
    resumed.restore(*saved)
    for _ in range(2):
        a, b = ({k: v for k, v in t.step()[0].items() if not k.startswith("time/")} for t in (unbroken, resumed))
        assert a == b and same(values(unbroken), values(resumed))


@pytest.mark.parametrize("algorithm, settings, message", [
    (rl_ppo, {"basis": "live", "basis_refresh": 2}, "PPO samples one of each"),
    (rl_ppo, {"basis": "pairs", "projection": "no_gate", "removed": "route", "routing": "dual"}, "leave --routing and"),
    (rl_ppo, {"projection": "no_gate"}, "--projection does nothing without a --basis"),
    (rl_ppo, {"basis": "pairs", "bad_lr_scale": 1.0}, "--bad_lr_scale does nothing without --routing dual"),
])  # fmt: skip
def test_what_another_algorithm_can_not_project_is_named(algorithm, settings, message):
    with pytest.raises(ValueError, match=message):
        algorithm.Config(**settings)
