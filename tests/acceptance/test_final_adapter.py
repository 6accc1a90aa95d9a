"""The trunk's final adapter is that of the committed round, even if the trunk dies while it is read."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import RoundBase, RoundPlan
from flower_split.server.global_model import committed_trunk_adapter
from flower_split.server.trunk_access import TrunkHealth
from tests.support.fakes import FakeCoordinator
from tests.unit.server.test_trunk_strategy import make_strategy

INITIAL, TRAINED = torch.zeros(1), torch.ones(1)


@dataclass
class RestartingTrunk(FakeCoordinator):
    """Dies once, in the call named; the next process answers that call, from its beginning."""

    dies_in: str = "get_adapter"
    weights: Tensor = field(default_factory=lambda: INITIAL)
    deaths: int = 0

    def call(self, name: str) -> bool:
        """Whether the process that answers is a new one."""
        if name != self.dies_in or self.deaths:
            return False
        self.deaths += 1
        self.state = replace(self.state, epoch=self.state.epoch + 1)
        self.weights = INITIAL
        return True

    def begin_round(self, plan: RoundPlan) -> tuple[int, int]:
        super().begin_round(plan)
        self.weights = TRAINED if plan.base == RoundBase(3, "digest") else INITIAL
        return self.state.epoch, 0

    def abort_round(self, experiment: str, server_round: int, attempt: int, why: str) -> int:
        if self.call("abort_round"):
            raise TrunkRefused(RefusalReason.WRONG_ATTEMPT, "that round is not the open one")
        return super().abort_round(experiment, server_round, attempt, why)

    def get_adapter(self) -> dict[str, Tensor]:
        self.call("get_adapter")
        return {"weight": self.weights}


@pytest.mark.parametrize("dies_in", ["abort_round", "get_adapter"])
def test_adapter_of_a_trunk_that_restarts_while_it_is_read_is_read_again(dies_in: str) -> None:
    coordinator = RestartingTrunk(dies_in=dies_in)
    strategy = make_strategy(coordinator, base=RoundBase(3, "digest"))
    adapter = committed_trunk_adapter(
        strategy.trunk_rounds, coordinator, strategy.config, TrunkHealth()
    )
    assert coordinator.deaths == 1
    assert torch.equal(adapter["weight"], TRAINED)
