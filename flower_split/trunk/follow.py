"""The trunk's further processes of a run config: which devices they take, and what each of them runs.

A replica loads the same layers from the same place as the leader, says so, meets the others in the
process group, and answers orders until its pipe ends. Where the processes divide the layers, they meet
first, and each loads its share.
"""

import logging
import os
import signal
import sys
import threading
from dataclasses import replace
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.runtime.devices import resolve_device
from flower_split.runtime.logs import quiet_libraries
from flower_split.trunk.build import load_compute, load_share
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.joint_pass import JointCompute
from flower_split.trunk.ending import end_within
from flower_split.trunk.replicas.follower import Follower
from flower_split.trunk.replicas.group import ReplicaGroup
from flower_split.trunk.replicas.orders import Join, Ready
from flower_split.trunk.replicas.processes import Followers, Replicas
from flower_split.trunk.tensor_parallel.follower import ParallelFollower
from flower_split.trunk.tensor_parallel.ranks import Ranks, meet_all, shorten_waits
from flower_split.trunk.tensor_parallel.shards import Shards

_GIB = 2**30
_END_SECONDS = 1.0  # for what is left of the process group, which may wait for the others


def start_followers(config: RunConfig) -> Followers | None:
    """Start the followers of a trunk, which load from now on; None: it computes alone.

    Raises:
        ConfigError: There are not as many devices.
    """
    if config.trunk.processes == 1:
        return None
    if config.trunk.tensor_parallel > 1:
        return Ranks(run_rank, follower_configs(config), config.trunk.call_timeout)
    return Replicas(run_replica, follower_configs(config), config.trunk.call_timeout)


def follower_configs(config: RunConfig) -> list[RunConfig]:
    """Return each follower's configuration: the leader's, on the next devices after its own.

    Raises:
        ConfigError: There are not as many devices.
    """
    leader = resolve_device(config.trunk.device, "trunk.device")
    count = config.trunk.processes
    key = "tensor-parallel" if config.trunk.tensor_parallel > 1 else "replicas"
    if leader.type == "cpu":
        names = ["cpu"] * count
    else:
        first, there = leader.index or 0, torch.cuda.device_count()
        if first + count > there:
            raise ConfigError(
                f"trunk.{key} = {count} takes a device each, from cuda:{first} on, and torch sees "
                f"{there} CUDA devices here. Lower it, or set trunk.device to an earlier one."
            )
        names = [f"{leader.type}:{first + rank}" for rank in range(count)]
    return [replace(config, trunk=replace(config.trunk, device=name)) for name in names[1:]]


def run_replica(pipe: Connection, config: RunConfig) -> None:
    """Load, meet the others, and answer orders until the leader ends."""
    _begin(config)
    compute = load_compute(config)
    try:
        pipe.send(Ready(str(compute.device), len(compute.parameters)))
        _answer(pipe, _joined(pipe.recv(), config, compute))
    except (EOFError, OSError):
        end_within(_END_SECONDS, 0)  # the trunk closes, or has ended


def run_rank(pipe: Connection, config: RunConfig) -> None:
    """Meet the others, load a share of the layers, and answer orders until the leader ends."""
    device = _begin(config)
    try:
        pipe.send(Ready(str(device), 0))  # who has ended by then is not waited for
        order: Join = pipe.recv()
        folder = Path(order.folder)
        meet_all(folder, order.rank, order.size, device)
        shards = Shards(load_share(config)[0])
        pipe.send(Ready(str(device), len(shards.names)))
        group = ReplicaGroup(folder, order.rank, order.size, device, order.timeout)
        shorten_waits(order.timeout)
        shards.whole()  # the leader asks
        _answer(pipe, ParallelFollower(shards, group))
    except (EOFError, OSError):
        end_within(_END_SECONDS, 0)  # the trunk closes, or has ended


def _begin(config: RunConfig) -> torch.device:
    """Settle this process, which ends with its leader's; return its device."""
    os.dup2(2, 1)  # where the leader's own answer is read, nothing of a follower may stand
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    quiet_libraries()
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the group: the leader decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="trunk-leader", daemon=True).start()
    device = torch.device(config.trunk.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _answer(pipe: Connection, follower: Follower | ParallelFollower) -> None:
    """Answer orders until the pipe ends.

    Raises:
        EOFError: It does.
    """
    while True:
        reply, buffer = follower.answer(pipe.recv())
        pipe.send(reply)
        if buffer is not None:
            follower.send(buffer)


def _joined(order: Join, config: RunConfig, compute: TrunkCompute) -> Follower:
    """Meet the others in the process group."""
    group = ReplicaGroup(Path(order.folder), order.rank, order.size, compute.device, order.timeout)
    joint = JointCompute(
        compute, takes_mask=order.takes_mask, max_positions=config.trunk.batch_positions
    )
    return Follower(compute, joint, group, int(config.trunk.activation_memory * _GIB))


def _end_with_parent() -> None:
    """End this process when the leader's has, also in the middle of a message to it."""
    parent = parent_process()
    assert parent is not None, "a follower is a child of its leader"
    connection.wait([parent.sentinel])
    os._exit(1)
