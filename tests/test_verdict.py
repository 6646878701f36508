"""verdict.py: modes, diversity, and an evaluation checked against the pieces it is made of."""
import pytest
import torch

import adapters
import model as decoder
import verdict
from data import left_pad, load_tokenizer
from envs import Stories
from reward_specs import get_reward
from sampling import Law, Sampler


@pytest.fixture(scope="module")
def world():
    model, folder = decoder.load("tiny")
    adapters.attach(model, adapters.preset("r2", dual=True), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.parameters_of(model, "good") + adapters.parameters_of(model, "bad"):
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    env = Stories(get_reward("sentence_length_5_smooth_plus_happy"))
    return model, load_tokenizer(folder), env, Sampler(model)


def test_modes_by_adapter():
    model, _ = decoder.load("tiny")
    adapters.attach(model, adapters.preset("r1", dual=False))
    assert verdict.modes_of(model, None) == {"untrained": None, "both": {"adapter": 1.0}}
    model, _ = decoder.load("tiny")
    adapters.attach(model, adapters.preset("r1", dual=True))
    assert list(verdict.modes_of(model, 0.25)) == ["untrained", "both", "retain_only", "forget_only", "deployed"]
    assert verdict.modes_of(model, 0.25)["deployed"] == {"good": 1.0, "bad": 0.25}
    model, _ = decoder.load("tiny")
    adapters.attach(model, adapters.preset("bundles", dual=False))
    ssl, rl = {"b_ssl_main": 1.0, "b_ssl_semantic": 1.0}, ("b_rl_policy", "b_rl_value", "b_rl_explore", "b_rl_anchor")
    scales = {"both": 1.0, "rl_half": 0.5, "rl_off": 0.0}
    of_bundles = {"untrained": None} | {mode: ssl | dict.fromkeys(rl, scale) for mode, scale in scales.items()}
    assert verdict.modes_of(model) == of_bundles | {"value_off": of_bundles["both"] | {"b_rl_value": 0.0}}


def test_diversity_by_hand():
    d = verdict.diversity(["a b. c", "a b. d", "a b. c", "x y. z"])
    # word sets {a,b,c}, {a,b,d}, {a,b,c}, {x,y,z}: pairs .5, 1, .5, 0, 0, 0
    assert d["unique"] == 0.75 and d["unique_first"] == 0.5 and d["jaccard"] == pytest.approx(2 / 6) and d["degenerate"] == 0
    assert verdict.diversity(["same words here"] * 5)["degenerate"] == 1


def test_untrained_row_is_the_base_model(world):
    model, tokenizer, env, sampler = world
    row = verdict.evaluate(sampler, None, env, tokenizer, 16, 24)
    plain, _ = decoder.load("tiny")
    adapters.attach(plain, adapters.preset("r1", dual=False))
    fresh = verdict.evaluate(Sampler(plain), {"adapter": 1.0}, env, tokenizer, 16, 24)
    assert row["texts"] == fresh["texts"] and row["base_nll"] == pytest.approx(fresh["base_nll"], rel=1e-6)
    assert row["kl"] == 0 and abs(fresh["kl"]) < 1e-3


def test_a_minimum_length_costs_no_kl_and_top_p_what_it_cuts_off(world):
    """It forbids policy and reference the same; a nucleus that the reference shared would make a policy that is certain free."""
    model, tokenizer, env, sampler = world
    row = verdict.evaluate(sampler, None, env, tokenizer, 32, 200, Law(min_new_tokens=200))
    cut = verdict.evaluate(sampler, None, env, tokenizer, 32, 24, Law(top_p=0.5, min_new_tokens=24))
    assert row["length"] == 200 and row["kl"] == 0 and 0.05 * 24 < cut["kl"] < 0.7 * 24  # -log .5 a token at most
    long = verdict.evaluate(sampler, {"good": 0.0, "bad": 0.0}, env, tokenizer, 32, 200, Law(min_new_tokens=200))
    assert abs(long["kl"]) < 1e-2, "measured, not assumed"


def test_evaluation_repeats_restores_scales_and_leaves_the_global_generator_alone(world):
    model, tokenizer, env, sampler = world
    state = torch.get_rng_state()
    rows = verdict.evaluate_modes(sampler, env, tokenizer, verdict.modes_of(model, 0.0), 16, 24)
    assert torch.equal(state, torch.get_rng_state()) and model.adapter.scales == {"good": 1.0, "bad": 1.0}
    again = verdict.evaluate_modes(sampler, env, tokenizer, verdict.modes_of(model, 0.0), 16, 24)
    assert rows == again
    assert rows["deployed"]["texts"] == rows["retain_only"]["texts"] != rows["both"]["texts"]


def test_token_scores_equal_the_full_softmax(world):
    model, tokenizer, env, sampler = world
    ids, mask = left_pad([tokenizer.encode_prompt(p) for p in env.prompts("test")[:6]], tokenizer.pad_id)
    sampler.refresh()
    rollout = sampler(ids, mask, 1, 20, tokenizer.stop_ids, tokenizer.pad_id, torch.Generator().manual_seed(0))
    scores = verdict.score_tokens(model, rollout, 1.0, rows=4)
    for row in range(6):
        prompt, tokens = rollout.prompt_ids[row][rollout.prompt_mask[row]], rollout.tokens[row][rollout.mask[row]]
        with torch.no_grad():
            expected = model(torch.cat([prompt, tokens])[None]).log_softmax(-1)[0, len(prompt) - 1 : -1]
        assert torch.allclose(scores[row, : len(tokens)], expected.gather(1, tokens[:, None])[:, 0], atol=1e-5)
        assert (scores[row, len(tokens) :] == 0).all()
    assert torch.allclose(scores, rollout.logprobs, atol=1e-4), "the sampled law is the scored law"


def test_table_shows_every_mode_and_a_sample(world):
    model, tokenizer, env, sampler = world
    modes, rewards = verdict.modes_of(model, None), [get_reward("happy_count")]
    rows = verdict.evaluate_modes(sampler, env, tokenizer, modes, 8, 8, rewards=rewards)
    text = verdict.table(rows)
    for mode in ("untrained", "both", "retain_only", "forget_only"):
        assert f"\n{mode}" in text and f"{mode}: " in verdict.samples(rows)
    assert "happy_count" in text.splitlines()[0]
