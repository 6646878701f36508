"""losses.py against torch's own log_softmax, hand arithmetic and brute force."""
import math
import statistics

import pytest
import torch

from losses import LOSS_TYPES, group_stats, k1, k3, token_law, token_logprobs, token_weights

# -------------------------------------------------------------------------------------------------- log-probabilities


def problem(seed=0, count=13, width=8, vocab=29, keep=None):
    """hidden (count, width), weight (vocab, width), targets, an upstream gradient, a support that holds them."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(count, width, generator=g), torch.randn(vocab, width, generator=g)
    targets, upstream = torch.randint(vocab, (count,), generator=g), torch.randn(count, generator=g)
    support = None
    if keep is not None:
        support = torch.rand(count, vocab, generator=g) < keep
        support[torch.arange(count), targets] = True
    return hidden, weight, targets, upstream, support


def by_torch(hidden, weight, targets, upstream, support, temperature):
    """Values and gradients (hidden, weight) by autograd in fp64."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h @ w.t() / temperature
    if support is not None:
        logits = torch.where(support, logits, torch.tensor(-math.inf, dtype=torch.float64))
    logprobs = torch.nn.functional.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    (logprobs * upstream).sum().backward()
    return logprobs.detach(), h.grad, w.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("keep", [None, 0.3])
