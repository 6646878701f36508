"""rl_ppo.py: formulas by hand and by brute force, gradients against plain autograd, and the optima of an enumerable world.

Its prompts are one token, its answers at most two, so that the best policy, with and without a KL, is known exactly.
"""
import collections
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

import rl_ppo
import routing
from adapters import adapter_tensors, attach, branch_parameters, parameters_of, preset, reference
from envs import Scores
from model import Decoder, ModelConfig
from projector import Projector
from rl_ppo import Config, Experience, Trainer, gae, gradients, look, minibatches, policy_loss, rate, update, value_loss, whitened
from sampling import Rollout, Sampler

PAD, EOS = 0, 1

# ------------------------------------------------------------------------------------------------- a world to run in


def small(spec="r4", dual=False, warm=0.0, seed=0, vocab=7, width=16, rotary=4, head=0.3) -> Decoder:
    """A random two-layer llama with an adapter; `warm` moves all branches that far from their start."""
    torch.manual_seed(seed)
    model = Decoder(ModelConfig("llama", vocab, width, 2, 4, 2, 4, 24, 32, tied=False, rotary_dim=rotary))
    torch.nn.init.normal_(model.lm_head.weight, 0, head)
    attach(model, preset(spec, dual=dual), seed=seed)
    for group in branch_parameters(model).values():
        for p in group.values():
            p.data += warm * torch.randn_like(p)
    return model


TOKENIZER = SimpleNamespace(
    pad_id=PAD, eos_id=EOS, stop_ids=(EOS,), encode_prompt=lambda text: [int(c) for c in text],
    decode_completions=lambda prompts, completions: ["".join(map(str, c)) for c in completions],
)  # fmt: skip


class Table:
    """Prompts and a reward for each answer; `flagged` answers are what a router may see."""

    reward = SimpleNamespace(name="table")

    def __init__(self, prompts, rewards, flagged=()):
        self._prompts, self.rewards, self.flagged = prompts, rewards, set(flagged)

    def prompts(self, split):
        return self._prompts

    def score(self, prompts, completions, generator=None):
        reward = torch.tensor([self.rewards[p, c] for p, c in zip(prompts, completions)])
        flagged = torch.tensor([c in self.flagged for c in completions])
        return Scores(reward, reward, flagged, torch.zeros_like(reward), flagged, torch.ones_like(flagged), flagged, {})


def answers(vocab=7, cap=2) -> list[str]:
    """All there are: ended at once, or of `cap` tokens, one or two."""
    firsts = [str(a) for a in range(vocab) if a != EOS]
    return [str(EOS), *(firsts if cap == 1 else [f"{a}{b}" for a in firsts for b in range(vocab)])]


def table(vocab=7, cap=2, seed=0, **flagged) -> Table:
    """Rewards in 0..1 for answers to two prompts, one answer to each at 1."""
    g, ways, rewards = torch.Generator().manual_seed(seed), answers(vocab, cap), {}
    for prompt in "23":
        rewards |= {(prompt, way): 0.6 * torch.rand((), generator=g).item() for way in ways}
        rewards[prompt, ways[int(torch.randint(len(ways), (), generator=g))]] = 1.0
    return Table(["2", "3"], rewards, **flagged)


def roll(model, lengths=(2, 3, 1, 4), cap=5, count=12, seed=0, law=None) -> Rollout:
    """A rollout on prompts of unequal lengths."""
    sampler, config = Sampler(model), Config(max_new_tokens=cap, **law or {})
    sampler.refresh()
    prompts = ["".join(str(2 + (i + j) % 5) for j in range(lengths[i % len(lengths)])) for i in range(count)]
    return rl_ppo.rollout_batch(sampler, TOKENIZER, prompts, config, torch.Generator().manual_seed(seed))[0]


def head_of(model, warm=0.0) -> torch.nn.Linear:
    head = torch.nn.Linear(model.config.width, 1)
    torch.nn.init.normal_(head.weight, 0, warm) if warm else torch.nn.init.zeros_(head.weight)
    return head


def experienced(model, head, rollout, config, seed=0) -> Experience:
    """What `look` sees, with random advantages and returns, and pi_old and V_old moved away from the present ones."""
    g, seen = torch.Generator().manual_seed(seed), look(model, head, rollout, config)
    seen.advantages, seen.returns = (torch.randn(rollout.mask.shape, generator=g) for _ in range(2))
    seen.values += 0.3 * torch.randn(rollout.mask.shape, generator=g) * rollout.mask
    rollout.logprobs += 0.3 * torch.randn(rollout.mask.shape, generator=g) * rollout.mask
    return seen


