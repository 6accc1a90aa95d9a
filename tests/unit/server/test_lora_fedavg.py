"""The default inner strategy, against the weighted means worked out by hand."""

import pytest
import torch
from flwr.app import ConfigRecord, Message
from torch import Tensor

from flower_split.aggregation.adapter_aggregator import AdapterSpec
from flower_split.config import StrategyConfig
from flower_split.errors import AggregationError
from flower_split.messages.arrays import from_arrays, to_arrays
from flower_split.messages.orders import TrainOrder, TrunkOrder
from flower_split.server.federation.exchange import exchange
from flower_split.server.federation.nodes import Federation
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.node_view import NodeView
from tests.support.fakes import FakeGrid, train_content

FEDERATION = Federation({0: 9, 1: 4})
A0 = torch.tensor([[1.0, 2.0]])
INITIAL = {"m.lora_A.weight": A0, "m.lora_B.weight": torch.zeros(2, 1)}
B = {0: torch.tensor([[1.0], [0.0]]), 1: torch.tensor([[0.0], [4.0]])}
TOKENS, EXAMPLES = {0: 30, 1: 10}, {0: 1, 1: 1}


def aggregate(aggregator: str, weighting: str, *, zero: bool = False) -> dict[str, Tensor]:
    """One round in which client 0 returns B₀ and client 1 returns B₁, both with A unchanged."""
    config = StrategyConfig(aggregator=aggregator, weighting=weighting)
    strategy = LoraFedAvg(config, {"m": 2.0}, INITIAL, FEDERATION.partition_of)

    def answer(message: Message) -> object:
        partition_id = FEDERATION.partition_of(message.metadata.dst_node_id)
        state = {"m.lora_A.weight": A0, "m.lora_B.weight": B[partition_id]}
        tokens = 0 if zero else TOKENS[partition_id]
        return train_content(to_arrays(state), tokens=tokens, examples=EXAMPLES[partition_id])

    grid = FakeGrid([9, 4], answer)  # type: ignore[arg-type]
    messages = strategy.configure_train(
        1, strategy.initial_arrays(), ConfigRecord(), NodeView(grid, [9, 4])
    )
    arrays, _ = strategy.aggregate_train(1, exchange(grid, messages, timeout=1))
    assert arrays is not None
    return from_arrays(arrays)


def product(state: dict[str, Tensor]) -> Tensor:
    return 2.0 * state["m.lora_B.weight"] @ state["m.lora_A.weight"]


@pytest.mark.parametrize("aggregator", ["fedit", "product-delta"])
@pytest.mark.parametrize(
    ("weighting", "shares"),
    [("tokens", (0.75, 0.25)), ("examples", (0.5, 0.5)), ("uniform", (0.5, 0.5))],
)
def test_aggregate_weights_the_clients_as_configured(
    aggregator: str, weighting: str, shares: tuple[float, float]
) -> None:
    expected = 2.0 * (shares[0] * B[0] + shares[1] * B[1]) @ A0
    torch.testing.assert_close(product(aggregate(aggregator, weighting)), expected)


def test_aggregate_of_zero_weights_raises() -> None:
    with pytest.raises(AggregationError):
        aggregate("fedit", "tokens", zero=True)


def test_initial_arrays_are_the_initial_adapter() -> None:
    strategy = LoraFedAvg(StrategyConfig(), {"m": 2.0}, INITIAL, FEDERATION.partition_of)
    state = from_arrays(strategy.initial_arrays())
    assert sorted(state) == sorted(INITIAL)
    assert torch.equal(state["m.lora_A.weight"], A0)
    assert state["m.lora_B.weight"].count_nonzero() == 0


@pytest.mark.parametrize(
    ("aggregator", "expected"), [("ffa-lora", ["m.lora_B.weight"]), ("product-delta", None)]
)
def test_configure_train_says_what_trains_where_the_method_freezes_a_factor(
    aggregator: str, expected: list[str] | None
) -> None:
    strategy = LoraFedAvg(
        StrategyConfig(aggregator=aggregator), {"m": 2.0}, INITIAL, FEDERATION.partition_of
    )
    config = ConfigRecord({"kept": 1})
    grid = FakeGrid([9, 4], lambda message: None)
    messages = list(
        strategy.configure_train(1, strategy.initial_arrays(), config, NodeView(grid, [9, 4]))
    )
    (record,) = messages[0].content.config_records.values()
    assert record["kept"] == 1
    assert record.get("flower-split.trainable") == expected
    assert not any(key.startswith("flower-split.") for key in config)


