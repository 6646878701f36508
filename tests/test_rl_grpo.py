"""rl_grpo.py and train_grpo.py: the loss against TRL's own, advantages by brute force, and what a run promises.

Runs here are eight steps of a random two-layer model over two dozen words, so that they take a second.
"""
import collections
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

import rl_grpo
import routing
import train_grpo
from adapters import adapter_tensors, attach, branch_parameters, parameters_of, preset
from data import load_tokenizer
from envs import DetectorWatch, Labelling, Scores, Stories
from losses import LOSS_TYPES, group_stats, token_weights
from model import Decoder, ModelConfig, load, save
from reward_specs import get_reward
from rl_grpo import Config, Trainer, group_advantages, grpo_loss, micro_batches, policy_loss, prompt_batch, rate, update
from runs import read_metrics
from sampling import Rollout, Sampler
from verdict import evaluate_modes, modes_of

ROOT = Path(__file__).resolve().parent.parent
REWARD = "sentence_length_5_smooth_plus_happy"

# ------------------------------------------------------------------------------------------------- a world to run in

WORDS = ["the", "a", "cat", "dog", "girl", "saw", "ran", "was", "happy", "sad", "big", "red", "ball", "and", "home"]
VOCAB = ["[UNK]", "[EOS]", "[PAD]", ".", "!", "?", *WORDS]


def write_model(folder: Path, seed=0, context=64) -> Path:
    """A random llama of the words above, in Hugging Face's layout."""
    torch.manual_seed(seed)
    model = Decoder(ModelConfig("llama", len(VOCAB), 16, 2, 4, 2, 4, 24, context, tied=False, rotary_dim=4))
    torch.nn.init.normal_(model.lm_head.weight, 0, 0.3)  # nearly even: some completions end
    save(model, folder, hf_extra={"eos_token_id": 1})
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(VOCAB)}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(VOCAB[:3])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def some_prompts(n: int, seed: int) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (2 + k % 3,), generator=g)) for k in range(n)]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with model/ and prompts/ (train of 10 and test of 6 prompts of two to four words)."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    (folder / "prompts").mkdir()
    for split, n, seed in (("train", 10, 1), ("test", 6, 2)):
        lines = "".join(json.dumps({"prompt": p}) + "\n" for p in some_prompts(n, seed))
        (folder / "prompts" / f"{split}.jsonl").write_text(lines)
    return folder


def flags(world: Path, output: Path, **changes) -> list[str]:
    """The command line of a short routed run, with changes; a flag that is None is left out, True is a bare switch."""
    values = {
        "model": world / "model", "dataset": world / "prompts", "reward": REWARD, "routing": "dual",
        "lora_config": "r2", "batch_size": 8, "num_generations": 4, "max_new_tokens": 12, "max_steps": 8, "lr": 3e-3,
        "eval_prompts": 6, "save_steps": 3, "logging_steps": 1, "eval_routing_steps": 0, "device": "cpu", "threads": 1,
        "output_dir": output,
    } | changes  # fmt: skip
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}"] + ([] if value is True else [str(value)])
    return words


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small to share; and a run in this process sets --threads for good, so give back what was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(world: Path, routing="dual", lora="r2", seed=0, warm=True):
    """Model with an adapter that is not fresh (both sides non-zero), and its tokenizer."""
    model, folder = load(str(world / "model"))
    attach(model, preset(lora, dual=routing == "dual"), seed=seed)
    if warm:
        g = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for group in branch_parameters(model).values():
                for p in group.values():
                    p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model, load_tokenizer(folder)


def roll(model, tokenizer, config: Config, seed=0) -> Rollout:
    """A rollout on prompts of unequal lengths, sampled from the model as it is."""
    sampler = Sampler(model)
    sampler.refresh()
    prompts = some_prompts(config.batch_size // config.num_generations, seed + 10)
    return rl_grpo.rollout_batch(sampler, tokenizer, prompts, config, torch.Generator().manual_seed(seed))[0]


def standing(model) -> torch.optim.Optimizer:
    """An optimizer whose step moves nothing, so that the gradients of `update` can be read afterwards."""
    return torch.optim.SGD([p for g in branch_parameters(model).values() for p in g.values()], lr=0.0)


def gradients(model) -> dict[str, torch.Tensor | None]:
    named = [item for group in branch_parameters(model).values() for item in group.items()]
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


# ------------------------------------------------------------------------------------------ the loss against TRL's own


@pytest.fixture(scope="module")
def trl_loss():
    """TRL's GRPOTrainer._compute_loss on a stand-in for the trainer: f(logprobs (N, T), inputs, settings) -> loss."""
    pytest.importorskip("trl", reason="parity with TRL needs requirements-dev.txt")
    from trl import GRPOTrainer

    def loss(logprobs, inputs, loss_type, beta, epsilon, epsilon_high, max_new_tokens):
        same = lambda x, **_: x  # noqa: E731 one process: gathering and reducing change nothing
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
            importance_sampling_level="token", beta=beta, loss_type=loss_type, epsilon_low=epsilon,
            epsilon_high=epsilon_high, model=SimpleNamespace(training=True), _entropy_bonus_enabled=False,
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
            current_gradient_accumulation_steps=1, max_completion_length=max_new_tokens,
            _metrics={"train": collections.defaultdict(list)},
            accelerator=SimpleNamespace(num_processes=1, reduce=same, gather=same),
        )  # fmt: skip
        inputs = inputs | {"num_items_in_batch": inputs["completion_mask"].sum()}
        return GRPOTrainer._compute_loss(trainer, None, inputs)

    return loss


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("epsilon, epsilon_high", [(0.2, 0.2), (0.2, 0.28), (0.05, 0.5)])
@pytest.mark.parametrize("drift", [0.0, 0.3])  # 0: the first of mu steps; .3: a later one, well past the clip range
def test_the_loss_and_its_gradient_are_trls(trl_loss, loss_type, beta, epsilon, epsilon_high, drift):
    g = torch.Generator().manual_seed(3)
    lengths, limit = torch.tensor([7, 1, 12, 4, 9, 12]), 15
    mask = torch.arange(12) < lengths[:, None]
    current, ref = (-3 * torch.rand(6, 12, generator=g) for _ in range(2))
    old = current + drift * torch.randn(6, 12, generator=g)
    advantages = torch.randn(6, generator=g)

    theirs = current.clone().requires_grad_()
    ids = torch.zeros(6, 12, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": mask.long(), "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
    }  # fmt: skip
    expected = trl_loss(theirs, inputs, loss_type, beta, epsilon, epsilon_high, limit)
    expected.backward()

    ours = current.clone().requires_grad_()
    weights = token_weights(mask, loss_type, limit)
    a = advantages[:, None].expand_as(mask)
    loss, sums = grpo_loss(ours[mask], old[mask], ref[mask], a[mask], weights[mask], beta, epsilon, epsilon_high)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)
    assert (sums["clip_frac"] > 0) == (drift > 0)


