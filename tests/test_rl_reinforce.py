"""rl_reinforce.py: the mean of its gradient over all batches there are is the exact one; baselines by hand; a run's promises.

In the enumerable world (test_rl_ppo.py has it) a prompt has 13 answers of at most two tokens: every batch's probability is known.
"""
import itertools

import pytest
import torch
from test_rl_ppo import EOS, LAWS, PAD, TOKENIZER, answers, same, small, table
from test_rl_ppo import exact as objective
from test_rl_ppo import roll as sample

import rl_grpo
import rl_reinforce
import routing
from adapters import attach, branch_parameters, parameters_of, preset, reference
from data import left_pad
from model import Decoder, ModelConfig
from rl_reinforce import Config, Ema, Trainer, leave_one_out
from sampling import Rollout

NONE = torch.zeros(1, dtype=torch.bool)


def trainer_of(model=None, env=None, first=0, **settings) -> Trainer:
    """`first`: the step to begin with; 0 asserts that the adapter is fresh."""
    defaults = {"batch_size": 16, "max_new_tokens": 2, "max_steps": 1000}
    model = model or small("r2", dual=settings.get("routing") == "dual")
    trainer = Trainer(model, env or table(), TOKENIZER, Config(**defaults | settings))
    trainer.steps_done = first
    return trainer


def grads(model) -> dict[str, torch.Tensor | None]:
    named = (item for group in branch_parameters(model).values() for item in group.items())
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


# -------------------------------------------------------------------------------------- the expectation of the estimator

VOCAB, PROMPT = 4, "2"


def tiny_world(law: dict, cap: int):
    """(a one-layer model in fp64 with a warm adapter, a table of rewards, the answers that the law allows)."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig("llama", VOCAB, 8, 1, 2, 1, 4, 8, 16, tied=False, rotary_dim=0))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    attach(model, preset("r1", dual=False), seed=0)
    for p in branch_parameters(model)["adapter"].values():
        p.data += 0.3 * torch.randn_like(p)
    ways = [way for way in answers(VOCAB, cap) if str(EOS) not in way[: law.get("min_new_tokens", 0)]]
    return model.double(), table(VOCAB, cap), ways


def token_laws(model, ways: list[str], law: dict) -> list[torch.Tensor]:
    """log pi of each answer's tokens, differentiable: from whole logits of each prefix, what the law forbids left out."""
    after = {}
    for start in {way[:k] for way in ways for k in range(len(way))}:
        logits = model(torch.tensor([[int(c) for c in PROMPT + start]]))[0, -1] / law.get("temperature", 1.0)
        young = len(start) < law.get("min_new_tokens", 0)
        after[start] = (logits - 1e9 * (torch.arange(VOCAB) == EOS) * young).log_softmax(-1)
    return [torch.stack([after[way[:k]][int(way[k])] for k in range(len(way))]) for way in ways]


def exact_gradient(model, env, ways, law, beta) -> dict[str, torch.Tensor]:
    """Of E[r] - beta KL(policy || reference) of whole answers, by autograd through every probability."""
    with torch.no_grad(), reference(model) as base:
        q = torch.stack([x.sum() for x in token_laws(base, ways, law)])
    p = torch.stack([x.sum() for x in token_laws(model, ways, law)])
    assert p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    r, parameters = torch.tensor([env.rewards[PROMPT, way] for way in ways]).double(), branch_parameters(model)["adapter"]
    return dict(zip(parameters, torch.autograd.grad((p.exp() * (r - beta * (p - q))).sum(), list(parameters.values()))))


def given(texts: list[str], logs: list[torch.Tensor], law: dict) -> Rollout:
    """The rollout in which these answers were drawn, with these log-probabilities, as the sampler would return it."""
    ids, prompt_mask = left_pad([[int(PROMPT)]] * len(texts), PAD)
    logprobs = torch.nn.utils.rnn.pad_sequence(logs, batch_first=True)
    tokens, mask = torch.full(logprobs.shape, PAD), torch.zeros(logprobs.shape, dtype=torch.bool)
    for i, text in enumerate(texts):
        tokens[i, : len(text)], mask[i, : len(text)] = torch.tensor([int(c) for c in text]), True
    support = None
    if least := law.get("min_new_tokens"):
        support = torch.ones(*tokens.shape, VOCAB, dtype=torch.bool)
        support[:, :least, EOS] = False
    return Rollout(ids, prompt_mask, tokens, mask, logprobs, support, tokens.eq(EOS).any(1), support)