@pytest.mark.parametrize("chunk", [None, 1, 5, 13, 100])
def test_token_logprobs_are_those_of_log_softmax_with_their_gradients(temperature, keep, chunk):
    hidden, weight, targets, upstream, support = problem(keep=keep)
    values, grad_hidden, grad_weight = by_torch(hidden, weight, targets, upstream, support, temperature)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs = token_logprobs(h, w, targets, temperature, support, chunk)
    assert logprobs.dtype == torch.float32 and logprobs.shape == (13,)
    (logprobs * upstream).sum().backward()
    torch.testing.assert_close(logprobs.double(), values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(h.grad.double(), grad_hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(w.grad.double(), grad_weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [None, 4])
def test_token_logprobs_give_a_gradient_to_one_side_alone(chunk):
    hidden, weight, targets, upstream, _ = problem(seed=1)
    _, grad_hidden, grad_weight = by_torch(hidden, weight, targets, upstream, None, 1.0)
    h = hidden.clone().requires_grad_()
    (token_logprobs(h, weight, targets, chunk=chunk) * upstream).sum().backward()
    torch.testing.assert_close(h.grad.double(), grad_hidden, atol=1e-5, rtol=1e-5)
    w = weight.clone().requires_grad_()
    (token_logprobs(hidden, w, targets, chunk=chunk) * upstream).sum().backward()
    torch.testing.assert_close(w.grad.double(), grad_weight, atol=1e-5, rtol=1e-5)


def test_token_logprobs_backward_runs_twice_over_one_graph():
    hidden, weight, targets, upstream, _ = problem(seed=2)
    h = hidden.clone().requires_grad_()
    loss = (token_logprobs(h, weight, targets) * upstream).sum()
    loss.backward(retain_graph=True)
    once = h.grad.clone()
    loss.backward()
    torch.testing.assert_close(h.grad, 2 * once, atol=0, rtol=0)


def test_token_logprobs_stay_finite_far_from_zero():
    hidden, weight, targets, upstream, _ = problem(seed=3)
    values, grad_hidden, _ = by_torch(100 * hidden, weight, targets, upstream, None, 1.0)
    h = (100 * hidden).requires_grad_()
    logprobs = token_logprobs(h, weight, targets)
    (logprobs * upstream).sum().backward()
    torch.testing.assert_close(logprobs.double(), values, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(h.grad.double(), grad_hidden, atol=1e-4, rtol=1e-4)


def test_token_logprobs_of_bfloat16_states_are_fp32_and_near():
    hidden, weight, targets, upstream, _ = problem(seed=4)
    h, w = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    values, grad_hidden, _ = by_torch(h.detach(), w, targets, upstream, None, 1.0)
    logprobs = token_logprobs(h, w, targets)
    (logprobs * upstream).sum().backward()
    assert logprobs.dtype == torch.float32 and h.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logprobs.double(), values, atol=0.05, rtol=0.02)
    torch.testing.assert_close(h.grad.double(), grad_hidden, atol=0.05, rtol=0.05)


def test_a_support_of_the_target_alone_has_logprob_zero_and_no_gradient():
    hidden, weight, targets, upstream, _ = problem(seed=5)
    support = torch.zeros(13, 29, dtype=torch.bool)
    support[torch.arange(13), targets] = True
    h = hidden.requires_grad_()
    logprobs = token_logprobs(h, weight, targets, 0.9, support)
    (logprobs * upstream).sum().backward()
    assert logprobs.abs().max() == 0 and h.grad.abs().max() == 0


def test_a_target_outside_its_support_is_an_error():
    hidden, weight, targets, _, support = problem(keep=0.5)
    support[7, targets[7]] = False
    with pytest.raises(ValueError, match="outside the support"):
        token_logprobs(hidden, weight, targets, support=support)


# ---------------------------------------------------------------------------------------------------- normalisers

MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)  # 4, 1 and 2 tokens


@pytest.mark.parametrize(
    "loss_type, rows",
    [
        ("grpo", [1 / 4 / 3, 1 / 1 / 3, 1 / 2 / 3]),  # each sequence a third, shared by its tokens
        ("bnpo", [1 / 7, 1 / 7, 1 / 7]),  # each token a seventh
        ("dapo", [1 / 7, 1 / 7, 1 / 7]),
        ("dr_grpo", [1 / 30, 1 / 30, 1 / 30]),  # 3 sequences of at most 10 tokens
    ],
)
def test_token_weights_by_hand(loss_type, rows):
    expected = torch.tensor(rows)[:, None] * MASK
    torch.testing.assert_close(token_weights(MASK, loss_type, max_new_tokens=10), expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_token_weights_of_an_empty_completion_are_zero(loss_type):
    weights = token_weights(torch.cat([MASK, torch.zeros(1, 4, dtype=torch.bool)]), loss_type, 4)
    assert weights.isfinite().all() and weights[3].sum() == 0


def test_token_weights_name_an_unknown_loss_type():
    with pytest.raises(ValueError, match=r"'gspo'.*grpo, bnpo, dr_grpo, dapo"):
        token_weights(MASK, "gspo", 4)


# -------------------------------------------------------------------------------------------------- KL estimators


def test_k1_and_k3_by_hand():
    logprobs, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    torch.testing.assert_close(k1(logprobs, ref), torch.tensor([0.5, -1.0, 0.0]))
    expected = torch.tensor([math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1, 0.0])
    torch.testing.assert_close(k3(logprobs, ref), expected)


def test_both_estimate_the_kl_of_enumerated_distributions():
    g = torch.Generator().manual_seed(0)
    pi, ref = (torch.randn(50, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (pi.exp() * (pi - ref)).sum()
    for estimate in (k1(pi, ref), k3(pi, ref)):  # the expectation over pi, token by token
        torch.testing.assert_close((pi.exp() * estimate).sum(), exact)
    assert (k3(pi, ref) >= 0).all()


def test_expected_gradients_k1_none_k3_of_the_reverse_direction():
    """Sampled from pi and differentiated as a loss, k1 teaches nothing and k3 pulls along KL(ref || pi)'s gradient."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(20, generator=g, dtype=torch.float64).requires_grad_()
    ref = torch.randn(20, generator=g, dtype=torch.float64).log_softmax(0)
    sampled = logits.detach().softmax(0)
    (of_k1,) = torch.autograd.grad((sampled * k1(logits.log_softmax(0), ref)).sum(), logits)
    (of_k3,) = torch.autograd.grad((sampled * k3(logits.log_softmax(0), ref)).sum(), logits)
    pi = logits.log_softmax(0)
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - pi)).sum(), logits)
    torch.testing.assert_close(of_k1, torch.zeros_like(of_k1), atol=1e-12, rtol=0)
    torch.testing.assert_close(of_k3, reverse, atol=1e-12, rtol=1e-9)


# ---------------------------------------------------------------------------------------------- group statistics


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_group_stats_by_brute_force(size, seed):
    g = torch.Generator().manual_seed(seed)
    rewards, keep = torch.rand(6 * size, generator=g), torch.rand(6 * size, generator=g) < 0.5
    keep[:size] = False  # a group of none
    keep[size : 2 * size] = torch.arange(size) == 1  # a group of one
    for kept in (None, keep):
        mean, std, count = group_stats(rewards, size, kept)
        for i in range(6 * size):
            first = i // size * size
            members = [rewards[j].item() for j in range(first, first + size) if kept is None or kept[j]]
            assert count[i] == len(members)
            assert mean[i].item() == pytest.approx(statistics.fmean(members) if members else 0.0, abs=1e-6)
            assert std[i].item() == pytest.approx(statistics.stdev(members) if len(members) > 1 else 0.0, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 0.7, 1.9])
@pytest.mark.parametrize("size", [2, 3, 6, 7, 16])
def test_equal_rewards_deviate_by_exactly_zero(value, size):
    """A group without variance must be seen as one; a mean that rounds would give it tiny advantages instead."""
    rewards = torch.full((4 * size,), value)
    mean, std, _ = group_stats(rewards, size)
    assert torch.equal(mean, rewards) and not std.any()


# ----------------------------------------------------------------------------------------------------------- whole laws


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("chunk", [3, 100])
def test_token_law_and_its_gradients_are_those_of_plain_autograd(temperature, truncated, chunk):
    """fp64, against log_softmax: log-probabilities, entropy and KL, and what a mix of them says to hidden and weight."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, ref_hidden, ref_weight = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (8, 11, 8, 11))
    targets, support, allowed = torch.randint(11, (8,), generator=g), None, None
    if truncated:
        support = torch.rand(8, 11, generator=g) < 0.5
        support[torch.arange(8), targets] = True
        support[0] = torch.arange(11) == targets[0]  # one token left: its entropy is 0, its KL is not
        allowed = support | (torch.rand(8, 11, generator=g) < 0.5)  # the reference's support holds the policy's

    def law(h, w, support):
        logits = h @ w.T / temperature
        return (logits if support is None else logits.masked_fill(~support, -1e30)).log_softmax(-1)

    mix = torch.randn(3, 8, generator=g, dtype=torch.float64)
    found = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            figures = torch.stack(token_law(h, w, targets, temperature, support, (ref_hidden, ref_weight, allowed), chunk))
            again = torch.stack(token_law(h, w, targets, temperature, support, chunk=chunk))
            assert torch.equal(again, figures[:2]), "the reference changes nothing else"
        else:
            log_p, log_q = law(h, w, support), law(ref_hidden, ref_weight, allowed)
            figures = torch.stack([log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1),
                                   (log_p.exp() * (log_p - log_q)).sum(-1)])  # fmt: skip
        (figures * mix).sum().backward()
        found.append((figures.detach(), h.grad, w.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    assert found[0][0][2].min() >= -1e-12 and (not truncated or found[0][0][1, 0].abs() < 1e-12)


def test_certainty_is_not_free():
    """A policy that has but one token left is as far from a reference as that finds it unlikely, not at KL 0."""
    weight, ref_weight = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    hidden, ref_hidden = torch.tensor([[9.0, 0, 0]]).double(), torch.tensor([[-2.0, 0, 0]]).double()
    support = torch.tensor([[True, False, False]])
    _, _, kl = token_law(hidden, weight, torch.tensor([0]), 1.0, support, (ref_hidden, ref_weight, None))
    assert kl.item() == pytest.approx(math.log(2 + math.exp(-2)) + 2)


def test_token_law_of_the_reference_itself_has_kl_zero_to_the_bit_and_a_frozen_weight_gets_no_gradient():
    hidden, weight = torch.randn(6, 5, requires_grad=True), torch.randn(11, 5)
    logprobs, entropy, kl = token_law(hidden, weight, torch.arange(6), 0.7, ref=(hidden.detach(), weight, None))
    assert not kl.any() and torch.equal(logprobs, token_law(hidden, weight, torch.arange(6), 0.7)[0])
    torch.testing.assert_close(logprobs, token_logprobs(hidden, weight, torch.arange(6), 0.7))
    (entropy.sum() + kl.sum()).backward()
    assert hidden.grad.abs().max() > 0 and weight.grad is None
