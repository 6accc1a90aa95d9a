"""Checks before round 1: every refusal names its remedy, and none waits for a barrier."""

import time
from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.errors import FederationError
from flower_split.messages.client_facts import ClientFacts
from flower_split.server.federation import handshake
from flower_split.server.federation.handshake import (
    check_facts,
    federation_config,
    num_participants,
    shake_hands,
    wait_for_nodes,
)
from tests.support.fakes import FakeGrid

FINGERPRINT = {"model": "abc", "mode": "joint"}


def facts(partition_id: int, **changes: object) -> ClientFacts:
    values: dict[str, object] = {
        "partition_id": partition_id,
        "num_partitions": 4,
        "num_examples": 10,
        "num_eval_examples": 2,
        "planned_steps": 3,
        "concurrency": 4,
        "fingerprint": FINGERPRINT,
    }
    return ClientFacts(**{**values, **changes})  # type: ignore[arg-type]


def config(**changes: Scalar) -> RunConfig:
    return parse_run_config({k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()})


def check(answers: Iterable[tuple[int, ClientFacts]], cfg: RunConfig | None = None) -> str:
    """The refusal's words."""
    with pytest.raises(FederationError) as caught:
        check_facts(list(answers), cfg or config(), FINGERPRINT)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_check_facts_maps_slots_to_nodes() -> None:
    answers = [(50, facts(1)), (10, facts(3)), (30, facts(0)), (20, facts(2))]
    federation = check_facts(answers, config(), FINGERPRINT)
    assert dict(federation.nodes) == {0: 30, 1: 50, 2: 20, 3: 10}
    assert federation.partition_of(10) == 3


def test_check_facts_of_two_nodes_with_one_partition_names_both() -> None:
    text = check([(50, facts(1)), (10, facts(1))])
    assert "10" in text and "50" in text and "partition-id=" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_examples": 0}, ("no training examples", "partition 1", "node 50")),
        ({"num_eval_examples": 0}, ("no held-out examples", "data.eval-fraction")),
        ({"planned_steps": 0}, ("no optimizer step", "train.local-steps")),
        ({"partition_id": 4}, ("partition 4 of 4", "--node-config")),
        ({"fingerprint": {"model": "xyz", "mode": "joint"}}, ("model", "'xyz'", "'abc'")),
    ],
)
def test_check_facts_of_a_client_that_cannot_train_names_it_and_the_remedy(
    changes: dict[str, object], words: tuple[str, ...]
) -> None:
    text = check([(50, facts(**{"partition_id": 1, **changes}))])  # type: ignore[arg-type]
    assert all(word in text for word in words), text


def test_check_facts_refuses_what_an_older_client_left_out_unless_it_is_at_its_default() -> None:
    older = facts(1, package_version="0.0.9", ignored_keys=("fraction-train", "trunk.quorum"))
    check_facts([(50, older)], config(), FINGERPRINT)
    text = check([(50, older)], config(trunk__quorum=0.5))
    assert text.startswith(
        "partition 1 (node 50) has flower-split 0.0.9, which does not know trunk.quorum (here 0.5, by "
        "default 1.0). Upgrade it there"
    )


def test_check_facts_of_another_protocol_says_who_is_to_be_upgraded() -> None:
    older = facts(1, package_version="0.0.9", fingerprint={**FINGERPRINT, "protocol": "1"})
    with pytest.raises(FederationError) as caught:
        check_facts([(50, older)], config(), {**FINGERPRINT, "protocol": "2-3"})
    assert str(caught.value) == (
        "partition 1 (node 50, flower-split 0.0.9) speaks protocol 1, the run's trunk 2-3. Upgrade "
        "flower-split of partition 1 (node 50, flower-split 0.0.9)."
    )


def test_check_facts_with_too_few_at_once_gives_the_line_to_use() -> None:
    text = check(
        [(10 + partition_id, facts(partition_id, concurrency=2)) for partition_id in range(4)]
    )
    assert f"flwr run APP --stream --federation-config '{federation_config(4)}'" in text
    assert "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=4" in text


