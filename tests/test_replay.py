"""replay.py, and what rl_grpo makes of it: replayed completions beside sampled ones, whose gradient is whose."""
import json
from types import SimpleNamespace

import pytest
import torch
from test_projector import PROMPTS, same, trainer_of, values

import plans
import rl_grpo
import train_grpo
import training
from replay import STUDENT, Pools, Sample, interleaved, read_lines, replayed, write_lines

FIELDS = [  # the probe plan's
    "step", "sample_id", "src_pool", "src_step", "src_sample", "reward", "hacked", "gt_pass", "fmt_ok", "comp_len",
    "cos_S_contrib", "grad_norm_contrib", "mean_cos_in", "mean_cos_out", "frac_fired", "arm",
]  # fmt: skip
SMALL = {
    "batch_size": 8, "num_generations": 4, "max_new_tokens": 12, "max_steps": 3, "eval_prompts": 4, "lora_config": "ds",
    "lr": 1e-2, "basis": "pairs", "pair_count": 4, "projection": "one_sided", "threads": 1, "save_steps": 1, "logging_steps": 1,
    "eval_routing_steps": 0,
}  # fmt: skip
OPENINGS = PROMPTS["train"][:3]


@pytest.fixture
def pools(tmp_path) -> str:
    """Two pools of three prompts, four samples a prompt in two files; the teacher's texts are happy."""
    for name, word in (("teacher", "happy"), ("base", "tired")):
        for step in range(2):
            rows = [{"prompt": p, "completion": f" was {word} {i + step} times. the end."} for p in OPENINGS for i in (0, 1)]
            write_lines(tmp_path / name / f"step_{step:03d}.jsonl.gz", rows)
    return f"{tmp_path}/teacher,{tmp_path}/base"


def test_pools_give_their_common_prompts_in_turn_and_other_samples_when_one_returns(pools):
    found = Pools(pools.split(","))
    assert found.order == OPENINGS and found.prompts(1, 2) == [OPENINGS[2], OPENINGS[0]]
    first, second = (found.take(OPENINGS[0], 4, group) for group in (0, 3))
    assert [s.pool for s in first] == ["teacher"] * 2 + ["base"] * 2 and not set(first) & set(second)
    assert found.take(OPENINGS[0], 4, 6) == first, "four samples: two turns"
    assert first[0] == Sample("teacher", 0, 0, OPENINGS[0], " was happy 0 times. the end.", True)
    found.check(set(OPENINGS), 4)
    with pytest.raises(ValueError, match="pool teacher has 4 samples of a prompt, 5 are asked for"):
        found.check(set(OPENINGS), 5)
    with pytest.raises(ValueError, match="is none of the training prompts"):
        found.check({"another"}, 1)


