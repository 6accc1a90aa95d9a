"""A client that an operator revokes: its token is unknown, and the round is that of the others."""

import time
from collections.abc import Iterator

import pytest
import torch

from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import Dispatch
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.toy_trunk import HIDDEN, ToyClient, make_engine, make_plan

THREE = (0, 1, 2)


@pytest.fixture
def engine() -> Iterator[TrunkEngine]:
    engine = make_engine()
    yield engine
    engine.close()


def batch(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(seed))


def contribute(client: ToyClient, seed: int, window: int = 0) -> None:
    client.forward(batch(seed), window)
    client.backward(batch(seed + 100), window, num_tokens=1.0 + seed)


def weight_without(revoked: int) -> torch.Tensor:
    """What an engine that never heard of the slot ends with after its window."""
    engine = make_engine()
    try:
        others = [slot for slot in THREE if slot != revoked]
        engine.begin_round(make_plan(others, steps_per_round=1))
        for slot in others:
            contribute(ToyClient(engine, slot), slot)
        return engine.adapter()["weight"]
    finally:
        engine.close()


@pytest.mark.parametrize("given", ["nothing", "a contribution"])
def test_round_goes_on_as_if_the_revoked_client_had_never_joined(
    engine: TrunkEngine, given: str
) -> None:
    engine.begin_round(make_plan(THREE, steps_per_round=1, quorum=0.5))
    clients = [ToyClient(engine, slot) for slot in THREE]
    if given != "nothing":
        contribute(clients[1], 1)
    assert engine.revoke([1]) == [1] == engine.revoke([1])  # a retry
    assert not engine.knows_token("token-1")
    assert engine.knows_token("token-0") and engine.knows_token("token-2")
    for slot in (0, 2):
        contribute(clients[slot], slot)
    assert torch.equal(engine.adapter()["weight"], weight_without(1))
    status = engine.status()
    assert status.phase == "done"
    assert ["trunk-revoke" in slot.problem for slot in status.slots] == [False, True, False]
    with pytest.raises(TrunkRefused) as refused:
        clients[1].forward(batch(9), 0, 1)
    assert refused.value.reason is RefusalReason.DROPPED


def test_revocation_before_it_has_joined_lets_the_others_begin(engine: TrunkEngine) -> None:
    engine.begin_round(make_plan(THREE, steps_per_round=1, quorum=0.5))
    clients = [ToyClient(engine, slot) for slot in (0, 2)]
    assert engine.status().phase == "joining"
    engine.revoke([1])
    assert engine.status().phase == "open"
    for client, slot in zip(clients, (0, 2), strict=True):
        contribute(client, slot)
    assert torch.equal(engine.adapter()["weight"], weight_without(1))


@pytest.mark.parametrize(
    ("reduction", "quorum", "told"),
    [(None, 1.0, "quorum 1"), (Reduction(exclude_bad=False), 0.3, "on-bad-client")],
    ids=["everybody-needed", "abort"],
)
def test_round_is_given_up_where_quorum_or_policy_say_so(
    reduction: Reduction | None, quorum: float, told: str
) -> None:
    engine = make_engine(reduction=reduction)
    try:
        before = engine.adapter()["weight"]
        engine.begin_round(make_plan(THREE, quorum=quorum))
        clients = [ToyClient(engine, slot, 2) for slot in THREE]
        for slot in THREE:
            contribute(clients[slot], slot)
        engine.revoke([2])
        status = engine.status()
        assert status.phase == "aborted" and told in status.problem
        assert "slot 2" in status.problem and "trunk-revoke" in status.problem
        assert torch.equal(engine.adapter()["weight"], before)
        with pytest.raises(RoundAborted):
            clients[0].forward(batch(0), 1)
    finally:
        engine.close()


def test_revoked_client_stays_out_in_later_attempts_of_the_experiment_and_no_other(
    engine: TrunkEngine,
) -> None:
    engine.begin_round(make_plan(THREE, quorum=0.5))
    engine.revoke([1])
    again = {slot: f"fresh-{slot}" for slot in THREE}
    engine.begin_round(make_plan(THREE, quorum=0.5, attempt=1, participants=again))
    assert not engine.knows_token("fresh-1") and engine.knows_token("fresh-0")
    assert "trunk-revoke" in engine.status().slots[1].problem
    engine.abort_round("test", 1, 1, "the test says so")
    engine.begin_round(make_plan(THREE, experiment="another"))
    assert engine.knows_token("token-1") and not engine.status().slots[1].problem


def test_what_a_round_was_prepared_with_stays(engine: TrunkEngine) -> None:
    engine.begin_round(make_plan((0, 1), quorum=0.5, steps_per_round=1))
    for slot in (0, 1):
        contribute(ToyClient(engine, slot), slot)
    report = engine.prepare_round("test", 1, 0, time.monotonic() + 20)
    engine.revoke([1])
    assert engine.commit_round("test", 1, 0) == report.version == 1
    assert not engine.knows_token("token-1")


def test_dispatch_of_a_revoked_client_is_recalled_and_so_is_its_next(engine: TrunkEngine) -> None:
    sent = (Dispatch(1, 0, "token-1"), Dispatch(2, 1, "token-2"))
    plan = make_plan((), step_every=StepEvery.BUFFER, dispatches=sent, num_server_rounds=9)
    engine.begin_round(plan)
    one = engine.open_session("token-2", {"model": "toy"}, 1, False)
    engine.revoke([1])
    assert engine.knows_token("token-1") and not engine.knows_token("token-2")
    with pytest.raises(RoundAborted, match="trunk-revoke"):
        engine.wait_version(one.session, one.epoch, 0, time.monotonic() + 20)
    later = (sent[0], Dispatch(3, 1, "token-3"))
    engine.begin_round(
        make_plan((), step_every=StepEvery.BUFFER, dispatches=later, num_server_rounds=9)
    )
    assert engine.knows_token("token-1") and not engine.knows_token("token-3")


def test_revoking_nobody_is_refused_and_changes_nothing(engine: TrunkEngine) -> None:
    with pytest.raises(TrunkRefused) as refused:
        engine.revoke([0])
    assert refused.value.reason is RefusalReason.NO_ROUND
    engine.begin_round(make_plan(THREE))
    for slots, tokens in (([7], []), ([0, 7], []), ([], ["nobody's"])):
        with pytest.raises(TrunkRefused, match="not among the participants") as refused:
            engine.revoke(slots, tokens)
        assert refused.value.reason is RefusalReason.INVALID_REQUEST
    assert engine.knows_token("token-0")
    assert engine.revoke([], ["token-2"]) == [2]
