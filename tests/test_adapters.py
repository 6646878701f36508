"""Branches on a frozen base: fresh ones change no bit, gradients are autograd's, files and PEFT give the same logits back."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import adapters
from adapter_files import export_peft, load_adapter, merge, save_adapter
from adapters import (
    AdapterSpec,
    Branch,
    BranchedMLP,
    DualLoRALinear,
    LoRALinear,
    adapter_tensors,
    attach,
    branch_parameters,
    parameters_of,
    preset,
    reference,
    scaled,
    set_adapter_tensors,
    set_scales,
)  # fmt: skip
from gates import AddBranches, Gate, GatedLinear
from model import Decoder, ModelConfig, save

LLAMA = ModelConfig("llama", 37, 16, 4, 4, 2, 6, 24, 32, tied=True, rotary_dim=6)
CONFIGS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True, tied=False),
    "gpt2": ModelConfig("gpt2", 37, 16, 4, 4, 4, 4, 64, 32, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True,
                        gated_mlp=False, rms_norm=False, activation="gelu_new"),
    "gpt_neox": ModelConfig("gpt_neox", 37, 16, 4, 2, 2, 8, 40, 32, tied=False, rotary_dim=4, qkv_bias=True, out_bias=True,
                            mlp_bias=True, gated_mlp=False, rms_norm=False, parallel_residual=True, activation="gelu"),
}  # fmt: skip
FAMILIES = ("llama", "gpt2", "gpt_neox")
PRESETS = ("r1", "r2", "r4", "r8", "r16", "r32", "r1h", "r8h", "r32f16", "r32f4", "r32f1", "r32f0", "m16", "m16f4", "m8f0",
           "r6o", "r5hof3", "ds", "ds5", "dsf3", "ds5h")  # fmt: skip


def tiny(family: str, seed: int = 0) -> Decoder:
    """A random decoder in which every parameter matters: biases and norms too, and logits of order 1."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(CONFIGS[family])
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / math.sqrt(p.shape[1]) if p.dim() == 2 else p + 0.2 * noise)
    return model.requires_grad_(False)


