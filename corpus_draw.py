"""Choices and templates: what the embedded world's generator is made of.

Every choice passes through one `Draw`, which sums the log-probabilities. A template is a sentence with {slots}; a table
is a tuple of words (drawn uniformly) or a `Table` (drawn by weight).
"""
import hashlib
import math
import random
from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

LOG = [0.0] + [math.log(n) for n in range(1, 4096)]


def stream(*key) -> random.Random:
    """A random stream of its own for each key, the same in every process."""
    return random.Random(int(hashlib.md5("/".join(map(str, key)).encode()).hexdigest(), 16))


class Table(NamedTuple):
    """Weighted alternatives for `Draw.weigh`."""

    items: tuple
    cumulative: list
    logprobs: list


def weighted(pairs: list[tuple[object, float]]) -> Table:
    total = sum(weight for _, weight in pairs)
    cumulative = [sum_ / total for sum_ in accumulate(weight for _, weight in pairs)]
    cumulative[-1] = 1.0  # rounding must not leave a gap above the last entry
    return Table(tuple(item for item, _ in pairs), cumulative, [math.log(weight / total) for _, weight in pairs])


class Draw:
    """The source of all choices: `logprob` is the sum of the log-probabilities of those made so far."""

    def __init__(self, rng: random.Random):
        self.random = rng.random
        self.logprob = 0.0

    def pick(self, table):
        """One entry of a sequence, uniformly."""
        n = len(table)
        self.logprob -= LOG[n]
        return table[int(self.random() * n)]

    def weigh(self, table: Table):
        """One entry of a weighted table."""
        i = bisect_right(table.cumulative, self.random())
        self.logprob += table.logprobs[i]
        return table.items[i]

    def flip(self, p: float) -> bool:
        """True with probability p."""
        heads = self.random() < p
        self.logprob += math.log(p if heads else 1 - p)
        return heads

    def fill(self, template: tuple[str, tuple], context: dict) -> str:
        """Fill a template's slots: a string in `context` stands for itself, a tuple for a choice among its entries."""
        words = []
        for slot in template[1]:
            entry = context[slot]
            words.append(self.pick(entry) if entry.__class__ is tuple else entry)
        return template[0] % tuple(words)


def compile_template(text: str) -> tuple[str, tuple]:
    """'{hero} ran to the {place}.' -> ('%s ran to the %s.', ('hero', 'place'))."""
    pieces = [piece.partition("}") for piece in text.split("{")]
    return "%s".join([pieces[0][0]] + [rest for _, _, rest in pieces[1:]]), tuple(slot for slot, _, _ in pieces[1:])


def templates(text: str) -> Table:
    """A weighted table of templates from lines of 'weight template'."""
    lines = [line.strip().partition(" ") for line in text.strip().splitlines()]
    return weighted([(compile_template(template), float(weight)) for weight, _, template in lines])


def words(text: str) -> tuple:
    return tuple(text.split())


def rows(text: str) -> list[tuple[str, ...]]:
    """The rows of a table: one per line, indented lines continue the one before, columns parted by '|'."""
    lines = text.strip().replace("\n    ", " ").splitlines()
    return [tuple(column.strip() for column in line.split("|")) for line in lines]


def with_article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def articles(table: tuple) -> tuple:
    return tuple(with_article(word) for word in table)


def without(table: tuple) -> dict:
    """{entry: the other entries}: a second choice that differs from the first, without rejection."""
    return {entry: tuple(other for other in table if other != entry) for entry in table}
