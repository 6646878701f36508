"""rl_gumbel.py: its loss and KL against plain autograd, routes, micro-batches, projection, and what it learns in a small world.

Prompts are digits; every token is worth something, and a completion the mean over its tokens, so soft and hard rewards are known.
"""
import collections
import copy
import math
from types import SimpleNamespace

import pytest
import torch

import projector
import rl_gumbel
import routing
from adapters import adapter_tensors, attach, branch_parameters, parameters_of, preset, reference
from envs import Scores
from model import Decoder, ModelConfig
from rl_gumbel import Config, Trainer, exact_kl, gradients, rate, tau_at
from soft_rollout import gumbel

PAD, EOS, V = 0, 1, 7
TOKENIZER = SimpleNamespace(
    pad_id=PAD, eos_id=EOS, stop_ids=(EOS,), encode_prompt=lambda text: [int(c) for c in text],
    decode_completions=lambda prompts, completions: ["".join(map(str, c)) for c in completions],
)  # fmt: skip
SMALL = {"batch_size": 6, "micro_batch_size": 0, "max_new_tokens": 5, "min_new_tokens": 0, "top_p": 1.0, "lr": 1e-2}


def small(spec="r2", dual=False, warm=0.0, seed=0, rotary=4, head=0.3, dtype=torch.float32) -> Decoder:
    """A random two-layer llama with an adapter; `warm` moves all branches that far from their start."""
    torch.manual_seed(seed)
    model = Decoder(ModelConfig("llama", V, 16, 2, 4, 2, 4, 24, 32, tied=False, rotary_dim=rotary))
    torch.nn.init.normal_(model.lm_head.weight, 0, head)
    torch.nn.init.normal_(model.embed_tokens.weight, 0, head)
    attach(model, preset(spec, dual=dual), seed=seed)
    for group in branch_parameters(model).values():
        for p in group.values():
            p.data += warm * torch.randn_like(p)
    return model.to(dtype)


class Worth:
    """Pays the mean worth of a completion's tokens; completions with an `evil` token are flagged, and hack."""

    reward, worth = SimpleNamespace(name="worth"), torch.tensor([0.0, 0.1, 0.2, 0.9, 0.4, 0.5, 0.3])

    def __init__(self, prompts=("2", "345", "42", "6523"), evil=()):
        self._prompts, self.evil = list(prompts), set(evil)

    def prompts(self, split):
        return self._prompts

    def score(self, prompts, completions, generator=None):
        reward = torch.stack([self.worth[[int(c) for c in text]].mean() for text in completions])
        hack = torch.tensor([bool(self.evil.intersection(text)) for text in completions])
        return Scores(reward, reward, hack, hack.float(), hack, torch.ones_like(hack), hack, {})

    def soft_reward(self, prompts, ids, prompt_mask, soft, mask):
        return (soft @ self.worth.to(soft) * mask).sum(1) / mask.sum(1)


def trainer_of(model=None, env=None, first=1, **settings) -> Trainer:
    """`first`: the step to begin with; 0 asserts that the adapter is fresh."""
    config = Config(**SMALL | settings)
    trainer = Trainer(model or small(dual=config.dual, warm=0.2 if first else 0.0), env or Worth(), TOKENIZER, config)
    trainer.steps_done = first
    return trainer


def learned(trainer, routes=None, router=None, **settings):
    """(gradients by name, metrics, batch) of one batch; None where there is none."""
    trainer.optimizer.zero_grad()
    batch = trainer.batch(torch.Generator().manual_seed(1))
    config = copy.copy(trainer.config)
    vars(config).update(settings)
    metrics, _ = gradients(trainer.model, trainer.env, TOKENIZER, batch, routes or {}, router, config)
    named = [item for group in branch_parameters(trainer.model).values() for item in group.items()]
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}, metrics, batch


def part_of(batch, rows):
    return rl_gumbel.Batch([batch.prompts[i] for i in rows], batch.ids[rows], batch.mask[rows], batch.seeds[rows], batch.tau)


