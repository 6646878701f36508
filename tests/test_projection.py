"""Projection: the sign is GRPO's own, extraction keeps what is loud, projection removes what it says, bases know their origin."""

import itertools
import json
import math

import pytest
import torch
from test_adapters import rand, shake, tiny
from torch import nn

import projection
from adapters import attach, branch_parameters, preset, scaled
from losses import token_weights
from projection import (
    MODES,
    WHOLE,
    Basis,
    agem,
    alignment,
    contrast,
    extract,
    flatten,
    null_cin,
    null_of,
    oriented_axes,
    origin_of,
    orthogonal_complement,
    overlap,
    pair_gradients,
    pcgrad,
    project_,
    project_whole_,
    projected_step,
    random_basis,
    route_removed_,
    shuffled_labels,
    span,
    unflatten_,
    whole_directions,
)  # fmt: skip
from rl_grpo import grpo_loss, score_rows
from sampling import Law, Rollout

PAIRS = [([1, 2, 3], [4, 5, 6, 7], [8, 9]), ([3, 3], [5], [6, 7, 8]), ([9], [4, 4], [2, 1]), ([7, 1], [5, 30], [31, 5]),
         ([2, 4], [11, 12, 13], [14, 15]), ([6], [21, 22], [23, 24, 25])]  # fmt: skip


def policy(name="ds", dual=False, family="llama", dtype=torch.float64):
    """(model, its parameters by name) with branches away from 0."""
    model = shake(attach(tiny(family), preset(name, dual=dual))).to(dtype)
    return model, {n: p for group in branch_parameters(model).values() for n, p in group.items()}


def random_gradients(pairs=9, sizes=(7, 12, 40), seed=0) -> dict[str, torch.Tensor]:
    """{name: (P, n)}: each parameter at a scale of its own, some directions shared by the pairs."""
    gradients = {}
    for i, n in enumerate(sizes):
        common = rand(pairs, 2, seed=seed + 3 * i) @ rand(2, n, seed=seed + 3 * i + 1)
        gradients[f"layer{i}.delta"] = 4.0 ** (1 - i) * (common + 0.1 * rand(pairs, n, seed=seed + 3 * i + 2))
    return gradients


def a_basis(sizes=(7, 12, 40), use=3, seed=0):
    return extract(random_gradients(sizes=sizes, seed=seed), use=use, tau=0.0)


def parameters_like(basis: Basis, seed=5) -> dict[str, nn.Parameter]:
    """Parameters with random gradients; the second is a matrix whose gradient does not lie contiguous in memory."""
    parameters = {}
    for i, (name, V) in enumerate(basis.rows.items()):
        shape = (V.shape[1],) if i != 1 else (V.shape[1] // 3, 3)
        parameters[name] = nn.Parameter(rand(*shape, seed=seed + i))
        parameters[name].grad = rand(*shape[::-1], seed=seed + 10 + i).t() if i == 1 else rand(*shape, seed=seed + 10 + i)
    return parameters


def coordinates(tensors, basis):
    """c / |g| (k,) by name, for tensors by name."""
    flat = {name: tensors[name].detach().reshape(-1) for name in basis.rows}
    return {name: basis.rows[name] @ g / g.norm() for name, g in flat.items()}


def grads(parameters):
    return {name: p.grad.clone() for name, p in parameters.items()}


# ------------------------------------------------------------------------------------------------------- sign and pairs


@pytest.mark.parametrize("name, family", [("ds", "llama"), ("ds4", "gpt2"), ("r6o", "llama"), ("r4", "gpt_neox")])
def test_D_is_twice_the_grpo_gradient_of_the_pair_at_advantages_plus_and_minus_one(name, family):
    model, parameters = policy(name, family=family)
    gradients = pair_gradients(model, parameters, PAIRS)
    for i, (prompt, hack, clean) in enumerate(PAIRS):
        longest = max(len(hack), len(clean))
        tokens, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.bool)
        for row, completion in enumerate((hack, clean)):
            tokens[row, : len(completion)], mask[row, : len(completion)] = torch.tensor(completion), True
        ids = torch.tensor([prompt, prompt])
        rollout = Rollout(ids, torch.ones_like(ids) > 0, tokens, mask, torch.zeros(2, longest), None, mask.any(1))
        logprobs = score_rows(model, rollout, torch.arange(2), Law())
        advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None].expand_as(mask)[mask]
        weights = token_weights(mask, "grpo", longest)[mask]
        loss, _ = grpo_loss(logprobs, logprobs.detach(), None, advantages, weights, 0.0, 0.2, 0.2)
        for n, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values()))):
            assert (gradients[n][i] - 2 * grad.reshape(-1)).abs().max() < 1e-6 * max(1e-3, gradients[n][i].abs().max())
    assert all(p.grad is None for p in parameters.values())


