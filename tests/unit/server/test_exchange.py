"""Sending, waiting and sorting replies."""

import time

from flwr.app import ConfigRecord, Error, Message, RecordDict

from flower_split.server.federation.exchange import by_partition, exchange, failure_text
from flower_split.server.federation.nodes import Federation, describe, describe_nodes
from tests.support.fakes import FakeGrid, reply

FEDERATION = Federation({0: 30, 1: 10, 2: 20})


def messages() -> list[Message]:
    return [Message(RecordDict(), node, "query") for node in (30, 10, 20)]


def test_exchange_returns_at_the_deadline_without_the_missing_replies() -> None:
    grid = FakeGrid([10, 20, 30], lambda m: None if m.metadata.dst_node_id == 10 else RecordDict())
    start = time.monotonic()
    replies = exchange(grid, messages(), timeout=0.3)
    assert 0.3 <= time.monotonic() - start < 3
    assert sorted(r.metadata.src_node_id for r in replies) == [20, 30]


def test_exchange_ends_when_the_watch_says_so() -> None:
    looks: list[int] = []

    def watch(new: list[Message]) -> bool:  # type: ignore[type-arg, unused-ignore]
        looks.append(len(new))
        return len(looks) == 2

    grid = FakeGrid([10, 20, 30], lambda m: None if m.metadata.dst_node_id == 10 else RecordDict())
    exchange(grid, messages(), timeout=60, watch=watch)  # type: ignore[arg-type]
    assert looks == [2, 0]


def test_exchange_of_nothing_returns_at_once() -> None:
    assert exchange(FakeGrid([], lambda _: None), [], timeout=60) == []


def test_by_slot_sorts_by_slot_whatever_the_order_and_counts_the_missing() -> None:
    def answer(message: Message) -> RecordDict | Error | None:
        node = message.metadata.dst_node_id
        return {30: RecordDict({"c": ConfigRecord({"x": 1})}), 10: Error(2, "bad"), 20: None}[node]

    sent = messages()
    replies = exchange(FakeGrid([10, 20, 30], answer), sent, timeout=0.1)
    good, problems = by_partition(FEDERATION, sent, replies)
    assert list(good) == [0]
    assert problems == {1: "bad", 2: "no reply within the deadline"}


def test_failure_text_takes_flowers_wrapping_off() -> None:
    message = messages()[0]
    traced = (
        "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::run()\n"
        '  File "x.py", line 1\nflwr.clientapp.client_app.ClientAppException: \n'
        "Exception ClientAppException occurred. Message: the disk\nis full'>"
    )
    assert failure_text(reply(message, Error(2, traced))) == "the disk is full"
    assert failure_text(reply(message, Error(2, "plain words"))) == "plain words"
    assert "code 5" in failure_text(reply(message, Error(5, None)))
    assert failure_text(reply(message, RecordDict())) == ""


def test_describe_says_equal_reasons_once() -> None:
    text = describe({0: "no disk", 1: "no memory", 2: "no disk"}, FEDERATION)
    assert text == (
        "partitions 0 (node 30), 2 (node 20): no disk; partition 1 (node 10): no memory"
    )


def test_failure_text_of_a_dead_actor_is_short() -> None:
    text = (
        "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly before " + "x" * 900
    )
    assert len(failure_text(reply(messages()[0], Error(0, text + "'>")))) < 200


def test_describe_nodes_tells_an_equal_reason_once() -> None:
    text = describe_nodes(
        {0: "no data.", 1: "no disk.", 2: "no data."}, Federation({0: 7, 1: 8, 2: 9})
    )
    assert text == "nodes 7, 9: no data.; node 8: no disk."