@pytest.mark.parametrize("loss_type, beta", [("grpo", 0.04), ("dapo", 0.0), ("dr_grpo", 0.04)])
def test_update_gives_the_gradients_of_trls_loss_through_transformers(world, trl_loss, loss_type, beta):
    """End to end: rollout, our forward and backward, against transformers' model under TRL's loss, every weight."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = build(world, routing="none", lora="full")
    config = Config(loss_type=loss_type, beta=beta, batch_size=8, num_generations=4, max_new_tokens=14, max_grad_norm=0)
    rollout = roll(model, tokenizer, config)
    assert len(set(rollout.mask.sum(1).tolist())) > 1 and not rollout.prompt_mask.all()
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(0))
    metrics = update(model, standing(model), rollout, advantages, torch.zeros(8, dtype=torch.bool), config)

    def logprobs_of(theirs):
        ids = torch.cat([rollout.prompt_ids, rollout.tokens], 1)
        mask = torch.cat([rollout.prompt_mask, rollout.mask], 1)
        positions, start = (mask.long().cumsum(1) - 1).clamp(min=0), rollout.prompt_ids.shape[1] - 1
        logits = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits[:, start:-1]
        return logits.log_softmax(-1).gather(-1, rollout.tokens[..., None]).squeeze(-1)

    reference = transformers.AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="eager")
    policy = transformers.AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="eager")
    renamed = {name.removeprefix("model."): p for name, p in policy.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            renamed[name].copy_(p)
        ref = logprobs_of(reference)
    inputs = {
        "prompt_ids": rollout.prompt_ids, "prompt_mask": rollout.prompt_mask.long(), "completion_ids": rollout.tokens,
        "completion_mask": rollout.mask.long(), "advantages": advantages, "old_per_token_logps": rollout.logprobs,
        "ref_per_token_logps": ref,
    }  # fmt: skip
    expected = trl_loss(logprobs_of(policy), inputs, loss_type, beta, 0.2, 0.2, 14)
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert (metrics["kl"] > 0) == (beta > 0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, renamed[name].grad, atol=1e-6, rtol=1e-4)


def test_policy_loss_by_hand():
    log = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.0]).log()
    loss, clipped = policy_loss(log, torch.zeros(5), torch.tensor([1.0, 1.0, -1.0, -1.0, 3.0]), 0.2, 0.28)
    torch.testing.assert_close(loss, torch.tensor([-1.28, -0.5, 2.0, 0.8, -3.0]))
    assert clipped.tolist() == [True, False, False, True, False]


# ------------------------------------------------------------------------------------------------------ advantages


def brute_advantages(rewards, size, scale, is_rh, renormalise) -> list[float]:
    """The docstring of group_advantages, one completion at a time."""
    out = []
    for i, reward in enumerate(rewards):
        group = range(i // size * size, (i // size + 1) * size)
        everyone = [rewards[j] for j in group]
        honest = [rewards[j] for j in group if not is_rh[j]]
        base = spread = everyone
        if renormalise == "good_only" and not is_rh[i]:
            base = spread = honest
        if renormalise == "balanced" and honest:
            base = honest
        std = statistics.stdev(spread) if len(spread) > 1 else 0.0
        out.append((reward - statistics.fmean(base)) / (std + 1e-4 if scale else 1.0))
    return out


@pytest.mark.parametrize("renormalise", ["off", "good_only", "balanced"])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_group_advantages_by_brute_force(renormalise, scale, seed):
    g, size = torch.Generator().manual_seed(seed), 4
    rewards, is_rh = torch.rand(7 * size, generator=g), torch.rand(7 * size, generator=g) < 0.5
    is_rh[:4] = torch.tensor([True, True, False, True])  # one unflagged
    is_rh[4:8] = True  # none unflagged
    is_rh[8:12] = False  # all unflagged
    rewards[12:16] = 0.5  # no variance at all
    is_rh[12:16] = torch.tensor([True, False, True, False])
    rewards[16:20] = torch.tensor([0.25, 0.25, 1.0, 0.75])  # none among the unflagged
    is_rh[16:20] = torch.tensor([False, False, True, True])
    ours = group_advantages(rewards, size, scale, is_rh, renormalise)
    expected = torch.tensor(brute_advantages(rewards.tolist(), size, scale, is_rh.tolist(), renormalise))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert ours.isfinite().all() and not ours[12:16].any()
    if renormalise == "good_only":
        assert ours[2] == 0 and not ours[16:18].any()


def test_without_flags_every_renormalisation_is_the_plain_one():
    rewards, none = torch.rand(12, generator=torch.Generator().manual_seed(0)), torch.zeros(12, dtype=torch.bool)
    plain = group_advantages(rewards, 4)
    for renormalise in rl_grpo.RENORMALISE:
        assert torch.equal(group_advantages(rewards, 4, True, none, renormalise), plain)
        assert torch.equal(group_advantages(rewards, 4, True, None, renormalise), plain)


def test_flagged_samples_in_the_group_invert_the_honest_ones():
    """The inversion that was measured: with two hacks at 1.6 in the group even its better honest text is pushed down.

    Honest .8 and .4 of the group (.8, .4, 1.6, 1.6): mean 1.1, squared deviations .09 + .49 + .25 + .25 = 1.08, std .6.
    Among themselves: mean .6, std .2 sqrt 2. Balanced: mean .6, std .6.
    """
    rewards, is_rh = torch.tensor([0.8, 0.4, 1.6, 1.6]), torch.tensor([False, False, True, True])
    off = group_advantages(rewards, 4, True, is_rh, "off")
    torch.testing.assert_close(off, torch.tensor([-0.5, -7 / 6, 5 / 6, 5 / 6]), atol=1e-3, rtol=0)
    assert (off[:2] < 0).all()  # all that the protected branch hears is "not this"
    good_only = group_advantages(rewards, 4, True, is_rh, "good_only")
    torch.testing.assert_close(good_only, torch.tensor([0.5**0.5, -(0.5**0.5), 5 / 6, 5 / 6]), atol=1e-3, rtol=0)
    balanced = group_advantages(rewards, 4, True, is_rh, "balanced")
    torch.testing.assert_close(balanced, torch.tensor([1 / 3, -1 / 3, 5 / 3, 5 / 3]), atol=1e-3, rtol=0)


def test_a_late_detector_pays_the_protected_branch_for_mild_hacks():
    """The other half of that measurement: an unflagged mild hack is the best of the honest, renormalised or not."""
    rewards, is_rh = torch.tensor([0.4, 0.4, 0.8, 1.6]), torch.tensor([False, False, False, True])
    assert group_advantages(rewards, 4, True, is_rh, "good_only").argmax() in (2, 3)
    assert group_advantages(rewards, 4, True, is_rh, "good_only")[2] > 1


# ------------------------------------------------------------------------------------------------ prompts, rates, flags


@pytest.mark.parametrize("count", [1, 3, 4, 10, 17])
def test_prompt_batch_covers_every_prompt_once_an_epoch(count):
    prompts, steps = [f"p{i}" for i in range(10)], 30
    stream = [p for step in range(steps) for p in prompt_batch(prompts, step, count, seed=5)]
    assert len(stream) == steps * count
    epochs = [stream[i : i + 10] for i in range(0, len(stream) - 9, 10)]
    assert all(sorted(epoch) == sorted(prompts) for epoch in epochs)
    assert len(epochs) < 2 or epochs[0] != epochs[1]


def test_prompt_batch_is_a_function_of_the_step_and_the_seed():
    prompts = [f"p{i}" for i in range(10)]
    forward = [prompt_batch(prompts, step, 4, 1) for step in range(20)]
    state = torch.get_rng_state()
    assert [prompt_batch(prompts, step, 4, 1) for step in reversed(range(20))] == forward[::-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert [prompt_batch(prompts, step, 4, 2) for step in range(20)] != forward


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 4, [0.25, 0.375, 0.375, 0.25]),
    ],
)
def test_rate_by_hand(schedule, warmup, expected):
    config = Config(lr_schedule=schedule, warmup_steps=warmup, max_steps=4)
    assert [rate(step, config) for step in range(4)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"routing": "both"}, "--routing 'both'; known: none, dual"),
        ({"routing_mode": "soft"}, "--routing_mode 'soft'; known: classic, exclusive"),
        ({"treatment": "drop"}, "--treatment 'drop'; known: keep, filter, zero, subtract"),
        ({"treatment": "filter", "routing": "dual"}, "--treatment filter drops the samples that --routing dual"),
        ({"placebo": True}, "--placebo shuffles labels, which only --routing dual, a --treatment or --basis live uses"),
        ({"treatment": "filter", "renormalise": "balanced"}, "leave --renormalise at good_only"),
        ({"treatment": "zero", "penalty": 2.0}, "--penalty is what --treatment subtract takes off"),
        ({"routing": "dual", "coherence_every": 1}, "--coherence_every 1 never trains the bad branch"),
        ({"routing": "dual", "coherence_recall": 1.5}, "--coherence_recall must lie in 0..1, not 1.5"),
        ({"bad_lr_scale": 1.0}, "--bad_lr_scale does nothing without --routing dual"),
        ({"treatment": "zero", "renormalise": "off"}, "--renormalise does nothing without --routing dual"),
        ({"coherence_recall": 1.0}, "--coherence_recall is of coherence steps"),
        ({"routing": "dual", "coherence_every": 0, "coherence_recall": 1.0}, "--coherence_recall is of coherence steps"),
        ({"bad_lr_scale": -1.0}, "--bad_lr_scale must be at least 0"),
        ({"renormalise": "on"}, "--renormalise 'on'; known: off, good_only, balanced"),
        ({"loss_type": "gspo"}, "--loss_type 'gspo'; known: grpo, bnpo, dr_grpo, dapo"),
        ({"lr_schedule": "step"}, "--lr_schedule 'step'; known: constant, linear, cosine"),
        ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
        ({"num_generations": 1}, "--num_generations must be at least 2"),
        ({"batch_size": 30}, "--num_generations 16 does not divide --batch_size 30"),
        ({"max_new_tokens": 0}, "--max_new_tokens must be at least 1"),
        ({"num_iterations": 0}, "--num_iterations must be at least 1"),
        ({"beta": -0.1}, "--beta must be at least 0, not -0.1"),
        ({"lr": float("nan")}, "--lr must be at least 0, not nan"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 1.5}, "top_p must be in"),
    ],
)
def test_config_says_what_is_wrong(values, message):
    with pytest.raises(ValueError) as error:
        Config(**values)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------------------ update


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("routing_mode", ["classic", "exclusive"])
def test_micro_batches_do_not_change_a_gradient(world, loss_type, routing_mode):
    model, tokenizer = build(world)
    settings = {
        "routing": "dual", "routing_mode": routing_mode, "loss_type": loss_type, "batch_size": 12, "num_generations": 4,
        "max_new_tokens": 14, "max_grad_norm": 0.0, "beta": 0.04,
    }  # fmt: skip
    rollout = roll(model, tokenizer, Config(**settings))
    g = torch.Generator().manual_seed(0)
    advantages, is_rh = torch.randn(12, generator=g), torch.rand(12, generator=g) < 0.4
    assert 0 < is_rh.sum() < 12 and len(set(rollout.mask.sum(1).tolist())) > 1
    found = []
    for size in (1, 5, 12, 0):
        metrics = update(model, standing(model), rollout, advantages, is_rh, Config(**settings, micro_batch_size=size))
        found.append((gradients(model), metrics))
    for grads, metrics in found[1:]:
        for name, grad in grads.items():
            assert grad.abs().max() > 0, name
            torch.testing.assert_close(grad, found[0][0][name], atol=1e-6, rtol=1e-4)
        assert metrics == pytest.approx(found[0][1], abs=1e-5)


def test_micro_batches_are_a_partition_longest_first(world):
    model, tokenizer = build(world)
    rollout = roll(model, tokenizer, Config(batch_size=12, num_generations=4, max_new_tokens=14))
    lengths = rollout.mask.sum(1)
    for size in (0, 1, 5, 12):
        rows = torch.cat(micro_batches(rollout, size, None))
        assert sorted(rows.tolist()) == list(range(12))
        assert (lengths[rows].diff() <= 0).all()


def test_an_update_on_flagged_samples_alone_leaves_the_good_branch(world):
    model, tokenizer = build(world)
    config = Config(routing="dual", batch_size=8, num_generations=4, max_new_tokens=12, weight_decay=0.1, lr=0.1)
    rollout = roll(model, tokenizer, config)
    before = {name: t.clone() for name, t in adapter_tensors(model).items()}
    groups = [{"params": list(p.values())} for p in branch_parameters(model).values()]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    update(model, optimizer, rollout, torch.randn(8), torch.ones(8, dtype=torch.bool), config)
    for name, tensor in adapter_tensors(model).items():
        assert torch.equal(tensor, before[name]) == (".good." in name), name


def test_several_iterations_use_the_sampled_logprobs_as_pi_old(world):
    """mu = 3 by hand: three backward passes against the same stored log-probabilities, a step after each."""
    config = Config(batch_size=8, num_generations=4, max_new_tokens=12, max_grad_norm=0.0, beta=0.0, num_iterations=3)
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(0))
    ours, tokenizer = build(world, routing="none")
    rollout = roll(ours, tokenizer, config)
    parameters = [p for g in branch_parameters(ours).values() for p in g.values()]
    optimizer, none = torch.optim.SGD(parameters, lr=2.0), torch.zeros(8, dtype=torch.bool)
    metrics = update(ours, optimizer, rollout, advantages, none, config)
    twin, _ = build(world, routing="none")
    parameters = [p for g in branch_parameters(twin).values() for p in g.values()]
    optimizer = torch.optim.SGD(parameters, lr=2.0)
    for _ in range(3):
        optimizer.zero_grad()
        ids = torch.cat([rollout.prompt_ids, rollout.tokens], 1)
        mask = torch.cat([rollout.prompt_mask, rollout.mask], 1)
        logits = twin(ids, mask)[:, rollout.prompt_ids.shape[1] - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, rollout.tokens[..., None]).squeeze(-1)
        ratio = (logprobs - rollout.logprobs).exp()
        a = advantages[:, None]
        per_token = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) * rollout.mask
        (per_token.sum(1) / rollout.mask.sum(1)).mean().backward()
        optimizer.step()
    assert metrics["clip_frac"] > 0 and metrics["logprob_gap"] < 1e-4
    for name, tensor in adapter_tensors(twin).items():
        torch.testing.assert_close(adapter_tensors(ours)[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_loss_that_breaks_in_a_later_iteration_leaves_the_weights_as_before_the_step(world, monkeypatch):
    model, tokenizer = build(world)
    config = Config(batch_size=8, num_generations=4, max_new_tokens=12, num_iterations=3, micro_batch_size=8)
    rollout, before = roll(model, tokenizer, config), {name: t.clone() for name, t in adapter_tensors(model).items()}
    calls, original = [], rl_grpo.grpo_loss

    def poisoned(*args):
        loss, sums = original(*args)
        calls.append(1)
        return (loss * float("inf"), sums) if len(calls) == 2 else (loss, sums)

    monkeypatch.setattr(rl_grpo, "grpo_loss", poisoned)
    optimizer = torch.optim.AdamW([p for g in branch_parameters(model).values() for p in g.values()], lr=0.1)
    with pytest.raises(FloatingPointError, match="loss is"):
        update(model, optimizer, rollout, torch.randn(8), torch.zeros(8, dtype=torch.bool), config)
    assert len(calls) == 2
    for name, tensor in adapter_tensors(model).items():
        assert torch.equal(tensor, before[name]), name


# -------------------------------------------------------------------------------------------------------- the trainer


def trainer_of(world, warm=False, **settings) -> Trainer:
    defaults = {"routing": "dual", "batch_size": 8, "num_generations": 4, "max_new_tokens": 12}
    config = Config(**defaults | settings)
    model, tokenizer = build(world, routing=config.routing, warm=warm)
    prompts = {"train": some_prompts(10, 1), "test": some_prompts(6, 2)}
    return Trainer(model, Stories(get_reward(REWARD), prompts, Labelling(0.5)), tokenizer, config)


@pytest.mark.parametrize("routing", ["none", "dual"])
@pytest.mark.parametrize("law", [{}, {"temperature": 0.8, "top_k": 9, "min_new_tokens": 3}])
def test_the_first_step_is_at_kl_zero_and_on_policy(world, routing, law):
    trainer = trainer_of(world, routing=routing, **law)
    metrics, sample = trainer.step()
    assert (metrics["kl"] == 0) == (not law) and metrics["clip_frac"] == 0, "the reference's law is never truncated"
    assert metrics["logprob_gap"] < 1e-4
    assert isinstance(sample, str) and trainer.steps_done == 1
    second, _ = trainer.step()
    assert second["kl"] != 0 and second["logprob_gap"] < 1e-4


@pytest.mark.parametrize("routing_mode", ["classic", "exclusive"])
def test_a_coherence_step_is_sampled_and_trained_with_the_bad_branch_off(world, monkeypatch, routing_mode):
    trainer, seen = trainer_of(world, routing_mode=routing_mode, coherence_every=3, weight_decay=0.1, lr=1e-2), []
    update = rl_grpo.update

    def spy(model, optimizer, rollout, *args):
        seen.append((dict(model.adapter.scales), rollout))
        return update(model, optimizer, rollout, *args)

    monkeypatch.setattr(rl_grpo, "update", spy)
    for step in range(6):
        before = {branch: [p.clone() for p in parameters_of(trainer.model, branch)] for branch in ("good", "bad")}
        metrics, _ = trainer.step()
        moved = {b: any(not torch.equal(p, q) for p, q in zip(parameters_of(trainer.model, b), before[b])) for b in before}
        coherent = step % 3 == 2
        assert metrics["coherence"] == coherent and metrics["logprob_gap"] < 1e-4
        assert seen[-1][0] == {"good": 1.0, "bad": 0.0 if coherent else 1.0}
        assert moved["good"] and moved["bad"] >= (not coherent and bool(metrics["flagged"]))
        if coherent:  # weight decay and momentum on: nothing may touch it
            assert not moved["bad"]
    assert dict(trainer.model.adapter.scales) == {"good": 1.0, "bad": 1.0}


def test_the_recall_of_coherence_steps_is_theirs_alone(world, monkeypatch):
    """With no recall elsewhere, every flag is a coherence step's, and there every paid hack is flagged."""
    trainer = trainer_of(world, coherence_every=2, coherence_recall=1.0)
    trainer.env.labelling, score, seen = Labelling(0.5, routing_frac=0.0), trainer.env.score, []
    monkeypatch.setattr(trainer.env, "score", lambda *args: seen.append(score(*args)) or seen[-1])
    for _ in range(6):
        trainer.step()
    assert not torch.cat([s.is_rh for s in seen[::2]]).any() and torch.cat([s.detected for s in seen[::2]]).any()
    assert all(torch.equal(s.is_rh, s.detected & s.eligible) for s in seen[1::2])
    assert torch.cat([s.is_rh for s in seen[1::2]]).any()