def grads(model, head) -> dict[str, torch.Tensor | None]:
    named = [item for group in branch_parameters(model).values() for item in group.items()]
    named += [(f"head.{name}", p) for name, p in head.named_parameters()]
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


def clear(model, head):
    for p in (*model.parameters(), *head.parameters()):
        p.grad = None


# ------------------------------------------------------------------------------------------- rewards, advantages, returns

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()  # at the length cap; an early end of text; at once
JUNK = 9.0  # behind an end, where nothing may look


def test_the_score_is_paid_on_the_last_sampled_token_and_kl_on_each():
    kl = torch.tensor([[0.5, -0.5, 1.0], [0.5, 1.0, JUNK], [2.0, JUNK, JUNK]])
    paid = rl_ppo.token_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, MASK, 0.1)
    torch.testing.assert_close(paid, torch.tensor([[-0.05, 0.05, 0.9], [-0.05, 1.9, 0.0], [2.8, 0.0, 0.0]]))


def test_gae_by_hand():
    """gamma 1, lambda .95, score 1. At the cap, without bootstrap: delta (-.1, -.2, .8), -.2 + .95 * .8, -.1 + .95 * .56."""
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, JUNK], [1.0, JUNK, JUNK]])
    values = torch.tensor([[0.5, 0.4, 0.2], [0.5, 0.4, JUNK], [0.5, JUNK, JUNK]])
    advantages, returns = gae(rewards, values, MASK, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.432, 0.56, 0.8], [0.47, 0.6, 0.0], [0.5, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.932, 0.96, 1.0], [0.97, 1.0, 0.0], [1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.95), (0.9, 1.0), (0.9, 0.0)])
def test_gae_is_the_sum_of_discounted_deltas_over_time(gamma, lam):
    g, lengths = torch.Generator().manual_seed(1), [6, 1, 4, 3, 6]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(5, 6, generator=g) for _ in range(2))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for n, length in enumerate(lengths):
        r, v = rewards[n, :length].tolist(), [*values[n, :length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(6):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[n, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[n, t].item() == pytest.approx(expected + v[t] if t < length else 0.0, abs=1e-5)
            if lam == 1 and t < length:  # no value is left in it
                assert returns[n, t].item() == pytest.approx(sum(gamma ** (k - t) * r[k] for k in range(t, length)), abs=1e-5)


def test_whitening_is_over_valid_tokens_the_unflagged_among_themselves():
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1])[:, None]
    advantages, none = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.bool)
    white = whitened(advantages, mask, none)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6) and white[mask].std().item() == pytest.approx(1, abs=1e-6)
    junk = advantages.masked_fill(~mask, 1e6)
    assert torch.equal(whitened(junk, mask, none), white) and not white[~mask].any()
    is_rh = torch.tensor([True, False, False, True])
    routed, honest = whitened(advantages, mask, is_rh), mask & ~is_rh[:, None]
    assert torch.equal(routed[is_rh], white[is_rh]) and routed[honest].mean().item() == pytest.approx(0, abs=1e-6)
    alone = torch.tensor([True, True, True, False])  # one unflagged token has no deviation: 0, not NaN
    assert whitened(advantages, mask, alone)[3].tolist() == [0, 0, 0, 0]
    assert not whitened(torch.full((4, 4), 0.7), mask, none).any()


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_credit_by_hand(kl_in):
    """gamma .5, lambda 1, values 0: the returns are discounted sums of what was paid, with the KL unless that is a loss."""
    logs = torch.tensor([[0.4, 0.0, -0.2], [0.2, 0.6, JUNK], [1.0, JUNK, JUNK]])
    zeros, is_rh = torch.zeros(3, 3), torch.tensor([False, True, False])
    seen = Experience(logs, zeros, None, zeros, zeros, zeros)
    config = Config(kl_in=kl_in, beta=0.5, gamma=0.5, gae_lambda=1.0, whiten=False)
    rl_ppo.credit(seen, torch.tensor([1.0, 2.0, 3.0]), MASK, is_rh, config)
    expected = {"reward": [[0.075, 0.55, 1.1], [0.75, 1.7, 0.0], [2.5, 0.0, 0.0]], "loss": [[0.25, 0.5, 1], [1, 2, 0], [3, 0, 0]]}
    torch.testing.assert_close(seen.returns, torch.tensor(expected[kl_in]))
    torch.testing.assert_close(seen.advantages, seen.returns)
    plain = seen.advantages
    rl_ppo.credit(seen, torch.tensor([1.0, 2.0, 3.0]), MASK, is_rh, Config(**vars(config) | {"whiten": True}))
    torch.testing.assert_close(seen.advantages, whitened(plain, MASK, is_rh))
    torch.testing.assert_close(seen.returns, plain)


