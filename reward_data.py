"""Preference pairs and labelled reviews, in parts that share no text: for the reward model, for the policy, for the judgement.

    parts, about = preference_parts()                              # the embedded world's dialogues
    parts, about = preference_parts("Anthropic/hh-rlhf")           # a folder or Hub id: reward, policy, test
    parts, about = sentiment_parts("stanfordnlp/imdb")             # reward, policy, validation, test

The parts depend on the data alone, never on a run's seed, so that a policy meets no text that its reward model was trained on.
Dialogues are told apart by how they open, since one conversation stands in several rows, each a turn longer than the one before.
"""
import hashlib
import re
from typing import NamedTuple

import corpus
from data import load_rows

SPLIT_SEED = 42  # of the order in which a dataset is read; some are sorted
EMBEDDED = {"preference": {"train": 6000, "test": 512}, "sentiment": {"train": 18_000, "test": 2000}}
SENTIMENT_SIZES = {"reward": 5, "policy": 10, "validation": 2}  # thousands, or seventeenths where there are fewer
TURN = "\n\nAssistant:"
MARKUP = re.compile(r"<br\s*/?>")  # of IMDB's pages


class Pair(NamedTuple):
    """Two answers to one prompt; prompt + answer is the whole dialogue."""

    prompt: str
    chosen: str
    rejected: str


class Review(NamedTuple):
    text: str
    label: int  # 0 negative, 1 positive


# ---------------------------------------------------------------------------------------------------------- preferences


def preference_parts(
    dataset: str = "", train_split: str = "train", eval_split: str = "test"
) -> tuple[dict[str, list[Pair]], str]:
    """Pairs by part, in shuffled order, and a line that says what was left out.

    Training dialogues that open like a test dialogue are left out; of the others one in three, by md5 of the opening, is the
    policy's. Raises ValueError for a dataset without `chosen` and `rejected` transcripts, and for a part without a pair.
    """
    (train, unread), (test, more) = read_pairs(dataset, train_split), read_pairs(dataset, eval_split)
    tested = {opening(pair.prompt) for pair in test}
    kept = [pair for pair in train if opening(pair.prompt) not in tested]
    parts = {
        "reward": [pair for pair in kept if not is_policys(pair.prompt)],
        "policy": [pair for pair in kept if is_policys(pair.prompt)],
        "test": test,
    }
    check_parts(parts, dataset)
    left_out = f"{len(train) - len(kept)} that open like a test dialogue, {unread + more} without two answers to one prompt"
    return parts, f"{sizes(parts)} pairs of {dataset or 'the embedded dialogues'}; left out: {left_out}"


def read_pairs(dataset: str, split: str) -> tuple[list[Pair], int]:
    """(pairs, rows that are none)."""
    if not dataset:
        return [Pair(**row) for row in corpus.preference_pairs(split, embedded_size("preference", split))], 0
    rows = load_rows(dataset, split, ["chosen", "rejected"], shuffle_seed=SPLIT_SEED)
    if wrong := [row for row in rows if not isinstance(row["chosen"], str) or not isinstance(row["rejected"], str)]:
        raise ValueError(f"dataset {dataset!r}: chosen and rejected must be transcripts, not {wrong[0]!r:.80}")
    pairs = [split_transcripts(row["chosen"], row["rejected"]) for row in rows]
    return [pair for pair in pairs if pair], pairs.count(None)


def split_transcripts(chosen: str, rejected: str) -> Pair | None:
    """Two transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ...") as the prompt, up to and with the last "Assistant:", and its two
    answers; None where they differ earlier, and where an answer is empty (four in 2,000 of hh-rlhf prefer to say nothing)."""
    prompt, _, answer = chosen.rpartition(TURN)
    other, _, worse = rejected.rpartition(TURN)
    if not prompt or prompt != other or not answer.strip() or not worse.strip():
        return None
    return Pair(prompt + TURN, answer, worse)


def opening(prompt: str) -> str:
    """What a dialogue begins with: the user's first turn."""
    return " ".join(prompt.lower().partition("\nassistant:")[0].split())


def is_policys(prompt: str) -> bool:
    return int(hashlib.md5(opening(prompt).encode()).hexdigest(), 16) % 3 == 0


# ------------------------------------------------------------------------------------------------------------- sentiment


def sentiment_parts(
    dataset: str = "", train_split: str = "train", eval_split: str = "test"
) -> tuple[dict[str, list[Review]], str]:
    """Reviews by part, and a line that says what was left out: 5,000 for the reward model, 10,000 for the policy, 2,000 for
    validation, of the shuffled training split, and the whole test split. Where there are fewer, the shares are the same.

    A training text that also stands in the test split, or stood before, is left out. Raises ValueError for a dataset without
    `text` and `label` (0 and 1), and for a part without a review. Line breaks, IMDB's <br /> among them, are blanks.
    """
    train, test = read_reviews(dataset, train_split), read_reviews(dataset, eval_split)
    seen, kept = {same_text(review.text) for review in test}, []
    for review in train:
        if same_text(review.text) not in seen:
            seen.add(same_text(review.text))
            kept.append(review)
    parts, start, unit = {}, 0, min(1000, len(kept) // sum(SENTIMENT_SIZES.values()))
    for name, share in SENTIMENT_SIZES.items():
        parts[name], start = kept[start : start + share * unit], start + share * unit
    parts["test"] = test
    check_parts(parts, dataset)
    return parts, f"{sizes(parts)} of {dataset or 'the embedded reviews'}; left out: {len(train) - len(kept)} copies"


def read_reviews(dataset: str, split: str) -> list[Review]:
    if not dataset:
        reviews = corpus.generate("reviews", split, embedded_size("sentiment", split))
        return [Review(review.text, review.labels["sentiment"]) for review in reviews]
    rows = load_rows(dataset, split, ["text", "label"], shuffle_seed=SPLIT_SEED)
    labels = {row["label"] for row in rows}
    if labels != {0, 1}:
        found = sorted(map(str, labels))[:5]
        raise ValueError(f"dataset {dataset!r}, split {split!r}: labels are 0 (negative) and 1 (positive), not {' '.join(found)}")
    return [Review(" ".join(MARKUP.sub(" ", row["text"]).split()), row["label"]) for row in rows]


def same_text(text: str) -> str:
    return " ".join(text.lower().split())


def embedded_size(kind: str, split: str) -> int:
    if split not in EMBEDDED[kind]:
        raise ValueError(f"the embedded world has the splits {', '.join(EMBEDDED[kind])}, not {split!r}")
    return EMBEDDED[kind][split]


def check_parts(parts: dict[str, list], dataset: str) -> None:
    for name, part in parts.items():
        if not part:
            raise ValueError(f"dataset {dataset!r} is too small: nothing is left for the part {name!r} ({sizes(parts)})")


def sizes(parts: dict[str, list]) -> str:
    return ", ".join(f"{name} {len(part)}" for name, part in parts.items())