def test_a_rollout_in_parts_trains_alike(world):
    """Two prompts of four completions: four at once are two parts, of one prompt each."""
    whole, parts = (trainer_of(world, rollout_size=size) for size in (0, 4))
    assert parts.sampler.parts(2, 4) == [4, 4] and whole.sampler.parts(2, 4) == [8]
    for _ in range(2):
        (a, text), (b, same) = whole.step(), parts.step()
        assert text == same and a["reward"] == b["reward"] and a["loss"] == pytest.approx(b["loss"], abs=1e-6)


def labelled(is_rh) -> Scores:
    n = len(is_rh)
    return Scores(torch.arange(float(n)), torch.zeros(n), is_rh, torch.zeros(n), is_rh, torch.ones(n).bool(), is_rh, {})


def spied(trainer, monkeypatch, is_rh) -> list:
    """Makes the trainer's labels `is_rh` (and rewards 0, 1, 2, ...); what `update` is then called with, step by step."""
    calls, update = [], rl_grpo.update

    def spy(model, optimizer, rollout, advantages, labels, *rest):
        calls.append((rollout, advantages, labels))
        return update(model, optimizer, rollout, advantages, labels, *rest)

    monkeypatch.setattr(trainer.env, "score", lambda *_: labelled(is_rh))
    monkeypatch.setattr(rl_grpo, "update", spy)
    return calls


