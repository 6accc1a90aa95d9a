"""A client of a simulated round: steps of micro-batches, of which one computes while others wait.

What it does is that of ``flower_split/training/round.py``, with seconds instead of tensors.
"""

from collections.abc import Generator, Iterator

import simpy

from flower_split.scale.costs import Costs
from flower_split.scale.parties import Cores, Pipe, Steps
from flower_split.scale.setting import Member, Work
from flower_split.scale.trunk import Trunk

# Shares of a micro-batch's computing: the bottom's forward, the top with the loss, the bottom's backward.
_BOTTOM, _TOP, _BACK = 0.25, 0.5, 0.25


class Client:
    """One client's part of a round.

    Args:
        env: The simulation.
        costs: What its computing and its calls take.
        work: What it does.
        member: Who it is.
        trunk: Where its calls go.
        cores: Of a machine that it shares with others.
        server: The ServerApp's link, as it sends and as it receives.

    Attributes:
        computed: Seconds that it has computed.
        wired: Seconds that its calls and messages were on links.
    """

    def __init__(
        self,
        env: simpy.Environment,
        costs: Costs,
        work: Work,
        member: Member,
        trunk: Trunk,
        cores: Cores,
        server: tuple[Pipe, Pipe],
    ) -> None:
        self._env, self._costs, self._work = env, costs, work
        self._member, self._trunk, self._cores = member, trunk, cores
        self._down, self._up = server
        self._lock = simpy.Resource(env, 1) if work.in_flight > 1 else None
        self.computed = self.wired = 0.0

    def train(self, after: float) -> Steps:
        """Take part in a round whose message leaves ``after`` seconds from now."""
        yield self._env.timeout(after)
        yield from self._receive_order()
        for step in range(self._work.steps):
            yield from self._step(step)
        yield from self._move(self._costs.adapter_bytes, self._up)

    def evaluate(self, after: float) -> Steps:
        """Evaluate: forwards alone, one after the other."""
        yield self._env.timeout(after)
        yield from self._receive_order()
        sent, received = self._bytes_of_call()
        for _ in range(self._work.eval_batches):
            yield from self._compute(_BOTTOM)
            yield from self._call(sent, received, self._trunk.evaluate(self._member))
            yield from self._compute(_TOP / 2)

    def _receive_order(self) -> Steps:
        yield from self._move(self._costs.adapter_bytes, self._down)
        yield from self._busy(self._costs.client_round_seconds)

    def _step(self, step: int) -> Steps:
        waiting = iter(range(self._work.micro_batches))
        if self._work.in_flight == 1:
            yield from self._micro_batches(step, waiting)
        else:
            workers = [
                self._env.process(self._micro_batches(step, waiting))
                for _ in range(self._work.in_flight)
            ]
            yield self._env.all_of(workers)
        if self._work.in_windows and self._work.ends_together:
            yield from self._call(0.0, 0.0, self._trunk.finish_step(self._member, step))

    def _micro_batches(self, step: int, waiting: Iterator[int]) -> Steps:
        """Work off micro-batches, as one of the threads does."""
        for index in waiting:
            yield from self._micro_batch(step, index)

    def _micro_batch(self, step: int, index: int) -> Steps:
        trunk, member = self._trunk, self._member
        sent, received = self._bytes_of_call()
        yield from self._compute(_BOTTOM)
        turn = None
        if self._work.in_turns:
            turn = trunk.turn()
            yield turn
        yield from self._call(sent, received, trunk.forward(member, step, index))
        yield from self._compute(_TOP)
        if self._work.backward:
            yield from self._call(sent, received, trunk.backward(member, step, index))
        if turn is not None:
            turn.cancel() if not turn.triggered else turn.resource.release(turn)
        yield from self._compute(_BACK)

    def _bytes_of_call(self) -> tuple[float, float]:
        calls = self._work.calls
        return self._costs.sent_bytes / calls, self._costs.received_bytes / calls

    def _call(
        self, sent: float, received: float, serve: Generator[simpy.Event, object, None]
    ) -> Steps:
        """Make one call: there, at the trunk, and back."""
        half = self._costs.call_seconds / 2
        yield from self._move(sent, self._trunk.up, half)
        yield from serve
        yield from self._move(received, self._trunk.down, half)

    def _move(self, num_bytes: float, hub: Pipe, beside: float = 0.0) -> Steps:
        """Bring bytes one way over the client's own link and the hub's."""
        seconds = self._member.link.seconds(num_bytes) + hub.delay(num_bytes)
        self.wired += (seconds + beside) / self._work.in_flight  # they overlap
        yield self._env.timeout(seconds)
        if beside:
            yield from self._cores.compute(beside)

    def _compute(self, share: float) -> Steps:
        """Compute a share of a micro-batch, while no other of this client's does."""
        if self._lock is None:
            yield from self._busy(share * self._costs.client_seconds)
            return
        with self._lock.request() as turn:
            yield turn
            yield from self._busy(share * self._costs.client_seconds)

    def _busy(self, seconds: float) -> Steps:
        seconds *= self._member.factor
        self.computed += seconds
        yield from self._cores.compute(seconds)
