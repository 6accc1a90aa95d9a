"""Records become documents by their fields; no document is both trained on and held out."""

import pytest

from flower_split.data.documents import (
    Chat,
    Completion,
    Record,
    Text,
)
from flower_split.data.formats import parse_record
from flower_split.data.held_out import split_held_out
from flower_split.errors import DataError


def test_records_become_documents_by_their_fields() -> None:
    turn = {"role": "user", "content": "a", "name": None}
    assert parse_record(Record("p", {"body": " a "}), "body") == Text("p", "a")
    assert parse_record(Record("p", {"prompt": "a", "completion": "b"}), "text") == (
        Completion("p", "a", "b")
    )
    chat = parse_record(Record("p", {"messages": [turn], "text": None}), "text")
    assert chat == Chat("p", [{"role": "user", "content": "a"}])
    assert parse_record(Record("p", {"text": " \n"}), "text") is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"body": "a"}, "here: .*'text', which is missing; its fields are body.*data.text-field"),
        ({"text": 3}, "'text', which is a int"),
        ({"prompt": "a"}, "'completion', which is missing"),
        ({"completion": "a"}, "'prompt', which is missing"),
        ({"messages": []}, "with at least one turn"),
        ({"messages": "a"}, "messages must be a list"),
        ({"messages": [{"content": "a"}]}, 'every message needs a "role"'),
        (
            {"prompt": "a", "completion": "b", "text": "c"},
            "here: .*in one format.*prompt and completion and of text.*data.ignore-fields",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "text": "c"}, "of chat and of text"),
    ],
)
def test_records_that_are_malformed_are_named(content: dict[str, object], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        parse_record(Record("here", content), "text")


def _texts(count: int, start: int = 0) -> list[Text]:
    return [Text(f"{i}", f"text {i}") for i in range(start, start + count)]


def test_held_out_split_is_disjoint_complete_ordered_and_near_its_fraction() -> None:
    documents = _texts(1000)
    train, held_out = split_held_out(documents, 0.2, 0)
    assert sorted([*train, *held_out], key=lambda d: int(d.place)) == documents
    assert train == sorted(train, key=lambda d: int(d.place))
    assert 150 < len(held_out) < 250  # four standard deviations of 12.6 about 200
    # the first fifty held out are no run of the beginning: a fair sample's mean is near 500
    assert 350 < sum(int(d.place) for d in held_out[:50]) / 50 < 650


def test_held_out_split_changes_with_the_seed_and_only_with_it() -> None:
    documents = _texts(100)
    assert split_held_out(documents, 0.2, 0) == split_held_out(documents, 0.2, 0)
    assert split_held_out(documents, 0.2, 0) != split_held_out(documents, 0.2, 1)


def test_held_out_split_puts_equal_texts_on_one_side_on_every_client() -> None:
    mine, theirs = _texts(300), [Text("other", t.text) for t in reversed(_texts(350, 100))]
    train_mine, held_mine = split_held_out([*mine, *mine], 0.3, 5)
    train_theirs, held_theirs = split_held_out(theirs, 0.3, 5)
    trained = {d.text for d in [*train_mine, *train_theirs]}
    held = {d.text for d in [*held_mine, *held_theirs]}
    assert trained.isdisjoint(held)
    assert len(trained | held) == 450


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("seed", range(8))
def test_held_out_split_of_two_documents_gives_one_each(fraction: float, seed: int) -> None:
    train, held_out = split_held_out(_texts(2), fraction, seed)
    assert len(train) == len(held_out) == 1


def test_held_out_split_of_equal_documents_is_refused() -> None:
    with pytest.raises(DataError, match="two different documents; there are 1 .of 5"):
        split_held_out(_texts(1) * 5, 0.2, 0)
