"""The leader's end of one follower: orders and replies; each wait has a deadline and says what for."""

from multiprocessing.connection import Connection
from typing import Protocol

from torch import Tensor

from flower_split.errors import TrunkUnavailable
from flower_split.trunk.replicas.group import ReplicaGroup
from flower_split.trunk.replicas.orders import Broken, Join, Order, Ready, Reply


class Peer(Protocol):
    """Whatever runs a follower."""

    def is_alive(self) -> bool:
        """Return whether it still runs."""

    def kill(self) -> None:
        """End it at once."""


class ReplicaLost(TrunkUnavailable):
    """A follower has ended, or does not answer: the trunk cannot go on, and starts again."""


class OrderFailed(RuntimeError):
    """An order failed at a follower as a whole.

    Args:
        message: What and where.
        cause: The follower's own error, with its type.
    """

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class FollowerLink:
    """One follower, as the leader's compute thread sees it.

    Args:
        rank: The follower's.
        pipe: To it; closed at its other end when it ends.
        peer: Its process.
        timeout: Seconds that it has for an answer.
        noun: What it is, for messages.

    Attributes:
        where: Its rank and device, for messages; the rank alone until it is ready.
    """

    def __init__(
        self, rank: int, pipe: Connection, peer: Peer, timeout: float, noun: str = "replica"
    ) -> None:
        self.rank = rank
        self._noun = noun
        self.where = f"{noun} {rank}"
        self._pipe = pipe
        self._peer = peer
        self._timeout = timeout
        self._group: ReplicaGroup | None = None
        self._asked = False

    def ready(self, timeout: float) -> Ready:
        """Wait until it has loaded its layers.

        Raises:
            ReplicaLost: It ended, or takes longer than ``timeout`` seconds.
        """
        found = self._read(timeout, "load the trunk's layers")
        if not isinstance(found, Ready):
            raise self.lost(f"said {found} instead of being ready")
        self.where = f"{self._noun} {self.rank} ({found.where})"
        return found

    def join(self, order: Join) -> None:
        """Tell it to meet the others."""
        self._write(order)

    def meet(self, group: ReplicaGroup) -> None:
        """Exchange tensors with it over ``group`` from now on."""
        self._group = group

    def ask(self, order: Order, buffer: Tensor | None = None) -> None:
        """Send an order and its tensors; :meth:`answer` must follow before the next one.

        Raises:
            ReplicaLost: It has ended.
        """
        if self._asked:
            raise self.lost("was asked for one thing before it had answered another")
        self._asked = True
        self._write(order)
        if buffer is not None:
            assert self._group is not None
            try:
                self._group.send(buffer, self.rank)
            except RuntimeError as error:
                raise self.lost(f"did not take its order's tensors: {error}") from error

    def answer(self, what: str, timeout: float | None = None) -> Reply:
        """Wait for the reply to the last order.

        Args:
            what: It was told to do, for the message.
            timeout: Seconds to wait for it; None: those that it always has.

        Raises:
            ReplicaLost: It ended, or takes too long: then it is ended.
            OrderFailed: It did there.
        """
        found = self._read(self._timeout if timeout is None else timeout, what)
        self._asked = False
        if isinstance(found, Broken):
            raise OrderFailed(f"{self.where} failed to {what}: {found.text}", found.text)
        return found

    def tensors(self, num_bytes: int) -> Tensor:
        """Return the bytes that follow a reply, ``[num_bytes]`` of uint8.

        Raises:
            ReplicaLost: It has ended.
        """
        assert self._group is not None
        try:
            return self._group.receive(num_bytes, self.rank)
        except RuntimeError as error:
            raise self.lost(f"did not send its reply's tensors: {error}") from error

    def close(self) -> None:
        """Close this end, on which the follower ends."""
        self._pipe.close()

    def lost(self, why: str) -> ReplicaLost:
        """Return the error of a follower that is of no more use, after ending it."""
        self._peer.kill()
        return ReplicaLost(
            f"{self.where} {why}. Its process's own messages are in the trunk's log; the trunk ends, and "
            "goes on from its last checkpoint when it is started again."
        )

    def _write(self, message: Join | Order) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self.lost(f"has ended: {error}") from error

    def _read(self, timeout: float, what: str) -> Reply:
        try:
            if not self._pipe.poll(timeout):
                raise self.lost(f"has taken more than {timeout:g} s to {what}")
            found: Reply = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self.lost(f"ended while it was to {what}") from error
        return found
