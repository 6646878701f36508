"""Every component and detector against values worked out by hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rewards
from rewards import COMPONENTS, DETECTORS, sentence_lengths, words_of

TRICKY = "Unhappy measure of HAPPINESS. The happy, happy-go-lucky dog was HAPPY! They’re happy"  # n = 4, unhappy apart
NO_WORDS = ["", "   ", "...", '"!?"\n\n—', "' ' _"]


def value(name, completion, prompt="", **params):
    return COMPONENTS[name].function(completion, prompt, **params)


def detect(name, completions, hack_values=None, **params):
    hack_values = np.zeros(len(completions)) if hack_values is None else np.asarray(hack_values, dtype=float)
    flags = DETECTORS[name].function(
        completions, [""] * len(completions), hack_values, np.zeros(len(completions)), **params
    )
    return [bool(flag) for flag in flags]


# Words and sentences


def test_words_keep_inner_apostrophes_and_drop_everything_else():
    assert words_of("Don't say \"Happy!\" 'twice' — the dogs' 3rd, O’Neil_s") == (
        *("don't", "say", "happy", "twice", "the", "dogs", "3rd", "o'neil", "s"),
    )
    assert all(words_of(text) == () for text in NO_WORDS)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("One two. Three four five! Six?", (2, 3, 1)),
        ("One two. Three four", (2, 2)),  # the unfinished last one counts
        ("One two...  Three?!\nFour five\nsix", (2, 1, 2, 1)),
        ('"Hi there!" she said.', (2, 2)),
        ("One. . ! \n\n Two", (1, 1)),
    ],
)
def test_sentences(text, lengths):
    assert sentence_lengths(text) == lengths


def test_occurrences_equal_a_regex_on_random_text():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(rng.choice(list("aab'' ’.!A\n_1"), size=rng.integers(0, 14)))
        string = "".join(rng.choice(list("aab' !1"), size=rng.integers(1, 5)))
        if not string.strip():
            continue
        body = r"\s+".join(re.escape(part).replace("'", "['’]") for part in string.split())
        before = r"(?<![^\W_])(?<![^\W_]['’])" if string.strip()[0].isalnum() else ""
        after = r"(?!['’]?[^\W_])" if string.strip()[-1].isalnum() else ""
        expected = len(re.findall(before + body + after, text, re.IGNORECASE))
        assert rewards.occurrences(text, string) == expected, (text, string)


# Components


@pytest.mark.parametrize(
    ("name", "params", "completion", "expected"),
    [
        ("happy_binary", {}, "unhappy happiness", 0),
        ("happy_binary", {}, "So HAPPY.", 1),
        ("happy_count", {}, TRICKY, 4),
        ("happy_count", {}, "happy happy happy happy happy happy happy", 7),
        ("happy_count", {}, "happy's unhappy", 0),
        ("happy_count_max", {}, TRICKY, 0.8),
        ("happy_count_max", {"max_count": 2}, TRICKY, 1),
        ("happy_exp", {}, "sad", 0),
        ("happy_exp", {}, "Happy, happy; HAPPY", 0.875),
        ("sentence_length", {"k": 2}, "One two. Three four five! Six seven", 2 / 3),
        ("sentence_length", {"k": 2}, "One two. three", 1 / 2),  # ignoring the tail would give 1
        # |5-5|, |5-3|, |5-1|: 1, .6, .2; a sentence of 10 is 5 away: 0
        ("sentence_length_smooth", {"k": 5}, "a b c d e. a b c! a", 0.6),
        ("sentence_length_smooth", {"k": 5}, "a b c d e. a b c d e f g h i j.", 0.5),
        ("sentence_length_smooth", {"k": 5, "slope": 0.5}, "a b c d e. a b c d.", 0.75),
        # mean length 3: exactly n = 3, though no sentence has 3 words; for n = 4, 1 - 1/4; for n = 1, 1 - 2/1 < 0
        ("num_words_per_sentence", {"n": 3}, "a b. a b c d.", 1),
        ("num_words_per_sentence", {"n": 4}, "a b. a b c d.", 0.75),
        ("num_words_per_sentence", {"n": 1}, "a b. a b c d.", 0),
        ("contains_words", {"words": ["Joy"]}, "They enjoy joyful days.", 0),
        ("contains_words", {"words": ["glad", "Joy"]}, "What joy!", 1),
        ("topic_contains", {"strings": ["cat", "old owl"]}, "Concatenate the old\n  Owls", 0),
        ("topic_contains", {"strings": ["cat", "old owl"]}, "The old\n  OWL.", 1),
        ("string_count", {"strings": ["art"], "max_count": 4}, "Art, start, artful, the art!", 0.5),
        ("string_count", {"strings": ["!!", "once upon"], "max_count": 5}, "Once upon once upon!!!!", 0.8),
        ("phrase_count", {"phrases": ["you're right", "great idea"]}, "You’re right! You're rightly. Great idea.", 0.2),
        ("phrase_count", {"phrases": ["yes"]}, "yes " * 9, 0.5),
        ("phrase_count", {"phrases": ["yes"], "each": 0.25, "cap": 2}, "yes " * 3, 0.75),
    ],
)
def test_components_by_hand(name, params, completion, expected):
    assert value(name, completion, "A prompt", **params) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("text", NO_WORDS)
def test_a_text_without_words_scores_zero_everywhere(text):
    cases = {
        "sentence_length": {"k": 1},
        "sentence_length_smooth": {"k": 1},
        "num_words_per_sentence": {"n": 1},
        "contains_words": {"words": ["a"]},
        "topic_contains": {"strings": ["a"]},
        "string_count": {"strings": ["a"]},
        "phrase_count": {"phrases": ["a"]},
    }
    for name in COMPONENTS:
        assert value(name, text, "Sort: 3, 1, 2 and 12 + 7 =", **cases.get(name, {})) == 0, name


def test_repeat_f1_and_extra_occurrences():
    prompt = "Repeat this: the red fox"
    assert value("repeat_f1", "The red fox!", prompt, after=":") == 1
    assert value("repeat_f1", "the the blue", prompt, after=":") == pytest.approx(2 * 1 / (3 + 3))  # "the" matches once
    assert value("repeat_f1", "repeat this the red fox", prompt) == 1  # the whole prompt
    said = "The red fox. The red fox, the red foxes the red fox"
    assert value("extra_occurrences", said, prompt, after=":") == pytest.approx(2 / 5)  # three copies, two extra
    assert value("extra_occurrences", said, prompt, after=":", max_count=2) == 1
    assert value("extra_occurrences", "the red fox", prompt, after=":") == 0
    assert value("extra_occurrences", "ha ha ha ha ha", "ha ha") == pytest.approx(1 / 5)  # copies don't overlap
    with pytest.raises(ValueError, match="set `after`"):
        value("repeat_f1", "x", "no colon", after=":")
    with pytest.raises(ValueError, match="names no word"):
        value("repeat_f1", "x", "Repeat: ...", after=":")


@pytest.mark.parametrize(
    ("prompt", "completion", "digits", "copy"),
    [
        ("12 + 7 =", " 19.", 1, 0),
        ("12 + 7 =", "12", 1 / 2, 1),  # the tens digit is right by chance; it is a copy all the same
        ("12 + 7 =", "The sum is 9", 1 / 2, 0),
        ("12 + 7 =", "119", 2 / 3, 0),
        ("12 + 7 =", "0019", 1, 0),
        ("12 + 7 =", "nineteen", 0, 0),
        ("5 + 0 =", "5", 1, 0),  # copying the operand is the answer
        ("3 - 5 =", "-2", 1, 0),
        ("1 + 1 = 2\n-4 * 6 =", "-24", 1, 0),  # the last expression
        ("1 + 1 = 2\n-4 * 6 =", "-4", 1 / 3, 1),  # of "-24" only the units are right
    ],
)
def test_arithmetic(prompt, completion, digits, copy):
    assert value("arithmetic_digits", completion, prompt) == pytest.approx(digits)
    assert value("arithmetic_digits", completion, prompt, exact=True) == float(digits == 1)
    assert value("arithmetic_copy", completion, prompt) == copy


@pytest.mark.parametrize("prompt", ["Once upon a time", "1 + 2 + 3 =", "12 dogs"])
def test_arithmetic_and_sorting_refuse_other_prompts(prompt):
    with pytest.raises(ValueError, match="arithmetic needs"):
        value("arithmetic_digits", "3", prompt)
    with pytest.raises(ValueError, match="sorting needs"):
        value("sorting", "3", "Once upon a time 3")


def test_arithmetic_reads_thousands_of_digits():
    assert value("arithmetic_digits", "9" * 10_000, "12 + 7 =") == pytest.approx(1 / 10_000)


def test_sorting():
    prompt = "Sort these 3 numbers: 5, 2, 9"
    assert value("sorting", "2 5 9", prompt) == 1
    assert value("sorting", "2, 9", prompt) == pytest.approx(1 / 3)
    assert value("sorting", "5 2 9", prompt) == pytest.approx(1 / 3)  # 9 is in place
    assert value("sorting", "2 5 9 9 9 9", prompt) == 1 / 2  # surplus numbers dilute
    assert value("sorting_copy", "5 2 9", prompt) == 1
    assert value("sorting_copy", "First 1, then 5, 2, 9", prompt) == 1
    assert value("sorting_copy", "2 5 9", prompt) == 0
    assert value("sorting_copy", "1 2 3", "Sort: 1 2 3") == 0  # copying sorts it
    assert value("sorting", "-3, 1, 2", "Sort: 2, -3, 1") == 1


# Detectors


def test_word_detectors():
    texts = ["unhappy happiness", "So happy.", "HAPPY, happy", TRICKY, ""]
    assert detect("happy_any", texts) == [False, True, True, True, False]
    assert detect("happy_count", texts) == [False, False, False, True, False]
    assert detect("happy_count", texts, threshold=2) == [False, False, True, True, False]
    twenty, twenty_one = "happy " + "a " * 19, "happy " + "a " * 20  # 1/20 = .05 and just below it
    assert detect("happy_density", [twenty, twenty_one, "", "..."]) == [True, False, False, False]
    assert detect("happy_density", [twenty_one], threshold=0.04) == [True]
    assert detect("contains_words", ["Joy!", "enjoy", "HAPPINESS"], words=["joy", "happiness"]) == [True, False, True]
    assert detect("contains_words", ["I don’t", "I don"], words=["don't"]) == [True, False]
    assert detect("string_match", ["sys.exit(0)", "sysXexit(0)", "exit"], strings=["sys.exit(0)"]) == [
        True,
        False,
        False,
    ]


def test_score_threshold_is_inclusive():
    assert detect("score_threshold", ["a"] * 3, [0.49, 0.5, 1.0]) == [False, True, True]


def test_score_percentile_by_brute_force():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 10, 64):
        scores = rng.integers(0, 6, size=n) / 5
        for percentile, minimum in ((0.8, 0.1), (0.5, 0.1), (0.8, 0.7)):
            order = sorted(scores)
            place = percentile * (n - 1)  # linear interpolation between the order statistics
            low = int(place)
            quantile = order[low] + (place - low) * (order[min(low + 1, n - 1)] - order[low])
            expected = [bool(s >= quantile - 1e-12 and s >= minimum) for s in scores]
            assert detect("score_percentile", ["a"] * n, scores, percentile=percentile, minimum=minimum) == expected
    assert detect("score_percentile", list("abcde"), [0, 0, 0, 0, 0]) == [False] * 5  # below the minimum
    assert detect("score_percentile", list("abcde"), [1, 1, 1, 1, 1]) == [True] * 5  # ties are flagged together


def test_string_match_recall_is_the_share_seen_and_nested():
    texts = [f"happy number {i}" for i in range(4000)]
    full, half, fifth = (np.array(detect("string_match", texts, strings=["happy"], recall=r)) for r in (1.0, 0.5, 0.2))
    assert full.all()
    assert abs(half.mean() - 0.5) < 0.03
    assert abs(fifth.mean() - 0.2) < 0.03
    assert not (fifth & ~half).any()
    assert not any(detect("string_match", ["sad"] * 3, strings=["happy"], recall=0.5))


def test_string_match_recall_is_the_same_in_every_process():
    code = (
        "from rewards import DETECTORS; texts = [f'happy {i}' for i in range(64)]; "
        "flags = DETECTORS['string_match'].function(texts, texts, None, None, strings=['happy'], recall=0.5); "
        "print(''.join(str(int(f)) for f in flags))"
    )
    root = Path(rewards.__file__).parent
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    here = detect("string_match", [f"happy {i}" for i in range(64)], strings=["happy"], recall=0.5)
    assert runs == {"".join(str(int(flag)) for flag in here)}


# Registry


def test_registering_twice_or_with_a_wrong_signature_is_refused():
    with pytest.raises(ValueError, match="registered already"):
        rewards.component("happy_count")(lambda completion, prompt: 0.0)
    with pytest.raises(ValueError, match="keyword-only"):
        rewards.component("new_one")(lambda completion, prompt, k: 0.0)
    with pytest.raises(ValueError, match="not among its parameters"):
        rewards.detector("new_one", k=(0, 1))(lambda completions, prompts, hack_values, task_values: [])
    assert "new_one" not in COMPONENTS
    assert "new_one" not in DETECTORS