def test_check_facts_beyond_the_pool_offers_what_can_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "pool_cap", lambda: 3)
    text = check(
        [(10 + partition_id, facts(partition_id, concurrency=3)) for partition_id in range(4)]
    )
    assert "server-round" in text and "at most 3" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"trunk__step_every": "server-round"},
        {"trunk__step_every": "contribution"},
        {"mode": "frozen"},
        {"mode": "forward-only"},
        {"fraction_train": 0.5},
    ],
)
def test_check_facts_with_few_at_once_passes_where_no_barrier_needs_more(
    changes: dict[str, Scalar],
) -> None:
    answers = [(10 + partition_id, facts(partition_id, concurrency=2)) for partition_id in range(4)]
    check_facts(answers, config(**changes), FINGERPRINT)


def test_check_facts_outside_a_simulation_asks_for_no_concurrency() -> None:
    check_facts(
        [(partition_id, facts(partition_id, concurrency=0)) for partition_id in range(4)],
        config(),
        FINGERPRINT,
    )


@pytest.mark.parametrize(
    ("nodes", "fraction", "expected"),
    [(4, 1.0, 4), (4, 0.5, 2), (4, 0.1, 1), (10, 0.3, 3), (3, 0.0, 0)],
)
def test_num_participants(nodes: int, fraction: float, expected: int) -> None:
    assert num_participants(nodes, fraction) == expected


def test_shake_hands_asks_every_node() -> None:
    partitions = {70: 0, 20: 1}
    grid = FakeGrid(
        partitions,
        lambda m: facts(partitions[m.metadata.dst_node_id]).write(),
    )
    federation, found = shake_hands(grid, [20, 70], config(), FINGERPRINT)
    assert dict(federation.nodes) == {0: 70, 1: 20}
    assert found == {0: facts(0), 1: facts(1)}


def test_shake_hands_with_a_failing_client_passes_its_words_on() -> None:
    def answer(message: Message) -> RecordDict | Error:
        if message.metadata.dst_node_id == 20:
            return Error(code=2, reason="there is no file x.jsonl. Check data.path.")
        return facts(0).write()

    with pytest.raises(FederationError, match=r"node 20: there is no file x\.jsonl"):
        shake_hands(FakeGrid([20, 70], answer), [20, 70], config(), FINGERPRINT)


def test_shake_hands_with_a_silent_client_ends_at_the_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(FederationError, match="no reply within the deadline"):
        shake_hands(FakeGrid([1], lambda _: None), [1], config(round_timeout=0.3), FINGERPRINT)
    assert time.monotonic() - start < 3


def test_shake_hands_with_another_version_says_so() -> None:
    grid = FakeGrid([1], lambda _: RecordDict({"handshake": ConfigRecord({"partition-id": 0})}))
    with pytest.raises(FederationError, match="same version"):
        shake_hands(grid, [1], config(), FINGERPRINT)


def test_wait_for_nodes_in_a_deployment_waits_for_late_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = FakeGrid([5], lambda _: None)

    def join(_: float) -> None:
        grid.nodes = [5, 3]

    monkeypatch.setattr(handshake.time, "sleep", join)
    assert wait_for_nodes(grid, config(num_clients=2)) == [3, 5]


def test_wait_for_nodes_in_a_deployment_ends_at_join_timeout() -> None:
    grid = FakeGrid([5], lambda _: None)
    with pytest.raises(FederationError, match=r"only 1 SuperNodes.*--node-config"):
        wait_for_nodes(grid, config(num_clients=2, join_timeout=0.2))


def test_wait_for_nodes_in_a_simulation_fails_at_once_with_the_line_to_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handshake, "is_simulation", lambda _: True)
    monkeypatch.setattr(handshake, "_SETTLE_SECONDS", 0.1)
    start = time.monotonic()
    with pytest.raises(FederationError) as caught:
        wait_for_nodes(FakeGrid([5, 6], lambda _: None), config(num_clients=4))
    assert time.monotonic() - start < 5  # not join-timeout, which is 180 s
    assert federation_config(4) in str(caught.value)


def test_check_facts_of_a_rank_for_a_partition_that_is_not_there_names_it() -> None:
    text = check([(50, facts(1)), (10, facts(0))], config(lora__rank_by_partition="0=2, 9=4"))
    assert "lora.rank-by-partition names partition 9" in text and "0, 1" in text