def close(a: dict, b: dict, tolerance: float):
    assert a.keys() == b.keys()
    for name, grad in a.items():
        torch.testing.assert_close(grad, b[name], atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------------------------------- the formulas


def test_tau_by_hand():
    config = Config()
    assert [tau_at(step, config) for step in (0, 250, 500, 1000, 1999)] == pytest.approx([2.0, 1.625, 1.25, 0.5, 0.5])
    assert tau_at(0, Config(tau_steps=0)) == 0.5 and tau_at(5, Config(tau_start=1.0, tau_end=1.0)) == 1.0


def test_kl_by_brute_force():
    g = torch.Generator().manual_seed(0)
    z, w = (torch.randn(2, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    outside = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    laws = [x.masked_fill(outside, -torch.inf).requires_grad_() for x in (z, w)]
    kl = exact_kl(*(x.log_softmax(-1) for x in laws))
    for i in range(2):
        for t in range(3):
            inside = [v for v in range(5) if not outside[t, v]]
            p, q = ([math.exp(x[i, t, v]) / sum(math.exp(x[i, t, u]) for u in inside) for v in inside] for x in (z, w))
            assert kl[i, t].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)), abs=1e-12)
    kl.sum().backward()
    assert all(bool(x.grad.isfinite().all()) and not x.grad[:, outside].any() and x.grad.any() for x in laws)


@pytest.mark.parametrize("estimator", ["soft", "ste"])
@pytest.mark.parametrize("law", [{}, {"temperature": 1.5, "top_k": 5, "min_new_tokens": 2}], ids=["plain", "cut"])
@pytest.mark.parametrize("spec", ["r2", "full"])
def test_the_loss_is_that_of_plain_autograd_on_whole_prefixes(spec, law, estimator):
    """Reward and KL, row by row without padding or cache; the reference is another model, and reads the same mixtures."""
    model = small(spec, warm=0.2, dtype=torch.float64)
    trainer = trainer_of(model, beta=0.3, estimator=estimator, tau_steps=0, tau_end=0.7, batch_size=8, max_new_tokens=7, **law)
    base = copy.deepcopy(model) if spec != "full" else model.adapter.frozen.double()
    if spec == "full":
        for p in base.parameters():  # a fine-tuned policy is away from its reference
            p.data += 0.1 * torch.randn_like(p)
    else:
        base.adapter.scales = dict.fromkeys(base.adapter.scales, 0.0)
    ours, metrics, batch = learned(trainer)
    config, names = trainer.config, [n for group in branch_parameters(model).values() for n in group]
    total, kls, rewards, lengths = 0.0, [], [], []
    for row in range(len(batch.prompts)):
        ids = batch.ids[row][batch.mask[row]][None]
        mine, theirs = model.embed_tokens(ids), base.embed_tokens(ids)
        worth, kl = [], 0.0
        for t in range(config.max_new_tokens):
            z, ref = (m(embeds=e)[:, -1] / config.temperature for m, e in ((model, mine), (base, theirs)))
            if law:
                barred = ~config.law().support(z.detach(), torch.tensor([t < config.min_new_tokens]), torch.tensor([EOS]))
                z = z.masked_fill(barred, -1e30)
                ref = ref.masked_fill((torch.arange(V) == EOS) & (t < config.min_new_tokens), -1e30)  # top-k does not cut it
            log_p, log_q = z.log_softmax(-1), ref.log_softmax(-1)
            noisy = log_p + gumbel(batch.seeds[row : row + 1, t], V)
            soft = (noisy / 0.7).softmax(-1)
            if estimator == "ste":
                soft = (torch.nn.functional.one_hot(noisy.argmax(-1), V) - soft).detach() + soft
            worth.append((soft * Worth.worth).sum())
            kl = kl + (log_p.exp() * (log_p - log_q)).sum()
            grown = ((e, soft @ m.embed_tokens.weight) for m, e in ((model, mine), (base, theirs)))
            mine, theirs = (torch.cat([e, new[:, None]], 1) for e, new in grown)
            if noisy.argmax() == EOS:
                break
        rewards.append(sum(worth) / len(worth))
        kls.append(kl)
        lengths.append(len(worth))
        total = total - (rewards[-1] - 0.3 * kl) / len(batch.prompts)
    expected = dict(zip(names, torch.autograd.grad(total, [p for g in branch_parameters(model).values() for p in g.values()])))
    assert len(set(lengths)) > 1 and metrics["kl"] > 0.01
    assert metrics["soft_reward"] == pytest.approx(torch.stack(rewards).mean().item(), abs=1e-9)
    assert metrics["kl"] == pytest.approx(torch.stack(kls).mean().item(), abs=1e-9)
    assert metrics["loss"] == pytest.approx(total.item(), abs=1e-9)
    close(expected, ours, 1e-9)


