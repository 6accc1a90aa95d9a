"""A phase's verdict: how many clients suffice, and whether a failure may be tried again."""

import pytest
from flwr.app import Error, Message, RecordDict

from flower_split.errors import FederationError, RoundLost
from flower_split.server.federation.nodes import Federation
from flower_split.server.trunk_phase import TrunkPhase
from tests.support.fakes import FakeGrid, arrays, reply, train_content

NODES = {0: 900, 1: 300, 2: 700}  # partition -> node id
OWN, NODE_GONE = 2, 5  # Flower's codes: the ClientApp raised; the node is unavailable


def make_phase(*, quorum: float = 1.0, evaluate: bool = False) -> TrunkPhase:
    messages = {
        partition_id: Message(RecordDict(), node, "train") for partition_id, node in NODES.items()
    }
    FakeGrid(NODES.values(), lambda _: None).push_messages(messages.values())
    return TrunkPhase(4, evaluate, messages, Federation(NODES), quorum)


def answers(phase: TrunkPhase, **codes: int) -> list[Message]:
    """Replies of all clients; ``s1=5``: partition 1 fails with that code."""
    return [
        reply(message, Error(codes[f"s{partition_id}"], "why"))
        if f"s{partition_id}" in codes
        else reply(message, train_content(arrays(w=[1.0]), tokens=1))
        for partition_id, message in phase.messages.items()
    ]


@pytest.mark.parametrize(
    ("quorum", "evaluate", "required"),
    [(1.0, False, 3), (0.67, False, 3), (2 / 3, False, 2), (0.01, False, 1), (1.0, True, 1)],
)
def test_required_is_the_quorum_rounded_up(quorum: float, evaluate: bool, required: int) -> None:
    assert make_phase(quorum=quorum, evaluate=evaluate).required == required


def test_failures_leave_out_clients_that_have_not_replied() -> None:
    phase = make_phase(quorum=2 / 3)
    first = answers(phase, s0=OWN)[:2]
    assert phase.failures(first) == {0: "why"}
    assert phase.can_succeed({0: "why"}) and not phase.can_succeed({0: "why", 2: "why"})


def test_enough_clients_pass() -> None:
    phase = make_phase(quorum=2 / 3)
    good, problems = phase.sort(answers(phase, s1=OWN))
    phase.check_enough(good, problems)
    assert (list(good), problems) == ([0, 2], {1: "why"})


@pytest.mark.parametrize(
    ("codes", "lost"),
    [
        ({"s1": NODE_GONE}, True),
        ({"s1": NODE_GONE, "s2": NODE_GONE}, True),
        ({"s1": NODE_GONE, "s2": OWN}, False),
        ({"s1": OWN}, False),
    ],
)
def test_too_few_are_lost_only_where_nobody_failed_by_itself(
    codes: dict[str, int], lost: bool
) -> None:
    phase = make_phase()
    good, problems = phase.sort(answers(phase, **codes))
    with pytest.raises(FederationError, match=r"round 4: .*partition.*1.*\(node 300\)") as caught:
        phase.check_enough(good, problems)
    assert isinstance(caught.value, RoundLost) == lost


def test_silent_clients_are_lost() -> None:
    phase = make_phase()
    good, problems = phase.sort(answers(phase)[:2])
    with pytest.raises(RoundLost, match=r"partition 2 \(node 700\): no reply"):
        phase.check_enough(good, problems)


def test_lost_trunk_makes_every_failure_a_loss_and_the_first_cause_is_told() -> None:
    phase = make_phase()
    phase.mark_stopped("the trunk gave the round up")
    phase.mark_lost("the trunk restarted")
    good, problems = phase.sort(answers(phase, s1=OWN))
    with pytest.raises(RoundLost, match="Cause: the trunk gave the round up[.]"):
        phase.check_enough(good, problems)


def test_client_that_left_is_named_before_healthy_ones_that_failed_without_it() -> None:
    phase = make_phase()
    phase.mark_failed({0: "the round was given up"})  # heard of first, and not the cause
    good, problems = phase.sort(answers(phase, s0=OWN, s2=NODE_GONE))
    with pytest.raises(FederationError) as caught:
        phase.check_enough(good, problems)
    text = str(caught.value)
    assert "Cause: left the run: partition 2 (node 700): why; then failed: partition 0" in text


def test_client_that_left_is_named_beside_the_trunks_words() -> None:
    phase = make_phase()
    phase.mark_stopped("the trunk gave the round up: slot 2 was silent.")
    good, problems = phase.sort(answers(phase, s0=OWN, s2=NODE_GONE))
    with pytest.raises(FederationError) as caught:
        phase.check_enough(good, problems)
    text = str(caught.value)
    assert "slot 2 was silent; left the run: partition 2 (node 700): why." in text
    assert "node 900" not in text
