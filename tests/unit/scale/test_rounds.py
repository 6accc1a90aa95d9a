"""Simulated rounds against sums by hand."""

from dataclasses import replace

import pytest

from flower_split.errors import ConfigError
from flower_split.scale.costs import Costs
from flower_split.scale.prediction import Job, predict
from flower_split.scale.round import Federation, RoundTimes
from flower_split.scale.setting import Link, Pace, Prices, Setting, Work

STEPS, CLIENT, TRUNK = 5, 0.2, 0.04
NOWHERE = Link(megabits=float("inf"), latency=0.0)
COSTS = Costs(client_seconds=CLIENT, trunk_seconds=TRUNK, sent_bytes=0, received_bytes=0)
WORK = Work(
    steps=STEPS,
    micro_batches=1,
    in_flight=1,
    joint=True,
    backward=True,
    step_every="local-step",
    ends_together=False,
    window_batches=False,
    batch_positions=64,
    positions=16,
    eval_batches=0,
)


def setting(clients: int, **changes: object) -> Setting:
    given = {"clients": clients, "cohort": clients, "links": [NOWHERE], **changes}
    return Setting(**given)


def times(work: Work, costs: Costs, where: Setting) -> RoundTimes:
    return Federation(work, costs, where).train()


def test_one_client_takes_the_sum_of_its_parts() -> None:
    costs = replace(
        COSTS,
        sent_bytes=2e6,
        received_bytes=1e6,
        adapter_bytes=5e5,
        call_seconds=0.004,
        handling_seconds=0.003,
        step_seconds=0.01,
        client_round_seconds=0.5,
        server_client_seconds=0.25,
        round_seconds=1.0,
    )
    link = Link(megabits=8.0, latency=0.05)  # a megabyte a second
    found = times(WORK, costs, setting(1, links=[link], hub_megabits=float("inf")))
    # Two calls: their overhead, a latency and the trunk's handling each; three megabytes in all.
    step = CLIENT + TRUNK + 2 * (0.004 + 0.05 + 0.003) + 3.0
    round_itself = 0.5 + 0.25 + 1.0 + 2 * (0.5 + 0.025)  # the adapter there and back
    # The step of the trunk runs while the client takes the last reply in: it delays nobody.
    assert found.seconds == pytest.approx(STEPS * step + round_itself)
    assert found.trunk_busy == pytest.approx(STEPS * (TRUNK + 2 * 0.003 + 0.01))
    assert found.server_busy == pytest.approx(1.25)


def test_a_window_waits_for_the_slowest_and_server_rounds_do_not() -> None:
    where = setting(40, slower=[Pace(factor=3.0, share=0.5)])
    quick = replace(COSTS, trunk_seconds=0.0)
    assert {member.factor for member in where.chosen(1, 40)} == {1.0, 3.0}
    slow = times(WORK, quick, where)
    assert slow.seconds == pytest.approx(STEPS * 3 * CLIENT)
    # In windows, who is quick waits for the others; without, for nobody: both end with the slowest.
    assert slow.slowest_compute == pytest.approx(STEPS * 3 * CLIENT)
    own = replace(WORK, step_every="server-round")
    assert times(own, quick, where).seconds == pytest.approx(STEPS * 3 * CLIENT)


@pytest.mark.parametrize("mode", ["local-step", "server-round"])
def test_a_full_trunk_computes_all_the_time(mode: str) -> None:
    work = replace(WORK, step_every=mode)
    found = times(work, replace(COSTS, client_seconds=1e-9, step_seconds=0.1), setting(30))
    steps = STEPS if mode == "local-step" else 1
    assert found.trunk_busy == pytest.approx(30 * STEPS * TRUNK + steps * 0.1)
    # After the last round's step nobody waits any more.
    assert found.seconds == pytest.approx(30 * STEPS * TRUNK + (steps - 1) * 0.1, rel=1e-6)


def test_contributions_take_turns_from_forward_to_backward() -> None:
    found = times(replace(WORK, step_every="contribution"), COSTS, setting(4))
    # A turn has the trunk's calls and the top's half of the client; the first bottom's forward comes
    # before, the last bottom's backward after.
    turn = TRUNK + CLIENT / 2
    assert found.seconds == pytest.approx(4 * STEPS * turn + CLIENT / 4 + CLIENT / 4)


def test_micro_batches_in_flight_hide_the_trunk_behind_the_client() -> None:
    work = replace(WORK, micro_batches=8)
    alone = times(work, COSTS, setting(1)).seconds
    assert alone == pytest.approx(STEPS * 8 * (CLIENT + TRUNK))
    both = times(replace(work, in_flight=2), COSTS, setting(1)).seconds
    # While one is at the trunk, for 0.02 s, the client has at least 0.05 s of another to compute.
    assert both == pytest.approx(STEPS * 8 * CLIENT)


def test_steps_that_end_together_wait_for_the_trunks_step() -> None:
    costs = replace(COSTS, step_seconds=0.3)
    found = times(replace(WORK, ends_together=True), costs, setting(1))
    assert found.seconds == pytest.approx(STEPS * (CLIENT + TRUNK + 0.3))