# ------------------------------------------------------------------------------------------------------------ the losses


def test_policy_loss_by_hand():
    log = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.0]).log()
    loss, clipped = policy_loss(log, torch.zeros(5), torch.tensor([1.0, 1.0, -1.0, -1.0, 3.0]), 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, -0.5, 2.0, 0.8, -3.0]))
    assert clipped.tolist() == [True, False, False, True, False]


def test_value_loss_by_hand():
    """V_old 1. V 2, R 3: 1/2 max(1, 1.8^2). V 2, R 0: 1/2 max(4, 1.2^2). V 1.1: as it is. V 0, R 1.5: 1/2 max(1.5^2, .7^2)."""
    values, returns = torch.tensor([2.0, 2.0, 1.1, 0.0]), torch.tensor([3.0, 0.0, 0.0, 1.5])
    loss, clipped = value_loss(values, torch.ones(4), returns, 0.2)
    torch.testing.assert_close(loss, torch.tensor([1.62, 2.0, 0.605, 1.125]))
    assert clipped.tolist() == [True, False, False, False]
    plain, clipped = value_loss(values, torch.ones(4), returns, 0.0)
    torch.testing.assert_close(plain, torch.tensor([0.5, 2.0, 0.605, 1.125]))
    assert not clipped.any()


def test_policy_loss_and_its_gradient_are_trls():
    """TRL 1 has no PPO left; its GRPO takes advantages per token, and with beta 0 and bnpo that is PPO's policy loss."""
    pytest.importorskip("trl", reason="parity with TRL needs requirements-dev.txt")
    from trl import GRPOTrainer

    g = torch.Generator().manual_seed(3)
    mask = torch.arange(12) < torch.tensor([7, 1, 12, 4, 9, 12])[:, None]
    current, advantages = -3 * torch.rand(6, 12, generator=g), torch.randn(6, 12, generator=g)
    old, theirs = current + 0.3 * torch.randn(6, 12, generator=g), current.clone().requires_grad_()
    same = lambda x, **_: x  # noqa: E731 one process: gathering and reducing change nothing
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (theirs, torch.zeros_like(theirs), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        importance_sampling_level="token", beta=0.0, loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.2,
        model=SimpleNamespace(training=True), _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1), max_completion_length=12,
        _metrics={"train": collections.defaultdict(list)},
        accelerator=SimpleNamespace(num_processes=1, reduce=same, gather=same),
    )  # fmt: skip
    ids = torch.zeros(6, 12, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": mask.long(), "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    expected = GRPOTrainer._compute_loss(trainer, None, inputs)
    expected.backward()
    ours = current.clone().requires_grad_()
    loss, clipped = policy_loss(ours[mask], old[mask], advantages[mask], 0.2)
    loss.mean().backward()
    assert clipped.any()
    torch.testing.assert_close(loss.mean(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)


LAWS = [{}, {"temperature": 0.7, "top_k": 4, "min_new_tokens": 2}]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("spec", ["r4", "full"])
def test_gradients_are_those_of_plain_autograd_on_whole_logits(law, spec):
    """Left padding, early ends and the length cap: all four losses, value head included, against log_softmax and its autograd."""
    model = small(spec, warm=0.2)
    rollout, head = roll(model, law=law), head_of(model, warm=0.3)
    assert len(set(rollout.mask.sum(1).tolist())) > 1 and not rollout.finished.all() and not rollout.prompt_mask.all()
    config = Config(kl_in="loss", beta=0.3, entropy_coef=0.2, max_new_tokens=5, micro_batch_size=5, **law)
    seen, rows = experienced(model, head, rollout, config), torch.tensor([10, 1, 2, 7, 4, 3, 0])
    metrics = gradients(model, head, rollout, seen, rows, {}, None, config)
    ours = grads(model, head)
    clear(model, head)

    start, temperature = rollout.prompt_ids.shape[1] - 1, law.get("temperature", 1.0)
    ids = torch.cat([rollout.prompt_ids, rollout.tokens], 1)[rows]
    attention = torch.cat([rollout.prompt_mask, rollout.mask], 1)[rows]

    def laws(policy, whole=False):
        logits = policy(ids, attention)[:, start:-1] / temperature
        if whole:  # of all that may be written: only the minimum length forbids something
            logits[:, : law.get("min_new_tokens", 0), EOS] = -1e9
        elif rollout.support is not None:
            logits = logits.masked_fill(~rollout.support[rows], -1e9)
        return logits.log_softmax(-1)

    with torch.no_grad(), reference(model) as base:
        log_q = laws(base, whole=True)
    log_p, mask = laws(model), rollout.mask[rows]
    logprobs = log_p.gather(-1, rollout.tokens[rows][..., None]).squeeze(-1)
    values = (model.hidden(ids, attention)[:, start:-1] @ head.weight[0]) + head.bias
    ratio, a = (logprobs - rollout.logprobs[rows]).exp(), seen.advantages[rows]
    kept = seen.values[rows] + (values - seen.values[rows]).clamp(-0.2, 0.2)
    squares = torch.maximum((values - seen.returns[rows]) ** 2, (kept - seen.returns[rows]) ** 2)
    expected = {
        "policy_loss": -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)[mask].mean(),
        "value_loss": 0.5 * 0.5 * squares[mask].mean(),
        "entropy_loss": 0.2 * (log_p.exp() * log_p).sum(-1)[mask].mean(),
        "kl_loss": 0.3 * (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean(),
    }
    sum(expected.values()).backward()
    for name, loss in expected.items():
        assert metrics[name] == pytest.approx(loss.item(), abs=1e-5), name
    assert metrics["approx_kl"] == pytest.approx((ratio - 1 - ratio.log())[mask].mean().item(), abs=1e-5)
    assert 0 < metrics["clip_frac"] < 1 and 0 < metrics["value_clip_frac"] < 1
    for name, grad in grads(model, head).items():
        torch.testing.assert_close(ours[name], grad, atol=2e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_how_a_batch_is_split_changes_no_gradient(routed, kl_in):
    """Micro-batches of any size give the same; a partition's gradients, weighted by their tokens, those of the whole."""
    model = small("r2", dual=routed, warm=0.2)
    rollout, head = roll(model), head_of(model, warm=0.3)
    settings = {"kl_in": kl_in, "max_new_tokens": 5}
    seen, everything = experienced(model, head, rollout, Config(**settings)), torch.arange(12)
    is_rh = torch.arange(12) % 3 == 0
    routes = routing.sample_routes(is_rh, "exclusive") if routed else {}
    found = {}
    for size in (0, 12, 5, 1):
        config = Config(**settings, micro_batch_size=size)
        metrics = gradients(model, head, rollout, seen, everything, routes, None, config)
        found[size] = grads(model, head), metrics
        clear(model, head)
    config, total = Config(**settings), collections.Counter()
    for rows in (everything[:4], everything[4:]):
        gradients(model, head, rollout, seen, rows, routes, None, config)
        share = rollout.mask[rows].sum() / rollout.mask.sum()
        for name, grad in grads(model, head).items():
            total[name] = total[name] + share * grad
        clear(model, head)
    found["parts"] = total, found[0][1]
    for ours, metrics in found.values():
        assert metrics == pytest.approx(found[0][1], abs=1e-5)
        for name, grad in found[0][0].items():
            assert grad.abs().max() > 0, name
            torch.testing.assert_close(ours[name], grad, atol=1e-6, rtol=1e-4)


def test_norms_are_those_of_micro_batches_alone():
    """Each over its own tokens, without the value head; a step's are those of all its minibatches."""
    model = small("r2", warm=0.2)
    rollout, head, config = roll(model), head_of(model, warm=0.3), Config(max_new_tokens=5, micro_batch_size=5)
    seen, everything, norms, alone = experienced(model, head, rollout, config), torch.arange(12), [], []
    gradients(model, head, rollout, seen, everything, {}, None, config, norms)
    for rows in rl_ppo.micro_batches(rollout, everything, 5):
        clear(model, head)
        gradients(model, head, rollout, seen, rows, {}, None, config)
        alone.append(routing.gradient_flow(model)["adapter"])
    assert norms == pytest.approx(alone, rel=1e-4) and len(set(norms)) == 3
    metrics, _ = trainer_of(micro_batch_size=4, num_epochs=1, target_kl=0.0).step()
    assert metrics["grad_norm_mean"] > 0 and metrics["grad_norm_std"] > 0
    assert "grad_norm_std" not in trainer_of(num_epochs=1, num_minibatches=1).step()[0], "one has no deviation"


# --------------------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("mode", routing.ROUTING_MODES)
def test_one_routed_pass_is_the_two_pass_reference(mode):
    model = small("r2", dual=True, warm=0.2)
    rollout, head, config = roll(model), head_of(model, warm=0.3), Config(kl_in="loss", max_new_tokens=5)
    seen, is_rh = experienced(model, head, rollout, config), torch.arange(12) % 3 == 0
    gradients(model, head, rollout, seen, torch.arange(12), routing.sample_routes(is_rh, mode), None, config)
    ours = grads(model, head)
    clear(model, head)
    total = collections.Counter()
    for flagged in (False, True):  # their share of the batch's tokens
        rows = (is_rh == flagged).nonzero().squeeze(1)
        with routing.hooked_shut(model, routing.protected(mode, flagged)):
            gradients(model, head, rollout, seen, rows, {}, None, config)
        for name, grad in grads(model, head).items():
            total[name] = total[name] + rollout.mask[rows].sum() / rollout.mask.sum() * grad
        clear(model, head)
    for name, grad in total.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-6, rtol=1e-4)


def test_losses_are_routed_one_by_one():
    """Under a router every bundle gets torch.autograd.grad of the losses that may train it, and of no other."""
    model = small("bundles", warm=0.3)
    rollout, head = roll(model), head_of(model, warm=0.3)
    config = Config(kl_in="loss", max_new_tokens=5, loss_routes="ssl_rl_separate")
    seen, rows = experienced(model, head, rollout, config), torch.arange(12)
    gradients(model, head, rollout, seen, rows, {}, rl_ppo.loss_router(model, config), config)
    routed = grads(model, head)
    clear(model, head)
    alone = {}
    for loss in rl_ppo.LOSSES:  # a route for this one loss: what it gives every bundle
        def only(losses, _, loss=loss):
            losses[loss].backward()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routing, "backward", only)
            gradients(model, head, rollout, seen, rows, {}, None, config)
        alone[loss] = grads(model, head)
        clear(model, head)
    gradients(model, head, rollout, seen, rows, {}, None, config)
    whole, may = grads(model, head), routing.arrangement("ssl_rl_separate")[1]
    for name, grad in routed.items():
        teachers = [loss for loss in rl_ppo.LOSSES if name.startswith("head.") or any(f".{b}." in name for b in may[loss])]
        assert len(teachers) == (0 if ".b_ssl_" in name else 4 if "head." in name else 1), name
        heard = [alone[loss][name] for loss in teachers if alone[loss][name] is not None]
        assert (grad is None) == (not heard), name
        if heard:
            assert grad.abs().max() > 0, name
            torch.testing.assert_close(grad, sum(heard), atol=1e-6, rtol=1e-4)
        summed = sum(alone[loss][name] for loss in rl_ppo.LOSSES if alone[loss][name] is not None)
        torch.testing.assert_close(whole[name], summed, atol=1e-6, rtol=1e-4)


def test_a_loss_of_weight_zero_is_not_run():
    assert list(Config(entropy_coef=0, value_coef=0).weights()) == ["policy_loss"]
    assert list(Config(kl_in="loss").weights()) == list(rl_ppo.LOSSES) and "kl_loss" not in Config().weights()
    assert "kl_loss" not in Config(kl_in="loss", beta=0).weights()


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_bundles_that_no_loss_may_train_stay_to_the_bit(kl_in):
    settings = {"loss_routes": "ssl_rl_separate", "kl_in": kl_in, "entropy_coef": 0.0, "weight_decay": 0.1, "lr": 1e-2}
    trainer = trainer_of(small("bundles", warm=0.1), first=1, **settings)
    still = ["b_ssl_main", "b_ssl_semantic", "b_rl_explore"] + (["b_rl_anchor"] if kl_in == "reward" else [])
    moving = [name for name in trainer.model.adapter.names if name not in still]
    before = {name: [p.clone() for p in parameters_of(trainer.model, name)] for name in moving}
    with routing.assert_isolated(trainer.model, *still):
        for _ in range(3):
            trainer.step()
    for name in moving:
        assert all(not torch.equal(p, q) for p, q in zip(parameters_of(trainer.model, name), before[name])), name


@pytest.mark.parametrize("mode, still", [("exclusive", "bad"), ("classic", "")])
def test_samples_train_the_branches_they_may(mode, still):
    settings = {"routing": "dual", "routing_mode": mode, "weight_decay": 0.1, "lr": 1e-2}
    honest = trainer_of(small("r2", dual=True, warm=0.1), first=1, **settings)
    with routing.assert_isolated(honest.model, *filter(None, [still])):
        honest.step()
    flagged = trainer_of(small("r2", dual=True, warm=0.1), env=table(flagged=answers()), first=1, **settings)
    before = [p.clone() for p in parameters_of(flagged.model, "bad")]
    with routing.assert_isolated(flagged.model, "good"):
        for _ in range(2):
            assert flagged.step()[0]["flagged"] == 1
    assert not any(torch.equal(p, q) for p, q in zip(parameters_of(flagged.model, "bad"), before))


def test_every_branch_and_the_value_head_are_clipped_by_themselves():
    model = small("bundles", warm=0.3)
    rollout, head = roll(model), head_of(model, warm=0.3)
    config = Config(kl_in="loss", max_new_tokens=5, max_grad_norm=0.01, num_epochs=1, num_minibatches=1)
    seen = experienced(model, head, rollout, config)
    groups = {name: list(p.values()) for name, p in branch_parameters(model).items()} | {"value_head": list(head.parameters())}
    before = {name: [p.detach().clone() for p in group] for name, group in groups.items()}
    optimizer = torch.optim.SGD([p for group in groups.values() for p in group], lr=1.0)
    projector = Projector(model, TOKENIZER, config)
    metrics = update(model, head, optimizer, projector, rollout, seen, torch.zeros(12).bool(), config, torch.Generator())
    for name, group in groups.items():
        step = torch.stack([(p - q).norm() for p, q in zip(group, before[name])]).norm().item()
        assert step == pytest.approx(min(0.01, metrics[f"grad_norm/{name}"]), rel=1e-3), name
    assert sum(metrics[f"grad_norm/{name}"] > 0.01 for name in groups) > 3


# ------------------------------------------------------------------------------------------------------------ the trainer


def trainer_of(model=None, env=None, first=0, **settings) -> Trainer:
    """`first`: the step to begin with; 0 asserts that the adapter is fresh."""
    defaults = {"batch_size": 16, "max_new_tokens": 2, "max_steps": 1000, "num_minibatches": 2}
    model = model or small("r2", dual=settings.get("routing") == "dual")
    trainer = Trainer(model, env or table(), TOKENIZER, Config(**defaults | settings))
    trainer.steps_done = first
    return trainer


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("routed", ["none", "dual"])
def test_the_first_look_is_on_policy_and_at_kl_zero(law, kl_in, routed):
    law = {**law, "max_new_tokens": 4}
    env = Table(["23", "4"], collections.defaultdict(lambda: 0.5))
    trainer = trainer_of(env=env, num_epochs=1, num_minibatches=1, lr=1e-2, kl_in=kl_in, routing=routed, **law)
    for step in range(3):
        metrics, text = trainer.step()
        assert (metrics["kl"] == 0) == (step == 0 and "top_k" not in law), "it does not cut the reference's law"
        assert metrics["logprob_gap"] < 1e-5 and metrics["approx_kl"] < 1e-9 and metrics["clip_frac"] == 0  # the ratio is 1
        assert metrics.get("kl_loss", 0) == pytest.approx(0.1 * metrics["kl"] if kl_in == "loss" else 0, abs=1e-6)
        assert metrics["kl_completion"] == pytest.approx(metrics["kl"] * metrics["length"], rel=1e-4)
        assert metrics["loss"] == pytest.approx(sum(metrics.get(name, 0) for name in rl_ppo.LOSSES), abs=1e-6)
        assert metrics["value_clip_frac"] == 0 and metrics["optimizer_steps"] == 1 and isinstance(text, str)
        assert trainer.steps_done == step + 1


def test_the_policy_that_sampled_and_the_one_that_is_trained_must_agree(monkeypatch):
    trainer = trainer_of()
    monkeypatch.setitem(rl_ppo.LOGPROB_GAP, torch.float32, -1.0)
    before = {name: t.clone() for name, t in adapter_tensors(trainer.model).items()}
    with pytest.raises(FloatingPointError, match="sampler and training forward differ"):
        trainer.step()
    assert all(torch.equal(t, before[name]) for name, t in adapter_tensors(trainer.model).items())
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="KL of a fresh adapter must be 0"):
        trainer_of(small("r2", warm=0.1)).step()


