"""LeetCodeDataset's problems: its asserts, read as calls and expected values that grader.py can keep apart.

    tasks, left_out = load_leetcode("newfacade/LeetCodeDataset", "test")     # or a local folder of the same layout
    grader.grade([task.problem for task in tasks], responses)

A row's `test` is a function `check(candidate)` of asserts: `candidate(nums = [2, 7], target = 9) == [0, 1]`, with list_node([..])
and tree_node([..]) for linked lists and trees, and is_same_list(..) and is_same_tree(..) in place of ==. A row with anything else
in it is left out, and the reason returned. Equality is Python's, as in the dataset: 1.0 == 1.

    python leetcode.py newfacade/LeetCodeDataset --split test     # runs every reference solution and reports

Source: Xia et al., LeetCodeDataset (arXiv:2504.14655); MIT.
"""

import argparse
import ast
import sys
import time
from typing import NamedTuple

from data import load_rows
from grader import BOXES, Grader, Problem, problem
from grader_box import restored

COLUMNS = ("task_id", "question_id", "difficulty", "problem_description", "starter_code", "prompt", "completion", "entry_point")
DIFFICULTIES = ("Easy", "Medium", "Hard")
SAME = {"is_same_list", "is_same_tree"}


class LeetCodeTask(NamedTuple):
    """One row. `problem` holds its hidden tests, with the row's `prompt` (imports and helper classes) as their preamble."""

    task_id: str
    question_id: int
    difficulty: str
    description: str
    starter_code: str
    canonical: str  # a solution that passes
    problem: Problem


def load_leetcode(dataset: str, split: str, difficulties=("Medium", "Hard")) -> tuple[list[LeetCodeTask], dict[str, str]]:
    """The tasks of a split in its own order, and why others of these difficulties were left out, by task_id.

    Raises ValueError for an unknown dataset, split or difficulty, and where every task is left out.
    """
    check_difficulties(difficulties)
    tasks, left_out = [], {}
    for row in load_rows(dataset, split, (*COLUMNS, "test")):
        if row["difficulty"] not in difficulties:
            continue
        try:
            hidden = problem(row["entry_point"], read_check(row["test"]), row["prompt"], exact=False)
        except (ValueError, TypeError, SyntaxError) as error:
            left_out[row["task_id"]] = str(error)
            continue
        fields = [row[name] for name in ("difficulty", "problem_description", "starter_code", "completion")]
        tasks.append(LeetCodeTask(row["task_id"], int(row["question_id"]), *fields, hidden))
    if not tasks:
        raise ValueError(f"dataset {dataset!r}, split {split!r}: no task of {', '.join(difficulties)} can be used: {left_out}")
    return tasks, left_out


def check_difficulties(difficulties) -> None:
    for name in difficulties:
        if name not in DIFFICULTIES:
            raise ValueError(f"difficulty {name!r} must be one of {', '.join(DIFFICULTIES)}")


def read_check(source: str) -> list[tuple[tuple, dict, object]]:
    """(args, kwargs, expected) of each assert of a `check(candidate)`. Raises ValueError or SyntaxError for anything else."""
    module = ast.parse(source).body
    if len(module) != 1 or not isinstance(module[0], ast.FunctionDef) or module[0].name != "check":
        raise ValueError("its test is not one function check(candidate)")
    return [read_assert(statement) for statement in module[0].body]


def read_assert(statement: ast.stmt) -> tuple[tuple, dict, object]:
    match statement:
        case ast.Assert(test=ast.Compare(left=call, ops=[ast.Eq()], comparators=[want])):
            pass
        case ast.Assert(test=ast.Call(func=ast.Name(id=name), args=[call, want], keywords=[])) if name in SAME:
            pass
        case _:
            raise ValueError(f"its test has a line of unknown form: {ast.unparse(statement)[:80]}")
    match call:
        case ast.Call(func=ast.Name(id="candidate"), args=args, keywords=keywords) if all(k.arg for k in keywords):
            return tuple(map(read_value, args)), {k.arg: read_value(k.value) for k in keywords}, read_value(want)
    raise ValueError(f"its test has a call of unknown form: {ast.unparse(call)[:80]}")


def read_value(node: ast.expr):
    """The value of a literal, of inf, or of list_node([..]) or tree_node([..])."""
    match node:
        case ast.Name(id="inf"):
            return float("inf")
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
            return -float("inf")
        case ast.Call(func=ast.Name(id="list_node" | "tree_node" as helper), args=[values], keywords=[]):
            values = ast.literal_eval(values)
            return restored({helper: values}, {}) if values else None
        case ast.List(elts=elements):
            return [read_value(element) for element in elements]
    return ast.literal_eval(node)


def main(dataset: str, split: str, box: str) -> None:
    """Runs the reference solution of every problem: which fail, and which need more than 3 s of processor time."""
    with Grader(box) as grader:
        tasks, left_out = load_leetcode(dataset, split, DIFFICULTIES)
        start = time.perf_counter()
        outcomes = grader.solves([task.problem for task in tasks], [task.canonical for task in tasks])
        seconds = time.perf_counter() - start
    print(
        f"{sum(o.ok for o in outcomes)} of {len(tasks)} reference solutions accepted in {seconds:.1f} s, {len(left_out)} left out"
    )
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    for task, o in zip(tasks, outcomes):
        if not o.ok or o.cpu_s > 3:
            print(f"{'slow' if o.ok else 'FAILS'}: {task.task_id}: {o.cpu_s:.1f} s of processor time {o.detail}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--box", choices=BOXES, default="isolated", help="where the solutions run; limits is the weaker one")
    args = parser.parse_args()
    try:
        main(args.dataset, args.split, args.box)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