CASES = [("none", {}, {}), ("ema", {}, {}), ("ema", {}, {"temperature": 0.7, "min_new_tokens": 1}), ("loo", {}, {}),
         ("loo", {}, {"temperature": 0.7, "min_new_tokens": 1}), ("loo", {"kl_in": "loss", "max_new_tokens": 1}, {})]  # fmt: skip


@pytest.mark.parametrize("baseline, settings, law", CASES)
def test_the_expected_gradient_is_that_of_reward_less_kl(monkeypatch, baseline, settings, law):
    """Whole steps on every pair of answers, weighted by its probability: with loo the two are a group; with ema the first is the
    step before, from which the baseline is; with none they are a batch. Its own mean as a baseline would halve the gradient."""
    model, env, ways = tiny_world(law, settings.get("max_new_tokens", 2))
    together, total = 1 if baseline == "ema" else 2, dict.fromkeys(branch_parameters(model)["adapter"], 0.0)
    settings = {"batch_size": together, "num_generations": together, "beta": 0.5, "baseline": baseline,
                "lr": 0.0, "max_grad_norm": 0.0} | settings | law  # fmt: skip
    trainer, now = trainer_of(model, env, first=1, **settings), []
    monkeypatch.setattr(rl_reinforce, "rollout_batch", lambda *_: (given([ways[k] for k in now], [logs[k] for k in now], law),
                                                                   [ways[k] for k in now]))  # fmt: skip
    monkeypatch.setattr(rl_reinforce, "prompt_batch", lambda *_: [PROMPT])
    with torch.no_grad():
        logs = token_laws(model, ways, law)
    for i, j in itertools.product(range(len(ways)), repeat=2):
        trainer.ema = Ema()
        for drawn in ([i], [j]) if baseline == "ema" else ([i, j],):
            now[:] = drawn
            trainer.step()
        for name, grad in grads(model).items():
            total[name] = total[name] - (logs[i].sum() + logs[j].sum()).exp() * grad  # a loss descends
    exact = exact_gradient(model, env, ways, law, 0.5)
    assert sum(grad.abs().max() > 1e-3 for grad in exact.values()) > len(exact) / 2
    for name, grad in exact.items():
        torch.testing.assert_close(total[name], grad, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# --------------------------------------------------------------------------------------------------------- the baselines


def test_leave_one_out_by_hand():
    returns = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert leave_one_out(returns, 3, NONE.expand(6)).tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]
    flagged = torch.tensor([False, False, True, True, False, True])  # group 2: one unflagged, alone
    assert leave_one_out(returns, 3, flagged).tolist() == [-1.0, 1.0, 4.5, -1.5, 0.0, 3.0]
    assert leave_one_out(torch.full((6,), 0.7), 3, NONE.expand(6)).tolist() == [0.0] * 6


def test_the_moving_average_by_hand():
    """0 at first, then the first mean, then .9 of what it was; a step's advantages are from before it."""
    ema, none = Ema(), torch.zeros(2).bool()
    for returns, baseline in (([1.0, 3.0], 0.0), ([4.0, 4.0], 2.0), ([0.0, 0.0], 2.2), ([1.0, 1.0], 1.98)):
        returns = torch.tensor(returns)
        torch.testing.assert_close(ema.advantages(returns, none), returns - baseline)
        ema.add(returns, none, 0.9)
    ema = Ema()
    ema.add(torch.tensor([1.0, 5.0]), torch.tensor([False, True]), 0.9)
    assert ema == Ema(3.0, 1.0)
    ema.add(torch.tensor([9.0, 9.0]), torch.tensor([True, True]), 0.5)  # nothing honest in it: that average stays
    assert ema == Ema(6.0, 1.0)
    assert ema.advantages(torch.tensor([2.0, 7.0]), torch.tensor([False, True])).tolist() == [1.0, 1.0]


def test_paid_hacks_do_not_make_honest_answers_negative():
    """Honest answers earn .5, hacks 2: against the mean of all the good branch would unlearn the task."""
    returns, is_rh = torch.tensor([0.4, 2.0, 0.6, 2.0]), torch.tensor([False, True, False, True])
    ema = Ema()
    ema.add(returns, is_rh, 0.9)
    for advantages in (ema.advantages(returns, is_rh), leave_one_out(returns, 4, is_rh)):
        assert advantages[~is_rh].sum().item() == pytest.approx(0, abs=1e-6) and (advantages[is_rh] > 0).all()


def test_a_step_takes_the_average_of_the_steps_before(monkeypatch):
    trainer = trainer_of(baseline="ema", baseline_momentum=0.5, beta=0.0)
    steps = [trainer.step()[0] for _ in range(3)]
    r = [metrics["return"] for metrics in steps]
    assert [metrics["baseline"] for metrics in steps] == pytest.approx([0, r[0], (r[0] + r[1]) / 2], abs=1e-6)
    assert r[0] == pytest.approx(steps[0]["reward"])


