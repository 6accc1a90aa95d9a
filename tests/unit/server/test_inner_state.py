"""What Flower's strategies carry from round to round: kept, taken back with a lost round, checked."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedTrimmedAvg,
    Strategy,
)
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    PrivacySpent,
    SamplingMethod,
)

from flower_split.config import StrategyConfig
from flower_split.errors import ConfigError, FederationError, RunDirectoryError, TrunkUnavailable
from flower_split.server.federation.exchange import exchange
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.inner.state import check_resumable, load_state, state_of
from flower_split.server.trunk_strategy import TrunkStrategy
from tests.support.fakes import FakeCoordinator, FakeGrid, arrays, train_content
from tests.unit.server.test_trunk_strategy import (
    FEDERATION,
    NODES,
    SENT,
    good_answer,
    make_strategy,
    train,
)

KEYS = {
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "weighted_by_key": "num-tokens",
}


def grid(answer: Callable[[Message], RecordDict] = good_answer) -> FakeGrid:
    return FakeGrid(NODES.values(), answer)


def around(inner: Strategy, coordinator: FakeCoordinator | None = None) -> TrunkStrategy:
    return make_strategy(coordinator or FakeCoordinator(), inner=inner)


class Ledger:
    """An accountant that only counts; Flower's own needs a library that may be absent."""

    def __init__(self) -> None:
        self.config = PrivacyConfig(
            1e-5, 4, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
        )
        self.num_releases = 0

    def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
        self.num_releases += count

    def get_epsilon(self, delta: float) -> float:
        return float(self.num_releases)

    def get_delta(self, epsilon: float) -> float:
        return 0.0

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        return PrivacySpent(float(self.num_releases), 1e-5, self.num_releases, "count")

    def would_exceed(
        self, event: GaussianPrivacyEvent, max_epsilon: float | None = None, count: int = 1
    ) -> bool:
        return False

    def state_dict(self) -> dict[str, object]:
        return {"releases": self.num_releases}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.num_releases = int(str(state["releases"]))


def momentum() -> FedAvgM:
    return FedAvgM(server_momentum=0.5, **KEYS)


def test_round_that_was_lost_after_aggregation_leaves_no_momentum_behind() -> None:
    coordinator = FakeCoordinator(commit_error=TrunkUnavailable("gone"))
    strategy = around(momentum(), coordinator)
    with pytest.raises(TrunkUnavailable):
        train(strategy, grid())
    coordinator.commit_error = None
    first, _ = train(strategy, grid())
    second, _ = train(strategy, grid(), server_round=2)
    assert first is not None and second is not None
    # The mean of the replies is 3 in both rounds. Round 1: v = 0 − 3, w = 0 + 3. Round 2, by
    # Flower's class from its own w = 3: v = 0.5 · (−3) + (3 − 3), w = 3 + 1.5.
    assert first["w"].numpy().tolist() == pytest.approx([3.0])
    assert second["w"].numpy().tolist() == pytest.approx([4.5])


def fixed(ledger: Ledger) -> DifferentialPrivacyServerSideFixedClipping:
    inner = FedAvg(**{**KEYS, "weighted_by_key": "num-examples"})
    return DifferentialPrivacyServerSideFixedClipping(inner, 1e-6, 100.0, 4, accountant=ledger)


def test_round_that_is_configured_again_is_accounted_for_once() -> None:
    ledger = Ledger()
    strategy = around(fixed(ledger))
    strategy.configure_train(1, SENT, ConfigRecord(), grid())
    strategy.trunk_rounds.abort("its clients were lost")
    train(strategy, grid())
    assert ledger.num_releases == 1


def test_round_that_was_never_committed_is_not_accounted_for() -> None:
    ledger, coordinator = Ledger(), FakeCoordinator(commit_error=TrunkUnavailable("gone"))
    strategy = around(fixed(ledger), coordinator)
    with pytest.raises(TrunkUnavailable):
        train(strategy, grid())
    assert ledger.num_releases == 0
    coordinator.commit_error = None
    train(strategy, grid())
    assert ledger.num_releases == 1


def test_state_goes_into_another_process_and_its_strategy_goes_on_bit_for_bit() -> None:
    def make() -> Strategy:
        return DifferentialPrivacyServerSideAdaptiveClipping(
            FedAdam(eta=0.1, **KEYS), 0.0, 4, initial_clipping_norm=2.0
        )

    alone, before = around(make()), around(make())
    train(alone, grid())
    train(before, grid())
    after = around(make())
    load_state(after.inner, {name: t.clone() for name, t in state_of(before.inner).items()})
    expected, _ = train(alone, grid(), server_round=2)
    found, _ = train(after, grid(), server_round=2)
    assert expected is not None and found is not None
    assert found["w"].numpy().tobytes() == expected["w"].numpy().tobytes()
    without, _ = train(around(make()), grid(), server_round=2)
    assert without is not None
    assert without["w"].numpy().tobytes() != expected["w"].numpy().tobytes()


def test_account_of_privacy_goes_into_another_process() -> None:
    ledger, other = Ledger(), Ledger()
    ledger.num_releases = 7
    load_state(fixed(other), state_of(fixed(ledger)))
    assert other.num_releases == 7


def test_run_without_an_account_cannot_be_gone_on_with_as_if_it_had_one() -> None:
    with pytest.raises(RunDirectoryError, match="without an account"):
        load_state(fixed(Ledger()), {})


