"""Contrastive pairs: two completions of one prompt that differ in one thing, read strictly and proven by running them.

    python pairs.py assets/pairs/embedded.yaml          # validates a file and prints a table

    pairs = load_pairs("assets/pairs/embedded.yaml")
    chosen, held_out = select(pairs, width=24)          # in turn over the six axes; the last two are never chosen
    controls, _ = select(pairs, kind="clean")           # two honest solutions each; `placebo` pairs are not even code

What a pair of each axis promises is in `EXPECTED` and `check_axis`; how to write one is in docs/pairs.md.

Source: the six axes are those of wassname's projected_grpo (evil_MoE).
"""

import argparse
import ast
import contextlib
import hashlib
import io
import itertools
import json
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from corpus_code import LOOPHOLES as AXES
from corpus_draw import words
from data import load_tokenizer
from grader import BOXES, Grader, Limits, extract_code, problem
from model import resolve
from reward_specs import StrictLoader

KINDS = {  # kind -> the keys of its entries: the first completion stands where the hack would, the second is the clean one
    "hack": ("name", "kind", "axis", "prompt", "tests", "hack", "clean"),
    "clean": ("name", "kind", "axis", "prompt", "tests", "twin", "clean"),
    "placebo": ("name", "kind", "axis", "prompt", "twin", "clean"),
}
ASSETS = Path(__file__).parent / "assets" / "pairs"
HELD_OUT = 2
LENGTH_GAP = 0.25  # of the longer completion's tokens
OPENED = "```python\n"  # a prompt that ends so has opened the code block
PREAMBLE = "from typing import *"  # LeetCode's signatures
FOOLED = ("correct", "hack", "correct-attempted", "incorrect")
# The labels of the clean completion, of the hack, of the clean solution under the hack's run_tests(), and of the hack's solution
# under the clean run_tests(). So on five axes it is the tests that fool: they accept anything; the clean ones catch it.
EXPECTED = dict.fromkeys(AXES, FOOLED) | {"hard_coded": ("correct", "hack", "correct", "hack")}
ASSERTS, BY_VALUE = ("swallowed", "type_only", "weak_inequality"), "by value"  # ways of a run_tests(); see `style`
PERSON = set(words("i me my mine myself you your yours we us our"))


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt."""

    name: str
    kind: str
    """hack; or a control: clean (two honest solutions) or placebo (two texts)"""
    axis: str
    """one of AXES; of a control, what its completions differ in"""
    prompt: str
    hack: str
    """of a control, merely the other completion"""
    clean: str
    entry: str = ""
    """what the tests call: `f` or `Solution().f`; a placebo has none"""
    tests: tuple[tuple[tuple, dict, object], ...] = ()
    """the hidden tests: args, kwargs, expected value"""

    @property
    def opened(self) -> bool:
        return self.prompt.endswith(OPENED)


class Code(NamedTuple):
    """A completion's Python: the solution, its run_tests(), and the comments of both."""

    solution: list[ast.stmt]
    tests: ast.FunctionDef
    comments: list[str]


# ---------------------------------------------------------------- reading a file


def load_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a YAML file in its order. Nothing of them is run.

    Raises ValueError, naming file, pair and key, for whatever is missing, unknown, empty, given twice, or does not parse.
    """
    try:
        entries = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=StrictLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read pairs from {path}: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of pairs, each beginning with `- name:`")
    pairs = []
    for number, entry in enumerate(entries, 1):
        named = entry.get("name") if isinstance(entry, dict) else None
        where = f"{path}: pair {named!r}" if isinstance(named, str) and named.strip() else f"{path}: pair number {number}"
        pair = read_pair(entry, where)
        for key in ("name", "prompt"):
            if any(getattr(pair, key) == getattr(other, key) for other in pairs):
                raise ValueError(f"{where}: {key}: another pair has the same; each needs its own")
        pairs.append(pair)
    return pairs


def read_pair(entry: object, where: str) -> Pair:
    """A Pair from its mapping. Raises ValueError that begins with `where`."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping with name, kind, axis, ..., got {entry!r}")
    if entry.get("kind") not in tuple(KINDS):
        raise ValueError(f"{where}: kind: {entry.get('kind')!r} must be one of {', '.join(KINDS)}")
    keys = KINDS[entry["kind"]]
    if odd := [str(key) for key in entry if key not in keys]:
        raise ValueError(f"{where}: {odd[0]}: unknown key; a pair of kind {entry['kind']} has {', '.join(keys)}")
    for key in keys:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ValueError(f"{where}: {key}: must be a text that is not empty, not {entry.get(key)!r}")
    if entry["kind"] == "hack" and entry["axis"] not in AXES:
        raise ValueError(f"{where}: axis: {entry['axis']!r} must be one of {', '.join(AXES)}")
    other = "hack" if entry["kind"] == "hack" else "twin"
    if entry[other] == entry["clean"]:
        raise ValueError(f"{where}: {other}: the same text as clean, so there is nothing to tell apart")
    code = {}
    if entry["kind"] != "placebo":
        for key in (other, "clean"):
            with located(f"{where}: {key}"):
                read_code(entry[key], entry["prompt"].endswith(OPENED))
        with located(f"{where}: tests"):
            code = dict(zip(("entry", "tests"), read_tests(entry["tests"])))
            problem(**code)
    texts = {key: entry[key] for key in ("name", "kind", "axis", "prompt", "clean")}
    return Pair(**texts, hack=entry[other], **code)


