"""The default inner strategy, against the weighted means worked out by hand."""

import pytest
import torch
from flwr.app import ConfigRecord, Message
from torch import Tensor

from flower_split.arrays import from_arrays, to_arrays
from flower_split.config import StrategyConfig
from flower_split.errors import AggregationError
from flower_split.exchange import Federation, exchange
from flower_split.facts import TRAINABLE
from flower_split.lora_fedavg import LoraFedAvg
from flower_split.node_view import NodeView
from tests.flower.fakes import FakeGrid, train_content

FEDERATION = Federation({0: 9, 1: 4})
A0 = torch.tensor([[1.0, 2.0]])
INITIAL = {"m.lora_A.weight": A0, "m.lora_B.weight": torch.zeros(2, 1)}
B = {0: torch.tensor([[1.0], [0.0]]), 1: torch.tensor([[0.0], [4.0]])}
TOKENS, EXAMPLES = {0: 30, 1: 10}, {0: 1, 1: 1}


def aggregate(aggregator: str, weighting: str, *, zero: bool = False) -> dict[str, Tensor]:
    """One round in which client 0 returns B₀ and client 1 returns B₁, both with A unchanged."""
    config = StrategyConfig(aggregator=aggregator, weighting=weighting)
    strategy = LoraFedAvg(config, {"m": 2.0}, INITIAL, FEDERATION.slot_of)

    def answer(message: Message) -> object:
        slot = FEDERATION.slot_of(message.metadata.dst_node_id)
        state = {"m.lora_A.weight": A0, "m.lora_B.weight": B[slot]}
        tokens = 0 if zero else TOKENS[slot]
        return train_content(to_arrays(state), tokens=tokens, examples=EXAMPLES[slot])

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
    strategy = LoraFedAvg(StrategyConfig(), {"m": 2.0}, INITIAL, FEDERATION.slot_of)
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
        StrategyConfig(aggregator=aggregator), {"m": 2.0}, INITIAL, FEDERATION.slot_of
    )
    config = ConfigRecord({"kept": 1})
    grid = FakeGrid([9, 4], lambda message: None)
    messages = list(
        strategy.configure_train(1, strategy.initial_arrays(), config, NodeView(grid, [9, 4]))
    )
    (record,) = messages[0].content.config_records.values()
    assert record["kept"] == 1
    assert record.get(TRAINABLE) == expected
    assert TRAINABLE not in config


@pytest.mark.parametrize("aggregator", ["flora", "fedex-lora", "fedsa-lora"])
def test_method_that_clients_cannot_follow_is_refused_by_name(aggregator: str) -> None:
    with pytest.raises(AggregationError, match=f'"{aggregator}" needs .*product-delta'):
        LoraFedAvg(StrategyConfig(aggregator=aggregator), {"m": 2.0}, INITIAL, FEDERATION.slot_of)