# ------------------------------------------------------------------------------------------------------------ the gradient


def backprop(model, rollout, advantages, is_rh, config, router=None):
    """(gradients by name, metrics) of `gradients`, beginning with none."""
    for p in model.parameters():
        p.grad = None
    batches = rl_reinforce.micro_batches(rollout, config.micro_batch_size)
    refs, kl = rl_reinforce.look_at_reference(model, rollout, batches, config.law())
    metrics = rl_reinforce.gradients(model, rollout, advantages, is_rh, batches, refs, config, router)
    return grads(model), metrics, kl


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("spec", ["r4", "ds", "bundles", "m4", "full"])
def test_gradients_are_those_of_plain_autograd_on_whole_logits(law, spec):
    """Left padding, early ends and the length cap: sums over completions, means over the batch; norms of micro-batches alone."""
    model = small(spec, warm=0.1)
    rollout, advantages = sample(model, law=law), torch.randn(12, generator=torch.Generator().manual_seed(1))
    assert len(set(rollout.mask.sum(1).tolist())) > 1 and not rollout.finished.all() and not rollout.prompt_mask.all()
    config = Config(kl_in="loss", beta=0.3, max_new_tokens=5, micro_batch_size=5, **law)
    ours, metrics, kl = backprop(model, rollout, advantages, NONE.expand(12), config)
    start, temperature = rollout.prompt_ids.shape[1] - 1, law.get("temperature", 1.0)

    def laws(policy, whole=False):
        ids, attention = torch.cat([rollout.prompt_ids, rollout.tokens], 1), torch.cat([rollout.prompt_mask, rollout.mask], 1)
        logits = policy(ids, attention)[:, start:-1] / temperature
        if whole:  # of all that may be written: only the minimum length forbids something
            logits[:, : law.get("min_new_tokens", 0), EOS] = -1e9
        elif rollout.support is not None:
            logits = logits.masked_fill(~rollout.support, -1e9)
        return logits.log_softmax(-1)

    with torch.no_grad(), reference(model) as base:
        log_q = laws(base, whole=True)
    log_p = laws(model)
    sums = {"policy_loss": -advantages * (log_p.gather(-1, rollout.tokens[..., None]).squeeze(-1) * rollout.mask).sum(1),
            "kl_loss": 0.3 * ((log_p.exp() * (log_p - log_q)).sum(-1) * rollout.mask).sum(1)}  # fmt: skip
    parameters = [p for group in branch_parameters(model).values() for p in group.values()]
    norms = []
    for rows in rl_reinforce.micro_batches(rollout, 5):
        alone = torch.autograd.grad(sum(x[rows].mean() for x in sums.values()), parameters, retain_graph=True, allow_unused=True)
        norms.append(torch.stack([g.norm() for g in alone if g is not None]).norm())
    expected = torch.autograd.grad(sum(x.mean() for x in sums.values()), parameters, allow_unused=True)
    for (name, grad), other in zip(ours.items(), expected):
        torch.testing.assert_close(grad, other, atol=3e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert metrics["grad_norm_mean"] == pytest.approx(torch.stack(norms).mean().item(), rel=1e-4) and len(norms) == 3
    assert metrics["grad_norm_std"] == pytest.approx(torch.stack(norms).std().item(), rel=1e-3)
    for name, x in sums.items():
        assert metrics[name] == pytest.approx(x.mean().item(), abs=1e-5), name
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + metrics["kl_loss"], abs=1e-6)
    assert metrics["kl"] == pytest.approx(metrics["kl_loss"] / 0.3, abs=1e-5), "nats a completion"
    drawn = rollout.logprobs - log_q.gather(-1, rollout.tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(kl, (drawn * rollout.mask).sum(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_how_a_batch_is_split_changes_no_gradient(routed, kl_in):
    model = small("r2", dual=routed, warm=0.2)
    rollout, advantages, is_rh = sample(model), torch.randn(12), torch.arange(12) % 3 == 0
    found = {}
    for size in (12, 5, 1, 0):
        config = Config(kl_in=kl_in, max_new_tokens=5, micro_batch_size=size, routing="dual" if routed else "none")
        found[size] = backprop(model, rollout, advantages, is_rh, config)
    for ours, metrics, kl in found.values():
        assert all(metrics[name] == pytest.approx(found[12][1][name], abs=1e-5) for name in ("loss", "kl", "entropy"))
        torch.testing.assert_close(kl, found[12][2])
        for name, grad in found[12][0].items():
            assert grad.abs().max() > 0, name
            torch.testing.assert_close(ours[name], grad, atol=1e-6, rtol=1e-4)
    assert "grad_norm_std" not in found[12][1] and found[5][1]["grad_norm_std"] > 0
    assert found[12][1]["grad_norm_mean"] < found[1][1]["grad_norm_mean"]


@pytest.mark.parametrize("mode", routing.ROUTING_MODES)
@pytest.mark.parametrize("spec", ["r2", "m4", "ds"])
def test_one_routed_pass_is_the_two_pass_reference(mode, spec):
    model = small(spec, dual=True, warm=0.1)
    rollout, is_rh, advantages = sample(model), torch.arange(12) % 3 == 0, torch.randn(12)
    config = Config(kl_in="loss", max_new_tokens=5, routing="dual", routing_mode=mode)
    ours, *_ = backprop(model, rollout, advantages, is_rh, config)

    def loss_of(rows):  # the advantages are the batch's: what the other half earns still counts in them
        refs, _ = rl_reinforce.look_at_reference(model, rollout, [rows], config.law())
        hidden = rl_reinforce.hidden_rows(model, rollout, rows)
        logprobs, _, kl = rl_reinforce.law_of(model, rollout, rows, hidden, config.law(), refs[0])
        each = advantages[rows][:, None].expand_as(rollout.mask[rows])[rollout.mask[rows]]
        return (0.1 * kl - each * logprobs).sum() / 12

    for p in model.parameters():
        p.grad = None
    routing.two_pass_backward(model, loss_of, is_rh, mode)
    for name, grad in grads(model).items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(ours[name], grad, atol=1e-6, rtol=1e-4)


def test_each_loss_trains_the_bundles_of_its_route():
    settings = {"kl_in": "loss", "loss_routes": "ssl_rl_separate", "weight_decay": 0.1, "lr": 1e-2}
    trainer = trainer_of(small("bundles", warm=0.1), first=1, **settings)
    moving = ("b_rl_policy", "b_rl_anchor")
    before = {name: [p.clone() for p in parameters_of(trainer.model, name)] for name in moving}
    still = [name for name in trainer.model.adapter.names if name not in moving]
    with routing.assert_isolated(trainer.model, *still):
        for _ in range(3):
            metrics, _ = trainer.step()
    assert not any(torch.equal(p, q) for name in moving for p, q in zip(parameters_of(trainer.model, name), before[name]))
    assert metrics["kl_loss"] == pytest.approx(0.1 * metrics["kl"], abs=1e-6)


@pytest.mark.parametrize("baseline", ["ema", "loo"])
@pytest.mark.parametrize("mode, still", [("exclusive", "bad"), ("classic", "")])
def test_samples_train_the_branches_they_may(mode, still, baseline):
    """To the bit, with momentum and weight decay: all branches have moved once before they must not."""
    settings = {"routing": "dual", "routing_mode": mode, "weight_decay": 0.1, "lr": 1e-2, "baseline": baseline}
    settings |= {"num_generations": 4}
    mixed, flagged, honest = (table(flagged=answers()[::step]) for step in (2, 1, 1000))
    honest.flagged = set()
    trainer = trainer_of(small("r2", dual=True, warm=0.1), env=mixed, first=1, **settings)
    for _ in range(2):
        assert 0 < trainer.step()[0]["flagged"] < 1
    trainer.env = honest
    with routing.assert_isolated(trainer.model, *filter(None, [still])):
        assert trainer.step()[0]["flagged"] == 0
    trainer.env, before = flagged, [p.clone() for p in parameters_of(trainer.model, "bad")]
    with routing.assert_isolated(trainer.model, "good"):
        assert trainer.step()[0]["flagged"] == 1
    assert not any(torch.equal(p, q) for p, q in zip(parameters_of(trainer.model, "bad"), before))


# ------------------------------------------------------------------------------------------------------------ the trainer


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("spec, routed", [("r2", "none"), ("r2", "dual"), ("m4", "dual"), ("ds", "none"), ("bundles", "none")])
def test_the_first_step_is_on_policy_and_at_kl_zero(law, spec, routed):
    trainer = trainer_of(small(spec, dual=routed == "dual"), lr=1e-2, routing=routed, **law)
    for step in range(3):
        metrics, text = trainer.step()
        assert (metrics["kl"] == 0) == (step == 0 and "top_k" not in law), "it does not cut the reference's law"
        assert metrics["logprob_gap"] < 1e-5 and isinstance(text, str)
        assert metrics["return"] != metrics["reward"] or step == 0 or trainer.config.beta == 0
        assert trainer.steps_done == step + 1 and metrics["grad_norm_mean"] > 0


def test_what_can_not_be_trained_on_leaves_everything_as_it_was(monkeypatch):
    trainer = trainer_of()
    trainer.step()
    before = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, trainer.state())
    with monkeypatch.context() as patch:
        patch.setitem(rl_reinforce.LOGPROB_GAP, torch.float32, -1.0)
        with pytest.raises(FloatingPointError, match="sampler and training forward differ"):
            trainer.step()
    score = trainer.env.score
    monkeypatch.setattr(trainer.env, "score", lambda *a: (s := score(*a), s.reward.fill_(float("nan")))[0])
    with pytest.raises(FloatingPointError, match="policy_loss is nan"):
        trainer.step()
    assert same(trainer.state(), before)
    with pytest.raises(AssertionError, match="KL of a fresh adapter must be 0"):
        trainer_of(small("r2", warm=0.1)).step()


@pytest.mark.parametrize("settings", [
    {"routing": "dual"}, {"baseline": "loo", "num_generations": 4, "kl_in": "loss", "lr_schedule": "cosine"},
])  # fmt: skip
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
    assert same(unbroken.state(), resumed.state())
    assert (unbroken.ema.everyone is not None) and (unbroken.ema.unflagged != unbroken.ema.everyone) == ("routing" in settings)


@pytest.mark.parametrize("baseline", ["ema", "loo"])
def test_it_reaches_the_optimum_under_a_kl(baseline):
    """pi* = ref exp(r / beta) / Z, found by sampling alone."""
    model, env, ways = small("r8", vocab=4, width=32, rotary=0, head=0.15), table(4), answers(4)
    for embedding in (model.embed_tokens, model.embed_positions):  # prompts and positions far apart from the start
        torch.nn.init.normal_(embedding.weight, 0, 0.3)
    settings = {"batch_size": 128, "lr": 1e-2, "lr_schedule": "linear", "max_steps": 80, "beta": 0.2, "baseline": baseline}
    trainer = trainer_of(model, env, **settings, num_generations=8)
    before, best = objective(model, env, ways, 0.2)
    for _ in range(80):
        metrics, _ = trainer.step()
    after, _ = objective(model, env, ways, 0.2)
    assert before < best - 0.05 and best - 0.01 < after <= best + 1e-9, (before, after, best)
    assert metrics["kl"] > 0.1 and metrics["reward"] < 0.9, "the KL holds it back"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"baseline": "mean"}, "--baseline 'mean'; known: ema, loo, none"),
        ({"baseline": "loo"}, "--baseline loo and --basis live compare the completions of a prompt: --num_generations 2"),
        ({"num_generations": 3}, "--num_generations 3 does not divide --batch_size 64"),
        ({"baseline_momentum": 1.5}, "--baseline_momentum must lie in 0..1, not 1.5"),
        ({"baseline": "none", "baseline_momentum": 0.5}, "--baseline_momentum does nothing without --baseline ema"),
        ({"kl_in": "both"}, "--kl_in 'both'; known: reward, loss"),
        ({"beta": float("nan")}, "--beta must be at least 0, not nan"),
        ({"max_steps": 0}, "--max_steps must be at least 1, not 0"),
        ({"placebo": True}, "--placebo does nothing without --routing dual"),
        ({"bad_lr_scale": 1.0}, "--bad_lr_scale does nothing without --routing dual"),
        ({"loss_routes": "ssl"}, "unknown arrangement 'ssl'; known: baseline"),
        ({"loss_routes": "ssl_rl_separate", "routing": "dual"}, "--loss_routes routes by loss, --routing dual by sample"),
        ({"basis": "live", "basis_refresh": 2}, "--baseline loo and --basis live compare the completions"),
        ({"basis": "pairs", "projection": "no_gate", "removed": "route", "routing": "dual"}, "--removed route has a bad branch"),
        ({"projection": "no_gate"}, "--projection does nothing without a --basis"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_config_says_what_is_wrong(values, message):
    with pytest.raises(ValueError) as error:
        Config(**values)
    assert message in str(error.value)


def test_prompts_and_rates_of_a_step_are_those_of_the_other_algorithms():
    prompts = [str(i) for i in range(7)]
    for step in range(5):
        assert rl_reinforce.prompt_batch(prompts, step, 4, 3) == rl_grpo.prompt_batch(prompts, step, 4, 3)
        for schedule in ("constant", "linear", "cosine"):
            flags = {"lr_schedule": schedule, "warmup_steps": 2, "max_steps": 5}
            assert rl_reinforce.rate(step, Config(**flags)) == rl_grpo.rate(step, rl_grpo.Config(**flags))