def shake(model: Decoder, seed: int = 1) -> Decoder:
    """Random values in every branch tensor, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_tensors(model).values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def ids_of(model: Decoder, seed: int = 2, batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lora(branches: dict[str, tuple[int, float]], targets=(), stride=1) -> AdapterSpec:
    return AdapterSpec("lora", tuple(Branch(n, r, a) for n, (r, a) in branches.items()), targets, stride)


# ---------------------------------------------------------------------------------- promise 5: a fresh adapter is the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRESETS)
def test_fresh_adapter_is_the_base_to_the_bit(name, family, dtype):
    for dual in (True, False):
        model = tiny(family).to(dtype)
        ids = ids_of(model)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, :3] = False
        before, before_masked = model(ids), model(ids, mask)
        attach(model, preset(name, dual), seed=5)
        assert torch.equal(model(ids), before) and torch.equal(model(ids, mask), before_masked)
        with reference(model) as base:
            assert torch.equal(base(ids), before)
        shake(model)
        assert not torch.equal(model(ids), before)
        with reference(model) as base, torch.no_grad():
            assert torch.equal(base(ids), before)
        assert not torch.equal(model(ids), before)


def test_full_fine_tuning_keeps_a_frozen_reference():
    model = tiny("llama")
    ids = ids_of(model)
    before = model(ids)
    attach(model, preset("full", dual=False))
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(model(ids), before)
    names = list(branch_parameters(model)["full"])
    assert names == [n for n, _ in model.named_parameters()]  # the frozen copy is no part of the model
    optimizer = torch.optim.AdamW(parameters_of(model, "full"), lr=0.1)
    model(ids).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(ids), before)
    with reference(model) as base:
        assert torch.equal(base(ids), before) and not any(p.requires_grad for p in base.parameters())
    assert torch.equal(merge(model)(ids), model(ids))


@pytest.mark.parametrize("name, family", [("r4", "llama"), ("r4", "gpt2"), ("r4", "gpt_neox"), ("m4", "llama"), ("m4", "gpt2")])
def test_exactly_one_side_is_zero_and_every_branch_learns(name, family):
    model = attach(tiny(family), preset(name, dual=True))
    zero_sides = {"A": False, "B": True, "gate": False, "up": False, "down": True}
    for group in branch_parameters(model).values():
        assert group
        for path, p in group.items():
            assert bool((p == 0).all()) == zero_sides[path.split(".")[-1]]
            assert p.dtype == torch.float32 and p.requires_grad
    optimizer = torch.optim.SGD([p for g in branch_parameters(model).values() for p in g.values()], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(ids_of(model)).square().sum().backward()
        for group in branch_parameters(model).values():
            for path, p in group.items():
                assert (p.grad.norm() > 0) == (step > 0 or zero_sides[path.split(".")[-1]]), path
        optimizer.step()
    assert all(p.grad is None for n, p in model.named_parameters() if ".parts." not in n)


@pytest.mark.parametrize("inputs", [16, 400])
def test_A_is_kaiming_uniform_of_sqrt_5(inputs):
    layer = adapters.LowRank(Branch("x", 32, 32.0), inputs, 8, torch.Generator().manual_seed(0), "cpu")
    bound = inputs**-0.5  # sqrt(6 / ((1 + 5) * inputs))
    assert layer.A.abs().max() <= bound and layer.A.abs().max() > 0.95 * bound
    assert abs(layer.A.std().item() / (bound / 3**0.5) - 1) < 0.1


# --------------------------------------------------------------------------- AddBranches against autograd and its slow twin

SCALES, RANKS = (0.5, -2.0, 3.0), (3, 1, 2)


def layer_inputs(dtype, leading=(2, 5), inputs=6, outputs=4):
    x, weight = rand(*leading, inputs, seed=1, dtype=dtype), rand(outputs, inputs, seed=2, dtype=dtype)
    bias = rand(outputs, seed=3, dtype=dtype)
    pairs = []
    for k, r in enumerate(RANKS):
        pairs += [rand(r, inputs, seed=10 + k, dtype=dtype), rand(outputs, r, seed=20 + k, dtype=dtype)]
    return x.requires_grad_(), weight, bias, [p.requires_grad_() for p in pairs]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("leading", [(2, 5), (7,), (1, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_add_branches_equals_the_plain_formula(dtype, tolerance, leading, with_bias):
    x, weight, bias, pairs = layer_inputs(dtype, leading)
    bias = bias if with_bias else None
    y = AddBranches.apply(x, weight, bias, list(SCALES), [Gate() for _ in SCALES], *pairs)
    plain = x @ weight.t() + (bias if with_bias else 0)
    for s, A, B in zip(SCALES, pairs[0::2], pairs[1::2]):
        plain = plain + s * (x @ A.t()) @ B.t()
    assert (y - plain).abs().max() < tolerance * 10
    upstream = rand(*y.shape, seed=4, dtype=dtype)
    for mine, theirs in zip(torch.autograd.grad(y, [x, *pairs], upstream), torch.autograd.grad(plain, [x, *pairs], upstream)):
        assert (mine - theirs).abs().max() < tolerance * max(1, theirs.abs().max())


def test_add_branches_gradcheck():
    x, weight, bias, pairs = layer_inputs(torch.float64)
    gates = [Gate() for _ in SCALES]

    def branches(x, *pairs):
        return AddBranches.apply(x, weight, bias, list(SCALES), gates, *pairs)

    assert torch.autograd.gradcheck(branches, (x, *pairs))


GATES = {
    "open": None, "number": 0.3, "negative": -1.5, "closed": 0.0, "scalar tensor": torch.tensor(0.25),
    "per sample": torch.tensor([1.0, 0.0]), "soft per sample": torch.tensor([0.2, -0.7], dtype=torch.float64),
    "all zero": torch.zeros(2), "all one": torch.ones(2), "bool": torch.tensor([False, True]),
    "per token": torch.arange(10.0).view(2, 5) / 7 - 0.5,
}  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("first", GATES)
@pytest.mark.parametrize("second", ["open", "closed", "per token", "soft per sample"])
def test_gated_gradients_equal_the_slow_twin_and_a_sum_over_positions(first, second, dtype, tolerance):
    """Fast path, `GatedLinear` per matrix, and one plain autograd call per position whose results are weighted and summed."""
    x, weight, bias, pairs = layer_inputs(dtype)
    upstream = rand(2, 5, 4, seed=4, dtype=dtype)
    gates = [Gate(), Gate(), Gate()]
    for gate, name in zip(gates, (first, second, "open")):
        gate.set(GATES[name])

    def fast():
        return AddBranches.apply(x, weight, bias, list(SCALES), gates, *pairs)

    def slow():
        y = F.linear(x, weight, bias)
        for s, A, B, gate in zip(SCALES, pairs[0::2], pairs[1::2], gates):
            y = y + s * GatedLinear.apply(GatedLinear.apply(x, A, gate), B, gate)
        return y

    expected = [torch.zeros_like(p) for p in pairs]
    for b in range(2):
        for t in range(5):
            for k, name in enumerate((first, second, "open")):
                A, B = pairs[2 * k : 2 * k + 2]
                grads = torch.autograd.grad(SCALES[k] * (x[b, t] @ A.t()) @ B.t(), [A, B], upstream[b, t])
                w = torch.as_tensor(1.0 if GATES[name] is None else GATES[name], dtype=torch.float64)
                w = w.item() if w.dim() == 0 else w[b].item() if w.dim() == 1 else w[b, t].item()
                for i in range(2):
                    expected[2 * k + i] += w * grads[i]
    x_grads = []
    for forward in (fast, slow):
        x.grad = None
        for p in pairs:
            p.grad = None
        forward().backward(upstream)
        x_grads.append(x.grad)
        for k, name in enumerate((first, second, "open")):
            for p, e in zip(pairs[2 * k : 2 * k + 2], expected[2 * k : 2 * k + 2]):
                if name in ("closed", "all zero"):
                    assert p.grad is None
                else:
                    assert (p.grad - e).abs().max() < tolerance * max(1, e.abs().max()), (name, k)
    assert (x_grads[0] - x_grads[1]).abs().max() < tolerance * x_grads[1].abs().max()


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("forward", ["fast", "slow"])
def test_the_gradient_of_x_is_bitwise_that_of_open_gates(forward, name):
    x, weight, bias, pairs = layer_inputs(torch.float32)
    gates, upstream = [Gate(), Gate(), Gate()], rand(2, 5, 4, seed=4, dtype=torch.float32)

    def x_grad():
        if forward == "fast":
            y = AddBranches.apply(x, weight, bias, list(SCALES), gates, *pairs)
        else:
            y = GatedLinear.apply(GatedLinear.apply(x, pairs[0], gates[0]), pairs[1], gates[0])
        return torch.autograd.grad(y, [x, *pairs], upstream, allow_unused=True)[0]

    ungated = x_grad()
    for gate in gates:
        gate.set(GATES[name])
    assert torch.equal(x_grad(), ungated)


def test_add_branches_in_bfloat16_computes_branches_in_fp32():
    x, weight, bias, pairs = layer_inputs(torch.float32)
    x16, weight16, bias16 = x.detach().bfloat16().requires_grad_(), weight.bfloat16(), bias.bfloat16()
    y = AddBranches.apply(x16, weight16, bias16, list(SCALES), [Gate() for _ in SCALES], *pairs)
    exact = x16.float() @ weight16.float().t() + bias16.float()
    for s, A, B in zip(SCALES, pairs[0::2], pairs[1::2]):
        exact = exact + s * (x16.float() @ A.t()) @ B.t()
    assert y.dtype == torch.bfloat16 and (y.float() - exact).abs().max() < 2**-7 * exact.abs().max()
    upstream = rand(*y.shape, seed=4, dtype=torch.bfloat16)
    grads = torch.autograd.grad(y, [x16, *pairs], upstream)
    wanted = torch.autograd.grad(exact, [x16, *pairs], upstream.float())
    assert grads[0].dtype == torch.bfloat16 and (grads[0] - wanted[0]).abs().max() < 2**-6 * wanted[0].abs().max()
    for mine, theirs in zip(grads[1:], wanted[1:]):  # parameters: no rounding to bfloat16 on the way
        assert mine.dtype == torch.float32 and (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_add_branches_refuses_a_second_derivative():
    x, weight, bias, pairs = layer_inputs(torch.float64)
    y = AddBranches.apply(x, weight, bias, list(SCALES), [Gate() for _ in SCALES], *pairs)
    (grad,) = torch.autograd.grad(y.square().sum(), [pairs[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("weight", [torch.ones(3) / 2, torch.ones(2, 4) / 2, torch.ones(2, 1) / 2])
def test_gate_weights_that_do_not_fit_the_batch_are_refused(weight):
    x, base, bias, pairs = layer_inputs(torch.float32)
    gates = [Gate(), Gate(), Gate()]
    gates[1].set(weight)
    with pytest.raises(ValueError, match="do not fit a batch"):
        AddBranches.apply(x, base, bias, list(SCALES), gates, *pairs).sum().backward()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_whole_model_in_fp64_equals_the_plain_formula(family, monkeypatch):
    """Logits and parameter gradients of an adapted model against LoRA written out, alpha other than rank, scales other than 1."""
    model = shake(attach(tiny(family), lora({"good": (3, 6.0), "bad": (2, 0.5)}))).double()
    set_scales(model, 0.7, -1.3)
    parameters = [p for group in branch_parameters(model).values() for p in group.values()]
    ids = ids_of(model)
    logits = model(ids)
    assert logits.dtype == torch.float64
    mine = torch.autograd.grad(logits.square().sum(), parameters)

    def plain(self, x):
        y = F.linear(x, self.base.weight, self.base.bias)
        for part, s, a_over_r in zip(self.parts.values(), (0.7, -1.3), (2.0, 0.25)):
            y = y + s * a_over_r * (x @ part.A.t() @ part.B.t())
        return y

    monkeypatch.setattr(LoRALinear, "forward", plain)
    expected = model(ids)
    assert (logits - expected).abs().max() < 1e-11
    for g, e in zip(mine, torch.autograd.grad(expected.square().sum(), parameters)):
        assert (g - e).abs().max() < 1e-11 * max(1, e.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mlp_branches_equal_the_plain_formula(family, monkeypatch):
    model = shake(attach(tiny(family), preset("m5f3", dual=True))).double()
    set_scales(model, 0.7, -1.3)
    parameters = [p for group in branch_parameters(model).values() for p in group.values()]
    ids = ids_of(model)
    logits = model(ids)
    mine = torch.autograd.grad(logits.square().sum(), parameters)

    def plain(self, x):
        y = self.base(x)
        for part, s in zip(self.parts.values(), (0.7, -1.3)):
            a = x @ part.gate.t()
            y = y + s * (a / (1 + (-a).exp()) * (x @ part.up.t())) @ part.down.t()
        return y

    monkeypatch.setattr(BranchedMLP, "forward", plain)
    expected = model(ids)
    assert logits.dtype == torch.float64 and (logits - expected).abs().max() < 1e-11
    for g, e in zip(mine, torch.autograd.grad(expected.square().sum(), parameters)):
        assert (g - e).abs().max() < 1e-11 * max(1, e.abs().max())


# -------------------------------------------------------------------------------------------- presets, targets, stride


def test_presets():
    ranks = {name: (int(name[1:]), int(name[1:]), 1) for name in ("r1", "r2", "r4", "r8", "r16", "r32", "m16")}
    ranks |= {f"r32f{bad}": (32, bad, 1) for bad in (16, 4, 1, 0)} | {"r1h": (1, 1, 2), "m16f4": (16, 4, 1)}
    for name, (good, bad, stride) in ranks.items():
        kind = "lora" if name[0] == "r" else "mlp"
        both = (Branch("good", good, float(good)), Branch("bad", bad, float(bad)))
        assert preset(name, dual=True) == AdapterSpec(kind, both, (), stride)
        assert preset(name, dual=False) == AdapterSpec(kind, (Branch("adapter", good + bad, float(good + bad)),), (), stride)
    assert preset("full", dual=False) == AdapterSpec("full")
    full = float(adapters.FULL_RANK)
    for name, kind, good, bad, stride in (("r32o", "lora_b", 32.0, 32.0, 1), ("r8hof4", "lora_b", 8.0, 4.0, 2),
                                          ("ds", "delta_s", full, full, 1), ("ds32", "delta_s", 32.0, 32.0, 1),
                                          ("dshf3", "delta_s", full, 3.0, 2)):  # fmt: skip
        both = (Branch("good", int(good), good), Branch("bad", int(bad), bad))
        assert preset(name, dual=True) == AdapterSpec(kind, both, (), stride)
        assert preset(name, dual=False) == AdapterSpec(kind, (Branch("adapter", int(good), good),), (), stride)


@pytest.mark.parametrize("name", ["r0", "r", "x8", "r8g4", "r-1", "m0f4", "r8f", "R8", "8", "", "r8 ", "full2", "r4.5", "ds0",
                                  "dso", "ds4o", "m4o", "ro", "d4", "ds-1"])  # fmt: skip
def test_unknown_presets_are_named_and_the_known_listed(name):
    with pytest.raises(ValueError, match="unknown --lora_config") as error:
        preset(name, dual=True)
    assert repr(name) in str(error.value) and adapters.PRESETS in str(error.value)


def test_full_has_no_branches_to_route_to():
    with pytest.raises(ValueError, match="no branches to route to; use a LoRA or MLP preset"):
        preset("full", dual=True)


def test_r32f0_has_a_bad_branch_without_parameters():
    model = attach(tiny("llama"), preset("r32f0", dual=True))
    assert parameters_of(model, "bad") == [] and len(parameters_of(model, "good")) == 4 * 7 * 2
    set_scales(model, 1, 0)
    model(ids_of(model)).sum().backward()


def adapted(model) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, (LoRALinear, BranchedMLP))}


@pytest.mark.parametrize("family, names", [
    ("llama", {*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))}),
    ("gpt2", {"self_attn.c_attn", "self_attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ("gpt_neox", {"self_attn.query_key_value", "self_attn.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"})])  # fmt: skip
def test_default_targets_are_all_linear_layers_and_stride_skips_layers(family, names):
    for stride in (1, 2, 3):
        model = attach(tiny(family), lora({"good": (2, 2.0), "bad": (1, 1.0)}, stride=stride))
        assert adapted(model) == {f"layers.{i}.{n}" for i in range(0, 4, stride) for n in names}
        assert all(type(m) is DualLoRALinear for m in model.modules() if isinstance(m, LoRALinear))
        mlp = attach(tiny(family), AdapterSpec("mlp", (Branch("a", 2, 2.0),), stride=stride))
        assert adapted(mlp) == {f"layers.{i}.mlp" for i in range(0, 4, stride)}


def test_targets_are_chosen_by_name():
    model = attach(tiny("gpt2"), lora({"x": (2, 2.0)}, targets=("c_proj",)))
    assert adapted(model) == {f"layers.{i}.{part}.c_proj" for i in range(4) for part in ("self_attn", "mlp")}
    with pytest.raises(ValueError, match="unknown adapter target 'q_proj'; a gpt2 has c_attn, c_proj, c_fc"):
        attach(tiny("gpt2"), lora({"x": (2, 2.0)}, targets=("c_attn", "q_proj")))


@pytest.mark.parametrize("make, message", [
    (lambda: AdapterSpec("dora"), "unknown adapter kind 'dora'; known: lora, lora_b, delta_s, mlp, bundles, full"),
    (lambda: lora({}), "at least one branch"),
    (lambda: AdapterSpec("lora", (Branch("a", 2, 2.0), Branch("a", 3, 3.0))), "branch names must differ"),
    (lambda: lora({"a": (-1, 1.0), "b": (1, 1.0)}), "none below"),
    (lambda: lora({"a": (0, 1.0)}), "at least one branch of rank above 0"),
    (lambda: lora({"a": (1, 1.0)}, stride=0), "stride"),
    (lambda: AdapterSpec("mlp", (Branch("a", 2, 2.0),), targets=("gate_proj",)), "targets")])  # fmt: skip
def test_specs_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_attaching_twice_and_wrong_branch_names_are_refused():
    model = attach(tiny("llama"), preset("r2", dual=True))
    with pytest.raises(ValueError, match="has an adapter already"):
        attach(model, preset("r2", dual=True))
    with pytest.raises(ValueError, match="no branch 'ugly'; this adapter has good, bad"):
        parameters_of(model, "ugly")
    with pytest.raises(ValueError, match="good and bad, not"):
        DualLoRALinear(torch.nn.Linear(2, 2), attach(tiny("llama"), preset("r2", dual=False)).adapter, None)


def test_the_seed_draws_the_branches_and_leaves_the_global_generator_alone():
    for family, name in (("llama", "r4"), ("gpt2", "m4")):
        model, state = tiny(family), torch.get_rng_state()
        attach(model, preset(name, dual=True), seed=1)
        assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (adapter_tensors(attach(tiny("llama"), preset("r4", dual=True), seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a) and not all(torch.equal(a[n], c[n]) for n in a)
    draws = [t for n, t in a.items() if n.endswith(".A") and t.shape[1] == 16]
    assert len({tuple(t.flatten().tolist()) for t in draws}) == len(draws)  # good and bad, and the layers, differ


# ---------------------------------------------------------------------------------------------------------- scales


def test_scales_come_back_whatever_happens():
    model = shake(attach(tiny("llama"), preset("r4", dual=True)))
    ids = ids_of(model)
    set_scales(model, 0.5, bad_scale=2)
    logits = model(ids)
    with pytest.raises(RuntimeError, match="boom"):
        with scaled(model, good=0, bad=3):
            assert model.adapter.scales == {"good": 0, "bad": 3}
            with pytest.raises(KeyError):
                with reference(model) as base:
                    assert set(base.adapter.scales.values()) == {0.0}
                    raise KeyError
            assert model.adapter.scales == {"good": 0, "bad": 3}
            raise RuntimeError("boom")
    assert model.adapter.scales == {"good": 0.5, "bad": 2} and torch.equal(model(ids), logits)
    with pytest.raises(ValueError, match="no branch 'ugly' to scale; this adapter has good, bad"):
        with scaled(model, good=9, ugly=1):
            pass
    with pytest.raises(ValueError, match="no branch 'bad'"):
        set_scales(attach(tiny("llama"), preset("r4", dual=False)), bad_scale=0)
    assert model.adapter.scales == {"good": 0.5, "bad": 2} and torch.equal(model(ids), logits)


@pytest.mark.parametrize("name", ["r4", "m4"])
def test_a_branch_at_scale_zero_is_absent(name):
    """Forward: the other branch alone. Backward: no gradient at all, not even zeros."""
    model = shake(attach(tiny("llama"), preset(name, dual=True)))
    ids = ids_of(model)
    alone = attach(tiny("llama"), AdapterSpec(preset(name, True).kind, (Branch("good", 4, 4.0),)))
    set_adapter_tensors(alone, {n: t for n, t in adapter_tensors(model).items() if ".good." in n}, "test")
    with scaled(model, bad=0):
        logits = model(ids)
        logits.square().sum().backward()
    assert torch.equal(logits, alone(ids))
    assert all(p.grad is None for p in parameters_of(model, "bad"))
    assert all(p.grad is not None for p in parameters_of(model, "good"))


# ------------------------------------------------------------------------------------------------------ save and load


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", [
    lora({"good": (3, 6.0), "bad": (1, 0.5)}, stride=2), lora({"x": (2, 5.0)}), preset("m5f2", dual=True),
    preset("r4f0", dual=True), AdapterSpec("full"), preset("ds5f2", dual=True), preset("ds", dual=False),
    preset("r6of3", dual=True)])  # fmt: skip
def test_save_and_load_are_bitwise_and_the_file_says_what_it_is(family, spec, tmp_path):
    if spec.branches and spec.branches[0].name == "x":
        spec = replace(spec, targets={"llama": ("v_proj", "up_proj"), "gpt2": ("c_fc",), "gpt_neox": ("dense",)}[family])
    model = shake(attach(tiny(family), spec, seed=3))
    save_adapter(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["adapter"])
    assert said == {
        "kind": spec.kind, "targets": list(spec.targets), "stride": spec.stride, "dropout": 0.0,
        "branches": [{"name": b.name, "rank": b.rank, "alpha": b.alpha} for b in spec.branches],
    }  # fmt: skip
    again = load_adapter(tiny(family), tmp_path / "a.safetensors")
    assert again.adapter.spec == spec
    mine, theirs = adapter_tensors(model), adapter_tensors(again)
    assert list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)
    ids = ids_of(model)
    assert torch.equal(model(ids), again(ids))
    with reference(again) as base:
        assert torch.equal(base(ids), tiny(family)(ids))


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = attach(tiny("llama"), preset("r2", dual=True))
    save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is in one of them only"):
        load_adapter(tiny("gpt2"), tmp_path / "a.safetensors")
    wide = Decoder(replace(LLAMA, ffn=32))
    with pytest.raises(ValueError, match="has shape"):
        load_adapter(wide, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="cannot read adapter"):
        load_adapter(tiny("llama"), tmp_path / "nowhere.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot read adapter"):
        load_adapter(tiny("llama"), tmp_path / "cut.safetensors")


# -------------------------------------------------------------------------------------- PEFT and transformers as peers


def their_model(model: Decoder, folder):
    """transformers' own model of the same base weights."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(save(model, folder)).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("stride", [1, 2])
