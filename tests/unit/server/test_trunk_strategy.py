"""The strategy around a trunk, with a fake grid and a fake coordinator."""

import dataclasses
import logging
from collections.abc import Mapping
from types import MappingProxyType

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, Strategy

from flower_split.config import RunConfig, TrunkConfig, parse_run_config
from flower_split.errors import FederationError, RoundAborted, TrunkUnavailable
from flower_split.protocol.values import RoundBase
from flower_split.server.federation.exchange import exchange
from flower_split.server.federation.nodes import Federation
from flower_split.server.metric_sinks import MetricSinks
from flower_split.server.trunk_access import TrunkAccess
from flower_split.server.trunk_rounds import CommitSink, StartingPoint, TrunkRounds
from flower_split.server.trunk_strategy import TrunkStrategy
from tests.support.fakes import FakeCoordinator, FakeGrid, arrays, reply, train_content

NODES = {0: 900, 1: 300, 2: 700, 3: 100}  # partition -> node id, deliberately not ascending
FEDERATION = Federation(NODES)
SENT = arrays(w=[0.0])


def make_config(**trunk: object) -> RunConfig:
    config = parse_run_config({"num-server-rounds": 2})
    return dataclasses.replace(config, trunk=dataclasses.replace(TrunkConfig(), **trunk))


def inner_fedavg() -> FedAvg:
    return FedAvg(
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=1,
        weighted_by_key="num-tokens",
    )


def make_strategy(
    coordinator: FakeCoordinator,
    config: RunConfig | None = None,
    *,
    inner: Strategy | None = None,
    federation: Federation = FEDERATION,
    base: RoundBase | None = None,
    on_commit: CommitSink | None = None,
    sinks: MetricSinks = MetricSinks(),
    largest_weights: Mapping[int, float] = MappingProxyType({}),
) -> TrunkStrategy:
    config = config or make_config()
    trunk_rounds = TrunkRounds(
        coordinator,
        TrunkAccess(address="trunk.example:1"),
        config,
        StartingPoint("exp", base=base),
        steps_per_round=3,
        on_commit=on_commit,
    )
    return TrunkStrategy(
        inner or inner_fedavg(),
        trunk_rounds,
        federation,
        config,
        largest_weights=largest_weights,
        sinks=sinks,
    )


def good_answer(message: Message) -> RecordDict:
    """Slot s returns weight s + 1 with 10 · (s + 1) tokens."""
    partition_id = FEDERATION.partition_of(message.metadata.dst_node_id)
    return train_content(arrays(w=[partition_id + 1.0]), tokens=10 * (partition_id + 1))


