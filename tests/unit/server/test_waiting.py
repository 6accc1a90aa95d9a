"""A client that is gone is waited for before an attempt is spent, and named where it does not return."""

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from flower_split.errors import FederationError, RoundLost
from flower_split.server.federation.waiting import wait_for_clients
from flower_split.server.rounds import run_rounds
from flower_split.server.trunk_access import TrunkHealth
from tests.support.fakes import FakeCoordinator, FakeGrid
from tests.unit.server.test_rounds import answer
from tests.unit.server.test_trunk_strategy import FEDERATION, NODES, SENT, make_strategy

GONE = Error(ErrorCode.NODE_UNAVAILABLE, "node unavailable")


def test_client_is_asked_until_it_answers_and_the_others_are_not_asked_again() -> None:
    asked: list[int] = []

    def returning(message: Message) -> RecordDict | Error:
        node = message.metadata.dst_node_id
        asked.append(node)
        return GONE if node == 30 and asked.count(30) < 3 else RecordDict({"r": ConfigRecord()})

    pauses: list[float] = []
    wait_for_clients(FakeGrid([20, 30], returning), {1: 20, 2: 30}, 60.0, pause=pauses.append)
    assert sorted(asked) == [20, 30, 30, 30] and len(pauses) == 2


def test_client_that_does_not_come_back_is_named_with_its_node_and_the_remedy() -> None:
    grid = FakeGrid([20, 30], lambda _: GONE)
    with pytest.raises(FederationError) as caught:
        wait_for_clients(grid, {2: 30}, 0.0)
    text = str(caught.value)
    assert "partition 2 (node 30): node unavailable" in text
    assert "join-timeout" in text and "65 s" in text and not isinstance(caught.value, RoundLost)


def test_lost_client_is_waited_for_before_the_next_attempt() -> None:
    lost, order, gone = [GONE], list[str](), list[int]()

    def once(message: Message) -> RecordDict | Error | None:
        order.append("asked")
        if lost:
            gone.append(message.metadata.dst_node_id)
        return lost.pop() if lost else answer(message)

    waited: list[dict[int, int]] = []

    def wait(missing: dict[int, int]) -> None:
        order.append("waited")
        waited.append(dict(missing))

    grid = FakeGrid(NODES.values(), once)
    run_rounds(
        make_strategy(FakeCoordinator()),
        grid,
        SENT,
        on_round=lambda _: None,
        health=TrunkHealth(await_clients=wait),
    )
    assert waited == [{FEDERATION.partition_of(gone[0]): gone[0]}]
    assert order.index("waited") == len(NODES)  # after the lost attempt, before any other message


def test_run_ends_where_a_lost_client_does_not_come_back() -> None:
    def fail(missing: dict[int, int]) -> None:
        raise FederationError("it did not come back")

    coordinator = FakeCoordinator()
    with pytest.raises(FederationError, match="did not come back"):
        run_rounds(
            make_strategy(coordinator),
            FakeGrid(NODES.values(), lambda _: GONE),
            SENT,
            on_round=lambda _: None,
            health=TrunkHealth(await_clients=fail),
        )
    assert [plan.attempt for plan in coordinator.plans] == [0]  # no attempt was spent on it