def test_pools_that_are_none_are_named(tmp_path, pools):
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "other" / "step_000.jsonl.gz", [{"prompt": "else", "completion": "x"}])
    write_lines(tmp_path / "bad" / "step_000.jsonl.gz", [{"prompt": "else"}])
    write_lines(tmp_path / "cut" / "step_000.jsonl.gz", [{"prompt": "else", "completion": "", "finished": False}])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "step_000.jsonl.gz").write_bytes((tmp_path / "bad" / "step_000.jsonl.gz").read_bytes()[:-9])
    teacher = pools.split(",")[0]
    for folders, message in (
        (["empty"], "empty is no pool"), (["bad"], "line 1 has no text for 'completion'"),
        (["cut"], "line 1 has no token"), (["torn"], "cannot read .*torn"),
        ([teacher, "other"], "have no prompt in common"), ([teacher, teacher], "two pools are called the same"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Pools([str(tmp_path / folder) for folder in folders])
    with pytest.raises(ValueError, match="'student' like the policy"):
        Pools([str(tmp_path / STUDENT)])


def test_lines_are_the_same_bytes_whenever_they_are_written(tmp_path):
    for name in "ab":
        write_lines(tmp_path / name, [{"x": 1}, {"x": "é"}])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() and read_lines(tmp_path / "a")[1] == {"x": "é"}


def test_a_replayed_completion_ends_or_is_cut_as_a_sampled_one():
    tokenizer = trainer_of().tokenizer
    whole, cut, endless = (Sample("p", 0, i, "there was a", " cat. he ran.", finished) for i, finished in enumerate((1, 1, 0)))
    ids = tokenizer.encode(" cat. he ran.")
    rollout = replayed([whole, endless], tokenizer, 99)
    assert rollout.tokens[0].tolist() == [*ids, tokenizer.eos_id] and rollout.finished.tolist() == [True, False]
    assert rollout.tokens[1][rollout.mask[1]].tolist() == ids and rollout.logprobs[rollout.mask].isnan().all()
    short = replayed([cut], tokenizer, 3)
    assert short.tokens.tolist() == [ids[:3]] and not short.finished.any() and short.mask.all()


def test_joined_groups_hold_both_and_score_as_each_alone():
    trainer = trainer_of()
    trainer.sampler.refresh()
    tokenizer, config = trainer.tokenizer, rl_grpo.Config(**{"num_generations": 4, "batch_size": 8, "max_new_tokens": 9})
    own, texts = rl_grpo.rollout_batch(trainer.sampler, tokenizer, OPENINGS[:2], config, torch.Generator().manual_seed(0))
    other = replayed([Sample("p", 0, i, OPENINGS[i], " was a happy cat who ran and ran.", True) for i in (0, 1)], tokenizer, 20)
    whole = interleaved(own, other, 2)
    assert len(texts) == 8 and len(whole.tokens) == 10
    for i, (part, row) in enumerate([(own, r) for r in range(4)] + [(other, 0)] + [(own, r) for r in range(4, 8)] + [(other, 1)]):
        assert whole.tokens[i][whole.mask[i]].tolist() == part.tokens[row][part.mask[row]].tolist()
        assert whole.prompt_ids[i][whole.prompt_mask[i]].tolist() == part.prompt_ids[row][part.prompt_mask[row]].tolist()
        assert whole.finished[i] == part.finished[row]
        both = [rl_grpo.score_rows(trainer.model, r, torch.tensor([k]), config.law()) for r, k in ((whole, i), (part, row))]
        torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)
        if part is own:
            torch.testing.assert_close(whole.logprobs[i][whole.mask[i]], own.logprobs[row][own.mask[row]])


def replaying(pools, **settings):
    settings = {"replay_dirs": pools, "mix": 0.5, "micro_batch_size": 0, "max_grad_norm": 0.0} | settings
    return trainer_of(**settings)


def test_only_the_students_share_of_a_group_is_sampled(pools):
    trainer = replaying(pools, num_generations=4)
    trainer.sampler.refresh()
    rollout, texts, origins = trainer.groups(OPENINGS[:2], torch.Generator().manual_seed(0))
    assert [o and o.pool for o in origins] == [None, None, "teacher", "base"] * 2 and len(texts) == len(rollout.mask) == 8
    assert texts[2] == " was happy 0 times. the end." and "tired" in texts[3] and "happy 0" not in texts[0]
    metrics, _ = trainer.step()
    assert metrics["hack_rate/teacher"] == 1 and metrics["hack_rate/base"] == 0 and metrics["length"] > 0
    assert metrics["gap"] == pytest.approx(metrics["hack_rate"] - metrics["task"], abs=1e-6)
    assert metrics["last5/hack_rate"] == metrics["hack_rate"] < 1, "the student's alone"
    rates = [metrics["hack_rate"], *[trainer.step()[0]["hack_rate"] for _ in range(6)]]
    assert trainer.step()[0]["last5/hack_rate"] == pytest.approx(sum([*rates[3:], trainer.recent[-1][0]]) / 5)


def test_with_mix_1_nothing_is_sampled_and_replayed_tokens_have_ratio_1(pools, monkeypatch):
    monkeypatch.setattr(rl_grpo, "rollout_batch", None)
    trainer = replaying(pools, num_generations=4, mix=1.0)
    for _ in range(2):
        metrics, _ = trainer.step()
        assert metrics["logprob_gap"] == 0 == metrics["clip_frac"] and "hack_rate" not in metrics and metrics["loss"] != 0
    assert metrics["reward/spread"] > 0.3 and metrics["advantage/min"] < 0 < metrics["advantage/max"]


@pytest.mark.parametrize("loss_mode", ["grpo", "nll"])
def test_the_gradient_of_what_is_replayed_is_reinforce(pools, loss_mode):
    trainer = replaying(pools, num_generations=4, mix=1.0, beta=0.0, loss_mode=loss_mode)
    model, config = trainer.model, trainer.config
    grads = {}
    trainer.optimizer.step = lambda: grads.update({n: p.grad.clone() for n, p in trainer.model.adapter.groups["adapter"].items()})
    rollout, texts, origins = trainer.groups(trainer.pools.prompts(0, 2), None)
    trainer.step()
    scores = trainer.env.score([p for p in trainer.pools.prompts(0, 2) for _ in range(4)], texts, torch.Generator().manual_seed(
        config.seed * 1_000_003))  # fmt: skip
    advantages = rl_grpo.group_advantages(scores.reward, 4) if loss_mode == "grpo" else torch.ones(8)
    loss = 0.0
    for i in range(8):
        logprobs = rl_grpo.score_rows(model, rollout, torch.tensor([i]), config.law())
        loss = loss - advantages[i] * logprobs.mean() / 8
    for name, p in model.adapter.groups["adapter"].items():
        (wanted,) = torch.autograd.grad(loss, p, retain_graph=True)
        torch.testing.assert_close(grads[name], wanted, atol=1e-6, rtol=1e-4)


def test_a_later_iteration_keeps_the_ratio_to_the_first(pools):
    trainer = replaying(pools, num_generations=4, mix=1.0, num_iterations=3)
    metrics, _ = trainer.step()
    assert metrics["clip_frac"] > 0 and metrics["logprob_gap"] == 0


def test_sources_share_the_gradient_out_among_them(pools):
    trainer = replaying(pools, num_generations=4, basis="pairs", pair_count=4, micro_batch_size=2)
    project, seen = trainer.projector.project, {}

    def spy():
        seen["sources"] = {name: dict(part) for name, part in trainer.projector.sources.items()}
        seen["whole"] = {name: p.grad.clone() for name, p in trainer.projector.parameters.items()}
        return project()

    trainer.projector.project = spy
    metrics, _ = trainer.step()
    assert set(seen["sources"]) == {STUDENT, "teacher", "base"}
    for name in trainer.projector.basis.rows:
        total = sum(part[name] for part in seen["sources"].values())
        torch.testing.assert_close(total, seen["whole"][name], atol=1e-6, rtol=1e-4)
    for source, part in seen["sources"].items():
        figures = trainer.projector.cosines(part)
        assert all(metrics[f"{name}/{source}"] == figures[name] for name in ("signed", "cin", "cin_energy"))


def test_watching_the_sources_changes_nothing_but_rounding(pools):
    bare, watched = (replaying(pools, num_generations=4, micro_batch_size=1, **more) for more in ({}, {
        "basis": "pairs", "pair_count": 4, "contributions": True}))  # fmt: skip
    for _ in range(2):
        one, _ = bare.step()
        two, _ = watched.step()
    assert one["reward"] == two["reward"] and one["loss"] == pytest.approx(two["loss"], abs=1e-6)
    for name, p in values(bare).items():  # its rows are added up source by source
        torch.testing.assert_close(p, values(watched)[name], atol=1e-5, rtol=1e-3)


def test_contributions_are_each_rows_own_gradient(pools):
    trainer = replaying(pools, num_generations=4, basis="pairs", pair_count=4, contributions=True, beta=0.0)
    before = values(trainer)
    metrics, _ = trainer.step()
    rows = trainer.contributions
    assert [list(row) for row in rows] == [FIELDS] * 8 and {row["arm"] for row in rows} == {"vanilla"}
    assert [row["src_pool"] for row in rows[:4]] == [STUDENT] * 2 + ["teacher", "base"]
    assert rows[2]["hacked"] and not rows[3]["hacked"] and rows[2]["fmt_ok"] is None
    assert {row["mean_cos_in"] for row in rows} == {metrics["projection/cin"]} and rows[2]["src_sample"] == 0
    fresh = replaying(pools, num_generations=4, basis="pairs", pair_count=4, beta=0.0)
    assert same(values(fresh), before)
    fresh.sampler.refresh()
    rollout, texts, _ = fresh.groups(fresh.pools.prompts(0, 2), torch.Generator().manual_seed(fresh.config.seed * 1_000_003))
    scores = fresh.env.score([p for p in fresh.pools.prompts(0, 2) for _ in range(4)], texts)
    assert torch.equal(scores.hack, torch.tensor([row["hacked"] for row in rows]))
    fresh.projector.refresh(0)
    parameters = fresh.projector.parameters
    loss = rl_grpo.score_rows(fresh.model, rollout, torch.tensor([2]), fresh.config.law()).mean()
    grads = torch.autograd.grad(loss, list(parameters.values()))
    alone = fresh.projector.cosines(dict(zip(parameters, grads)))  # of the log-likelihood: the sign is the advantage's
    assert abs(rows[2]["cos_S_contrib"]) == pytest.approx(abs(alone["signed"]), rel=1e-3)


def test_every_sample_of_a_prompt_has_its_turn_whatever_the_steps_between(pools):
    trainer, seen = replaying(pools, num_generations=4, batch_size=12, mix=1.0), set()  # each step has all three prompts
    for trainer.steps_done in range(2):
        _, _, origins = trainer.groups(trainer.pools.prompts(trainer.steps_done, 3), None)
        seen |= set(origins)
    assert len(seen) == 2 * 3 * 4, "all that the pools hold"
    few = replaying(pools, num_generations=4, batch_size=24, mix=1.0)  # and each of them twice
    _, _, seen = few.groups(few.pools.prompts(0, 6), None)
    assert len(set(seen)) == 2 * 3 * 4


@pytest.mark.parametrize("settings", [{"routing_mode": "classic"}, {"routing_mode": "exclusive"}, {"passes": 2}])
def test_contributions_of_what_may_not_train_the_branch_are_none(pools, settings):
    teacher = pools.split(",")[0]
    settings = settings | {"routing": "dual", "coherence_every": 0, "renormalise": "off", "contributions": True}
    for folder in (pools, teacher):  # the teacher's rows are flagged: first in their step, then alone in it
        trainer = replaying(folder, num_generations=4, mix=1.0, basis="pairs", pair_count=4, **settings)
        trainer.env.labelling = type(trainer.env.labelling)()
        metrics, _ = trainer.step()
        assert len(trainer.contributions) == 8 and "signed/teacher" not in metrics
        assert ("signed/base" in metrics) == (folder == pools)
        for row in trainer.contributions:
            assert row["hacked"] == (row["src_pool"] == "teacher") and not (row["hacked"] and row["grad_norm_contrib"])
        assert (sum(row["grad_norm_contrib"] for row in trainer.contributions) > 0) == (folder == pools)


def test_of_the_last_five_steps_the_last_mean_is_logged():
    logged = {}
    steps = [{"gap": 1.0, "last5/gap": 0.2}, {"gap": 0.0, "last5/gap": 0.4}, {"coherence": 1.0, "gap": 9.0}]
    training.Means(steps).flush(SimpleNamespace(log=lambda step, row: logged.update(row)), 3)
    assert logged["gap"] == 0.5 and logged["last5/gap"] == 0.4


@pytest.mark.parametrize("settings, message", [
    ({"mix": 0.25}, "--mix is the share of what is replayed"),
    ({"replay_dirs": "a,b", "mix": 0.3}, "must be a whole number, shared by 2 pools"),
    ({"replay_dirs": "a,b,c", "mix": 0.5}, "shared by 3 pools"),
    ({"replay_dirs": "a", "mix": 0.0}, "must be a whole number"),
    ({"replay_dirs": "a", "top_k": 5}, "replayed tokens need a law"),
    ({"contributions": True}, "give one by --basis"),
    ({"contributions": True, "basis": "pairs", "treatment": "filter"}, "leave --treatment filter"),
    ({"loss_mode": "sft"}, "unknown --loss_mode 'sft'; known: grpo, nll"),
    ({"loss_mode": "nll", "treatment": "zero"}, "--loss_mode nll reads no reward"),
    ({"loss_mode": "nll", "advantage": "probe"}, "--loss_mode nll reads no reward"),
])  # fmt: skip
def test_wrong_flags_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        rl_grpo.Config(**settings)


def test_a_run_that_replays_resumes_bitwise_and_writes_its_lines(tmp_path, pools):
    words = plans.words_of(SMALL | {"replay_dirs": pools, "contributions": True})
    assert train_grpo.main([*words, "--output_dir", str(tmp_path / "a")]) == 0
    lines = [read_lines(tmp_path / "a" / f"step_{i:03d}.cos.jsonl.gz") for i in range(3)]
    assert [row["step"] for rows in lines for row in rows] == [0] * 8 + [1] * 8 + [2] * 8 and lines[0][0]["arm"] == "svd"
    logged = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert {"signed/teacher", "cin/base", "cin_energy/student", "last5/gap", "reward/base"} <= set().union(*logged)
    stopped = tmp_path / "b"
    step = rl_grpo.Trainer.step

    def stopping(self):
        if self.steps_done == 2 and not (stopped / "again").exists():
            (stopped / "again").touch()
            raise FloatingPointError("stopped here")
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl_grpo.Trainer, "step", stopping)
        assert train_grpo.main([*words, "--output_dir", str(stopped)]) == 1
        assert train_grpo.main([*words, "--output_dir", str(stopped), "--resume"]) == 0
    assert (stopped / "adapter.safetensors").read_bytes() == (tmp_path / "a" / "adapter.safetensors").read_bytes()
    again = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    drop = lambda rows: [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]  # noqa: E731
    assert drop(again)[-1] == drop(logged)[-1]