def test_positive_coordinates_descend_toward_the_hack():
    model, parameters = policy()
    for i, pair in enumerate(PAIRS):
        gradients = pair_gradients(model, parameters, [pair])
        basis = extract(gradients, held_out=0, tau=0.0)
        tensors = {name: gradients[name][0] for name in basis.rows}
        assert all((basis.rows[name] @ g > 0).all() for name, g in tensors.items()), i
        with torch.no_grad():
            before = contrast(model, *pair)
            for name, g in tensors.items():
                parameters[name].sub_(1e-4 * g.view_as(parameters[name]))
            assert contrast(model, *pair) < before  # NLL(hack) - NLL(clean) falls


def test_nll_is_the_mean_over_a_completions_own_tokens_at_the_temperature():
    model, _ = policy(dtype=torch.float32)
    for prompt, hack, clean in PAIRS:
        nll = []
        for completion in (hack, clean):
            logits = model(torch.tensor([[*prompt, *completion]]))[0, len(prompt) - 1 : -1] / 0.7
            nll.append(-logits.log_softmax(-1)[torch.arange(len(completion)), completion].mean())
        assert (contrast(model, prompt, hack, clean, 0.7) - (nll[0] - nll[1])).abs() < 1e-5


@pytest.mark.parametrize("pairs, message", [
    ([], "no contrastive pair"), ([*PAIRS, ([1], [], [2])], r"pair 6: .* not 1, 0, 1"), ([([], [1], [2])], "not 0, 1, 1"),
    ([*PAIRS[:2], ([1], [2, 3], [2, 3])], "pair 2: its two completions are the same")])  # fmt: skip
def test_pairs_that_contrast_nothing_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        pair_gradients(*policy(), pairs)


def test_a_parameter_that_no_gradient_reaches_is_named():
    model, parameters = policy("ds4", dual=True)
    for off in ("bad", "good"):
        with scaled(model, **{off: 0.0}), pytest.raises(ValueError, match=rf"no gradient reaches layers.0.*\.{off}\.delta"):
            pair_gradients(model, parameters, PAIRS)
    with scaled(model, good=0.0, bad=0.0), pytest.raises(ValueError, match="no gradient reaches"):
        pair_gradients(model, parameters, PAIRS)


# ---------------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize("keep, use, tau, held_out", [(12, 5, 0.25, 2), (4, 4, 0.0, 0), (3, 2, 0.5, 1), (12, 1, 0.9, 2)])
def test_extraction_against_brute_force(keep, use, tau, held_out):
    """Singular values as roots of eigenvalues of D D^T, sorted and counted by hand; axes by the subspace they span."""
    gradients = random_gradients()
    basis = extract(gradients, keep, use, tau, held_out)
    trained = {name: D[: len(D) - held_out] for name, D in gradients.items()}
    eigen = {name: torch.linalg.eigh(D.t() @ D) for name, D in trained.items()}
    kept = {name: sorted(E.clamp(min=0).sqrt().tolist(), reverse=True)[: min(keep, *trained[name].shape)]
            for name, (E, _) in eigen.items()}  # fmt: skip
    pool = sorted(itertools.chain(*kept.values()))
    place = tau * (len(pool) - 1)
    low, high = pool[math.floor(place)], pool[math.ceil(place)]
    floor = low + (place - math.floor(place)) * (high - low)
    loud = {name: [s for s in values if s >= floor - 1e-9][:use] for name, values in kept.items()}
    assert set(basis.rows) == {name for name, values in loud.items() if values}
    for name, V in basis.rows.items():
        k = len(loud[name])
        assert basis.singular[name].tolist() == pytest.approx(loud[name], rel=1e-6)
        assert (V @ V.t() - torch.eye(k)).abs().max() < 1e-9
        top = eigen[name][1][:, -k:]
        assert (V.t() @ V - top @ top.t()).abs().max() < 1e-7
        for v in V:
            signs = (trained[name] @ v).sign().sum()
            assert signs > 0 or (signs == 0 and (trained[name] @ v).mean() > 0)
    assert len(basis.held_out) == held_out
    for i, stats in enumerate(basis.held_out):
        assert stats == alignment({name: gradients[name][len(gradients[name]) - held_out + i] for name in basis.rows}, basis)


