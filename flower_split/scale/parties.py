"""The trunk's compute thread, links and cores as things that are waited for, in simulated seconds."""

import heapq
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import simpy

Steps = Generator[simpy.Event, object, None]
_BITS, _MEGA = 8, 1e6


class Pipe:
    """One direction of a link that many share: bytes go one after the other.

    Args:
        env: The simulation.
        megabits: A second.
    """

    def __init__(self, env: simpy.Environment, megabits: float) -> None:
        self._env = env
        self._rate = megabits * _MEGA / _BITS
        self._free = 0.0  # when what is under way has passed
        self.busy = 0.0  # seconds

    def delay(self, num_bytes: float) -> float:
        """Return after how many seconds bytes that come now have passed, and let them pass."""
        seconds = num_bytes / self._rate
        start = max(self._env.now, self._free)
        self._free = start + seconds
        self.busy += seconds
        return self._free - self._env.now


class Cores:
    """The cores of a machine that several parties share; none: each has its own.

    Args:
        env: The simulation.
        count: How many; 0: nobody waits.
    """

    def __init__(self, env: simpy.Environment, count: int) -> None:
        self._env = env
        self._cores = simpy.Resource(env, count) if count else None

    def compute(self, seconds: float) -> Steps:
        """Be busy for some seconds, once a core is free."""
        if self._cores is None:
            yield self._env.timeout(seconds)
            return
        with self._cores.request() as core:
            yield core
            yield self._env.timeout(seconds)


@dataclass(slots=True)
class Job:
    """One thing for the trunk's thread to do."""

    seconds: float
    done: simpy.Event
    after: Callable[[], Steps] | None = None  # then, on the same thread, before anything else


class ComputeThread:
    """Runs one call at a time; clients take turns, whatever each has waiting (``trunk.engine.ledger``).

    Args:
        env: The simulation.
        cores: Of its machine.
    """

    def __init__(self, env: simpy.Environment, cores: Cores) -> None:
        self._env, self._cores = env, cores
        self._waiting: dict[int, deque[Job]] = {}  # by client; none is empty
        self._order: list[tuple[int, int, int]] = []  # last turn, arrival, client
        self._last: dict[int, int] = {}
        self._turns = self._arrivals = 0
        self._wake: simpy.Event | None = None
        self.busy = 0.0  # seconds
        env.process(self._run())

    def ask(
        self, client: int, seconds: float, after: Callable[[], Steps] | None = None
    ) -> simpy.Event:
        """Let a call wait for its turn; return what happens once it is computed."""
        job = Job(seconds, self._env.event(), after)
        if client in self._waiting:
            self._waiting[client].append(job)
        else:
            self._waiting[client] = deque([job])
            self._queue(client)
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None
        return job.done

    def _queue(self, client: int) -> None:
        self._arrivals += 1
        heapq.heappush(self._order, (self._last.get(client, -1), self._arrivals, client))

    def _run(self) -> Steps:
        while True:
            if not self._order:
                self._wake = self._env.event()
                yield self._wake
                continue
            _, _, client = heapq.heappop(self._order)
            jobs = self._waiting[client]
            job = jobs.popleft()
            self._turns += 1
            self._last[client] = self._turns
            if jobs:
                self._queue(client)
            else:
                del self._waiting[client]
            yield from self.work(job.seconds)
            job.done.succeed()
            if job.after is not None:
                yield from job.after()

    def work(self, seconds: float) -> Steps:
        """Be busy, on this thread."""
        self.busy += seconds
        yield from self._cores.compute(seconds)
