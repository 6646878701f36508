"""soft_rollout.py: the cached rollout against whole forward passes under plain autograd, its law, its ends, its memory."""
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import soft_rollout as room
from adapters import attach, branch_parameters, preset
from model import Decoder, ModelConfig
from sampling import Law
from soft_rollout import gumbel, noise_seeds, reference_law, soft_rollout

PAD, EOS, V = 0, 1, 11
OWN = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated_mlp": False, "rms_norm": False}
FAMILIES = {
    "llama": ModelConfig("llama", V, 16, 2, 4, 2, 4, 24, 48, tied=False, rotary_dim=4),
    "qwen3": ModelConfig("qwen3", V, 16, 2, 4, 1, 6, 24, 48, rotary_dim=6, qk_norm=True),
    "gpt2": ModelConfig("gpt2", V, 16, 2, 4, 4, 4, 24, 48, activation="gelu_new", **OWN),
    "gpt_neox": ModelConfig("gpt_neox", V, 16, 2, 4, 4, 4, 24, 48, tied=False, rotary_dim=2, parallel_residual=True,
                            activation="gelu", **OWN),
}  # fmt: skip
LAWS = {"plain": Law(), "cut": Law(temperature=0.8, top_k=6, top_p=0.9, min_new_tokens=3)}


def policy(family="llama", spec="r4", dtype=torch.float32, head=0.3) -> Decoder:
    """A random model with an adapter whose branches have moved."""
    torch.manual_seed(0)
    model = Decoder(FAMILIES[family])
    for name, p in model.named_parameters():
        p.data += (0.1 if p.dim() == 1 else head if name.startswith(("embed", "lm_head")) else 0.05) * torch.randn_like(p)
    attach(model, preset(spec, dual=False), seed=0)
    for group in branch_parameters(model).values() if spec != "full" else ():
        for p in group.values():
            p.data += 0.2 * torch.randn_like(p)
    return model.to(dtype)


def prompts(lengths=(6, 2, 3, 6, 1)):
    """Random ids (B, P), left-padded, and their mask."""
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    ids = torch.randint(2, V, mask.shape, generator=torch.Generator().manual_seed(3))
    return ids.masked_fill(~mask, PAD), mask


def seeds(rows=5, length=9):
    return noise_seeds(rows, length, torch.Generator().manual_seed(1))


def roll(model, lengths=(6, 2, 3, 6, 1), tau=0.9, law=LAWS["plain"], length=9, **options):
    return soft_rollout(model, *prompts(lengths), seeds(len(lengths), length), tau, law, (EOS,), PAD, **options)


def uncached(model, ids, mask, seeds, tau, law: Law, hard: bool):
    """(soft, log law), (N, T, V) each: the slow twin. Every step reads the whole prefix."""
    embeds, softs, laws = model.embed_tokens(ids), [], []
    for t in range(seeds.shape[1]):
        z = model(embeds=embeds, attention_mask=mask)[:, -1] / law.temperature
        if law.truncated:
            z = z.masked_fill(~law.support(z.detach(), torch.tensor([t < law.min_new_tokens]), torch.tensor([EOS])), -torch.inf)
        laws.append(z.log_softmax(-1))
        noisy = z + gumbel(seeds[:, t], V)
        soft = (noisy / tau).softmax(-1)
        softs.append((F.one_hot(noisy.argmax(-1), V) - soft).detach() + soft if hard else soft)
        embeds = torch.cat([embeds, (softs[-1] @ model.embed_tokens.weight)[:, None]], 1)
        mask = F.pad(mask, (0, 1), value=True)
    return torch.stack(softs, 1), torch.stack(laws, 1)


def gradients(model, soft, log_law, mask) -> dict[str, torch.Tensor]:
    """Of an arbitrary function of the valid tokens, twice as steep in what came first."""
    g = torch.Generator().manual_seed(5)
    w = torch.randn(2, *soft.shape, generator=g, dtype=torch.float64).to(soft.dtype)
    loss = ((soft * w[0] + (log_law.exp() * w[1]).square()) * mask[..., None]).sum()
    named = {name: p for group in branch_parameters(model).values() for name, p in group.items()}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


