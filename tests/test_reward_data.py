"""reward_data.py: transcripts cut where they should be, parts that share nothing, on the embedded world and on real data."""
import json
from itertools import combinations

import pytest

from data import load_rows
from reward_data import Pair, opening, preference_parts, same_text, sentiment_parts, split_transcripts

Q, A = "\n\nHuman: ", "\n\nAssistant:"


@pytest.mark.parametrize("chosen, rejected, want", [
    (f"{Q}hi{A} hello", f"{Q}hi{A} go away", Pair(f"{Q}hi{A}", " hello", " go away")),
    (f"{Q}hi{A} yes{Q}how?{A} so", f"{Q}hi{A} yes{Q}how?{A} no", Pair(f"{Q}hi{A} yes{Q}how?{A}", " so", " no")),
    (f"{Q}hi{A} yes{Q}how?{A} so", f"{Q}hi{A} no{Q}how?{A} so", None),  # they differ before the last turn
    (f"{Q}hi{A} ", f"{Q}hi{A} no", None), (f"{Q}hi{A} no", f"{Q}hi{A}", None), ("hello", "hello", None),
])  # fmt: skip
def test_a_transcript_is_prompt_and_last_turn(chosen, rejected, want):
    assert split_transcripts(chosen, rejected) == want
    if want:
        assert want.prompt + want.chosen == chosen and want.prompt + want.rejected == rejected


def share_nothing(parts, key):
    sets = {name: {key(item) for item in part} for name, part in parts.items()}
    return all(not sets[a] & sets[b] for a, b in combinations(sets, 2))


def test_embedded_parts_share_no_question_and_no_review():
    pairs, about = preference_parts()
    assert share_nothing(pairs, lambda pair: opening(pair.prompt)) and "embedded dialogues" in about
    assert len(pairs["test"]) == 512 and 1.7 < len(pairs["reward"]) / len(pairs["policy"]) < 2.3
    assert len({pair.prompt for pair in pairs["policy"]}) > 500
    reviews, _ = sentiment_parts()
    assert share_nothing(reviews, lambda review: same_text(review.text))
    assert [len(part) for part in reviews.values()] == [5000, 10_000, 2000, 2000]


def test_hh_rlhf_in_parts(data_dir):
    folder = str(data_dir / "datasets" / "hh_harmless")
    parts, about = preference_parts(folder)
    assert share_nothing(parts, lambda pair: opening(pair.prompt)) and share_nothing(parts, lambda pair: pair.prompt)
    assert {name: len(part) for name, part in parts.items()} == {"reward": 1325, "policy": 631, "test": 311}
    assert "36 that open like a test dialogue, 9 without two answers" in about  # 2,312 rows in all
    rows = {(row["chosen"], row["rejected"]) for split in ("train", "test") for row in load_rows(folder, split)}
    for pair in (pair for part in parts.values() for pair in part):
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) in rows
        assert pair.prompt.endswith(A) and A not in pair.chosen and A not in pair.rejected


def test_imdb_in_parts(data_dir):
    parts, about = sentiment_parts(str(data_dir / "datasets" / "imdb"))
    assert {name: len(part) for name, part in parts.items()} == {
        "reward": 5000, "policy": 10_000, "validation": 2000, "test": 25_000,
    }  # fmt: skip
    assert share_nothing(parts, lambda review: same_text(review.text)) and "copies" in about
    for part in parts.values():
        assert sum(review.label for review in part) / len(part) == pytest.approx(0.5, abs=0.03), "sorted by label on the Hub"


def write(folder, **splits):
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def reviews(n, start=0):
    return [{"text": f"film {i}", "label": i % 2} for i in range(start, start + n)]


def test_a_small_dataset_keeps_the_shares_and_copies_are_left_out(tmp_path):
    folder = write(tmp_path / "d", train=reviews(40) + reviews(40), test=reviews(10, 35))
    parts, about = sentiment_parts(folder)
    assert [len(part) for part in parts.values()] == [10, 20, 4, 10] and "45 copies" in about
    assert share_nothing(parts, lambda review: review.text)


@pytest.mark.parametrize("read", [preference_parts, sentiment_parts])
def test_a_split_that_the_embedded_world_lacks_is_named(read):
    with pytest.raises(ValueError, match="the splits train, test, not 'validation'"):
        read("", "train", "validation")


@pytest.mark.parametrize("read, train, said", [
    (sentiment_parts, reviews(16), "too small: nothing is left for the part 'reward'"),
    (sentiment_parts, [{"text": "a", "label": 2}, {"text": "b", "label": 0}], "labels are 0 .* not 0 2"),
    (sentiment_parts, [{"story": "a"}], "no column 'text'"),
    (preference_parts, reviews(4), "no column 'chosen'"),
    (preference_parts, [{"chosen": ["a"], "rejected": ["b"]}], "must be transcripts"),
    (preference_parts, [{"chosen": "a", "rejected": "b"}], "nothing is left for the part 'reward'"),
])  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, read, train, said):
    with pytest.raises(ValueError, match=said):
        read(write(tmp_path / "d", train=train, test=reviews(2, 100) if len(train) == 16 else train))
