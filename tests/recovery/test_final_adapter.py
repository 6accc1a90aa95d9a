"""The trunk's final adapter is that of the committed round, even if the trunk dies while it is read."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flower_split.rounds import TrunkCare
from flower_split.server_app import ConnectedTrunk, final_trunk_adapter
from flower_split.strategy import TrunkAccess
from flower_split.trunk.calls import RoundBase, RoundPlan
from tests.flower.fakes import FakeCoordinator
from tests.flower.test_strategy import make_strategy

INITIAL, TRAINED = torch.zeros(1), torch.ones(1)


@dataclass
class RestartingTrunk(FakeCoordinator):
    """Dies once while its adapter is read; the next process answers that call, from its beginning."""

    weights: Tensor = field(default_factory=lambda: INITIAL)
    deaths: int = 0

    def begin_round(self, plan: RoundPlan) -> tuple[int, int]:
        super().begin_round(plan)
        self.weights = TRAINED if plan.base == RoundBase(3, "digest") else INITIAL
        return self.state.epoch, 0

    def get_adapter(self) -> dict[str, Tensor]:
        if not self.deaths:
            self.deaths += 1
            self.state = replace(self.state, epoch=self.state.epoch + 1)
            self.weights = INITIAL
        return {"weight": self.weights}


def test_adapter_of_a_trunk_that_restarts_while_it_is_read_is_read_again() -> None:
    coordinator = RestartingTrunk()
    strategy = make_strategy(coordinator, base=RoundBase(3, "digest"))
    trunk = ConnectedTrunk(
        coordinator,  # type: ignore[arg-type]
        TrunkAccess(address="trunk.example:1"),
        {},
        TrunkCare(),
    )
    adapter = final_trunk_adapter(strategy, trunk)
    assert coordinator.deaths == 1
    assert torch.equal(adapter["weight"], TRAINED)
