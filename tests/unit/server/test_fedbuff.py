"""FedBuff: staleness by hand, adapters against a dense fp64 reference, the loop with fake clients."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from flower_split.aggregation.adapter_aggregator import (
    AdapterAggregator,
    AdapterSpec,
    AdapterUpdate,
)
from flower_split.aggregation.rules.staleness import Staleness
from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.errors import (
    AggregationError,
    ConfigError,
    FederationError,
    RefusalReason,
    RoundLost,
    TrunkRefused,
)
from flower_split.messages.arrays import from_arrays, to_arrays
from flower_split.messages.replies import take_steps
from flower_split.protocol.values import Arrival, Dispatch, RoundReport
from flower_split.server.asynchronous.loop import AsynchronousRounds
from flower_split.server.federation.client_keys import ClientKeys
from flower_split.server.federation.nodes import Federation
from flower_split.server.inner.fedbuff import ClientArrival, FedBuff
from flower_split.server.metric_sinks import MetricSinks
from flower_split.server.trunk_access import TrunkAccess, TrunkHealth
from flower_split.server.trunk_rounds import StartingPoint, TrunkRounds
from flower_split.server.trunk_strategy import TrunkStrategy
from tests.support.fakes import FakeCoordinator, FakeGrid, reply, train_content

NODES = {0: 900, 1: 300, 2: 700}  # partition -> node id
FEDERATION = Federation(NODES)
SCALES = {"layers.0.q": 2.0, "layers.1.v": 0.5}
Adapter = dict[str, Tensor]


def adapter(seed: int, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    state: Adapter = {}
    for module, (rows, columns) in {"layers.0.q": (6, 5), "layers.1.v": (4, 7)}.items():
        state[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        state[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return dict(sorted(state.items()))


def dense(state: Mapping[str, Tensor], scales: Mapping[str, float] = SCALES) -> Adapter:
    """ΔW of every module in fp64."""
    return {
        module: scale
        * state[f"{module}.lora_B.weight"].double()
        @ state[f"{module}.lora_A.weight"].double()
        for module, scale in scales.items()
    }


def run_config(**changes: Scalar) -> RunConfig:
    config: dict[str, Scalar] = {
        "num-server-rounds": 3,
        "num-clients": 3,
        "round-timeout": 5.0,
        "round-retries": 1,
        "strategy.name": "fedbuff",
        "trunk.step-every": "server-round",
    }
    config |= {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return parse_run_config(config)


def fedbuff(config: RunConfig, initial: Adapter, specs: Mapping[int, AdapterSpec] | None = None):
    return FedBuff(config.strategy, SCALES, initial, FEDERATION.partition_of, specs or {})


def arrived(
    number: int, partition_id: int, base_round: int, sent: Adapter, returned: Adapter, tokens: int
) -> ClientArrival:
    content, _ = take_steps(train_content(to_arrays(returned), tokens))
    return ClientArrival(
        Dispatch(number, partition_id, f"token-{number}"), base_round, sent, content
    )


# ---------------------------------------------------------------------- staleness


def test_staleness_of_the_paper_is_the_inverse_root() -> None:
    factor = Staleness()
    assert [factor(t) for t in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]


def test_staleness_with_another_exponent_and_constant() -> None:
    assert Staleness(exponent=1.0)(3) == 0.25
    assert Staleness(exponent=0.0)(3) == 1.0
    assert Staleness(name="constant")(1000) == 1.0
    with pytest.raises(ValueError, match="at least 0"):
        Staleness()(-1)
    with pytest.raises(ConfigError, match="polynomial, constant"):
        Staleness(name="linear")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trunk__step_every": "local-step"}, "trunk.step-every"),
        ({"strategy__aggregator": "fedit"}, "product-delta"),
        ({"fraction_train": 0.5}, "strategy.concurrency"),
        ({"privacy__mechanism": "local"}, "privacy.mechanism"),
        ({"strategy__rules": "norm-clipping=1, median"}, "one client of all"),
        ({"strategy__buffer_size": 0}, "buffer-size"),
        ({"strategy__name": "lora-fedavg", "strategy__max_staleness": 3}, "no buffer of arrivals"),
    ],
)
def test_config_that_cannot_be_combined_is_refused_with_the_reason(
    changes: dict[str, Scalar], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run_config(**changes)


# ---------------------------------------------------------------------- the adapters


def expected_step(
    start: Adapter, changes: Sequence[tuple[float, float, Adapter, Adapter]], rate: float
) -> Adapter:
    """ΔW + η Σ s w (returned − sent) / Σ w, densely; ``changes`` are (s, w, sent, returned)."""
    total = math.fsum(weight for _, weight, _, _ in changes)
    result = {}
    for module, now in start.items():
        step = sum(s * w * (after[module] - before[module]) for s, w, before, after in changes)
        result[module] = now + rate * step / total
    return result


def test_arrivals_of_several_versions_move_the_adapter_as_the_dense_reference_says() -> None:
    config = run_config(strategy__server_learning_rate=0.5, strategy__max_rank=100)
    initial = adapter(0)
    inner = fedbuff(config, initial)
    first = from_arrays(inner.initial_arrays())
    one = adapter(1)
    inner.aggregate_arrivals(1, [arrived(1, 2, 0, first, one, 30)])
    now = expected_step(dense(initial), [(1.0, 30, dense(first), dense(one))], 0.5)
    second = inner.aggregator.distribute()
    late, fresh = adapter(2), adapter(3)
    arrivals = [arrived(3, 2, 1, second, fresh, 10), arrived(2, 0, 0, first, late, 50)]
    inner.aggregate_arrivals(2, arrivals)
    s = 1 / math.sqrt(2)
    wanted = expected_step(
        now,
        [(s, 50, dense(first), dense(late)), (1.0, 10, dense(second), dense(fresh))],
        0.5,
    )
    flat = expected_step(
        now,
        [(1.0, 50, dense(first), dense(late)), (1.0, 10, dense(second), dense(fresh))],
        0.5,
    )
    for module, factors in inner.aggregator.deltas().items():
        found = factors.scale * factors.B.double() @ factors.A.double()
        torch.testing.assert_close(found, wanted[module], rtol=1e-5, atol=1e-5)
        assert (found - flat[module]).abs().max() > 1e-2  # the reference without staleness is off
    assert inner.last_summary.clients == (0, 2)


def test_arrivals_at_mixed_ranks_and_scales_count_by_their_own() -> None:
    small = AdapterSpec(ranks=1, scales={"layers.0.q": 4.0, "layers.1.v": 1.0})
    config = run_config(strategy__max_rank=100)
    initial = adapter(0)
    inner = fedbuff(config, initial, {1: small})
    full = inner.aggregator.distribute()
    part = inner.aggregator.distribute(small.ranks, small.scales, small.modules)
    mine, theirs = adapter(1), adapter(2, rank=1)
    inner.aggregate_arrivals(
        3, [arrived(1, 0, 2, full, mine, 1), arrived(2, 1, 0, part, theirs, 3)]
    )
    own = {"layers.0.q": 4.0, "layers.1.v": 1.0}
    changes = [
        (1.0, 1, dense(full), dense(mine)),
        (1 / math.sqrt(3), 3, dense(part, own), dense(theirs, own)),
    ]
    wanted = expected_step(dense(initial), changes, 1.0)
    for module, factors in inner.aggregator.deltas().items():
        found = factors.scale * factors.B.double() @ factors.A.double()
        torch.testing.assert_close(found, wanted[module], rtol=1e-5, atol=1e-5)


def test_tensors_that_are_no_factors_move_by_the_change_against_what_was_sent() -> None:
    """A late client's bias counts by what it changed, from the current value."""
    config = run_config()
    initial = adapter(0) | {"head.bias": torch.tensor([1.0, 2.0])}
    inner = fedbuff(config, initial)
    first = inner.aggregator.distribute()
    quick = first | {"head.bias": torch.tensor([5.0, 2.0])}
    inner.aggregate_arrivals(1, [arrived(1, 0, 0, first, quick, 7)])
    slow = first | {"head.bias": torch.tensor([1.0, 4.0])}
    inner.aggregate_arrivals(2, [arrived(2, 1, 0, first, slow, 7)])
    expected = torch.tensor([5.0, 2.0 + 2.0 / math.sqrt(2)])
    torch.testing.assert_close(inner.aggregator.distribute()["head.bias"], expected)


