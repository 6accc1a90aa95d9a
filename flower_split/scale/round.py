"""Rounds of a simulated federation: messages, clients at work, aggregation, commit.

:func:`simulate` runs some rounds and returns what they took; a synchronous round ends with its last client,
an asynchronous one with its last arrival.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import simpy

from flower_split.scale.client import Client
from flower_split.scale.costs import Costs
from flower_split.scale.parties import Cores, Pipe, Steps
from flower_split.scale.setting import Member, Setting, Work
from flower_split.scale.trunk import Trunk, check_places

_MOST_EVALUATING = 200  # who are simulated; more take as many times as long


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTimes:
    """One round, or the mean of several."""

    seconds: float  # from its first message to its commit
    trunk_busy: float  # seconds that the trunk computed
    link_busy: float  # seconds that the trunk's busier direction carried bytes
    server_busy: float  # seconds of the ServerApp alone
    slowest_compute: float  # seconds of the client that computed the longest
    slowest_wire: float  # seconds of the client whose calls and messages were under way the longest
    computed: float  # share of the clients' time that they computed, mean
    wired: float  # share that their calls were under way, mean
    refused: float  # calls that the trunk turned away for want of a place


class Federation:
    """Everybody who takes part, for one simulation.

    Args:
        work: What clients do.
        costs: What it takes.
        setting: Who, where.

    Raises:
        ConfigError: The setting cannot work.
    """

    def __init__(self, work: Work, costs: Costs, setting: Setting) -> None:
        check_places(work, setting)
        self.env = simpy.Environment()
        self._work, self._costs, self._setting = work, costs, setting
        self._cores = Cores(self.env, setting.cores)
        self._trunk = Trunk(self.env, costs, work, setting, self._cores)
        self._server = tuple(Pipe(self.env, setting.hub_megabits) for _ in range(2))
        self._rounds: list[RoundTimes] = []

    def train(self) -> RoundTimes:
        """Return the mean of the setting's rounds of training."""
        if self._work.concurrency:
            self.env.run(self.env.process(self._asynchronous_rounds()))
        else:
            self.env.run(self.env.process(self._rounds_of_all()))
        return _mean(self._rounds)

    def evaluate(self, count: int) -> float:
        """Return the seconds in which ``count`` clients evaluate, all at once."""
        simulated = min(count, _MOST_EVALUATING)
        members = self._setting.chosen(0, simulated)
        self._trunk.begin(members)
        each, start = self._costs.message_seconds, self.env.now
        clients = [
            self.env.process(self._client(member).evaluate(index * each))
            for index, member in enumerate(members)
        ]
        self.env.run(self.env.all_of(clients))
        return (self.env.now - start) * count / simulated

    def _client(self, member: Member) -> Client:
        down, up = self._server
        return Client(
            self.env, self._costs, self._work, member, self._trunk, self._cores, (down, up)
        )

    def _rounds_of_all(self) -> Steps:
        costs, cohort = self._costs, self._setting.cohort
        for server_round in range(1, self._setting.rounds + 1):
            start, before = self.env.now, self._counts()
            members = self._setting.chosen(server_round, cohort)
            self._trunk.begin(members)
            clients = [self._client(member) for member in members]
            yield self.env.all_of(
                [
                    self.env.process(client.train(index * costs.message_seconds))
                    for index, client in enumerate(clients)
                ]
            )
            worked = self.env.now - start
            yield self.env.timeout(costs.server_client_seconds * cohort + costs.round_seconds)
            server = costs.server_client_seconds * cohort + costs.round_seconds
            server += costs.message_seconds * cohort
            self._note(start, before, clients, [worked] * cohort, server)

    def _asynchronous_rounds(self) -> Steps:
        """Keep ``concurrency`` clients at work; every ``buffer`` arrivals are a round."""
        costs, work = self._costs, self._work
        arrived: list[tuple[Client, float]] = []
        bell = [self.env.event()]  # the one that the next arrival rings
        everybody = self._setting.chosen(0, work.concurrency)
        self._trunk.begin(everybody)

        def at_work(member: Member) -> Steps:
            while True:
                client, start = self._client(member), self.env.now
                yield self.env.process(client.train(costs.message_seconds))
                arrived.append((client, self.env.now - start))
                bell[0].succeed()
                bell[0] = self.env.event()

        for member in everybody:
            self.env.process(at_work(member))
        # Who began together comes back together for a while; a lap is a round of everybody.
        lap = math.ceil(work.concurrency / work.buffer)
        for server_round in range((self._setting.rounds + 1) * lap):
            start, before = self.env.now, self._counts()
            while len(arrived) < work.buffer:
                yield bell[0]
            buffer, arrived[:] = arrived[: work.buffer], arrived[work.buffer :]
            yield from self._trunk.step_with_buffer()
            server = costs.server_client_seconds * work.buffer + costs.round_seconds
            yield self.env.timeout(server)
            server += costs.message_seconds * work.buffer
            if server_round >= lap:  # in the first, everybody had just begun
                clients = [client for client, _ in buffer]
                self._note(start, before, clients, [spent for _, spent in buffer], server)

    def _counts(self) -> tuple[float, float, int]:
        trunk = self._trunk
        return trunk.busy, max(trunk.up.busy, trunk.down.busy), trunk.refused

    def _note(
        self,
        start: float,
        before: tuple[float, float, int],
        clients: Sequence[Client],
        worked: Sequence[float],
        server: float,
    ) -> None:
        """Keep what a round was."""
        busy, link, refused = (now - then for now, then in zip(self._counts(), before, strict=True))
        pairs = list(zip(clients, worked, strict=True))
        self._rounds.append(
            RoundTimes(
                seconds=self.env.now - start,
                trunk_busy=busy,
                link_busy=link,
                server_busy=server,
                slowest_compute=max(client.computed for client in clients),
                slowest_wire=max(client.wired for client in clients),
                computed=statistics.fmean(c.computed / max(spent, 1e-12) for c, spent in pairs),
                wired=statistics.fmean(c.wired / max(spent, 1e-12) for c, spent in pairs),
                refused=refused,
            )
        )


def _mean(rounds: Sequence[RoundTimes]) -> RoundTimes:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(one, name) for one in rounds)

    return RoundTimes(**{name: mean(name) for name in RoundTimes.__slots__})
