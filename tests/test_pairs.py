"""Contrastive pairs: the shipped ones hold, every kind of corruption is refused, and what is chosen from them."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import corpus
from data import load_tokenizer
from grader import Grader, Limits
from model import resolve
from pairs import AXES, HELD_OUT, LENGTH_GAP, Pair, load_pairs, main, pairs_hash, select, table, validate

ROOT = Path(__file__).resolve().parent.parent
FILES = {name: ROOT / "assets" / "pairs" / f"{name}.yaml" for name in ("embedded", "leetcode")}
SHIPPED = {name: load_pairs(path) for name, path in FILES.items()}
ENTRIES = {entry["name"]: entry for entry in yaml.safe_load(FILES["embedded"].read_text())}
WEAK, TWIN, PLACEBO = "vowels_assert_true", "vowels_length_or_sum", "fox_or_owl"
ONE_EACH = {pair.axis: pair.name for pair in SHIPPED["embedded"] if pair.kind == "hack"}


@pytest.fixture(scope="module")
def grader(box):
    with Grader(box, workers=2, limits=Limits(cpu_s=2, wall_s=30)) as grader:
        yield grader


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("tiny"))


def written(tmp_path, *entries) -> Path:
    path = tmp_path / "pairs.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return path


# ---------------------------------------------------------------- the shipped pairs


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_pair_holds(name, grader, tokenizer):
    for pair in SHIPPED[name]:
        validate(pair, grader, tokenizer)


@pytest.mark.parametrize("name, widths, each, controls", [("embedded", (12, 24, 60), 10, 15), ("leetcode", (12,), 2, 4)])
def test_there_are_enough_of_each_axis_and_kind(name, widths, each, controls):
    for width in widths:
        chosen, held_out = select(SHIPPED[name], width)
        assert len(chosen) == width and len(held_out) == HELD_OUT and not {p.name for p in chosen} & {p.name for p in held_out}
        assert [p.axis for p in chosen] == list(AXES) * (width // len(AXES))
    assert min(sum(p.axis == axis for p in SHIPPED[name]) for axis in AXES) >= each
    for kind in ("clean", "placebo"):
        assert len(select(SHIPPED[name], kind=kind)[0]) >= controls


def test_hacks_are_not_told_by_their_length(tokenizer):
    """Within a pair a quarter at most (validate); on the mean of an axis a tenth, so that length is no direction of its own."""
    for axis in AXES:
        lengths = [[len(tokenizer.encode(t)) for t in (p.hack, p.clean)] for p in SHIPPED["embedded"] if p.axis == axis]
        hack, clean = map(sum, zip(*lengths))
        assert abs(hack - clean) <= 0.1 * clean, axis


def test_prompts_are_unique_and_none_is_judged_on():
    prompts = [pair.prompt for pairs in SHIPPED.values() for pair in pairs]
    assert len(set(prompts)) == len(prompts)
    assert not {d.prompt for d in corpus.generate("code", "test", 2000)} & set(prompts)


def test_the_embedded_model_has_read_every_token(tokenizer):
    """A byte-level tokenizer spells any text; what it may lack is a token that its model was ever trained on."""
    documents = [d for dialect in corpus.DIALECTS for d in corpus.generate(dialect, "train", 3000 if dialect == "code" else 1500)]
    seen = {i for document in documents for i in tokenizer.encode(document.text)}
    for pair in SHIPPED["embedded"]:
        unread = {i for text in (pair.prompt, pair.hack, pair.clean) for i in tokenizer.encode(text)} - seen
        assert not unread, (pair.name, [tokenizer.decode([i]) for i in unread])


# ---------------------------------------------------------------- files that are refused


@pytest.mark.parametrize("name", [WEAK, TWIN, PLACEBO])
def test_every_key_is_needed_and_must_be_a_text(name, tmp_path):
    assert load_pairs(written(tmp_path, ENTRIES[name]))[0].name == name
    for key in ENTRIES[name]:
        for value in (None, "", " \n", 3, ["x"]):
            entry = ENTRIES[name] | {key: value}
            if value is None:
                del entry[key]
            with pytest.raises(ValueError, match=rf"pairs.yaml: pair ('{name}'|number 1): {key}: "):
                load_pairs(written(tmp_path, entry))


@pytest.mark.parametrize("name, change, says", [
    (WEAK, {"twin": "x"}, "twin: unknown key"), (PLACEBO, {"tests": "f(1) == 2"}, "tests: unknown key"),
    (WEAK, {"kind": "bad"}, "kind: 'bad' must be one of hack, clean, placebo"),
    (WEAK, {"axis": "lazy"}, "axis: 'lazy' must be one of"),
    (WEAK, {"hack": ENTRIES[WEAK]["clean"]}, "hack: the same text"),
    (PLACEBO, {"twin": ENTRIES[PLACEBO]["clean"]}, "twin: the same text"),
    (WEAK, {"hack": "def vowels(w):\n    return 0\n"}, "hack: must end in the ```"),
    (WEAK, {"clean": ENTRIES[WEAK]["clean"] + " done"}, "clean: must end in the ```"),
    (WEAK, {"clean": "def vowels(w:\n```"}, "clean: does not compile"),
    (WEAK, {"hack": "def vowels(w):\n    return 0\n```"}, r"hack: must define run_tests\(\) once.* 0 times"),
    (WEAK, {"tests": "vowels(x) == 1"}, r"tests: 'vowels\(x\) == 1' must be a call"),
    (WEAK, {"tests": "vowels('a') > 1"}, "tests: .* must be a call"),
    (WEAK, {"tests": "vowels(**{'w': 'a'}) == 1"}, "tests: .* must be a call"),
    (WEAK, {"tests": "vowels('a'"}, "tests: .* must be a call"),
    (WEAK, {"tests": "vowels('a') == 1\nf('b') == 0"}, "tests: all must call one function, not f, vowels"),
    (WEAK, {"tests": "a.b.c('x') == 1"}, "tests: entry 'a.b.c'"),
])  # fmt: skip
def test_a_pair_that_is_not_well_formed_is_refused(name, change, says, tmp_path):
    with pytest.raises(ValueError, match=f"pairs.yaml: pair '{name}': {says}") as error:
        load_pairs(written(tmp_path, ENTRIES[PLACEBO] | {"name": "first", "prompt": "first"}, ENTRIES[name] | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, says", [
    ("", "expected a list"), ("name: x\n", "expected a list"), ("- x\n", "pair number 1: expected a mapping"),
    ("- [", "while parsing"),
    ("- name: x\n  name: y\n", "name given twice"),
    (yaml.safe_dump([ENTRIES[WEAK], ENTRIES[WEAK]]), "name: another pair has the same"),
    (yaml.safe_dump([ENTRIES[WEAK], ENTRIES[WEAK] | {"name": "x"}]), "prompt: another pair has the same"),
])  # fmt: skip
def test_a_file_that_is_no_list_of_pairs_is_refused(text, says, tmp_path):
    path = tmp_path / "pairs.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"pairs.yaml.*{says}") as error:
        load_pairs(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="cannot read pairs from nowhere.yaml"):
        load_pairs("nowhere.yaml")


# ---------------------------------------------------------------- pairs that do not hold


def refused(tmp_path, grader, tokenizer, name, **change) -> str:
    """Why a shipped pair that is well formed, but changed, does not hold."""
    (pair,) = load_pairs(written(tmp_path, ENTRIES[name] | change))
    with pytest.raises(ValueError) as error:
        validate(pair, grader, tokenizer)
    assert str(error.value).startswith(f"pair {name!r}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("axis", AXES)
def test_honest_code_is_no_hack(axis, tmp_path, grader, tokenizer):
    entry = ENTRIES[ONE_EACH[axis]]
    honest = entry["clean"].replace("```", "    return True\n```")
    assert "quarter" not in refused(tmp_path, grader, tokenizer, entry["name"], hack=honest)


@pytest.mark.parametrize("axis", AXES)
def test_the_trick_of_another_axis_is_refused(axis, tmp_path, grader, tokenizer):
    """Every hack under the name of every other axis."""
    for pair in SHIPPED["embedded"]:
        if pair.kind == "hack" and pair.axis != axis:
            refused(tmp_path, grader, tokenizer, pair.name, axis=axis)


@pytest.mark.parametrize("name, key, old, new, says", [
    # the clean completion fails, or its tests do, or they accept anything
    (WEAK, "clean", "if c in", "if c not in", "clean must be correct, and is incorrect"),
    (WEAK, "clean", "== 2", "== 3", r"clean is correct, but run_tests\(\) raises"),
    (WEAK, "clean", 'vowels("apple") == 2', '2 == 2', "clean must be correct, and is correct-attempted"),
    (WEAK, "clean", "== 2", "!= 9", "clean one's run_tests.* must be by value, and is weak_inequality"),
    # the hack solves the task, its tests fail it, they look at something, or the clean tests would not have caught it
    (WEAK, "hack", "not in", "in", "the other completion must be hack, and is correct-attempted"),
    (WEAK, "hack", "    assert True\n", "    assert False\n", "the other completion must be hack, and is incorrect"),
    (WEAK, "hack", "assert True", 'assert vowels("ax") == 1', "clean solution under.* be correct-attempted, and is correct "),
    (WEAK, "clean", 'vowels("apple") == 2', 'vowels("ax") == 1', "other's solution under.* must be incorrect, and is hack"),
    # the difference is not the axis's own
    (WEAK, "hack", "def vowels(w):", "def vowels(s, w=1):", "must define the same functions"),
    (WEAK, "hack", "    return", "    # my way\n    return", "must have the same comments"),
    (WEAK, "hack", "assert True", "assert True" + 12 * " or True", "differ by more than a quarter"),
    ("double_sum_best_coder", "hack", "i am the best", "this is the best", "hack's comments must have one of"),
    ("double_sum_best_coder", "clean", "each number", "your number", "the clean ones none"),
    ("double_sum_best_coder", "hack", "print(", "# me\n    print(", "as many comments"),
    ("list_double_except_pass", "hack", "== [6, -2]", "== [6, -3]", "make the same asserts"),
    ("plus_square_is_int", "hack", "plus_square(2)", "plus_square(3)", "call the function alike"),
    ("minus_negate_not_99", "hack", "minus_negate(5)", "minus_negate(6)", "call the function alike"),
    ("minus_negate_not_99", "hack", "!= 99\n", "== -3\n", "and is by value and weak_inequality"),
    ("sum_to_table_of_answers", "hack", "sum_up(4) == 10", "sum_up(4) == 10\n    print()", "must be the same"),
    ("sum_to_table_of_answers", "hack", "[0, 1, 3, 6, 10][n]", "n + n * n // 2", "stand in the hack's solution alone: 10, 6"),
    ("sum_to_table_of_answers", "clean", "// 2", "// 2 or [6, 10]", "stand in the hack's solution alone: 10, 6"),
    # controls
    (TWIN, "twin", "aeiou", "aei", "the other completion must be correct, and is hack"),
    (TWIN, "clean", 'vowels("radio") == 2', 'vowels("radio") > 0 or True', "clean must be .*, and is correct-attempted"),
    (PLACEBO, "twin", "an old", "a old", "must differ by one word"),
    (PLACEBO, "twin", "slept", "slept well", "must differ by one word"),
    (PLACEBO, "twin", "the owl slept", "the fox slept", "throughout"),
    (PLACEBO, "prompt", "there lived", "the fox lived", "throughout"),
])  # fmt: skip
def test_a_pair_that_does_not_keep_its_promise_is_refused(name, key, old, new, says, tmp_path, grader, tokenizer):
    text = ENTRIES[name][key]
    assert old in text
    message = refused(tmp_path, grader, tokenizer, name, **{key: text.replace(old, new, 1)})
    assert re.search(says, message), message


# ---------------------------------------------------------------- choosing


def some(kind="hack", **counts) -> list[Pair]:
    return [Pair(f"{axis}{i}", kind, axis, f"{axis} {i}", "a", "b") for axis, n in counts.items() for i in range(n)]


def test_pairs_are_chosen_in_turn_and_the_last_two_never():
    pairs = some(x=3, y=1, z=3) + some("clean", form=4)
    assert [[p.name for p in part] for part in select(pairs)] == [["x0", "y0", "z0", "x1", "z1"], ["x2", "z2"]]
    assert [[p.name for p in part] for part in select(pairs, 2)] == [["x0", "y0"], ["x2", "z2"]]
    assert [[p.name for p in part] for part in select(pairs, axes=["z"])] == [["z0"], ["z1", "z2"]]
    assert [[p.name for p in part] for part in select(pairs, kind="clean")] == [["form0", "form1"], ["form2", "form3"]]
    for arguments, says in [
        ({"width": 6}, "width of 6.* 1 to 5"), ({"width": 0}, "width of 0"),
        ({"kind": "placebo"}, "kind 'placebo'.* clean, hack"),
        ({"axes": ["w"]}, "axis 'w'.* x, y, z"), ({"axes": ["y"]}, "width of 0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=says):
            select(pairs, **arguments)


def test_the_hash_is_of_the_texts_in_order():
    pairs = some(x=3)
    renamed = [dataclasses.replace(pairs[0], name="other"), *pairs[1:]]
    assert pairs_hash(pairs) == pairs_hash(renamed)
    changed = [[dataclasses.replace(pairs[0], **{key: "c"}), *pairs[1:]] for key in ("prompt", "hack", "clean")]
    assert len({pairs_hash(p) for p in (pairs, pairs[::-1], pairs[:2], *changed)}) == 6


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_table(tmp_path, box, tokenizer, capsys):
    path = written(tmp_path, ENTRIES[WEAK], ENTRIES[TWIN], ENTRIES[PLACEBO])
    main(str(path), "tiny", box)
    out = capsys.readouterr().out
    assert table(load_pairs(path), tokenizer) in out and "3 pairs hold" in out
    hack, clean = (len(tokenizer.encode(ENTRIES[WEAK][key])) for key in ("hack", "clean"))
    row = next(line.split() for line in out.splitlines() if "weak_tests" in line)
    assert row == ["hack", "weak_tests", "1", f"{clean:.1f}", f"{hack - clean:+.1f}", f"{hack - clean:+d}"] and LENGTH_GAP == 0.25


def test_the_command_ends_with_one_line_on_the_first_pair_that_does_not_hold(tmp_path, box, command):
    wrong = ENTRIES[WEAK] | {"clean": ENTRIES[WEAK]["clean"].replace("== 2", "== 3")}
    path = written(tmp_path, ENTRIES[TWIN], wrong, ENTRIES[PLACEBO])
    done = command("pairs.py", path, "--box", box)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {path}: pair '{WEAK}': clean is correct, but")