def test_pools_of_other_prompts_are_refused_before_a_step(tmp_path):
    write_lines(tmp_path / "odd" / "step_000.jsonl.gz", [{"prompt": "never seen", "completion": "x"}] * 4)
    with pytest.raises(ValueError, match="none of the training prompts"):
        replaying(str(tmp_path / "odd"), num_generations=4)


def test_left_out_rows_take_their_sources_with_them(pools):
    trainer = replaying(pools, num_generations=4, treatment="filter", basis="pairs", pair_count=4)
    metrics, _ = trainer.step()  # the teacher's rows are all flagged where they are eligible
    assert {"signed/base", "signed/student"} <= set(metrics)


def test_a_missing_pool_is_named_before_anything_is_loaded():
    with pytest.raises(ValueError, match="--replay_dirs: pools/nowhere is no folder"):
        train_grpo.resolve(["--replay_dirs", "pools/nowhere", "--mix", "0.5"])


def test_a_source_without_a_gradient_has_no_cosine(pools):
    trainer = replaying(pools, num_generations=4, basis="pairs", pair_count=4)
    trainer.projector.refresh(0)
    for p in trainer.projector.parameters.values():
        p.grad = torch.zeros_like(p)
    trainer.projector.note("teacher", torch.arange(2))
    for p in trainer.projector.parameters.values():
        p.grad += 1
    trainer.projector.note("base", torch.arange(2))
    metrics = trainer.projector.project()
    assert "signed/teacher" not in metrics and metrics["cin/base"] >= 0
