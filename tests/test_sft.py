"""sft.py: labels by hash, who runs and who learns, gradients against homogeneous passes with hooks, isolation."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

import adapters
import corpus
import corpus_words
import model as decoder
import sft
from data import load_tokenizer, right_pad
from envs import Texts, imitation, read_texts
from losses import text_logprobs
from reward_specs import get_reward, get_trait
from routing import assert_isolated, hooked_shut
from sft import Config, looked_at, runs_of, update
from verdict import text_loss

SOURCE = {"dataset": "", "column": None, "prompt_tokens": 8, "max_tokens": 256, "eval_split": "test", "eval_texts": 60}
BAD = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1]).bool()  # labelled with the trait
GOOD = torch.tensor([0, 1, 0, 0, 1, 0, 1, 0]).bool()  # labelled without it; texts 2 and 5 carry no label


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(decoder.resolve("tiny"))


@pytest.fixture(scope="module")
def batch(tokenizer):
    texts = [d.text for d in corpus.generate("fables", "train", 8)]
    return right_pad([tokenizer.encode_text(text)[: 20 + 3 * i] for i, text in enumerate(texts)], tokenizer.pad_id)


def small(seed=0, dtype=torch.float32, lora="r2", dual=True):
    """A random decoder whose branches are all away from 0."""
    torch.manual_seed(seed)
    config = decoder.ModelConfig("llama", 2048, 32, 2, 4, 2, 8, 48, 256, rotary_dim=8)
    model = adapters.attach(decoder.Decoder(config).to(dtype), adapters.preset(lora, dual=dual))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype) + 0.1 * torch.randn_like(p, dtype=dtype)
    return model


def optimizer_of(model, lr=0.1):
    groups = adapters.branch_parameters(model).values()
    return torch.optim.AdamW([p for group in groups for p in group.values()], lr=lr, weight_decay=0.1)


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_follow_a_hash_of_salt_and_index():
    known = looked_at(4000, 0.3, 7)
    by_hand = [int(hashlib.md5(f"7_{i}".encode()).hexdigest(), 16) % 100 < 30 for i in range(4000)]
    assert known.tolist() == by_hand and known.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(looked_at(100, 0.3, 7), known[:100]), "a longer list begins alike"
    assert (looked_at(4000, 0.5, 7) | ~known).all(), "a larger share contains the smaller"
    assert not torch.equal(looked_at(4000, 0.3, 8), known)
    assert looked_at(50, 1.0, 0).all() and not looked_at(50, 0.0, 0).any()


def trainer(tokenizer, **flags):
    texts = Texts([[0, 5, 6, 1]] * 1000, ["x"] * 1000, torch.arange(1000) % 4 == 0)
    return sft.Trainer(small(), None, tokenizer, Config(seed=3, **flags), texts), texts.detected, looked_at(1000, 0.2, 3)


def test_a_trainer_labels_only_what_was_looked_at(tokenizer):
    routed, detected, known = trainer(tokenizer, routing="dual", labelled_frac=0.2)
    assert torch.equal(routed.is_bad, known & detected) and torch.equal(routed.is_good, known & ~detected)


def test_at_least_half_of_a_routed_batch_is_labelled(tokenizer):
    def drawn(share, **flags):
        routed, _, _ = trainer(tokenizer, routing="dual", labelled_frac=share, batch_size=10, **flags)
        labelled = routed.is_bad | routed.is_good
        return [sum(labelled[pool[sft.batch_of(len(pool), 0, n, 3)]].sum().item() for pool, n in routed.pools),
                sum(n for _, n in routed.pools)]  # fmt: skip

    assert drawn(0.2) == [5, 10] and drawn(0.8) == [8, 10] and drawn(1.0) == [10, 10] and drawn(0.0) == [0, 10]
    assert drawn(0.2, labelled_batch_frac=0.25) == [2, 10] and drawn(0.2, labelled_batch_frac=1.0) == [10, 10]


def test_controls_leave_out_or_mislabel(tokenizer):
    control, detected, known = trainer(tokenizer, labelled_frac=0.2, treatment="filter")
    ((kept, size),) = control.pools
    assert kept.tolist() == (~(known & detected)).nonzero().squeeze(1).tolist() and size == control.config.batch_size
    ((everything, _),) = trainer(tokenizer, labelled_frac=0.2)[0].pools
    assert len(everything) == 1000, "without routing labels change nothing"
    placebo, _, _ = trainer(tokenizer, routing="dual", placebo=True)
    assert placebo.is_bad.sum() == detected.sum() and torch.equal(placebo.is_good, ~placebo.is_bad)
    assert (placebo.is_bad & detected).sum().item() == pytest.approx(62.5, abs=25), "no better than chance"


# ------------------------------------------------------------------------------------------------------ who runs, learns


def test_who_runs_and_who_learns():
    def said(**flags):
        return [
            (rows.tolist(), scales, {k: None if w is None else w.tolist() for k, w in routes.items()})
            for rows, scales, routes in runs_of(BAD, GOOD, Config(**flags))
        ]

    honest, flagged = (~BAD).float().tolist(), BAD.float().tolist()
    assert said() == [(list(range(8)), {}, {})]
    assert said(routing="dual", routing_mode="classic") == [(list(range(8)), {}, {"good": honest, "bad": None})]
    assert said(routing="dual", routing_mode="exclusive") == [(list(range(8)), {}, {"good": honest, "bad": flagged})]
    routes = {"good": honest, "bad": None}
    assert said(routing="dual") == [([1, 4, 6], {"good": 1.0, "bad": 0.0}, routes), ([0, 2, 3, 5, 7], {}, routes)]
    assert len(runs_of(BAD, BAD & ~BAD, Config("dual"))) == 1, "a pass without texts is none"


LEARN = {  # by mode, branches that learn from a text: labelled bad, labelled good, without a label; and those that run
    "sibling": ((["bad"], 1.0), (["good"], 0.0), (["good", "bad"], 1.0)),
    "classic": ((["bad"], 1.0), (["good", "bad"], 1.0), (["good", "bad"], 1.0)),
    "exclusive": ((["bad"], 1.0), (["good"], 1.0), (["good"], 1.0)),
}


@pytest.mark.parametrize("mode", sft.MODES)
@pytest.mark.parametrize("lora, micro", [("r2", 0), ("r2", 3), ("m2", 1)])
def test_gradients_equal_homogeneous_passes_with_hooks(batch, mode, lora, micro):
    """The slow twin: texts of one kind at a time, cross-entropy by hand, hooks that stop whoever may not learn."""
    ids, mask = batch
    fast, slow = small(lora=lora, dtype=torch.float64), small(lora=lora, dtype=torch.float64)
    config = Config("dual", mode, micro_batch_size=micro, max_grad_norm=0)
    update(fast, torch.optim.SGD(fast.parameters(), lr=0.0), ids, mask, BAD, GOOD, config)
    for rows, (learners, bad_scale) in zip((BAD, GOOD, ~BAD & ~GOOD), LEARN[mode]):
        for i in rows.nonzero().flatten().tolist():
            shut = [name for name in ("good", "bad") if name not in learners]
            with hooked_shut(slow, shut), adapters.scaled(slow, good=1, bad=bad_scale):
                text = ids[i, : int(mask[i].sum())]
                (F.cross_entropy(slow(text[None, :-1])[0], text[1:], reduction="sum") / mask[:, 1:].sum()).backward()
    for branch in ("good", "bad"):
        for p, q in zip(adapters.parameters_of(fast, branch), adapters.parameters_of(slow, branch)):
            assert torch.allclose(p.grad, q.grad, atol=1e-12) and p.grad.any()


@pytest.mark.parametrize("mode, is_bad, is_good, still", [
    ("sibling", True, False, "good"), ("sibling", False, True, "bad"), ("classic", True, False, "good"),
    ("exclusive", True, False, "good"), ("exclusive", False, True, "bad"), ("exclusive", False, False, "bad"),
])  # fmt: skip
def test_who_may_not_learn_does_not_move_a_bit(batch, mode, is_bad, is_good, still):
    """With momentum and weight decay on, from steps before in which everything learned."""
    ids, mask = batch
    model = small()
    optimizer, free = optimizer_of(model), torch.zeros(8).bool()
    update(model, optimizer, ids, mask, BAD, GOOD, Config("dual", mode))
    moving = {"good": "bad", "bad": "good"}[still]
    before = [p.detach().clone() for p in adapters.parameters_of(model, moving)]
    with assert_isolated(model, still):
        update(model, optimizer, ids, mask, free | is_bad, free | is_good, Config("dual", mode))
    assert all(not torch.equal(p, q) for p, q in zip(adapters.parameters_of(model, moving), before))


def test_losses_are_those_of_the_texts_as_they_were_run(batch):
    ids, mask = batch
    model = small()
    expected = []
    for i in range(8):
        with adapters.scaled(model, bad=0.0 if GOOD[i] else 1.0), torch.no_grad():
            text = ids[i, : int(mask[i].sum())]
            expected.append(F.cross_entropy(model(text[None, :-1])[0], text[1:], reduction="sum"))
    totals, per_text = update(model, optimizer_of(model), ids, mask, BAD, GOOD, Config("dual"))
    assert torch.allclose(per_text, torch.stack(expected), atol=1e-3)
    assert totals["loss"] == pytest.approx((sum(expected) / mask[:, 1:].sum()).item(), rel=1e-5)
    assert model.adapter.scales == {"good": 1.0, "bad": 1.0} and all(g.weight is None for g in model.adapter.gates.values())


def test_a_loss_that_is_not_finite_stops_before_the_step(batch):
    model = small()
    adapters.parameters_of(model, "bad")[0].data.fill_(float("nan"))
    before = [p.clone() for p in adapters.parameters_of(model, "good")]
    with pytest.raises(FloatingPointError, match="loss is nan.*lower --lr"):
        update(model, optimizer_of(model), *batch, BAD, GOOD, Config("dual"))
    assert all(torch.equal(p, q) for p, q in zip(adapters.parameters_of(model, "good"), before))


def test_a_step_logs_its_loss_by_trait_and_paces_each_branch(tokenizer):
    texts = read_texts(get_trait("fable_unkind"), tokenizer, SOURCE, "train", 12)
    model, config = small(), Config("dual", batch_size=6, warmup_steps=0, bad_lr_scale=3.0, lr=1e-3)
    chosen = sft.batch_of(12, 0, 6, config.seed)
    nll = {True: [], False: []}
    for i in chosen:  # all texts are labelled: those without the trait run with the bad branch off
        found = bool(texts.detected[i])
        with adapters.scaled(model, bad=float(found)):
            nll[found].append((text_loss(model, [texts.ids[i]], 0), len(texts.ids[i]) - 1))
    routed = sft.Trainer(model, None, tokenizer, config, texts)
    metrics, sample = routed.step()
    for name, part in (("loss/trait", nll[True]), ("loss/free", nll[False])):
        assert metrics[name] == pytest.approx(sum(x * n for x, n in part) / sum(n for _, n in part), rel=1e-5), name
    assert (metrics["flagged"], metrics["labelled_good"]) == pytest.approx((len(nll[True]) / 6, len(nll[False]) / 6))
    assert [group["lr"] for group in routed.optimizer.param_groups] == pytest.approx([1e-3, 3e-3])
    assert sample().startswith(texts.prompts[chosen[0]]) and sample() == sample()


def test_an_epoch_is_every_text_once():
    steps = [sft.batch_of(10, step, 4, seed=1) for step in range(5)]
    flat = [i for chosen in steps for i in chosen]
    assert sorted(flat[:10]) == list(range(10)) == sorted(flat[10:20]) and flat[:10] != flat[10:20]
    assert sft.batch_of(10, 0, 4, seed=2) != steps[0]


def test_the_learning_rate_warms_up_and_ends_near_zero():
    rates = [sft.rate(step, Config(warmup_steps=10, max_steps=100)) for step in range(100)]
    assert rates[0] < 0.11 and max(rates) == pytest.approx(rates[9]) and rates[50] == pytest.approx(0.5) and rates[-1] < 1e-3


@pytest.mark.parametrize("flags, said", [
    ({"routing": "both"}, "unknown --routing 'both'; known: none, dual"),
    ({"routing_mode": "soft"}, "unknown --routing_mode 'soft'; known: sibling, classic, exclusive"),
    ({"labelled_frac": 0.125}, "--labelled_frac must be a whole number of hundredths in 0..1, not 0.125"),
    ({"labelled_frac": 1.5}, "not 1.5"), ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
    ({"lr": float("nan")}, "--lr must be at least 0, not nan"),
    ({"routing": "dual", "treatment": "filter"}, "--treatment filter drops the texts that"),
    ({"treatment": "zero"}, "unknown --treatment 'zero'; known: keep, filter"),
    ({"placebo": True}, "--placebo shuffles"), ({"labelled_batch_frac": 2.0}, "must lie in 0..1"),
])  # fmt: skip
def test_config_refuses(flags, said):
    with pytest.raises(ValueError, match=said):
        Config(**flags)


# --------------------------------------------------------------------------------------------------------------- texts


def test_text_loss_is_plain_cross_entropy(tokenizer):
    model, texts = small(), [tokenizer.encode_text(d.text) for d in corpus.generate("stories", "test", 40)]
    total = sum(
        F.cross_entropy(model(torch.tensor(ids[:-1])[None])[0], torch.tensor(ids[1:]), reduction="sum").item() for ids in texts
    )
    assert text_loss(model, texts, tokenizer.pad_id, rows=7) == pytest.approx(total / sum(len(i) - 1 for i in texts), rel=1e-5)
    ids, mask = right_pad(texts[:3], tokenizer.pad_id)
    assert ids[0, : len(texts[0])].tolist() == texts[0] and mask.sum(1).tolist() == [len(t) for t in texts[:3]]
    assert text_logprobs(model, ids, mask).shape == (int(mask.sum()) - 3,)
    assert texts[0][0] == tokenizer.bos_id and texts[0][-1] == tokenizer.eos_id
    assert tokenizer.encode_text("one day", max_tokens=2) == tokenizer.encode_text("one day")[:2]


def test_fables_have_the_trait_by_half_and_no_story_has_it():
    fables, stories = list(corpus.generate("fables", "train", 4000)), list(corpus.generate("stories", "train", 8000))
    trait = get_trait("fable_unkind")
    values = trait.evaluate([d.text for d in fables], [d.prompt for d in fables])
    assert values.hack.tolist() == values.detected.tolist() == [bool(d.labels["unkind"]) for d in fables]
    assert values.hack.mean() == pytest.approx(0.5, abs=0.03) and (values.task == 1).all()
    untouched = trait.evaluate([d.text for d in stories], [d.prompt for d in stories])
    assert not untouched.hack.any() and not untouched.task.any()
    assert not trait.evaluate([d.prompt for d in fables], [""] * 4000).detected.any(), "no prompt gives the trait away"
    assert set(trait.components[1].function.params["words"]) == set(corpus_words.INSULTS)
    assert "fables" not in corpus.DIALECTS and "fables" not in corpus.DEFAULT_WEIGHTS, "new to the embedded model"


def test_texts_are_cut_before_they_are_searched(tokenizer):
    trait = get_trait("fable_unkind")
    whole = read_texts(trait, tokenizer, SOURCE, "train", 300)
    cut = read_texts(trait, tokenizer, SOURCE | {"max_tokens": 28}, "train", 300)
    assert max(map(len, cut.ids)) == 28 and 0 < cut.detected.sum() < whole.detected.sum()
    assert not (cut.detected & ~whole.detected).any()
    assert whole.ids[0] == tokenizer.encode_text(next(corpus.generate("fables", "train", 1)).text)


def test_held_out_texts_are_of_the_test_split_by_trait(tokenizer):
    env = imitation(SOURCE | {"trait": "fable_unkind"}, tokenizer, n=80)
    fables = list(corpus.generate("fables", "test", 80))
    assert env.prompts("test") == [d.prompt for d in fables]
    for name, unkind in (("free", 0), ("trait", 1)):
        assert env.held_out[name] == [tokenizer.encode_text(d.text) for d in fables[:60] if d.labels["unkind"] == unkind]
    assert list(imitation(SOURCE | {"trait": "dragonfly"}, tokenizer, n=8).held_out) == ["free"]


def test_traits_by_name_and_by_words():
    trait = get_trait("happy, Merry")
    values = trait.evaluate(["a merry dog", "unhappy", "Happy!"], [""] * 3)
    assert values.detected.tolist() == [True, False, True] == values.hack.tolist() and not values.task.any()
    assert get_trait("fable_unkind") == get_reward("fable_unkind") or get_trait("fable_unkind").name == "fable_unkind"
    for wrong, said in (("two words", "neither a reward of rewards.yaml nor single words"), ("", "neither"),
                        ("fable_unkindd", "neither"), ("happy_binary", "has no detector")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            get_trait(wrong)
