"""Tokens name the key that their client told last; a client that has lost it is asked for another."""

from collections.abc import Callable, Mapping

from flwr.app import Error, Message, RecordDict

from flower_split.messages.error_codes import KEY_LOST
from flower_split.messages.orders import TrainOrder
from flower_split.server.federation.client_keys import ClientKeys, key_notes
from flower_split.server.federation.waiting import wait_for_clients
from flower_split.server.rounds import run_rounds
from flower_split.server.trunk_access import TrunkHealth
from flower_split.wire.possession import ClientKey, key_of
from tests.support.fakes import FakeCoordinator, FakeGrid
from tests.unit.server.test_fedbuff import Loop, Scripted, good, partition_of
from tests.unit.server.test_handshake import facts
from tests.unit.server.test_rounds import answer
from tests.unit.server.test_trunk_strategy import FEDERATION, NODES, SENT, make_strategy

FIRST, SECOND = ClientKey(), ClientKey()
PARTITION = 1

Answer = Callable[[Message], RecordDict | Error]


def named(keys: ClientKeys, partition_id: int = PARTITION) -> str:
    return key_of(keys.new_token(partition_id))


def told(key: ClientKey) -> Answer:
    return lambda message: facts(PARTITION, public_key=key.public).write()


def text_of(key: ClientKey) -> str:
    """The key as tokens name it."""
    return named(ClientKeys({PARTITION: key.public}))


def test_tokens_name_their_clients_key_and_none_where_it_told_none() -> None:
    keys = ClientKeys({0: b"", PARTITION: FIRST.public})
    assert FIRST.holds(keys.new_token(PARTITION)) and not SECOND.holds(keys.new_token(PARTITION))
    assert named(keys, 0) == named(keys, 2) == ""  # told none; unknown


def test_clients_that_told_no_key_are_named() -> None:
    told_one = facts(0, public_key=FIRST.public)
    assert key_notes({0: told_one}) == []
    [note] = key_notes({2: facts(2), 0: told_one, 1: facts(1)})
    assert "Partitions 1, 2 told no key" in note


def test_client_that_answers_again_is_believed_its_new_key() -> None:
    keys, node = ClientKeys({PARTITION: FIRST.public}), NODES[PARTITION]
    wait_for_clients(FakeGrid([node], told(SECOND)), {PARTITION: node}, 60.0, answered=keys.learn)
    assert named(keys) == text_of(SECOND)


def holding(current: list[ClientKey], good: Answer) -> Answer:
    """A client of the partition that trains with a token for its own key alone."""

    def reply(message: Message) -> RecordDict | Error:
        if FEDERATION.partition_of(message.metadata.dst_node_id) == PARTITION:
            content = message.content
            if message.metadata.message_type == "train" and not current[0].holds(
                TrainOrder.read(content).trunk.token
            ):
                return Error(KEY_LOST, "the key is gone")
        return good(message)

    return reply


def health(
    keys: ClientKeys, current: list[ClientKey], asked: list[Mapping[int, int]]
) -> TrunkHealth:
    def wait(missing: Mapping[int, int]) -> None:
        asked.append(dict(missing))
        grid = FakeGrid(missing.values(), told(current[0]))
        wait_for_clients(grid, missing, 60.0, answered=keys.learn)

    return TrunkHealth(await_clients=wait)


def test_lost_key_costs_one_attempt_and_the_next_token_names_the_new_one() -> None:
    current, asked = [SECOND], list[Mapping[int, int]]()
    coordinator = FakeCoordinator()
    strategy = make_strategy(coordinator)
    strategy.client_keys = ClientKeys({PARTITION: FIRST.public})
    run_rounds(
        strategy,
        FakeGrid(NODES.values(), holding(current, answer)),
        SENT,
        on_round=lambda _: None,
        health=health(strategy.client_keys, current, asked),
    )
    assert asked == [{PARTITION: NODES[PARTITION]}]
    training = [plan for plan in coordinator.plans if not plan.evaluate]
    assert [(plan.server_round, plan.attempt) for plan in training] == [(1, 0), (1, 1), (2, 1)]
    assert [key_of(plan.participants[PARTITION]) for plan in training] == [
        text_of(FIRST),
        text_of(SECOND),
        text_of(SECOND),
    ]


def test_lost_key_in_an_asynchronous_run_is_asked_for_at_once() -> None:
    current, asked = [SECOND], list[Mapping[int, int]]()
    keys = ClientKeys({PARTITION: FIRST.public})
    loop = Loop(Scripted(holding(current, good)), client_keys=keys)
    arrays = loop.arrays
    for server_round in (1, 2, 3):
        arrays, _ = loop.rounds.run(server_round, arrays, health(keys, current, asked))
    assert asked == [{PARTITION: FEDERATION.nodes[PARTITION]}]
    assert PARTITION in {slot for arrivals in loop.arrived() for slot, _ in arrivals}
    tokens = [
        key_of(TrainOrder.read(m.content).trunk.token)
        for m in loop.grid.pushed
        if partition_of(m) == PARTITION
    ]
    assert tokens[0] == text_of(FIRST) and set(tokens[1:]) == {text_of(SECOND)}