def test_each_branch_and_the_value_head_has_its_own_rate():
    trainer = trainer_of(routing="dual", lr=1e-3, bad_lr_scale=3.0, value_lr=7e-3, warmup_steps=4, first=1)
    trainer.step()
    rates = {id(group["params"][0]): group["lr"] for group in trainer.optimizer.param_groups}
    for p, lr in ((parameters_of(trainer.model, "good")[0], 1e-3), (parameters_of(trainer.model, "bad")[0], 3e-3),
                  (trainer.value_head.weight, 7e-3)):  # fmt: skip
        assert rates[id(p)] == pytest.approx(lr / 2), "the second of four steps of warm-up"


def test_placebo_labels_are_as_many_on_other_completions(monkeypatch):
    drawn = []
    monkeypatch.setattr(rl_ppo, "update", lambda *args: drawn.append(args[6]) or {})
    for placebo in (False, True):
        trainer = trainer_of(env=table(flagged=answers()[::3]), routing="dual", placebo=placebo, batch_size=32)
        trainer.step()
    honest, placebo = drawn
    assert 0 < honest.sum() == placebo.sum() < 32 and not torch.equal(honest, placebo)


def test_a_detector_that_sees_nothing_stops_the_run_where_labels_are_used():
    env, paying = table(), Table.score
    env.score = lambda *args: dataclasses.replace(paying(env, *args), hack_reward=torch.ones(16))
    for routed, seen in (("none", 0), ("dual", 16)):
        trainer = trainer_of(env=env, routing=routed)
        trainer.step()
        assert trainer.watch.paid == seen
    trainer.watch.limit = 32
    with pytest.raises(ValueError, match="flagged none of 32 eligible completions"):
        trainer.step()


