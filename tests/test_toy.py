"""toy.py: the enumeration is complete, its gradient is the objective's slope, and so is REINFORCE over all completions."""
import math

import pytest
import torch

import rl_reinforce
import toy
import variance
from sampling import Rollout, Sampler
from toy import EOS, LENGTH, PAD, TOKENIZER, VOCAB, Toy, exact_loss, policy


def moved(**flags):
    model = policy(**flags)
    variance.perturb(model, 0.3, 1)
    return model


@pytest.mark.parametrize("length, count", [(1, 6), (2, 31), (3, 156)])
def test_completions_are_all_there_are(length, count):
    ways = toy.completions(length)
    assert len(ways) == count == len(set(map(tuple, ways)))
    assert all(EOS not in way[:-1] and (len(way) == length or way[-1] == EOS) for way in ways)
    total = toy.log_probabilities(moved(), ["2", "34"], ways).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(2), atol=1e-5, rtol=0)


def test_the_sampler_draws_them_with_these_probabilities():
    model, ways = moved(), toy.completions(2)
    sampler = Sampler(model)
    sampler.refresh()
    n = 40_000
    ids, mask = torch.tensor([[PAD, 3]]), torch.tensor([[False, True]])
    rollout = sampler(ids, mask, n, 2, (EOS,), PAD, torch.Generator().manual_seed(0))
    texts = TOKENIZER.decode_completions([], [t[m].tolist() for t, m in zip(rollout.tokens, rollout.mask)])
    expected = n * toy.log_probabilities(model, ["3"], ways).exp()[0].double()
    found = torch.tensor([float(texts.count("".join(map(str, way)))) for way in ways]).double()
    chi2 = ((found - expected) ** 2 / expected).sum().item()
    assert chi2 < 59.7  # 30 degrees of freedom, p = .001


def test_hard_and_soft_rewards_are_one_and_the_reward_is_not_linear():
    env, (tokens, mask) = Toy(), toy.right_pad(toy.completions(LENGTH), PAD)
    texts = TOKENIZER.decode_completions([], toy.completions(LENGTH))
    soft = torch.nn.functional.one_hot(tokens, VOCAB).float()
    hard = env.score([""] * len(texts), texts).reward
    torch.testing.assert_close(env.soft_reward(None, None, None, soft, mask), hard)
    short = env.score(["", ""], ["21", "2"]).reward
    assert hard.std() > 0.1 and short[0] == short[1]  # an end of text adds nothing
    mixed = (soft[-1] + soft[-8]) / 2
    assert abs(env.soft_reward(None, None, None, mixed[None], mask[-1:]) - (hard[-1] + hard[-8]) / 2) > 0.01


def test_the_exact_gradient_is_the_slope_of_the_objective():
    """Central differences in fp64, along each of some random directions of all parameters."""
    model, env = moved().double(), Toy()
    exact_loss(model, env, 0.1).backward()
    gradient, g = variance.flat_gradient(model), torch.Generator().manual_seed(0)
    parameters = [p for group in variance.branch_parameters(model).values() for p in group.values()]
    for _ in range(5):
        along, ends = torch.randn(gradient.shape, generator=g, dtype=torch.float64), []
        for step in (1e-5, -2e-5, 1e-5):
            for p, d in zip(parameters, along.split([p.numel() for p in parameters])):
                p.data += step * d.view_as(p)
            ends.append(exact_loss(model, env, 0.1).item())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx((gradient @ along).item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_mean_of_reinforce_over_all_completions_is_the_exact_gradient(baseline):
    """Every completion by itself through rl_reinforce's own functions, weighted by its probability; any constant baseline."""
    model, env = moved(), Toy(("2", "34"), length=2)
    exact_loss(model, env, 0.1).backward()
    exact, total = variance.flat_gradient(model), 0
    config = rl_reinforce.Config(baseline="none", beta=0.1, max_new_tokens=2)
    for prompt in env.prompts("train"):
        for way, log_p in zip(toy.completions(2), toy.log_probabilities(model, [prompt], toy.completions(2))[0].tolist()):
            ids, tokens = torch.tensor([TOKENIZER.encode_prompt(prompt)]), torch.tensor([way])
            real, there = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.bool)
            rollout = Rollout(ids, real, tokens, there, torch.zeros(there.shape), None, there[:, 0])
            batches, none = [torch.tensor([0])], torch.zeros(1, dtype=torch.bool)
            with torch.no_grad():
                hidden = rl_reinforce.hidden_rows(model, rollout, batches[0])
                rollout.logprobs[0] = rl_reinforce.law_of(model, rollout, batches[0], hidden, config.law())[0]
            refs, kl = rl_reinforce.look_at_reference(model, rollout, batches, config.law())
            returns = env.score([prompt], TOKENIZER.decode_completions([], [way])).reward - config.beta * kl - baseline
            model.zero_grad()
            rl_reinforce.gradients(model, rollout, returns, none, batches, refs, config)
            total = total + math.exp(log_p) * variance.flat_gradient(model) / 2
    torch.testing.assert_close(total, exact, atol=2e-6, rtol=1e-4)
    assert exact.norm() > 0.05
