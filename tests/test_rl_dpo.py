"""rl_dpo.py: loss and gradients against TRL's own, log-probabilities against plain logits, and what a run promises."""
import collections
import math
from types import SimpleNamespace

import pytest
import torch

import rl_dpo
import routing
from adapters import attach, branch_parameters, parameters_of, preset, reference
from model import Decoder, ModelConfig
from rl_dpo import Config, Trainer, answer_logprobs, dpo_loss, encode_pairs, stack, update

PAD, EOS = 0, 1
TOKENIZER = SimpleNamespace(
    pad_id=PAD, eos_id=EOS, stop_ids=(EOS,), encode=lambda text: [int(c) for c in text],
    encode_prompt=lambda text: [int(c) for c in text], decode_prompt=lambda ids: "".join(map(str, ids)),
    decode_completion=lambda _, ids: "".join(map(str, ids)),
)  # fmt: skip
TEXTS = [("23", "4", "566"), ("4", "2345", "3"), ("655", "6", "2"), ("22", "35", "4444"), ("3", "66", "5"), ("56", "2", "33")]
PAIRS = [dict(zip(("prompt", "chosen", "rejected"), texts)) for texts in TEXTS]


def small(spec="r2", warm=0.0, seed=0) -> Decoder:
    """A random two-layer llama of seven tokens with an adapter; `warm` moves all branches that far from their start."""
    torch.manual_seed(seed)
    model = Decoder(ModelConfig("llama", 7, 16, 2, 4, 2, 4, 24, 32, tied=False, rotary_dim=4))
    torch.nn.init.normal_(model.lm_head.weight, 0, 0.3)
    attach(model, preset(spec, dual=False), seed=seed)
    for group in branch_parameters(model).values():
        for p in group.values():
            p.data += warm * torch.randn_like(p)
    return model


def optimizer_of(model, lr=0.0):
    return torch.optim.SGD([p for group in branch_parameters(model).values() for p in group.values()], lr=lr)


def grads(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for group in branch_parameters(model).values() for name, p in group.items()}


# ------------------------------------------------------------------------------------------------------------- the loss


def trl_loss(logprobs, mask, ref, beta, loss_type="sigmoid", label_smoothing=0.0):
    """(loss, metrics) of TRL's DPOTrainer._compute_loss on a stand-in for the trainer.

    logprobs (2 n, T) per token, 0 off the answers; mask (2 n, T + 1); ref (2, n): chosen answers, then rejected.
    """
    pytest.importorskip("trl", reason="parity with TRL needs requirements-dev.txt")
    from trl import DPOTrainer

    same, zeros, metrics = (lambda x, **_: x), torch.zeros_like(logprobs), collections.defaultdict(list)
    outputs = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
        loss_types=[loss_type], loss_weights=[1.0], label_smoothing=label_smoothing, use_weighting=False,
        _metrics={"train": metrics}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long), "attention_mask": torch.ones_like(mask).long(),
        "completion_mask": mask.long(), "ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1],
    }  # fmt: skip
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False), metrics


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_gradients_and_rewards_are_trls(beta):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 9, generator=g) < 0.7
    tokens = -3 * torch.rand(8, 8, generator=g) * mask[:, 1:]
    ref = -2 * torch.rand(2, 4, generator=g) * 8
    theirs, ours = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    expected, metrics = trl_loss(theirs, mask, ref, beta)
    expected.backward()
    losses, rewards = dpo_loss(ours.sum(1).view(2, 4), ref, beta)
    losses.mean().backward()
    torch.testing.assert_close(losses.mean(), expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, value in (("chosen", rewards[0]), ("rejected", rewards[1]), ("margins", rewards[0] - rewards[1]),
                        ("accuracies", (rewards[0] > rewards[1]).float())):  # fmt: skip
        assert metrics[f"rewards/{name}"] == [pytest.approx(value.mean().item(), abs=1e-6)], name


def test_label_smoothing_is_that_of_trls_aot_on_one_pair():
    """TRL smooths labels in its aot loss, which sorts the pairs of a batch: of one pair it is the sigmoid loss, smoothed."""
    ref, tokens = torch.tensor([[-3.0], [-1.0]]), torch.tensor([[-0.5], [-2.5]])
    theirs, ours = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    expected, _ = trl_loss(theirs, torch.ones(2, 2).bool(), ref, 0.3, "aot", 0.2)
    expected.backward()
    losses, _ = dpo_loss(ours, ref, 0.3, 0.2)
    losses.sum().backward()
    torch.testing.assert_close(losses.sum(), expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_loss_by_hand():
    """Rewards .1 * (2, -1): margin .3; -log sigmoid(.3) = log(1 + e^-.3), and smoothed by .1 a tenth of log(1 + e^.3)."""
    losses, rewards = dpo_loss(torch.tensor([[-1.0], [-4.0]]), torch.tensor([[-3.0], [-3.0]]), 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0.2], [-0.1]]))
    right, wrong = math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(0.3))
    assert losses.item() == pytest.approx(right)
    smoothed, _ = dpo_loss(torch.tensor([[-1.0], [-4.0]]), torch.tensor([[-3.0], [-3.0]]), 0.1, 0.1)
    assert smoothed.item() == pytest.approx(0.9 * right + 0.1 * wrong)