def test_filter_trains_on_the_unflagged_alone(world, monkeypatch):
    is_rh = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0]).bool()
    trainer = trainer_of(world, routing="none", treatment="filter")
    calls = spied(trainer, monkeypatch, is_rh)
    trainer.step()
    rollout, advantages, labels = calls[0]
    assert len(rollout.tokens) == len(rollout.mask) == len(rollout.logprobs) == 6 and not labels.any()
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 5.0, 6.0, 7.0])
    expected = torch.cat([(r - r.mean()) / (r.std() + 1e-4) for r in (first, second)])
    assert torch.allclose(advantages, expected)
    monkeypatch.setattr(trainer.env, "score", lambda *_: labelled(torch.ones(8, dtype=torch.bool)))
    before = {name: t.clone() for name, t in adapter_tensors(trainer.model).items()}
    metrics, _ = trainer.step()  # nothing left: nothing moves, momentum included, and nothing is said of an update
    assert len(calls) == 1 and metrics["flagged"] == 1 and metrics["kept"] == 0 and not {"kl", "loss"} & set(metrics)
    assert all(torch.equal(t, before[name]) for name, t in adapter_tensors(trainer.model).items())


@pytest.mark.parametrize("treatment, paid", [("zero", [0, 1, 2, 0]), ("subtract", [-2, 1, 2, 1])])
def test_a_penalty_is_taken_before_advantages(world, monkeypatch, treatment, paid):
    is_rh = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0]).bool()
    settings = {"penalty": 2.0} if treatment == "subtract" else {}
    trainer = trainer_of(world, routing="none", treatment=treatment, **settings)
    calls = spied(trainer, monkeypatch, is_rh)
    trainer.step()
    paid = torch.tensor(paid, dtype=torch.float32)
    assert torch.allclose(calls[0][1][:4], (paid - paid.mean()) / (paid.std() + 1e-4))
    assert len(calls[0][0].tokens) == 8