def test_arrivals_without_staleness_are_a_synchronous_round_bit_for_bit() -> None:
    config, initial = run_config(), adapter(0)
    inner, plain = fedbuff(config, initial), AdapterAggregator("product-delta", SCALES)
    plain.init(initial)
    sent = plain.distribute()
    returned = {partition_id: adapter(partition_id + 5) for partition_id in (0, 1, 2)}
    inner.aggregate_arrivals(
        1, [arrived(9 - s, s, 0, sent, returned[s], 10 * s + 1) for s in (2, 0, 1)]
    )
    plain.aggregate([AdapterUpdate(s, sent, returned[s], 10 * s + 1) for s in (0, 1, 2)])
    found, wanted = inner.aggregator.distribute(), plain.distribute()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_order_of_arrivals_does_not_change_a_bit_and_one_client_may_arrive_twice() -> None:
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        inner = fedbuff(run_config(), adapter(0))
        sent = inner.aggregator.distribute()
        given = [
            arrived(1, 1, 0, sent, adapter(1), 3),
            arrived(2, 1, 0, sent, adapter(2), 4),
            arrived(3, 0, 1, sent, adapter(3), 5),
        ]
        inner.aggregate_arrivals(2, [given[i] for i in order])
        assert inner.turns == {0: 1, 1: 2}
        results.append(inner.aggregator.distribute())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_malformed_arrival_is_refused_or_excluded_by_name() -> None:
    bad = adapter(1) | {"layers.0.q.lora_B.weight": torch.full((6, 2), float("nan"))}
    inner = fedbuff(run_config(), adapter(0))
    sent = inner.aggregator.distribute()
    given = [arrived(1, 0, 0, sent, bad, 3), arrived(2, 2, 0, sent, adapter(2), 4)]
    with pytest.raises(AggregationError, match=r"partition 00000 \(dispatch 0000001\)"):
        inner.aggregate_arrivals(1, given)
    lenient = fedbuff(run_config(strategy__on_invalid="exclude"), adapter(0))
    lenient.aggregate_arrivals(1, given)
    assert lenient.last_summary.clients == (2,)
    assert list(lenient.last_summary.excluded) == [0]