def test_answers_end_as_sampled_ones_and_only_they_are_scored():
    pairs, model = encode_pairs(PAIRS, TOKENIZER, 12), small(warm=0.2)
    assert pairs[0] == ([2, 3], [4, EOS], [5, 6, 6, EOS])
    ids, answer = stack(pairs, PAD, "cpu")
    found = answer_logprobs(model, ids.flatten(0, 1), answer.flatten(0, 1)).view(2, -1)
    for i, (prompt, *ways) in enumerate(pairs):
        for which, way in enumerate(ways):  # alone, unpadded, from whole logits
            logs = model(torch.tensor([prompt + way]))[0].log_softmax(-1)
            expected = sum(logs[len(prompt) - 1 + k, token] for k, token in enumerate(way))
            torch.testing.assert_close(found[which, i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2, "beta": 0.5}])
def test_update_gives_the_gradients_of_plain_autograd_whatever_the_micro_batch(settings):
    model, pairs = small(warm=0.2), encode_pairs(PAIRS, TOKENIZER, 12)
    ids, answer = (x.flatten(0, 1) for x in stack(pairs, PAD, "cpu"))

    def summed(policy):
        logs = policy(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (logs * answer[:, 1:]).sum(1).view(2, -1)

    with torch.no_grad(), reference(model) as base:
        ref = summed(base)
    beta, eps = settings.get("beta", 0.1), settings.get("label_smoothing", 0.0)
    ratios = summed(model) - ref
    margin = (beta * (ratios[0] - ratios[1])).sigmoid()
    expected = -((1 - eps) * margin.log() + eps * (1 - margin).log()).mean()
    expected.backward()
    wanted = grads(model)
    for size in (0, 1, 4):
        metrics = update(model, optimizer_of(model), pairs, PAD, Config(**settings, micro_batch_size=size, max_grad_norm=0))
        assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)
        assert metrics["logps/chosen"] == pytest.approx(summed(model)[0].mean().item(), abs=1e-5)
        assert metrics["rewards/accuracies"] == pytest.approx((ratios[0] > ratios[1]).float().mean().item())
        for name, grad in grads(model).items():
            torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-4)
            assert grad.abs().max() > 0, name


# ---------------------------------------------------------------------------------------------------------------- runs


def trainer_of(model=None, **settings) -> Trainer:
    config = Config(**{"batch_size": 4, "max_tokens": 12, "max_new_tokens": 4, "lr": 1e-2, "max_steps": 1000} | settings)
    return Trainer(model or small(), None, TOKENIZER, config, PAIRS)


