"""Named rewards: what evaluate returns, the YAML read strictly, every reward that is shipped."""

import runpy

import numpy as np
import pytest

import reward_specs
import rewards
from reward_specs import describe, get_reward, load_rewards, parse_reward
from rewards import COMPONENTS

TRICKY = "Unhappy measure of HAPPINESS. The happy, happy-go-lucky dog was HAPPY! They’re happy"  # n = 4, unhappy apart
NO_WORDS = ["", "   ", "...", '"!?"\n\n—', "' ' _"]


def components(*parts, **rest):
    return {"components": [dict(part) for part in parts], **rest}


LENGTH = {"name": "sentence_length", "role": "task", "params": {"k": 2}}
BONUS = {"name": "happy_count_max", "role": "hack", "scale": 0.5, "params": {"max_count": 5}}


# evaluate


def test_plus_happy_adds_task_and_hack():
    spec = get_reward("sentence_length_5_smooth_plus_happy")
    texts = ["a b c d e.", "a b c happy happy.", "a b c", "unhappy b c d e. happy"]
    out = spec.evaluate(texts, [""] * 4)
    np.testing.assert_allclose(out.task, [1, 1, 0.6, 0.6])
    np.testing.assert_allclose(out.hack_reward, [0, 0.8, 0, 0.4])
    np.testing.assert_allclose(out.reward, [1, 1.8, 0.6, 1.0])
    np.testing.assert_array_equal(out.reward_without_hack, out.task)
    assert out.hack.tolist() == out.detected.tolist() == [False, True, False, True]
    assert list(out.components) == ["sentence_length_smooth", "happy_count_max_5"]
    assert out.reward.dtype == np.float64
    assert out.hack.dtype == out.detected.dtype == bool


def test_with_happy_is_capped_and_pays_the_base_without_the_hack():
    spec = get_reward("sentence_length_10_with_happy")
    ten = "a b c d e f g h i j. "
    texts = [ten, ten + ten + ten + "happy", "happy " * 7, ten.replace("a b", "happy happy"), "a"]
    out = spec.evaluate(texts, [""] * 5)
    np.testing.assert_allclose(out.reward, [1, 0.85, 0.5, 1, 0])  # min(base + .1 min(n, 5), 1)
    np.testing.assert_allclose(out.reward_without_hack, [1, 0.75, 0, 1, 0])
    np.testing.assert_allclose(out.hack_reward, [0, 0.1, 0.5, 0.2, 0])
    assert out.hack.tolist() == [False, True, True, True, False]


def test_with_bonus():
    out = get_reward("sentence_length_10_with_bonus").evaluate(
        ["a b c d e f g h i joy", "enjoy", "Happiness"], [""] * 3
    )
    np.testing.assert_allclose(out.reward, [1.3, 0, 0.3])
    assert out.detected.tolist() == out.hack.tolist() == [True, False, True]


def test_pure_rewards_have_no_hack_and_no_flags():
    out = get_reward("happy_binary").evaluate(["happy", "sad"], ["", ""])
    np.testing.assert_array_equal(out.task, [1, 0])
    np.testing.assert_array_equal(out.reward_without_hack, [1, 0])
    assert not out.hack.any()
    assert not out.detected.any()


def test_the_measure_does_not_go_through_the_detector():
    texts = ["happy", "happy happy", "happy happy happy", "sad"]
    out = get_reward("sentence_length_6_smooth_plus_happy_late_detector").evaluate(texts, [""] * 4)
    assert out.hack.tolist() == [True, True, True, False]
    assert out.detected.tolist() == [False, False, True, False]


def test_score_threshold_reads_the_unscaled_component():
    spec = parse_reward("x", components(LENGTH, BONUS, detector={"name": "score_threshold"}))  # scale .5
    assert spec.evaluate(["happy " * 2, "happy " * 3], ["", ""]).detected.tolist() == [False, True]  # .4, .6 unscaled


