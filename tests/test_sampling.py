"""The sampler: draws what it says it draws, and stores the log-probabilities that the training forward gives.

CPU by default. The static path that CUDA replays as graphs runs here without graphs, against the eager one; a class at
the end does the same on a CUDA device where there is one.
"""
import itertools

import pytest
import torch
from scipy import stats

import sampling
import twin
from adapters import AdapterSpec, Branch, attach, preset, reference, scaled, set_scales
from bundles import BUNDLES
from model import Decoder, ModelConfig
from rl_grpo import score_rows
from sampling import Law, Sampler, draw

PAD, STOP = 0, (2, 3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are so small that a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LLAMA = dict(family="llama", vocab_size=40, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, context=96)
CONFIGS = {
    "llama": ModelConfig(**LLAMA, rotary_dim=8),
    "llama_untied_bias": ModelConfig(**LLAMA, rotary_dim=8, tied=False, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen2": ModelConfig(**LLAMA | dict(family="qwen2"), rotary_dim=8, qkv_bias=True),
    "qwen3": ModelConfig(**LLAMA | dict(family="qwen3", head_dim=12), rotary_dim=12, qk_norm=True, tied=False),
    "gpt2": ModelConfig(
        **LLAMA | dict(family="gpt2", kv_heads=4), qkv_bias=True, out_bias=True, mlp_bias=True, gated_mlp=False,
        rms_norm=False, activation="gelu_new",
    ),
    "gpt_neox": ModelConfig(
        **LLAMA | dict(family="gpt_neox", kv_heads=4), rotary_dim=2, qkv_bias=True, out_bias=True, mlp_bias=True,
        gated_mlp=False, rms_norm=False, parallel_residual=True, activation="gelu", tied=False,
    ),
}  # fmt: skip
LAWS = {
    "plain": Law(),
    "temperature": Law(temperature=0.6),
    "top_k": Law(top_k=5),
    "top_p": Law(temperature=1.3, top_p=0.7),
    "min_new_tokens": Law(min_new_tokens=6),
    "suppress": Law(suppress=(5, 7)),
    "all": Law(temperature=1.5, top_k=9, top_p=0.9, min_new_tokens=4, suppress=(5, 7)),
}


def random_model(name: str, dtype=torch.float32, device="cpu", seed: int = 0, spread: float = 0.25) -> Decoder:
    """All weights drawn, so that norms, biases and logits are far from those of a fresh model."""
    torch.manual_seed(seed)
    model = Decoder(CONFIGS[name])
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.1 * torch.randn_like(p) if norm else spread * torch.randn_like(p))
    return model.to(device=device, dtype=dtype)


def with_branches(model: Decoder, spec: AdapterSpec, size: float = 0.1, seed: int = 1) -> Decoder:
    attach(model, spec, seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in model.adapter.groups.values():
            for p in group.values():
                p.copy_(torch.randn(p.shape, generator=g) * size)
    return model


def prompts(lengths=(5, 9, 2, 7), vocab: int = 40, seed: int = 0):
    """Left-padded random prompts: ids (P, L), mask (P, L)."""
    width = max(lengths)
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    ids = torch.randint(4, vocab, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(~mask, PAD), mask


def sampler_of(model: Decoder, static: bool | None = None) -> Sampler:
    sampler = Sampler(model)
    sampler.static = sampler.static if static is None else static
    sampler.refresh()
    return sampler


def sample(sampler, ids, mask, copies=3, new=20, law=Law(), seed=0, stop=STOP):
    return sampler(ids, mask, copies, new, stop, PAD, torch.Generator().manual_seed(seed), law)


def gap(rollout, model, law) -> float:
    """Largest distance between stored log-probabilities and those of the training forward, over all valid tokens."""
    rows = torch.arange(len(rollout.tokens), device=rollout.tokens.device)
    with torch.no_grad():
        scored = score_rows(model, rollout, rows, law)
    return (scored - rollout.logprobs[rollout.mask]).abs().max().item()


def same(a, b, tolerance: float = 0.0):
    """Equal tokens and masks, log-probabilities to `tolerance`; what one of them is longer by must be empty."""
    width = min(a.tokens.shape[1], b.tokens.shape[1])
    for long in (a, b):
        assert not long.mask[:, width:].any() and (long.tokens[:, width:] == PAD).all()
    assert torch.equal(a.mask[:, :width], b.mask[:, :width]) and torch.equal(a.tokens[:, :width], b.tokens[:, :width])
    assert (a.logprobs[:, :width] - b.logprobs[:, :width]).abs().max() <= tolerance
    assert torch.equal(a.finished, b.finished)
    if a.support is not None:
        valid = a.mask[:, :width]
        assert torch.equal(a.support[:, :width][valid], b.support[:, :width][valid])
    assert (a.allowed is None) == (b.allowed is None)
    if a.allowed is not None:
        assert torch.equal(a.allowed[:, :width], b.allowed[:, :width])


# ------------------------------------------------------------------------------------------------ the distribution


def exact_law(logits, law: Law, young: bool):
    """The law in float64 by brute force, token by token; logits (V,) -> (V,) probabilities."""
    p = (logits.double() / law.temperature).softmax(-1)
    for token in (*law.suppress, *(STOP if young else ())):
        p[token] = 0
    order = sorted(range(len(p)), key=lambda i: -p[i].item())
    order = order[: law.top_k] if law.top_k else order
    total, mass, kept = sum(p[i].item() for i in order), 0.0, []
    for i in order:
        if mass / total >= law.top_p:
            break
        kept.append(i)
        mass += p[i].item()
    out = torch.zeros_like(p)
    out[kept] = p[kept] / mass
    return out


def chi_square(tokens, p) -> float:
    """p-value of counts against probabilities; a token of probability 0 must not occur at all."""
    counts = torch.bincount(tokens, minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    likely = p * len(tokens) >= 5
    observed, expected = counts[likely].tolist(), (p[likely] * len(tokens)).tolist()
    if (rest := (p * len(tokens))[~likely].sum().item()) > 0:
        observed, expected = [*observed, counts[~likely].sum().item()], [*expected, rest]
    scale = sum(observed) / sum(expected)
    return stats.chisquare(observed, [e * scale for e in expected]).pvalue if len(observed) > 1 else 1.0


SMALL_LAWS = LAWS | {"top_k_1": Law(top_k=1), "tiny_top_p": Law(top_p=1e-6), "k_above_vocab": Law(top_k=99)}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", SMALL_LAWS)
def test_first_tokens_follow_the_law(name, static):
    law = SMALL_LAWS[name]
    model = random_model("llama", spread=0.15)
    ids, mask = prompts((4, 2))
    rollout = sample(sampler_of(model, static), ids, mask, copies=4000, new=1, law=law, seed=11)
    with torch.no_grad():
        logits = model(ids, mask)[:, -1]
    for prompt in range(2):
        rows = slice(prompt * 4000, (prompt + 1) * 4000)
        p = exact_law(logits[prompt], law, young=law.min_new_tokens > 0)
        assert chi_square(rollout.tokens[rows, 0], p) > 1e-3
        stored = rollout.logprobs[rows, 0]
        assert (stored - p[rollout.tokens[rows, 0]].log()).abs().max() < 1e-4
        if law.truncated:
            assert torch.equal(rollout.support[rows, 0], (p > 0).expand(4000, -1))
    assert (rollout.support is not None) == law.truncated


def test_second_tokens_follow_the_law():
    """Given the first token, the second one's frequencies: the cache and the positions count."""
    model = random_model("gpt2", spread=0.15)
    ids, mask = prompts((3, 6))
    law = Law(temperature=0.8)
    rollout = sample(sampler_of(model), ids, mask, copies=6000, new=2, law=law, stop=(2,), seed=5)
    first = rollout.tokens[6000:, 0]
    common = first[first != 2].mode().values
    with torch.no_grad():
        logits = model(torch.cat([ids[1], common[None]])[None])[0, -1]
    chosen = rollout.tokens[6000:, 1][first == common]
    assert len(chosen) > 200 and chi_square(chosen, exact_law(logits, law, young=False)) > 1e-3


def test_draw_by_hand():
    """Probabilities 1/8, 1/2, 0, 3/8: the first token whose cumulative probability reaches the uniform number."""
    logits = torch.tensor([1 / 8, 1 / 2, 1e-30, 3 / 8]).log().repeat(6, 1)
    logits[:, 2] = -torch.inf
    uniform = torch.tensor([1e-7, 0.125, 0.1251, 0.6249, 0.626, 1.0])
    token, logprob, support = draw(logits, uniform, Law(), torch.tensor([False]), torch.tensor([0]))
    assert token.tolist() == [0, 0, 1, 1, 3, 3] and support is None
    assert torch.allclose(logprob.exp(), torch.tensor([1 / 8, 1 / 8, 1 / 2, 1 / 2, 3 / 8, 3 / 8]))


IMPOSSIBLE = [("temperature", 0), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1), ("top_k", -1),
              ("min_new_tokens", -1)]  # fmt: skip


@pytest.mark.parametrize("name, value", IMPOSSIBLE)
def test_impossible_laws(name, value):
    with pytest.raises(ValueError, match=name):
        Law(**{name: value})


# -------------------------------------------------------------------------------- one law for sampling and scoring


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", CONFIGS)
def test_stored_logprobs_are_the_training_forwards(name, law):
    model = with_branches(random_model(name), preset("r4f2", dual=True))
    rollout = sample(sampler_of(model), *prompts(), law=LAWS[law])
    assert gap(rollout, model, LAWS[law]) < 1e-4
    with reference(model) as base:
        assert gap(rollout, base, Law(LAWS[law].temperature)) > 1e-2  # so the line above says something


@pytest.mark.parametrize("spec", ["r8", "r2h", "m8f4", "m8h", "r8o", "ds", "ds4h", "one_target"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_every_kind_of_branch(name, spec):
    target = {"gpt2": "c_attn", "gpt_neox": "dense"}.get(name, "k_proj")
    one = AdapterSpec("lora", (Branch("adapter", 3, 6.0),), (target,))
    model = with_branches(random_model(name), one if spec == "one_target" else preset(spec, dual=True))
    assert gap(sample(sampler_of(model), *prompts()), model, Law()) < 1e-4


ALL_OFF = dict.fromkeys(BUNDLES, 0.0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_bundles_run_beside_the_weights(name, dtype, bound, static):
    """At every scale the sampler is the forward, and as a sampler that never saw another scale; off, it is the base's own.
    (Stored log-probabilities are fp32 in fp64 too.)"""
    model = with_branches(random_model(name, dtype), preset("bundles", dual=False), size=0.3)
    sampler, seen = sampler_of(model, static), []
    for scales in ({}, {"b_rl_policy": 0.5, "b_ssl_main": 0.0}, ALL_OFF, {}):
        with scaled(model, **scales):
            sampler.refresh()
            seen.append(sample(sampler, *prompts(), new=8))
            same(seen[-1], sample(sampler_of(model, static), *prompts(), new=8))
            assert gap(seen[-1], model, Law()) < bound
    same(seen[2], sample(sampler_of(random_model(name, dtype), static), *prompts(), new=8))
    same(seen[0], seen[3])
    assert all((a.logprobs[:, 0] - b.logprobs[:, 0]).abs().max() > 1e-2 for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_greedy_decoding_with_bundles_is_the_forwards_argmax(name):
    model = with_branches(random_model(name), preset("bundles", dual=False), size=0.3)
    ids, mask = prompts()
    rollout = sample(sampler_of(model), ids, mask, copies=1, new=12, law=Law(top_k=1), stop=())
    whole = torch.cat((ids, rollout.tokens), dim=1)
    with torch.no_grad():
        logits = model(whole, torch.cat((mask, rollout.mask), dim=1))[:, ids.shape[1] - 1 : -1]
        with reference(model) as base:
            plain = base(whole, torch.cat((mask, rollout.mask), dim=1))[:, ids.shape[1] - 1 : -1]
    assert torch.equal(rollout.tokens, logits.argmax(-1)) and not torch.equal(rollout.tokens, plain.argmax(-1))


def test_full_fine_tuning():
    model = attach(random_model("qwen3"), preset("full", dual=False))
    sampler = sampler_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    sampler.refresh()
    assert gap(sample(sampler, *prompts()), model, Law()) < 1e-4


@pytest.mark.parametrize("kind", ["r4", "r1", "m4", "dsf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scales_may_change_between_rollouts(name, dtype, kind):
    """All, one, the other, half, none and back, with one sampler: as a sampler that never saw another scale."""
    model = with_branches(random_model(name, dtype), preset(kind, dual=True))
    sampler = sampler_of(model)
    for good, bad in [(1, 1), (1, 0), (0, 1), (0.5, 2), (0, 0), (1, 1)]:
        with scaled(model, good=good, bad=bad):
            sampler.refresh()
            rollout = sample(sampler, *prompts(), new=8)
            same(rollout, sample(sampler_of(model), *prompts(), new=8))
            assert gap(rollout, model, Law()) < (1e-4 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_deviation_is_bounded(name):
    """With logits of ordinary size; truncation is left out, since its border may fall on either side of a rounding."""
    model = with_branches(random_model(name, torch.bfloat16, spread=0.1), preset("r4", dual=True), size=0.05)
    law = Law(temperature=0.9)
    rollout = sample(sampler_of(model), *prompts(), law=law)
    assert rollout.logprobs.dtype == torch.float32 and gap(rollout, model, law) < 0.15


def test_small_updates_are_not_rounded_away_in_bfloat16():
    """Branches 1e-4 of their weights' size: merged in bfloat16 they leave most weights as they were; beside them in
    fp32 they change what is sampled."""
    model = with_branches(random_model("llama", torch.bfloat16), preset("r4", dual=False))
    for linear in (m for m in model.modules() if hasattr(m, "low_rank")):
        A, B = linear.low_rank()
        part, weight = linear.parts["adapter"], linear.base.weight.float()
        with torch.no_grad():
            part.B.mul_(1e-4 * weight.norm() / (B @ A).norm())
        A, B = linear.low_rank()
        assert ((weight + B @ A).bfloat16() == linear.base.weight).float().mean() > 0.9
    ids, mask = prompts([12] * 64)
    on = sample(sampler_of(model), ids, mask, copies=2, new=1)
    with reference(model) as base:
        off = sample(sampler_of(base), ids, mask, copies=2, new=1)
    moved = (on.logprobs - off.logprobs).abs()[on.tokens == off.tokens]
    assert (moved > 0).float().mean() > 0.2 and moved.max() < 0.1


# ------------------------------------------------------------------------------------------- the shape of a rollout


@pytest.mark.parametrize("static", [False, True])
def test_the_end_is_part_of_the_completion_and_nothing_follows(static):
    rollout = sample(sampler_of(random_model("llama"), static), *prompts(), copies=40, new=30)
    ended = 0
    for tokens, mask, logprobs, finished in zip(rollout.tokens, rollout.mask, rollout.logprobs, rollout.finished):
        stops = [i for i, t in enumerate(tokens.tolist()) if t in STOP]
        length = stops[0] + 1 if stops else 30
        assert mask.tolist() == [True] * length + [False] * (len(tokens) - length)
        assert (tokens[length:] == PAD).all() and (logprobs[length:] == 0).all() and (logprobs[:length] < 0).all()
        assert finished.item() == bool(stops)
        ended += bool(stops)
    assert 0 < ended < 160
    ids, mask = prompts()
    ids, mask = ids.repeat_interleave(40, 0), mask.repeat_interleave(40, 0)
    assert torch.equal(rollout.prompt_ids[rollout.prompt_mask], ids[mask])


@pytest.mark.parametrize("stop", [(PAD,), (), (2, 2)])
def test_pad_may_be_the_stop_token_and_stops_may_be_absent(stop):
    rollout = sample(sampler_of(random_model("llama")), *prompts(), copies=20, new=12, stop=stop)
    if stop == (PAD,):  # the end is in the mask though it is the padding's id
        assert (rollout.tokens[rollout.mask] == PAD).sum() == rollout.finished.sum() > 0
    if not stop:
        assert rollout.mask.all() and rollout.mask.shape[1] == 12 and not rollout.finished.any()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("new", [1, 2, 16, 17, 18, 33])
def test_length_cap(new, static):
    rollout = sample(sampler_of(random_model("llama"), static), *prompts(), new=new, law=Law(suppress=STOP))
    assert rollout.mask.shape == (12, new) and rollout.mask.all() and not rollout.finished.any()
    assert rollout.support.shape == (12, new, 40) and not rollout.support[..., list(STOP)].any()


@pytest.mark.parametrize("static", [False, True])
def test_stops_when_all_are_finished(static):
    """Every token is a stop token: nothing is decoded behind the first look."""
    rollout = sample(sampler_of(random_model("llama"), static), *prompts(), new=60, stop=tuple(range(40)))
    assert rollout.finished.all() and rollout.mask.sum() == 12 and rollout.mask.shape[1] <= 1 + sampling.CHECK_EVERY


def test_minimum_length():
    rollout = sample(sampler_of(random_model("llama")), *prompts(), copies=50, new=12, law=Law(min_new_tokens=5))
    lengths = rollout.mask.sum(1)
    assert lengths.min() == 6 and not torch.isin(rollout.tokens[:, :5], torch.tensor(STOP)).any()
    assert torch.equal(rollout.allowed, rollout.support) and not rollout.allowed[:, :5, list(STOP)].any()
    cut = sample(sampler_of(random_model("llama")), *prompts(), law=Law(top_k=3, min_new_tokens=5, suppress=(7, 9)))
    forbidden = torch.ones(40, dtype=torch.bool).index_fill(0, torch.tensor([7, 9]), False)
    assert torch.equal(cut.allowed[:, 5:], forbidden.expand_as(cut.allowed[:, 5:])) and (cut.allowed >= cut.support).all()
    assert sample(sampler_of(random_model("llama")), *prompts(), law=Law(top_k=3)).allowed is None


# ------------------------------------------------------------------------------------------------- fast, slow twins


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_prefill_equals_separate_prompts(name):
    """Row p * G + g of a shared rollout, and the same row sampled from its own unpadded prompt, same numbers."""
    sampler = sampler_of(random_model(name))
    ids, mask = prompts()
    shared = sample(sampler, ids, mask, copies=3, new=10)
    uniform = 1 - torch.rand(10, 12, generator=torch.Generator().manual_seed(0))
    for p in range(4):
        for g in range(3):
            row, sequence = p * 3 + g, ids[p, mask[p]][None]
            for t in range(int(shared.mask[row].sum())):
                with torch.no_grad():
                    logits = sampler.model(sequence)[:, -1]
                token, logprob, _ = draw(logits, uniform[t, row, None], Law(), None, None)
                assert token == shared.tokens[row, t] and abs(logprob - shared.logprobs[row, t]) < 1e-4
                sequence = torch.cat([sequence, token[None]], dim=1)


@pytest.mark.parametrize("law", ["plain", "all"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_dropping_rows_changes_no_sample(name, static, law, monkeypatch):
    model = random_model(name)
    rollouts = []
    for every in (1, 5, 10**6):
        monkeypatch.setattr(sampling, "CHECK_EVERY", every)
        rollouts.append(sample(sampler_of(model, static), *prompts(), copies=24, new=40, law=LAWS[law]))
    lengths = rollouts[0].mask.sum(1).sort().values
    assert lengths[len(lengths) // 2] < 35  # half of the rows are long gone at the end
    for other in rollouts[1:]:
        same(rollouts[0], other, tolerance=1e-5)


@pytest.mark.parametrize("law", ["plain", "all"])
@pytest.mark.parametrize("name", CONFIGS)
def test_static_shapes_equal_eager(name, law):
    """What CUDA replays, without the graph: padded prompts, masks instead of slices, halved row counts."""
    model = with_branches(random_model(name), preset("r2", dual=True))
    ids, mask = prompts()
    eager = sample(sampler_of(model, False), ids, mask, copies=24, new=40, law=LAWS[law])
    static = sample(sampler_of(model, True), ids, mask, copies=24, new=40, law=LAWS[law])
    same(eager, static, tolerance=1e-4)
    assert gap(static, model, LAWS[law]) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_products_equal_plain_ones(name, monkeypatch):
    """oneDNN's products of weights laid out in advance, and F.linear, which stands in where that kernel is missing."""
    model = with_branches(random_model(name), preset("r2", dual=True))
    packed = sample(sampler_of(model), *prompts(), copies=8)
    monkeypatch.setattr(twin, "ONEDNN", False)
    same(packed, sample(sampler_of(model), *prompts(), copies=8), tolerance=1e-4)


def test_a_refresh_in_inference_mode_leaves_no_inference_tensors():
    model = with_branches(random_model("llama"), preset("r2", dual=True))
    sampler = Sampler(model)
    with torch.inference_mode():
        sampler.refresh()
    sampler.refresh()


def check_repeated_rollouts(model, twin):
    """Many rollouts from one static sampler, lengths and seeds changing, against a fresh eager one on the CPU."""
    static, eager = sampler_of(model), sampler_of(twin, False)
    static.static = True
    kept, law = [], Law(temperature=1.1)
    changing = [(5, 9, 2, 7), (3, 1, 1, 2), (20, 4, 30, 6), (9, 9, 9, 9), (2, 30, 1, 1)]
    for seed, lengths in enumerate(changing * 2):
        ids, mask = prompts(lengths, seed=seed)
        mine = sample(static, ids.to(model.device), mask.to(model.device), copies=24, new=40, seed=seed, law=law)
        kept.append((mine, {k: v.clone() for k, v in vars(mine).items() if v is not None}))
        theirs = sample(eager, ids, mask, copies=24, new=40, seed=seed, law=law)
        yield mine, theirs
    for rollout, copy in kept:  # a rollout is the caller's own: later ones do not write into it
        assert all(torch.equal(getattr(rollout, k), v) for k, v in copy.items())


def test_repeated_static_rollouts():
    """gpt2 has learned positions: an idle row that counts beyond the context would be an index error."""
    model = random_model("gpt2")
    for mine, theirs in check_repeated_rollouts(model, model):
        same(mine, theirs, tolerance=1e-4)


def test_one_token_rollouts_do_not_share_memory():
    sampler = sampler_of(random_model("llama"), static=True)
    law = Law(suppress=(5,))
    first = sample(sampler, *prompts(), new=1, law=law, seed=0)
    copy = {k: v.clone() for k, v in vars(first).items()}
    sample(sampler, *prompts(seed=9), new=1, law=law, seed=1)
    assert all(torch.equal(getattr(first, k), v) for k, v in copy.items())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["r4", "m4", "ds", "bundles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refresh_is_seen(kind, dtype, static):
    model = with_branches(random_model("llama", dtype), preset(kind, dual=kind != "bundles"))
    sampler = sampler_of(model, static)
    before = sample(sampler, *prompts())
    with torch.no_grad():
        for p in next(iter(model.adapter.groups.values())).values():
            p.mul_(1.5)
    sampler.refresh()
    after = sample(sampler, *prompts())
    assert not torch.equal(before.logprobs[:, 0], after.logprobs[:, 0])
    same(after, sample(sampler_of(model, static), *prompts()))


# ------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("law", ["plain", "top_k"])
def test_sampled_in_parts_it_is_the_same_rollout(static, law):
    """Parts of 16 rows with 8 a prompt are two prompts; the last part has one, whose rows may end sooner than the others'."""
    model, (ids, mask) = random_model("llama"), prompts((5, 9, 2, 7, 4))
    sampler = sampler_of(model, static)
    whole = sample(sampler, ids, mask, copies=8, new=40, law=LAWS[law])
    sampler.rows = 17
    caches, inner = [], sampler._sample
    sampler._sample = lambda ids, *rest: caches.append(len(ids)) or inner(ids, *rest)
    parts = sample(sampler, ids, mask, copies=8, new=40, law=LAWS[law])
    same(whole, parts, tolerance=1e-5)
    assert caches == [2, 2, 1] and torch.equal(parts.prompt_ids, ids.repeat_interleave(8, 0))
    assert torch.equal(whole.finished, parts.finished) and gap(parts, model, LAWS[law]) < 1e-4


@pytest.mark.parametrize("static", [False, True])
def test_same_seed_same_rollout(static):
    model = random_model("qwen3")
    a = sample(sampler_of(model, static), *prompts(), seed=4)
    b = sample(sampler_of(model, static), *prompts(), seed=4)
    c = sample(sampler_of(model, static), *prompts(), seed=5)
    same(a, b)
    assert not torch.equal(a.tokens[:, 0], c.tokens[:, 0])


def test_the_generator_goes_on_and_the_global_one_stays():
    model = random_model("llama")
    torch.manual_seed(8)
    before = torch.get_rng_state()
    sampler, generator = sampler_of(model), torch.Generator().manual_seed(0)
    a, b = (sampler(*prompts(), 3, 8, STOP, PAD, generator) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(a.tokens[:, 0], b.tokens[:, 0])


def test_nothing_keeps_a_graph_and_the_model_is_unchanged():
    model = with_branches(random_model("llama"), preset("r4", dual=True))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rollout = sample(sampler_of(model), *prompts())
    assert not any(t.requires_grad or t.is_inference() for t in vars(rollout).values() if t is not None)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --------------------------------------------------------------------------------------------------------- failures


def test_errors():
    model = random_model("llama")
    sampler = sampler_of(model)
    ids, mask = prompts()
    empty = mask.clone()
    empty[2] = False
    hole = mask.clone()
    hole[1, 4] = False
    for bad_ids, bad_mask, options, message in [
        (ids[:0], mask[:0], {}, "no prompt"),
        (ids, empty, {}, "not empty"),
        (ids[:, :0], mask[:, :0], {}, "not empty"),
        (ids.flip(1), mask.flip(1), {}, "left-padded"),
        (ids, hole, {}, "left-padded"),
        (ids, mask.long(), {}, "bool"),
        (ids, mask[:, 1:], {}, "prompt_mask"),
        (ids, mask, dict(new=88), "9 tokens and max_new_tokens=88 exceed the model's context of 96"),
        (ids, mask, dict(new=0), "max_new_tokens=0"),
        (ids, mask, dict(copies=0), "num_generations=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(sampler, bad_ids, bad_mask, **options)
    sample(sampler, ids, mask, new=87)  # just fits


def test_forgotten_refresh_and_late_branches():
    model = random_model("llama")
    sampler = Sampler(model)
    with pytest.raises(ValueError, match="refresh"):
        sample(sampler, *prompts())
    sampler.refresh()
    attach(model, preset("r2", dual=True))
    with pytest.raises(ValueError, match="attach first"):
        sampler.refresh()


# ------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestGraphs:
    """The captured graphs against the eager rollout on the CPU: same uniform numbers, so nearly always equal."""

    @staticmethod
    def alike(mine, theirs):
        """All but a tiny share of rows are equal (a uniform number may fall between two roundings of one border)."""
        width = min(mine.tokens.shape[1], theirs.tokens.shape[1])
        tokens, mask = mine.tokens[:, :width].cpu(), mine.mask[:, :width].cpu()
        equal = (tokens == theirs.tokens[:, :width]).all(1) & (mask == theirs.mask[:, :width]).all(1)
        assert equal.float().mean() > 0.97
        near = (mine.logprobs[:, :width].cpu() - theirs.logprobs[:, :width])[equal].abs().max()
        assert near < 1e-3 and not mine.mask[:, width:].any()

    @pytest.mark.parametrize("name, law", itertools.product(CONFIGS, LAWS))
    def test_graph_equals_eager(self, name, law):
        model = with_branches(random_model(name), preset("r2", dual=True))
        twin = with_branches(random_model(name, device="cuda"), preset("r2", dual=True))
        ids, mask = prompts()
        theirs = sample(sampler_of(model), ids, mask, copies=24, new=40, law=LAWS[law])
        mine = sample(sampler_of(twin), ids.cuda(), mask.cuda(), copies=24, new=40, law=LAWS[law])
        self.alike(mine, theirs)
        assert gap(mine, twin, LAWS[law]) < 1e-3

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_repeated_rollouts_of_changing_lengths(self, name):
        for mine, theirs in check_repeated_rollouts(random_model(name, device="cuda"), random_model(name)):
            self.alike(mine, theirs)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", ["r4", "m4"])
    def test_refresh_and_scales_reach_the_graph(self, kind, dtype):
        model = with_branches(random_model("llama", dtype, "cuda"), preset(kind, dual=True))
        sampler, (ids, mask) = sampler_of(model), (t.cuda() for t in prompts())
        bound = 1e-3 if dtype == torch.float32 else 0.3
        seen = []
        for good, bad in [(0, 0), (1, 1), (1, 0), (0.5, 1), (1, 1)]:
            set_scales(model, good, bad)
            with torch.no_grad():
                for p in model.adapter.groups["good"].values():
                    p.mul_(1.1)
            sampler.refresh()
            seen.append(sample(sampler, ids, mask, copies=16, new=12))
            assert gap(seen[-1], model, Law()) < bound
        assert all(not torch.equal(a.logprobs[:, 0], b.logprobs[:, 0]) for a, b in itertools.pairwise(seen))

    def test_all_finished_stops(self):
        model = random_model("llama", device="cuda")
        rollout = sample(sampler_of(model), *(t.cuda() for t in prompts()), new=60, stop=tuple(range(40)))
        assert rollout.finished.all() and rollout.mask.sum() == 12
        assert rollout.mask.shape[1] <= 1 + sampling.CHECK_EVERY

    def test_no_token_of_probability_zero(self):
        """The scan of a large, mostly empty vocabulary rises by roundings where nothing may be drawn."""
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(64, 50_000, generator=g).cuda() * 3
        for _ in range(50):
            uniform = 1 - torch.rand(64, generator=g).cuda()
            young, stop = torch.tensor([False]).cuda(), torch.tensor([0]).cuda()
            token, logprob, support = draw(logits, uniform, Law(top_p=0.5), young, stop)
            assert logprob.isfinite().all() and support.gather(1, token[:, None]).all()