def test_a_fresh_adapter_prefers_nothing_and_learns_its_pairs():
    trainer = trainer_of()
    metrics, text = trainer.step()
    assert metrics["loss"] == pytest.approx(math.log(2)) and metrics["rewards/margins"] == 0 == metrics["rewards/accuracies"]
    assert isinstance(text(), str)
    for _ in range(30):
        metrics, _ = trainer.step()
    assert metrics["rewards/accuracies"] == 1 and metrics["rewards/margins"] > 0.5 and metrics["loss"] < 0.5
    with pytest.raises(AssertionError, match="margin must be 0"):
        trainer_of(small(warm=0.2)).step()


def test_the_loss_trains_the_bundles_it_may():
    trainer = trainer_of(small("bundles"), loss_routes="ssl_rl_separate", weight_decay=0.1)
    others = [name for name in trainer.model.adapter.names if name != "b_rl_policy"]
    before = [p.clone() for p in parameters_of(trainer.model, "b_rl_policy")]
    with routing.assert_isolated(trainer.model, *others):
        for _ in range(3):
            trainer.step()
    assert not any(torch.equal(p, q) for p, q in zip(parameters_of(trainer.model, "b_rl_policy"), before))


def test_every_epoch_has_every_pair_once():
    stream = [i for step in range(9) for i in rl_dpo.batch_of(6, step, 4, seed=3)]
    epochs = [stream[i : i + 6] for i in range(0, 36, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and epochs[0] != epochs[1]


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path):
    unbroken, resumed = trainer_of(lr_schedule="cosine"), trainer_of(lr_schedule="cosine")
    for step in range(4):
        if step == 2:
            torch.save(unbroken.state(), tmp_path / "state")
        unbroken.step()
    resumed.restore(*torch.load(tmp_path / "state"))
    for _ in range(2):
        resumed.step()
    (x, shape), (y, other) = (torch.utils._pytree.tree_flatten(t.state()) for t in (unbroken, resumed))
    assert shape == other and all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(x, y))


def test_what_is_not_finite_stops_before_the_weights_move(monkeypatch):
    trainer = trainer_of()
    trainer.step()
    before = {name: p.clone() for group in branch_parameters(trainer.model).values() for name, p in group.items()}
    original = rl_dpo.dpo_loss
    monkeypatch.setattr(rl_dpo, "dpo_loss", lambda *args: tuple(x * float("nan") for x in original(*args)))
    with pytest.raises(FloatingPointError, match="loss is nan"):
        trainer.step()
    after = {name: p for group in branch_parameters(trainer.model).values() for name, p in group.items()}
    assert trainer.steps_done == 1 and all(torch.equal(p, before[name]) for name, p in after.items())


@pytest.mark.parametrize(
    "pair, message",
    [
        ({"prompt": "2", "chosen": "3", "rejected": "3"}, "pair 0 has two equal answers"),
        ({"prompt": "", "chosen": "3", "rejected": "4"}, "pair 0 has an empty prompt"),
        ({"prompt": "2", "chosen": "3", "rejected": "4" * 11}, "pair 0 has 13 tokens, above the limit of 12"),
    ],
)
def test_pairs_that_say_nothing_or_do_not_fit_are_named(pair, message):
    with pytest.raises(ValueError, match=message):
        encode_pairs([pair], TOKENIZER, 12)
    with pytest.raises(ValueError, match="no preference pair"):
        encode_pairs([], TOKENIZER, 12)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"beta": 0.0}, "--beta must be above 0, not 0.0"),
        ({"label_smoothing": 0.5}, "--label_smoothing must be at least 0 and below .5, not 0.5"),
        ({"lr_schedule": "step"}, "--lr_schedule 'step'; known: constant, linear, cosine"),
        ({"loss_routes": "ssl"}, "unknown arrangement 'ssl'"),
        ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
        ({"lr": float("nan")}, "--lr must be at least 0, not nan"),
    ],
)
def test_config_says_what_is_wrong(values, message):
    with pytest.raises(ValueError) as error:
        Config(**values)
    assert message in str(error.value)