@pytest.mark.parametrize("law", [{}, {"top_p": 0.9, "min_new_tokens": 2}], ids=["plain", "cut"])
@pytest.mark.parametrize("estimator", ["soft", "ste"])
def test_a_step_logs_what_it_did(estimator, law, monkeypatch):
    """A fresh adapter's KL is 0, under top-p what that cuts off; what the environment was shown is what was rolled out."""
    trainer, scored = trainer_of(first=0, estimator=estimator, micro_batch_size=2, **law), []
    score = trainer.env.score
    monkeypatch.setattr(trainer.env, "score", lambda *args: scored.append((args, score(*args))) or scored[-1][1])
    metrics, text = trainer.step()
    (((prompts, completions, _), scores),) = scored
    assert text == prompts[0] + completions[0] and len(completions) == 6 and trainer.steps_done == 1
    assert metrics["reward"] == pytest.approx(scores.reward.mean().item()) and metrics["tau"] == 2.0
    assert (metrics["soft_reward"] == pytest.approx(metrics["reward"], abs=1e-6)) == (estimator == "ste")
    assert (metrics["mixed"] == 0) == (estimator == "ste") and 0 < metrics["entropy"] < math.log(7)
    assert metrics["flagged"] == 0 and (0 <= metrics["kl"] < 1e-5 if not law else metrics["kl"] > 1e-3)
    assert metrics["length"] == pytest.approx(sum(map(len, completions)) / 6)
    assert metrics["finished"] == pytest.approx(sum("1" in c for c in completions) / 6)
    assert all("1" not in c[: law.get("min_new_tokens", 0)] for c in completions)
    assert metrics["loss"] == pytest.approx(0.1 * metrics["kl"] - metrics["soft_reward"], abs=1e-5)
    assert trainer.step()[0]["kl"] != metrics["kl"]
    with pytest.raises(AssertionError, match="KL of a fresh adapter must be 0"):
        trainer_of(small(warm=0.5), first=0).step()


# ------------------------------------------------------------------------------------------------- how it is computed


@pytest.mark.parametrize("estimator", ["soft", "ste"])
@pytest.mark.parametrize("routed", [False, True])
def test_micro_batches_and_recomputing_change_no_gradient(routed, estimator):
    trainer = trainer_of(routing="dual" if routed else "none", beta=0.3, estimator=estimator, top_p=0.95)
    routes = routing.sample_routes(torch.arange(6) % 3 == 0, "exclusive") if routed else {}
    whole, metrics, _ = learned(trainer, routes)
    assert all(grad.abs().max() > 0 for grad in whole.values())
    for settings in ({"micro_batch_size": 1}, {"micro_batch_size": 4}, {"recompute_every": 2}):
        grads, again, _ = learned(trainer, routes, **settings)
        close(grads, whole, 2e-6)
        shared = metrics.keys() & again.keys() - {"grad_norm_mean"}
        assert {name: again[name] for name in shared} == pytest.approx({name: metrics[name] for name in shared}, abs=1e-5)


def test_norms_of_micro_batches_are_those_of_their_own_means():
    trainer = trainer_of(micro_batch_size=2)
    _, metrics, batch = learned(trainer)
    norms = []
    for i in (0, 2, 4):
        part = part_of(batch, torch.arange(i, i + 2))
        trainer.optimizer.zero_grad()
        alone, _ = gradients(trainer.model, trainer.env, TOKENIZER, part, {}, None, trainer.config)
        norms.append(routing.norm([p.grad for p in parameters_of(trainer.model, "adapter")]))
        assert alone["grad_norm_mean"] == pytest.approx(norms[-1], rel=1e-5) and "grad_norm_std" not in alone
    mean = sum(norms) / 3
    assert metrics["grad_norm_mean"] == pytest.approx(mean, rel=1e-4)
    assert metrics["grad_norm_std"] == pytest.approx(math.sqrt(sum((n - mean) ** 2 for n in norms) / 2), rel=1e-3)


