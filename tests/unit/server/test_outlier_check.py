"""Before a strategy of Flower's: a client that moved its adapter far more than the others is named."""

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from flower_split.errors import FederationError
from flower_split.server.federation.nodes import Federation
from flower_split.server.inner.outlier_check import check_moves
from tests.support.fakes import arrays, reply, train_content

FEDERATION = Federation({0: 100, 1: 101, 2: 102})


def check(*moves: float, tokens: tuple[int, ...] = (5, 5, 5), factor: float = 20.0) -> None:
    sent = RecordDict({"arrays": arrays(a=[1.0, 1.0])})
    messages = {i: Message(sent, 100 + i, "train") for i in range(len(moves))}
    replies = {
        i: reply(messages[i], train_content(arrays(a=[1.0, 1.0 + move]), tokens=tokens[i]))
        for i, move in enumerate(moves)
    }
    check_moves(FedAvg(), replies, messages, FEDERATION, 4, factor)


def test_client_that_moved_more_than_the_factor_is_named() -> None:
    check(1.0, 2.0, 19.0)
    with pytest.raises(
        FederationError, match=r"round 4: partition 1 \(node 101\) .*outlier-factor"
    ):
        check(1.0, 80.0, 2.0)


def test_client_of_more_tokens_may_have_moved_further() -> None:
    check(1.0, 80.0, 2.0, tokens=(5, 50, 5))


def test_two_clients_and_a_factor_of_zero_have_no_bound() -> None:
    check(1.0, 1e6)
    check(1.0, 1e6, 2.0, factor=0.0)
