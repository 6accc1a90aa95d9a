"""Replies of clients that share their gradients must be the same client, and stay it."""

import pytest
from flwr.app import Message, RecordDict

from flower_split.errors import FederationError
from flower_split.server.federation.nodes import Federation
from flower_split.server.inner.sync_check import check_synchronised, check_unchanged
from tests.support.fakes import arrays, reply, train_content

FEDERATION = Federation({0: 100, 1: 101, 2: 102})


def replies(*contents: RecordDict) -> dict[int, Message]:
    order = Message(RecordDict(), 100, "train")
    return {partition_id: reply(order, content) for partition_id, content in enumerate(contents)}


def content(values: list[float], digest: str = "d" * 64, tokens: int = 1) -> RecordDict:
    return train_content(arrays(a=[1.0], b=values), tokens=tokens, private_digest=digest)


def test_equal_replies_pass_whatever_their_tokens() -> None:
    check_synchronised(replies(content([2.0]), content([2.0], tokens=7)), FEDERATION, 1)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (content([2.0000002]), r"partition 2 \(node 102\) differs from partition 0 in b"),
        (content([2.0], "e" * 64), "in the state of its optimizer"),
        (train_content(arrays(a=[1.0]), tokens=1, private_digest="d" * 64), "in b"),
    ],
)
def test_a_reply_that_differs_is_named(other: RecordDict, words: str) -> None:
    with pytest.raises(FederationError, match=words):
        check_synchronised(replies(content([2.0]), content([2.0]), other), FEDERATION, 3)


def test_an_aggregate_that_is_not_what_came_back_is_refused() -> None:
    same = replies(content([2.0]), content([2.0]))
    check_unchanged(arrays(a=[1.0], b=[2.0]), same, 3)
    with pytest.raises(FederationError, match="round 3: .* it changed b"):
        check_unchanged(arrays(a=[1.0], b=[2.5]), same, 3)
