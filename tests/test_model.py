"""The decoder against transformers on random small configs of every family: logits, gradients, greedy tokens, files.

No model is downloaded: a random transformers model is saved, loaded by our code and compared. The mean loss of two real
checkpoints is compared with a figure that was taken with other code.
"""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as ours
from adapter_files import merge
from adapters import attach, preset
from data import load_rows, load_tokenizer
from model import Cache, Decoder, ModelConfig, Rotate, attend, config_from_hf, hf_name, is_conv1d, load, save
from sampling import Law, Sampler

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, CONTEXT = 37, 48
ROTARY = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=1, eos_token_id=2)
CASES = {  # name: (transformers' config class, its arguments)
    "llama": ("Llama", ROTARY | dict(num_key_value_heads=2)),
    "llama_tied": ("Llama", ROTARY | dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama_bias": ("Llama", ROTARY | dict(attention_bias=True, mlp_bias=True, head_dim=12)),
    "llama3_scaling": ("Llama", ROTARY | dict(num_key_value_heads=2, rope_theta=500.0, rope_scaling=LLAMA3)),
    "qwen2": ("Qwen2", ROTARY | dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2_untied": ("Qwen2", ROTARY | dict(num_key_value_heads=4)),
    "qwen3": ("Qwen3", ROTARY | dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
    "qwen3_bias": ("Qwen3", ROTARY | dict(num_key_value_heads=4, head_dim=6, attention_bias=True)),
    "gpt2": ("GPT2", GPT2),
    "gpt2_inner": ("GPT2", GPT2 | dict(n_inner=40, tie_word_embeddings=False, activation_function="gelu")),
    "neox": ("GPTNeoX", ROTARY | dict(rotary_pct=0.25, hidden_size=64)),
    "neox_serial": ("GPTNeoX", ROTARY | dict(rotary_pct=1.0, use_parallel_residual=False, attention_bias=False)),
    "neox_tied": ("GPTNeoX", ROTARY | dict(rotary_pct=0.5, tie_word_embeddings=True)),
}
HEADS = {"Llama": "LlamaForCausalLM", "Qwen2": "Qwen2ForCausalLM", "Qwen3": "Qwen3ForCausalLM",
         "GPT2": "GPT2LMHeadModel", "GPTNeoX": "GPTNeoXForCausalLM"}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are so small that a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peer_model(case: str):
    """A random transformers model without dropout. Every parameter is drawn, so that no bias or norm is 0 or 1."""
    kind, values = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    peer = getattr(transformers, HEADS[kind])(getattr(transformers, kind + "Config")(**values)).eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            norm = p.dim() == 1 and name.endswith("weight")
            p.copy_(1 + 0.2 * torch.randn_like(p) if norm else 0.2 * torch.randn_like(p))
    return peer


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """(transformers' model, ours loaded from its folder, the folder)."""
    peer = peer_model(request.param)
    peer.save_pretrained(tmp_path / "hf")
    model, folder = load(str(tmp_path / "hf"))
    return peer, model, folder


def saved(case: str, tmp_path, **options):
    peer = peer_model(case)
    peer.save_pretrained(tmp_path / case, **options)
    return peer, tmp_path / case


def token_ids(rows: int, length: int, seed: int = 0):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], width: int):
    """Random ids (B, width) and a mask that is True for the last lengths[b] of row b."""
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return token_ids(len(lengths), width, seed=3).masked_fill(~mask, 0), mask


def gap(a, b) -> float:
    return (a - b).abs().max().item()


def gradients_by_our_name(peer, model) -> dict[str, torch.Tensor]:
    """The peer's gradients, one for each of our parameters and none left over; Conv1D weights transposed."""
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    if "embed_out.weight" not in theirs and model.config.family == "gpt_neox" and not model.config.tied:
        theirs["embed_out.weight"] = theirs.pop("lm_head.weight")  # transformers 5 renames it in memory
    grads = {name: theirs.pop(hf_name(name, model.config.family)) for name, _ in model.named_parameters()}
    assert not theirs
    return {name: grad.t() if is_conv1d(name, model.config) else grad for name, grad in grads.items()}


# ------------------------------------------------------------------------------------------------- against the peer


def test_logits_and_gradients(pair):
    """Every parameter's gradient of a cross-entropy, by Hugging Face's name."""
    peer, model, _ = pair
    model.requires_grad_(True)
    ids = token_ids(3, 17)
    theirs, mine = peer(ids).logits, model(ids)
    assert gap(mine, theirs) < 1e-5
    for logits in (theirs, mine):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = gradients_by_our_name(peer, model)
    for name, p in model.named_parameters():
        grad = grads[name]
        assert p.grad.shape == grad.shape and gap(p.grad, grad) < 1e-5, name
        assert p.grad.abs().max() > 0, name


def test_left_padding_and_its_gradients(pair):
    """Real positions only: what stands at a padded place is nobody's business, but must not be NaN."""
    peer, model, _ = pair
    model.requires_grad_(True)
    ids, mask = left_padded([9, 4, 12, 1], 12)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    theirs = peer(ids, attention_mask=mask.long(), position_ids=positions).logits
    mine = model(ids, mask)
    assert mine.isfinite().all() and gap(mine[mask], theirs[mask]) < 1e-5
    assert torch.equal(mine, model(ids, mask, positions))
    for row, length in enumerate([9, 4, 12, 1]):  # a padded row is the same text without its padding
        assert gap(mine[row, -length:], model(ids[row : row + 1, -length:])[0]) < 1e-5
    mine[mask].logsumexp(-1).sum().backward()
    theirs[mask].logsumexp(-1).sum().backward()
    grads = gradients_by_our_name(peer, model)
    for name, p in model.named_parameters():
        grad = grads[name]
        assert gap(p.grad, grad) < 2e-5 * max(1.0, grad.abs().max().item()), name


def test_position_ids(pair):
    """Positions that neither begin at 0 nor go on by 1."""
    peer, model, _ = pair
    ids = token_ids(2, 10)
    positions = torch.stack([torch.arange(10) * 3 + 5, torch.arange(10) + 20])
    with torch.no_grad():
        theirs, mine = peer(ids, position_ids=positions).logits, model(ids, position_ids=positions)
    assert gap(mine, theirs) < 1e-5 and gap(mine, model(ids)) > 1e-3


def test_greedy_tokens(pair):
    peer, model, _ = pair
    ids, mask = left_padded([6, 3], 6)
    theirs = peer.generate(
        ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=14, eos_token_id=2, pad_token_id=0
    )[:, 6:]  # fmt: skip
    sampler = Sampler(model)
    sampler.refresh()
    mine = sampler(ids, mask, 1, 14, (2,), 0, torch.Generator().manual_seed(0), Law(top_k=1)).tokens
    width = theirs.shape[1]  # the peer stops at once when all are finished, the sampler looks now and then
    assert torch.equal(mine[:, :width], theirs) and (mine[:, width:] == 0).all()


def test_save_loads_back_in_transformers(pair, tmp_path):
    peer, model, _ = pair
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    folder = save(model, tmp_path / "mine", hf_extra={"bos_token_id": 1, "eos_token_id": 2})
    back, report = type(peer).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = token_ids(2, 20)
    with torch.no_grad():
        assert gap(back.eval()(ids).logits, model(ids)) < 1e-5
    assert (back.config.bos_token_id, back.config.eos_token_id) == (1, 2)
    again, _ = load(str(folder))
    assert again.config == model.config and torch.equal(again(ids), model(ids))


def test_sharded_files(pair, tmp_path):
    peer, model, _ = pair
    peer.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    sharded, _ = load(str(tmp_path / "shards"))
    whole = model.state_dict()
    assert all(torch.equal(tensor, whole.pop(name)) for name, tensor in sharded.state_dict().items()) and not whole


# ---------------------------------------------------------------------------------------------- published layouts


def test_gpt2_as_on_the_hub(tmp_path):
    """openai-community/gpt2: names without `transformer.`, and causal masks among the weights."""
    peer, folder = saved("gpt2", tmp_path)
    state = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(CONTEXT, CONTEXT).tril()[None, None].contiguous()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, folder / "model.safetensors")
    assert gap(load(str(folder))[0](token_ids(2, 9)), peer(token_ids(2, 9)).logits) < 1e-5


