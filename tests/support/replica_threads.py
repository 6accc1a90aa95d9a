"""Trunk followers as threads of the test's own process, met over gloo.

torch's random state is the process's, so dropout has other masks from run to run here, and only here.
"""

import multiprocessing
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.joint import Joint
from flower_split.trunk.compute.joint_pass import JointCompute
from flower_split.trunk.replicas.divided import DividedJoint
from flower_split.trunk.replicas.follower import Follower
from flower_split.trunk.replicas.group import ReplicaGroup
from flower_split.trunk.replicas.link import FollowerLink

TIMEOUT = 20.0  # seconds
CPU = torch.device("cpu")


class FollowerThread:
    """A follower that answers until its pipe is closed, or :meth:`kill` is called.

    Attributes:
        orders: How many it has answered.
        follower: What answers them, once the processes have met.
    """

    def __init__(
        self, make: Callable[[ReplicaGroup], Follower], folder: Path, rank: int, size: int
    ):
        self.pipe, self._theirs = multiprocessing.Pipe()
        self.orders = 0
        self._killed = threading.Event()
        self._group = lambda: ReplicaGroup(folder, rank, size, CPU, TIMEOUT)
        self._make = make
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def kill(self) -> None:
        self._killed.set()
        self.join()
        self._theirs.close()

    def join(self) -> None:
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "a follower does not end with its pipe"

    def _run(self) -> None:
        follower = self.follower = self._make(self._group())
        try:
            while not self._killed.is_set():
                if not self._theirs.poll(0.01):
                    continue
                reply, buffer = follower.answer(self._theirs.recv())
                self.orders += 1
                self._theirs.send(reply)
                if buffer is not None:
                    follower.send(buffer)
        except (EOFError, OSError):
            pass


class ThreadReplicas:
    """Divides joint passes over ``size`` copies of a trunk in this process.

    Args:
        compute: The leader's.
        make_compute: Makes a follower's, whose trainable weights may be any.
        size: Replicas, the leader included.
        max_positions: Of a pass.
        graph_bytes: That a follower's graphs may take.
    """

    def __init__(
        self,
        compute: TrunkCompute,
        make_compute: Callable[[], TrunkCompute],
        size: int = 2,
        *,
        max_positions: int = 1000,
        graph_bytes: int = 2**30,
    ) -> None:
        self._compute, self._make_compute = compute, make_compute
        self._size, self._max_positions, self._graph_bytes = size, max_positions, graph_bytes
        self._folder = tempfile.TemporaryDirectory()
        self.followers: list[FollowerThread] = []

    def divided(self, local: JointCompute, *, takes_mask: bool) -> Joint:
        def follow(compute: TrunkCompute, group: ReplicaGroup) -> Follower:
            joint = JointCompute(compute, takes_mask=takes_mask, max_positions=self._max_positions)
            return Follower(compute, joint, group, self._graph_bytes)

        folder = Path(self._folder.name)
        # Models are made here, one after the other: the numbers in them are random, by a seed.
        makers = [partial(follow, self._make_compute()) for _ in range(1, self._size)]
        self.followers = [
            FollowerThread(make, folder, rank, self._size)
            for rank, make in enumerate(makers, start=1)
        ]
        group = ReplicaGroup(folder, 0, self._size, CPU, TIMEOUT)
        links = [
            FollowerLink(rank, follower.pipe, follower, TIMEOUT)
            for rank, follower in enumerate(self.followers, start=1)
        ]
        for link in links:
            link.meet(group)
        return DividedJoint(self._compute, local, links)

    def close(self) -> None:
        for follower in self.followers:
            follower.pipe.close()
            follower.join()
        self._folder.cleanup()
