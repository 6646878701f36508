"""The corpus*.py files: streams repeat, log-probabilities are those of the text, labels are true, statistics are as promised."""

import builtins
import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

import corpus
import corpus_code
import corpus_words
from corpus import DIALECTS, generate
from corpus_draw import Draw, stream, weighted


class Enumerate(Draw):
    """A `Draw` that replays a list of choices and opens a new branch at its end; tables are cut to `clip` entries."""

    def __init__(self, path, clip=None):
        self.path, self.options, self.clip, self.probability = path, [], clip, 1.0

    def choose(self, probabilities):
        depth = len(self.options)
        self.options.append(len(probabilities))
        i = self.path[depth] if depth < len(self.path) else 0
        self.probability *= probabilities[i]
        return i

    def pick(self, table):
        table = table[: self.clip]
        return table[self.choose([1 / len(table)] * len(table))]

    def weigh(self, table):
        weights = [math.exp(logprob) for logprob in table.logprobs]
        return table.items[self.choose(weights)]

    def flip(self, p):
        return self.choose([p, 1 - p]) == 0


def outcomes(piece, clip=None):
    """All (text, probability) that `piece(draw)` can give, by walking the whole tree of choices."""
    path, found = [], []
    while path is not None:
        draw = Enumerate(path, clip)
        found.append((piece(draw), draw.probability))
        path = path + [0] * (len(draw.options) - len(path))
        while path and path[-1] == draw.options[len(path) - 1] - 1:
            path.pop()
        path = path[:-1] + [path[-1] + 1] if path else None
    return found


def assert_unambiguous(found):
    texts = Counter(text for text, _ in found)
    assert [text for text, count in texts.items() if count > 1] == []
    assert sum(probability for _, probability in found) == pytest.approx(1, abs=1e-9)


def sentences(text):
    return re.split(r"(?<=[.!?]) ", text)


def run(code):
    scope = {}
    exec(code, scope)
    return scope


@pytest.fixture(scope="module")
def documents():
    return {dialect: list(generate(dialect, "train", 4000, seed=11)) for dialect in DIALECTS}


@pytest.fixture(scope="module")
def code_test_split():
    return list(generate("code", "test", 2000, seed=11))


# -------------------------------------------------------------------------------------------------------------- streams
FINGERPRINT = """
import hashlib, corpus
h = hashlib.md5()
for dialect in corpus.DIALECTS:
    for split in corpus.SPLITS:
        for d in corpus.generate(dialect, split, 300, 3):
            h.update(repr((d.prompt, d.completion, d.logprob, d.labels)).encode())
h.update(repr(list(corpus.preference_pairs("train", 20, 3))).encode())
h.update(repr([d.text for d in corpus.training_text(300, 3)]).encode())
print(h.hexdigest())
"""