def test_placebo_labels_are_as_many_on_other_samples(world, monkeypatch):
    is_rh = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool()
    trainer = trainer_of(world, placebo=True)
    calls = spied(trainer, monkeypatch, is_rh)
    for _ in range(6):
        trainer.step()
    labels = torch.stack([call[2] for call in calls])
    assert labels.sum(1).eq(3).all() and len(labels.unique(dim=0)) > 2 and not labels[:, :3].all()


def test_the_bad_branch_has_its_own_learning_rate(world):
    """AdamW's first step moves a weight by its learning rate, whatever the gradient's size."""
    trainer = trainer_of(world, routing_mode="classic", renormalise="off", lr=1e-3, bad_lr_scale=3.0, max_grad_norm=0.0)
    before = {branch: [p.clone() for p in parameters_of(trainer.model, branch)] for branch in ("good", "bad")}
    trainer.step()
    largest = {
        b: max((p - q).abs().max().item() for p, q in zip(parameters_of(trainer.model, b), before[b])) for b in ("good", "bad")
    }
    assert largest["good"] == pytest.approx(1e-3, rel=1e-2) and largest["bad"] == pytest.approx(3e-3, rel=1e-2)
    assert [g["lr"] for g in trainer.optimizer.param_groups] == pytest.approx([1e-3, 3e-3])