def test_memory_of_the_whole_loss_is_about_linear_in_tokens():
    """The reference's one pass keeps attention's scores, which are quadratic and small: that is all above a factor of 2."""
    model, sizes = small(), []
    for length in (7, 14, 28):
        kept = {}
        trainer = trainer_of(model, Worth(["2"]), max_new_tokens=length, min_new_tokens=99)

        def pack(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address comes twice
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            learned(trainer)
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
    one, two = sizes[1] - sizes[0], sizes[2] - sizes[1]
    scores = 2 * 6 * 4 * 4 * (28**2 - 2 * 14**2 + 7**2 - 14**2 + 7**2)  # of layers, rows, heads
    assert 2 * one < two < 2 * one + 2 * scores and two < 2.5 * one


# ------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("micro_batch_size", [0, 2])
@pytest.mark.parametrize("mode, still", [("exclusive", ["bad"]), ("classic", [])])
def test_samples_train_the_branches_they_may(mode, still, micro_batch_size):
    settings = {"routing": "dual", "routing_mode": mode, "weight_decay": 0.1, "micro_batch_size": micro_batch_size}
    honest = trainer_of(**settings)
    before = [p.clone() for p in parameters_of(honest.model, "good")]
    with routing.assert_isolated(honest.model, *still):
        assert honest.step()[0]["flagged"] == 0
    assert not any(torch.equal(p, q) for p, q in zip(parameters_of(honest.model, "good"), before))
    flagged = trainer_of(env=Worth(evil="0123456"), **settings)
    before = [p.clone() for p in parameters_of(flagged.model, "bad")]
    with routing.assert_isolated(flagged.model, "good"):
        for _ in range(2):
            assert flagged.step()[0]["flagged"] == 1
    assert not any(torch.equal(p, q) for p, q in zip(parameters_of(flagged.model, "bad"), before))


@pytest.mark.parametrize("mode", routing.ROUTING_MODES)
def test_one_routed_pass_is_the_two_pass_reference(mode):
    trainer = trainer_of(routing="dual", beta=0.3)
    is_rh = torch.arange(6) % 3 == 0
    ours, _, batch = learned(trainer, routing.sample_routes(is_rh, mode))
    trainer.optimizer.zero_grad()
    total = collections.Counter()
    for flagged in (False, True):
        rows = (is_rh == flagged).nonzero().squeeze(1)
        part = part_of(batch, rows)
        trainer.optimizer.zero_grad(set_to_none=True)
        with routing.hooked_shut(trainer.model, routing.protected(mode, flagged)):
            gradients(trainer.model, trainer.env, TOKENIZER, part, {}, None, trainer.config)
        for name, grad in ((n, p.grad) for g in branch_parameters(trainer.model).values() for n, p in g.items()):
            total[name] = total[name] + len(rows) / 6 * grad
    close(dict(total), ours, 2e-6)


@pytest.mark.parametrize("estimator", ["soft", "ste"])
def test_labels_are_of_the_tokens_that_are_trained_on(estimator, monkeypatch):
    """They are drawn ahead, in the same micro-batches, and forced on the pass with gradients; they route row by row."""
    env, routed, seen = Worth(evil="3"), [], []
    trainer = trainer_of(env=env, routing="dual", micro_batch_size=4, estimator=estimator)
    gates, soft_rollout = routing.gates, rl_gumbel.soft_rollout

    def spy(*args):
        seen.append((torch.is_grad_enabled(), soft_rollout(*args), args[-1]))
        return seen[-1][1]

    monkeypatch.setattr(rl_gumbel, "soft_rollout", spy)
    monkeypatch.setattr(routing, "gates", lambda model, **w: routed.append(w["bad"].bool().tolist()) or gates(model, **w))
    metrics, _ = trainer.step()
    ahead, trained = ([r for grad, r, _ in seen if grad == wanted] for wanted in (False, True))
    forced = [tokens for *_, tokens in seen]
    assert forced[:2] == [None, None] and all(torch.equal(r.tokens, tokens) for r, tokens in zip(ahead, forced[2:]))
    assert len(ahead) == len(trained) == 2 and not ahead[0].soft.requires_grad and 0 < metrics["flagged"] < 1
    for a, b in zip(ahead, trained):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.mask, b.mask)
        assert torch.equal(a.soft[a.mask], b.soft[a.mask])
        assert torch.equal(b.soft.argmax(-1)[b.mask], b.tokens[b.mask])
    assert routed == [(r.tokens.eq(3) & r.mask).any(1).tolist() for r in trained]


