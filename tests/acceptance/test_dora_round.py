"""DoRA through the default inner strategy: what clients are asked, and who does not answer."""

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from flower_split.config import StrategyConfig
from flower_split.errors import AggregationError
from flower_split.messages.arrays import from_arrays, to_arrays
from flower_split.server.federation.exchange import exchange
from flower_split.server.federation.nodes import Federation
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.node_view import NodeView
from tests.support.fakes import FakeGrid, train_content

FEDERATION = Federation({0: 9, 1: 4})
WEIGHT = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # row norms 5 and 2
A = torch.tensor([[1.0, 0.0]])
INITIAL = {
    "m.lora_A.weight": A,
    "m.lora_B.weight": torch.zeros(2, 1),
    "m.lora_magnitude_vector": torch.tensor([5.0, 2.0]),
}
# ΔW of client 0 takes the 3 from the first row, that of client 1 adds 2 to the second.
B = {0: torch.tensor([[-3.0], [0.0]]), 1: torch.tensor([[0.0], [2.0]])}
NORMS = {0: torch.tensor([4.0, 2.0]), 1: torch.tensor([5.0, 8.0**0.5])}
MAGNITUDES = {0: torch.tensor([6.0, 2.0]), 1: torch.tensor([5.0, 4.0])}


def one_round(config: StrategyConfig, silent: int | None = None) -> tuple[LoraFedAvg, Tensor]:
    """The strategy after a round of equal weights, and the magnitudes; ``silent`` says no norms."""
    strategy = LoraFedAvg(config, {"m": 1.0}, INITIAL, FEDERATION.partition_of)

    def answer(message: Message) -> RecordDict:
        slot = FEDERATION.partition_of(message.metadata.dst_node_id)
        state = {
            "m.lora_A.weight": A,
            "m.lora_B.weight": B[slot],
            "m.lora_magnitude_vector": MAGNITUDES[slot],
        }
        asked = message.content["config"].get("flower-split.wants-weight-norms") is True
        norms = {"m": NORMS[slot].numpy().tobytes()} if asked and slot != silent else {}
        return train_content(to_arrays(state), tokens=1, examples=1, weight_norms=norms)

    grid = FakeGrid([9, 4], answer)
    messages = strategy.configure_train(
        1, strategy.initial_arrays(), ConfigRecord({"kept": 1}), NodeView(grid, [9, 4])
    )
    assert all(m.content.config_records["config"]["kept"] == 1 for m in messages)
    arrays, _ = strategy.aggregate_train(1, exchange(grid, messages, timeout=1))
    assert arrays is not None
    return strategy, from_arrays(arrays)["m.lora_magnitude_vector"]


def test_round_of_dora_gives_the_norms_of_the_clients_mean() -> None:
    # Client 0 computes with (0, 6) and (0, 2), client 1 with (3, 4) and 4 / √8 · (2, 2).
    mean = torch.tensor([[1.5, 5.0], [8**0.5 / 2, 1 + 8**0.5 / 2]])
    _, magnitudes = one_round(StrategyConfig())
    torch.testing.assert_close(magnitudes, mean.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "config",
    [StrategyConfig(dora="mean"), StrategyConfig(aggregator="fedit")],
    ids=["mean", "fedit"],
)
def test_round_of_dora_without_norms_gives_the_mean_of_the_magnitudes(
    config: StrategyConfig,
) -> None:
    _, magnitudes = one_round(config, silent=0)
    torch.testing.assert_close(magnitudes, torch.tensor([5.5, 3.0]))


def test_client_that_says_no_norms_is_named() -> None:
    with pytest.raises(
        AggregationError, match=r"client 1 was asked for the norms of m .*2 numbers"
    ):
        one_round(StrategyConfig(), silent=1)


def test_client_that_says_no_norms_is_excluded_where_malformed_ones_are() -> None:
    strategy, magnitudes = one_round(StrategyConfig(on_invalid="exclude"), silent=1)
    assert list(strategy.last_summary.excluded) == [1]
    torch.testing.assert_close(magnitudes, MAGNITUDES[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("aggregator", ["flora", "fedex-lora", "fedsa-lora"])
def test_method_that_dora_does_not_fit_is_refused_when_the_strategy_is_made(
    aggregator: str,
) -> None:
    with pytest.raises(AggregationError, match="use-dora"):
        LoraFedAvg(
            StrategyConfig(aggregator=aggregator), {"m": 1.0}, INITIAL, FEDERATION.partition_of
        )