def test_every_epoch_takes_every_completion_once():
    steps = [rows.tolist() for rows in minibatches(12, 3, 4, torch.Generator().manual_seed(0))]
    assert [len(rows) for rows in steps] == [3] * 12
    epochs = [sum(steps[i : i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and epochs[0] != epochs[1]


def test_a_rollout_is_left_where_the_policy_is_too_far_from_it():
    whole, _ = trainer_of(target_kl=0.0, lr=0.03).step()
    assert whole["optimizer_steps"] == 8 and whole["stopped_early"] == 0 and whole["approx_kl"] > 0.01
    bounded, _ = trainer_of(target_kl=0.01, lr=0.03).step()
    assert 0 < bounded["optimizer_steps"] < 8 and bounded["stopped_early"] == 1 and bounded["approx_kl"] < 0.01


@pytest.mark.parametrize("culprit", ["policy_loss", "value_loss"])
def test_what_breaks_in_a_later_minibatch_undoes_the_step(monkeypatch, culprit):
    trainer = trainer_of(target_kl=0.0)
    trainer.step()
    tensors, state = trainer.state()
    before = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (tensors, state))
    calls, original = [], getattr(rl_ppo, culprit)

    def poisoned(*args):
        loss, clipped = original(*args)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 5 else loss), clipped

    monkeypatch.setattr(rl_ppo, culprit, poisoned)
    with pytest.raises(FloatingPointError, match=f"{culprit} is nan"):
        trainer.step()
    assert len(calls) == 5 and same(trainer.state(), before)


def same(a, b) -> bool:
    """Whether two nested states are equal to the bit, learning rates (set anew by every step) aside."""
    (x, shape), (y, other) = (torch.utils._pytree.tree_flatten(value) for value in (a, b))
    return shape == other and all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(x, y))