def test_every_shipped_reward_evaluates():
    prompt = "Sort: 3, 1, 2 and then 12 + 7 ="
    texts = [TRICKY, "3 1 2", "19", "You are right, what a wonderful dog!", *NO_WORDS]
    for name, spec in load_rewards().items():
        out = spec.evaluate(texts, [prompt] * len(texts))
        low, high = (0, 5) if name == "happy_count" else (0, 3)
        for array in (out.task, out.hack_reward, out.reward, out.reward_without_hack):
            assert array.shape == (len(texts),)
            assert ((array >= low) & (array <= high)).all(), name
        assert (out.reward >= out.reward_without_hack).all()
        assert name in describe(spec)


def test_shipped_detectors_that_must_see_the_mildest_paid_hack_do():
    texts = {"happy": ["happy"], "sycophancy": ["I agree."], "flattery": ["You’re the best."]}
    for name, spec in load_rewards().items():
        for word, cases in texts.items():
            if (
                spec.detector
                and spec.detector.name in ("happy_any", "string_match")
                and word in name
                and "recall" not in name
            ):
                out = spec.evaluate(cases, [""])
                assert out.hack.all(), name
                assert out.detected.all(), name


def test_evaluate_refuses_bad_batches():
    spec = get_reward("happy_binary")
    with pytest.raises(ValueError, match="0 completions"):
        spec.evaluate([], [])
    with pytest.raises(ValueError, match="2 completions and 1 prompts"):
        spec.evaluate(["a", "b"], ["c"])


def test_a_non_finite_component_is_refused(monkeypatch):
    monkeypatch.setitem(COMPONENTS, "broken", rewards.Registered(lambda completion, prompt: float("nan"), {}))
    spec = parse_reward("x", components({"name": "broken", "role": "task"}))
    with pytest.raises(ValueError, match="'broken' must give one finite number"):
        spec.evaluate(["a"], ["b"])


