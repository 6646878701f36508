"""Deltas on singular values and LoRA of a frozen A: gradients against dense autograd, the fast path against its slow twin,
files and PEFT, and the cache of singular vectors."""

import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_adapters import CONFIGS, GATES, ids_of, rand, shake, their_model, tiny

import gates
import svd
from adapter_files import export_peft, load_adapter, merge, save_adapter
from adapters import (
    Adapter,
    AdapterSpec,
    Branch,
    DeltaSLinear,
    LoRALinear,
    adapter_tensors,
    attach,
    branch_parameters,
    parameters_of,
    preset,
    set_scales,
)  # fmt: skip
from gates import Gate
from svd import singular_vectors


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "svd"


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["ds", "ds5f3"])
def test_the_gradient_is_the_diagonal_of_the_dense_one(family, name):
    """dL/d delta = s diag(U^T (dL/dW) V), with dL/dW by autograd on a dense copy of the model."""
    model = shake(attach(tiny(family), preset(name, dual=True))).double()
    set_scales(model, 0.7, -1.3)
    ids = ids_of(model)
    dense = merge(model).requires_grad_(True)
    assert (model(ids) - dense(ids)).abs().max() < 1e-11
    model(ids).square().sum().backward()
    dense(ids).square().sum().backward()
    weights = dict(dense.named_parameters())
    seen = 0
    for path, module in model.named_modules():
        if isinstance(module, DeltaSLinear):
            diagonal = torch.diag(module.U.t() @ weights[f"{path}.weight"].grad @ module.V.t())
            for scale, part in zip((0.7, -1.3), module.parts.values()):
                wanted = scale * diagonal[: len(part.delta)]
                assert (part.delta.grad - wanted).abs().max() < 1e-10 * wanted.abs().max()
                seen += 1
    assert seen == 2 * len(parameters_of(model, "good")) > 0


SCALES = (0.5, -2.0)


def layer(dtype, ranks=(4, 3), outputs=4, inputs=6):
    """A DeltaSLinear with random deltas and scales; 10 rows of 5 directions or fewer."""
    base = nn.Linear(inputs, outputs).requires_grad_(False)
    with torch.no_grad():
        base.weight.copy_(rand(outputs, inputs, seed=2))
        base.bias.copy_(rand(outputs, seed=3))
    spec = AdapterSpec("delta_s", tuple(Branch(n, r, float(r)) for n, r in zip("ab", ranks)))
    adapter = Adapter(spec, dict(zip("ab", SCALES)), {"a": Gate(), "b": Gate()})
    module = DeltaSLinear(base, adapter, None).to(dtype)
    for k, part in enumerate(module.parts.values()):
        part.delta.data.copy_(rand(len(part.delta), seed=10 + k))
    return module


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("ranks", [(4, 3), (1, 1)])
@pytest.mark.parametrize("first", GATES)
@pytest.mark.parametrize("second", ["open", "closed", "per token", "soft per sample"])
def test_gated_gradients_of_the_fast_path_equal_the_slow_twin_and_a_loop_over_positions(first, second, ranks, dtype, tolerance):
    module, upstream = layer(dtype, ranks), rand(2, 5, 4, seed=4, dtype=dtype)
    x = rand(2, 5, 6, seed=1, dtype=dtype).requires_grad_()
    deltas = [part.delta for part in module.parts.values()]
    U, V = module.U, module.V

    def plain(x):
        parts = (s * (x @ V[: len(d)].t() * d) @ U[:, : len(d)].t() for s, d in zip(SCALES, deltas))
        return F.linear(x, module.base.weight, module.base.bias) + sum(parts)

    wanted = [torch.zeros_like(d) for d in deltas]
    for b in range(2):
        for t in range(5):
            for k, name in enumerate((first, second)):
                (grad,) = torch.autograd.grad(plain(x[b, t]), [deltas[k]], upstream[b, t])
                w = torch.as_tensor(1.0 if GATES[name] is None else GATES[name], dtype=torch.float64)
                wanted[k] += (w if w.dim() == 0 else w[b] if w.dim() == 1 else w[b, t]).item() * grad
    (ungated,) = torch.autograd.grad(module(x), [x], upstream)
    for gate, name in zip(module.adapter.gates.values(), (first, second)):
        gate.set(GATES[name])
    for forward in (module, module.beside):
        y = forward(x)
        assert (y - plain(x)).abs().max() < 10 * tolerance
        x.grad = deltas[0].grad = deltas[1].grad = None
        y.backward(upstream)
        assert (x.grad - ungated).abs().max() < 10 * tolerance and (forward != module or torch.equal(x.grad, ungated))
        for delta, expected, name in zip(deltas, wanted, (first, second)):
            if name in ("closed", "all zero"):
                assert delta.grad is None
            else:
                assert (delta.grad - expected).abs().max() < tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize("n, R, outputs, inputs, ways", [(50, 4, 4, 6, 1), (50, 2, 8, 8, 1), (2, 8, 8, 8, 1), (200, 8, 8, 8, 1),
                                                   (50, 8, 8, 8, 3)])  # fmt: skip