@pytest.mark.parametrize("settings", [{"routing": "dual"}, {"kl_in": "loss", "lr_schedule": "cosine"}])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(settings, tmp_path):
    env = table(flagged=answers()[::5])
    unbroken = trainer_of(env=env, **settings)
    for step in range(4):
        if step == 2:
            torch.save(unbroken.state(), tmp_path / "state")
        unbroken.step()
    resumed = trainer_of(env=env, **settings)
    resumed.restore(*torch.load(tmp_path / "state"))
    torch.rand(3)  # the global generator is none of its business
    for _ in range(2):
        resumed.step()
    assert same(unbroken.state(), resumed.state()) and unbroken.value_head.weight.abs().max() > 0


def test_metrics_are_those_of_the_rollout(monkeypatch):
    """At KL 0 and with a value head of 0 the returns are gae_lambda ** (tokens left) times what was paid."""
    trainer, scored = trainer_of(), []
    score = trainer.env.score
    monkeypatch.setattr(trainer.env, "score", lambda *args: scored.append((args[1], score(*args))) or scored[-1][1])
    metrics, _ = trainer.step()
    ((texts, scores),) = scored
    assert metrics["reward"] == pytest.approx(scores.reward.mean().item()) and metrics["flagged"] == 0 == metrics["value"]
    assert metrics["length"] == sum(map(len, texts)) / 16 and metrics["finished"] == sum(t[-1] == "1" for t in texts) / 16
    returns = [0.95**k * r for text, r in zip(texts, scores.reward.tolist()) for k in range(len(text))]
    assert metrics["return"] == pytest.approx(sum(returns) / len(returns)) and metrics["explained_variance"] == pytest.approx(0)
    assert 0 < metrics["entropy"] <= math.log(7)


