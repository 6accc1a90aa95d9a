"""The processes that divide a trunk's layers: met before they load, for each reads its share alone.

Layers are divided over torch's default process group, which transformers takes; so a process leads or
follows one such trunk, and nothing else of torch's distributed package in it.
"""

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from flower_split.errors import ConfigError, TrunkUnavailable
from flower_split.split import TrunkModel
from flower_split.trunk.replicas.processes import LOAD_SECONDS, Followers
from flower_split.trunk.tensor_parallel.shards import Shards
from flower_split.trunk.tensor_parallel.trunk import ParallelTrunk

_STORE = "divided"  # the name of the file in which the processes meet
_INTERFACE = "GLOO_SOCKET_IFNAME"


class Ranks(Followers):
    """Followers that each have a share of every layer of the trunk."""

    noun = "rank"
    patience = 2.0  # they keep nothing, and may wait for this process in the middle of a layer
    _met = False
    _interface: str | None = None  # gloo's before this

    def begin(self, device: torch.device) -> None:
        """Meet them, who then load as this process does.

        Args:
            device: This process's.

        Raises:
            ConfigError: This process has a default process group already, or not the right devices.
            TrunkUnavailable: One ended, or they do not come.
        """
        self.ready(0)  # they run, and have loaded nothing yet
        self.order_to_join()
        self._interface = os.environ.get(_INTERFACE)
        try:
            meet_all(Path(self._folder.name), 0, self.size, device)
        except RuntimeError as error:
            self._restore_interface()
            raise TrunkUnavailable(
                f"the {self.size} processes that divide the trunk did not meet within "
                f"{LOAD_SECONDS:g} s: {error}"
            ) from error
        self._met = True

    def lead(self, trunk: TrunkModel) -> ParallelTrunk:
        """Return the trunk that all processes compute, once all have loaded.

        Args:
            trunk: This process's share, with its adapter.

        Raises:
            TrunkUnavailable: One ended, takes too long, or trains something else.
        """
        shards = Shards(trunk)
        self.ready(len(shards.names))
        self.meet(shards.device, "processes that divide the layers")
        shorten_waits(self._timeout)
        try:
            return ParallelTrunk(shards, shards.whole(), self.links)
        except RuntimeError as error:
            raise TrunkUnavailable(
                f"the {self.size} processes that divide the trunk could not begin: {error}"
            ) from error

    def close(self) -> None:
        """End the followers, and leave the process group. Idempotent."""
        super().close()
        if self._met:
            self._met = False
            self._restore_interface()
            with suppress(RuntimeError):  # it may have been aborted
                dist.destroy_process_group()

    def _restore_interface(self) -> None:
        os.environ.pop(_INTERFACE, None)
        if self._interface is not None:
            os.environ[_INTERFACE] = self._interface

    def _abort(self) -> None:
        super()._abort()
        group = dist.group.WORLD
        if self._met and group is not None and torch.cuda.is_available():
            group.abort()  # a kernel of NCCL's whose peer is gone waits for ever


def meet_all(folder: Path, rank: int, size: int, device: torch.device) -> None:
    """Make torch's default process group, with all processes that divide a trunk.

    Args:
        folder: Where they find each other; a directory of their own, readable by their user.
        rank: This process's; 0 leads.
        size: Processes.
        device: This process's.

    Raises:
        ConfigError: There is one already, or transformers would take other devices.
        RuntimeError: The others do not come.
    """
    if dist.is_initialized():
        raise ConfigError(
            "trunk.tensor-parallel divides layers over torch's default process group, and this process has "
            "one for something else. Serve the trunk in a process of its own: flower-split trunk."
        )
    accelerator = torch.accelerator.current_accelerator()
    found = "cpu" if accelerator is None else accelerator.type
    if found != device.type:
        raise ConfigError(
            f"trunk.tensor-parallel divides layers over this host's {found} devices, and trunk.device is "
            f"{device}. Set trunk.device to one of them, or hide the others from the process."
        )
    # Of this group, and of those that transformers makes of it: nothing of them is for other hosts.
    os.environ[_INTERFACE] = "lo"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(str(folder / _STORE), size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LOAD_SECONDS),
        device_id=device if device.type == "cuda" else None,
    )


def shorten_waits(seconds: float) -> None:
    """Let nothing wait for another process longer than so many seconds, once all have loaded."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
