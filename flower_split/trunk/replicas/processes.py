"""The followers' processes: started by the leader, watched, and ended with it.

A follower runs a function of :mod:`flower_split.trunk.follow`. It ends when its pipe does, so none
outlives the trunk, however that ended. When one ends before the trunk closes, whoever has asked for it
is told within a moment, with its name: the trunk cannot go on without its share of the layers.
"""

import logging
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from flower_split.config import RunConfig
from flower_split.errors import TrunkUnavailable
from flower_split.runtime.closing import Closing
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.joint import Joint
from flower_split.trunk.replicas.divided import DividedJoint
from flower_split.trunk.replicas.group import ReplicaGroup
from flower_split.trunk.replicas.link import FollowerLink
from flower_split.trunk.replicas.orders import Join

logger = logging.getLogger(__name__)

LOAD_SECONDS = 900.0  # that a follower may still load when the leader has loaded
_END_SECONDS = 10.0
_LOOK_SECONDS = 0.5  # between two looks whether it is time to end

Run = Callable[[Connection, RunConfig], None]


class Followers(Closing):
    """The followers of one trunk, which load their layers from now on.

    Args:
        run: What a follower runs, with its pipe and its configuration; a function of a module.
        configs: One for each follower, by rank from 1.
        timeout: Seconds that a follower has for one order.

    Attributes:
        links: To them, by rank.
        patience: Seconds that :meth:`close` leaves them to end by themselves.
        noun: What each of them is, for messages.
    """

    patience = _END_SECONDS
    noun = "follower"

    def __init__(self, run: Run, configs: Sequence[RunConfig], timeout: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="flower-split-replicas-")
        self._processes: list[SpawnProcess] = []
        self.links: list[FollowerLink] = []
        self._closing = threading.Event()
        self._group: ReplicaGroup | None = None
        self._lock = threading.Lock()  # guards the two below
        self._loss = ""
        self._tell: Callable[[str], None] | None = None
        for rank, config in enumerate(configs, start=1):
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=run, args=(theirs, config), name=f"trunk-{self.noun}-{rank}", daemon=True
            )
            process.start()
            theirs.close()  # so that this end says when the process ends
            self._processes.append(process)
            self.links.append(FollowerLink(rank, pipe, process, timeout, self.noun))
        self._watch = threading.Thread(target=self._look, name="trunk-replicas", daemon=True)

    @property
    def size(self) -> int:
        """Return how many processes compute, the leader included."""
        return 1 + len(self.links)

    def ready(self, num_parameters: int) -> None:
        """Wait until all have loaded.

        Args:
            num_parameters: Tensors that the leader trains.

        Raises:
            TrunkUnavailable: One ended, takes too long, or trains something else.
        """
        for link in self.links:
            ready = link.ready(LOAD_SECONDS)
            if ready.num_parameters != num_parameters:
                raise link.lost(
                    f"trains {ready.num_parameters} tensors where the leader trains {num_parameters}"
                )

    def order_to_join(self, *, takes_mask: bool = True) -> None:
        """Tell all to meet in the process group."""
        for link in self.links:
            link.join(Join(self._folder.name, link.rank, self.size, self._timeout, takes_mask))

    def meet(self, device: torch.device, what: str) -> None:
        """Meet the followers, who have been told so, in a process group, and watch them from then on.

        Args:
            device: The leader's.
            what: What all of them are, for messages.

        Raises:
            TrunkUnavailable: They do not come.
        """
        try:
            group = self._group = ReplicaGroup(
                Path(self._folder.name), 0, self.size, device, self._timeout
            )
        except RuntimeError as error:
            raise TrunkUnavailable(
                f"the trunk's {self.size} {what} did not meet within {self._timeout:g} s: {error}"
            ) from error
        for link in self.links:
            link.meet(group)
        logger.info(
            "%d %s compute: this process on %s, %s",
            self.size,
            what,
            device,
            ", ".join(
                f"{link.where} in process {process.pid}"
                for link, process in zip(self.links, self._processes, strict=True)
            ),
        )
        self._watch.start()

    def on_loss(self, tell: Callable[[str], None]) -> None:
        """Have ``tell`` called, on a thread of its own, when a follower ends before :meth:`close`.

        Args:
            tell: Called once with the reason; at once where one has ended already.
        """
        with self._lock:
            self._tell, loss = tell, self._loss
        if loss:
            tell(loss)

    def close(self) -> None:
        """End the followers. Idempotent; the compute thread has ended."""
        self._closing.set()
        for link in self.links:
            link.close()
        self._abort()
        for process in self._processes:
            process.join(self.patience)
            if process.is_alive():
                logger.warning("%s did not end within %g s", process.name, self.patience)
                process.kill()
                process.join()
        if self._watch.is_alive() and self._watch is not threading.current_thread():
            self._watch.join()
        self._folder.cleanup()

    def _abort(self) -> None:
        """Give up whatever waits for a follower, from any thread."""
        if self._group is not None:
            self._group.abort()

    def _lose(self, why: str) -> None:
        try:
            self._abort()
        finally:
            with self._lock:
                self._loss, tell = why, self._tell
            if tell is not None:
                tell(why)

    def _look(self) -> None:
        sentinels = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        while not self._closing.is_set():
            ended = connection.wait(list(sentinels), _LOOK_SECONDS)
            if ended and not self._closing.is_set():
                rank = next(sentinels[one] for one in ended if isinstance(one, int))
                process, link = self._processes[rank], self.links[rank]
                process.join(_END_SECONDS)
                self._lose(
                    f"{link.where}, process {process.pid}, ended with code {process.exitcode}. The trunk "
                    "cannot compute its share and ends; it goes on from its last "
                    "checkpoint when it is started again."
                )
                return


class Replicas(Followers):
    """Followers that have all of the trunk's layers each, and share window batches."""

    noun = "replica"

    def join(self, compute: TrunkCompute, *, takes_mask: bool) -> Sequence[FollowerLink]:
        """Wait until all have loaded, meet them in a process group, and watch them from then on.

        Args:
            compute: The leader's.
            takes_mask: Whether the model takes a padding mask.

        Raises:
            TrunkUnavailable: One ended, takes too long, or trains something else.
        """
        self.ready(len(compute.parameters))
        self.order_to_join(takes_mask=takes_mask)
        self.meet(compute.device, "replicas")
        return self.links

    def divider(self, compute: TrunkCompute) -> "DividedByReplicas":
        """Return what gives an engine its joint passes.

        Args:
            compute: The leader's.
        """
        return DividedByReplicas(self, compute)


class DividedByReplicas:
    """Divides an engine's joint passes over the replicas.

    Args:
        replicas: The followers, which load.
        compute: The leader's.
    """

    def __init__(self, replicas: Replicas, compute: TrunkCompute) -> None:
        self._replicas = replicas
        self._compute = compute

    def divided(self, local: Joint, *, takes_mask: bool) -> Joint:
        """Return joint passes over all devices, after waiting for the followers."""
        links = self._replicas.join(self._compute, takes_mask=takes_mask)
        return DividedJoint(self._compute, local, links)