TWO = {
    "m.lora_A.weight": torch.tensor([[1.0, 2.0], [0.5, -1.0]]),
    "m.lora_B.weight": torch.tensor([[1.0, 0.0], [2.0, 1.0]]),
    "n.lora_A.weight": torch.tensor([[1.0], [3.0]]),
    "n.lora_B.weight": torch.tensor([[1.0, -1.0]]),
}
SPECS = {0: AdapterSpec(ranks=1, scales={"m": 4.0}, modules=frozenset({"m"}))}


def of_own_kind(aggregator: str = "product-delta") -> LoraFedAvg:
    """Client 0 holds m only, at rank 1 and scale 4; client 1 holds all at rank 2 and scale 2."""
    config = StrategyConfig(aggregator=aggregator)
    scales = {"m": 2.0, "n": 1.0}
    return LoraFedAvg(config, scales, TWO, FEDERATION.partition_of, SPECS)


def sent_by(messages: list[Message]) -> dict[int, dict[str, Tensor]]:
    return {
        FEDERATION.partition_of(m.metadata.dst_node_id): from_arrays(
            m.content.array_records["arrays"]
        )
        for m in messages
    }


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_configure_sends_each_client_its_own_ranks_and_modules(phase: str) -> None:
    strategy = of_own_kind()
    grid = FakeGrid([9, 4], lambda message: None)
    configure = strategy.configure_train if phase == "train" else strategy.configure_evaluate
    messages = list(configure(1, strategy.initial_arrays(), ConfigRecord(), NodeView(grid, [9, 4])))
    sent = sent_by(messages)
    assert {name: tuple(value.shape) for name, value in sent[0].items()} == {
        "m.lora_A.weight": (1, 2),
        "m.lora_B.weight": (2, 1),
    }
    whole = 2.0 * TWO["m.lora_B.weight"].double() @ TWO["m.lora_A.weight"].double()
    u, s, vh = torch.linalg.svd(whole)
    best = 4.0 * sent[0]["m.lora_B.weight"].double() @ sent[0]["m.lora_A.weight"].double()
    torch.testing.assert_close(best, s[0] * u[:, :1] @ vh[:1], atol=1e-5, rtol=0)
    assert {name: tuple(value.shape) for name, value in sent[1].items()} == {
        name: tuple(value.shape) for name, value in TWO.items()
    }
    assert all(list(m.content.config_records) == ["config"] for m in messages)


def test_aggregate_measures_each_clients_change_against_what_it_was_sent() -> None:
    strategy = of_own_kind()
    moved: dict[int, Tensor] = {}

    def answer(message: Message) -> object:
        partition_id = FEDERATION.partition_of(message.metadata.dst_node_id)
        state = from_arrays(message.content.array_records["arrays"])
        scale = 4.0 if partition_id == 0 else 2.0
        before = scale * state["m.lora_B.weight"].double() @ state["m.lora_A.weight"].double()
        state["m.lora_B.weight"] += 0.1 * (partition_id + 1)
        after = scale * state["m.lora_B.weight"].double() @ state["m.lora_A.weight"].double()
        moved[partition_id] = after - before
        return train_content(to_arrays(state), tokens=TOKENS[partition_id])

    grid = FakeGrid([9, 4], answer)  # type: ignore[arg-type]
    messages = strategy.configure_train(
        1, strategy.initial_arrays(), ConfigRecord(), NodeView(grid, [9, 4])
    )
    arrays, _ = strategy.aggregate_train(1, exchange(grid, messages, timeout=1))
    assert arrays is not None
    state = from_arrays(arrays)
    whole = 2.0 * TWO["m.lora_B.weight"].double() @ TWO["m.lora_A.weight"].double()
    expected = whole + 0.75 * moved[0] + 0.25 * moved[1]
    torch.testing.assert_close(product(state).double(), expected, atol=1e-5, rtol=0)
    of_n = state["n.lora_B.weight"].double() @ state["n.lora_A.weight"].double()
    before = TWO["n.lora_B.weight"].double() @ TWO["n.lora_A.weight"].double()
    torch.testing.assert_close(of_n, before, atol=1e-6, rtol=0)