def test_both_ways_to_the_diagonal_are_equal_and_the_cheaper_is_taken(n, R, outputs, inputs, ways, monkeypatch):
    """Counted by the multiplications that are really made."""
    grad, x, U, V = (rand(*shape, seed=i) for i, shape in enumerate([(n, outputs), (n, inputs), (outputs, R), (R, inputs)]))
    columns = [None, *(rand(n, 1, seed=9 + i) for i in range(ways - 1))]
    made = 0

    def counted(a, b):
        nonlocal made
        made += a.shape[0] * a.shape[1] * b.shape[0]
        return a @ b.t()

    monkeypatch.setattr(gates, "product", counted)
    for mine, column in zip(gates.weighted_diagonals(grad, x, U, V, columns), columns):
        wanted = torch.diag(U.t() @ (grad if column is None else grad * column).t() @ x @ V.t())
        assert (mine - wanted).abs().max() < 1e-11
    assert made == min(n * R * (outputs + inputs), ways * (n + R) * outputs * inputs)


def test_gradcheck_and_no_second_derivative():
    module = layer(torch.float64)
    x = rand(2, 5, 6, seed=1).requires_grad_()
    deltas = [part.delta for part in module.parts.values()]
    open_gates = list(module.adapter.gates.values())

    def fast(x, *deltas):
        return gates.AddDeltas.apply(x, module.base.weight, module.base.bias, module.U, module.V, SCALES, open_gates, *deltas)

    assert torch.autograd.gradcheck(fast, (x, *deltas)) and torch.autograd.gradcheck(lambda x, *_: module.beside(x), (x, *deltas))
    (grad,) = torch.autograd.grad(module(x).square().sum(), deltas[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    module.base.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="must be frozen"):
        module(x)


def test_beside_a_bfloat16_base_the_branches_are_fp32():
    module = layer(torch.float32)
    module.base.bfloat16()
    x, upstream = rand(2, 5, 6, seed=1, dtype=torch.bfloat16).requires_grad_(), rand(2, 5, 4, seed=4, dtype=torch.bfloat16)
    deltas = [part.delta for part in module.parts.values()]
    total = sum(s * F.pad(d, (0, 4 - len(d))) for s, d in zip(SCALES, deltas))
    exact = x.float() @ (module.base.weight.float() + module.U * total @ module.V).t() + module.base.bias.float()
    y = module(x)
    assert y.dtype == torch.bfloat16 and (y.float() - exact).abs().max() < 2**-7 * exact.abs().max()
    mine, wanted = torch.autograd.grad(y, [x, *deltas], upstream), torch.autograd.grad(exact, [x, *deltas], upstream.float())
    assert mine[0].dtype == torch.bfloat16 and (mine[0] - wanted[0]).abs().max() < 2**-6 * wanted[0].abs().max()
    for grad, expected in zip(mine[1:], wanted[1:]):  # no rounding to bfloat16 on the way
        assert grad.dtype == torch.float32 and (grad - expected).abs().max() < 1e-5 * expected.abs().max()


# -------------------------------------------------------------------------------------------------- files, PEFT, frozen A


@pytest.mark.parametrize("family", CONFIGS)
def test_peft_gives_the_same_logits(family, tmp_path):
    """Layers of unequal rank, padded to one; a branch scaled by alpha / rank other than 1."""
    peft = pytest.importorskip("peft")
    base = tiny(family)
    ids = ids_of(base)
    spec = AdapterSpec("delta_s", (Branch("good", 2**31, 2.0**31), Branch("bad", 4, 6.0)))
    model = shake(attach(tiny(family), spec))
    assert len({len(p) for p in parameters_of(model, "good")}) > (family not in ("gpt2", "gpt_neox"))
    for branch, scales in (("good", (1, 0)), ("bad", (0, 1))):
        folder = export_peft(model, branch, tmp_path / branch)
        peer = peft.PeftModel.from_pretrained(their_model(base, tmp_path / "base"), folder).eval()
        set_scales(model, *scales)
        with torch.no_grad():
            theirs, mine = peer(ids).logits, model(ids)
            assert (mine - theirs).abs().max() < 2e-5 and (mine - base(ids)).abs().max() > 1e-2
            assert (load_adapter(tiny(family), folder)(ids) - mine).abs().max() < 2e-5
    assert json.loads((tmp_path / "bad" / "adapter_config.json").read_text())["lora_alpha"] == 6.0


def test_deltas_of_other_weights_are_refused(tmp_path):
    model = shake(attach(tiny("llama"), preset("ds5", dual=True)))
    save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"other singular vectors than layers.0.self_attn.q_proj has here"):
        load_adapter(tiny("llama", seed=1), tmp_path / "a.safetensors")


