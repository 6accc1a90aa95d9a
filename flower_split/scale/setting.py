"""Who takes part in a simulated federation, over which links, on what machines, at which prices."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from flower_split.config import RunConfig
from flower_split.errors import ConfigError

_MEGA = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A client's way to the trunk and to the ServerApp."""

    megabits: float  # a second, each way
    latency: float  # seconds, there and back
    share: float = 1.0  # weight among the links

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the link that ``MBIT:MS[:SHARE]`` says.

        Raises:
            ConfigError: It says something else.
        """
        try:
            megabits, milliseconds, *rest = (float(part) for part in text.split(":"))
            [share] = rest or [1.0]
        except ValueError:
            megabits, milliseconds, share = 0.0, 0.0, 0.0
        if not (megabits > 0 and 0 <= milliseconds < math.inf and 0 < share < math.inf):
            raise ConfigError(
                "a link is MBIT:MS or MBIT:MS:SHARE: megabits a second each way, above 0 (inf: no limit), "
                f"milliseconds there and back, and the share of the clients; it is {text!r}."
            )
        return cls(megabits=megabits, latency=milliseconds / 1000, share=share)

    def seconds(self, num_bytes: float) -> float:
        """Return how long bytes take one way, with half of the latency."""
        return self.latency / 2 + 8 * num_bytes / (self.megabits * _MEGA)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How slow a share of the clients is."""

    factor: float  # on a client's own seconds
    share: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the pace that ``FACTOR:SHARE`` says.

        Raises:
            ConfigError: It says something else.
        """
        try:
            factor, share = (float(part) for part in text.split(":"))
        except ValueError:
            factor, share = 0.0, 0.0
        if not (0 < factor < math.inf and 0 < share < 1):
            raise ConfigError(
                "slower clients are FACTOR:SHARE: how many times their computing takes, and the share of "
                f"the clients, between 0 and 1; it is {text!r}."
            )
        return cls(factor=factor, share=share)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """In any one currency."""

    trunk_hour: float = 0.0  # of the trunk's machine
    client_hour: float = 0.0  # of each client at work
    gigabyte: float = 0.0  # between clients and trunk or ServerApp, either way

    def __post_init__(self) -> None:
        """Check that nothing is negative."""
        if min(self.trunk_hour, self.client_hour, self.gigabyte) < 0:
            raise ConfigError("prices must be at least 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one client does in a round, and how the trunk takes it: the run config's part."""

    steps: int  # optimizer steps
    micro_batches: int  # of one step
    in_flight: int  # micro-batches of one step on the wire at once
    joint: bool  # whether the trunk's weights train
    backward: bool  # whether gradients come back
    step_every: str  # trunk.step-every
    ends_together: bool  # whether a step ends with a call for which all wait
    window_batches: bool
    batch_positions: int  # of one pass of a window batch
    positions: int  # rows times positions of one micro-batch
    eval_batches: int  # of a client's evaluation; 0: none
    concurrency: int = 0  # of an asynchronous run: clients at work; 0: it is synchronous
    buffer: int = 0  # arrivals that make a round of it

    @classmethod
    def of(cls, config: RunConfig, *, steps: int, eval_batches: int, ends_together: bool) -> Self:
        """Return the work that a run config orders.

        Args:
            config: The run's.
            steps: Of a client in a round.
            eval_batches: Of a client's evaluation.
            ends_together: Whether steps end with a call for which all wait.
        """
        train, trunk = config.train, config.trunk
        count = train.gradient_accumulation_steps
        late = config.strategy.name == "fedbuff"
        return cls(
            steps=steps,
            micro_batches=count,
            in_flight=min(count, train.micro_batches_in_flight),
            joint=config.mode == "joint",
            backward=config.mode != "forward-only",
            step_every=trunk.step_every,
            ends_together=ends_together,
            window_batches=trunk.window_batches == "on"
            and config.mode == "joint"
            and trunk.step_every == "local-step"
            and not late,
            batch_positions=trunk.window_batch_positions,
            positions=train.batch_size * train.sequence_length,
            eval_batches=eval_batches if config.fraction_evaluate else 0,
            concurrency=(config.strategy.concurrency or config.num_clients) if late else 0,
            buffer=config.strategy.buffer_size if late else 0,
        )

    @property
    def in_windows(self) -> bool:
        """Whether every step of a client waits for the step of all others."""
        return self.joint and self.step_every == "local-step" and not self.concurrency

    @property
    def in_turns(self) -> bool:
        """Whether one micro-batch is between its forward and its backward at a time."""
        return self.joint and self.step_every == "contribution" and not self.concurrency

    @property
    def calls(self) -> int:
        """Calls to the trunk for one micro-batch."""
        return 2 if self.backward else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A federation on its machines."""

    clients: int  # of the federation
    cohort: int  # of them in a round
    links: Sequence[Link] = (Link(megabits=100.0, latency=0.02),)
    slower: Sequence[Pace] = ()
    hub_megabits: float = 10_000.0  # of the trunk, each way; of the ServerApp as well
    replicas: int = 1  # of the trunk; a what-if above 1
    cores: int = 0  # that all clients and the trunk share; 0: each party has its own machine
    waiting_calls: int = (
        768  # forwards (with window batches: all calls) that the trunk holds at once
    )
    rounds: int = 1  # that are simulated
    seed: int = 0
    prices: Prices = field(default_factory=Prices)

    def __post_init__(self) -> None:
        """Check ranges."""
        least = min(self.clients, self.cohort, self.replicas, self.rounds, self.waiting_calls)
        if least < 1 or self.cores < 0 or not self.hub_megabits > 0 or not self.links:
            raise ConfigError(
                "clients, cohort, replicas and rounds must be at least 1, cores at least 0, the trunk's "
                "link above 0, and there must be a link."
            )
        if self.cohort > self.clients:
            raise ConfigError(
                f"a cohort of {self.cohort} cannot be drawn from {self.clients} clients."
            )
        if sum(pace.share for pace in self.slower) > 1:
            raise ConfigError("the shares of slower clients add up to more than 1.")

    def chosen(self, server_round: int, count: int) -> list["Member"]:
        """Return who takes part in a round, in order of partitions, by the seed."""
        names: Sequence[int] = range(self.clients)
        if count < self.clients:
            generator = random.Random(f"{self.seed}/{server_round}")
            names = sorted(generator.sample(range(self.clients), count))
        return [self.member(name) for name in names]

    def member(self, partition_id: int) -> "Member":
        """Return a client, which has the same link and pace in every round."""
        generator = random.Random(f"{self.seed}/client/{partition_id}")
        shares = [link.share for link in self.links]
        link = generator.choices(self.links, shares)[0]
        draw = generator.random()
        for pace in self.slower:
            if draw < pace.share:
                return Member(partition_id, link, pace.factor)
            draw -= pace.share
        return Member(partition_id, link, 1.0)


@dataclass(frozen=True, slots=True)
class Member:
    """One client of a round."""

    partition_id: int
    link: Link
    factor: float  # on its own seconds