def test_a_rank_that_the_method_cannot_serve_ends_the_run_before_it_begins() -> None:
    with pytest.raises(AggregationError, match="fedit has one rank for all clients"):
        of_own_kind("fedit")


def test_client_malformed_beside_its_adapter_does_not_count_with_the_adapter_either() -> None:
    """With fedsa-lora a client says the digest of what it kept; client 1 says none."""
    config = StrategyConfig(aggregator="fedsa-lora", on_invalid="exclude")
    strategy = LoraFedAvg(config, {"m": 2.0}, INITIAL, FEDERATION.partition_of)
    moved = {0: A0 + 1, 1: A0 - 5}

    def answer(message: Message) -> object:
        partition_id = FEDERATION.partition_of(message.metadata.dst_node_id)
        weights = to_arrays({"m.lora_A.weight": moved[partition_id]})
        digest = "" if partition_id else "0" * 64
        return train_content(weights, tokens=TOKENS[partition_id], private_digest=digest)

    grid = FakeGrid([9, 4], answer)  # type: ignore[arg-type]
    messages = strategy.configure_train(
        1, strategy.initial_arrays(), ConfigRecord(), NodeView(grid, [9, 4])
    )
    arrays, _ = strategy.aggregate_train(1, exchange(grid, messages, timeout=1))
    assert arrays is not None
    torch.testing.assert_close(from_arrays(arrays)["m.lora_A.weight"], moved[0])
    assert strategy.last_summary.clients == (0,)
    assert list(strategy.last_summary.excluded) == [1]


@pytest.mark.parametrize(("tokens", "fits"), [(30, True), (31, False)])
def test_weight_above_what_a_client_can_have_trained_on_is_malformed(
    tokens: int, fits: bool
) -> None:
    strategy = LoraFedAvg(StrategyConfig(), {"m": 2.0}, INITIAL, FEDERATION.partition_of)
    strategy.largest_weights = {1: 30.0}
    grid = FakeGrid([9, 4], lambda message: train_content(to_arrays(INITIAL), tokens=tokens))
    messages = strategy.configure_train(
        1, strategy.initial_arrays(), ConfigRecord(), NodeView(grid, [9, 4])
    )
    replies = exchange(grid, messages, timeout=1)
    if fits:
        strategy.aggregate_train(1, replies)
        return
    with pytest.raises(AggregationError, match="client 1 reports num-tokens = 31.*at most 30"):
        strategy.aggregate_train(1, replies)


@pytest.mark.parametrize(
    ("scales", "weights", "factor"),
    [
        (True, {}, 2**0.5),
        (True, {0: 40.0, 1: 40.0}, 2**0.5),
        (True, {0: 30.0, 1: 10.0}, 1.6**0.5),  # 40² / (30² + 10²)
        (True, {0: 1e6, 1: 1.0}, 1.0),  # as good as alone
        (False, {0: 40.0, 1: 40.0}, 1.0),
    ],
)
def test_clients_are_told_the_root_of_how_many_are_averaged(
    scales: bool, weights: dict[int, float], factor: float
) -> None:
    strategy = LoraFedAvg(StrategyConfig(), {"m": 2.0}, INITIAL, FEDERATION.partition_of)
    strategy.scales_client_rate, strategy.largest_weights = scales, weights
    grid = FakeGrid([9, 4], lambda message: None)
    messages = strategy.configure_train(
        1, strategy.initial_arrays(), ConfigRecord(), NodeView(grid, [9, 4])
    )
    trunk = TrunkOrder(address="here:1", token="t", server_round=1)
    orders = [TrainOrder.read(TrainOrder(trunk=trunk).write(m.content)) for m in messages]
    assert [order.rate_factor for order in orders] == pytest.approx([factor, factor], rel=1e-5)
