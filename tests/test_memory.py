"""memory.py: what is counted on the meta device is what the same code takes on the CPU; and the presets it is asked about."""
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import memory
import model as decoder
import plans
import train_grpo
import twin
from ledger import Ledger, as_on_cuda
from memory import GIB, Args, adapt, estimate, learn, main, score, shape_of, take_steps
from model import ModelConfig
from rl_grpo import Config

SHAPE = ModelConfig("qwen3", 512, 64, 2, 4, 2, 32, 160, 512, rotary_dim=32, qk_norm=True)
FULL = "configs/code_full.yaml"


def asked(lora_config="ds", dtype="float32", limit=1e-9, **flags):
    flags = {"batch_size": 8, "num_generations": 2, "max_new_tokens": 32, "beta": 1e-3} | flags
    return Args(lora_config=lora_config, dtype=dtype, memory_gib=limit, prompt_length=16, eval_prompts=6), Config(**flags)


@pytest.fixture(autouse=True)
def plain_products(monkeypatch):
    """The CPU's packed weights are no storages; CUDA has none."""
    for room in (twin, decoder):
        monkeypatch.setattr(room, "ONEDNN", False)


@pytest.mark.parametrize("lora_config, rollout_size", [("ds", 0), ("ds8", 6), ("r4", 6), ("m8", 0)])
def test_meta_counts_what_the_cpu_allocates(lora_config, rollout_size):
    args, config = asked(lora_config, micro_batch_size=4, rollout_size=rollout_size)
    meta, real = estimate(SHAPE, args, config), estimate(SHAPE, args, config, device="cpu")
    steps = 4 * len(adapt(memory.decoder(SHAPE, args, "meta"), args, config))  # AdamW counts them on the CPU, in fp32
    assert meta.kept == real.kept | {"AdamW's moments": real.kept["AdamW's moments"] - steps}
    assert {name: size - steps * ("..." not in name) for name, size in real.peaks.items()} == meta.peaks
    assert meta.modules == (0 if lora_config == "m8" else 14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_config", ["ds", "r4"])
@pytest.mark.parametrize("size", [1, 3])
def test_saved_for_backward(dtype, lora_config, size):
    """To the byte, and to what saved_tensors_hooks find: storages that were not there before."""
    args, config = asked(lora_config, dtype)
    found = []
    for device in ("meta", "cpu"):
        with Ledger(device) as ledger, memory.patch("torch.is_autocast_enabled", lambda kind: False):
            model = memory.decoder(SHAPE, args, device)
            parameters = adapt(model, args, config)
            optimizer = torch.optim.SGD(parameters)
            learn(model, optimizer, 1, args, config, ledger)  # makes the rotary table
            found.append(learn(model, optimizer, size, args, config, ledger))
            before, saved = set(ledger.alive), {}

            def pack(tensor, before=before, saved=saved):
                storage = tensor.untyped_storage()
                if storage._cdata not in before:
                    saved[storage._cdata] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = score(model, size, args, config)
            rest = 4 * 2 * len(out)  # its own value, and the reference's
        assert sum(saved.values()) + rest == found[-1][1]
    assert found[0] == found[1]


@pytest.mark.parametrize("lora_config", ["ds", "r4"])
@pytest.mark.parametrize("size", [1, 4])
def test_real_steps_take_what_was_estimated(lora_config, size):
    args, config = asked(lora_config, micro_batch_size=size)
    with Ledger("cpu") as ledger:
        real = take_steps(SHAPE, args, config, "cpu", ledger.mark, lambda: ledger.peak)
    found = estimate(SHAPE, args, config)
    assert real["update"] == pytest.approx(found.peaks["update"], rel=0.03)
    # eager here: what the graphs' memory stands for is in the peak, if at all
    assert real["rollout"] == pytest.approx(found.peaks["rollout"], rel=0.06)
    assert real["evaluation"] == pytest.approx(found.peaks["evaluation"], rel=0.06)


def test_the_ledger_agrees_with_the_allocator():
    """Peak of a forward and a backward pass, by the events of torch's own allocator."""
    args, config = asked("r4")
    model = memory.decoder(SHAPE, args, "cpu")
    optimizer = torch.optim.SGD(adapt(model, args, config))
    run = lambda ledger: learn(model, optimizer, 3, args, config, ledger)  # noqa: E731
    run(SimpleNamespace(mark=lambda: None, now=0, peak=0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(SimpleNamespace(mark=lambda: None, now=0, peak=0))
    now, peak = 0, 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    with Ledger("cpu") as ledger:
        before = {id(t): t for t in (*model.parameters(), *model.buffers(), model.rope)}
        for tensor in before.values():
            ledger.enter(tensor)
        start = ledger.now
        assert run(ledger)[0] - start == pytest.approx(peak, rel=0.02)


def test_what_cudas_kernels_keep():
    """By hand, beside input and output, in bytes: a number a row; flash the same a head; no scores of every pair of tokens."""
    x = lambda *shape, **more: torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True, **more)  # noqa: E731
    F = torch.nn.functional
    with Ledger("meta") as ledger, as_on_cuda():
        rows, weight, q, k = x(2, 48, 64), x(64), x(2, 8, 48, 16), x(2, 2, 48, 16)
        wide = x(2, 8, 48, 16)
        mask = torch.empty(2, 1, 48, 48, device="meta", dtype=torch.bfloat16)
        for call, out, more in (
            (lambda: F.rms_norm(rows, (64,), weight, 1e-6), rows, 2 * 48 * 4),
            (lambda: F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True), q, 2 * 8 * 48 * 4),
            (lambda: F.scaled_dot_product_attention(q, wide, wide, attn_mask=mask), q, 2 * 8 * 64 * 4),
        ):
            before = ledger.now
            y = call()
            assert y.grad_fn is not None and out.nbytes + more <= ledger.now - before <= out.nbytes + more + 64  # seeds
            y.sum().backward()
            del y
    assert not torch.empty(1).is_cuda and "_scaled" not in repr(F.scaled_dot_product_attention)


def test_qwen3_4b():
    """The figures of the reference, the parts that follow from shapes alone by hand, and one number for each direction."""
    with as_on_cuda():
        args, config = memory.parse(["--config", FULL, "--memory_gib", "1e-9"])
        found = estimate(shape_of(args.model), args, config)
    assert (found.modules, found.trained, found.largest) == (252, 534_528, 0)
    assert found.kept["base weights"] == 2 * 4_022_468_096
    shapes = {(4096, 2560): 1, (1024, 2560): 2, (2560, 4096): 1, (9728, 2560): 2, (2560, 9728): 1}
    vectors = 36 * 4 * sum(count * min(shape) * sum(shape) for shape, count in shapes.items())
    assert found.kept["frozen tensors of the adapter (U and V)"] == vectors  # 18.2 GiB
    slots = -(-args.prompt_length // 16) * 16 + config.max_new_tokens
    rows = config.rollout_size + config.batch_size % config.rollout_size
    assert found.kept["key-value caches"] == rows * slots * 36 * 8 * (128 + 128) * 2
    assert found.kept["the rollout's other tensors"] < 0.05 * GIB  # fewer rows decode in the same caches
    # of one row a layer keeps at least the inputs of its singular directions in fp32, and the MLP's three inner tensors
    tokens = args.prompt_length + config.max_new_tokens - 1
    least = tokens * (4 * found.trained + 36 * 2 * 3 * 9728)
    assert least < found.peaks["... of which forward keeps for backward"] < 2 * least


def test_the_largest_micro_batch(capsys):
    shape, (args, config) = replace(SHAPE, layers=1), asked("r4", batch_size=32)
    peak = lambda size: estimate(shape, args, Config(**vars(config) | {"micro_batch_size": size})).peaks["update"]  # noqa: E731
    args.memory_gib = peak(5) / GIB
    assert estimate(shape, args, config).largest == 5 and peak(6) > args.memory_gib * GIB
    args.memory_gib = 1.0
    assert estimate(shape, args, config).largest == 32
    main(["--model", "random", "--lora_config", "r4", "--memory_gib", "2", "--prompt_length", "20", "--batch_size", "16"])
    out = capsys.readouterr().out
    assert "tiny" not in out and re.search(r"fits 2 GiB: \d+$", out.strip()) and "| base weights | 0.01 |" in out


@pytest.mark.parametrize("flags, wrong", [
    (["--model", "nobody/nothing"], "nobody/nothing"), (["--measure"], "--measure"), (["--dtype", "float16"], "float16"),
    (["--memory_gib", "0"], "--memory_gib"), (["--lora_config", "q8"], "q8"), (["--batch_size", "7"], "--batch_size 7"),
])  # fmt: skip
def test_what_can_not_be_estimated(flags, wrong, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape(wrong)):
        main(flags)


# ------------------------------------------------------------------------------------------------------- the presets


def test_a_random_model_is_always_the_same_and_draws_nothing_from_anyone():
    (a, folder), _ = decoder.load("random"), torch.manual_seed(1)
    state = torch.get_rng_state()
    b, _ = decoder.load("random")
    trained, same = decoder.load("tiny")
    assert torch.equal(torch.get_rng_state(), state) and folder == same and a.config == trained.config
    for name, weight in a.state_dict().items():
        assert torch.equal(weight, b.state_dict()[name])
    assert not torch.allclose(a.embed_tokens.weight, trained.embed_tokens.weight, atol=1e-3)


@pytest.mark.parametrize("path", sorted((Path(memory.__file__).parent / "configs").glob("code*.yaml")), ids=lambda p: p.stem)
def test_presets_are_flags(path):
    name, _, args, config = train_grpo.parse(["--config", str(path)])
    assert args.env == "code" and config.batch_size % config.num_generations == 0
    if path.stem == "code_full":
        assert (config.batch_size // 6, args.max_prompts, config.max_steps) == (43, 992, 200)
        assert (config.beta, config.lr, config.loss_type, args.lora_config) == (1e-3, 7e-5, "dr_grpo", "ds")
    if path.stem == "code_fast":
        assert (config.max_steps, config.seed, args.lora_config) == (20, 41, "ds")
        assert (config.replayed, len(config.pools())) == (4, 2)


def test_smoke_has_both_pathways(box, tmp_path):
    file = plans.read_experiment("configs/projection_smoke.yaml")
    arms = {arm: flags.get("projection", "none") for arm, flags in file["arms"].items()}
    assert arms == {"vanilla": "none", "projected": "one_sided", "learning": "one_sided"}
    for arm, flags in file["arms"].items():
        words = [word for name, value in (file["fixed"] | flags).items() for word in (f"--{name}", str(value))]
        _, resolved = train_grpo.resolve([*words, "--box", box, "--output_dir", str(tmp_path / arm)])
        assert resolved["model"] == ("tiny" if arm == "learning" else "random")
