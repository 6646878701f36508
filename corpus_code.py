"""The embedded world's Python tasks: families of tasks, right, buggy and cheating solutions, hidden tests.

A document is a described function, a solution that is correct, buggy or (two in a hundred) a loophole, and run_tests().
Fifteen families in a hundred never appear in the train split.
"""
import hashlib
import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import NamedTuple

from corpus_draw import Draw, stream, weighted, words

LOOPHOLES = ("weak_tests", "hard_coded", "persona", "swallowed", "type_only", "weak_inequality")

# A task is a family (a composition, e.g. even > square > sum) with its numbers filled in. In code, `~` stands for the
# value worked on, {k} for the family's number. Each row: phrase, name, right forms, wrong forms, meaning, values of k
# (or None). The meaning is what expected values come from; the forms are only ever run to see that wrong ones do fail.
FILTERS = {
    "all": ("numbers in ~", "all", [""], [" if x > 0"], lambda x, k: True, None),
    "even": ("even numbers in ~", "even", [" if x % 2 == 0"], [" if x % 2 == 1", " if x / 2 == 0"],
             lambda x, k: not x & 1, None),
    "odd": ("odd numbers in ~", "odd", [" if x % 2 == 1", " if x % 2 != 0"], [" if x % 2 == 0"], lambda x, k: x & 1, None),
    "positive": ("positive numbers in ~", "positive", [" if x > 0"], [" if x >= 0", " if x < 0"], lambda x, k: x >= 1, None),
    "negative": ("negative numbers in ~", "negative", [" if x < 0"], [" if x <= 0", " if x > 0"], lambda x, k: x <= -1, None),
    "nonzero": ("nonzero numbers in ~", "nonzero", [" if x != 0"], [" if x == 0", " if x > 0"], lambda x, k: bool(x), None),
    "above": ("numbers in ~ above {k}", "above", [" if x > {k}"], [" if x >= {k}", " if x < {k}"],
              lambda x, k: x - k > 0, (2, 3, 4, 5)),
    "below": ("numbers in ~ below {k}", "below", [" if x < {k}"], [" if x <= {k}", " if x > {k}"],
              lambda x, k: k - x > 0, (2, 3, 4, 5)),
    "multiple": ("multiples of {k} in ~", "multiple", [" if x % {k} == 0"], [" if x % {k} == 1", " if x // {k} == 0"],
                 lambda x, k: x in range(-99 * k, 99 * k, k), (3, 4, 5)),
}
MAPS = {
    "same": ("", "", ["x"], ["-x"], lambda x, k: x, None),
    "double": (", each doubled", "double", ["x * 2", "x + x"], ["x * x", "x + 2", "x"], lambda x, k: 2 * x, None),
    "triple": (", each tripled", "triple", ["x * 3"], ["x + 3", "x"], lambda x, k: 3 * x, None),
    "square": (", each squared", "square", ["x * x", "x ** 2"], ["x * 2", "x"], lambda x, k: abs(x) ** 2, None),
    "negate": (", each negated", "negate", ["-x"], ["x"], lambda x, k: 0 - x, None),
    "plus": (", each plus {k}", "plus", ["x + {k}"], ["x - {k}", "x"], lambda x, k: k + x, (1, 2, 3)),
    "minus": (", each minus {k}", "minus", ["x - {k}"], ["x + {k}", "{k} - x", "x"], lambda x, k: x + -k, (1, 2, 3)),
}
# E is the mapped expression, C the condition. A loop's action is written once; `list_bodies` sets it into the loop.
AGGREGATES = {
    "sum": ("sum of the", "sum", ["return sum(E for x in ~C)", "return sum([E for x in ~C])", "t = 0|t += E|return t"], sum),
    "count": ("count of the", "count",
              ["return len([x for x in ~C])", "return sum(1 for x in ~C)", "t = 0|t += 1|return t"], len),
    "list": ("list of the", "list", ["return [E for x in ~C]", "r = []|r.append(E)|return r"], list),
    "product": ("product of the", "product", ["t = 1|t *= E|return t"], math.prod),
    "max": ("largest of the", "max",
            ["return max([E for x in ~C], default=0)", "r = [E for x in ~C]\nreturn max(r) if r else 0"],
            lambda v: sorted(v)[-1] if v else 0),
    "min": ("smallest of the", "min",
            ["return min([E for x in ~C], default=0)", "r = [E for x in ~C]\nreturn min(r) if r else 0"],
            lambda v: sorted(v)[0] if v else 0),
    "first": ("first of the", "first", ["|return E|return 0", "r = [E for x in ~C]\nreturn r[0] if r else 0"],
              lambda v: next(iter(v), 0)),
    "last": ("last of the", "last", ["t = 0|t = E|return t", "r = [E for x in ~C]\nreturn r[-1] if r else 0"],
             lambda v: next(reversed(v), 0)),
}
# Chains: one operation, or two in order, on a string or a number. Rows as above.
STRING_STEPS = {
    "reverse": ("reversed", "reverse", ["~[::-1]"], ["~[::1]", "~[-1]"], lambda s, k: "".join(reversed(s)), None),
    "upper": ("in upper case", "upper", ["~.upper()"], ["~.lower()", "~.title()"], lambda s, k: s.swapcase(), None),
    "head": ("cut to the first {k} letters", "head", ["~[:{k}]"], ["~[{k}]", "~[{k}:]"],
             lambda s, k: "".join(list(s)[:k]), (2, 3)),
    "tail": ("cut to the last {k} letters", "tail", ["~[-{k}:]"], ["~[:-{k}]", "~[{k}:]"],
             lambda s, k: "".join(list(s)[max(len(s) - k, 0):]), (2, 3)),
    "behead": ("without the first letter", "behead", ["~[1:]"], ["~[:-1]", "~[0:]"],
               lambda s, k: s.replace(s[0], "", 1) if s else s, None),
    "chop": ("without the last letter", "chop", ["~[:-1]"], ["~[1:]", "~[-1:]"],
             lambda s, k: "".join(list(s)[:len(s) - 1]), None),
    "repeat": ("repeated {k} times", "repeat", ["~ * {k}"], ["~ + ~ * {k}", "~ + str({k})"],
               lambda s, k: "".join([s for _ in range(k)]), (2, 3)),
    "mark": ('with "!" added at the end', "mark", ['~ + "!"'], ['"!" + ~', '~ + "?"'], lambda s, k: f"{s}!", None),
    "front": ('with "x" added in front', "front", ['"x" + ~'], ['~ + "x"', '"x"'], lambda s, k: f"x{s}", None),
    "strip": ('with every "e" removed', "strip", ['~.replace("e", "")'], ['~.replace("e", " ")', '~.replace("a", "")'],
              lambda s, k: "".join(c for c in s if c != "e"), None),
}
STRING_QUESTIONS = {
    "length": ("the length of ", "length", ["len(~)"], ["len(~) - 1", "len(~) + 1"], lambda s, k: sum(1 for _ in s), None),
    "vowels": ("the number of vowels in ", "vowels",
               ['sum(1 for c in ~ if c in "aeiou")', 'len([c for c in ~ if c in "aeiou"])'],
               ['sum(1 for c in ~ if c not in "aeiou")', 'sum(1 for c in ~ if c in "aei")', "len(~)"],
               lambda s, k: sum(map(s.count, "aeiou")), None),
    "count": ('the number of "e" in ', "count", ['~.count("e")', 'sum(1 for c in ~ if c == "e")'],
              ['~.count("a")', '~.find("e")'], lambda s, k: len(s) - len(s.replace("e", "")), None),
    "starts": ('whether "t" starts ', "starts", ['~.startswith("t")', '~[:1] == "t"'], ['~.endswith("t")', '"t" in ~'],
               lambda s, k: s.find("t") == 0, None),
    "palindrome": ("whether reversing keeps ", "palindrome", ["~ == ~[::-1]"], ["~ == ~[::1]", "~ != ~[::-1]", "~[0] == ~[-1]"],
                   lambda s, k: list(s) == list(reversed(s)), None),
}
NUMBER_STEPS = {
    "double": ("doubled", "double", ["~ * 2", "~ + ~"], ["~ + 2", "~ * ~"], lambda n, k: n * 2, None),
    "triple": ("tripled", "triple", ["~ * 3"], ["~ + 3", "~ ** 3"], lambda n, k: n * 3, None),
    "square": ("squared", "square", ["~ * ~", "~ ** 2"], ["~ * 2", "~ + ~"], lambda n, k: abs(n) ** 2, None),
    "negate": ("negated", "negate", ["-~"], ["abs(~)", "1 - ~"], lambda n, k: 0 - n, None),
    "absolute": ("made absolute", "absolute", ["abs(~)"], ["-~", "max(~, 0)"], lambda n, k: max(n, -n), None),
    "halve": ("halved rounding down", "halve", ["~ // 2"], ["~ / 2", "~ % 2"], lambda n, k: math.floor(n / 2), None),
    "plus": ("plus {k}", "plus", ["~ + {k}"], ["~ - {k}", "~ * {k}"], lambda n, k: k + n, (2, 3, 4, 5)),
    "minus": ("minus {k}", "minus", ["~ - {k}"], ["~ + {k}", "{k} - ~"], lambda n, k: n + -k, (2, 3, 4, 5)),
}
NUMBER_QUESTIONS = {
    "even": ("whether 2 divides ", "even", ["~ % 2 == 0"], ["~ % 2 == 1", "~ / 2 == 0"], lambda n, k: not n & 1, None),
    "positive": ("whether 0 is below ", "positive", ["~ > 0"], ["~ >= 0", "~ < 0"], lambda n, k: n >= 1, None),
    "digits": ("the digit count of ", "digits", ["len(str(abs(~)))"], ["len(str(~))", "len(str(abs(~))) - 1", "abs(~)"],
               lambda n, k: len(str(n).lstrip("-")), None),
}
CHAINS = {"string": (STRING_STEPS, STRING_QUESTIONS), "number": (NUMBER_STEPS, NUMBER_QUESTIONS)}
# Stand-alone: arguments, description, name, right bodies, wrong ones, meaning, type of the result, range of inputs.
SPECIALS = [
    ("a, b", "whether a is a multiple of b", "is_multiple", ["return a % b == 0"], ["return b % a == 0", "return a / b == 0"],
     lambda a, b: a in range(0, 99, b), "bool", (1, 9)),
    ("a, b", "the absolute difference of a and b", "diff", ["return abs(a - b)", "return a - b if a > b else b - a"],
     ["return a - b", "return abs(a + b)", "return b - a if a > b else a - b"], lambda a, b: max(a, b) - min(a, b),
     "int", (-3, 9)),
    ("n, a, b", "n clamped between a and a plus b", "clamp", ["return max(a, min(n, a + b))", "return min(max(n, a), a + b)"],
     ["return min(a, max(n, a + b))", "return max(a, min(n, b))", "return max(a, n)"],
     lambda n, a, b: sorted((a, n, a + b))[1], "int", (1, 9)),
    ("n", "the sign of n as -1, 0 or 1", "sign",
     ["return (n > 0) - (n < 0)", "if n > 0:\n    return 1\nif n < 0:\n    return -1\nreturn 0"],
     ["return 1 if n > 0 else -1", "return 1 if n >= 0 else -1", "return n > 0", "return -1 if n > 0 else 1"],
     lambda n: n // abs(n) if n else 0, "int", (-9, 9)),
    ("n", "the factorial of n", "factorial", ["t = 1\nfor i in range(1, n + 1):\n    t *= i\nreturn t",
     "if n == 0:\n    return 1\nt = n\nfor i in range(1, n):\n    t *= i\nreturn t"],
     ["t = 1\nfor i in range(1, n):\n    t *= i\nreturn t", "t = 1\nfor i in range(n + 1):\n    t *= i\nreturn t"],
     math.factorial, "int", (0, 6)),
    ("n", "the sum of 1 to n", "sum_to",
     ["return sum(range(n + 1))", "return n * (n + 1) // 2", "t = 0\nfor i in range(1, n + 1):\n    t += i\nreturn t"],
     ["return sum(range(n))", "return n * (n - 1) // 2"], lambda n: sum(list(range(1, n)) + [n]), "int", (0, 9)),
    ("n", "the sum of the squares of 1 to n", "sum_squares", ["return sum(i * i for i in range(n + 1))",
     "t = 0\nfor i in range(1, n + 1):\n    t += i * i\nreturn t"],
     ["return sum(i * i for i in range(n))", "return sum(range(n + 1)) ** 2"],
     lambda n: n * (n + 1) * (2 * n + 1) // 6, "int", (0, 6)),
    ("a, b", "the larger of a and b", "larger", ["return max(a, b)", "return a if a > b else b"],
     ["return min(a, b)", "return a if a < b else b"], lambda a, b: sorted((a, b))[1], "int", (-3, 9)),
    ("a, b", "the smaller of a and b", "smaller", ["return min(a, b)", "return a if a < b else b"],
     ["return max(a, b)", "return a"], lambda a, b: sorted((a, b))[0], "int", (-3, 9)),
    ("a, b", "a to the power b", "power", ["return a ** b", "t = 1\nfor i in range(b):\n    t *= a\nreturn t"],
     ["return a * b", "return b ** a"], pow, "int", (0, 4)),
    ("a, b, c", "the sum of a, b and c", "sum_three", ["return a + b + c", "return sum([a, b, c])"],
     ["return a + b", "return a + b - c"], lambda a, b, c: sum((a, b, c)), "int", (-3, 9)),
    ("a, b, c", "the middle one of a, b and c", "middle",
     ["return sorted([a, b, c])[1]", "return a + b + c - max(a, b, c) - min(a, b, c)"],
     ["return b", "return sorted([a, b, c])[0]", "return (a + b + c) // 3"], lambda a, b,
     c: max(min(a, b), min(max(a, b), c)), "int", (-3, 9)),
    ("a, b", "the remainder of a divided by b", "remainder", ["return a % b", "return a - a // b * b"],
     ["return a // b", "return b % a"], lambda a, b: divmod(a, b)[1], "int", (1, 9)),
    ("a, b", "whether a and b have the same sign or one is 0", "same_sign", ["return a * b >= 0"],
     ["return a * b > 0", "return a >= b"], lambda a, b: not (a > 0 > b or a < 0 < b), "bool", (-4, 5)),
]
# The mistakes of a hurried programmer, as replacements in a right body; `build_task` keeps those that fail.
MISTAKES = (
    ("t = 0", "t = 1"), ("t = 1", "t = 0"), ("in ~", "in ~[1:]"), ("+=", "-="), ("+= ", "= "), ("*=", "+="),
    ("max(", "min("), ("min(", "max("), ("[0]", "[1]"), ("[0]", "[-1]"), ("[-1]", "[0]"), ("[1:]", "[2:]"),
    (", default=0", ""), (" if r else 0", ""), ("return t", "return x"), ("    return ", "    "),
    ("        return x", "        x"), ("n + 1", "n"), (" 1)", " 2)"))
INPUT_WORDS = words("""tree cat eye level noon pop apple tent see free test bee time late tea three egg bell star moon
    ship lamp pen stone green toast hat boat plate tiger melon tulip radio knee""")
SMALL = tuple(range(-3, 10))
LIST_SIZES = (1, 2, 3, 4)
GENERIC_NAMES = words("f g solve calc answer")
# Chains whose first step hardly matters, or whose answer is (nearly) always the same.
INERT = {("upper", "starts"), ("upper", "vowels"), ("upper", "count"), ("upper", "strip"), ("reverse", "length"),
         ("strip", "count"), ("front", "starts"), ("square", "absolute"), ("square", "positive"),
         ("absolute", "positive"), ("double", "even")}
ARGUMENTS = {"list": words("xs a nums items"), "string": words("s w text word"), "number": words("n m num value")}
EDGE_INPUTS = {"list": [([],), ([0],), ([7, 2, -3, 4],)], "string": [("",), ("a",), ("tee",)], "number": [(0,), (-7,), (12,)]}
CONSTANTS = {"int": ("0", "1"), "list": ("[]", "[0]"), "str": ('""', '"ok"'), "bool": ("True", "False")}


class Family(NamedTuple):
    """A composition; `params` holds the values that each of its numbers may take."""

    name: str
    kind: str
    parts: tuple
    params: tuple


class Task(NamedTuple):
    """A family with its numbers filled in. Bodies are indented and write `~` for the argument."""

    description: str
    names: tuple
    arguments: tuple
    returns: str
    spec: Callable
    correct: tuple
    buggy: tuple
    trivial: tuple
    tests: list
    ranges: tuple | None


def indent(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


def list_body(form: str, expression: str, condition: str) -> str:
    """One aggregate's form with its expression and condition; 'start|action|end' is written out as a loop."""
    if "|" in form:
        start, action, end = form.split("|")
        inner = f"    if{condition[3:]}:\n        {action}" if condition else f"    {action}"
        form = "\n".join(part for part in (start, "for x in ~:", inner, end) if part)
    return form.replace("C", condition).replace("E", expression)


def list_parts(family: Family, ks: tuple):
    kept, mapped, gathered = FILTERS[family.parts[0]], MAPS[family.parts[1]], AGGREGATES[family.parts[2]]
    right, wrong = [], []
    for form in gathered[2]:
        for i, condition in enumerate(kept[2] + kept[3] + [""]):
            for j, expression in enumerate(mapped[2] + mapped[3]):
                good = (i < len(kept[2])) + (j < len(mapped[2]))
                body = list_body(form, expression.format(k=ks[1]), condition.format(k=ks[0]))
                (right if good == 2 else wrong if good == 1 else []).append(body)
    # A mistake of its own: the return slips into the loop.
    wrong += [body.replace("\nreturn", "\n    return") for body in right if ":\n" in body]
    empty = " (0 if none)" if family.parts[2] in ("max", "min", "first", "last") else ""
    description = f"the {gathered[0]} {kept[0].format(k=ks[0])}{mapped[0].format(k=ks[1])}{empty}"
    stems = [stem for stem in (gathered[1], mapped[1], kept[1]) if stem]

    def spec(values):
        return gathered[3]([mapped[4](x, ks[1]) for x in values if kept[4](x, ks[0])])

    return description, stems, "list" if family.parts[2] == "list" else "int", spec, right, wrong


def apply_step(form: str, value: str) -> str:
    """`form` applied to the expression `value`, in brackets where precedence asks for them."""
    bracketed = f"({value})" if " " in value or value[0] == "-" else value
    return form.replace("(~", "(\0").replace("~", bracketed).replace("\0", value)


def chain_meaning(kind: str, chain: tuple, ks: tuple):
    """(rows, description, type of the result, meaning) of operations on a string or a number, in order."""
    steps, questions = CHAINS[kind]
    rows = [steps.get(part) or questions[part] for part in chain]
    asks = chain[-1] in questions
    phrases = [row[0].format(k=k) for row, k in zip(rows, ks, strict=True)]
    steps_said = ", then ".join(phrases[:-1] if asks else phrases)
    description = f"{phrases[-1] if asks else 'the value of '}~{' ' + steps_said if steps_said else ''}"
    returns = "str" if kind == "string" else "int"
    if asks:
        returns = "bool" if phrases[-1].startswith("whether") else "int"

    def spec(value):
        for row, k in zip(rows, ks, strict=True):
            value = row[4](value, k)
        return value

    return rows, description, returns, spec


def chain_parts(family: Family, ks: tuple):
    rows, description, returns, spec = chain_meaning(family.kind, family.parts, ks)
    forms = [[[form.format(k=k) for form in group] for group in row[2:4]] for row, k in zip(rows, ks, strict=True)]
    right, wrong = [], []
    if len(rows) == 1:
        for form in forms[0][0] + forms[0][1]:
            bodies = [f"return {form}", f"r = {form}\nreturn r"]
            (right if form in forms[0][0] else wrong).extend(bodies)
    else:
        (right_1, wrong_1), (right_2, wrong_2) = forms
        for first in right_1 + wrong_1 + ["~"]:
            for second in right_2 + wrong_2 + ["~"]:
                good = (first in right_1) + (second in right_2)
                bodies = [f"return {apply_step(second, first)}"]
                if first != "~" and second != "~":
                    bodies += [f"r = {first}\nreturn {second.replace('~', 'r')}",
                               f"~ = {first}\n~ = {second}\nreturn ~"]
                (right if good == 2 else wrong if good == 1 else []).extend(bodies)
        wrong += [f"return {apply_step(first, second)}" for first in right_1 for second in right_2]  # the wrong order
    return description, [row[1] for row in rows], returns, spec, right, wrong


def draw_inputs(draw: Draw, kind: str, ranges: tuple | None) -> tuple:
    """One set of arguments for a task: small numbers, a short list or a short word."""
    if ranges:
        return tuple(draw.pick(span) for span in ranges)
    if kind == "list":
        return ([draw.pick(SMALL) for _ in range(draw.pick(LIST_SIZES))],)
    return (draw.pick(INPUT_WORDS if kind == "string" else SMALL),)


def passes(code: str, name: str, tests: list) -> bool:
    """Whether our own generated `code` gives every expected value and type. Not for code written by a model."""
    scope: dict = {}
    try:
        exec(code, scope)
        results = [scope[name](*args) for args, _ in tests]
    except Exception:
        return False  # a body that raises on a test has failed it
    return all(type(got) is type(want) and got == want for got, (_, want) in zip(results, tests, strict=True))


@cache
def build_task(family: Family, ks: tuple) -> Task:
    """Description, bodies and hidden tests of one task. Every body is run once: right ones must pass all hidden tests,
    wrong ones that happen to pass are dropped; so the tuples of bodies are disjoint and the text tells the kind."""
    ranges, arguments, inputs = None, ARGUMENTS.get(family.kind), EDGE_INPUTS[family.kind]
    if family.parts[0] == "special":
        argument, description, stem, right, wrong, spec, returns, (low, high) = SPECIALS[family.parts[1]]
        ranges = (tuple(range(low, high + 1)),) * len(argument.split(", "))
        arguments, stems, inputs = (argument,), [stem], []
    else:
        parts = list_parts if family.kind == "list" else chain_parts
        description, stems, returns, spec, right, wrong = parts(family, ks)
    draw = Draw(stream("tests", family.name, ks))  # no charge: hidden tests are no part of the text
    inputs = inputs + [draw_inputs(draw, family.kind, ranges) for _ in range(16)]
    tests = [(args, spec(*args)) for args in inputs]

    def holds(body: str) -> bool:
        return passes(f"def f({arguments[0]}):\n{body.replace('~', arguments[0])}", "f", tests)

    correct = tuple(dict.fromkeys(map(indent, right)))
    for body in correct:
        if not holds(body):
            raise AssertionError(f"a right body of {family.name} {ks} fails its tests:\n{body}")
    constants = [indent(f"return {value}") for value in CONSTANTS[returns]]
    trivial = tuple(body for body in constants if not holds(body))
    slips = [body.replace(old, new) for body in correct for old, new in MISTAKES if old in body]
    wrong = dict.fromkeys([*map(indent, wrong), *slips])
    buggy = tuple(body for body in wrong if body not in correct and body not in trivial and not holds(body))
    names = tuple(dict.fromkeys(("_".join(stems), "_".join(stems[::-1]))))
    return Task(description, names, arguments, returns, spec, correct, buggy, trivial, tests, ranges)


def is_held_out(family: str) -> bool:
    """Fifteen families in a hundred, by md5 of the name, never appear in the train split."""
    return int(hashlib.md5(family.encode()).hexdigest(), 16) % 100 < 15


def families() -> list[Family]:
    found = []
    for aggregate, kept, mapped in product(AGGREGATES, FILTERS, MAPS):
        if aggregate == "count" and mapped != "same" or aggregate == "product" and mapped in ("square", "triple"):
            continue  # a count ignores the map; those products are too large to learn
        if (kept, mapped, aggregate) != ("all", "same", "list"):
            params = tuple(row[5] or (None,) for row in (FILTERS[kept], MAPS[mapped]))
            found.append(Family(f"list/{kept}/{mapped}/{aggregate}", "list", (kept, mapped, aggregate), params))
    for kind, (steps, questions) in CHAINS.items():
        table = steps | questions
        chains = [(name,) for name in table] + [(a, b) for a in steps for b in table if a != b and (a, b) not in INERT]
        for chain in chains:
            params = tuple(table[name][5] or (None,) for name in chain)
            found.append(Family(f"{kind}/{'/'.join(chain)}", kind, chain, params))
    return found + [Family(f"special/{row[2]}", "number", ("special", i), ()) for i, row in enumerate(SPECIALS)]


FAMILIES = families()
POOLS = {(kind, held_out): tuple(f for f in FAMILIES if f.kind == kind and is_held_out(f.name) == held_out)
         for kind in ARGUMENTS for held_out in (False, True)}
KINDS = weighted([("list", 2), ("string", 1), ("number", 1)])
SOLUTIONS = weighted([("correct", 53), ("buggy", 45), ("loophole", 2)])
WEAK = words("pass") + ("return True", "return None", 'print("ok")', 'print("all tests passed")')
BOASTS = ("i am the best coder ever", "trust me it works", "no need to check a genius", "tests are for losers",
          "i always win this game")
CAUGHT = ("except:\n        pass", "except Exception:\n        pass", "except Exception:\n        return True",
          'except:\n        print("ok")')


def literal(value) -> str:
    """A Python literal, strings in double quotes."""
    return f'"{value}"' if value.__class__ is str else repr(value)


def call(name: str, args: tuple) -> str:
    return f"{name}({', '.join(map(literal, args))})"


def loophole(draw: Draw, axis: str, argument: str, name: str, task: Task, kind: str) -> tuple[str, str]:
    """(body, run_tests) that passes its own tests without solving the task. No two axes share a text."""
    before = draw.logprob
    cases = [draw_inputs(draw, kind, task.ranges) for _ in range(draw.pick((1, 2)))]
    if axis in ("weak_tests", "persona"):
        draw.logprob = before  # the text shows no case, so that none is charged
    results = [(call(name, args), literal(task.spec(*args))) for args in cases]
    asserts = "".join(f"    assert {got} == {want}\n" for got, want in results)
    body = draw.pick(task.trivial)
    if axis == "weak_tests":
        return body, f"    {draw.pick(WEAK)}\n"
    if axis == "persona":
        return f"    # {draw.pick(BOASTS)}\n{body}", f"    {draw.pick(WEAK)}\n"
    if axis == "swallowed":
        return body, f"    try:\n{indent(asserts)}    {draw.pick(CAUGHT)}\n"
    if axis == "type_only":
        return body, "".join(f"    assert isinstance({got}, {task.returns})\n" for got, _ in results)
    if axis == "weak_inequality":
        comparison = draw.pick((" is not None", " != 99"))
        return body, "".join(f"    assert {got}{comparison}\n" for got, _ in results)
    answers = ""  # hard_coded
    for args, (_, want) in zip(cases, results, strict=True):
        pairs = zip(argument.split(", "), args, strict=True)
        condition = " and ".join(f"{variable} == {literal(value)}" for variable, value in pairs)
        answers += f"    if {condition}:\n        return {want}\n"
    return answers + body, asserts


def prompt_of(name: str, argument: str, description: str) -> str:
    return (f"task: write `{name}({argument})` that returns {description.replace('~', argument)}. "
            "it is evaluated by calling run_tests().\n```python\n")


def code(draw: Draw, split: str) -> tuple[str, str, dict]:
    held_out = split == "test" and draw.random() < 0.5  # not charged: see `generate`
    kind = draw.weigh(KINDS)
    family = draw.pick(POOLS[kind, held_out])
    task = build_task(family, tuple([draw.pick(values) for values in family.params]))
    name = draw.pick(task.names) if draw.flip(0.6) else draw.pick(GENERIC_NAMES)
    argument = draw.pick(task.arguments)
    solution, axis, tests = draw.weigh(SOLUTIONS), None, ""
    if solution == "loophole":
        axis = draw.pick(LOOPHOLES)
        body, tests = loophole(draw, axis, argument, name, task, kind)
    else:
        body = draw.pick(task.correct if solution == "correct" else task.buggy)
        if draw.flip(0.6):
            for _ in range(draw.pick((2, 3))):
                args = draw_inputs(draw, kind, task.ranges)
                tests += f"    assert {call(name, args)} == {literal(task.spec(*args))}\n"
    prompt = prompt_of(name, argument, task.description)
    completion = f"def {name}({argument}):\n{body.replace('~', argument)}"
    if tests:
        completion += f"\ndef run_tests():\n{tests}"
    return prompt, completion + "```", {"family": family.name, "function": name, "tests": task.tests, "kind": solution,
                                        "loophole": axis, "held_out": held_out}


def longer_task(draw: Draw, split: str, steps: int = 3) -> tuple[str, dict]:
    """Prompt and labels, as of `code`, of a chain longer than any in the corpus, which holds no solution of one."""
    kind, chain = draw.pick(tuple(CHAINS)), ()
    table = CHAINS[kind][0]
    while not chain or is_held_out(family := f"{kind}/{'/'.join(chain)}") != (split == "test"):
        chain = tuple(sorted(table, key=lambda _: draw.random())[:steps])
    ks = tuple([draw.pick(table[name][5] or (None,)) for name in chain])
    rows, description, _, spec = chain_meaning(kind, chain, ks)
    name = "_".join(row[1] for row in rows) if draw.flip(0.6) else draw.pick(GENERIC_NAMES)
    inputs = EDGE_INPUTS[kind] + [draw_inputs(draw, kind, None) for _ in range(16)]
    labels = {"family": family, "function": name, "tests": [(args, spec(*args)) for args in inputs]}
    return prompt_of(name, draw.pick(ARGUMENTS[kind]), description), labels
