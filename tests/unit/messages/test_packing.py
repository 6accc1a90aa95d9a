"""Records of arrays as one array: the same arrays come back, and nothing else is taken for one."""

import json
import struct
from collections.abc import Sequence

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from flower_split.client.app import SplitClientApp
from flower_split.errors import FederationError
from flower_split.messages.packing import is_packed, packed, unpacked
from flower_split.server.packed_grid import PackedGrid
from tests.support.fakes import FakeGrid

CONTENT = RecordDict(
    {
        "config": ConfigRecord({"lr": 0.5}),
        "arrays": ArrayRecord(
            {
                "ü/b": Array(np.arange(6, dtype=np.float32).reshape(2, 3)),
                "a": Array(np.zeros((0, 4), dtype=np.int64)),
                "scalar": Array(np.array(1.5)),
            }
        ),
        "one": ArrayRecord({"only": Array(np.ones(3))}),
        "none": ArrayRecord({}),
    }
)
NODE = 7


def message(content: RecordDict = CONTENT) -> Message:
    return Message(content, NODE, "train")


def same(one: RecordDict, other: RecordDict) -> bool:
    """Whether two contents are equal to Flower, which names content by its hash."""
    return one.object_id == other.object_id and list(one) == list(other)


def test_arrays_come_back_as_they_were_and_the_message_is_not_changed() -> None:
    sent = message()
    travels = packed(sent)
    assert is_packed(travels) and not is_packed(sent)
    assert travels.metadata is sent.metadata
    assert {name: len(record) for name, record in travels.content.array_records.items()} == {
        "arrays": 1,
        "one": 1,
        "none": 0,
    }
    back = unpacked(travels)
    assert same(back.content, CONTENT) and same(sent.content, CONTENT)
    assert list(back.content.array_records["arrays"]) == ["ü/b", "a", "scalar"]
    assert not is_packed(back)


def test_a_message_without_several_arrays_is_left_alone() -> None:
    sent = message(RecordDict({"one": CONTENT["one"], "config": CONTENT["config"]}))
    assert packed(sent) is sent and unpacked(sent) is sent


def forged(described: object, data: bytes = b"", length: int | None = None) -> Message:
    """A message whose packed record says what is given."""
    listed = json.dumps(described).encode()
    content = struct.pack("!Q", len(listed) if length is None else length) + listed + data
    array = Array("uint8", (len(content),), "flower-split.packed", content)
    return message(RecordDict({"arrays": ArrayRecord({"packed": array})}))


@pytest.mark.parametrize(
    ("described", "data", "length"),
    [
        ([["a", "float32", [1], "numpy.ndarray", 5]], b"1234", None),
        ([["a", "float32", [1], "numpy.ndarray", 3]], b"1234", None),
        ([["a", "float32", [1], "numpy.ndarray", -1]], b"", None),
        ([["a", "float32", [1], "numpy.ndarray", True]], b"1", None),
        ([["a", "float32", [1], "numpy.ndarray", 1.0]], b"1", None),
        ([["a", "float32", [1], "numpy.ndarray", 0]] * 2, b"", None),
        ([[5, "float32", [1], "numpy.ndarray", 0]], b"", None),
        ([["a", 5, [1], "numpy.ndarray", 0]], b"", None),
        ([["a", "float32", ["1"], "numpy.ndarray", 0]], b"", None),
        ([["a", "float32", 1, "numpy.ndarray", 0]], b"", None),
        ([["a"]], b"", None),
        ({"a": 1}, b"", None),
        (5, b"", None),
        ([], b"1", None),
        ([], b"", 1 << 63),
        ([], b"", 1),
    ],
)
def test_what_is_no_packed_record_is_refused_in_words(
    described: object, data: bytes, length: int | None
) -> None:
    with pytest.raises(FederationError, match="packed arrays 'arrays' cannot be read"):
        unpacked(forged(described, data, length))


@pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("!Q", 1) + b"\xff"])
def test_bytes_that_are_none_are_refused_in_words(data: bytes) -> None:
    array = Array("uint8", (len(data),), "flower-split.packed", data)
    with pytest.raises(FederationError, match="Run the same version"):
        unpacked(message(RecordDict({"arrays": ArrayRecord({"packed": array})})))


def ask(grid: PackedGrid, sent: Sequence[Message]) -> list[Message]:
    return list(grid.pull_messages(list(grid.push_messages(sent))))


def test_grid_packs_for_the_nodes_that_understand_it_and_shows_nobody() -> None:
    travelled: list[Message] = []

    def answer(order: Message) -> RecordDict:
        travelled.append(order)
        return packed(order).content if is_packed(order) else order.content

    sent = [Message(CONTENT, node, "train") for node in (NODE, 8)]
    replies = ask(PackedGrid(FakeGrid([NODE, 8], answer), [NODE]), sent)
    assert {m.metadata.dst_node_id: is_packed(m) for m in travelled} == {NODE: True, 8: False}
    assert all(same(reply.content, CONTENT) for reply in replies) and len(replies) == 2
    assert {m.metadata.message_id for m in sent} == {
        reply.metadata.reply_to_message_id for reply in replies
    }


def test_reply_that_cannot_be_unpacked_is_its_nodes_failure() -> None:
    replies = ask(PackedGrid(FakeGrid([NODE], lambda _: forged([], b"1").content), []), [message()])
    assert "1 bytes belong to no array" in replies[0].error.reason
    assert not replies[0].has_content()


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (2,), "pickle", b"1234"),
        Array("float32", (2,), "numpy.ndarray", b""),
        Array("float32", (2,), "numpy.ndarray", b"noise that is no array"),
        Array("float32", (2,), "numpy.ndarray", Array(np.ones(99)).data[:-9]),
    ],
)
def test_reply_with_an_array_that_cannot_be_read_is_its_nodes_failure(array: Array) -> None:
    content = RecordDict({"arrays": ArrayRecord({"a": Array(np.ones(2)), "bad": array})})
    for sent in (content, packed(message(content)).content):
        replies = ask(PackedGrid(FakeGrid([NODE], lambda _, sent=sent: sent), [NODE]), [message()])
        assert "array 'bad' of record 'arrays' cannot be read" in replies[0].error.reason


def context() -> Context:
    return Context(run_id=1, node_id=NODE, node_config={}, state=RecordDict(), run_config={})


def app_that_answers(content: RecordDict | None) -> tuple[ClientApp, list[RecordDict]]:
    """The app, and what reached its handler."""
    seen: list[RecordDict] = []
    app = SplitClientApp()

    @app.train()
    def train(order: Message, _: Context) -> Message:
        seen.append(order.content)
        if content is None:
            return Message(Error(2, "no"), reply_to=order)
        return Message(content, reply_to=order)

    return app, seen


@pytest.mark.parametrize("packs", [True, False])
def test_app_answers_a_packed_order_packed_and_its_handler_sees_neither(packs: bool) -> None:
    app, seen = app_that_answers(CONTENT)
    reply = app(packed(message()) if packs else message(), context())
    assert is_packed(reply) == packs
    assert same(seen[0], CONTENT) and same(unpacked(reply).content, CONTENT)


def test_apps_error_goes_back_as_it_is() -> None:
    app, _ = app_that_answers(None)
    assert app(packed(message()), context()).error.reason == "no"


def test_order_that_cannot_be_unpacked_is_answered_in_words() -> None:
    app, seen = app_that_answers(CONTENT)
    assert "cannot be read" in app(forged(5), context()).error.reason
    assert seen == []
