"""The trunk's one compute thread: whoever wants something of the weights asks it."""

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import ParamSpec, TypeVar

from torch import Tensor

from flower_split.errors import TrunkUnavailable
from flower_split.protocol.values import CallResult
from flower_split.runtime.threads import pinned_pool
from flower_split.trunk.compute.compute import TrunkCompute

Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")


class ComputeThread:
    """Runs one thing after another, in the order in which they were asked for.

    Args:
        compute: The trunk module, whose version a call's result names.
        clock: Monotonic seconds.
    """

    def __init__(self, compute: TrunkCompute, clock: Callable[[], float]) -> None:
        self._compute = compute
        self._clock = clock
        self._pool = pinned_pool(1, "trunk-compute")

    def submit(
        self,
        run: Callable[Arguments, Value],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Future[Value]:
        """Ask for ``run``; do not wait."""
        return self._pool.submit(run, *args, **kwargs)

    def do(self, run: Callable[[], Value]) -> Value:
        """Ask for ``run`` and wait until it is done: for what is short and never waits itself."""
        return self._pool.submit(run).result()

    def call(self, run: Callable[[], Tensor], deadline: float) -> CallResult:
        """Ask for a client's call and wait for it.

        Args:
            run: What computes the reply's tensor.
            deadline: When to give up waiting.

        Raises:
            TrunkUnavailable: The deadline passed first.
        """
        return self.result(self._pool.submit(self.timed, run, self._clock()), deadline)

    def result(self, future: Future[Value], deadline: float) -> Value:
        """Wait for something that was asked for.

        Raises:
            TrunkUnavailable: The deadline passed first.
        """
        try:
            return future.result(timeout=max(0.0, deadline - self._clock()))
        except FutureTimeoutError:
            raise TrunkUnavailable(
                "the deadline passed while waiting for the trunk's compute thread."
            ) from None

    def timed(self, run: Callable[[], Tensor], asked: float) -> CallResult:
        """``run``, with the version it ran at, its seconds and those since it was ``asked`` for."""
        started = self._clock()
        version = self._compute.version
        tensor = run()
        return CallResult(tensor, version, self._clock() - started, started - asked)

    def close(self) -> None:
        """Finish what runs, and drop what has not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)