def train(
    strategy: TrunkStrategy, grid: FakeGrid, server_round: int = 1
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    messages = strategy.configure_train(server_round, SENT, ConfigRecord(), grid)
    replies = exchange(grid, messages, timeout=0.2)
    return strategy.aggregate_train(server_round, replies)


def config_of(message: Message) -> Mapping[str, object]:
    (record,) = message.content.config_records.values()
    return record


def test_configure_train_gives_each_client_its_own_token_in_its_own_record() -> None:
    coordinator, shared = FakeCoordinator(), ConfigRecord({"x": 1})
    strategy = make_strategy(coordinator)
    messages = list(
        strategy.configure_train(1, SENT, shared, FakeGrid(NODES.values(), good_answer))
    )
    assert [m.metadata.dst_node_id for m in messages] == [900, 300, 700, 100]  # partition order
    tokens = [config_of(m)["flower-split.trunk-token"] for m in messages]
    assert len(set(tokens)) == 4
    assert dict(coordinator.plans[0].participants) == dict(enumerate(tokens))
    assert all(config_of(m)["flower-split.trunk-address"] == "trunk.example:1" for m in messages)
    assert all(config_of(m)["x"] == 1 for m in messages)
    assert not any("trunk" in key for key in shared)  # Flower logs the shared record


def test_configure_train_again_hands_out_other_tokens() -> None:
    coordinator = FakeCoordinator()
    strategy = make_strategy(coordinator)
    grid = FakeGrid(NODES.values(), good_answer)
    strategy.configure_train(1, SENT, ConfigRecord(), grid)
    strategy.configure_train(2, SENT, ConfigRecord(), grid)
    first, second = (set(plan.participants.values()) for plan in coordinator.plans)
    assert not first & second


def test_configure_train_with_a_fraction_samples_the_same_slots_again_and_other_ones_later() -> (
    None
):
    config = dataclasses.replace(make_config(), fraction_train=0.5)

    def chosen(server_round: int, nodes: dict[int, int]) -> list[int]:
        strategy = make_strategy(FakeCoordinator(), config, federation=Federation(nodes))
        grid = FakeGrid(nodes.values(), good_answer)
        strategy.configure_train(server_round, SENT, ConfigRecord(), grid)
        assert strategy.phase is not None
        return strategy.phase.partition_ids

    other_ids = {partition_id: 5000 - 7 * partition_id for partition_id in NODES}
    rounds = [chosen(r, NODES) for r in range(1, 9)]
    assert all(len(partition_ids) == 2 for partition_ids in rounds)
    assert rounds == [chosen(r, other_ids) for r in range(1, 9)]
    assert len({tuple(partition_ids) for partition_ids in rounds}) > 1


def test_aggregate_train_weights_by_tokens_and_commits_after_prepare() -> None:
    coordinator = FakeCoordinator()
    result, metrics = train(make_strategy(coordinator), FakeGrid(NODES.values(), good_answer))
    assert result is not None and metrics is not None
    # (1·10 + 2·20 + 3·30 + 4·40) / 100 = 3
    assert result["w"].numpy().tolist() == pytest.approx([3.0])
    assert coordinator.calls == ["begin", "prepare", "commit"]
    assert "steps" not in metrics


def test_aggregate_train_hands_the_inner_strategy_replies_in_slot_order_without_steps() -> None:
    seen: list[tuple[int, list[str]]] = []

    class Spy(FedMedian):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            replies = list(replies)
            seen.extend((m.metadata.src_node_id, sorted(m.content)) for m in replies)
            return super().aggregate_train(server_round, replies)

    spy = Spy(min_train_nodes=1, min_available_nodes=1, weighted_by_key="num-tokens")
    strategy = make_strategy(FakeCoordinator(), inner=spy)
    train(strategy, FakeGrid(NODES.values(), good_answer))
    assert seen == [(node, ["arrays", "metrics"]) for node in (900, 300, 700, 100)]


def test_aggregate_train_passes_step_metrics_to_the_sink() -> None:
    seen = []
    strategy = make_strategy(
        FakeCoordinator(), sinks=MetricSinks(steps=lambda *args: seen.append(args))
    )
    train(strategy, FakeGrid(NODES.values(), good_answer))
    assert [(r, partition_id, dict(lists)) for r, partition_id, lists, _ in seen] == [
        (1, partition_id, {"loss": [1.0, 0.5]}) for partition_id in range(4)
    ]
    assert [metrics["num-tokens"] for *_, metrics in seen] == [10, 20, 30, 40]


def test_aggregate_train_drops_the_replies_of_slots_the_trunk_left_out() -> None:
    coordinator = FakeCoordinator(incomplete={3: "it was late"})
    strategy = make_strategy(coordinator, make_config(quorum=0.5))
    result, _ = train(strategy, FakeGrid(NODES.values(), good_answer))
    assert result is not None
    # (1·10 + 2·20 + 3·30) / 60
    assert result["w"].numpy().tolist() == pytest.approx([140 / 60])


@pytest.mark.parametrize(("count", "enough"), [(3, True), (4, False), (9, False)])
def test_quorum_as_a_count_decides_as_a_share_does(count: int, enough: bool) -> None:
    coordinator = FakeCoordinator(incomplete={3: "it was late"})
    strategy = make_strategy(coordinator, make_config(quorum=0.1, quorum_count=count))
    grid = FakeGrid(NODES.values(), good_answer)
    if enough:
        assert train(strategy, grid)[0] is not None
    else:
        with pytest.raises(FederationError, match="3 of 4 clients completed.* needs 4"):
            train(strategy, grid)
    assert coordinator.plans[0].quorum == min(1.0, count / 4)


def test_aggregate_train_with_a_failed_client_below_quorum_aborts_and_names_it() -> None:
    def answer(message: Message) -> RecordDict | Error:
        if message.metadata.dst_node_id == 700:
            return Error(code=2, reason="the disk is full. Make room.")
        return good_answer(message)

    coordinator = FakeCoordinator()
    with pytest.raises(FederationError) as caught:
        train(make_strategy(coordinator), FakeGrid(NODES.values(), answer))
    text = str(caught.value)
    assert "partition 2 (node 700): the disk is full" in text and "quorum" in text
    assert "\n" not in text
    assert coordinator.calls == ["begin", "abort"]


def test_aggregate_train_with_a_failed_client_above_quorum_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(message: Message) -> RecordDict | None:
        return None if message.metadata.dst_node_id == 100 else good_answer(message)

    strategy = make_strategy(FakeCoordinator(incomplete={3: "silent"}), make_config(quorum=0.75))
    with caplog.at_level(logging.WARNING):
        result, _ = train(strategy, FakeGrid(NODES.values(), answer))
    assert result is not None
    assert result["w"].numpy().tolist() == pytest.approx([140 / 60])
    assert "partition 3 (node 100): no reply within the deadline" in caplog.text


@pytest.mark.parametrize("quorum", [1.0, 0.01])
def test_aggregate_train_with_every_client_failed_raises(quorum: float) -> None:
    coordinator = FakeCoordinator()
    strategy = make_strategy(coordinator, make_config(quorum=quorum))
    grid = FakeGrid(NODES.values(), lambda _: Error(code=2, reason="no"))
    with pytest.raises(FederationError, match="0 of 4 clients"):
        train(strategy, grid)
    assert coordinator.calls[-1] == "abort"


def test_aggregate_train_with_an_aborted_trunk_raises_its_words() -> None:
    coordinator = FakeCoordinator(prepare_error=RoundAborted("slot 1 never came"))
    with pytest.raises(FederationError, match="slot 1 never came"):
        train(make_strategy(coordinator), FakeGrid(NODES.values(), good_answer))
    assert "commit" not in coordinator.calls


def test_aggregate_train_with_zero_weights_raises_and_aborts() -> None:
    def answer(message: Message) -> RecordDict:
        return train_content(arrays(w=[1.0]), tokens=0)

    coordinator = FakeCoordinator()
    with pytest.raises(FederationError, match="label token, so there is nothing"):
        train(make_strategy(coordinator), FakeGrid(NODES.values(), answer))
    assert coordinator.calls == ["begin", "prepare", "abort"]


def test_aggregate_train_with_non_finite_adapter_names_the_client() -> None:
    def answer(message: Message) -> RecordDict:
        if message.metadata.dst_node_id == 300:
            return train_content(arrays(w=[float("nan")]), tokens=5)
        return good_answer(message)

    coordinator = FakeCoordinator()
    with pytest.raises(FederationError, match=r"partition 1 \(node 300\).*NaN"):
        train(make_strategy(coordinator), FakeGrid(NODES.values(), answer))
    assert coordinator.calls[-1] == "abort"


def test_aggregate_train_with_a_failing_commit_raises() -> None:
    coordinator = FakeCoordinator(commit_error=TrunkUnavailable("gone"))
    with pytest.raises(TrunkUnavailable):
        train(make_strategy(coordinator), FakeGrid(NODES.values(), good_answer))


def test_aggregate_train_with_an_inner_error_aborts() -> None:
    class Broken(FedAvg):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            raise RuntimeError("inner")

    coordinator = FakeCoordinator()
    strategy = make_strategy(coordinator, inner=Broken(min_train_nodes=1, min_available_nodes=1))
    with pytest.raises(RuntimeError, match="inner"):
        train(strategy, FakeGrid(NODES.values(), good_answer))
    assert coordinator.calls == ["begin", "prepare", "abort"]


def test_aggregate_train_ignores_replies_of_another_phase() -> None:
    coordinator = FakeCoordinator()
    strategy = make_strategy(coordinator)
    grid = FakeGrid(NODES.values(), good_answer)
    messages = strategy.configure_train(1, SENT, ConfigRecord(), grid)
    replies = exchange(grid, messages, timeout=0.2)
    stray = Message(RecordDict({"arrays": arrays(w=[1e9])}), 900, "train")
    stray.metadata.__dict__["_message_id"] = "old"
    content = train_content(arrays(w=[1e9]), tokens=10)
    result, _ = strategy.aggregate_train(1, [reply(stray, content), *replies])
    assert result is not None
    assert result["w"].numpy().tolist() == pytest.approx([3.0])


def test_aggregate_train_maps_a_dead_nodes_error_by_its_message() -> None:
    coordinator = FakeCoordinator()
    strategy = make_strategy(coordinator)
    grid = FakeGrid(NODES.values(), good_answer)
    messages = list(strategy.configure_train(1, SENT, ConfigRecord(), grid))
    replies = exchange(grid, messages, timeout=0.2)
    dead = reply(messages[1], Error(code=5, reason="node unavailable"))
    dead.metadata.__dict__["_src_node_id"] = 1  # what Flower writes for a dead node
    replies = [r for r in replies if r.metadata.src_node_id != 300] + [dead]
    with pytest.raises(FederationError, match=r"partition 1 \(node 300\): node unavailable"):
        strategy.aggregate_train(1, replies)


def test_configure_train_of_an_inner_strategy_that_wants_more_nodes_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda _: None)
    strategy = make_strategy(FakeCoordinator(), inner=FedAvg(min_available_nodes=5))
    with pytest.raises(FederationError, match="min_available_nodes"):
        strategy.configure_train(1, SENT, ConfigRecord(), FakeGrid(NODES.values(), good_answer))


