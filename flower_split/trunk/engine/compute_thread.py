"""The trunk's one compute thread: whatever touches the weights runs there, one after the other.

The clients' calls take turns (:class:`flower_split.trunk.engine.ledger.Turns`); all else keeps its order.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import ParamSpec, TypeVar

from torch import Tensor

from flower_split.errors import TrunkUnavailable
from flower_split.protocol.values import CallResult
from flower_split.runtime.threads import pinned_pool
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.fair_device import DeviceShare
from flower_split.trunk.engine.ledger import Turns

Given = ParamSpec("Given")
Value = TypeVar("Value")


class ComputeThread:
    """Runs one thing after another, in the order in which they were asked for.

    Never wait for it while holding the engine's lock: what it runs takes that lock.

    Args:
        compute: The trunk module, whose version a call's result names. Where it has a share of a device
            that other engines compute on too, whatever runs has a turn there.
        clock: Monotonic seconds.

    Attributes:
        submit: ``submit(run, *args)`` asks for ``run`` and returns its future, without waiting.
        turns: The clients' calls that wait.
    """

    def __init__(self, compute: TrunkCompute, clock: Callable[[], float]) -> None:
        self._compute = compute
        self._clock = clock
        pool = pinned_pool(1, "trunk-compute")
        self._pool: Executor = pool if compute.share is None else _InTurns(pool, compute.share)
        self.submit = self._pool.submit
        self.turns = Turns()

    def do(self, run: Callable[[], Value]) -> Value:
        """Ask for ``run`` and wait until it is done: for what is short and never waits itself."""
        return self.submit(run).result()

    def call(self, session: str, run: Callable[[], Tensor], deadline: float) -> CallResult:
        """Ask for a client's call that keeps nothing, and wait for it.

        Args:
            session: The client's.
            run: Computes the reply's tensor.
            deadline: When to give up waiting.

        Raises:
            TrunkUnavailable: The deadline passed first.
        """
        asked = self._clock()
        reply: Future[CallResult] = Future()

        def timed() -> None:
            started = self._clock()
            version = self._compute.version
            try:
                tensor = run()
            except BaseException as error:
                reply.set_exception(error)
                return
            reply.set_result(CallResult(tensor, version, self._clock() - started, started - asked))

        self.turns.put(session, timed, reply)
        self.submit(self.turns.run_next)
        return self.result(reply, deadline)

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

    def close(self) -> None:
        """Finish what runs, and drop what has not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.turns.give_up()


class _InTurns(Executor):
    """One thread, whose every run has a turn on a device that other engines compute on, too.

    Args:
        pool: The executor with the one thread.
        share: The engine's share of the device.
    """

    def __init__(self, pool: Executor, share: DeviceShare) -> None:
        self._pool = pool
        self._share = share

    def submit(
        self, fn: Callable[Given, Value], /, *args: Given.args, **kwargs: Given.kwargs
    ) -> Future[Value]:
        """Ask for ``fn``; see :meth:`concurrent.futures.Executor.submit`."""
        self._share.expect()  # before it can run
        try:
            return self._pool.submit(self._run, partial(fn, *args, **kwargs))
        except RuntimeError:  # the thread has ended
            self._share.leave()
            raise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the thread; see :meth:`concurrent.futures.Executor.shutdown`.

        What waits for a turn has not begun, and is dropped.
        """
        self._share.close()
        self._pool.shutdown(wait, cancel_futures=cancel_futures)
        self._share.leave()

    def _run(self, run: Callable[[], Value]) -> Value:
        with self._share.turn():
            return run()