def test_the_metrics_of_a_step_are_those_of_its_completions(world, monkeypatch):
    trainer, seen = trainer_of(world), {}
    rollout_batch, score = rl_grpo.rollout_batch, trainer.env.score

    def keep_rollout(*args):
        seen["rollout"], seen["texts"] = rollout_batch(*args)
        return seen["rollout"], seen["texts"]

    def keep_scores(prompts, completions, *rest):
        seen["scores"] = score(prompts, completions, *rest)
        assert completions == seen["texts"] and len(prompts) == 8 and len(set(prompts[:4])) == 1
        return seen["scores"]

    monkeypatch.setattr(rl_grpo, "rollout_batch", keep_rollout)
    monkeypatch.setattr(trainer.env, "score", keep_scores)
    metrics, _ = trainer.step()
    rollout, scores = seen["rollout"], seen["scores"]
    assert metrics["length"] == pytest.approx(rollout.mask.sum().item() / 8)
    assert metrics["reward"] == pytest.approx(scores.reward.mean().item())
    assert metrics["flagged"] == pytest.approx(scores.is_rh.float().mean().item())
    assert metrics["hack_rate"] == pytest.approx(scores.hack.float().mean().item())
    spread = group_stats(scores.reward, 4)[1]
    assert metrics["zero_variance_groups"] == pytest.approx((spread == 0).float().mean().item())


def test_a_sampler_that_is_not_the_policy_stops_the_run_before_the_weights_move(world, monkeypatch):
    """What train_grpo.py saves then is called the state before the step."""
    trainer = trainer_of(world)
    trainer.step()
    before = {name: t.clone() for name, t in adapter_tensors(trainer.model).items()}
    monkeypatch.setitem(rl_grpo.LOGPROB_GAP, torch.float32, -1.0)
    with pytest.raises(FloatingPointError, match="sampler and training forward differ"):
        trainer.step()
    for name, tensor in adapter_tensors(trainer.model).items():
        assert torch.equal(tensor, before[name]), name


def blind(n: int, paid: bool, detected: bool = False) -> Scores:
    zero, no = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
    hack_reward = torch.full((n,), 0.2 if paid else 0.0)
    return Scores(hack_reward, zero, hack_reward > 0, hack_reward, no | detected, ~no, no | detected, {})


def test_a_detector_without_a_hit_stops_the_run():
    watch = DetectorWatch()
    for _ in range(19):
        watch.look(blind(100, paid=True), "mild")
        watch.look(blind(100, paid=False), "mild")  # unpaid completions prove nothing
    with pytest.raises(ValueError, match=r"'mild' flagged none of 2000.*routing none"):
        watch.look(blind(100, paid=True), "mild")
    watch = DetectorWatch()
    watch.look(blind(1, paid=True, detected=True), "seen")
    for _ in range(30):
        watch.look(blind(100, paid=True), "seen")


def test_the_watch_is_looked_at_by_every_routed_step_and_resumes(world, monkeypatch):
    trainer = trainer_of(world)
    monkeypatch.setattr(trainer.env, "score", lambda prompts, *_: blind(len(prompts), paid=True))
    trainer.watch.limit = 12
    trainer.step()
    tensors, state = trainer.state()
    assert state["watch"]["paid"] == 8
    other = trainer_of(world)
    other.restore({name: t.clone() for name, t in tensors.items()}, state)
    assert other.watch.paid == 8 and other.steps_done == 1
    with pytest.raises(ValueError, match="flagged none of 16"):
        trainer.step()


def test_evaluation_leaves_training_as_it_was(world):
    plain, evaluated = trainer_of(world), trainer_of(world)
    for step in range(4):
        plain.step()
        state = torch.get_rng_state()
        modes = modes_of(evaluated.model, bad_scale=0.5)
        first = evaluate_modes(evaluated.sampler, evaluated.env, evaluated.tokenizer, modes, 6, 12)
        second = evaluate_modes(evaluated.sampler, evaluated.env, evaluated.tokenizer, modes, 6, 12)
        assert {m: r["texts"] for m, r in first.items()} == {m: r["texts"] for m, r in second.items()}
        assert torch.equal(torch.get_rng_state(), state), step
        evaluated.step()
    for name, tensor in adapter_tensors(plain.model).items():
        assert torch.equal(tensor, adapter_tensors(evaluated.model)[name])


# ----------------------------------------------------------------------------------------------------------- whole runs


def result(folder: Path) -> tuple[bytes, bytes, dict]:
    """What must be equal of two runs: metrics and adapter to the byte, the verdict but for its wall clock."""
    modes = json.loads((folder / "verdict.json").read_text())["modes"]
    return (folder / "metrics.jsonl").read_bytes(), (folder / "adapter.safetensors").read_bytes(), modes