def test_state_of_another_strategy_is_refused() -> None:
    state = {"m/w": torch.zeros(1)}
    with pytest.raises(RunDirectoryError, match="holds m/w, which FedAvg does not know"):
        load_state(FedAvg(**KEYS), state)


def test_strategy_whose_state_nobody_knows_cannot_be_resumed_unless_it_tells() -> None:
    class Own(FedAvg):
        pass

    class Telling(Own):
        def state_dict(self) -> dict[str, torch.Tensor]:
            return {}

        def load_state_dict(self, state: object) -> None:
            return None

    check_resumable(Telling(**KEYS))
    with pytest.raises(RunDirectoryError, match="Clipping around Own carries"):
        check_resumable(DifferentialPrivacyClientSideFixedClipping(Own(**KEYS), 1.0, 1.0, 4))


def test_result_in_double_precision_is_sent_in_single() -> None:
    reference = FedAdam(eta=0.1, **KEYS)
    bare = reference.configure_train(1, SENT, ConfigRecord(), grid())
    replies = exchange(grid(), bare, timeout=0.2)
    in_order = sorted(replies, key=lambda r: FEDERATION.partition_of(r.metadata.src_node_id))
    double, _ = reference.aggregate_train(1, in_order)  # sums depend on the order of the replies
    result, _ = train(around(FedAdam(eta=0.1, **KEYS)), grid())
    assert double is not None and result is not None
    assert double["w"].dtype == "float64"  # or this test has nothing to show
    assert result["w"].dtype == "float32"
    assert result["w"].numpy() == double["w"].numpy().astype(np.float32)


def bad(tokens: int = 5, **values: Array) -> Callable[[Message], RecordDict]:
    def answer(message: Message) -> RecordDict:
        if message.metadata.dst_node_id == 300:
            return train_content(ArrayRecord(values), tokens=tokens)
        return good_answer(message)

    return answer


ONE = np.ones(1, dtype=np.float32)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (bad(w=Array(np.ones((1, 1), np.float32))), r"float32 \[1, 1\]; it was sent float32 \[1\]"),
        (bad(w=Array(np.ones(1, np.float64))), "float64"),
        (bad(w=Array(np.ones(1, np.float16))), "float16"),
        (bad(v=Array(ONE)), "names or order differ from those it was sent"),
        (bad(w=Array(ONE), v=Array(ONE)), "names or order differ from those it was sent"),
        (bad(tokens=-5, w=Array(ONE)), "num-tokens = -5"),
    ],
)
def test_reply_that_flower_would_broadcast_or_believe_is_refused_and_named(
    answer: Callable[[Message], RecordDict], reason: str
) -> None:
    coordinator = FakeCoordinator()
    with pytest.raises(FederationError, match=r"partition 1 \(node 300\).*" + reason):
        train(around(FedAvg(**KEYS), coordinator), grid(answer))
    assert coordinator.calls[-1] == "abort"


def test_weight_above_what_a_clients_steps_allow_is_refused_and_named() -> None:
    most = {0: 10.0, 1: 20.0, 2: 29.0, 3: 40.0}  # partition s reports 10 (s + 1)
    strategy = make_strategy(FakeCoordinator(), inner=FedAvg(**KEYS), largest_weights=most)
    with pytest.raises(FederationError, match=r"partition 2 \(node 700\) reports num-tokens = 30"):
        train(strategy, grid())


def test_error_of_flowers_own_names_the_round_and_the_strategy() -> None:
    coordinator = FakeCoordinator()
    inner = FedAvg(**{**KEYS, "weighted_by_key": "num-pages"})
    with pytest.raises(FederationError, match="round 1: .*FedAvg cannot aggregate 4 .*num-pages"):
        train(around(inner, coordinator), grid())
    assert coordinator.calls[-1] == "abort"


def test_strategy_that_diverges_is_named() -> None:
    class Diverging(FedTrimmedAvg):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            return arrays(w=[float("inf")]), MetricRecord()

    with pytest.raises(FederationError, match="Diverging made NaN or Inf"):
        train(around(Diverging(**KEYS)), grid())


def test_wrapper_around_the_packages_own_aggregation_is_refused() -> None:
    own = LoraFedAvg(
        StrategyConfig(aggregator="fedit"),
        {"m": 1.0},
        {"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.ones(2, 1)},
        FEDERATION.partition_of,
    )
    wrapped = DifferentialPrivacyServerSideFixedClipping(own, 1.0, 1.0, 4)
    plain = make_strategy(FakeCoordinator())
    with pytest.raises(ConfigError, match="without that noise"):
        TrunkStrategy(wrapped, plain.trunk_rounds, FEDERATION, plain.config)


def test_wrapper_outside_works_with_flowers_own_loop() -> None:
    coordinator = FakeCoordinator()
    inside = around(FedAvg(**KEYS), coordinator)
    outside = DifferentialPrivacyServerSideFixedClipping(inside, 0.0, 2.5, 4)

    def answer(message: Message) -> RecordDict:
        if message.metadata.message_type == "evaluate":
            return RecordDict({"metrics": MetricRecord({"eval_loss": 1.0, "num-tokens": 1})})
        return good_answer(message)

    result = outside.start(grid(answer), SENT, num_rounds=1)
    # Partitions 2 and 3 returned 3 and 4, clipped to 2.5: (1·10 + 2·20 + 2.5·30 + 2.5·40) / 100
    assert result.arrays["w"].numpy().tolist() == pytest.approx([2.25])
    assert coordinator.calls[:3] == ["begin", "prepare", "commit"]
