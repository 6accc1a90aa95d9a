"""What a simulation predicts of a job: seconds, shares, bytes, cost, and what holds everybody up."""

from dataclasses import dataclass

from flower_split.scale.costs import Costs
from flower_split.scale.round import Federation, RoundTimes
from flower_split.scale.setting import Setting, Work

_HOUR, _GIGA = 3600.0, 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """How often a job does what."""

    rounds: int  # of training
    evaluations: int  # of the clients that ``evaluating`` counts, beside the first and the last
    evaluating: int  # clients of such an evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One federation's job."""

    clients: int  # of the federation
    cohort: int  # clients of a round
    round_seconds: float  # training, aggregation, commit
    trunk_share: float  # of the round in which the trunk computes
    link_share: float  # of the round in which the trunk's busier direction carries bytes
    client_share: float  # of the round in which a client computes, mean
    wire_share: float  # of the round in which a client's calls are under way, mean
    wait_share: float  # of the round in which a client waits for the trunk and for others, mean
    holds_up: str  # what would take the longest if all else took no time
    trunk_bytes: float  # to and from the trunk, of a round
    adapter_bytes: float  # to and from the ServerApp, of a round
    evaluation_seconds: float  # of everybody's evaluation, before round 1 and after the last
    refused: float  # calls a round that found no place at the trunk and came again
    round_cost: float
    job_seconds: float  # all rounds and evaluations
    job_cost: float


def predict(work: Work, costs: Costs, setting: Setting, job: Job) -> Prediction:
    """Simulate a job's rounds, and return what the whole job comes to.

    Raises:
        ConfigError: The setting cannot work.
    """
    times = Federation(work, costs, setting).train()
    everybody = some = 0.0
    if work.eval_batches:
        everybody = Federation(work, costs, setting).evaluate(setting.clients)
        some = everybody
        if job.evaluating != setting.clients:
            some = Federation(work, costs, setting).evaluate(job.evaluating)
    at_once = work.buffer or setting.cohort
    moved = at_once * work.steps * work.micro_batches * (costs.sent_bytes + costs.received_bytes)
    adapters = 2 * at_once * costs.adapter_bytes
    cost = _cost(setting, times, (moved + adapters) / _GIGA, work.concurrency or setting.cohort)
    evaluations = 2 * everybody + job.evaluations * some
    worked = times.computed + times.wired
    return Prediction(
        clients=setting.clients,
        cohort=setting.cohort,
        round_seconds=times.seconds,
        trunk_share=times.trunk_busy / times.seconds,
        link_share=times.link_busy / times.seconds,
        client_share=times.computed,
        wire_share=times.wired,
        wait_share=max(0.0, 1.0 - worked),
        holds_up=holds_up(times),
        trunk_bytes=moved,
        adapter_bytes=adapters,
        evaluation_seconds=everybody,
        refused=times.refused,
        round_cost=cost,
        job_seconds=job.rounds * times.seconds + evaluations,
        job_cost=job.rounds * cost + setting.prices.trunk_hour * evaluations / _HOUR,
    )


def holds_up(times: RoundTimes) -> str:
    """Return what would take the longest alone: trunk, trunk link, server, client, or client link."""
    alone = {
        "trunk": times.trunk_busy,
        "trunk link": times.link_busy,
        "server": times.server_busy,
        "client": times.slowest_compute,
        "client link": times.slowest_wire,
    }
    return max(alone, key=lambda name: alone[name])


def _cost(setting: Setting, times: RoundTimes, gigabytes: float, at_work: int) -> float:
    prices = setting.prices
    hours = times.seconds / _HOUR
    machines = setting.replicas * prices.trunk_hour + at_work * prices.client_hour
    return hours * machines + gigabytes * prices.gigabyte