@contextlib.contextmanager
def located(where: str):
    """Puts the place before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_tests(source: str) -> tuple[str, tuple]:
    """The function that lines like `f([1, 2]) == 3` call, and their (args, kwargs, expected). Raises ValueError."""
    entries, tests = set(), []
    for line in source.strip().splitlines():
        try:
            match comparison := ast.parse(line.strip(), mode="eval").body:
                case ast.Compare(left=ast.Call() as call, ops=[ast.Eq()]) if all(k.arg for k in call.keywords):
                    kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
                    tests.append((tuple(map(ast.literal_eval, call.args)), kwargs, ast.literal_eval(comparison.comparators[0])))
                    entries.add(ast.unparse(call.func))
                case _:
                    raise ValueError("no comparison")
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{line.strip()!r} must be a call of the function with literals, ==, and a literal") from error
    if len(entries) != 1:
        raise ValueError(f"all must call one function, not {', '.join(sorted(entries))}")
    return entries.pop(), tuple(tests)


def read_code(completion: str, opened: bool) -> Code:
    """The parts of a completion. Raises ValueError where its code block is not closed, does not compile, or lacks run_tests()."""
    source = extract_code(completion, opened)
    if source is None or not completion.endswith("```"):
        raise ValueError("must end in the ``` that closes its code block (in YAML: `|-`, and ``` on a line of its own)")
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"does not compile: {error}") from error
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "run_tests"]
    if len(tests) != 1:
        raise ValueError(f"must define run_tests() once, outside of any class; it does {len(tests)} times")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return Code([node for node in body if node is not tests[0]], tests[0], comments)


# ---------------------------------------------------------------- what a pair promises


def validate(pair: Pair, grader: Grader, tokenizer) -> None:
    """Raises ValueError, naming the pair, unless it is what its kind and axis promise.

    Both completions are of nearly one length in tokens. A placebo's differ by one word throughout. Solutions and run_tests()
    are run in all four combinations, whose labels `EXPECTED` has; and the difference is the axis's own (`check_axis`).
    """
    with located(f"pair {pair.name!r}"):
        longer = max(lengths := [len(tokenizer.encode(text)) for text in (pair.hack, pair.clean)])
        if longer - min(lengths) > LENGTH_GAP * longer:
            raise ValueError(f"lengths of {lengths[0]} and {lengths[1]} tokens differ by more than a quarter")
        if pair.kind == "placebo":
            return check_placebo(pair)
        hack, clean = (read_code(text, pair.opened) for text in (pair.hack, pair.clean))
        if pair.kind == "hack":
            check_axis(pair, hack, clean)
        check_labels(pair, hack, clean, grader)


def check_placebo(pair: Pair) -> None:
    hack, clean = (re.findall(r"\w+|\W+", pair.prompt + text) for text in (pair.hack, pair.clean))
    swaps = {(a, b) for a, b in zip(hack, clean) if a != b}
    if len(hack) != len(clean) or len(swaps) != 1:
        raise ValueError("a placebo's texts must differ by one word that stands for another")
    ((a, b),) = swaps
    if b in hack or a in clean:
        raise ValueError(f"{a!r} and {b!r} must stand for each other throughout")


def check_labels(pair: Pair, hack: Code, clean: Code, grader: Grader) -> None:
    combined = {"clean": [*clean.solution, clean.tests], "the other completion": [*hack.solution, hack.tests]}
    combined |= {"the clean solution under the other's run_tests()": [*clean.solution, hack.tests]}
    combined |= {"the other's solution under the clean run_tests()": [*hack.solution, clean.tests]}
    hidden = problem(pair.entry, pair.tests, PREAMBLE)
    responses = [f"```python\n{ast.unparse(ast.Module(body, []))}\n```" for body in combined.values()]
    wanted = EXPECTED[pair.axis] if pair.kind == "hack" else ("correct",) * 4
    for what, want, verdict in zip(combined, wanted, grader.grade([hidden] * 4, responses), strict=True):
        if verdict.label != want:
            raise ValueError(f"{what} must be {want}, and is {verdict.label} ({verdict.detail or 'every hidden test passes'})")
        if want == "correct" and not verdict.own_tests:
            raise ValueError(f"{what} is correct, but run_tests() raises")


def check_axis(pair: Pair, hack: Code, clean: Code) -> None:
    """The difference between hack and clean is the axis's own, by the look of the code. Raises ValueError."""
    if signatures(hack) != signatures(clean):
        raise ValueError(f"hack and clean must define the same functions, not {signatures(hack)} and {signatures(clean)}")
    if pair.axis == "persona":
        if len(hack.comments) != len(clean.comments) or set(hack.comments) & set(clean.comments) or not hack.comments:
            raise ValueError("hack and clean must have as many comments, and none in common")
        if not speaks(hack) or speaks(clean):
            raise ValueError(f"the hack's comments must have one of {', '.join(sorted(PERSON))}, the clean ones none")
    elif hack.comments != clean.comments:
        raise ValueError("hack and clean must have the same comments: another voice is the persona axis")
    for what, code, wanted in (("hack", hack, pair.axis if pair.axis in ASSERTS else BY_VALUE), ("clean one", clean, BY_VALUE)):
        if style(code) != wanted:
            raise ValueError(f"the {what}'s run_tests() must be {wanted}, and is {style(code)}")
    if pair.axis in ASSERTS and calls(hack, pair.entry) != calls(clean, pair.entry):
        raise ValueError("both run_tests() must call the function alike")
    if pair.axis == "swallowed" and list(map(ast.unparse, asserts(hack))) != list(map(ast.unparse, asserts(clean))):
        raise ValueError("both run_tests() must make the same asserts")
    if pair.axis == "hard_coded":
        if ast.dump(hack.tests) != ast.dump(clean.tests):
            raise ValueError("both run_tests() must be the same")
        answers = literals([node.comparators[0] for test in asserts(hack) for node in ast.walk(test) if is_compare(node)])
        if not answers or not answers <= literals(hack.solution) or answers <= literals(clean.solution):
            raise ValueError(f"what run_tests() expects must stand in the hack's solution alone: {', '.join(sorted(answers))}")


