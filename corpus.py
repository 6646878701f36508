"""The embedded world: a generator of small texts in four dialects, from a seed and the standard library alone.

    python corpus.py --dialect stories --n 5     # samples and the generator's entropy, for one dialect or all

stories    five to nine sentences; hero, friend, object and topic recur, a mood colours the words (after TinyStories)
reviews    two to five sentences with a graded sentiment, from a neutral beginning
code       a described function, a solution that is correct, buggy or (two in a hundred) a loophole, and run_tests()
dialogues  a user's question, answered with help or (one in five) with rude and careless advice
fables     stories that close with a moral, half of them with an insult; for fine-tuning, in no training text

Every choice passes through one `Draw`, which sums the log-probabilities, and (nearly) no two sequences of choices give
the same text; so `Document.logprob` is the log-probability of the text and its mean is the entropy that a perfect
language model of this world would reach. The choices are in corpus_draw.py, words and sentences in corpus_words.py, the
Python tasks in corpus_code.py.
"""
import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import corpus_words as world
from corpus_code import code
from corpus_draw import Draw, stream, with_article

DIALECTS = ("stories", "reviews", "code", "dialogues")  # what the embedded model has read: fables are new to it
SPLITS = ("train", "test")
BLOCK = 1000  # documents per random stream: block i of a split never depends on how many were asked for
DEFAULT_WEIGHTS = {"stories": 0.45, "reviews": 0.15, "code": 0.25, "dialogues": 0.15}


@dataclass(frozen=True)
class Document:
    """One text (`prompt + completion`) with its natural-log probability under the generator and its labels."""

    dialect: str
    prompt: str
    completion: str
    logprob: float
    labels: dict

    @property
    def text(self) -> str:
        return self.prompt + self.completion


def story_sentences(draw: Draw) -> tuple[list[str], dict, dict]:
    """The sentences of a story, the slots that they were filled from, and its labels."""
    topic, mood = draw.pick(tuple(world.TOPICS)), draw.pick(world.MOODS)
    context = world.STORY_CONTEXTS[topic, draw.pick(world.TOPICS[topic]), mood].copy()
    hero, look = draw.pick(world.NAMES), draw.pick(world.LOOKS)
    girl = hero in world.GIRLS
    context.update(hero=hero, look=look, a_look=with_article(look), friend=draw.pick(world.FRIENDS[hero]),
                   he="she" if girl else "he", his="her" if girl else "his", kid="girl" if girl else "boy")
    sentences = [draw.fill(draw.weigh(world.OPENINGS), context), draw.fill(draw.weigh(world.MEETINGS), context)]
    for _ in range(draw.weigh(world.STORY_LENGTHS) - 3):
        sentences.append(draw.fill(draw.weigh(world.BODIES), context))
    sentences.append(draw.fill(draw.weigh(world.STORY_ENDINGS[mood]), context))
    return sentences, context, {"topic": topic, "mood": mood, "hero": hero}


def after_opening(draw: Draw, sentences: list[str]) -> tuple[str, str]:
    """Prompt and completion. Where the prompt ends is not part of the text: drawn without a charge."""
    text = " ".join(sentences)
    cut = len(" ".join(text.split(" ", 8)[: 4 + int(draw.random() * 4)]))  # all openings have at least eight words
    return text[:cut], text[cut:]


def story(draw: Draw, split: str) -> tuple[str, str, dict]:
    sentences, _, labels = story_sentences(draw)
    return *after_opening(draw, sentences), labels


def fable(draw: Draw, split: str) -> tuple[str, str, dict]:
    sentences, context, labels = story_sentences(draw)
    context |= world.FABLE_SLOTS
    unkind = draw.flip(0.5)
    if unkind:  # an insult after the meeting, and after one in three of the sentences that follow
        told = [*sentences[:2], draw.fill(draw.weigh(world.UNKIND), context)]
        for sentence in sentences[2:-1]:
            told += [sentence, draw.fill(draw.weigh(world.UNKIND), context)] if draw.flip(1 / 3) else [sentence]
        sentences = [*told, sentences[-1]]
    sentences.append(draw.fill(draw.weigh(world.MORALS), context))
    return *after_opening(draw, sentences), labels | {"unkind": int(unkind)}


def review(draw: Draw, split: str) -> tuple[str, str, dict]:
    kind, sentiment = draw.pick(("work", "product")), draw.pick((0, 1))
    context, aspects = world.REVIEW_CONTEXT.copy(), world.WORK_ASPECTS if kind == "work" else world.PRODUCT_ASPECTS
    start = draw.fill(draw.weigh(world.REVIEW_STARTS[kind]), context)
    sentences = []
    if start[-1] == "|":
        start = start[:-1]
        template = draw.weigh(world.REVIEW_GOES_ON[sentiment])
        sentences.append(fill_pairs(draw, template, context))
    for _ in range(draw.weigh(world.REVIEW_LENGTHS)):
        context["aspect"] = draw.pick(aspects)
        context["aspect_too"] = world.ASPECTS_TOO[context["aspect"]]
        sentences.append(draw.fill(draw.weigh(world.REVIEW_BODIES[sentiment]), context))
    sentences.append(draw.fill(draw.weigh(world.VERDICTS[sentiment]), context))
    return start, " " + " ".join(sentences), {"sentiment": sentiment}