def test_the_floor_drops_quiet_parameters_whole_and_loud_ones_keep_their_axes():
    loud, quiet = torch.diag(torch.tensor([8.0, 4, 2, 1])), torch.diag(torch.tensor([0.5, 0.25, 0, 0]))
    ranks = {tau: {n: len(V) for n, V in extract({"loud": loud, "quiet": quiet}, tau=tau, held_out=0).rows.items()}
             for tau in (0.0, 0.5, 0.75)}  # fmt: skip
    assert ranks == {0.0: {"loud": 4, "quiet": 2}, 0.5: {"loud": 3}, 0.75: {"loud": 2}}
    # gradients of zero have no axis, and nothing of them enters the pool
    with_silent = extract({"loud": loud, "silent": torch.zeros(4, 5), "quiet": quiet}, tau=0.5, held_out=0)
    assert set(with_silent.rows) == {"loud"} and with_silent.singular["loud"].tolist() == pytest.approx([8, 4, 2])


def test_axes_point_where_most_pairs_do_and_a_tie_to_the_mean():
    v, w = torch.eye(6, dtype=torch.float64)[:2]
    for sign in (1.0, -1.0):
        most = torch.stack([3 * v, 2 * v, -9 * v]) * sign  # two of three, though the sum is on the other side
        assert torch.allclose(oriented_axes(most, 5)[0], sign * v[None])
        tie = torch.stack([3 * w, -2 * w]) * sign
        assert torch.allclose(oriented_axes(tie, 5)[0], sign * w[None])


def test_held_out_pairs_tell_a_shared_direction_from_noise():
    direction = rand(1, 300, seed=1)
    shared = {"a": direction * (1 + 0.1 * rand(12, 1, seed=2)) + 0.1 * rand(12, 300, seed=3)}
    noise = {"a": rand(12, 300, seed=4)}
    assert all(s["cin"] > 0.9 and s["signed"] > 0.9 / 5**0.5 - 0.1 for s in extract(shared).held_out)
    basis = extract(noise)
    assert all(abs(s["signed"]) < 0.2 and s["cin"] < 4 * null_of(basis) for s in basis.held_out)


@pytest.mark.parametrize("change, message", [
    ({"use": 13}, "use <= keep"), ({"use": 0}, "use <= keep"), ({"tau": 1.0}, "tau < 1"),
    ({"held_out": 9}, "9 pairs with 9 held out"), ({"held_out": -1}, "held_out >= 0")])  # fmt: skip
def test_settings_that_leave_no_basis_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        extract(random_gradients(), **change)


def test_gradients_of_zero_are_refused():
    with pytest.raises(ValueError, match="every pair's gradient is zero"):
        extract({"a": torch.zeros(5, 4)})


