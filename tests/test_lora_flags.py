"""Alpha, dropout and targets of a LoRA: what flags make of them, and dropout against plain PyTorch, PEFT and an undropped run."""
import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from test_adapters import ids_of, lora, shake, their_model, tiny
from test_combinations import TOKENIZER, Worth
from test_rl_ppo import small
from torch.utils.checkpoint import checkpoint

import adapters
import rl_grpo
import rl_gumbel
import rl_ppo
import rl_reinforce
from adapter_files import export_peft, load_adapter, save_adapter, spec_from_dict
from adapters import (
    AdapterFlags,
    AdapterSpec,
    Branch,
    LoRALinear,
    adapter_tensors,
    attach,
    branch_parameters,
    dropping,
    preset,
    reference,
    set_scales,
    spec_of,
)  # fmt: skip
from model import hf_name
from routing import gates
from sampling import Sampler

DUAL = replace(lora({"good": (3, 6.0), "bad": (2, 0.5)}), dropout=0.3)
TARGETS = {"gpt2": "c_attn,c_proj", "gpt_neox": "query_key_value", "llama": "q_proj, up_proj"}

# --------------------------------------------------------------------------------------------------------------- flags


def asked(name: str, dual=False, **flags) -> AdapterSpec:
    return spec_of({"lora_config": name, "seed": 3} | asdict(AdapterFlags()) | flags, dual)


def test_the_seeds_lora_is_rank_16_with_alpha_32():
    for name in ("r8", "r16f0"):
        assert asked(name, lora_alpha=32.0, lora_dropout=0.05, lora_targets="c_attn, c_proj") == AdapterSpec(
            "lora", (Branch("adapter", 16, 32.0),), ("c_attn", "c_proj"), 1, 0.05)  # fmt: skip


@pytest.mark.parametrize("name", ["r8", "r8f3", "r6hof2", "r16f0"])
def test_branches_have_the_scale_of_the_whole(name):
    one, two = (asked(name, dual, lora_alpha=32.0) for dual in (False, True))
    assert one.branches[0].alpha == 32.0
    assert [b.alpha for b in two.branches] == pytest.approx([32 * b.rank / one.branches[0].rank for b in two.branches])
    assert two == replace(preset(name, True), branches=two.branches), "nothing else changes"


def test_without_the_flags_it_is_the_preset():
    for name in ("r8", "m4", "ds", "r5hof3", "full", "bundles"):
        assert asked(name) == spec_of({"lora_config": name}, False) == preset(name, False)
    assert asked("ds4", lora_targets="c_fc").targets == ("c_fc",)


@pytest.mark.parametrize("name, flags, message", [
    ("m4", {"lora_alpha": 8.0}, "--lora_alpha is of adapters lora, lora_b, and --lora_config m4 is mlp"),
    ("ds", {"lora_alpha": 8.0}, "--lora_alpha is of"), ("full", {"lora_dropout": 0.1}, "--lora_dropout is of"),
    ("ds8", {"lora_dropout": 0.1}, "--lora_dropout is of"), ("bundles", {"lora_targets": "c_attn"}, "--lora_targets is of"),
    ("full", {"lora_targets": "c_attn"}, "--lora_targets is of"), ("r4", {"lora_dropout": 1.0}, "below 1, not 0.0 and 1.0"),
    ("r4", {"lora_dropout": -0.1}, "--lora_dropout"), ("r4", {"lora_alpha": -1.0}, "--lora_alpha"),
    ("r0", {"lora_alpha": 2.0}, "unknown --lora_config"), ("r4", {"lora_alpha": float("nan")}, "--lora_alpha must be"),
])  # fmt: skip
def test_flags_that_do_nothing_or_make_no_sense_are_refused(name, flags, message):
    with pytest.raises(ValueError, match=message):
        asked(name, **flags)


def test_a_spec_refuses_dropout_where_there_is_none():
    for kind, rate in (("mlp", 0.1), ("delta_s", 0.1), ("lora", 1.0), ("lora", -0.1)):
        with pytest.raises(ValueError, match="dropout is a share"):
            AdapterSpec(kind, (Branch("a", 2, 2.0),), dropout=rate)


# ------------------------------------------------------------------------------------------ dropout, and what it equals


def recorded(monkeypatch) -> list[torch.Tensor]:
    """What F.dropout multiplies its inputs by, call by call."""
    calls, real = [], F.dropout

    def dropout(x, p):
        calls.append(real(torch.ones_like(x), p))
        return x * calls[-1]

    monkeypatch.setattr(adapters.F, "dropout", dropout)
    return calls


def plainly(monkeypatch, multipliers: list[torch.Tensor]) -> None:
    """LoRA with dropout, written out."""
    left = iter(multipliers)

    def plain(self, x):
        z, y = x * next(left), F.linear(x, self.base.weight, self.base.bias)
        for name, part in self.parts.items():
            y = y + self.adapter.scales[name] * self.factor[name] * (z @ part.A.t() @ part.B.t())
        return y

    monkeypatch.setattr(LoRALinear, "forward", plain)