def test_pythia_as_on_the_hub(tmp_path):
    """EleutherAI/pythia: rotary keys of old configs, mask and frequency buffers, half precision."""
    peer = peer_model("neox")
    for p in peer.parameters():
        p.data = p.data.half().float()
    folder = tmp_path / "neox"
    peer.save_pretrained(folder)
    state = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
    for layer in range(2):
        state[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.uint8)
        state[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        state[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(state, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    values.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(values | {"rotary_pct": 0.25, "rotary_emb_base": 10000}))
    assert gap(load(str(folder))[0](token_ids(2, 9)), peer(token_ids(2, 9)).logits) < 1e-5


def test_config_as_older_versions_write_it(tmp_path):
    """rope_theta and rope_scaling at the top level, as in the config.json of Llama 3.2."""
    peer, folder = saved("llama3_scaling", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 500.0, "rope_scaling": LLAMA3}))
    assert gap(load(str(folder))[0](token_ids(2, 40)), peer(token_ids(2, 40)).logits) < 1e-5


def test_tied_head_may_stand_in_the_file_but_not_differ(tmp_path):
    _, folder = saved("llama_tied", tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    load(str(folder))
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        load(str(folder))


def test_saving_over_its_own_folder(tmp_path):
    """The weights must not be a view of the file that is being replaced."""
    _, folder = saved("llama", tmp_path)
    first, second = load(str(folder))[0], load(str(folder))[0]
    before = {k: v.clone() for k, v in second.state_dict().items()}
    with torch.no_grad():
        for p in first.parameters():
            p.add_(1)
    save(first, folder, tokenizer_from=folder)
    for state, shift in ((load(str(folder))[0].state_dict(), 1), (second.state_dict(), 0)):
        assert all(torch.equal(v, before[k] + shift) for k, v in state.items())


def test_bfloat16(tmp_path):
    peer, folder = saved("qwen3", tmp_path)
    model, _ = load(str(folder), dtype=torch.bfloat16)
    ids = token_ids(2, 12)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert gap(model(ids).float(), peer.bfloat16()(ids).logits.float()) < 0.1
    save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------- one pass, other ways in


def test_cache_equals_full_forward(pair):
    """Prefill, a second chunk, then one token at a time; positions are the cache's own."""
    _, model, _ = pair
    ids = token_ids(2, 14)
    with torch.no_grad():
        full = model(ids)
        cache = Cache(model.config, 2, 20, torch.float32, "cpu")
        parts = []
        for start, end in [(0, 6), (6, 10), *[(t, t + 1) for t in range(10, 14)]]:
            cache.upto = end
            parts.append(model(ids[:, start:end], cache=cache))
            cache.slot += end - start
    assert gap(torch.cat(parts, dim=1), full) < 1e-5


def test_embeddings_and_logits_from(pair):
    _, model, _ = pair
    ids, mask = left_padded([8, 5], 8)
    full = model(ids, mask)
    assert torch.equal(model(embeds=model.embed_tokens(ids), attention_mask=mask), full)
    for start in (0, 3, 7):
        part = model(ids, mask, logits_from=start)
        assert part.shape == (2, 8 - start, VOCAB) and gap(part, full[:, start:]) < 1e-6


def test_gradient_of_embeddings(tmp_path):
    """What soft (Gumbel) tokens need: the gradient that reaches the input embeddings."""
    peer, folder = saved("qwen2", tmp_path)
    model, _ = load(str(folder))
    embeds = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    grads = []
    for run in (lambda e: model(embeds=e), lambda e: peer(inputs_embeds=e).logits):
        leaf = embeds.clone().requires_grad_(True)
        run(leaf).log_softmax(-1)[:, :, 5].sum().backward()
        grads.append(leaf.grad)
    assert gap(*grads) < 1e-5


# ------------------------------------------------------------------------------------------ fast paths, slow twins


def slow_attention(q, k, v, bias, causal):
    """softmax(q k / sqrt d + bias) v in float64, head by head."""
    q, k, v = q.double(), k.double(), v.double()
    (batch, heads, length, dim), keys = q.shape, k.shape[2]
    out = torch.empty_like(q)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            scores = torch.einsum("td,sd->ts", q[b, h], k[b, kv]) / math.sqrt(dim)
            if bias is not None:
                scores = scores + bias.double().expand(batch, 1, length, keys)[b, 0]
            elif causal:
                late = torch.arange(keys)[None] > torch.arange(length)[:, None] + keys - length
                scores = scores.masked_fill(late, -math.inf)
            out[b, h] = scores.softmax(-1) @ v[b, kv]
    return out


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length, keys", [(7, 7), (1, 9), (3, 9)])
def test_attend(length, keys, heads, groups, biased, device):
    """Training (T = S), decoding (T = 1) and a chunk behind a cache; forward and gradients."""
    g = torch.Generator().manual_seed(length * keys + heads)
    q = torch.randn(2, heads, length, 8, generator=g)
    k, v = (torch.randn(2, groups, keys, 8, generator=g) for _ in range(2))
    bias = torch.randn(2, 1, length, keys, generator=g) if biased else None
    weight = torch.randn(2, heads, length, 8, generator=g)
    grads = []
    for run, where in ((attend, device), (slow_attention, "cpu")):
        leaves = [t.to(where).requires_grad_(True) for t in (q.clone(), k.clone(), v.clone())]
        y = run(*leaves, None if bias is None else bias.to(where), True)
        (y * weight.to(where)).sum().backward()
        grads.append([y.detach().cpu().double(), *[leaf.grad.cpu().double() for leaf in leaves]])
    assert all(gap(a, b) < 1e-5 for a, b in zip(*grads))


@pytest.mark.parametrize("rotary", [8, 4])
def test_rotate(rotary):
    """Against the textbook formula x cos + rotate_half(x) sin, and its autograd gradient."""
    g = torch.Generator().manual_seed(rotary)
    x = torch.randn(2, 5, 3, 8, generator=g, dtype=torch.float64)
    angle = torch.randn(2, 5, 1, rotary // 2, generator=g, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=g, dtype=torch.float64)

    def plain(x):
        turned, rest = x[..., :rotary], x[..., rotary:]
        half = torch.cat((-turned[..., rotary // 2 :], turned[..., : rotary // 2]), dim=-1)
        cos, sin = (torch.cat((t, t), dim=-1) for t in (angle.cos(), angle.sin()))
        return torch.cat((turned * cos + half * sin, rest), dim=-1)

    results = []
    cos, sin = torch.cat((angle.cos(), angle.cos()), dim=-1), angle.sin()
    assert gap(Rotate.rotate(x, cos, sin), plain(x)) < 1e-12
    for run in (plain, lambda x: Rotate.apply(x, cos, sin)):
        leaf = x.clone().requires_grad_(True)
        y = run(leaf)
        (y * weight).sum().backward()
        results.append((y, leaf.grad))
    assert gap(results[0][0], results[1][0]) < 1e-12 and gap(results[0][1], results[1][1]) < 1e-12


def test_attention_is_causal(pair):
    """Bitwise: a later token changes no earlier logit."""
    _, model, _ = pair
    ids = token_ids(2, 10)
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % VOCAB
    with torch.no_grad():
        a, b = model(ids), model(other)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6:], b[:, 6:])


# ---------------------------------------------------------------------------------------------------------- failures


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {k: v for k, v in values.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(values))


def change_state(folder, function):
    state = load_file(folder / "model.safetensors")
    function(state)
    save_file(state, folder / "model.safetensors")


def cut(file, count: int):
    file.write_bytes(file.read_bytes()[:-count])


FAILURES = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot read .*config.json"),
    "config without a size": (lambda f: change_config(f, hidden_size=...), "hidden_size"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated": (lambda f: cut(f / "model.safetensors", 100), "cannot read"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot read"),
    "missing": (lambda f: change_state(f, lambda s: s.pop("model.norm.weight")), r"missing \['norm.weight'\] \(1\)"),
    "unexpected": (lambda f: change_state(f, lambda s: s.update(x=torch.ones(1))), r"unexpected \['x'\] \(1\)"),
    "shape": (
        lambda f: change_state(f, lambda s: s.update({"model.norm.weight": torch.ones(31)})),
        r"norm.weight has shape \(31,\)",
    ),
    "config says otherwise": (lambda f: change_config(f, intermediate_size=64), "shape"),
    "fewer layers in the config": (lambda f: change_config(f, num_hidden_layers=1), "unexpected"),
    "untied in the config": (lambda f: change_config(f, tie_word_embeddings=True), "tie_word_embeddings"),
    "family": (lambda f: change_config(f, model_type="mamba"), "'mamba' is not one of llama, qwen2"),
    "rope": (lambda f: change_config(f, rope_parameters={"rope_type": "yarn"}), "'yarn' is not supported"),
    "old rope": (
        lambda f: change_config(f, rope_parameters=..., rope_scaling={"type": "linear", "factor": 2.0}),
        "'linear' is not supported",
    ),
    "half a rope": (lambda f: change_config(f, rope_parameters={"rope_type": "llama3"}), "low_freq_factor"),
    "activation": (lambda f: change_config(f, hidden_act="mish"), "'mish'; known: gelu"),
    "window": (lambda f: change_config(f, use_sliding_window=True), "sliding"),
    "heads": (lambda f: change_config(f, num_key_value_heads=3), "no multiple"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_load_fails_with_its_reason(case, tmp_path):
    _, folder = saved("llama", tmp_path)
    load(str(folder))
    spoil, message = FAILURES[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load(str(folder))


def test_missing_shard(tmp_path):
    _, folder = saved("llama", tmp_path, max_shard_size="20KB")
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="is missing"):
        load(str(folder))


@pytest.mark.parametrize("name", ["no_such_model", "./nowhere", "/nowhere/at/all", "a/b/c", ""])
def test_bad_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such folder|no config.json"):
        load(name)


def test_hub_failure_is_one_line(monkeypatch):
    import huggingface_hub

    def down(*args, **kwargs):
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", down)
    with pytest.raises(ValueError, match=r"'owner/name'.*\(no route to host\)$"):
        load("owner/name")


def test_too_long_a_sequence(pair):
    _, model, _ = pair
    model(token_ids(1, CONTEXT))
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens do not fit the model's context of {CONTEXT}"):
        model(token_ids(1, CONTEXT + 1))


def test_model_with_branches_is_not_saved(tmp_path):
    _, folder = saved("llama", tmp_path)
    model, _ = load(str(folder))
    attach(model, preset("r2", dual=True))
    with pytest.raises(ValueError, match="merge"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(merge(model), tmp_path / "out")


# ------------------------------------------------------------------------------------------------ small and real


def test_new_decoder():
    """Random weights: normal(0, .02), residual outputs smaller; the global generator decides."""
    config = ModelConfig("llama", 100, 64, 8, 4, 2, 16, 128, 32, rotary_dim=16)
    torch.manual_seed(5)
    model = Decoder(config)
    assert abs(model.embed_tokens.weight.std().item() - 0.02) < 0.001
    assert abs(model.layers[0].self_attn.o_proj.weight.std().item() - 0.02 / 4) < 0.0005
    torch.manual_seed(5)
    assert torch.equal(Decoder(config).layers[7].mlp.up_proj.weight, model.layers[7].mlp.up_proj.weight)


def test_load_leaves_the_random_state(tmp_path):
    _, folder = saved("qwen3", tmp_path)
    before = torch.get_rng_state()
    model, _ = load(str(folder))
    assert torch.equal(before, torch.get_rng_state()) and not any(p.requires_grad for p in model.parameters())


def test_gpt_neox_default_of_rotary_pct():
    values = {k: v for k, v in ROTARY.items()} | {"model_type": "gpt_neox"}
    assert config_from_hf(values).rotary_dim == 2  # a quarter of a head of 8, as in transformers


@pytest.mark.parametrize("name, loss, targets", [("stories3M", 1.5715, 13184), ("stories260K", 1.4592, 23961)])
def test_mean_loss_of_real_weights(name, loss, targets, data_dir):
    """Over the first 60 test rows of TinyStories, BOS first, at most 512 ids a row."""
    model, folder = load(str(data_dir / "models" / name))
    tokenizer = load_tokenizer(folder)
    texts = load_rows(str(data_dir / "datasets/tinystories"), "test", limit=60)
    rows = sorted((tokenizer.encode_prompt(text["story"])[:512] for text in texts), key=len)
    total = count = 0
    with torch.no_grad():
        for i in range(0, 60, 6):
            batch = rows[i : i + 6]
            width = max(map(len, batch))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])  # padding behind is seen by none
            real = torch.arange(1, width)[None] < torch.tensor([len(row) for row in batch])[:, None]
            total += F.cross_entropy(model(ids)[:, :-1][real], ids[:, 1:][real], reduction="sum").item()
            count += int(real.sum())
    assert count == targets and abs(total / count - loss) < 1e-4


def test_every_known_family_is_tested():
    assert {CASES[name][0].lower().replace("gptneox", "gpt_neox") for name in CASES} == set(ours.FAMILIES)
