"""The leader of divided layers, with followers that only say what they were asked."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flower_split.config import LoraPartConfig
from flower_split.errors import SplitError
from flower_split.lora import attach_lora
from flower_split.split import CutLayers, split_model
from flower_split.trunk.replicas.link import OrderFailed, ReplicaLost
from flower_split.trunk.replicas.orders import CallBackOrder, Called, CalledBack, CallOrder
from flower_split.trunk.tensor_parallel.shards import Shards
from flower_split.trunk.tensor_parallel.trunk import ParallelTrunk
from tests.support.tiny_models import tiny_model

HIDDEN, CUTS = 32, CutLayers(1, 3)


class Saying:
    """A follower's link: notes orders, and succeeds or fails as it is told."""

    where = "rank 1 (cpu)"

    def __init__(self) -> None:
        self.orders: list[CallOrder | CallBackOrder] = []
        self.waits: list[float | None] = []
        self.cause: str | None = None
        self.ended = False

    def ask(self, order: CallOrder | CallBackOrder, buffer: Tensor) -> None:
        assert buffer.numel() >= 4
        self.orders.append(order)

    def answer(self, what: str, timeout: float | None = None) -> Called | CalledBack:
        self.waits.append(timeout)
        if self.cause is not None:
            raise OrderFailed(f"{self.where} failed to {what}: {self.cause}", self.cause)
        return Called() if isinstance(self.orders[-1], CallOrder) else CalledBack((), ())

    def tensors(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def lost(self, why: str) -> ReplicaLost:
        self.ended = True
        return ReplicaLost(f"{self.where} {why}.")


@pytest.fixture
def link() -> Saying:
    return Saying()


@pytest.fixture
def trunk(link: Saying) -> ParallelTrunk:
    _, local = split_model(tiny_model("llama"), CUTS)
    attach_lora(local, CUTS, {"trunk": LoraPartConfig(r=4, alpha=8.0)}, seed=0)
    shards = Shards(local)
    return ParallelTrunk(shards, shards.whole(), [link])  # type: ignore[list-item]


def hidden() -> Tensor:
    return torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()


def train(trunk: ParallelTrunk) -> Callable[[], tuple[Tensor, ...]]:
    leaf = hidden()
    output = trunk(leaf)
    weights = [p for p in trunk.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(output, [leaf, *weights], torch.ones_like(output))


def test_weights_travel_when_they_have_changed_and_calls_end_with_their_backward(
    trunk: ParallelTrunk, link: Saying
) -> None:
    first, second = train(trunk), train(trunk)
    assert all(gradient is not None for gradient in first())
    del first
    with torch.no_grad():
        trunk(hidden())
        next(p for p in trunk.parameters() if p.requires_grad).add_(1)
        trunk(hidden())
    second()
    calls = [order for order in link.orders if isinstance(order, CallOrder)]
    assert [order.weights for order in calls] == [True, False, False, True]
    assert [order.graph for order in calls] == [True, True, False, False]
    assert [sorted(order.alive) for order in calls] == [[], [0], [1], [1]]
    backs = [order.number for order in link.orders if isinstance(order, CallBackOrder)]
    assert backs == [0, 1]


def test_what_fails_alike_everywhere_is_an_error_of_the_call(
    trunk: ParallelTrunk, link: Saying
) -> None:
    wrong = torch.ones(2, 3, HIDDEN + 1)
    with pytest.raises(ReplicaLost), torch.no_grad():
        trunk(wrong)
    with pytest.raises(Exception) as failure, torch.no_grad():
        trunk._shards[0].trunk(wrong)
    link.cause, link.ended = f"{type(failure.value).__name__}: {failure.value}", False
    with pytest.raises(type(failure.value)), torch.no_grad():
        trunk(wrong)
    assert not link.ended and link.waits[-1] is not None, "a failed leader waits a short time"
    link.cause = None
    assert train(trunk)()[0].shape == (2, 3, HIDDEN)  # and the next call is an ordinary one


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_follower_that_fails_alone_is_lost(trunk: ParallelTrunk, link: Saying, fails: str) -> None:
    backward = train(trunk) if fails == "backward" else None
    link.cause = "OutOfMemoryError: no room"
    with pytest.raises(ReplicaLost, match=r"failed \(OutOfMemoryError.*succeeded in the process"):
        backward() if backward is not None else trunk(hidden())
    assert link.ended


def test_leader_that_fails_alone_loses_its_follower(
    trunk: ParallelTrunk, link: Saying, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Shards, "call", no_room)
    with pytest.raises(ReplicaLost, match=r"which succeeded there, and failed \(MemoryError"):
        trunk(hidden())
    assert link.ended


def test_divided_trunk_stays_whole_and_where_it_is(trunk: ParallelTrunk) -> None:
    assert trunk.span(CUTS) is trunk
    with pytest.raises(SplitError, match="2 processes divide them"):
        trunk.span(CutLayers(2, 3))
    with pytest.raises(SplitError, match="stays on their devices"):
        trunk.to(torch.float64)
    trunk.release_cache(1)  # there is none