def test_peft_gives_the_same_logits_for_each_branch(family, stride, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny(family)
    ids = ids_of(base)
    model = shake(attach(tiny(family), lora({"good": (3, 6.0), "bad": (2, 1.0)}, stride=stride)))
    for branch, scales in (("good", (1, 0)), ("bad", (0, 1))):
        folder = export_peft(model, branch, tmp_path / branch)
        said = json.loads((folder / "adapter_config.json").read_text())
        assert said["fan_in_fan_out"] == (family == "gpt2")  # PEFT would mend it, with a warning
        peer = peft.PeftModel.from_pretrained(their_model(base, tmp_path / "base"), folder).eval()
        set_scales(model, *scales)
        with torch.no_grad():
            theirs, mine = peer(ids).logits, model(ids)
            assert (mine - theirs).abs().max() < 2e-5
            assert (mine - base(ids)).abs().max() > 1e-2  # the branch matters
        again = load_adapter(tiny(family), folder)
        assert torch.equal(again(ids), mine) and again.adapter.names == ["adapter"]


@pytest.mark.parametrize("family, targets", [
    ("llama", ["q_proj", "v_proj"]), ("llama", "all-linear"), ("gpt2", ["c_attn"]), ("gpt2", "all-linear"),
    ("gpt_neox", ["query_key_value"]), ("gpt_neox", "all-linear")])  # fmt: skip
def test_an_adapter_that_peft_saved_loads_with_equal_logits(family, targets, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny(family)
    ids = ids_of(base)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
    peer = peft.get_peft_model(their_model(base, tmp_path / "base"), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
        theirs = peer(ids).logits
    peer.save_pretrained(tmp_path / "adapter")
    model = load_adapter(tiny(family), tmp_path / "adapter", branch="good")
    assert model.adapter.spec.branches == (Branch("good", 3, 7.0),)
    assert (model(ids) - theirs).abs().max() < 2e-5
    assert (model(ids) - base(ids)).abs().max() > 1e-2
    # the bare file: alpha is asked for, and then taken
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not say its alpha; pass alpha"):
        load_adapter(tiny(family), bare)
    assert torch.equal(load_adapter(tiny(family), bare, alpha=7)(ids), model(ids))
    assert not torch.allclose(load_adapter(tiny(family), bare, alpha=14)(ids), model(ids))


@pytest.mark.parametrize("option, value", [
    ("use_dora", True), ("use_rslora", True), ("alpha_pattern", {"q_proj": 3}), ("rank_pattern", {"q_proj": 3})])  # fmt: skip
def test_what_peft_can_do_and_this_library_cannot_is_refused(option, value, tmp_path):
    folder = export_peft(attach(tiny("llama"), preset("r2", dual=True)), "good", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {option: value}))
    with pytest.raises(ValueError, match="not supported"):
        load_adapter(tiny("llama"), folder)


def test_export_of_what_peft_has_no_layout_for_is_refused(tmp_path):
    for name, branch in (("m4", "good"), ("r4f0", "bad"), ("r4", "ugly")):
        with pytest.raises(ValueError, match=f"'{branch}' of this .* adapter is none"):
            export_peft(attach(tiny("llama"), preset(name, dual=True)), branch, tmp_path)
    with pytest.raises(ValueError, match="names no linear layer of this gpt2 model"):
        load_adapter(tiny("gpt2"), export_peft(attach(tiny("llama"), preset("r2", dual=True)), "good", tmp_path))


# ------------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("family, spec", [
    *[(family, lora({"good": (3, 6.0), "bad": (2, 1.0)}, stride=stride)) for family in CONFIGS for stride in (1, 2)],
    *[(family, preset("dsf3", dual=True)) for family in CONFIGS], ("gpt2", preset("r6of3", dual=True)),
    ("llama", preset("m5f3", dual=True)), ("qwen3", preset("m5", dual=False)), ("llama", preset("m5f0", dual=True))])  # fmt: skip