def test_evaluate_opens_an_evaluation_and_ends_it() -> None:
    def answer(message: Message) -> RecordDict:
        partition_id = FEDERATION.partition_of(message.metadata.dst_node_id)
        record = MetricRecord(
            {"loss-sum": 10.0 * partition_id, "eval_loss": 1.0 * partition_id, "num-tokens": 10}
        )
        return RecordDict({"metrics": record})

    seen: list[tuple[int, int]] = []
    coordinator = FakeCoordinator()
    strategy = make_strategy(
        coordinator, sinks=MetricSinks(evaluation=lambda r, s, m: seen.append((r, s)))
    )
    grid = FakeGrid(NODES.values(), answer)
    messages = strategy.configure_evaluate(1, SENT, ConfigRecord(), grid)
    metrics = strategy.aggregate_evaluate(1, exchange(grid, messages, timeout=0.2))
    assert metrics is not None
    assert metrics["eval_loss"] == pytest.approx(1.5)
    assert coordinator.plans[0].evaluate
    assert coordinator.calls == ["begin", "abort"]
    assert seen == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_evaluate_with_fraction_zero_sends_nothing() -> None:
    strategy = make_strategy(
        FakeCoordinator(), dataclasses.replace(make_config(), fraction_evaluate=0.0)
    )
    grid = FakeGrid(NODES.values(), good_answer)
    assert list(strategy.configure_evaluate(1, SENT, ConfigRecord(), grid)) == []
    assert strategy.aggregate_evaluate(1, []) is None


def test_evaluate_with_a_fraction_takes_everybody_before_the_first_and_after_the_last_round() -> (
    None
):
    config = dataclasses.replace(make_config(), fraction_evaluate=0.5)

    def count(server_round: int) -> int:
        strategy = make_strategy(FakeCoordinator(), config)
        grid = FakeGrid(NODES.values(), good_answer)
        return len(list(strategy.configure_evaluate(server_round, SENT, ConfigRecord(), grid)))

    assert [count(server_round) for server_round in (0, 1, 2)] == [4, 2, 4]


def test_evaluate_with_every_client_failed_raises() -> None:
    strategy = make_strategy(FakeCoordinator())
    grid = FakeGrid(NODES.values(), lambda _: Error(code=2, reason="no model here"))
    messages = strategy.configure_evaluate(1, SENT, ConfigRecord(), grid)
    with pytest.raises(FederationError, match="no model here"):
        strategy.aggregate_evaluate(1, exchange(grid, messages, timeout=0.2))


def test_aggregate_train_without_configure_raises() -> None:
    with pytest.raises(FederationError, match="configure"):
        make_strategy(FakeCoordinator()).aggregate_train(1, [])