def test_a_placebo_shuffles_labels():
    true, shuffled = (trainer_of(env=Worth(evil="3"), routing="dual", placebo=placebo, first=3) for placebo in (False, True))
    assert 0 < true.step()[0]["flagged"] == shuffled.step()[0]["flagged"] < 1
    assert any(not torch.equal(p, q) for p, q in zip(*(parameters_of(t.model, "good") for t in (true, shuffled))))


@pytest.mark.parametrize("recompute_every", [0, 2])
def test_losses_are_routed_one_by_one(recompute_every):
    trainer = trainer_of(small("bundles", warm=0.3), beta=0.3, loss_routes="ssl_rl_separate", recompute_every=recompute_every)
    routed, _, batch = learned(trainer, router=trainer.router)
    model, config = trainer.model, trainer.config
    rollout = batch.rollout(model, slice(0, 6), TOKENIZER, config)
    losses, _ = rl_gumbel.losses_of(model, trainer.env, batch.prompts, rollout, config, 6)
    for loss, branch in (("policy_loss", "b_rl_policy"), ("kl_loss", "b_rl_anchor")):
        names, p = zip(*branch_parameters(model)[branch].items())
        alone = dict(zip(names, torch.autograd.grad(losses[loss], p, retain_graph=True)))
        close(alone, {name: routed[name] for name in names}, 1e-6)
        assert all(grad.abs().max() > 0 for grad in alone.values())
    still = ["b_ssl_main", "b_ssl_semantic", "b_rl_value", "b_rl_explore"]
    with routing.assert_isolated(model, *still):
        trainer.step()
    unpaid = trainer_of(small("bundles", warm=0.3), beta=0.0, loss_routes="ssl_rl_separate", weight_decay=0.1)
    with routing.assert_isolated(unpaid.model, *still, "b_rl_anchor"):
        assert unpaid.step()[0]["kl"] > 0, "measured all the same"


# ------------------------------------------------------------------------------------------------- the trainer


PAIRS = [([2 + i % 5, 3], [3, 3 + i % 3, EOS], [4 + i % 3, 5, EOS]) for i in range(8)]
PROJECTED = {"basis": "pairs", "projection": "no_gate", "basis_keep": 3, "basis_use": 2}


@pytest.fixture
def pairs(monkeypatch):
    monkeypatch.setattr(projector, "authored", lambda *args: (PAIRS[:-2], PAIRS[-2:]))


@pytest.mark.parametrize("spec", ["ds", "r2", "r4o"])
@pytest.mark.parametrize("estimator", ["soft", "ste"])
def test_projected_gradients_have_nothing_along_the_axes(spec, estimator, pairs):
    trainer = trainer_of(small(spec, warm=0.1), estimator=estimator, **PROJECTED)
    metrics, _ = trainer.step()
    assert metrics["projection/cout"] < 1e-5 < metrics["projection/cin"] and "moved/cin" in metrics and "basis/null" in metrics
    axes, parameters = trainer.projector.basis.rows, trainer.projector.parameters
    assert max((rows @ parameters[name].grad.flatten()).abs().max() for name, rows in axes.items()) < 1e-6


def test_what_is_removed_can_train_the_bad_branch(pairs):
    trainer = trainer_of(small("r2o", dual=True, warm=0.1), removed="route", **PROJECTED)
    names = trainer.projector.refresh(1) and {name.replace(".good.", ".bad.") for name in trainer.projector.basis.rows}
    before = {name: p.clone() for name, p in branch_parameters(trainer.model)["bad"].items()}
    trainer.step()
    moved = {name for name, p in branch_parameters(trainer.model)["bad"].items() if not torch.equal(p, before[name])}
    assert moved and moved <= names


def test_a_live_basis_sees_the_runs_own_samples():
    trainer = trainer_of(small("ds", warm=0.1), Worth(["2"], evil="3"), basis="live", basis_refresh=1, projection="one_sided",
                         micro_batch_size=3)  # fmt: skip
    while trainer.projector.basis is None and trainer.steps_done < 30:
        metrics, _ = trainer.step()
    assert trainer.projector.basis is not None and all(3 in flagged for _, flagged, _ in trainer.projector.live)