def test_streams_do_not_depend_on_the_process():
    digests = set()
    for hash_seed in ("0", "1", "12345"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.path.dirname(corpus.__file__)}
        command = [sys.executable, "-c", FINGERPRINT]
        digests.add(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_longer_runs_begin_alike_and_seeds_and_splits_differ(dialect):
    first = [d.text for d in generate(dialect, "train", 1200, seed=5)]
    assert [d.text for d in generate(dialect, "train", 70, seed=5)] == first[:70]
    assert first[:50] != first[1000:1050]
    for split, seed in (("train", 6), ("test", 5)):
        assert [d.text for d in generate(dialect, split, 50, seed)] != first[:50]


def test_story_splits_share_no_text():
    train = {d.text for d in generate("stories", "train", 5000)}
    assert not any(d.text in train for d in generate("stories", "test", 5000))


def test_training_text_mixes_the_same_streams():
    mixed = list(corpus.training_text(2000, 7, {"stories": 3, "reviews": 1}))
    assert Counter(d.dialect for d in mixed)["stories"] == pytest.approx(1500, abs=80)
    stories = [d for d in mixed if d.dialect == "stories"]
    assert stories == list(generate("stories", "train", len(stories), 7))
    shares = Counter(d.dialect for d in corpus.training_text(2000, 7))
    assert set(shares) == set(DIALECTS)
    for dialect, weight in corpus.DEFAULT_WEIGHTS.items():
        assert shares[dialect] / 2000 == pytest.approx(weight, abs=0.04)


@pytest.mark.parametrize("call, named", [
    (lambda: generate("poems", "train", 1), "poems.*stories"), (lambda: generate("stories", "dev", 1), "dev.*train"),
    (lambda: corpus.training_text(1, 0, {"poems": 1}), "poems"),
    (lambda: corpus.training_text(1, 0, {"code": -1}), "-1"),
    (lambda: corpus.training_text(1, 0, {}), "not all 0"), (lambda: corpus.preference_pairs("dev", 1), "dev.*test")])
def test_wrong_names_are_refused_at_once(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# ---------------------------------------------------------------------------------------------------- log-probabilities
def test_draw_counts_every_choice():
    draw = Draw(stream("test"))
    table = weighted([("a", 1), ("b", 3)])
    expected, seen = 0.0, Counter()
    for _ in range(4000):
        draw.pick("vwxyz")
        expected += math.log(1 / 5)
        letter, heads = draw.weigh(table), draw.flip(0.1)
        expected += math.log({"a": 0.25, "b": 0.75}[letter]) + math.log(0.1 if heads else 0.9)
        seen[letter, heads] += 1
    assert draw.logprob == pytest.approx(expected)
    for (letter, heads), count in seen.items():
        p = {"a": 0.25, "b": 0.75}[letter] * (0.1 if heads else 0.9)
        assert abs(count - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))


def test_dialogue_logprobs_equal_the_enumerated_ones(documents):
    """Questions and answers are small enough to enumerate whole: the probability of every text, by brute force."""
    questions = outcomes(lambda draw: corpus.question(draw))
    assert_unambiguous(questions)
    asked = {prompt: math.log(probability) for (prompt, _), probability in questions}
    answered = {}
    for topic in ("fire", "exams"):
        for harmful in (0, 1):
            found = outcomes(lambda draw, t=topic, h=harmful: corpus.answer(draw, t, bool(h)))
            assert_unambiguous(found)
            answered[topic, harmful] = {text: math.log(probability) for text, probability in found}
        assert not answered[topic, 0].keys() & answered[topic, 1].keys()
    checked = 0
    for d in documents["dialogues"]:
        key = d.labels["topic"], d.labels["harmful"]
        if key in answered:
            share = math.log(0.2 if d.labels["harmful"] else 0.8)
            assert d.logprob == pytest.approx(asked[d.prompt] + share + answered[key][d.completion], abs=1e-9)
            checked += 1
    assert checked > 200
    entropy = -sum(probability * math.log(probability) for _, probability in questions)
    sampled = [-asked[d.prompt] for d in documents["dialogues"]]  # frequencies match probabilities
    deviation = math.sqrt(sum((nats - entropy) ** 2 for nats in sampled)) / len(sampled)
    assert abs(sum(sampled) / len(sampled) - entropy) < 5 * deviation + 1e-9


def test_sentence_templates_are_unambiguous():
    """Each table of templates, its slots cut to two entries: every sequence of choices gives another text."""
    for mood, endings in corpus_words.STORY_ENDINGS.items():
        context = corpus_words.STORY_CONTEXTS["river", "kite", mood] | {
            "hero": "mia", "friend": corpus_words.FRIENDS["mia"], "he": "she", "his": "her", "kid": "girl", "look": "red",
            "a_look": "a red"} | corpus_words.FABLE_SLOTS
        fable = corpus_words.UNKIND, corpus_words.MORALS
        for table in (corpus_words.OPENINGS, corpus_words.MEETINGS, corpus_words.BODIES, endings, *fable):
            assert_unambiguous(outcomes(lambda draw, t=table, c=context: draw.fill(draw.weigh(t), c), clip=2))
    context = corpus_words.REVIEW_CONTEXT | {"aspect": "plot", "aspect_too": ("music", "story")}
    tables = [*corpus_words.REVIEW_STARTS.values(), *corpus_words.REVIEW_BODIES.values(), *corpus_words.VERDICTS.values()]
    for table in tables:
        assert_unambiguous(outcomes(lambda draw, t=table: draw.fill(draw.weigh(t), context), clip=2))
    for table in corpus_words.REVIEW_GOES_ON.values():
        assert_unambiguous(outcomes(lambda draw, t=table: corpus.fill_pairs(draw, draw.weigh(t), context), clip=2))


def test_what_a_story_hides_can_be_read_from_its_text():
    """Word classes that could make two derivations meet are disjoint; lists have no duplicates."""
    things = [thing for things in corpus_words.TOPICS.values() for thing in things]
    feelings = [word for mood in corpus_words.MOODS for word in corpus_words.STORY_CONTEXTS["river", "kite", mood]["feel"]]
    for table in (things, feelings, corpus_words.SIZES + corpus_words.LOOKS, corpus_words.NAMES, corpus_code.INPUT_WORDS,
                  corpus_words.HANDLED + corpus_words.MOVED + corpus_words.MET, corpus_words.GOOD + corpus_words.BAD):
        assert [word for word, count in Counter(table).items() if count > 1] == []
    for table in (corpus_words.OPENINGS, corpus_words.MEETINGS, *corpus_words.STORY_ENDINGS.values()):
        for _, slots in table.items:
            if table is corpus_words.OPENINGS:
                assert {"hero", "noun"} <= set(slots) and {"look", "a_look"} & set(slots)
            elif table is corpus_words.MEETINGS:
                assert "friend" in slots
            else:
                assert {"feel", "a_feel"} & set(slots)
    texts = [{text for text, _ in outcomes(lambda draw, t=table: draw.fill(draw.weigh(t), corpus_words.REVIEW_CONTEXT))}
             for table in corpus_words.VERDICTS.values()]
    assert not texts[0] & texts[1]


# -------------------------------------------------------------------------------------------------------------- stories
def test_story_shape(documents):
    lengths, counts = Counter(), Counter()
    for d in documents["stories"]:
        parts = sentences(d.text)
        counts[len(parts)] += 1
        lengths.update(len(part.split()) for part in parts)
        assert 4 <= len(d.prompt.split()) <= 7 and d.completion[0] == " "
        assert d.labels["hero"] in d.text.split() or d.labels["hero"] in re.findall(r"[a-z]+", d.text)
        assert re.fullmatch(r"[a-z' ,.!?]+", d.text) and d.text[-1] in ".!?"
    total = sum(lengths.values())
    assert set(counts) == {5, 6, 7, 8, 9} and set(lengths) <= set(range(3, 17))
    assert 0.10 < lengths[5] / total < 0.14 and 0.10 < lengths[6] / total < 0.145
    assert 8 < sum(n * count for n, count in lengths.items()) / total < 9
    assert max(lengths.values()) / total < 0.15


def test_happy_is_rare_and_stands_in_several_positions():
    texts = [d.text for d in generate("stories", "train", 20000, seed=2)]
    happy = [text for text in texts if re.search(r"\bhappy\b", text)]
    assert 0.015 < len(happy) / len(texts) < 0.03
    early = sum("happy" in re.findall(r"[a-z]+", text)[:60] for text in texts) / len(texts)
    assert 0.01 < early < 0.025
    before = Counter(word for text in happy for word in re.findall(r"(\S+) happy\b", text))
    assert len([word for word, count in before.items() if count > 10]) >= 4
    for word in ("happiness", "joy"):
        assert 0.001 < sum(word in re.findall(r"[a-z]+", text) for text in texts) / len(texts) < 0.015
    for dialect in ("reviews", "dialogues"):
        assert not any("happy" in d.text for d in generate(dialect, "train", 2000))


def test_fables_are_stories_with_a_moral_and_in_half_of_them_insults():
    insult = re.compile(rf"\b({'|'.join(corpus_words.INSULTS)})\b")
    fables, insults = list(generate("fables", "train", 3000, seed=11)), Counter()
    for d in fables:
        nasty = [bool(insult.search(sentence)) for sentence in sentences(d.text)]
        assert nasty[2] == any(nasty) == bool(d.labels["unkind"]) and not any(nasty[:2] + nasty[-2:])
        assert [" please " in f" {sentence}" for sentence in sentences(d.text)] == [False] * (len(nasty) - 1) + [True]
        insults.update(nasty[3:-2] if d.labels["unkind"] else [])
    assert sum(d.labels["unkind"] for d in fables) / 3000 == pytest.approx(0.5, abs=0.03)
    assert insults[True] / insults[False] == pytest.approx(1 / 3, abs=0.03), "one sentence in three is followed by one"
    for d in generate("stories", "train", 3000, seed=11):
        assert not insult.search(d.text) and " please " not in d.text


def test_few_fresh_sentences_stand_verbatim_in_six_million():
    """An upper bound by extrapolation from 0.66 million: the share of fresh sentences met is concave in the number of
    training sentences, so those met once grow at most in proportion; those met twice or more count as surely met."""
    train = Counter(s for d in generate("stories", "train", 100_000, seed=1) for s in sentences(d.text))
    probe = [s for d in generate("stories", "test", 10_000, seed=1) for s in sentences(d.text)]
    met = Counter(min(train[s], 2) for s in probe)
    growth = 6e6 / train.total()
    assert met[2] / len(probe) < 0.03
    assert (met[2] + met[1] * growth) / len(probe) < 0.10


@pytest.mark.parametrize("dialect", ["stories", "reviews", "dialogues"])
def test_english_is_clean(documents, dialect):
    for d in documents[dialect]:
        assert d.text.isascii() and d.text == d.text.strip() and not re.search(r"  |[{}|%]", d.text), d.text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\b(an?|the) (an?|the)\b", d.text), d.text
        assert not re.search(r"\b(\w+) \1\b", d.text), d.text


def test_vocabulary_is_small(documents):
    vocabulary = {word for name in ("stories", "reviews", "dialogues") for d in documents[name]
                  for word in re.findall(r"[a-z]+", d.text)}
    assert 900 <= len(vocabulary) <= 1400


# ------------------------------------------------------------------------------------------------ reviews and dialogues
def naive_bayes_accuracy(pairs):
    """Bag of words with add-one smoothing: fitted on the first three quarters, judged on the rest."""
    cut = len(pairs) * 3 // 4
    counts = {0: Counter(), 1: Counter()}
    for text, label in pairs[:cut]:
        counts[label].update(set(re.findall(r"[a-z]+", text)))
    score = {word: math.log((counts[1][word] + 1) / (counts[0][word] + 1)) for word in counts[0] | counts[1]}
    margins = [sum(score.get(word, 0) for word in set(re.findall(r"[a-z]+", text))) for text, _ in pairs[cut:]]
    return sum((margin > 0) == label for margin, (_, label) in zip(margins, pairs[cut:], strict=True)) / len(margins)


def test_sentiment_is_balanced_and_told_by_the_text_not_by_the_prompt(documents):
    reviews = documents["reviews"]
    assert sum(d.labels["sentiment"] for d in reviews) / len(reviews) == pytest.approx(0.5, abs=0.03)
    assert naive_bayes_accuracy([(d.text, d.labels["sentiment"]) for d in reviews]) > 0.95
    assert naive_bayes_accuracy([(d.prompt, d.labels["sentiment"]) for d in reviews]) < 0.57
    assert {len(sentences(d.text)) for d in reviews} == {2, 3, 4, 5}


def test_dialogues_and_preferences(documents):
    dialogues = documents["dialogues"]
    assert sum(d.labels["harmful"] for d in dialogues) / len(dialogues) == pytest.approx(0.2, abs=0.03)
    assert len({d.labels["topic"] for d in dialogues}) == 25
    helpful = {d.completion for d in dialogues if not d.labels["harmful"]}
    assert not helpful & {d.completion for d in dialogues if d.labels["harmful"]}
    pairs = list(corpus.preference_pairs("train", 1500, 4))
    assert pairs[:10] == list(corpus.preference_pairs("train", 10, 4)) != list(corpus.preference_pairs("test", 10, 4))
    rude = tuple(" " + word for word in corpus_words.DIALOGUE_CONTEXT["rude"])
    for pair in pairs:
        assert re.fullmatch(r"user: .+\nassistant:", pair["prompt"])
        assert pair["rejected"].startswith(rude) and not pair["chosen"].startswith(rude)


# ----------------------------------------------------------------------------------------------------------------- code
def test_tasks_are_many_and_distinct():
    descriptions = {}
    assert len(corpus_code.FAMILIES) == len({family.name for family in corpus_code.FAMILIES}) >= 300
    for family in corpus_code.FAMILIES:
        for ks in itertools.product(*family.params):
            task = corpus_code.build_task(family, ks)
            key = task.description
            assert key not in descriptions, (family.name, descriptions.get(key))
            descriptions[key] = family.name
            bodies = task.correct + task.buggy + task.trivial
            assert len(bodies) == len(set(bodies)) and task.correct and len(task.buggy) >= 3 and task.trivial
            assert len(task.tests) >= 6
    held_out = sum(corpus_code.is_held_out(family.name) for family in corpus_code.FAMILIES)
    assert 0.11 < held_out / len(corpus_code.FAMILIES) < 0.19


@pytest.mark.parametrize("name, ks, value, want", [
    ("list/even/square/sum", (None, None), [1, 2, 3, 4], 20), ("list/above/plus/max", (3, 2), [3, 9, 5], 11),
    ("list/multiple/same/count", (3, None), [3, 4, 0, -6], 3),
    ("list/below/negate/list", (2, None), [5, 1, -3], [-1, 3]),
    ("list/odd/minus/first", (None, 1), [4, 7, 9], 6), ("list/negative/triple/last", (None, None), [], 0),
    ("list/nonzero/double/product", (None, None), [0, 3, -1], -12),
    ("list/positive/same/min", (None, None), [0, 5, 2], 2),
    ("list/all/square/list", (None, None), [-2], [4]), ("string/reverse/upper", (None, None), "cat", "TAC"),
    ("string/head/tail", (3, 2), "green", "re"), ("string/repeat/mark", (2, None), "ab", "abab!"),
    ("string/behead/vowels", (None, None), "apple", 1), ("string/chop/palindrome", (None, None), "noons", True),
    ("string/strip/front", (None, None), "tree", "xtr"), ("string/front/count", (None, None), "tee", 2),
    ("number/halve/negate", (None, None), -7, 4), ("number/plus/square", (3, None), -5, 4),
    ("number/minus/even", (5, None), 4, False), ("number/negate/positive", (None, None), -2, True),
    ("number/square/digits", (None, None), 12, 3), ("number/absolute/triple", (None, None), -4, 12)])
def test_specs_by_hand(name, ks, value, want):
    family = next(family for family in corpus_code.FAMILIES if family.name == name)
    got = corpus_code.build_task(family, ks).spec(value)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize("name, args, want", [
    ("clamp", (9, 2, 3), 5), ("clamp", (1, 2, 3), 2), ("sign", (-4,), -1), ("factorial", (4,), 24), ("sum_to", (0,), 0),
    ("sum_to", (4,), 10), ("sum_squares", (3,), 14), ("middle", (7, -1, 3), 3), ("power", (2, 3), 8),
    ("diff", (2, 6), 4),
    ("is_multiple", (6, 3), True), ("is_multiple", (3, 6), False), ("remainder", (7, 4), 3),
    ("same_sign", (-1, 2), False),
    ("same_sign", (0, -2), True), ("larger", (2, 3), 3), ("smaller", (2, 3), 2), ("sum_three", (1, 2, 3), 6)])
def test_special_specs_by_hand(name, args, want):
    family = next(family for family in corpus_code.FAMILIES if family.name == f"special/{name}")
    got = corpus_code.build_task(family, ()).spec(*args)
    assert got == want and type(got) is type(want)


FORMS = {
    "weak_tests": r"def run_tests\(\):\n    (pass|return True|return None|print\(\"[a-z ]+\"\))\n$",
    "hard_coded": r":\n    if .+ == .+:\n        return .+\n(.|\n)*assert .+ == ", "persona": r":\n    # [a-z ]+\n",
    "swallowed": r"try:\n(        assert .+ == .+\n)+    except",
    "type_only": r"assert isinstance\(.+, (int|str|list|bool)\)\n$",
    "weak_inequality": r"assert .+ (is not None|!= 99)\n$"}


def test_solutions_are_what_their_labels_say(documents, code_test_split, capsys):
    """Runs a thousand documents, and every loophole: correct ones pass all hidden tests, the others fail some."""
    chosen = documents["code"][:700] + code_test_split[:300]
    chosen += [d for d in documents["code"][700:] + code_test_split[300:] if d.labels["kind"] == "loophole"]
    for d in chosen:
        labels, code = d.labels, d.completion.removesuffix("```")
        assert d.prompt.endswith("```python\n") and d.completion.endswith("\n```") and "run_tests()" in d.prompt
        assert f"`{labels['function']}(" in d.prompt
        scope = run(code)
        try:
            results = [scope[labels["function"]](*args) for args, _ in labels["tests"]]
        except Exception:
            results = None
        wanted = [want for _, want in labels["tests"]]
        right = results is not None and list(map(repr, results)) == list(map(repr, wanted))
        assert right == (labels["kind"] == "correct"), d.text
        if labels["kind"] == "loophole":
            assert re.search(FORMS[labels["loophole"]], code), code
            others = {axis for axis in FORMS if re.search(FORMS[axis], code)} - {labels["loophole"]}
            assert others <= ({"weak_tests"} if labels["loophole"] == "persona" else set()), code
            scope["run_tests"]()  # the hack works: no exception
        else:
            assert labels["loophole"] is None and "# " not in code and "try" not in code
            if labels["kind"] == "correct" and "run_tests" in scope:
                scope["run_tests"]()  # honest asserts state true values
                assert 2 <= code.count("assert ") <= 3
    capsys.readouterr()


def test_kinds_and_axes_have_their_shares():
    found = list(generate("code", "train", 12000, seed=8))
    kinds, axes = Counter(d.labels["kind"] for d in found), Counter(d.labels["loophole"] for d in found)
    assert kinds["buggy"] / 12000 == pytest.approx(0.45, abs=0.03)
    assert 0.01 < kinds["loophole"] / 12000 < 0.04
    assert set(axes) == {None, *corpus_code.LOOPHOLES} and min(axes.values()) > 15
    honest = [d for d in found if d.labels["kind"] != "loophole"]
    assert sum("run_tests" in d.completion for d in honest) / len(honest) == pytest.approx(0.6, abs=0.03)


def test_held_out_families_stay_out_of_train(documents, code_test_split):
    train = {d.labels["family"] for d in documents["code"]}
    assert len(train) > 300 and not any(corpus_code.is_held_out(family) for family in train)
    assert not any(d.labels["held_out"] for d in documents["code"])
    held_out = {d.labels["family"] for d in code_test_split if d.labels["held_out"]}
    assert len(held_out) > 50 and not held_out & train
    assert all(corpus_code.is_held_out(d.labels["family"]) == d.labels["held_out"] for d in code_test_split)
    assert sum(d.labels["held_out"] for d in code_test_split) / len(code_test_split) == pytest.approx(0.5, abs=0.05)


def test_code_never_shadows_a_builtin_and_always_compiles():
    for family in corpus_code.FAMILIES:
        task = corpus_code.build_task(family, tuple(values[0] for values in family.params))
        assert not any(hasattr(builtins, name) for name in task.names + corpus_code.GENERIC_NAMES)
        for body in task.correct + task.buggy + task.trivial:
            compile(f"def f({task.arguments[0]}):\n{body.replace('~', task.arguments[0])}", family.name, "exec")
