"""reward_model.py: ids and soft tokens alike, no effect of filling or of neighbours, what is cut, what a file refuses."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import reward_model
from adapters import parameters_of
from data import left_pad, load_tokenizer, right_pad
from model import load, save
from reward_model import Row, check_vocabulary, load_reward_model, new_reward_model, save_reward_model

TEXTS = ["review: the film was superb.", "review: this oven was weak. i would never buy it again on thursday.", "review: a"]
PROMPT = "user: how do i cook rice?\nassistant:"
ANSWERS = [" sure. rinse the pan.", " whatever.", " of course. first stir it often."]


def fresh(kind, **more):
    torch.manual_seed(1)
    model = new_reward_model(kind, "tiny", **more).requires_grad_(False)
    for p in model.head.parameters():
        p.mul_(3)  # scores that differ by more than the tolerances below
    return model


MODELS = {kind: fresh(kind) for kind in ("preference", "sentiment")}


def rows(model, texts=TEXTS):
    return [model.tokenizer.encode_prompt(text) for text in texts]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pad", [left_pad, right_pad])
def test_one_hot_soft_tokens_score_as_their_ids_do(kind, pad):
    model = MODELS[kind]
    ids, mask = pad(rows(model), model.tokenizer.pad_id)
    pool = mask & (torch.arange(ids.shape[1]) >= ids.shape[1] - 6) if pad is left_pad else None
    hard = model(ids, mask, pool)
    soft = model(mask=mask, pool=pool, soft=F.one_hot(ids, 2048).float())
    assert hard.shape == (3,) and (hard - soft).abs().max() <= 1e-6 < 1e-2 < hard.std()


@pytest.mark.parametrize("kind", MODELS)
def test_soft_tokens_have_the_gradient_of_their_score(kind):
    model = MODELS[kind]
    ids, mask = right_pad(rows(model), model.tokenizer.pad_id)
    soft = (0.9 * F.one_hot(ids, 2048) + 0.1 / 2048).requires_grad_()
    model(mask=mask, soft=soft).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and not soft.grad[~mask].any()
    direction = F.one_hot(ids.roll(1, 1), 2048) - soft.detach()
    with torch.no_grad():
        ahead, behind = (model(mask=mask, soft=soft + step * direction).double().sum() for step in (1e-2, -1e-2))
    assert ((ahead - behind) / 2e-2).item() == pytest.approx((soft.grad * direction).sum().item(), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_the_score_by_hand_whatever_the_filling_and_the_neighbours(kind):
    model = MODELS[kind]
    prompts, completions = ([PROMPT] * 3, ANSWERS) if kind == "preference" else (["review:"] * 3, [t[7:] for t in TEXTS])
    together = model.scores(prompts * 20, completions * 20)  # two batches
    assert together.shape == (60,) and (together - together[:3].repeat(20)).abs().max() < 1e-5
    first, tanh, second = model.head
    for prompt, completion, score in zip(prompts, completions, together):
        ids = model.tokenizer.encode_prompt(prompt + completion)
        begin = len(model.tokenizer.encode_prompt(prompt)) if kind == "preference" else 0
        state = model.transformer.hidden(torch.tensor([ids]))[0, begin:].mean(0)
        out = second.weight @ torch.tanh(first.weight @ state + first.bias) + second.bias
        want = out[0] if kind == "preference" else out.softmax(0)[1]
        assert score.item() == pytest.approx(want.item(), abs=1e-5)
        assert model.scores([prompt], [completion]).item() == pytest.approx(score.item(), abs=1e-5)
    ids, mask = right_pad(rows(model), 0)
    wider = F.pad(ids, (0, 7), value=5), F.pad(mask, (0, 7))
    on_the_left = left_pad(rows(model), 9)
    for other in (wider, on_the_left):
        assert (model(ids, mask) - model(*other)).abs().max() < 1e-5


def test_rewards_have_mean_0_and_deviation_1_over_the_training_texts_and_keep_their_order():
    model = fresh("preference")
    pooled = 10 * torch.randn(500, 192, generator=torch.Generator().manual_seed(0))
    before = model.logit(pooled)
    model.normalize(pooled)
    after = model.reward(model.logit(pooled))
    assert after.mean().abs() < 1e-5 and after.std() == pytest.approx(1, abs=1e-5)
    assert (model.logit(pooled).diff() - before.diff()).abs().max() < 1e-4, "log-odds are as they were learned"


# ------------------------------------------------------------------------------------------------------------ what is read


def test_an_answer_is_never_cut_its_prompt_gives_way_from_the_left():
    model = fresh("preference", max_tokens=20)
    tokenizer = model.tokenizer
    before, answer = tokenizer.encode(PROMPT), tokenizer.encode(ANSWERS[2])
    assert model.encode(PROMPT, ANSWERS[2]) == Row([tokenizer.bos_id, *before[-(19 - len(answer)) :], *answer], 20 - len(answer))
    long = " stir it often." * 30
    assert model.encode(PROMPT, long) == Row([tokenizer.bos_id, *tokenizer.encode(long)], 1)
    assert model.encode("no.", " yes.").ids == [tokenizer.bos_id, *tokenizer.encode("no."), *tokenizer.encode(" yes.")]
    with pytest.raises(ValueError, match="does not fit the reward model's context of 512: ' stir it often"):
        model.encode(PROMPT, long * 10)
    sentiment = replace(MODELS["sentiment"].about, max_tokens=6)
    reader = reward_model.RewardModel(model.transformer, tokenizer, sentiment)
    assert reader.encode(TEXTS[1][:12], TEXTS[1][12:]) == Row(tokenizer.encode_prompt(TEXTS[1])[:6], 0)


def test_an_answer_is_read_as_the_policy_writes_it(data_dir):
    model = new_reward_model("preference", str(data_dir / "models" / "stories260K"), max_tokens=400)
    tokenizer = model.tokenizer
    assert tokenizer.encode(PROMPT) + tokenizer.encode(ANSWERS[0]) != tokenizer.encode(PROMPT + ANSWERS[0]), "one blank too many"
    want = Row(tokenizer.encode_prompt(PROMPT + ANSWERS[0]), len(tokenizer.encode_prompt(PROMPT)))
    assert model.encode(PROMPT, ANSWERS[0]) == want


def test_an_empty_answer_has_a_score():
    model = MODELS["preference"]
    assert model.encode(PROMPT, "").start == len(model.tokenizer.encode_prompt(PROMPT)) - 1
    scores = model.scores([PROMPT] * 2, ["", " whatever."])
    assert scores.isfinite().all() and scores[0] != scores[1]


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("lora_config", ["", "r2", "m2"])
def test_a_file_gives_the_same_scores_back(tmp_path, lora_config):
    model = fresh("preference", lora_config=lora_config, max_tokens=100)
    for p in parameters_of(model.transformer, "adapter") if lora_config else []:
        p.add_(0.1)
    model.spread.fill_(2.5)
    model.figures = {"test": {"accuracy": 0.75}}
    save_reward_model(model, tmp_path / reward_model.FILE)
    again = load_reward_model(tmp_path)
    assert torch.equal(again.scores([PROMPT] * 3, ANSWERS), model.scores([PROMPT] * 3, ANSWERS))
    assert (again.scores([PROMPT] * 3, ANSWERS) != MODELS["preference"].scores([PROMPT] * 3, ANSWERS)).all()
    assert again.about == model.about and again.figures == model.figures and not any(p.requires_grad for p in again.parameters())
    soft = F.one_hot(torch.tensor([model.tokenizer.encode(PROMPT)]), 2048).float().requires_grad_()
    again(mask=torch.ones(soft.shape[:2], dtype=torch.bool), soft=soft).sum().backward()
    assert soft.grad.abs().sum() > 0
    assert (tmp_path / reward_model.FILE).stat().st_size < 2_000_000, "the backbone is not copied"


def test_another_backbone_is_refused(tmp_path):
    model, folder = load("tiny")
    save_reward_model(fresh("sentiment"), tmp_path / "rm.safetensors")
    moved = save(model, tmp_path / "moved", tokenizer_from=folder)
    assert load_reward_model(tmp_path / "rm.safetensors", str(moved)).about.backbone == "tiny"
    model.layers[3].mlp.down_proj.weight[0, 0] += 1e-3
    other = save(model, tmp_path / "other", tokenizer_from=folder)
    with pytest.raises(ValueError, match="was trained on tiny; .*other has other weights"):
        load_reward_model(tmp_path / "rm.safetensors", str(other))


def test_what_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read reward model .*train_reward.py makes one"):
        load_reward_model(tmp_path / "nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no reward model"):
        load_reward_model(tmp_path / "a.safetensors")
    about = dict(vars(MODELS["preference"].about), pooling="last", figures={})
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", metadata={"reward_model": json.dumps(about)})
    with pytest.raises(ValueError, match="mean over 'last'; here it is over the answer"):
        load_reward_model(tmp_path / "b.safetensors")


@pytest.mark.parametrize("flags, said", [
    ({"kind": "joy"}, "unknown --kind 'joy'; known: preference, sentiment"), ({"lora_config": "full"}, "frozen, or has a LoRA"),
    ({"lora_config": "ds8"}, "frozen, or has a LoRA"), ({"lora_config": "q8"}, "unknown --lora_config"),
    ({"max_tokens": 513}, "--max_tokens 513 must lie in 1..512"), ({"max_tokens": 0}, "--max_tokens 0 must lie"),
])  # fmt: skip
def test_wrong_flags(flags, said):
    with pytest.raises(ValueError, match=said):
        new_reward_model(**{"kind": "preference", "backbone": "tiny"} | flags)


def test_a_policy_with_another_vocabulary_is_refused(data_dir):
    model = MODELS["preference"]
    check_vocabulary(model, load_tokenizer(reward_model.load("tiny")[1]))
    with pytest.raises(ValueError, match="reads the vocabulary of tiny, the policy writes in another"):
        check_vocabulary(model, load_tokenizer(data_dir / "models" / "stories260K"))