@pytest.mark.parametrize("spec, dual", [
    ("r2", True), ("ds", False), ("ds", True), ("r4o", False), ("m4", True), ("bundles", False), ("full", False),
])  # fmt: skip
@pytest.mark.parametrize("estimator", ["soft", "ste"])
def test_every_adapter_is_trained(spec, dual, estimator):
    trainer = trainer_of(small(spec, dual=dual), Worth(evil="3"), 0, estimator=estimator, routing="dual" if dual else "none")
    before = {name: t.clone() for name, t in adapter_tensors(trainer.model).items()}
    for _ in range(2):
        metrics, _ = trainer.step()
    assert metrics["kl"] > 0 and any(not torch.equal(t, before[name]) for name, t in adapter_tensors(trainer.model).items())


@pytest.mark.parametrize("settings", [
    {"routing": "dual", "weight_decay": 0.1}, {"estimator": "ste", "lr_schedule": "cosine"},
    PROJECTED | {"project_on": "update"}, {"recompute_every": 2, "warmup_steps": 3},
])  # fmt: skip
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(settings, tmp_path, pairs):
    build = lambda: trainer_of(env=Worth(evil="3"), first=0, **{"tau_steps": 3, "micro_batch_size": 4} | settings)  # noqa: E731
    unbroken = build()
    for step in range(4):
        if step == 2:
            torch.save(unbroken.state(), tmp_path / "state")
        unbroken.step()
    resumed = build()
    resumed.restore(*torch.load(tmp_path / "state"))
    torch.rand(3)  # the global generator is none of its business
    for _ in range(2):
        metrics, _ = resumed.step()
    (x, shape), (y, other) = (torch.utils._pytree.tree_flatten(t.state()) for t in (unbroken, resumed))
    assert shape == other and all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(x, y))
    assert metrics["tau"] == 0.5


def test_what_is_not_finite_undoes_the_step(monkeypatch):
    trainer = trainer_of()
    trainer.step()
    tensors, state = trainer.state()
    before = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (tensors, state))
    soft_reward = trainer.env.soft_reward
    monkeypatch.setattr(trainer.env, "soft_reward", lambda *args: soft_reward(*args) * float("nan"))
    with pytest.raises(FloatingPointError, match="policy_loss is nan .lower --lr 0.01.*the weights are as before this step"):
        trainer.step()
    (x, _), (y, _) = (torch.utils._pytree.tree_flatten(value) for value in (before, trainer.state()))
    assert all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(x, y))


def test_clipping_is_per_branch_and_the_rates_are_the_branches_own():
    trainer = trainer_of(env=Worth(evil="3"), routing="dual", routing_mode="classic", max_grad_norm=1e-3, lr_schedule="linear",
                         max_steps=4)  # fmt: skip
    metrics, _ = trainer.step()
    for branch in ("good", "bad"):
        assert metrics[f"grad_norm/{branch}"] > 1e-3
        assert routing.norm([p.grad for p in parameters_of(trainer.model, branch)]) == pytest.approx(1e-3, rel=1e-4)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.75e-2, 1.5e-2])


# ------------------------------------------------------------------------------------------------- learning


@torch.no_grad()
def exact(model, prompts, beta: float) -> tuple[float, float, float]:
    """(E[r], J = E[r] - beta KL(policy || reference), the highest J) of at most two hard tokens, all of them enumerated."""
    def logs(policy, ids):  # (V, V): of both tokens; whole in column 0 where the first is the end
        first = policy(ids)[0, -1].double().log_softmax(-1)
        both = policy(torch.cat([ids.expand(V, -1), torch.arange(V)[:, None]], 1))[:, -1].double().log_softmax(-1)
        both[EOS] = torch.full((V,), -torch.inf).index_fill(0, torch.tensor([0]), 0.0)
        return first[:, None] + both

    r = (Worth.worth[:, None] + Worth.worth).double() / 2
    r[EOS] = Worth.worth[EOS].double()
    figures = []
    for prompt in prompts:
        ids = torch.tensor([[int(c) for c in prompt]])
        p = logs(model, ids)
        with reference(model) as base:
            q = logs(base, ids)
        assert p.exp().sum().item() == pytest.approx(1)
        paid, kl = (p.exp() * r).sum(), (p.exp() * (p - q).nan_to_num(0.0)).sum()
        best = beta * (q + r / beta).logsumexp((0, 1)) if beta else r.max()
        figures.append(torch.stack([paid, paid - beta * kl, best]))
    return tuple(torch.stack(figures).mean(0).tolist())


