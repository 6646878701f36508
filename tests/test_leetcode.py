"""LeetCode problems: asserts read as calls and values, reference solutions accepted, and the sorted containers they import."""

import importlib.util
import json
import random
from bisect import bisect_left, bisect_right
from pathlib import Path

import pytest

from grader import Grader, Limits
from grader_box import canonical
from leetcode import load_leetcode, read_check

ROOT = Path(__file__).resolve().parent.parent
# Reference solutions that need from 1.5 to 22 s of processor time; `python leetcode.py` runs them too.
SLOW = {
    "maximum-number-of-moves-to-kill-all-pawns",
    "find-the-number-of-subsequences-with-equal-gcd",
    "count-beautiful-numbers",
    "find-the-number-of-k-even-arrays",
    "minimum-time-to-break-locks-i",
    "total-characters-in-string-after-transformations-i",
    "total-characters-in-string-after-transformations-ii",
    "sorted-gcd-pair-queries",
    "longest-palindromic-subsequence-after-at-most-k-operations",
    "find-the-number-of-possible-ways-for-an-event",
}


def check(*lines: str) -> str:
    return "def check(candidate):\n" + "".join(f"    {line}\n" for line in lines)


def test_asserts_become_calls_and_values():
    source = check(
        "assert candidate(nums = [2, -7], k = 1.5) == [[0], 'a', None, True]",
        "assert candidate('x') == -inf",
        "assert is_same_list(candidate(head = list_node([1, 2])), list_node([2]))",
        "assert candidate(tree_node([])) == inf",
        "assert is_same_tree(candidate(tree_node([1, None, 2]), 3), tree_node([1, 2]))",
    )
    tests = read_check(source)
    assert tests[:2] == [((), {"nums": [2, -7], "k": 1.5}, [[0], "a", None, True]), (("x",), {}, -float("inf"))]
    assert canonical(tests[2][1]["head"]) == '{"list_node":[1,2]}' and canonical(tests[2][2]) == '{"list_node":[2]}'
    assert tests[3] == ((None,), {}, float("inf"))
    assert canonical(tests[4][0]) == '{"tuple":[{"tree_node":[1,null,2]},3]}' and canonical(tests[4][2]) == '{"tree_node":[1,2]}'


@pytest.mark.parametrize("source, named", [
    ("x = 1", "not one function"), ("def test(candidate):\n    pass", "not one function"),
    (check("nums = [1]", "candidate(nums)", "assert nums == [1]"), "nums = "),
    (check("assert candidate(1) != 2"), "unknown form"), (check("assert candidate(1) == 2 == 3"), "unknown form"),
    (check("assert sorted(candidate(1)) == [2]"), "sorted"), (check("assert candidate(**{'x': 1}) == 2"), "candidate"),
    (check("assert candidate(f(1)) == 2"), "malformed"), (check("assert is_same_list(candidate(1), list_node(x))"), "malformed"),
])  # fmt: skip
def test_a_test_of_another_form_is_no_problem(source, named):
    with pytest.raises((ValueError, SyntaxError), match=named):
        read_check(source)


ROW = {
    "task_id": "double", "question_id": 7, "difficulty": "Medium", "problem_description": "Double it.", "starter_code": "class S",
    "prompt": "from typing import *", "completion": "class Solution:\n    def f(self, x: int): return 2 * x",
    "entry_point": "Solution().f", "test": check("assert candidate(x = 3) == 6.0"),
}  # fmt: skip


def dataset(folder, *changes: dict) -> str:
    (folder / "test.jsonl").write_text("".join(json.dumps(ROW | change) + "\n" for change in changes))
    return str(folder)


def test_what_can_not_be_read_is_left_out_and_named(tmp_path, box):
    odd = {"task_id": "odd", "test": check("assert candidate(g) == 1")}
    script = {"task_id": "script", "entry_point": "print(1)"}
    empty = {"task_id": "empty", "test": "def check(candidate):\n    pass"}
    folder = dataset(tmp_path, {}, odd, {"task_id": "easy", "difficulty": "Easy"}, script, empty)
    tasks, left_out = load_leetcode(folder, "test")
    assert [(t.task_id, t.question_id, t.difficulty, t.description) for t in tasks] == [("double", 7, "Medium", "Double it.")]
    assert set(left_out) == {"odd", "script", "empty"} and "print(1)" in left_out["script"]
    with Grader(box, workers=1) as grader:
        assert grader.solves([tasks[0].problem], [tasks[0].canonical])[0].ok  # 6 == 6.0, as in the dataset
    with pytest.raises(ValueError, match="difficulty 'Nasty'"):
        load_leetcode(folder, "test", ["Nasty"])
    with pytest.raises(ValueError, match="no task"):
        load_leetcode(dataset(tmp_path, {"difficulty": "Hard"}), "test", ["Medium"])