def test_state_goes_through_a_checkpoint_bit_for_bit() -> None:
    config = run_config(strategy__server_optimizer="momentum")
    inner = fedbuff(config, adapter(0))
    sent = inner.aggregator.distribute()
    inner.dispatched = 4
    inner.aggregate_arrivals(1, [arrived(4, 1, 0, sent, adapter(1), 3)])
    again = fedbuff(config, adapter(0))
    again.load_state_dict(inner.state_dict())
    assert (again.dispatched, again.turns) == (4, {1: 1})
    for one in (inner, again):
        one.aggregate_arrivals(2, [arrived(5, 0, 0, sent, adapter(2), 3)])
    first, second = inner.aggregator.distribute(), again.aggregator.distribute()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------- the loop, with fake clients


class Coordinator(FakeCoordinator):
    """A trunk that remembers what it was told to step with."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: list[list[Arrival]] = []
        self.epochs = [1]

    def begin_round(self, plan):
        super().begin_round(plan)
        return (self.epochs.pop(0) if len(self.epochs) > 1 else self.epochs[0]), 0

    def prepare_round(self, experiment, server_round, attempt, arrivals=()):
        self.calls.append("prepare")
        self.arrivals.append(list(arrivals))
        return RoundReport(
            version=server_round,
            digest=f"digest-{server_round}",
            slots=(),
            optimizer_steps=1,
            compute_seconds=0.0,
        )


Policy = Callable[[list[Message]], Message | None]


class Scripted(FakeGrid):
    """A grid whose next reply is that to the message which ``policy`` picks."""

    def __init__(self, answer, policy: Policy = lambda waiting: waiting[0]) -> None:
        super().__init__(NODES.values(), answer)
        self.policy = policy

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        waiting = [m for m in self.pushed if m.metadata.message_id in wanted & set(self._waiting)]
        message = self.policy(waiting) if waiting else None
        if message is None:
            return []
        content = self.answer(message)
        if content is None:
            return []
        del self._waiting[message.metadata.message_id]
        return [reply(message, content)]


def partition_of(message: Message) -> int:
    return FEDERATION.partition_of(message.metadata.dst_node_id)


def good(message: Message) -> RecordDict:
    """The client adds its partition + 1 to every B."""
    (arrays,) = message.content.array_records.values()
    state = from_arrays(arrays)
    for name in state:
        if "lora_B" in name:
            state[name] = state[name] + partition_of(message) + 1.0
    return train_content(to_arrays(state), tokens=10)


class Loop:
    """The asynchronous loop around fake clients and a fake trunk."""

    def __init__(
        self, grid: FakeGrid, client_keys: ClientKeys | None = None, **changes: Scalar
    ) -> None:
        self.config = run_config(**changes)
        self.coordinator = Coordinator()
        self.inner = fedbuff(self.config, adapter(0))
        self.committed: list[int] = []
        self.disk_full = False
        self.records: list[tuple[int, list[Mapping[str, int | float | str]]]] = []
        trunk_rounds = TrunkRounds(
            self.coordinator,
            TrunkAccess(address="trunk.example:1"),
            self.config,
            StartingPoint("exp"),
            steps_per_round=1,
            on_commit=self.commit,
        )
        self.strategy = TrunkStrategy(
            self.inner, trunk_rounds, FEDERATION, self.config, client_keys=client_keys
        )
        self.grid = grid
        self.rounds = AsynchronousRounds(
            self.strategy,
            self.inner,
            grid,
            sinks=MetricSinks(
                arrivals=lambda server_round, records: self.records.append(
                    (server_round, list(records))
                )
            ),
        )
        self.arrays: ArrayRecord = self.inner.initial_arrays()

    def commit(
        self, server_round: int, attempt: int, report: RoundReport, arrays: ArrayRecord
    ) -> None:
        if self.disk_full:
            raise FederationError("the disk is full")
        self.committed.append(server_round)

    def run(self, count: int = 1) -> None:
        start = len(self.committed) + 1
        for server_round in range(start, start + count):
            self.arrays, _ = self.rounds.run(server_round, self.arrays, TrunkHealth())

    def arrived(self) -> list[list[tuple[int, int]]]:
        """By round: (partition, staleness), in order of arrival."""
        return [
            [(int(r["partition_id"]), int(r["staleness"])) for r in records if "order" in r]
            for _, records in self.records
        ]

    def dropped(self) -> list[Mapping[str, int | float | str]]:
        return [r for _, records in self.records for r in records if "dropped" in r]


def test_rounds_are_buffers_in_the_order_of_arrival() -> None:
    loop = Loop(Scripted(good))
    loop.run(3)
    # Sent: 0 1 2 | 0 comes, goes again (still version 0); 1 comes: a round. 2 and 0 are of version 0.
    assert loop.arrived() == [[(0, 0), (1, 0)], [(2, 1), (0, 1)], [(1, 1), (2, 1)]]
    factors = [[round(a.factor, 6) for a in arrivals] for arrivals in loop.coordinator.arrivals]
    assert factors == [[1.0, 1.0], [0.707107, 0.707107], [0.707107, 0.707107]]
    assert loop.committed == [1, 2, 3]
    assert loop.coordinator.calls.count("prepare") == loop.coordinator.calls.count("commit") == 3


def test_every_client_gets_its_own_token_and_the_next_part_of_its_data() -> None:
    loop = Loop(Scripted(good), strategy__buffer_size=3)
    loop.run(2)
    orders = [next(iter(m.content.config_records.values())) for m in loop.grid.pushed]
    tokens = [order["flower-split.trunk-token"] for order in orders]
    assert len(set(tokens)) == len(tokens)
    turns: dict[int, list[object]] = {}
    for message, order in zip(loop.grid.pushed, orders, strict=True):
        turns.setdefault(partition_of(message), []).append(order["flower-split.data-pass"])
    assert turns[0][:2] == [1, 2] and turns[1][:2] == [1, 2]
    named = {d.token for plan in loop.coordinator.plans for d in plan.dispatches}
    assert named == set(tokens)


def test_no_more_clients_than_the_concurrency_are_at_work() -> None:
    loop = Loop(Scripted(good), strategy__concurrency=2)
    at_work: list[int] = []
    pull = loop.grid.pull_messages

    def watched(ids: Iterable[str]) -> Iterable[Message]:
        at_work.append(len(set(ids)))
        return pull(ids)

    loop.grid.pull_messages = watched
    loop.run(3)
    assert max(at_work) == 2
    assert {partition_of(m) for m in loop.grid.pushed} == {0, 1, 2}  # everybody gets a turn


def test_concurrency_of_a_small_simulation_is_respected_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = Loop(Scripted(good))
    with caplog.at_level(logging.WARNING, logger="flower_split"):
        rounds = AsynchronousRounds(loop.strategy, loop.inner, loop.grid, at_once=1)
    assert "runs 1 clients at once" in caplog.text
    rounds.run(1, loop.arrays, TrunkHealth())
    assert max(len(plan.dispatches) for plan in loop.coordinator.plans) <= 2


def test_concurrency_above_the_number_of_clients_is_refused() -> None:
    with pytest.raises(FederationError, match=r"strategy.concurrency is 4, but the run has 3"):
        Loop(Scripted(good), strategy__concurrency=4)


def test_max_staleness_zero_is_synchronous() -> None:
    def latest(waiting: list[Message]) -> Message:
        return waiting[-1]

    loop = Loop(Scripted(good, latest), strategy__max_staleness=0, strategy__buffer_size=3)
    loop.run(2)
    assert loop.arrived() == [[(2, 0), (1, 0), (0, 0)]] * 2
    assert len(loop.grid.pushed) == 6  # nobody worked in vain


def test_too_stale_clients_are_recalled_dropped_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fast(waiting: list[Message]) -> Message | None:
        others = [m for m in waiting if partition_of(m) != 1]
        return others[0] if others else None

    grid = Scripted(good, fast)
    loop = Loop(grid, strategy__max_staleness=1, num_server_rounds=9)
    with caplog.at_level(logging.WARNING, logger="flower_split"):
        loop.run(3)
    (record,) = loop.dropped()
    assert record["partition_id"] == 1 and record["base_round"] == 0
    assert "2 versions behind, above strategy.max-staleness 1" in str(record["dropped"])
    assert "partition 1 (node 300)" in caplog.text
    slow = next(m for m in grid.pushed if partition_of(m) == 1)
    token = next(iter(slow.content.config_records.values()))["flower-split.trunk-token"]
    assert token not in {d.token for d in loop.coordinator.plans[-1].dispatches}
    grid.policy = lambda waiting: waiting[0]
    loop.run(1)  # now it answers; its work does not count, and it is sent out again
    assert all(partition_id != 1 for partition_id, _ in loop.arrived()[-1])
    assert sum(partition_of(m) == 1 for m in grid.pushed) == 2


def test_surplus_arrivals_wait_for_the_next_round() -> None:
    grid = FakeGrid(NODES.values(), good)  # answers everybody at once
    loop = Loop(grid, strategy__buffer_size=2)
    loop.run(2)
    assert loop.arrived() == [[(0, 0), (1, 0)], [(2, 1), (0, 0)]]


def test_failed_client_is_sent_out_again_with_the_same_data_and_named() -> None:
    failures = {1: 1}

    def answer(message: Message) -> RecordDict | Error:
        partition_id = partition_of(message)
        if failures.get(partition_id, 0):
            failures[partition_id] -= 1
            return Error(ErrorCode.CLIENT_APP_CRASHED, "it was killed")
        return good(message)

    loop = Loop(Scripted(answer), strategy__buffer_size=3)
    loop.run(1)
    (record,) = loop.dropped()
    assert (record["partition_id"], record["dropped"]) == (1, "it was killed")
    turns = [
        next(iter(m.content.config_records.values()))["flower-split.data-pass"]
        for m in loop.grid.pushed
        if partition_of(m) == 1
    ]
    assert turns[:2] == [1, 1]


def test_client_that_always_fails_is_left_out_where_the_quorum_allows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(message: Message) -> RecordDict | Error:
        if partition_of(message) == 1:
            return Error(ErrorCode.CLIENT_APP_CRASHED, "no space left")
        return good(message)

    with pytest.raises(FederationError, match=r"partition 1 \(node 300\): no space left"):
        Loop(Scripted(answer)).run(3)
    loop = Loop(Scripted(answer), trunk__quorum=0.5)
    with caplog.at_level(logging.WARNING, logger="flower_split"):
        loop.run(3)
    assert "the run goes on without partition 1 (node 300): no space left" in caplog.text
    assert {partition_id for arrivals in loop.arrived() for partition_id, _ in arrivals} == {0, 2}
    assert sum(partition_of(m) == 1 for m in loop.grid.pushed) == 2  # round-retries = 1


def test_client_that_returns_nan_counts_as_failed() -> None:
    def answer(message: Message) -> RecordDict:
        content = good(message)
        if partition_of(message) == 2:
            state = from_arrays(content.array_records["arrays"])
            bad = {name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}
            return train_content(to_arrays(bad), 10)
        return content

    with pytest.raises(FederationError, match=r"partition 2 .*NaN or Inf"):
        Loop(Scripted(answer)).run(3)


def test_silent_client_fails_by_its_deadline() -> None:
    def answer(message: Message) -> RecordDict | None:
        return None if partition_of(message) == 0 else good(message)

    def others(waiting: list[Message]) -> Message | None:
        return next((m for m in waiting if partition_of(m) != 0), None)

    loop = Loop(
        Scripted(answer, others),
        round_timeout=0.2,
        round_retries=0,
        strategy__max_staleness=0,
        strategy__buffer_size=3,
    )
    with pytest.raises(FederationError, match="no reply within 0.2 s"):
        loop.run(1)


def test_restarted_trunk_loses_the_round_and_its_clients_are_sent_out_again() -> None:
    loop = Loop(Scripted(good), strategy__buffer_size=3)
    loop.coordinator.epochs = [1, 2]  # another process answers the second time
    with pytest.raises(RoundLost, match="restarted"):
        loop.run(1)
    assert loop.coordinator.calls[-1] == "abort" and loop.committed == []
    before = len(loop.grid.pushed)
    loop.run(1)
    assert len(loop.grid.pushed) >= before + 3
    assert loop.arrived() == [[(0, 0), (1, 0), (2, 0)]]


def test_refusal_of_a_restarted_trunk_loses_the_round_and_another_refusal_ends_the_run() -> None:
    """A new process does not know that an earlier dispatch of a partition has arrived, and refuses."""
    for epoch, error in ((2, RoundLost), (1, TrunkRefused)):
        loop = Loop(Scripted(good), strategy__buffer_size=3)
        loop.coordinator.state = dataclasses.replace(loop.coordinator.state, epoch=epoch)
        begin = loop.coordinator.begin_round

        def refuse(plan, begin=begin):
            if len(plan.dispatches) > 3:
                raise TrunkRefused(RefusalReason.INVALID_REQUEST, "a slot is at work twice")
            return begin(plan)

        loop.coordinator.begin_round = refuse
        with pytest.raises(error):
            loop.run(1)


def test_duplicate_and_late_replies_are_ignored() -> None:
    class Twice(Scripted):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            return replies * 2

    loop = Loop(Twice(good), strategy__buffer_size=3)
    loop.run(2)
    dispatches = [a.dispatch for arrivals in loop.coordinator.arrivals for a in arrivals]
    assert len(set(dispatches)) == len(dispatches) == 6


def test_round_that_cannot_be_written_leaves_no_trace() -> None:
    loop = Loop(Scripted(good))
    before = loop.inner.state_dict()
    loop.disk_full = True
    with pytest.raises(FederationError, match="disk is full"):
        loop.run(1)
    after = loop.inner.state_dict()
    same = [name for name in before if name != "fedbuff/dispatched"]
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert loop.coordinator.calls[-1] == "abort"


def test_dismissing_recalls_whoever_is_at_work() -> None:
    loop = Loop(Scripted(good), num_server_rounds=2)
    loop.run(1)
    assert loop.rounds.num_at_work
    loop.rounds.dismiss()
    assert loop.coordinator.plans[-1].dispatches == ()
    assert loop.coordinator.calls[-2:] == ["begin", "abort"]


def test_config_names_the_weighting_of_the_arrivals() -> None:
    config = dataclasses.replace(run_config().strategy, weighting="uniform", staleness="constant")
    inner = FedBuff(config, SCALES, adapter(0), FEDERATION.partition_of)
    sent = inner.aggregator.distribute()
    one, two = adapter(1), adapter(2)
    given = [arrived(1, 0, 0, sent, one, 1000), arrived(2, 1, 0, sent, two, 1)]
    inner.aggregate_arrivals(9, given)
    for module, factors in inner.aggregator.deltas().items():
        found = factors.scale * factors.B.double() @ factors.A.double()
        mean = (dense(one)[module] + dense(two)[module]) / 2
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-4)