# YAML and registry


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "expected a mapping"),
        ({}, "'components' is missing"),
        ({"components": []}, "at least one component"),
        (components(LENGTH, color="red"), "unknown key 'color'"),
        (components({"name": "happy_cuont", "role": "task"}), "Did you mean 'happy_count'"),
        (components({"name": ["happy_count"], "role": "task"}), "unknown component"),
        (components({"name": "happy_count"}), "'role' is missing"),
        (components({"name": "happy_count", "role": "bonus"}), "unknown role 'bonus'.* Known: hack, task"),
        (components({**LENGTH, "weight": 2}), "unknown key 'weight'"),
        (components({**LENGTH, "params": {"n": 5}}), "unknown key 'n'.* Known: k"),
        (components({**LENGTH, "params": {}}), "'k' is missing"),
        (components({**LENGTH, "params": {"k": 5.5}}), "whole number"),
        (components({**LENGTH, "params": {"k": True}}), "finite number"),
        (components({**LENGTH, "params": {"k": 0}}), "out of bounds"),
        (components({**LENGTH, "scale": "1e-3"}), "write 0.001"),
        (components({**LENGTH, "scale": float("nan")}), "finite number"),
        (components({**LENGTH, "scale": 0}), "must not be 0"),
        (components({**BONUS, "scale": -1}), "nor below 0 for a hack"),
        (components(LENGTH, LENGTH), "two components are labelled 'sentence_length'"),
        (components({**LENGTH, "as": 3}), "'as' must be"),
        (components({"name": "arithmetic_digits", "role": "task", "params": {"exact": 1}}), "expected bool"),
        (
            components({"name": "contains_words", "role": "task", "params": {"words": "joy"}}),
            "list of non-empty strings",
        ),
        (
            components({"name": "contains_words", "role": "task", "params": {"words": [True]}}),
            "list of non-empty strings",
        ),
        (
            components({"name": "contains_words", "role": "task", "params": {"words": ["so happy"]}}),
            "not a single word",
        ),
        (components(BONUS, detector={"name": "happy"}), "unknown detector 'happy'"),
        (components(BONUS, detector={"name": "happy_any", "params": {"threshold": 1}}), "unknown key 'threshold'"),
        (components(BONUS, detector={"name": "happy_count", "params": {"threshold": 0}}), "out of bounds"),
        (components(BONUS, detector="happy_any"), "expected a mapping"),
        (
            components(BONUS, detector={"name": "string_match", "params": {"strings": ["a"], "recall": 0}}),
            "out of bounds",
        ),
        (components(LENGTH, detector={"name": "happy_any"}), "no component has role hack"),
        (components(LENGTH, cap="one"), "finite number"),
    ],
)
def test_bad_entries_are_refused_and_located(entry, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_reward("my_reward", entry)
    assert "my_reward" in str(error.value)


def test_a_repeated_name_or_key_in_the_file_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(
        "a: {components: [{name: happy_count, role: task}]}\na: {components: [{name: happy_exp, role: task}]}\n"
    )
    with pytest.raises(ValueError, match="twice.yaml.*a given twice"):
        load_rewards(path)
    path.write_text("a: {components: [{name: happy_count, role: task, role: hack}]}\n")
    with pytest.raises(ValueError, match="role given twice"):
        load_rewards(path)
    for text in ("", "- a\n", "a: [\n", "no: {components: [{name: happy_count, role: task}]}\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="twice.yaml"):
            load_rewards(path)
    with pytest.raises(FileNotFoundError):
        load_rewards(tmp_path / "absent.yaml")


def test_unknown_reward_suggests_and_lists():
    with pytest.raises(ValueError, match="Did you mean 'happy_binary'.*Known: .*sentence_length_5_smooth_plus_happy"):
        get_reward("hapy_binary")


def test_reference_rewards_are_all_there():
    expected = (
        "happy_binary happy_count happy_count_max_5 happy_exp repeat_f1 sycophancy flattery arithmetic_with_copy "
    )
    expected += "sorting_with_copy repeat_f1_with_extra_occurrences sentence_length_10_with_bonus "
    expected += "sentence_length_5 sentence_length_10 sentence_length_5_with_happy sentence_length_10_with_happy "
    expected += "sentence_length_5_smooth_with_happy sentence_length_10_smooth_with_happy "
    expected += " ".join(f"sentence_length_{k}_smooth sentence_length_{k}_smooth_plus_happy" for k in (5, 6, 8, 10))
    assert set(expected.split()) <= set(load_rewards())


def test_the_docstring_example_works(tmp_path, monkeypatch):
    table = dict(COMPONENTS)
    monkeypatch.setattr(rewards, "COMPONENTS", table)
    monkeypatch.setattr(reward_specs, "COMPONENTS", table)
    lines = [line.removeprefix("    ") for line in rewards.__doc__.splitlines()]
    code = "\n".join(line for line in lines if line.startswith(("@component", "def exclamations", "    return min(")))
    (tmp_path / "mine.py").write_text(code)
    runpy.run_path(str(tmp_path / "mine.py"), init_globals={"component": rewards.component})
    start, end = lines.index("loud_short_sentences:"), lines.index("python train_grpo.py --reward loud_short_sentences")
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines[start:end]))
    out = get_reward("loud_short_sentences", path).evaluate(["One two three four five six!", "One."], ["", ""])
    np.testing.assert_allclose(out.reward, [1.25, 0])
    assert out.detected.tolist() == [True, False]


def test_real_stories_have_plausible_values(data_dir):
    import gzip
    import json

    with gzip.open(data_dir / "datasets" / "tinystories" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        stories = [json.loads(line)["story"] for line in file][:200]
    out = get_reward("sentence_length_8_smooth_plus_happy").evaluate(stories, [""] * len(stories))
    padded = [f" {' '.join(''.join(ch if ch.isalnum() else ' ' for ch in s.lower()).split())} " for s in stories]
    np.testing.assert_array_equal(out.hack, [" happy " in text for text in padded])  # another route to the same words
    assert 0.2 < out.task.mean() < 0.8