def compare(model, dtype, lengths, law, hard=False, **options):
    ours, (ids, mask) = roll(model, lengths, law=law, hard=hard, **options), prompts(lengths)
    length = ours.mask.shape[1]
    soft, log_law = uncached(model, ids, mask, seeds(len(lengths)), 0.9, law, hard)
    soft, log_law = soft[:, :length], log_law[:, :length]
    assert ours.soft.dtype == ours.log_law.dtype == dtype and bool(ours.mask.any(1).all())
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(ours.soft[ours.mask], soft[ours.mask], **close)
    torch.testing.assert_close(ours.log_law[ours.mask], log_law[ours.mask], **close)
    mine, theirs = gradients(model, ours.soft, ours.log_law, ours.mask), gradients(model, soft, log_law, ours.mask)
    for name, expected in theirs.items():
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(mine[name] / scale, expected / scale, msg=lambda m, name=name: f"{name}: {m}", **close)
    assert sum(g.abs().max() > 1e-2 for g in theirs.values()) > len(theirs) / 2


# ------------------------------------------------------------------------------------------------- cached = uncached


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("lengths", [(4, 4, 4), (6, 2, 3, 6, 1)], ids=["even", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached_in_values_and_gradients(family, dtype, lengths, law):
    compare(policy(family, dtype=dtype), dtype, lengths, LAWS[law])


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "ste"])
@pytest.mark.parametrize("spec", ["r4", "r4o", "ds", "m4", "bundles", "full"])
def test_with_every_adapter_and_both_estimators(spec, hard):
    compare(policy("gpt2", spec, torch.float64), torch.float64, (6, 2, 3, 6, 1), LAWS["cut"], hard)


@pytest.mark.parametrize("every", [1, 4, 30])
@pytest.mark.parametrize("spec", ["r4", "full"])
def test_recomputed_activations_give_the_same_gradients(spec, every):
    model = policy("qwen3", spec)
    kept, again = (roll(model, law=LAWS["cut"], recompute_every=n) for n in (0, every))
    assert torch.equal(kept.soft, again.soft) and torch.equal(kept.tokens, again.tokens)
    kept, again = (gradients(model, r.soft, r.log_law, r.mask) for r in (kept, again))
    assert all(torch.equal(grad, again[name]) for name, grad in kept.items())


def test_two_backward_passes_share_one_rollout():
    """The gradient of the memory that steps hand on belongs to one pass."""
    for every in (0, 2):
        model = policy(dtype=torch.float64)
        r = roll(model, recompute_every=every)
        named = [p for group in branch_parameters(model).values() for p in group.values()]
        a, b = (r.soft * r.mask[..., None]).square().sum(), (r.log_law.exp() * r.mask[..., None]).square().sum()
        apart = [torch.autograd.grad(loss, named, retain_graph=True) for loss in (a, b)]
        for x, y, z in zip(*apart, torch.autograd.grad(a + b, named)):
            torch.testing.assert_close(x + y, z, atol=1e-12, rtol=1e-12)