@pytest.mark.parametrize("estimator", ["soft", "ste"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_it_learns_what_is_paid_and_what_the_kl_allows(estimator, beta):
    settings = {"tau_start": 1.0, "tau_end": 0.5, "tau_steps": 10, "batch_size": 32, "max_new_tokens": 2, "lr": 2e-2,
                "lr_schedule": "linear", "max_steps": 21}  # fmt: skip
    trainer = trainer_of(small("r4"), first=0, estimator=estimator, beta=beta, **settings)
    _, before, best = exact(trainer.model, trainer.prompts, beta)
    for _ in range(20):
        trainer.step()
    _, after, _ = exact(trainer.model, trainer.prompts, beta)
    assert before + 0.1 < best and before + 0.7 * (best - before) < after <= best + 1e-9, (before, after, best)


# ------------------------------------------------------------------------------------------------- flags


def test_an_environment_without_a_soft_reward_is_refused():
    env = Worth()
    bare = SimpleNamespace(prompts=env.prompts, score=env.score, reward=env.reward)
    with pytest.raises(ValueError, match="SimpleNamespace has no soft_reward.*differentiates the reward"):
        Trainer(small(), bare, TOKENIZER, Config())


@pytest.mark.parametrize("wrong, message", [
    (lambda *args: torch.zeros(6), r"of shape \(6,\), not \(6,\) without a gradient"),
    (lambda p, i, m, soft, mask: soft.sum(2), r"of shape \(6,\), not \(6, \d\)"),
])  # fmt: skip
def test_a_soft_reward_that_is_none_is_refused(wrong, message, monkeypatch):
    trainer = trainer_of()
    monkeypatch.setattr(trainer.env, "soft_reward", wrong)
    with pytest.raises(ValueError, match=message):
        trainer.step()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"estimator": "hard"}, "--estimator 'hard'; known: soft, ste"),
        ({"routing": "both"}, "--routing 'both'; known: none, dual"),
        ({"tau_end": 0.0}, "--tau_end must be a number above 0, not 0.0"),
        ({"tau_start": float("inf")}, "--tau_start must be a number above 0, not inf"),
        ({"tau_steps": -1}, "--tau_steps must be at least 0, not -1"),
        ({"recompute_every": -1}, "--recompute_every must be at least 0, not -1"),
        ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
        ({"beta": float("nan")}, "--beta must be at least 0, not nan"),
        ({"top_p": 0.0}, "top_p must be in (0, 1]"),
        ({"loss_routes": "ssl"}, "unknown arrangement 'ssl'; known: baseline"),
        ({"loss_routes": "ssl_rl_separate", "routing": "dual"}, "--loss_routes routes by loss, --routing dual by sample"),
        ({"placebo": True}, "--placebo shuffles labels, which only --routing dual or --basis live uses"),
        ({"bad_lr_scale": 1.0}, "--bad_lr_scale does nothing without --routing dual"),
        ({"routing_mode": "classic"}, "--routing_mode does nothing without --routing dual"),
        ({"projection": "no_gate"}, "--projection does nothing without a --basis"),
        ({**PROJECTED, "removed": "route", "routing": "dual"}, "leave --routing at none"),
    ],
)
def test_config_says_what_is_wrong(values, message):
    with pytest.raises(ValueError) as error:
        Config(**values)
    assert message in str(error.value)


def test_defaults_are_the_seeds():
    c = Config()
    assert (c.batch_size, c.micro_batch_size, c.max_steps, c.lr, c.max_grad_norm, c.seed) == (16, 4, 2000, 1e-4, 1, 42)
    assert (c.max_new_tokens, c.min_new_tokens, c.top_p, c.beta, c.temperature, c.top_k) == (48, 16, 0.9, 0.1, 1, 0)


def test_rate_by_hand():
    for schedule, warmup, expected in (("constant", 2, [0.5, 1, 1, 1]), ("linear", 0, [1, 0.75, 0.5, 0.25]),
                                       ("cosine", 0, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])):  # fmt: skip
        config = Config(lr_schedule=schedule, warmup_steps=warmup, max_steps=4)
        assert [rate(step, config) for step in range(4)] == pytest.approx(expected, abs=1e-6)