def test_window_batches_share_what_a_pass_takes() -> None:
    costs = replace(COSTS, client_seconds=1e-9, trunk_seconds=0.0, pass_seconds=1.0)
    alone = times(WORK, costs, setting(8)).seconds
    assert alone == pytest.approx(STEPS * 2 * 8, rel=1e-6)
    # Four micro-batches of 16 positions fit in a pass of 64.
    batched = times(replace(WORK, window_batches=True), costs, setting(8)).seconds
    assert batched == pytest.approx(STEPS * 2 * 2, rel=1e-6)


def test_calls_without_a_place_come_again_and_a_full_barrier_is_refused() -> None:
    work = replace(WORK, step_every="server-round")
    crowded = setting(30, waiting_calls=2)
    found = times(work, replace(COSTS, client_seconds=1e-3), crowded)
    assert found.refused > 0
    assert found.seconds >= 30 * STEPS * TRUNK - TRUNK  # a backward needs no place
    with pytest.raises(ConfigError, match="stand still"):
        times(WORK, COSTS, setting(800))
    assert times(WORK, COSTS, setting(768)).refused == 0
    with pytest.raises(ConfigError, match="stand still"):
        times(replace(WORK, micro_batches=2, in_flight=2), COSTS, setting(400))


def test_shared_cores_and_a_shared_link_are_waited_for() -> None:
    one_core = times(WORK, COSTS, setting(6, cores=1)).seconds
    # Everything runs on it but the end of the last step, which nobody waits for.
    assert one_core == pytest.approx(6 * STEPS * (CLIENT + TRUNK))
    costs = replace(COSTS, sent_bytes=2e6, received_bytes=0)
    narrow = times(WORK, costs, setting(10, hub_megabits=8.0))
    assert narrow.link_busy == pytest.approx(10 * STEPS * 2.0)
    assert narrow.seconds >= narrow.link_busy


def test_replicas_divide_the_clients_and_exchange_gradients() -> None:
    costs = replace(COSTS, client_seconds=1e-9, trunk_adapter_bytes=1e6)
    found = times(WORK, costs, setting(20, replicas=2, hub_megabits=8.0))
    # A ring of two moves 2 x 1e6 x 1/2 bytes, a second; after the last step nobody waits for it.
    assert found.seconds == pytest.approx(STEPS * 10 * TRUNK + (STEPS - 1) * 1.0, rel=1e-6)


def test_an_asynchronous_round_ends_with_its_arrivals() -> None:
    work = replace(WORK, concurrency=8, buffer=4)
    found = times(work, COSTS, setting(8, rounds=5))
    # Eight at work are more than the trunk takes: a step in 0.24 s each, of 0.04 s on the trunk.
    assert found.seconds == pytest.approx(4 * STEPS * TRUNK)
    few = times(replace(work, concurrency=2, buffer=1), COSTS, setting(8, rounds=5))
    assert few.seconds == pytest.approx(STEPS * (CLIENT + TRUNK) / 2, rel=0.02)


def test_members_keep_their_link_and_a_cohort_is_drawn_by_the_seed() -> None:
    links = [Link(megabits=100, latency=0.01, share=3.0), Link(megabits=10, latency=0.05)]
    where = setting(1_000_000, cohort=1000, links=links)
    first, again, second = (where.chosen(number, 1000) for number in (1, 1, 2))
    assert first == again and first != second
    assert [member.partition_id for member in first] == sorted({m.partition_id for m in first})
    quick = sum(member.link is links[0] for member in first)
    assert 700 < quick < 800
    assert where.member(first[7].partition_id) == first[7]


def test_a_prediction_adds_rounds_evaluations_bytes_and_prices_up() -> None:
    costs = replace(COSTS, sent_bytes=3e6, received_bytes=2e6, adapter_bytes=1e6)
    where = setting(2, prices=Prices(trunk_hour=3.6, client_hour=0.36, gigabyte=0.1))
    work = replace(WORK, eval_batches=3)
    found = predict(work, costs, where, Job(rounds=10, evaluations=4, evaluating=2))
    assert found.trunk_bytes == 2 * STEPS * 5e6 and found.adapter_bytes == 2 * 2e6
    euros = found.round_seconds * (3.6 + 2 * 0.36) / 3600 + 0.054 * 0.1
    assert found.round_cost == pytest.approx(euros)
    evaluations = 2 * found.evaluation_seconds + 4 * found.evaluation_seconds
    assert found.job_seconds == pytest.approx(10 * found.round_seconds + evaluations)
    assert found.evaluation_seconds > 3 * (CLIENT / 2 + TRUNK / 2)
    assert found.holds_up == "client"
    assert found.client_share + found.wire_share + found.wait_share == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["0:1", "100", "100:-1", "x:1", "1:2:3:4", "100:5:0"])
def test_a_wrong_link_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="MBIT:MS"):
        Link.parse(text)


def test_costs_are_given_by_name_and_checked() -> None:
    assert COSTS.changed(["step-seconds=0.5"]).step_seconds == 0.5
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        COSTS.changed(["no-such-cost=1"])
    with pytest.raises(ConfigError, match="at least 0"):
        COSTS.changed(["step-seconds=-1"])