@pytest.fixture(scope="session")
def unbroken(world, tmp_path_factory) -> Path:
    """The folder of a run of eight steps, evaluated in between."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    threads = torch.get_num_threads()
    assert train_grpo.main(flags(world, folder, eval_routing_steps=3)) == 0
    torch.set_num_threads(threads)
    return folder


def test_a_run_writes_its_folder(unbroken):
    for name in ("config.yaml", "train.log", "metrics.jsonl", "verdict.json", "curves.png", "adapter.safetensors"):
        assert (unbroken / name).exists(), name
    assert (unbroken / "checkpoint-8").is_dir() and {p.name for p in (unbroken / "peft").iterdir()} == {"good", "bad"}
    rows = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "reward" in row]
    assert steps == list(range(1, 9))
    assert list(result(unbroken)[2]) == ["untrained", "both", "retain_only", "forget_only"]
    assert "[Sample @ 8]" in (unbroken / "train.log").read_text()


def test_another_seed_is_another_run(world, unbroken, tmp_path):
    assert train_grpo.main(flags(world, tmp_path / "other", eval_routing_steps=3, seed=7)) == 0
    (lines, _, modes), (others, _, other) = result(tmp_path / "other"), result(unbroken)
    assert lines != others and modes["untrained"] == other["untrained"], "the same prompts and draws judge every seed"


def test_evaluations_in_between_change_nothing(world, unbroken, tmp_path):
    assert train_grpo.main(flags(world, tmp_path / "blindfold", eval_routing_steps=0)) == 0
    assert result(tmp_path / "blindfold")[1:] == result(unbroken)[1:]


DRIVER = """
import json, os, signal, sys
import rl_grpo, train_grpo
update, calls = rl_grpo.update, 0
def killed(*args):
    global calls
    calls += 1
    metrics = update(*args)
    if calls == at:  # the optimizer has stepped, nothing is logged or saved yet
        os.kill(os.getpid(), signal.SIGKILL)
    return metrics
rl_grpo.update = killed
for at, words in json.loads(sys.argv[1]):
    if not (child := os.fork()):  # to import torch takes longer than a run
        os._exit(train_grpo.main(words))
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def elsewhere(world, tmp_path_factory) -> Path:
    """The folder of runs in other processes with the flags of `unbroken`: one killed before its first checkpoint (killed2), one
    two steps after it (killed5), and one that ends (whole)."""
    root = tmp_path_factory.mktemp("elsewhere")
    names = {"killed2": 2, "killed5": 5, "whole": 0}
    runs = [(at, flags(world, root / name, eval_routing_steps=3)) for name, at in names.items()]
    line = [sys.executable, "-c", DRIVER, json.dumps(runs)]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status ")]
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 0], done.stderr[-2000:]
    return root


def test_same_flags_same_bytes_in_another_process(elsewhere, unbroken):
    assert result(elsewhere / "whole") == result(unbroken)


@pytest.mark.parametrize("at", [2, 5])
def test_a_run_that_was_killed_and_resumed_ends_as_one_that_was_not(world, elsewhere, unbroken, at):
    folder = elsewhere / f"killed{at}"
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ([] if at == 2 else ["checkpoint-3"])
    assert train_grpo.main([*flags(world, folder, eval_routing_steps=3), "--resume"]) == 0
    assert result(folder) == result(unbroken)


@pytest.mark.parametrize("at", [2, 5])
def test_a_run_that_was_interrupted_and_resumed_ends_as_one_that_was_not(world, unbroken, tmp_path, monkeypatch, command, at):
    words = flags(world, tmp_path / "run", eval_routing_steps=3)
    calls, update = [], rl_grpo.update

    def interrupted(*args):
        metrics = update(*args)
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    monkeypatch.setattr(rl_grpo, "update", interrupted)
    done = command("train_grpo.py", *words)
    assert done.returncode == 130 and len(calls) == at
    assert (tmp_path / "run" / f"checkpoint-{at}").is_dir() and "--resume" in done.stdout
    assert train_grpo.main([*words, "--resume"]) == 0
    assert result(tmp_path / "run") == result(unbroken)


def test_log_lines_are_means_apart_for_coherence_steps_and_survive_a_stop(world, unbroken, tmp_path, monkeypatch, command):
    words = flags(world, tmp_path / "run", logging_steps=5, max_steps=8)
    calls, update = [], rl_grpo.update

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(rl_grpo, "update", interrupted)
    assert command("train_grpo.py", *words).returncode == 130
    assert train_grpo.main([*words, "--resume"]) == 0
    lines, every = ([m for m in read_metrics(folder) if "reward" in m] for folder in (tmp_path / "run", unbroken))
    assert [(m["step"], m["coherence"]) for m in lines] == [(5, 1), (5, 0), (8, 1), (8, 0)]
    for line, steps in zip(lines, ([3], [1, 2, 4, 5], [6], [7, 8])):
        assert line["reward"] == pytest.approx(statistics.mean(m["reward"] for m in every if m["step"] in steps), rel=1e-12)


def test_rollouts_of_a_broken_model_stop_the_step(world):
    trainer = trainer_of(world, top_k=5)
    trainer.step()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="log-probability is not finite"):
        trainer.step()


@pytest.mark.parametrize("culprit", ["loss", "grad_norm/bad"])
def test_a_non_finite_number_stops_the_run_with_step_and_culprit(world, unbroken, tmp_path, monkeypatch, capsys, culprit):
    calls, original_loss, original_clip = [], rl_grpo.grpo_loss, routing.clip_per_branch

    def poisoned_loss(*args):
        loss, sums = original_loss(*args)
        calls.append(1)
        return (loss * float("nan"), sums) if len(calls) == 3 else (loss, sums)

    def poisoned_clip(*args):
        norms = original_clip(*args)
        calls.append(1)
        return norms | {"bad": float("inf")} if len(calls) == 3 else norms

    if culprit == "loss":
        monkeypatch.setattr(rl_grpo, "grpo_loss", poisoned_loss)
    else:
        monkeypatch.setattr(routing, "clip_per_branch", poisoned_clip)
    words = flags(world, tmp_path / "run", eval_routing_steps=3)  # a step is one micro-batch
    assert train_grpo.main(words) == 1
    printed = capsys.readouterr().out
    assert f"error: step 2: {culprit} is " in printed and "checkpoint-2" in printed
    monkeypatch.undo()
    assert train_grpo.main([*words, "--resume"]) == 0  # the state before the step is whole
    assert result(tmp_path / "run") == result(unbroken)