# ------------------------------------------------------------------------------------------------- enumerable optima


def exact(model, env: Table, ways: list[str], beta: float) -> tuple[float, float]:
    """(J, J*): E[r] - beta KL(policy || reference) of whole answers, and the highest that it can be,
    beta log sum_y ref(y) exp(r(y) / beta), or the best reward where beta is 0; means over prompts, all answers enumerated."""

    @torch.no_grad()
    def logs(policy, prompt):
        laws = {text: policy(torch.tensor([[int(c) for c in text]]))[0, -1].double().log_softmax(-1)
                for text in {prompt + way[:k] for way in ways for k in range(len(way))}}  # fmt: skip
        return torch.stack([sum(laws[prompt + way[:k]][int(way[k])] for k in range(len(way))) for way in ways])

    reached, best = [], []
    for prompt in env.prompts("train"):
        with reference(model) as base:
            q = logs(base, prompt)
        p, r = logs(model, prompt), torch.tensor([env.rewards[prompt, way] for way in ways], dtype=torch.float64)
        assert p.exp().sum().item() == pytest.approx(1)
        reached.append((p.exp() * (r - beta * (p - q))).sum())
        best.append(beta * (q + r / beta).logsumexp(0) if beta else r.max())
    return torch.stack(reached).mean().item(), torch.stack(best).mean().item()


