"""The model as the ServerApp has it after a round: the clients' adapter, and the trunk's when asked for."""

from flwr.app import ArrayRecord
from torch import Tensor

from flower_split.config import RunConfig
from flower_split.errors import TrunkUnavailable
from flower_split.server.additions import GlobalModel
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.rounds import with_retries
from flower_split.server.strategy_factory import RunParts
from flower_split.server.trunk_access import Coordinator, TrunkHealth
from flower_split.server.trunk_rounds import TrunkRounds
from flower_split.server.trunk_strategy import TrunkStrategy


def global_model(
    parts: RunParts, strategy: TrunkStrategy, server_round: int, arrays: ArrayRecord
) -> GlobalModel:
    """Return what the ServerApp has of the model after a round.

    Args:
        parts: The run, connected.
        strategy: Its strategy.
        server_round: The committed round.
        arrays: The clients' global adapter after it.
    """
    inner = strategy.inner

    def base_change() -> dict[str, Tensor]:
        if isinstance(inner, LoraFedAvg) and inner.changes_base:
            return inner.base_change()
        return {}

    return GlobalModel(
        server_round=server_round,
        config=parts.config,
        arrays=arrays,
        read_trunk=lambda: read_trunk_adapter(parts, strategy),
        read_base_change=base_change,
    )


def read_trunk_adapter(parts: RunParts, strategy: TrunkStrategy) -> dict[str, Tensor]:
    """Return the trunk's adapter after the last committed round; see :func:`committed_trunk_adapter`."""
    trunk = parts.trunk
    return committed_trunk_adapter(
        strategy.trunk_rounds, trunk.coordinator, parts.config, trunk.health
    )


def committed_trunk_adapter(
    trunk_rounds: TrunkRounds, coordinator: Coordinator, config: RunConfig, health: TrunkHealth
) -> dict[str, Tensor]:
    """Return the trunk's adapter after the last committed round, whatever happened to its process since.

    Raises:
        TrunkUnavailable: The trunk was lost more than ``round-retries`` times.
        TrunkRefused: It cannot restore the round.
    """

    def fetch() -> dict[str, Tensor]:
        epoch = trunk_rounds.settle(config.num_server_rounds)
        adapter = coordinator.get_adapter()
        if coordinator.status().epoch != epoch:  # a new process has the initial weights
            raise TrunkUnavailable("the trunk restarted while its adapter was read.")
        return adapter

    return with_retries(
        trunk_rounds, fetch, "the trunk's adapter", retries=config.round_retries, health=health
    )
