"""Bundles and their routes: fresh ones change no bit, gradients are autograd's, what a loss may not train does not move."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_adapters import CONFIGS, ids_of, rand, shake, tiny
from test_routing import assert_same_gradients

from adapter_files import load_adapter, merge, save_adapter
from adapters import (
    AdapterSpec,
    Branch,
    adapter_tensors,
    attach,
    branch_parameters,
    parameters_of,
    preset,
    reference,
    scaled,
    set_adapter_tensors,
)
from bundles import BUNDLE_PRESETS, BUNDLES, AddBundles, BundledLayer, bundle_alphas, bundle_ranks
from checkpoints import load_checkpoint, write_checkpoint
from gates import Gate, GatedLinear, GatedScale
from model import save
from routing import (
    ARRANGEMENTS,
    SEPARATE,
    GradientRouter,
    analyze_gradient_flow,
    arrangement,
    assert_isolated,
    gates,
    gradient_flow,
)

LOSSES = tuple(SEPARATE)
RL = tuple(name for name in BUNDLES if name.startswith("b_rl_"))
SSL = SEPARATE["lm_loss"]


def bundled(name: str = "bundles", family: str = "llama", fresh: bool = False):
    model = attach(tiny(family), preset(name, dual=False), seed=3)
    return model if fresh else shake(model)


def losses_of(model) -> dict[str, torch.Tensor]:
    """The five losses of one forward pass, on random tokens; the old policy is some way off, so that ratios clip."""
    ids = ids_of(model, batch=4, length=8)
    hidden = model.hidden(ids)
    logprobs = (hidden[:, :-1] @ model.head_weight.t()).log_softmax(-1)
    with torch.no_grad(), reference(model) as base:
        untrained = base(ids)[:, :-1].log_softmax(-1)
    chosen = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
    advantages, noise, returns = (rand(*chosen.shape, seed=s, dtype=model.dtype) for s in (31, 32, 33))
    ratio = (chosen - chosen.detach() + 0.3 * noise).exp()
    values = hidden[:, :-1] @ rand(model.config.width, seed=34, dtype=model.dtype)
    return {
        "lm_loss": -chosen.mean(),
        "policy_loss": -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean(),
        "value_loss": (values - returns).square().mean(),
        "entropy_loss": (logprobs.exp() * logprobs).sum(-1).mean(),
        "kl_loss": (logprobs.exp() * (logprobs - untrained)).sum(-1).mean(),
    }


def plain_forward(self, *inputs):
    """The formula as REFERENCE has it, one bundle after the other, without gates."""
    h = self.base(*inputs)
    y = h
    for name, part in self.parts.items():
        z = h @ part.P.t()
        gelu = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        y = y + self.adapter.scales[name] / (1 + (-part.a).exp()) * (gelu @ part.Q.t())
    return y


@pytest.fixture
def plain(monkeypatch):
    return lambda: monkeypatch.setattr(BundledLayer, "forward", plain_forward)


def clear(model):
    for p in model.parameters():
        p.grad = None


# -------------------------------------------------------------------------------------------------------- fresh, sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", BUNDLE_PRESETS)
def test_fresh_bundles_are_the_base_to_the_bit_and_so_is_scale_zero(name, family, dtype):
    model = tiny(family).to(dtype)
    ids = ids_of(model)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    before = model(ids), model(ids, mask)
    attach(model, preset(name, dual=False), seed=5)
    assert all(map(torch.equal, (model(ids), model(ids, mask)), before))
    shake(model)
    assert not torch.equal(model(ids), before[0])
    off = dict.fromkeys(model.adapter.names, 0.0)
    with scaled(model, **off):
        assert all(map(torch.equal, (model(ids), model(ids, mask)), before))
    with reference(model) as base:
        assert torch.equal(base(ids), before[0])


def test_only_one_side_is_zero_and_every_loss_reaches_its_bundles_at_the_first_step():
    """But for the KL, which is at its minimum there: its gradient is 0 until something else has moved."""
    model = bundled(fresh=True)
    for group in branch_parameters(model).values():
        for path, p in group.items():
            assert bool((p == 0).all()) == (path[-1] in "Qa") and p.dtype == torch.float32
    for name, loss in losses_of(model).items():
        clear(model)
        loss.backward(retain_graph=True)
        for group in branch_parameters(model).values():
            for path, p in group.items():
                assert (p.grad.norm() > 1e-6) == (path[-1] == "Q" and name != "kl_loss"), (name, path)


@pytest.mark.parametrize("width", [32, 50, 64, 128, 150, 192, 768, 2560])
def test_ranks_are_shares_of_the_width_and_one_bundle_has_their_sum(width):
    ranks = bundle_ranks(list(BUNDLES.values()), width)
    assert all(abs(rank - share * width) <= 1 for rank, share in zip(ranks, BUNDLES.values()))
    assert bundle_ranks(list(BUNDLE_PRESETS["one_bundle"].values()), width) == [sum(ranks)]
    larger = BUNDLE_PRESETS["bundles_rl2"]
    assert all(larger[name] == BUNDLES[name] * (2 if name in RL else 1) for name in BUNDLES)


def test_ranks_by_hand():
    assert bundle_ranks(list(BUNDLES.values()), 100) == [18, 12, 10, 8, 5, 6]
    assert bundle_ranks([0.01, 0.5], 8) == [1, 4]  # at least one unit
    layer = bundled().layers[0]
    assert {n: tuple(p.shape) for n, p in layer.parts["b_ssl_main"].named_parameters()} == {"P": (3, 16), "Q": (16, 3), "a": ()}


@pytest.mark.parametrize("make, message", [
    (lambda: preset("bundles", dual=True), "bundles has no good and bad branch"),
    (lambda: preset("bundles_rl3", dual=False), "unknown --lora_config 'bundles_rl3'; known: .*bundles_rl2 or one_bundle"),
    (lambda: AdapterSpec("bundles", (Branch("b", 8, 8.0),)), "a share of the model's width, at most 1"),
    (lambda: AdapterSpec("bundles", (Branch("b", 0.1, 1.0),), ("q_proj",)), "a bundles adapter takes none"),
    (lambda: merge(bundled()), "bundles are no linear map and merge into no weight"),
    (lambda: save(bundled(), "nowhere"), "is no weight of a plain model"),
    (lambda: arrangement("baselin"), "unknown arrangement 'baselin'; known: baseline, single_adapter, ssl_rl_separate, rl_sha"),
    (lambda: GradientRouter(bundled(), {"a": ["b_ssl_main", "b_rl"]}), "a is to train 'b_rl'; this adapter has b_ssl_main, b_s"),
    (lambda: GradientRouter(attach(tiny("llama"), AdapterSpec("full")), {"a": ["full"]}), "this adapter has no branches"),
    (lambda: GradientRouter(bundled(), SEPARATE).route_gradients("loss").__enter__(),
     "no route for 'loss'; this router has lm_loss, policy_loss, value_loss, entropy_loss, kl_loss")])  # fmt: skip
def test_what_can_be_got_wrong_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ----------------------------------------------------------------------------------- AddBundles against its slow twins

SCALES, RANKS = (0.5, -2.0, 3.0), (3, 1, 2)


def layer_inputs(dtype, width=6):
    h = rand(2, 5, width, seed=1, dtype=dtype)
    parts = [side for k, r in enumerate(RANKS) for side in (
        rand(r, width, seed=10 + k, dtype=dtype), rand(width, r, seed=20 + k, dtype=dtype), rand((), seed=30 + k, dtype=dtype))]
    return h.requires_grad_(), [p.requires_grad_() for p in parts]


WEIGHTS = {"open": None, "closed": 0.0, "number": -0.7, "sample": torch.tensor([0.3, 1.0]), "token": rand(2, 5, seed=5)}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("first", WEIGHTS)
@pytest.mark.parametrize("second", ["open", "closed", "token"])
def test_add_bundles_equals_the_gated_primitives(first, second, dtype, tolerance):
    h, parts = layer_inputs(dtype)
    all_gates = [Gate(), Gate(), Gate()]
    for gate, name in zip(all_gates, (first, second, "open")):
        gate.set(WEIGHTS[name])

    def slow():
        y = h
        for s, gate, P, Q, a in zip(SCALES, all_gates, parts[0::3], parts[1::3], parts[2::3]):
            inner = GatedScale.apply(F.gelu(GatedLinear.apply(h, P, gate)), a.sigmoid().expand(len(P)), gate)
            y = y + s * GatedLinear.apply(inner, Q, gate)
        return y

    mine, theirs, upstream = AddBundles.apply(h, SCALES, all_gates, *parts), slow(), rand(2, 5, 6, seed=4, dtype=dtype)
    assert (mine - theirs).abs().max() < 10 * tolerance
    for i, (a, b) in enumerate(zip(*(torch.autograd.grad(y, [h, *parts], upstream, allow_unused=True) for y in (mine, theirs)))):
        assert (a is None) == (b is None) == (i > 0 and (first, second, "open")[(i - 1) // 3] == "closed")
        assert a is None or (a - b).abs().max() < tolerance * max(1, b.abs().max()), i


def test_add_bundles_gradcheck_and_no_second_derivative():
    h, parts = layer_inputs(torch.float64)
    gates = [Gate(), Gate(), Gate()]
    assert torch.autograd.gradcheck(lambda h, *parts: AddBundles.apply(h, SCALES, gates, *parts), (h, *parts))
    (grad,) = torch.autograd.grad(AddBundles.apply(h, SCALES, gates, *parts).square().sum(), [parts[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_in_bfloat16_bundles_are_computed_in_fp32():
    h, parts = layer_inputs(torch.float32)
    half = h.detach().bfloat16().requires_grad_()
    mine = AddBundles.apply(half, SCALES, [Gate()] * 3, *parts)
    exact = AddBundles.apply(half.float(), SCALES, [Gate()] * 3, *parts)
    assert mine.dtype == torch.bfloat16 and torch.equal(mine, exact.bfloat16())
    upstream = rand(2, 5, 6, seed=4, dtype=torch.bfloat16)
    grads = torch.autograd.grad(mine, [half, *parts], upstream), torch.autograd.grad(exact, [half, *parts], upstream.float())
    assert all(map(torch.equal, *grads)) and grads[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("family", CONFIGS)
def test_a_whole_model_in_fp64_equals_the_formula(family, plain):
    model = bundled(family=family).double()
    ids, parameters = ids_of(model), [p for group in branch_parameters(model).values() for p in group.values()]

    def outcome():
        with scaled(model, b_ssl_main=0.7, b_rl_value=-1.3, b_rl_anchor=0.0):
            logits = model(ids)
        return logits, torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)

    (mine, gradients), _ = outcome(), plain()
    theirs, expected = outcome()
    assert mine.dtype == torch.float64 and (mine - theirs).abs().max() < 1e-11
    for g, e in zip(gradients, expected):  # at scale 0 a bundle is absent: None where the formula has zeros
        assert (g is None and not e.any()) or (g - e).abs().max() < 1e-11 * max(1, e.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_change_no_bit_of_the_forward_values_nor_of_the_input_gradient(dtype):
    model = bundled(family="gpt2")
    for module in model.modules():  # the base alone: bundles stay fp32, as after load(..., dtype) and attach
        for name, p in module._parameters.items():
            if p is not None and not p.requires_grad:
                module._parameters[name] = torch.nn.Parameter(p.to(dtype), requires_grad=False)
    embeds = rand(3, 5, 16, seed=0, dtype=dtype).requires_grad_()

    def values():
        logits = model(embeds=embeds)
        return logits, *torch.autograd.grad(logits.float().square().sum(), [embeds, *parameters_of(model, "b_ssl_main")])

    ungated = values()
    for weight in (0.0, 0.5, torch.tensor([1.0, 0, 0]), rand(3, 5, seed=7)):
        for names in (RL, ("b_rl_policy",)):
            with gates(model, **dict.fromkeys(names, weight)):
                assert all(map(torch.equal, values(), ungated))  # nor of the gradients of what is open


# --------------------------------------------------------------------------------------------------- routes, per loss


def test_arrangements_by_hand():
    trains = {"lm_loss": {"b_ssl_main", "b_ssl_semantic"}, "policy_loss": {"b_rl_policy"}, "value_loss": {"b_rl_value"},
              "entropy_loss": {"b_rl_explore"}, "kl_loss": {"b_rl_anchor"}}  # fmt: skip
    overlap = trains | {"policy_loss": {"b_rl_policy", "b_ssl_semantic"}}
    rl = {"b_rl_policy", "b_rl_value", "b_rl_explore", "b_rl_anchor"}
    shared = dict.fromkeys(trains, rl) | {"lm_loss": {"b_ssl_main", "b_ssl_semantic"}}
    expected = {"baseline": ("bundles", dict.fromkeys(trains, set(BUNDLES))), "ssl_rl_separate": ("bundles", trains),
                "rl_shared": ("bundles", shared),
                "placebo_shared": ("bundles", dict.fromkeys(trains, trains["lm_loss"]) | {"lm_loss": rl}),
                "single_adapter": ("one_bundle", dict.fromkeys(trains, {"b_all"})), "larger_rl": ("bundles_rl2", trains),
                "partial_overlap": ("bundles", overlap), "value_head_only": ("bundles", trains | {"value_loss": set()}),
                "baseline_value_head": ("bundles", dict.fromkeys(trains, set(BUNDLES)) | {"value_loss": set()}),
                "placebo": ("bundles", trains | {"lm_loss": {"b_rl_policy", "b_rl_value"}, "policy_loss": {"b_ssl_semantic"},
                                                 "value_loss": {"b_ssl_main"}})}  # fmt: skip
    assert list(BUNDLES.items()) == [("b_ssl_main", 0.18), ("b_ssl_semantic", 0.12), ("b_rl_policy", 0.1), ("b_rl_value", 0.08),
                                     ("b_rl_explore", 0.05), ("b_rl_anchor", 0.06)]  # fmt: skip
    assert set(ARRANGEMENTS) == set(expected)
    for name, (bundles, table) in expected.items():
        spec, mine = arrangement(name)
        assert spec == preset(bundles, dual=False) and {loss: set(branches) for loss, branches in mine.items()} == table


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_one_forward_serves_every_loss_and_each_equals_autograd(name, dtype, tolerance, plain):
    """Against torch.autograd.grad(loss, what it may train), on the formula written out, with a forward of its own per loss."""
    spec, table = arrangement(name)
    model = shake(attach(tiny("qwen3"), spec)).to(dtype)
    assert set(table) == set(LOSSES)
    router, losses, mine = GradientRouter(model, table), losses_of(model), {}
    for i, (loss, value) in enumerate(losses.items()):
        clear(model)
        with router.route_gradients(loss):
            value.backward(retain_graph=i + 1 < len(losses))
        mine[loss] = {n: p.grad for group in branch_parameters(model).values() for n, p in group.items()}
    plain()
    for loss in LOSSES:
        if not table[loss]:
            assert all(g is None for g in mine[loss].values())
            continue
        allowed = {n: p for branch in table[loss] for n, p in branch_parameters(model)[branch].items()}
        expected = dict(zip(allowed, torch.autograd.grad(losses_of(model)[loss], list(allowed.values()))))
        assert {n for n, g in mine[loss].items() if g is not None} == set(allowed)
        assert all(mine[loss][n].norm() > 0 for n in allowed)
        assert_same_gradients({n: mine[loss][n] for n in allowed}, expected, tolerance)


def test_losses_add_up_where_they_share_bundles_and_other_gradients_stay_as_they_were():
    spec, table = arrangement("partial_overlap")
    model = shake(attach(tiny("llama"), spec)).double()
    router, losses = GradientRouter(model, table), losses_of(model)
    shared, shut = parameters_of(model, "b_ssl_semantic"), parameters_of(model, "b_rl_value")
    for p in shut:
        p.grad = torch.full_like(p, 3.0)
    expected = [a + b for a, b in zip(*(torch.autograd.grad(losses[n], shared, retain_graph=True)
                                        for n in ("lm_loss", "policy_loss")))]  # fmt: skip
    for loss in ("lm_loss", "policy_loss", "entropy_loss"):
        with router.route_gradients(loss):
            losses[loss].backward(retain_graph=True)
    assert all((p.grad - e).abs().max() < 1e-12 for p, e in zip(shared, expected))
    assert all(bool((p.grad == 3).all()) for p in shut)
    assert all(p.grad is None for p in parameters_of(model, "b_rl_anchor"))


@pytest.mark.parametrize("kind", ["r4", "m4", "ds5", "r4o"])
def test_a_router_takes_the_branches_of_any_adapter(kind):
    model = shake(attach(tiny("llama"), preset(kind, dual=True))).double()
    router = GradientRouter(model, {"policy_loss": ["bad"], "lm_loss": ["good"], "value_loss": ["good", "bad"], "kl_loss": []})
    trains = {n: (b, p) for b, g in branch_parameters(model).items() for n, p in g.items()}
    losses = losses_of(model)
    flow = analyze_gradient_flow(model, {name: losses[name] for name in router.table}, router)
    for loss, branches in router.table.items():
        expected = torch.autograd.grad(losses[loss], [p for _, p in trains.values()], retain_graph=True)
        clear(model)
        with router.route_gradients(loss):
            losses[loss].backward(retain_graph=True)
        for (branch, p), e in zip(trains.values(), expected):
            assert p.grad is None if branch not in branches else (p.grad - e).abs().max() < 1e-12 * max(1, e.abs().max())
        assert flow[loss] == gradient_flow(model)


def test_routes_nest_in_gates_per_sample_and_end():
    """Inside a block that lets sample 1 alone train anything, a loss trains its own bundles, from sample 1."""
    model = bundled().double()
    router, ids = GradientRouter(model, SEPARATE), ids_of(model, batch=2)
    wanted = parameters_of(model, "b_rl_policy")
    expected = torch.autograd.grad(model(ids[1:]).square().sum(), wanted)
    with gates(model, **dict.fromkeys(BUNDLES, torch.tensor([0.0, 1.0]))):
        with router.route_gradients("policy_loss"):
            model(ids).square().sum().backward()
    assert all((p.grad - e).abs().max() < 1e-12 * max(1, e.abs().max()) for p, e in zip(wanted, expected))
    assert all(p.grad is None for name in BUNDLES if name != "b_rl_policy" for p in parameters_of(model, name))
    with pytest.raises(KeyError), router.route_gradients("policy_loss"):
        raise KeyError
    assert all(gate.weight is None for gate in model.adapter.gates.values())


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_gradient_flow_per_loss_is_what_a_routed_backward_brings(name):
    spec, table = arrangement(name)
    model = shake(attach(tiny("gpt_neox"), spec))
    router, losses = GradientRouter(model, table), losses_of(model)
    flow, unrouted = analyze_gradient_flow(model, losses, router), analyze_gradient_flow(model, losses)
    assert all(p.grad is None for p in model.parameters()) and set(flow) == set(LOSSES)
    for loss, norms in flow.items():
        assert all((norms[b] > 0) == (b in table[loss]) and unrouted[loss][b] > 0 for b in model.adapter.names)
        with router.route_gradients(loss):
            losses[loss].backward(retain_graph=True)
        assert norms == gradient_flow(model)
        clear(model)
        by_hand = torch.autograd.grad(losses[loss], parameters_of(model, model.adapter.names[0]), retain_graph=True)
        squares = sum(float(g.double().square().sum()) for g in by_hand)
        assert unrouted[loss][model.adapter.names[0]] == pytest.approx(squares**0.5, rel=1e-5)


# ------------------------------------------------------------------------------------------ isolation is bitwise


def adamw(model, lr=0.05):
    groups = [{"params": list(group.values())} for group in branch_parameters(model).values()]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.3)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_isolation_is_bitwise_with_momentum_and_weight_decay(name):
    """Two steps on every loss fill the moments; then each loss alone moves all of its bundles and nothing else by a bit."""
    spec, table = arrangement(name)
    model = shake(attach(tiny("llama"), spec))
    router, optimizer = GradientRouter(model, table), adamw(model)
    for only in (LOSSES, LOSSES, *((loss,) for loss in LOSSES), ("policy_loss", "value_loss", "entropy_loss", "kl_loss"), SSL):
        chosen = [loss for loss in LOSSES if loss in only] or ["lm_loss"]
        learning = {branch for loss in chosen for branch in table[loss]}
        losses, before = losses_of(model), {n: t.clone() for n, t in adapter_tensors(model).items()}
        optimizer.zero_grad(set_to_none=True)
        for loss in chosen:
            with router.route_gradients(loss):
                losses[loss].backward(retain_graph=True)
        with assert_isolated(model, *(set(model.adapter.names) - learning)):
            optimizer.step()
        for branch, group in branch_parameters(model).items():
            for n, p in group.items():  # the gates' a is among them
                assert torch.equal(p, before[n]) == (branch not in learning), (chosen, n)
                assert bool(optimizer.state[p]) == any(branch in branches for branches in table.values())
                assert (p.grad is None) == (branch not in learning)  # the moments are there, and wait


def test_two_hundred_policy_steps_leave_ssl_bundles_and_base_identical_to_the_bit():
    spec, table = arrangement("ssl_rl_separate")
    model = attach(tiny("llama"), spec)
    router, optimizer = GradientRouter(model, table), adamw(model, lr=3e-3)
    for _ in range(3):  # so that there is something to protect, with moments of its own
        optimizer.zero_grad(set_to_none=True)
        with router.route_gradients("lm_loss"):
            losses_of(model)["lm_loss"].backward()
        optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(200):
        optimizer.zero_grad(set_to_none=True)
        with router.route_gradients("policy_loss"):
            losses_of(model)["policy_loss"].backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".b_rl_policy." in name}
    assert bundle_alphas(model)["b_rl_policy"] != 0.5 != bundle_alphas(model)["b_ssl_main"]


# ---------------------------------------------------------------------------------------------- files, scales, alphas


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", BUNDLE_PRESETS)
def test_save_and_load_are_bitwise(name, family, tmp_path):
    model = bundled(name, family)
    save_adapter(model, tmp_path / "a.safetensors")
    again = load_adapter(tiny(family), tmp_path / "a.safetensors")
    assert again.adapter.spec == model.adapter.spec and torch.equal(again(ids_of(model)), model(ids_of(model)))
    write_checkpoint(tmp_path, 1, adapter_tensors(model), {})
    third = bundled(name, family, fresh=True)
    set_adapter_tensors(third, load_checkpoint(tmp_path / "checkpoint-1")[1], "checkpoint")
    mine = adapter_tensors(model)
    for other in (again, third):
        theirs = adapter_tensors(other)
        assert list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_a_bundle_at_scale_zero_is_absent_and_scales_are_linear_in_the_last_block():
    model = bundled().double()
    alone = attach(tiny("llama"), AdapterSpec("bundles", tuple(Branch(n, BUNDLES[n], 1.0) for n in SSL))).double()
    set_adapter_tensors(alone, {n: t for n, t in adapter_tensors(model).items() if n.split(".")[-2] in SSL}, "test")
    ids = ids_of(model)
    with scaled(model, **dict.fromkeys(RL, 0.0)):
        assert torch.equal(model(ids), alone(ids))
    h, layer = rand(2, 3, 16, seed=0), model.layers[-1]
    layer.base = torch.nn.Identity()

    def change(scale):
        with scaled(model, **dict.fromkeys(RL, 0.0) | dict.fromkeys(SSL, scale)):
            return layer(h) - h

    assert (change(0.5) - change(1.0) / 2).abs().max() < 1e-14 and change(1.0).abs().max() > 1e-2


def test_alphas_by_hand():
    model = bundled(fresh=True)
    assert bundle_alphas(model) == dict.fromkeys(BUNDLES, 0.5)
    with torch.no_grad():
        for layer, alpha in zip(model.layers, (0.2, 0.4, 0.5, 0.9)):
            layer.parts["b_rl_value"].a.copy_(torch.tensor(math.log(alpha / (1 - alpha))))
    assert bundle_alphas(model) == pytest.approx(dict.fromkeys(BUNDLES, 0.5) | {"b_rl_value": 0.5})
    assert bundle_alphas(attach(tiny("llama"), AdapterSpec("bundles", (Branch("x", 0.2, 1.0),), stride=2))) == {"x": 0.5}