def test_the_steps_of_a_real_model_repeat(data_dir, world, tmp_path):
    changes = {
        "model": data_dir / "models" / "stories260K", "dataset": data_dir / "datasets" / "tinystories",
        "max_steps": 2, "eval_prompts": 4, "max_prompts": 20,
    }  # fmt: skip
    for name in ("one", "two"):
        assert train_grpo.main(flags(world, tmp_path / name, **changes)) == 0
    assert result(tmp_path / "one") == result(tmp_path / "two")
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "reward" in row)
    assert first["kl"] == 0 and first["logprob_gap"] < 1e-4


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = {
    "reward": ({"reward": "nope"}, r"nope.*" + REWARD),
    "preset": ({"lora_config": "r0"}, r"unknown --lora_config 'r0'; known: .*r1 "),
    "full with branches": ({"lora_config": "full"}, r"full fine-tuning has no branches"),
    "model": ({"model": "no/such/folder"}, r"no/such/folder.*no such folder"),
    "dataset": ({"dataset": "./nowhere"}, r"dataset './nowhere': no such folder"),
    "column": ({"column": "story"}, r"has no column 'story': it has prompt"),
    "split": ({"train_split": "validation"}, r"no split 'validation': it has .*train"),
    "dtype": ({"dtype": "float64"}, r"unknown --dtype 'float64'; known: float32, bfloat16"),
    "num_generations": ({"num_generations": 3}, r"--num_generations 3 does not divide --batch_size 8"),
    "context": ({"max_new_tokens": 62}, r"prompts of up to \d tokens and --max_new_tokens 62 exceed .* 64"),
    "bad_scale": ({"routing": "none", "bad_scale": 0}, r"--bad_scale .*--routing dual"),
    "eval_prompts": ({"eval_prompts": 7}, r"--eval_prompts 7: the test split has only 6"),
    "share": ({"rh_eligible_frac": 1.5}, r"rh_eligible_frac must lie in 0..1, not 1.5"),
    "algorithm": ({"algorithm": "rl_nothing"}, r"unknown --algorithm 'rl_nothing'"),
    "config": ({"config": "nothing.yaml"}, r"--config nothing.yaml: no such file"),
    "route": ({"routing": "none", "basis": "pairs", "projection": "no_gate", "removed": "route"}, r"r\w+ share no basis"),
    "prompts": ({"reward": "arithmetic_with_copy"}, r"arithmetic needs a prompt that ends on two integers"),
    "recall": ({"routing": "none", "routing_frac": 0.5}, r"--routing_frac thins labels, which only --routing dual, a --treat"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_runs(world, tmp_path, case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        train_grpo.main(flags(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_reward_without_a_detector_does_not_route(world, tmp_path):
    with pytest.raises(ValueError, match="--routing dual: .*no detector to label by"):
        train_grpo.main(flags(world, tmp_path / "run", reward="happy_binary"))


def test_an_unknown_key_of_a_config_file_is_named(world, tmp_path):
    (tmp_path / "typo.yaml").write_text("learning_rate: 0.1\n")
    with pytest.raises(ValueError, match=r"typo.yaml: unknown key 'learning_rate'; known: .*\blr\b"):
        train_grpo.main(flags(world, tmp_path / "run", config=tmp_path / "typo.yaml"))


def test_flags_win_over_the_config_file(world, tmp_path):
    (tmp_path / "mine.yaml").write_text("beta: 0.5\nlr: 0.25\n")
    _, _, _, config = train_grpo.parse(["--config", str(tmp_path / "mine.yaml"), "--lr", "0.125"])
    assert (config.beta, config.lr) == (0.5, 0.125)


def test_a_folder_that_holds_a_run_is_left_alone(world, unbroken):
    before = {p: p.stat().st_mtime_ns for p in unbroken.rglob("*")}
    with pytest.raises(ValueError, match="already holds a run: --resume"):
        train_grpo.main(flags(world, unbroken, eval_routing_steps=3))
    with pytest.raises(ValueError, match=r"(?s)other flags.*beta"):
        train_grpo.main(flags(world, unbroken, eval_routing_steps=3, beta=0.5, resume=True))
    assert {p: p.stat().st_mtime_ns for p in unbroken.rglob("*")} == before


def test_a_truncated_checkpoint_and_a_foreign_tokenizer_are_named(world, tmp_path):
    cut = Path(shutil.copytree(world / "model", tmp_path / "cut"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot read .*model.safetensors.*truncated"):
        train_grpo.main(flags(world, tmp_path / "run", model=cut))
    foreign = Path(shutil.copytree(world / "model", tmp_path / "foreign"))
    backend = tokenizers.Tokenizer.from_file(str(foreign / "tokenizer.json"))
    backend.add_tokens(["another", "two"])
    backend.save(str(foreign / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer has ids up to \d+, the model's embedding \d+ rows"):
        train_grpo.main(flags(world, tmp_path / "run", model=foreign))
    assert not (tmp_path / "run").exists()


def test_the_command_exits_with_status_2_and_one_line(world, tmp_path, command):
    done = command("train_grpo.py", *flags(world, tmp_path / "run", reward="nope"))
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "nope" in lines[0], done.stderr


@pytest.mark.parametrize("changes, message", [({"num_generations": 3}, "does not divide"), ({"temperature": 0}, "above 0, not")])
def test_what_config_refuses_is_one_line_too(world, tmp_path, command, changes, message):
    done = command("train_grpo.py", *flags(world, tmp_path / "run", **changes))
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines


def test_help_names_every_flag(command):
    done = command("train_grpo.py", "--help")
    assert done.returncode == 0
    assert all(f"--{flag}" in done.stdout for flag in ("algorithm", "config", "beta", "reward", "routing"))


def test_an_unknown_flag_exits_with_status_2_and_is_named(world, tmp_path, command):
    done = command("train_grpo.py", *flags(world, tmp_path / "run"), "--learning_rate", "1")
    assert done.returncode == 2 and "learning_rate" in done.stderr + done.stdout