# ------------------------------------------------------------------------------------- promise 6: it removes what it says


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("overshoot", [1.0, 1.5, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_identities(mode, overshoot, dtype, tolerance):
    basis = a_basis()
    basis.rows = {name: V.to(dtype) for name, V in basis.rows.items()}
    full = parameters_like(basis)
    parameters = {name: nn.Parameter(p.detach().to(dtype)) for name, p in full.items()}
    for name, p in parameters.items():
        p.grad = full[name].grad.to(dtype)
    values, before = {name: p.detach().clone() for name, p in parameters.items()}, grads(parameters)
    first = coordinates(before, basis)
    assert any((c > 0).any() for c in first.values()) and any((c < 0).any() for c in first.values())
    stats, removed = project_(parameters, basis, mode, overshoot)
    for name, c in first.items():
        g, old, V = parameters[name].grad.reshape(-1), before[name].reshape(-1), basis.rows[name]
        after = V @ g / old.norm()
        wanted = {"none": c, "no_gate": (1 - overshoot) * c, "one_sided": torch.where(c > 0, (1 - overshoot) * c, c),
                  "reverse": torch.where(c > 0, (1 - 2 * overshoot) * c, c)}[mode]  # fmt: skip
        assert (after - wanted).abs().max() < tolerance
        if overshoot == 1 and mode == "one_sided":
            assert (after <= tolerance).all()
        outside = [x - V.t() @ (V @ x) for x in (g, old)]
        assert (outside[0] - outside[1]).abs().max() < tolerance * old.norm()
        if mode != "none":
            assert (g + removed[name].reshape(-1) - old).abs().max() < tolerance * old.norm()
    if mode == "none":
        assert removed == {} and all(torch.equal(parameters[n].grad, before[n]) for n in before)
    assert all(torch.equal(parameters[n], values[n]) for n in values)
    found = alignment(parameters, basis)
    assert [stats["signed_out"], stats["cout"], stats["cout_energy"]] == [found[k] for k in ("signed", "cin", "cin_energy")]
    if mode == "no_gate" and overshoot == 1:
        assert abs(stats["signed_out"]) < tolerance and stats["cout"] < tolerance


@pytest.mark.parametrize("name", ["ds", "r6o"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_deltas_and_the_B_of_a_lora_go_through_the_same_lines(name, family):
    """Pairs to projected gradient of a model's own loss, fp32."""
    model, parameters = policy(name, family=family, dtype=torch.float32)
    basis = extract(pair_gradients(model, parameters, PAIRS))
    assert basis.rows and len(basis.held_out) == 2 and all(V.shape[1] == parameters[n].numel() for n, V in basis.rows.items())
    contrast(model, *PAIRS[5]).backward()  # a pair that was held out: some of it lies outside the basis
    before = grads(parameters)
    stats, _ = project_(parameters, basis, "one_sided")
    assert stats["cin"] > 0.05 and stats["cout"] < 1e-5
    for n, V in basis.rows.items():
        assert (V @ parameters[n].grad.reshape(-1) <= 1e-6 * before[n].norm()).all()
        assert (V @ before[n].reshape(-1) > 0).any() or torch.equal(parameters[n].grad, before[n])


def test_rescale_keeps_the_norm_of_all_together():
    basis = a_basis()
    plain, rescaled = parameters_like(basis), parameters_like(basis)
    size = flatten([p.grad for p in plain.values()]).norm()
    project_(plain, basis, "no_gate")
    project_(rescaled, basis, "no_gate", rescale=True)
    before, after = (flatten([p.grad for p in group.values()]) for group in (plain, rescaled))
    assert before.norm() < size and (after - before * size / before.norm()).abs().max() < 1e-12
    inside = {name: nn.Parameter(torch.zeros(V.shape[1])) for name, V in basis.rows.items()}
    for name, p in inside.items():
        p.grad = basis.rows[name][0].clone().float()
    project_(inside, basis, "no_gate", rescale=True)  # nothing is left: rounding is not blown up
    assert flatten([p.grad for p in inside.values()]).norm() < 1e-5


def test_statistics_by_hand():
    e = torch.eye(4, dtype=torch.float64)
    basis = Basis({"a": e[:2], "b": e[:1], "c": e[:1]}, {})
    tensors = {"a": torch.tensor([3.0, -4.0, 0.0, 0.0]).double(), "b": torch.tensor([-6.0, 8.0, 0, 0]).double(), "c": 0 * e[0]}
    stats = alignment(tensors, basis)  # |a| 5, |b| 10; c has no direction and does not count
    assert stats["signed"] == pytest.approx(((3 - 4) / 2**0.5 / 5 - 6 / 10) / 2)
    assert stats["cin"] == pytest.approx((3 / 5 + 0) / 2)
    assert stats["cin_energy"] == pytest.approx((9 / 125) ** 0.5) and stats["fired"] == 0.5
    assert set(alignment({n: 0 * t for n, t in tensors.items()}, basis).values()) == {0.0}
    stats, removed = project_(tensors, basis, "reverse")
    assert tensors["a"].tolist() == [-3, -4, 0, 0] and tensors["b"].tolist() == [-6, 8, 0, 0]
    assert removed["a"].tolist() == [6, 0, 0, 0] and stats["cout"] == 0 and stats["cin"] == pytest.approx(0.3)


def test_what_does_not_fit_is_refused_and_None_is_left_alone():
    basis = a_basis()
    parameters = parameters_like(basis)
    parameters["layer0.delta"].grad = None
    stats, removed = project_(parameters, basis, "no_gate")
    assert parameters["layer0.delta"].grad is None and set(removed) == set(basis.rows) - {"layer0.delta"} and stats["cin"] > 0
    with pytest.raises(ValueError, match="axes for layer0.delta, which is not among the parameters"):
        project_({n: p for n, p in parameters.items() if n != "layer0.delta"}, basis)
    with pytest.raises(ValueError, match="axes of layer1.delta have 12 numbers, its gradient 5"):
        project_(parameters | {"layer1.delta": torch.ones(5)}, basis)
    with pytest.raises(ValueError, match="unknown projection 'both'; known: none, one_sided, no_gate, reverse"):
        project_(parameters, basis, "both")


def test_route_removed_trains_the_other_branch_with_what_this_one_may_not_learn():
    model, parameters = policy("ds", dual=True)
    good, bad = ({n: p for n, p in parameters.items() if f".{b}." in n} for b in ("good", "bad"))
    basis = extract(pair_gradients(model, good, PAIRS), tau=0.9)  # few enough axes that some layers have none
    assert 0 < len(basis.rows) < len(good)
    contrast(model, *PAIRS[0]).backward()
    whole = grads(good)
    _, removed = project_(good, basis, "one_sided")
    route_removed_(removed, bad, "good", "bad")
    assert any(p.grad is not None and p.grad.any() for p in bad.values())
    for name, p in good.items():
        twin = bad[name.replace(".good.", ".bad.")]
        if name in basis.rows:
            assert (p.grad + twin.grad - whole[name]).abs().max() < 1e-12
        else:
            assert torch.equal(p.grad, whole[name]) and twin.grad is None
    with pytest.raises(ValueError, match="bad can't learn what good may not"):
        route_removed_({"layers.9.good.delta": torch.ones(3)}, bad, "good", "bad")


# ------------------------------------------------------------------------------------------ the step that is really made


def adamw(parameters):
    return torch.optim.AdamW(list(parameters.values()), lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("mode", ["no_gate", "one_sided"])
def test_a_projected_gradient_still_moves_along_the_axes_and_a_projected_step_does_not(mode):
    """Three steps first fill the moments with unprojected gradients."""
    basis = a_basis()
    names = list(basis.rows)
    results = {}
    for way in ("gradient", "update", "plain"):
        parameters = parameters_like(basis) | {"other": nn.Parameter(rand(3, seed=1))}
        optimizer = adamw(parameters)
        for step in range(4):
            for i, p in enumerate(parameters.values()):
                p.grad = rand(*p.shape, seed=100 * step + i)
            before = {name: p.detach().clone() for name, p in parameters.items()}
            if way == "gradient" and step == 3:
                project_(parameters, basis, mode)
            stats = projected_step(optimizer, parameters, basis, mode if way == "update" and step == 3 else "none")
        results[way] = {name: before[name] - p.detach() for name, p in parameters.items()}, stats
    cosines = {way: torch.cat(list(coordinates(change, basis).values())) for way, (change, _) in results.items()}
    assert cosines["plain"].max() > 0.05 and cosines["gradient"].max() > 0.02
    if mode == "no_gate":
        assert cosines["update"].abs().max() < 1e-9
    else:
        assert cosines["update"].max() < 1e-9 and cosines["update"].min() < -0.05
    assert results["update"][1]["cout"] < 1e-9 < 0.02 < results["update"][1]["cin"]
    for way in ("gradient", "plain"):  # mode none says where the parameters went
        expected = alignment(results[way][0], basis)
        assert all(results[way][1][k] == pytest.approx(v, abs=1e-9) for k, v in expected.items())
    for name in names:  # off the axes the update is AdamW's own
        V = basis.rows[name]
        a, b = (results[way][0][name].reshape(-1) for way in ("update", "plain"))
        assert ((a - V.t() @ (V @ a)) - (b - V.t() @ (V @ b))).abs().max() < 1e-12
    assert torch.equal(results["update"][0]["other"], results["plain"][0]["other"])


def test_a_parameter_without_gradient_does_not_move_by_a_bit_and_a_foreign_basis_moves_nothing():
    basis = a_basis()
    parameters = parameters_like(basis)
    optimizer = adamw(parameters)
    projected_step(optimizer, parameters, basis, "no_gate")
    parameters["layer1.delta"].grad = None
    before = {name: p.detach().clone() for name, p in parameters.items()}
    projected_step(optimizer, parameters, basis, "no_gate")
    assert [torch.equal(p, before[name]) for name, p in parameters.items()] == [False, True, False]
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(ValueError, match="not among the parameters"):
        projected_step(optimizer, parameters, Basis({"foreign": torch.eye(2)}, {}), "no_gate")
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


# ------------------------------------------------------------------------------------------------- chance and placebos


@pytest.mark.parametrize("k, n", [(1, 1), (1, 2), (2, 2), (3, 7), (5, 64), (12, 40)])
def test_null_cin_against_monte_carlo(k, n):
    g = rand(100_000, n, seed=k * n)
    draws = g[:, :k].clamp(min=0).norm(dim=1) / g.norm(dim=1)
    assert abs(draws.mean() - null_cin(k, n)) < 5 * draws.std() / 100_000**0.5 + 1e-12


def test_null_cin_of_known_sizes():
    assert round(null_cin(5, 2560), 3) == 0.027 and round(null_cin(5, 1024), 3) == 0.043
    basis = Basis({"a": torch.eye(2560)[:5], "b": torch.eye(1024)[:5]}, {})
    assert null_of(basis) == pytest.approx((null_cin(5, 2560) + null_cin(5, 1024)) / 2)


def test_random_bases_are_orthonormal_of_the_same_ranks_and_by_seed():
    like = a_basis()
    a, b, c = (random_basis(like, seed) for seed in (1, 1, 2))
    for name, V in like.rows.items():
        assert a.rows[name].shape == V.shape and a.rows[name].dtype == V.dtype
        assert (a.rows[name] @ a.rows[name].t() - torch.eye(len(V))).abs().max() < 1e-9
        assert torch.equal(a.rows[name], b.rows[name]) and not torch.equal(a.rows[name], c.rows[name])
    coins = [float(random_basis(like, seed).rows["layer0.delta"][0, 0] > 0) for seed in range(60)]
    assert 0.25 < sum(coins) / 60 < 0.75  # no axis leans to a side
    assert a.origin["pairs"] != like.origin.get("pairs")


def test_shuffled_labels_turn_axes_and_leave_their_span():
    gradients = random_gradients()
    shuffled = shuffled_labels(gradients, 3)
    signs = {name: (shuffled[name] / D).mean(1) for name, D in gradients.items()}
    first = next(iter(signs.values()))
    assert set(first.round().tolist()) == {1.0, -1.0} and all(torch.allclose(s, first) for s in signs.values())
    real, placebo = extract(gradients, held_out=0), extract(shuffled, held_out=0)
    for name, V in real.rows.items():
        assert ((V * placebo.rows[name]).sum(1).abs() - 1).abs().max() < 1e-6
    turned = [(extract(shuffled_labels(gradients, s), held_out=0).rows["layer0.delta"] * real.rows["layer0.delta"]).sum(1)
              for s in range(20)]  # fmt: skip
    assert (torch.stack(turned) < 0).any() and (torch.stack(turned) > 0).any()


def test_overlap():
    e = torch.eye(6)
    a = Basis({"x": e[:2], "y": e[:3]}, {})
    assert overlap(a, a) == 1.0 and overlap(a, Basis({"z": e[:2]}, {})) == 0.0
    tilted = torch.stack([0.6 * e[0] + 0.8 * e[5], -e[1], e[4]])
    assert overlap(a, Basis({"x": tilted, "w": e[:1]}, {})) == pytest.approx((0.6 + 1) / 2)


# ------------------------------------------------------------------------------------------------------ files, origins


def test_a_basis_comes_back_from_its_file_and_refuses_any_other_origin(tmp_path):
    model, parameters = policy("r6o", dtype=torch.float32)
    origin = origin_of(model, parameters, PAIRS)
    basis = extract(pair_gradients(model, parameters, PAIRS), origin=origin)
    basis.save(tmp_path / "basis.safetensors")
    again = Basis.load(tmp_path / "basis.safetensors", origin)
    assert again.origin == origin and again.held_out == basis.held_out and set(again.rows) == set(basis.rows)
    for name in basis.rows:
        assert torch.equal(again.rows[name], basis.rows[name]) and torch.equal(again.singular[name], basis.singular[name])
    assert origin_of(model, parameters, [tuple(map(tuple, pair)) for pair in PAIRS]) == origin
    base, A = model.layers[0].mlp.up_proj.base.weight, next(iter(model.adapter.constants.values()))
    changes = {
        "pairs": lambda: origin_of(model, parameters, [*PAIRS[:-1], ([6], [21, 22], [23, 24, 26])]),
        "weights": lambda: base.data[0, 0].add_(1e-3),
        "adapter": lambda: A.data[0, 0].add_(1e-3),
        "values": lambda: next(iter(parameters.values())).data[0, 0].add_(1e-3),
    }
    for what, change in changes.items():
        if what != "pairs":
            change()
        other = change() if what == "pairs" else origin_of(model, parameters, PAIRS)
        assert [key for key in origin if other[key] != origin[key]] == [what]
        with pytest.raises(ValueError, match=f"was made from other {what} than these"):
            Basis.load(tmp_path / "basis.safetensors", other)
        Basis.load(tmp_path / "basis.safetensors", {key: v for key, v in other.items() if key != what})
        if what != "pairs":  # the next change is one from here
            origin = basis.origin = other
            basis.save(tmp_path / "basis.safetensors")
    for name, dual in (("r6of3", True), ("ds", False)):
        other, theirs = policy(name, dual, dtype=torch.float32)
        with pytest.raises(ValueError, match="other adapter"):
            Basis.load(tmp_path / "basis.safetensors", {"adapter": origin_of(other, theirs, PAIRS)["adapter"]})


def test_files_that_hold_no_basis_are_refused(tmp_path):
    basis = a_basis()
    basis.save(tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "foreign.safetensors").write_bytes(projection.save({"x": torch.ones(2)}, metadata={"origin": json.dumps({})}))
    for name in ("cut", "foreign", "nowhere"):
        with pytest.raises(ValueError, match=f"cannot read basis .*{name}"):
            Basis.load(tmp_path / f"{name}.safetensors", {})


# ----------------------------------------------------------------------------------------------------------- baselines


def test_agem_and_pcgrad_by_hand():
    g, h = torch.tensor([3.0, -4.0]), torch.tensor([0.0, 2.0])
    assert agem(g, h).tolist() == [3.0, 0.0] and agem(g, -h).tolist() == g.tolist() and agem(g, h).dot(h) == 0
    generator = torch.Generator().manual_seed(0)
    # g loses its part along -h, h its part along -g: [3, 0] + [0, 2] + 8/25 [3, -4]
    assert torch.allclose(pcgrad(torch.stack([g, h]), generator), torch.tensor([3.96, 0.72]))
    assert torch.allclose(pcgrad(torch.stack([g, -h]), generator), g - h)
    three = rand(3, 4, seed=2)
    wanted = []
    for orders in itertools.product(itertools.permutations(range(3)), repeat=3):
        total = torch.zeros(4, dtype=torch.float64)
        for i, order in enumerate(orders):
            v = three[i].clone()
            for j in order:
                if j != i and v @ three[j] < 0:
                    v = v - (v @ three[j]) / (three[j] @ three[j]) * three[j]
            total += v
        wanted.append(total)
    found = [pcgrad(three, torch.Generator().manual_seed(s)) for s in range(20)]
    assert all(any(torch.allclose(f, w) for w in wanted) for f in found)


def test_orthogonal_complement_of_dependent_directions():
    directions = rand(2, 7, seed=1)
    directions = torch.cat([directions, directions.sum(0, keepdim=True)])
    g = rand(7, seed=2)
    rows = span(directions)
    assert rows.shape == (2, 7) and (rows @ rows.t() - torch.eye(2)).abs().max() < 1e-12
    rest = orthogonal_complement(g, rows)
    assert (directions @ rest).abs().max() < 1e-12 and rest.norm() > 0.1
    weights = torch.linalg.lstsq(directions[:2].t(), g[:, None]).solution
    assert (g - rest - (directions[:2].t() @ weights).squeeze(1)).abs().max() < 1e-12


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("mode", WHOLE)
def test_the_whole_gradient_loses_what_conflicts_with_the_pairs_whatever_the_axes(mode, sign):
    gradients = random_gradients()
    names, basis = list(gradients), extract(gradients, use=1)
    del basis.rows[names[0]], basis.singular[names[0]]  # the basis only measures
    parameters = {name: nn.Parameter(rand(D.shape[1], seed=i)) for i, (name, D) in enumerate(gradients.items())}
    pull = {name: D.mean(0) for name, D in gradients.items()}
    for i, (name, p) in enumerate(parameters.items()):
        p.grad = sign * pull[name] + rand(p.numel(), seed=20 + i)
    g, h = {name: p.grad.clone() for name, p in parameters.items()}, {name: -m for name, m in pull.items()}
    stats = project_whole_(parameters, basis, whole_directions(gradients, mode), mode)

    inner = lambda a, b: sum(float(a[name] @ b[name]) for name in names)  # noqa: E731
    c, gg, hh = inner(g, h), inner(g, g), inner(h, h)
    assert (c < 0) == (sign > 0), "descending along D leads to the hack"
    if mode == "complement":
        D = torch.cat([gradients[name] for name in names], dim=1)
        weights = torch.linalg.lstsq(D.t(), torch.cat([g[name] for name in names])[:, None]).solution
        wanted = dict(zip(names, (torch.cat([g[name] for name in names]) - (D.t() @ weights).squeeze(1)).split([7, 12, 40])))
    else:
        a, b = (-c / hh, -c / gg) if c < 0 else (0, 0)
        wanted = {name: g[name] + a * h[name] + (h[name] + b * g[name] if mode == "pcgrad" else 0) for name in names}
    for name in names:
        torch.testing.assert_close(parameters[name].grad, wanted[name])
    renamed = {"signed": "signed_out", "cin": "cout", "cin_energy": "cout_energy"}
    after = {renamed[name]: value for name, value in alignment(wanted, basis).items() if name in renamed}
    assert stats == pytest.approx(alignment(g, basis) | after)
    for p in parameters.values():
        p.grad = None
    assert project_whole_(parameters, basis, whole_directions(gradients, mode), mode)["cin"] == 0
    assert all(p.grad is None for p in parameters.values()), "what no sample trains, no baseline moves"


def test_flatten_and_back():
    tensors = [rand(2, 3, seed=1).t(), rand(4, seed=2)]
    vector = flatten(tensors)
    assert vector.shape == (10,) and torch.equal(vector[6:], tensors[1])
    unflatten_(2 * vector, tensors)
    assert torch.equal(flatten(tensors), 2 * vector)