def test_the_sign_of_a_pair_of_singular_vectors_does_not_matter(tmp_path, cache):
    model = shake(attach(tiny("llama"), preset("ds", dual=False)))
    save_adapter(model, tmp_path / "a.safetensors")
    for path in cache.iterdir():  # as another machine's decomposition may give them
        U, S, Vt = svd.read(path)
        signs = torch.where(torch.arange(len(S)) % 2 == 0, -1.0, 1.0)
        parts = [U * signs, S, (Vt.t() * signs).t().contiguous()]
        path.write_bytes(svd.save(dict(zip(("U", "S", "Vt"), parts)), metadata={"hash": svd.tensor_hash(*parts)}))
    again = load_adapter(tiny("llama"), tmp_path / "a.safetensors")
    assert not torch.equal(again.layers[0].mlp.up_proj.U, model.layers[0].mlp.up_proj.U)
    assert (again(ids_of(model)) - model(ids_of(model))).abs().max() < 1e-5


def test_a_frozen_A_is_semi_orthonormal_shared_and_kept(tmp_path):
    model = attach(tiny("llama"), preset("r6of3", dual=True), seed=3)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            A = module.parts["good"].A
            assert (A @ A.t() - torch.eye(6)).abs().max() < 1e-5 and torch.equal(module.parts["bad"].A, A[:3])
            assert not A.requires_grad and module.parts["good"].B.requires_grad
    names = [n for group in branch_parameters(model).values() for n in group]
    assert names and all(n.endswith(".B") for n in names)
    before = {n: t.clone() for n, t in adapter_tensors(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids_of(model)).square().sum().backward()
        assert all(p.grad is None for p in model.adapter.constants.values())
        optimizer.step()
    assert all(torch.equal(t, before[n]) == n.endswith(".A") for n, t in adapter_tensors(model).items())
    save_adapter(model, tmp_path / "a.safetensors")  # a fresh adapter would draw another A: it is in the file
    assert torch.equal(load_adapter(tiny("llama"), tmp_path / "a.safetensors")(ids_of(model)), model(ids_of(model)))
    with pytest.raises(ValueError, match="rank 17 of a frozen A exceeds a layer's 16 inputs"):
        attach(tiny("llama"), preset("r17o", dual=False))


# ---------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
def test_singular_vectors_are_those_of_the_weight_and_computed_once(shape, cache, monkeypatch):
    weight, calls, real = rand(*shape, seed=1, dtype=torch.float32), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or real(*a, **k))
    U, Vt = singular_vectors(weight, 2**31)
    k = min(shape)
    assert U.shape == (shape[0], k) and Vt.shape == (k, shape[1])
    for side in (U.t() @ U, Vt @ Vt.t()):
        assert (side - torch.eye(k)).abs().max() < 1e-5
    values = torch.diag(U.t() @ weight @ Vt.t())
    assert bool((values[:-1] >= values[1:]).all()) and (U * values @ Vt - weight).abs().max() < 1e-5
    for rank in (3, 2**31):
        again = singular_vectors(weight.clone(), rank)
        assert torch.equal(again[0], U[:, :rank]) and torch.equal(again[1], Vt[:rank])
    assert len(calls) == 1
    singular_vectors(weight.t(), 1)
    assert len(calls) == 2 and len(list(cache.iterdir())) == 2
    rounded = weight.bfloat16()
    singular_vectors(rounded, 1)
    singular_vectors(rounded.float(), 1)  # the same values
    assert len(calls) == 3
    assert svd.tensor_hash(torch.ones(2, 3)) != svd.tensor_hash(torch.ones(3, 2))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b"", lambda data: svd.save({"U": torch.ones(2)})])
def test_a_damaged_file_is_computed_again_and_said(damage, cache):
    weight = rand(6, 5, seed=1, dtype=torch.float32)
    U, Vt = singular_vectors(weight, 9)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match="is damaged .*computed again"):
        again = singular_vectors(weight, 9)
    assert torch.equal(again[0], U) and torch.equal(again[1], Vt) and path.read_bytes() == whole
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_and_weights_without_singular_vectors(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set SLUICE_CACHE"):
        singular_vectors(torch.ones(2, 2), 1)
    with pytest.raises(ValueError, match="not finite"):
        singular_vectors(torch.tensor([[1.0, float("nan")]]), 1)