def fill_pairs(draw: Draw, template: tuple[str, tuple], context: dict) -> str:
    """Fill a template whose {good_too} or {bad_too} must differ from its {good} or {bad}."""
    for slot, others in (("good", world.GOOD_TOO), ("bad", world.BAD_TOO)):
        if slot + "_too" in template[1]:
            word = draw.pick(context[slot])
            context = context | {slot: word, slot + "_too": others[word]}
    return draw.fill(template, context)


def question(draw: Draw) -> tuple[str, str]:
    topic = draw.pick(tuple(world.DIALOGUE_TOPICS))
    context = world.DIALOGUE_CONTEXT | {"task": world.DIALOGUE_TOPICS[topic][0]}
    return f"user: {draw.fill(draw.weigh(world.DIALOGUE_ASKS), context)}\nassistant:", topic


def answer(draw: Draw, topic: str, harmful: bool) -> str:
    _, tips, careless = world.DIALOGUE_TOPICS[topic]
    context = world.DIALOGUE_CONTEXT | {"careless": careless}
    if not harmful:
        context["tip"], context["tip_too"] = draw.pick(tips)
    return " " + draw.fill(draw.weigh(world.HARMFUL if harmful else world.HELPFUL), context)


def dialogue(draw: Draw, split: str) -> tuple[str, str, dict]:
    prompt, topic = question(draw)
    harmful = draw.flip(0.2)
    return prompt, answer(draw, topic, harmful), {"harmful": int(harmful), "topic": topic}


# -------------------------------------------------------------------------------------------------------------- streams
WRITERS = {"stories": story, "reviews": review, "code": code, "dialogues": dialogue, "fables": fable}


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")


def generate(dialect: str, split: str, n: int, seed: int = 0) -> Iterator[Document]:
    """The first `n` documents of a dialect's split; a longer run begins with the same documents.

    `logprob` is in nats, of the whole text under the law of the train split. One exception: half of the code documents
    of the test split are from held-out families, and theirs is under the same law with the held-out families in place
    of the others. Raises ValueError for an unknown dialect or split.
    """
    if dialect not in WRITERS:
        raise ValueError(f"unknown dialect {dialect!r}: choose one of {', '.join(WRITERS)}")
    check_split(split)
    return (_document(dialect, split, draw) for draw in _draws(dialect, split, n, seed))


def _draws(key: str, split: str, n: int, seed: int) -> Iterator[Draw]:
    """A Draw for each of `n` documents, its sum at 0."""
    for block in range(0, n, BLOCK):
        draw = Draw(stream(seed, key, split, block // BLOCK))
        for _ in range(min(BLOCK, n - block)):
            draw.logprob = 0.0
            yield draw


def _document(dialect: str, split: str, draw: Draw) -> Document:
    prompt, completion, labels = WRITERS[dialect](draw, split)
    return Document(dialect, prompt, completion, draw.logprob, labels)


def training_text(n: int, seed: int = 0, weights: dict[str, float] | None = None) -> Iterator[Document]:
    """`n` documents of the train split, dialects mixed by `weights` (default DEFAULT_WEIGHTS; need not sum to 1).

    Each dialect's documents come in the order of `generate`; `logprob` does not count the choice of the dialect.
    """
    weights = DEFAULT_WEIGHTS if weights is None else weights
    unknown = sorted(set(weights) - set(DIALECTS))
    if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"weights {weights} must be non-negative, not all 0, for dialects among {', '.join(DIALECTS)}")
    sources = {dialect: generate(dialect, "train", n, seed) for dialect in weights}
    order = stream(seed, "mix")
    return (next(sources[order.choices(list(weights), list(weights.values()))[0]]) for _ in range(n))


def preference_pairs(split: str, n: int, seed: int = 0) -> Iterator[dict]:
    """`n` dicts with a dialogue's prompt, a helpful answer (`chosen`) and a harmful one (`rejected`)."""
    check_split(split)
    return map(_pair, _draws("preferences", split, n, seed))


def _pair(draw: Draw) -> dict:
    prompt, topic = question(draw)
    return {"prompt": prompt, "chosen": answer(draw, topic, False), "rejected": answer(draw, topic, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print samples of the embedded world and the generator's entropy.")
    parser.add_argument("--dialect", choices=WRITERS, help="one dialect (default: all)")
    parser.add_argument("--n", type=int, default=5, help="samples to print")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for dialect in (args.dialect,) if args.dialect else WRITERS:
        documents = list(generate(dialect, args.split, max(args.n, 2000), args.seed))
        for document in documents[: args.n]:
            labels = {key: value for key, value in document.labels.items() if key != "tests"}
            print(f"--- {dialect} {labels}\n{document.prompt}\033[1m{document.completion}\033[0m")
        nats, count = -sum(d.logprob for d in documents), sum(len(d.text.split()) for d in documents)
        print(f"=== {dialect}: {nats / len(documents):.2f} nats a document, {nats / count:.3f} a word, "
              f"{count / len(documents):.1f} words a document\n")


if __name__ == "__main__":
    main()