# ------------------------------------------------------------------------------------------------- soft and hard


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_hot_tokens_are_a_hard_forward(family, law):
    """Straight-through's, and mixtures at a temperature so low that they are one-hot; also the reference on that prefix."""
    model, law = policy(family), LAWS[law]
    for tau, hard in ((0.9, True), (1e-5, False)):
        with torch.no_grad():
            r = roll(model, tau=tau, law=law, hard=hard)
            one_hot = F.one_hot(r.tokens, V).float()
            assert torch.equal(r.soft[r.mask], one_hot[r.mask]) if hard else (r.soft - one_hot)[r.mask].abs().max() < 1e-3
            ids, mask = torch.cat([r.prompt_ids, r.tokens], 1), torch.cat([r.prompt_mask, torch.ones_like(r.mask)], 1)
            z = model(ids, mask)[:, r.prompt_ids.shape[1] - 1 : -1] / law.temperature
            z = z.masked_fill(r.log_law == -torch.inf, -torch.inf)
            torch.testing.assert_close(r.log_law[r.mask], z.log_softmax(-1)[r.mask], atol=2e-5, rtol=1e-5)
            whole = model(ids, mask)[:, r.prompt_ids.shape[1] - 1 : -1] / law.temperature
            whole[:, : law.min_new_tokens, EOS] = -torch.inf
            whole = whole.log_softmax(-1)
            torch.testing.assert_close(reference_law(model, r, law)[r.mask], whole[r.mask], atol=2e-5, rtol=1e-5)


def pairs_of_tokens(hard: bool, rows=6000, tau=2.0):
    """Counts (V, V) of two tokens after one prompt, and their law (V, V) under hard sampling."""
    model, ids = policy(head=0.6), torch.full((rows, 1), 4)
    with torch.no_grad():
        r = soft_rollout(model, ids, ids > 0, seeds(rows, 2), tau, Law(min_new_tokens=2), (EOS,), PAD, hard=hard)
        first = r.log_law[0, 0].exp()
        prefixes = torch.stack([torch.full((V,), 4), torch.arange(V)], 1)
        second = model(prefixes)[:, -1].index_fill(1, torch.tensor([EOS]), -torch.inf).softmax(-1)
    counts = torch.bincount(r.tokens[:, 0] * V + r.tokens[:, 1], minlength=V * V)
    return counts.view(V, V), first[:, None] * second


def chi_square(counts, law) -> float:
    """p-value; what is expected fewer than five times is one cell."""
    counts, expected = counts.flatten().double(), law.flatten().double() * counts.sum()
    assert not counts[expected == 0].any()
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def test_straight_through_samples_the_softmax_whatever_tau():
    """Two tokens deep. Mixtures do so for the first token alone: the second one's law is that after a mixture."""
    counts, law = pairs_of_tokens(hard=True)
    assert chi_square(counts, law) > 0.01
    counts, law = pairs_of_tokens(hard=False)
    assert chi_square(counts.sum(1), law.sum(1)) > 0.01 and chi_square(counts, law) < 1e-6


def test_gumbel_noise():
    noise = gumbel(seeds(40, 1)[:, 0], 500)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.01 and noise.dtype == torch.float32
    assert torch.equal(gumbel(seeds(40, 1)[7:9, 0], 500), noise[7:9]) and len(noise[:, 0].unique()) == 40


def test_a_row_is_the_same_in_any_micro_batch():
    model, (ids, mask) = policy(dtype=torch.float64), prompts()
    whole = roll(model)
    for rows in (slice(1, 3), slice(4, 5)):
        start = int((~mask[rows]).sum(1).min())
        part = soft_rollout(model, ids[rows, start:], mask[rows, start:], seeds()[rows], 0.9, Law(), (EOS,), PAD)
        n = part.mask.shape[1]
        assert torch.equal(part.tokens, whole.tokens[rows, :n]) and torch.equal(part.mask, whole.mask[rows, :n])
        torch.testing.assert_close(part.soft[part.mask], whole.soft[rows, :n][part.mask], atol=1e-12, rtol=1e-12)


# ------------------------------------------------------------------------------------------------- where it ends


