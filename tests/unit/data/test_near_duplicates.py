"""Held-out text that repeats training text is found by 8-grams counted by hand, and left out."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from flower_split.config import DataConfig, RunConfig, TrainConfig
from flower_split.data import load_client_data
from flower_split.data.documents import Completion, Text
from flower_split.data.held_out import split_held_out
from flower_split.data.near_duplicates import coverage, ngrams, without_repeats

ALPHABET = "a b c d e f g h i j k l m n o p q r s t".split()


def _words(start: int, end: int) -> str:
    return " ".join(ALPHABET[start:end])


def test_ngrams_are_of_words_without_case() -> None:
    assert ngrams("A b, c (d) e f g h I") == [tuple("abcdefgh"), tuple("bcdefghi")]
    assert ngrams("a b") == [("a", "b")] and ngrams("...") == []


def test_coverage_is_the_share_of_ngrams_in_training_text() -> None:
    train = [Text("", _words(0, 12))]  # 5 8-grams, which begin with a to e
    held_out = [
        Text("", _words(0, 12)),  # all 5
        Text("", _words(2, 16)),  # 7 8-grams, which begin with c to i: c, d, e are there
        Text("", _words(9, 20)),  # none
        Completion("", _words(0, 6), _words(6, 9)),  # "a ... i": a and b are there
    ]
    assert coverage(held_out, train) == [1.0, pytest.approx(3 / 7), 0.0, 1.0]
    assert without_repeats(held_out, train) == held_out[1:3]


def test_near_duplicates_are_left_out_of_the_held_out_side_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    # thirty texts of their own words; the first ten once more with another last word
    rows = [
        {"prompt": " ".join(f"w{i}x{k}" for k in range(20)) + f" v{copy}", "completion": "a"}
        for i in range(30)
        for copy in range(2 if i < 10 else 1)
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for deduplicate in ("exact", "near"):
        config = RunConfig(
            train=TrainConfig(sequence_length=32),
            data=DataConfig(source="jsonl", path=str(path), deduplicate=deduplicate),
        )
        found[deduplicate] = load_client_data(config, tokenizer, 0, 1)
    documents = [Completion("", row["prompt"], row["completion"]) for row in rows]
    train, held_out = split_held_out(documents, 0.2, 0)
    trained = {document.prompt.split()[0] for document in train if isinstance(document, Completion)}
    repeats = [d for d in held_out if isinstance(d, Completion) and d.prompt.split()[0] in trained]
    assert 0 < len(repeats) < len(held_out)
    exact, near = found["exact"], found["near"]
    assert exact.train == near.train and exact.counts.near_duplicates == 0
    assert near.counts.near_duplicates == len(repeats)
    assert len(near.evaluate) == len(exact.evaluate) - len(repeats)