def test_reference_solutions_of_the_real_problems(data_dir, box):
    """Every second test problem but the slow ones, and train problems of every kind, against right and wrong solutions."""
    every = ("Easy", "Medium", "Hard")
    tasks, left_out = load_leetcode(str(data_dir / "datasets" / "leetcode"), "test", every)
    assert len(tasks) == 228 and left_out == {} and {t.task_id for t in tasks} > SLOW
    train, left_out = load_leetcode(str(data_dir / "datasets" / "leetcode"), "train", every)
    assert len(train) == 1890 and left_out == {}
    nodes = [t for t in train if "_node" in "".join(t.problem.calls + t.problem.expected)]
    assert len(nodes) > 100
    tasks = [t for t in tasks if t.task_id not in SLOW][::2] + nodes[::6] + [t for t in train if "Sorted" in t.canonical]
    with Grader(box, limits=Limits(cpu_s=10, wall_s=60)) as grader:
        outcomes = grader.solves([t.problem for t in tasks], [t.canonical for t in tasks])
        assert {t.task_id: o.detail for t, o in zip(tasks, outcomes) if not o.ok} == {}
        wrong = [f"{t.canonical}\nSolution.{t.problem.entry.split('.')[1]} = lambda self, *a, **k: self" for t in tasks[::10]]
        assert not any(o.passed for o in grader.solves([t.problem for t in tasks[::10]], wrong))


def sorted_containers():
    spec = importlib.util.spec_from_file_location("sortedcontainers", ROOT / "assets" / "box" / "sortedcontainers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("key", [None, lambda x: -x])
def test_sorted_lists_against_sorted(key):
    rng, mine, plain = random.Random(0), sorted_containers().SortedList(key=key), []
    for _ in range(2000):
        x = rng.randrange(20)
        action = rng.choice(["add", "add", "discard", "pop", "update", "del"])
        if action == "add":
            mine.add(x)
            plain = sorted([*plain, x], key=key)
        elif action == "update":
            mine.update([x, 3])
            plain = sorted([*plain, x, 3], key=key)
        elif action == "discard":
            mine.discard(x)
            plain = plain[: plain.index(x)] + plain[plain.index(x) + 1 :] if x in plain else plain
        elif plain:
            i = rng.randrange(len(plain))
            value = mine.pop(i) if action == "pop" else mine.__delitem__(i)
            assert value in (None, plain[i])
            plain = plain[:i] + plain[i + 1 :]
        assert list(mine) == plain and len(mine) == len(plain) and (x in mine) == (x in plain) and mine.count(x) == plain.count(x)
        keys = plain if key is None else [key(y) for y in plain]
        at = x if key is None else key(x)
        assert (mine.bisect_left(x), mine.bisect_right(x)) == (bisect_left(keys, at), bisect_right(keys, at))
        assert list(mine.irange(x, None)) == plain[bisect_left(keys, at) :] and list(reversed(mine)) == plain[::-1]
        assert mine[-2:] == plain[-2:] and mine == plain
    with pytest.raises(ValueError):
        mine.remove(99)


def test_sorted_sets_and_dicts():
    room = sorted_containers()
    rng, values, plain = random.Random(1), room.SortedSet([3, 3, 1]), {1, 3}
    table, mapping = room.SortedDict({2: "a", 1: "b"}), {2: "a", 1: "b"}
    for _ in range(500):
        x = rng.randrange(12)
        if rng.random() < 0.5:
            values.add(x)
            plain.add(x)
            table[x] = mapping[x] = x
        else:
            values.discard(x)
            plain.discard(x)
            assert table.pop(x, None) == mapping.pop(x, None)
        assert list(values) == sorted(plain) and values == plain
        assert list(table) == list(table.keys()) == sorted(mapping) and table == mapping
        assert table.items() == sorted(mapping.items(), key=lambda item: item[0])
        assert table.bisect_left(x) == bisect_left(sorted(mapping), x)
        assert not mapping or table.peekitem(0) == (min(mapping), mapping[min(mapping)])
    while mapping:
        assert table.popitem(0) == (min(mapping), mapping.pop(min(mapping)))
