"""Keep some weights of the adapter as they began, around any strategy of Flower's.

FFA-LoRA needs it of a strategy that sees an adapter as a bag of weights: A frozen at its shared
beginning, B averaged (Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR
2024, arXiv 2403.12313).
"""

from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from flower_split.messages.arrays import to_arrays
from flower_split.messages.orders import TrainOrder


class FrozenFactors(Strategy):
    """Keep some weights of the adapter as they began, around any strategy of Flower's.

    Clients freeze them, and what the strategy inside makes of them (rounding, noise) is put back.

    Args:
        strategy: The strategy inside.
        initial: The adapter before round 1.
        frozen: Names of the weights that stay.
    """

    def __init__(
        self, strategy: Strategy, initial: Mapping[str, Tensor], frozen: Iterable[str]
    ) -> None:
        self.strategy = strategy
        self._frozen = to_arrays({name: initial[name] for name in frozen})
        self._order = TrainOrder(trainable=tuple(sorted(initial.keys() - self._frozen.keys())))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy inside write the messages, and say in them what trains."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.content = self._order.write(message.content)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy inside aggregate, and put the frozen weights back."""
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        if arrays is not None:
            arrays = ArrayRecord({name: self._frozen.get(name, arrays[name]) for name in arrays})
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pass through to the strategy inside."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Pass through to the strategy inside."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the summary of the strategy inside."""
        self.strategy.summary()