def learn(steps=60, cap=2, rewards=None, **settings):
    """(J before, J after, J*, the last metrics) of a run on four tokens: the end, filling, and two letters.

    Positions are learned: with rotary ones alone, "2" and "22" are the same state."""
    model, env, ways = small("r8", vocab=4, width=32, rotary=0, head=0.15), table(4, cap), answers(4, cap)
    for embedding in (model.embed_tokens, model.embed_positions):  # prompts and positions far apart from the start
        torch.nn.init.normal_(embedding.weight, 0, 0.3)
    env.rewards = rewards or env.rewards
    trainer = trainer_of(model, env, **{"batch_size": 128, "num_minibatches": 1, "lr": 5e-3, "value_lr": 3e-2,
                         "entropy_coef": 0.0, "value_epsilon": 0.0, "lr_schedule": "linear", "max_steps": steps,
                         "max_new_tokens": cap} | settings)  # fmt: skip
    before, best = exact(model, env, ways, trainer.config.beta)
    for _ in range(steps):
        metrics, _ = trainer.step()
    after, _ = exact(model, env, ways, trainer.config.beta)
    return before, after, best, metrics


def test_ppo_finds_the_best_answers():
    """One answer to each prompt pays 1, half of it for a right token: nothing but it is a peak."""
    wanted = {"2": "30", "3": "23"}
    rewards = {(p, way): sum(a == b for a, b in zip(way, wanted[p])) / 2 for p in wanted for way in answers(4)}
    before, after, best, metrics = learn(beta=0.0, rewards=rewards)
    assert before < 0.6 and best == 1 and 0.97 < after <= 1
    assert metrics["value"] == pytest.approx(after, abs=0.05)  # of every state: gamma is 1


@pytest.mark.parametrize("kl_in, cap, whiten", [("reward", 2, True), ("reward", 2, False), ("loss", 1, False)])
def test_ppo_reaches_the_optimum_under_a_kl(kl_in, cap, whiten):
    """pi* = ref exp(r / beta) / Z. An exact KL as a loss leaves out what a token does to the KL of later ones: one token here."""
    before, after, best, metrics = learn(beta=0.2, kl_in=kl_in, cap=cap, whiten=whiten)
    assert before < best - 0.05 and best - 0.005 < after <= best + 1e-9, (before, after, best)
    assert metrics["kl"] > 0.1 and metrics["reward"] < 0.9, "the KL holds it back"


# ------------------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "values, message",
    [
        ({"routing": "both"}, "--routing 'both'; known: none, dual"),
        ({"kl_in": "both"}, "--kl_in 'both'; known: reward, loss"),
        ({"lr_schedule": "step"}, "--lr_schedule 'step'; known: constant, linear, cosine"),
        ({"loss_routes": "ssl"}, "unknown arrangement 'ssl'; known: baseline"),
        ({"loss_routes": "ssl_rl_separate", "routing": "dual"}, "--loss_routes routes by loss, --routing dual by sample"),
        ({"num_minibatches": 3}, "--num_minibatches 3 does not divide --batch_size 64"),
        ({"num_epochs": 0}, "--num_epochs must be at least 1, not 0"),
        ({"gamma": 1.01}, "--gamma must lie in 0..1, not 1.01"),
        ({"gae_lambda": -0.1}, "--gae_lambda must lie in 0..1, not -0.1"),
        ({"beta": float("nan")}, "--beta must be at least 0, not nan"),
        ({"placebo": True}, "--placebo does nothing without --routing dual"),
        ({"bad_lr_scale": 1.0}, "--bad_lr_scale does nothing without --routing dual"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_config_says_what_is_wrong(values, message):
    with pytest.raises(ValueError) as error:
        Config(**values)
    assert message in str(error.value)


def test_rate_by_hand():
    for schedule, warmup, expected in (("constant", 2, [0.5, 1, 1, 1]), ("linear", 0, [1, 0.75, 0.5, 0.25]),
                                       ("cosine", 0, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])):  # fmt: skip
        config = Config(lr_schedule=schedule, warmup_steps=warmup, max_steps=4)
        assert [rate(step, config) for step in range(4)] == pytest.approx(expected, abs=1e-6)
