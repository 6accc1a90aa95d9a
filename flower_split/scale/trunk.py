"""The trunk of a simulated round: its places for calls, its windows, its window batches.

It does what ``flower_split/trunk`` does, with seconds instead of tensors: a forward waits for its version,
a window steps once everybody's backwards are in, a call too many is turned away and comes again.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import simpy

from flower_split.errors import ConfigError
from flower_split.scale.costs import Costs
from flower_split.scale.parties import ComputeThread, Cores, Pipe, Steps
from flower_split.scale.setting import Member, Setting, Work

_FORWARD, _BACKWARD = "forward", "backward"
_FIRST_BACKOFF, _LAST_BACKOFF = 0.05, 2.0  # seconds: flower_split/wire/grpc_transport.py
_ALL = -1  # whose turn a window batch is


class Trunk:
    """One trunk, or replicas of it that step together.

    Args:
        env: The simulation.
        costs: What calls and steps take.
        work: What the clients do.
        setting: On which machine, behind which link.
        cores: Of a machine that it shares with the clients.

    Attributes:
        up, down: Its link, as it receives and as it sends.
        refused: Calls that were turned away for want of a place.
    """

    def __init__(
        self, env: simpy.Environment, costs: Costs, work: Work, setting: Setting, cores: Cores
    ) -> None:
        self._env, self._costs, self._work = env, costs, work
        self._places = setting.waiting_calls
        self._threads = [ComputeThread(env, cores) for _ in range(setting.replicas)]
        self._exchange = _exchange_seconds(costs, setting)
        self._backoff = random.Random(f"{setting.seed}/backoff")
        self.up = Pipe(env, setting.hub_megabits)
        self.down = Pipe(env, setting.hub_megabits)
        self.refused = 0
        self._held = 0  # places
        self._polling: list[simpy.Event] = []  # calls without one
        self._homes: dict[int, ComputeThread] = {}
        self._sizes: dict[ComputeThread, int] = {}  # members of each
        self._version = self._left = 0
        self._stepped = env.event()
        self._turn = simpy.Resource(env, 1)
        self._batches: dict[tuple[ComputeThread, str, int, int], list[simpy.Event]] = {}

    @property
    def busy(self) -> float:
        """Return the seconds that its thread has computed; of replicas, the busiest one's."""
        return max(thread.busy for thread in self._threads)

    def begin(self, members: Sequence[Member]) -> None:
        """Begin a round of these clients."""
        self._homes = {
            member.partition_id: self._threads[index % len(self._threads)]
            for index, member in enumerate(members)
        }
        self._sizes = {thread: list(self._homes.values()).count(thread) for thread in self._threads}
        self._version = 0
        self._left = self._window_size

    @property
    def _window_size(self) -> int:
        """Return what completes the window: backwards, or the ends of everybody's step."""
        work, members = self._work, len(self._homes)
        if work.in_windows and work.ends_together:
            return members
        count = members * work.micro_batches
        return count if work.in_windows else count * work.steps

    def evaluate(self, member: Member) -> Steps:
        """Compute a forward that keeps nothing."""
        yield from self._admitted(member)
        yield self._thread(member).ask(member.partition_id, self._one_call)
        self._leave()

    def forward(self, member: Member, step: int, index: int) -> Steps:
        """Compute a forward, once the weights have the version of its step."""
        yield from self._admitted(member)
        while self._work.in_windows and self._version < step:
            yield self._stepped
        yield from self._compute(member, _FORWARD, step, index)
        self._leave()

    def backward(self, member: Member, step: int, index: int) -> Steps:
        """Compute a backward, and step where it completes the window."""
        if self._work.window_batches:
            yield from self._admitted(member)
        yield from self._compute(member, _BACKWARD, step, index)
        if self._work.window_batches:
            self._leave()

    def finish_step(self, member: Member, step: int) -> Steps:
        """End a client's step: wait until the trunk has stepped."""
        yield from self._admitted(member)
        self._left -= 1
        if self._left == 0:
            yield self._threads[0].ask(_ALL, 0.0, self._step)
        while self._version <= step:
            yield self._stepped
        self._leave()

    def turn(self) -> simpy.resources.resource.Request:
        """Ask for the turn that a micro-batch has from its forward to its backward."""
        return self._turn.request()

    @property
    def _one_call(self) -> float:
        costs = self._costs
        return costs.trunk_seconds / self._work.calls + costs.pass_seconds + costs.handling_seconds

    def _thread(self, member: Member) -> ComputeThread:
        return self._homes[member.partition_id]

    def _admitted(self, member: Member) -> Steps:
        """Take a place; without one, be turned away and come again, as a client's transport does.

        Who comes again is not simulated poll by poll: of n that poll, the first one's next poll after a
        place is free comes as the least of n equally likely moments of a pause.
        """
        if self._held >= self._places:
            self.refused += 1
            mine, since = self._env.event(), self._env.now
            self._polling.append(mine)
            yield mine
            pause = min(max(self._env.now - since, _FIRST_BACKOFF), _LAST_BACKOFF)
            others = len(self._polling) + 1
            early = 1 - self._backoff.random() ** (1 / others)
            yield self._env.timeout(member.link.latency / 2 + pause * early)
            return  # whoever left has kept the place for it
        self._held += 1

    def _leave(self) -> None:
        """Give a place up, to one of those that come again."""
        if not self._polling:
            self._held -= 1
            return
        index = self._backoff.randrange(len(self._polling))
        self._polling[index], self._polling[-1] = self._polling[-1], self._polling[index]
        self._polling.pop().succeed()

    def _compute(self, member: Member, kind: str, step: int, index: int) -> Steps:
        thread = self._thread(member)
        if not self._work.window_batches:
            after = self._contributed(1) if kind == _BACKWARD else None
            yield thread.ask(member.partition_id, self._one_call, after)
            return
        key = thread, kind, step, index
        waiting = self._batches.setdefault(key, [])
        mine = self._env.event()
        waiting.append(mine)
        size = self._sizes[thread]
        if len(waiting) == size:
            del self._batches[key]
            after = self._contributed(size) if kind == _BACKWARD else None
            asked = thread.ask(_ALL, self._batch_seconds(size), after)
            asked.callbacks.append(partial(_tell, waiting))
        yield mine

    def _batch_seconds(self, size: int) -> float:
        each = max(1, self._work.batch_positions // max(1, self._work.positions))
        costs = self._costs
        rows = size * (costs.trunk_seconds / self._work.calls + costs.handling_seconds)
        return rows + math.ceil(size / each) * self._costs.pass_seconds

    def _contributed(self, count: int) -> Callable[[], Steps] | None:
        """Return what follows on the thread when backwards are computed; None: nothing can."""
        work = self._work
        if not work.joint or work.concurrency or (work.in_windows and work.ends_together):
            return None

        def settle() -> Steps:
            self._left -= count
            if self._left == 0 or work.in_turns:
                yield from self._step()

        return settle

    def _step(self) -> Steps:
        yield from self._threads[0].work(self._exchange + self._costs.step_seconds)
        self._version += 1
        self._left = self._window_size
        stepped, self._stepped = self._stepped, self._env.event()
        stepped.succeed()

    def step_with_buffer(self) -> Steps:
        """Step with the arrivals of an asynchronous round."""
        yield self._threads[0].ask(_ALL, self._exchange + self._costs.step_seconds)


def _tell(waiting: Sequence[simpy.Event], asked: simpy.Event) -> None:
    """Let those go on whose batch has been computed."""
    for event in waiting:
        event.succeed()


def check_places(work: Work, setting: Setting) -> None:
    """Check that calls that wait for other clients cannot take all places from the calls of those.

    Raises:
        ConfigError: They can: the round would stand still until the deadlines of its calls.
    """
    if not work.in_windows:
        return
    each = 1 if work.ends_together and not work.window_batches else work.in_flight
    here = -(-setting.cohort // setting.replicas)
    needed = here * each if work.window_batches else (here - 1) * each + 1
    if needed > setting.waiting_calls:
        raise ConfigError(
            f"a trunk holds {setting.waiting_calls} calls that wait for other clients, and {here} clients "
            f"with {each} micro-batches in flight may make {needed}: then nobody's call would find a "
            "place, and the round would stand still. Lower the cohort or "
            "train.micro-batches-in-flight, or set "
            'trunk.step-every = "server-round".'
        )


def _exchange_seconds(costs: Costs, setting: Setting) -> float:
    """Return what replicas need to add their gradients up: there and back once, around a ring."""
    others = setting.replicas - 1
    num_bytes = 2 * costs.trunk_adapter_bytes * others / setting.replicas
    return 8 * num_bytes / (setting.hub_megabits * 1e6)