@pytest.mark.parametrize("kind", ["lora", "lora_b"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_values_and_routed_gradients_are_those_of_the_formula(family, kind, monkeypatch):
    """Each sample's gradient by plain autograd, weighted by its gate and summed."""
    model = shake(attach(tiny(family), replace(DUAL, kind=kind))).double()
    set_scales(model, 0.7, -1.3)
    groups, ids = branch_parameters(model), ids_of(model)
    weights = {"good": torch.tensor([1.0, 0.0, 0.5]), "bad": torch.tensor([0.0, 1.0, 1.0])}
    multipliers = recorded(monkeypatch)
    with dropping(model, 5):
        logits = model(ids)
        with gates(model, **weights):
            logits.square().sum().backward()
    mine = {name: p.grad for group in groups.values() for name, p in group.items()}
    assert multipliers and all(len(m.unique()) == 2 for m in multipliers)
    plainly(monkeypatch, multipliers)
    expected = model(ids)
    assert (logits - expected).abs().max() < 1e-11
    for branch, group in groups.items():
        by_sample = []
        for i in range(3):
            plainly(monkeypatch, multipliers)
            by_sample.append(torch.autograd.grad(model(ids)[i].square().sum(), list(group.values())))
        for (name, _), *grads in zip(group.items(), *by_sample):
            wanted = sum(w * g for w, g in zip(weights[branch], grads))
            assert (mine[name] - wanted).abs().max() < 1e-11 * max(1, wanted.abs().max()), name


@pytest.mark.parametrize("family", TARGETS)
def test_peft_drops_the_same_inputs_and_gives_the_same_gradients(family, tmp_path):
    peft, base = pytest.importorskip("peft"), tiny(family)
    spec = asked("r2", lora_alpha=8.0, lora_dropout=0.4, lora_targets=TARGETS[family])
    model, ids = shake(attach(tiny(family), spec)), ids_of(base)
    folder = export_peft(model, "adapter", tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == 0.4
    peer = peft.PeftModel.from_pretrained(their_model(base, tmp_path / "base"), folder, is_trainable=True).eval()
    for name, module in peer.named_modules():
        if "lora_dropout" in name:
            module.train()
    with dropping(model, 7):
        state = torch.get_rng_state()
        mine = model(ids)
    mine.square().sum().backward()
    torch.set_rng_state(state)
    theirs = peer(ids).logits
    theirs.square().sum().backward()
    assert (mine - theirs).abs().max() < 5e-5 and (mine - model(ids)).abs().max() > 1e-2
    theirs = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    for path, module in model.named_modules():
        for side in "AB" if isinstance(module, LoRALinear) else "":
            grad = theirs.pop(f"base_model.model.{hf_name(path, family)}.lora_{side}.default.weight")
            assert (getattr(module.parts["adapter"], side).grad - grad).abs().max() < 1e-4 * grad.abs().max(), path
    assert not theirs and load_adapter(tiny(family), folder).adapter.spec.dropout == 0.4


def test_gpt2s_two_modules_named_c_proj_are_both_adapted():
    model = attach(tiny("gpt2"), asked("r2", lora_targets="c_attn,c_proj"))
    adapted = {name.split(".", 2)[2] for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert adapted == {"self_attn.c_attn", "self_attn.c_proj", "mlp.c_proj"}


def test_an_input_is_kept_on_average():
    layer = next(m for m in shake(attach(tiny("gpt2"), DUAL)).modules() if isinstance(m, LoRALinear))
    layer.adapter.dropping = True
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        many = layer(x.expand(40_000, -1)).detach()
    layer.adapter.dropping = False
    error = many.std(0) / 200
    assert ((many.mean(0) - layer(x)[0]).abs() < 5 * error).all() and (error > 1e-3).any()


def test_nothing_is_dropped_but_where_gradients_are_made():
    model, ids = shake(attach(tiny("gpt2"), DUAL)), ids_of(tiny("gpt2"))
    sampler = Sampler(model)
    plain, state = model(ids), torch.get_rng_state()

    def rollout():
        sampler.refresh()
        return sampler(ids, torch.ones_like(ids, dtype=torch.bool), 2, 4, (0,), 0, torch.Generator().manual_seed(0), rl_ppo.Law())

    sampled = rollout()
    with dropping(model, 1):
        with torch.no_grad():
            assert torch.equal(model(ids), plain)
            assert torch.equal(rollout().logprobs, sampled.logprobs)
        dropped = model(ids)
        with reference(model) as base:
            assert torch.equal(base(ids), tiny("gpt2")(ids))
    assert not torch.allclose(dropped, plain) and torch.equal(model(ids), plain)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is given back"
    for seed, same in ((1, True), (2, False)):
        with dropping(model, seed):
            assert torch.equal(model(ids), dropped) == same
    with pytest.raises(KeyError), dropping(model, 1):
        raise KeyError
    assert torch.equal(model(ids), plain)


def test_a_fresh_adapter_with_dropout_is_the_base_to_the_bit():
    for family in TARGETS:
        model = attach(tiny(family), DUAL)
        with dropping(model, 1):
            assert torch.equal(model(ids_of(model)), tiny(family)(ids_of(model)))


def test_in_bfloat16_branches_stay_in_fp32():
    model = shake(attach(tiny("gpt2").bfloat16(), DUAL))
    layer = next(m for m in model.modules() if isinstance(m, LoRALinear))
    x = torch.randn(2, 3, 16).bfloat16().requires_grad_()
    with dropping(model, 1):
        state = torch.get_rng_state()
        y = layer(x)
        torch.set_rng_state(state)
        z = F.dropout(x.float(), 0.3)
    exact = layer.base(x).float() + sum(layer.factor[n] * (z @ p.A.t() @ p.B.t()) for n, p in layer.parts.items())
    assert y.dtype == torch.bfloat16 and torch.equal(y, exact.bfloat16())


def test_activation_checkpointing_drops_the_same_inputs_again():
    model, ids, found = shake(attach(tiny("gpt2"), DUAL)), ids_of(tiny("gpt2")), []
    for recomputed in (False, True):
        model.zero_grad()
        with dropping(model, 3):
            (checkpoint(model, ids, use_reentrant=False) if recomputed else model(ids)).square().sum().backward()
        found.append([p.grad.clone() for group in branch_parameters(model).values() for p in group.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_file_says_its_dropout_and_older_files_have_none(tmp_path):
    save_adapter(attach(tiny("gpt2"), DUAL), tmp_path / "a.safetensors")
    assert load_adapter(tiny("gpt2"), tmp_path / "a.safetensors").adapter.spec == DUAL
    older = {key: value for key, value in asdict(DUAL).items() if key != "dropout"}
    assert spec_from_dict(older) == replace(DUAL, dropout=0.0)


# ------------------------------------------------------------------------------------------------------ in the loops

SETTINGS = {"batch_size": 8, "max_new_tokens": 2, "max_steps": 4, "lr": 3e-2, "seed": 3}
ALGORITHMS = {
    "grpo": (rl_grpo, {"num_generations": 4, "beta": 0.05}), "grpo twice": (rl_grpo, {"num_generations": 4, "num_iterations": 2}),
    "grpo routed": (rl_grpo, {"num_generations": 4, "routing": "dual"}),
    "ppo": (rl_ppo, {"num_epochs": 1, "num_minibatches": 2, "target_kl": 0.0}), "reinforce": (rl_reinforce, {}),
    "reinforce, kl as a loss": (rl_reinforce, {"kl_in": "loss"}), "grade": (rl_gumbel, {"top_p": 1.0, "recompute_every": 1}),
    "ste routed": (rl_gumbel, {"top_p": 1.0, "estimator": "ste", "routing": "dual"}),
}  # fmt: skip


def trainer_of(name: str, dropout: float):
    module, settings = ALGORITHMS[name]
    config = module.Config(**SETTINGS, **settings)
    model = small("r2", dual=config.dual)
    model.adapter.spec = replace(model.adapter.spec, dropout=dropout)
    return module.Trainer(model, Worth(), TOKENIZER, config)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_sampled_law_is_the_undropped_policy_and_runs_resume(name):
    module = ALGORITHMS[name][0]
    whole, plain, broken = trainer_of(name, 0.5), trainer_of(name, 0.0), trainer_of(name, 0.5)
    for step in range(3):
        metrics, _ = whole.step()
        assert metrics.get("logprob_gap", 0) < 1e-5, "though B is not 0 any more"
        assert step or abs(metrics["kl"]) < (1e-6 if module is rl_gumbel else 1e-30)
        plain.step()
        if step == 1:
            tensors, state = broken.state()
            tensors = {key: value.clone() for key, value in tensors.items()}
            broken = trainer_of(name, 0.5)
            broken.restore(tensors, state)
        broken.step()
    mine, undropped, resumed = (adapter_tensors(t.model) for t in (whole, plain, broken))
    assert all(torch.equal(mine[key], resumed[key]) for key in mine)
    assert any(not torch.equal(mine[key], undropped[key]) for key in mine)


def test_at_rate_0_dropout_is_not_even_called(monkeypatch):
    monkeypatch.setattr(adapters.F, "dropout", None)
    monkeypatch.setattr(torch.random, "fork_rng", None)
    trainer_of("grpo", 0.0).step()
    model = shake(attach(tiny("llama"), preset("r2", dual=True)))
    with dropping(model, 1):
        model(ids_of(model)).sum().backward()