def test_ends_by_hand():
    """The stop token is part of a completion, what follows is not, and nothing longer than the longest is returned."""
    tokens = torch.tensor([[4, EOS, 5, EOS, 2], [4, 5, 6, EOS, 4], [EOS, PAD, PAD, PAD, PAD]])
    r = roll(policy(), (2, 2, 1), tokens=tokens, hard=True)
    assert r.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]] and r.finished.all()
    assert r.tokens.tolist() == [[4, EOS, PAD, PAD], [4, 5, 6, EOS], [EOS, PAD, PAD, PAD]]
    assert r.soft.shape == r.log_law.shape == (3, 4, V) and r.soft[1].argmax(-1).tolist() == [4, 5, 6, EOS]
    capped = roll(policy(), (2, 2, 1), tokens=tokens[:, :3])
    assert capped.finished.tolist() == [True, False, True] and capped.mask[1].all()


def test_tokens_end_where_the_largest_entry_says(monkeypatch):
    for hard in (False, True):
        r = roll(policy(), (2, 3) * 6, tau=2.0, length=6, hard=hard)
        first = [(row.tolist() + [EOS]).index(EOS) for row in r.tokens]
        assert r.mask.sum(1).tolist() == [min(n + 1, r.mask.shape[1]) for n in first]
        assert r.finished.any() and not r.finished.all()
        assert torch.equal(r.soft.argmax(-1)[r.mask], r.tokens[r.mask])
    calls, original = [], room.gumbel
    monkeypatch.setattr(room, "gumbel", lambda *args: calls.append(1) or original(*args))
    over = roll(policy(), (2, 2), length=40, tokens=torch.full((2, 40), EOS))
    assert over.mask.shape == (2, 1) and len(calls) == room.CHECK_EVERY


def test_support_is_the_laws():
    law = Law(temperature=0.7, top_k=4, min_new_tokens=4)
    r = roll(policy(), law=law)
    inside = r.log_law > -torch.inf
    assert not inside[:, :4, EOS].any() and bool((inside.sum(-1) == 4).all()) and inside[:, 4:, EOS].any()
    assert torch.equal(r.soft > 0, inside) and bool(inside.gather(2, r.tokens[..., None])[r.mask].all())
    torch.testing.assert_close(r.log_law.exp().sum(-1), torch.ones(inside.shape[:2]))
    narrow = roll(policy(), law=Law(top_p=0.5)).log_law
    assert not (narrow == -torch.inf).all(-1).any() and (narrow > -torch.inf).sum(-1).max() < V


@pytest.mark.parametrize("options, message", [
    ({"tau": 0.0}, "tau must be above 0, not 0.0"),
    ({"tau": float("nan")}, "tau must be above 0, not nan"),
    ({"length": 43}, "prompts of 6 tokens and 43 new ones exceed the model's context of 48"),
])  # fmt: skip
def test_errors_name_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        roll(policy(), **options)


# ------------------------------------------------------------------------------------------------- memory


def saved_bytes(model, length: int, **options) -> int:
    """Bytes of all storages that a rollout keeps for its backward pass, parameters aside, and of the shared memory."""
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        roll(model, (3, 3, 3, 3), length=length, law=Law(min_new_tokens=100), **options)
    return sum(storage.nbytes() for storage in kept.values()) + 2 * 2 * 4 * 2 * 4 * (3 + length) * 4


def test_memory_is_linear_in_tokens():
    """Each further token adds as much as any before. Keeping whole cached keys would add T / 2 times its keys and values more."""
    model = policy()
    sizes = [saved_bytes(model, length) for length in (10, 20, 40)]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]) and 1.8 < sizes[2] / sizes[1] < 2
    again = [saved_bytes(model, length, recompute_every=1) for length in (20, 40)]
    assert again[1] < sizes[2] / 3 and again[1] < 2.1 * again[0]


def test_a_rollout_leaves_nothing_behind(monkeypatch):
    """No cycle through the graph: what it held is free without the garbage collector."""
    model, seen, original = policy(), [], room.CachedAttention.apply
    monkeypatch.setattr(room.CachedAttention, "apply", lambda *args: seen.append(weakref.ref(args[4])) or original(*args))
    gc.disable()
    try:
        r = roll(model)
        assert seen[0]() is not None
        r.soft.sum().backward()
        del r
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()