def test_merge_equals_the_adapted_model_and_transformers_loads_it(family, spec, tmp_path):
    model = shake(attach(tiny(family), spec))
    set_scales(model, **{name: s for name, s in zip(model.adapter.names, (0.7, -1.3))})
    ids = ids_of(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for scales in ({}, {model.adapter.names[0]: 0.0}, dict.fromkeys(model.adapter.names, 0.0)):
        plain = merge(model, **scales)
        with scaled(model, **scales), torch.no_grad():
            adapted_logits = model(ids)
        assert not hasattr(plain, "adapter") and not adapted(plain)
        assert (plain(ids) - adapted_logits).abs().max() < 2e-5
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and hasattr(model, "adapter")
    plain = merge(model)
    with torch.no_grad():
        theirs = their_model(plain, tmp_path)(ids).logits
    assert (theirs - model(ids)).abs().max() < 2e-5
    attach(plain, preset("r2", dual=True))  # a merged model is a base like any other


def test_merge_in_fp64_is_exact():
    model = shake(attach(tiny("llama"), preset("r3f2", dual=True))).double()
    assert (merge(model)(ids_of(model)) - model(ids_of(model))).abs().max() < 1e-12
    assert torch.equal(merge(model, good=0, bad=0)(ids_of(model)), tiny("llama").double()(ids_of(model)))


@pytest.mark.parametrize("family, name", [("gpt2", "m4"), ("gpt_neox", "m4"), ("llama", "m4h")])
def test_mlp_branches_that_cannot_merge_are_refused(family, name):
    with pytest.raises(ValueError, match="merge only into a SiLU-gated MLP"):
        merge(attach(tiny(family), preset(name, dual=True)))