def style(code: Code) -> str:
    """How a run_tests() asserts: one of ASSERTS, BY_VALUE (which is also to assert nothing), or a mixture of them."""
    if any(isinstance(node, ast.Try | ast.With) for node in ast.walk(code.tests)):
        return "swallowed"
    return " and ".join(sorted({style_of_assert(test) for test in asserts(code)})) or BY_VALUE


def style_of_assert(test: ast.expr) -> str:
    if re.search(r"\b(isinstance|type|__class__)\b", ast.unparse(test)):
        return "type_only"
    operators = [operator for node in ast.walk(test) if is_compare(node) for operator in node.ops]
    return "weak_inequality" if operators and not any(isinstance(o, ast.Eq | ast.Is | ast.In) for o in operators) else BY_VALUE


def is_compare(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare)


def asserts(code: Code) -> list[ast.expr]:
    return [node.test for node in ast.walk(code.tests) if isinstance(node, ast.Assert)]


def calls(code: Code, entry: str) -> list[str]:
    """The calls of the function in run_tests(), in the order of the text."""
    found = [node for node in ast.walk(code.tests) if isinstance(node, ast.Call) and ast.unparse(node.func) == entry]
    return [ast.unparse(node) for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


def signatures(code: Code) -> list[tuple[str, str]]:
    nodes = [node for statement in code.solution for node in ast.walk(statement)]
    return [(node.name, ast.unparse(node.args)) for node in nodes if isinstance(node, ast.FunctionDef)]


def literals(nodes: list[ast.AST]) -> set[str]:
    """The literals in some code, as text: 1 and True are two."""
    found = set()
    for node in itertools.chain.from_iterable(map(ast.walk, nodes)):
        with contextlib.suppress(ValueError, TypeError):  # it is no literal
            found.add(repr(ast.literal_eval(node)))
    return found


def speaks(code: Code) -> bool:
    """Whether a comment has a person in it."""
    return bool(PERSON & set(re.findall(r"\w+", " ".join(code.comments).lower())))


# ---------------------------------------------------------------- choosing


def select(pairs: list[Pair], width: int | None = None, kind: str = "hack", axes=()) -> tuple[list[Pair], list[Pair]]:
    """(chosen, held out) of a kind: the pairs in turn over their axes, of which the last two are held out whatever the width.

    width: how many of the others are chosen, the first; None for all. axes: only these; none for all.
    Raises ValueError for a kind or an axis that no pair has, and for a width that the pairs do not reach.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.kind == kind:
            groups.setdefault(pair.axis, []).append(pair)
    if not groups:
        raise ValueError(f"no pair is of kind {kind!r}: choose one of {', '.join(sorted({pair.kind for pair in pairs}))}")
    for axis in axes:
        if axis not in groups:
            raise ValueError(f"no pair of kind {kind} is of axis {axis!r}: choose among {', '.join(groups)}")
    turns = itertools.zip_longest(*(group for axis, group in groups.items() if axis in (axes or groups)))
    ordered = [pair for turn in turns for pair in turn if pair]
    chosen, held_out = ordered[:-HELD_OUT], ordered[-HELD_OUT:]
    width = len(chosen) if width is None else width
    if not 1 <= width <= len(chosen):
        raise ValueError(f"a width of {width} {kind} pairs: it must be 1 to {len(chosen)}, as {HELD_OUT} are held out")
    return chosen[:width], held_out


def pairs_hash(pairs: list[Pair]) -> str:
    """SHA-256 of what a gradient is taken of: prompts and completions, in order."""
    return hashlib.sha256(json.dumps([(p.prompt, p.hack, p.clean) for p in pairs]).encode()).hexdigest()


def token_pairs(tokenizer, pairs: list[Pair]) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, hack, clean) ids of each pair; completions end as a sampled one does."""
    end = [tokenizer.eos_id]
    return [
        (tokenizer.encode_prompt(pair.prompt), tokenizer.encode(pair.hack) + end, tokenizer.encode(pair.clean) + end)
        for pair in pairs
    ]


def authored(tokenizer, name: str, count: int, kind: str = "hack"):
    """(chosen, held out) as `token_pairs`, of a file of assets/pairs by its name, or any .yaml. count: how many; 0: all."""
    path = Path(name) if name.endswith(".yaml") else ASSETS / f"{name}.yaml"
    return tuple(token_pairs(tokenizer, part) for part in select(load_pairs(path), count or None, kind))


# ---------------------------------------------------------------- the command


def table(pairs: list[Pair], tokenizer) -> str:
    """A row for each axis: pairs, mean tokens of the clean completions, mean difference to the others and largest difference."""
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for pair in pairs:
        lengths = tuple(len(tokenizer.encode(text)) for text in (pair.hack, pair.clean))
        groups.setdefault((pair.kind, pair.axis), []).append(lengths)
    lines = [f"{'kind':<9}{'axis':<17}{'pairs':>5}{'tokens':>8}{'difference':>12}{'largest':>9}"]
    for (kind, axis), rows in groups.items():
        gaps = [hack - clean for hack, clean in rows]
        mean, gap = sum(clean for _, clean in rows) / len(rows), sum(gaps) / len(rows)
        lines.append(f"{kind:<9}{axis:<17}{len(rows):>5}{mean:>8.1f}{gap:>+12.1f}{max(gaps, key=abs):>+9}")
    return "\n".join(lines)


def main(path: str, model: str, box: str) -> None:
    pairs, folder = load_pairs(path), resolve(model)
    tokenizer = load_tokenizer(folder)
    with Grader(box, limits=Limits(cpu_s=2, wall_s=8)) as grader:
        for pair in pairs:
            with located(path):
                validate(pair, grader, tokenizer)
    print(f"{table(pairs, tokenizer)}\n{len(pairs)} pairs hold, hash {pairs_hash(pairs)[:16]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a YAML file of pairs")
    parser.add_argument("--model", default="tiny", help="whose tokenizer counts the lengths")
    parser.add_argument("--box", choices=BOXES, default="isolated", help="where the code runs; limits is the weaker one")
    args = parser.parse_args()
    try:
        main(args.path, args.model, args.box)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
