"""The payloads of a message that do not come in its frames: in memory of the host, or of its GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.device_memory import DeviceHalf
from flower_split.wire.sending import Outgoing, framed_bytes
from flower_split.wire.shared_memory import SharedMemory
from flower_split.wire.shared_slots import Place


@dataclass(frozen=True, slots=True)
class PlacedPayloads:
    """Opens what a header says of the places of its payloads.

    Args:
        header: The message's header; not trusted.
        memory: Shared with its sender.
    """

    header: pb.Header
    memory: SharedMemory

    @property
    def fill_no_frame(self) -> bool:
        """Whether the message is the one frame of its header."""
        return self.header.HasField("shared")

    def open(
        self, sizes: Sequence[int], on_device: Sequence[bool], *, complete: bool = True
    ) -> list[Tensor | None]:
        """Return the payloads, uint8, in their order; None for those that come in frames.

        Args:
            sizes: All payloads' sizes in bytes; they have been checked.
            on_device: Which of them lie in memory of a GPU.
            complete: Whether those are complete; False: as :meth:`DeviceHalf.open` says.

        Raises:
            CodecError: They are not where the header says, or what lies there has been replaced.
        """
        found: list[Tensor | None] = [None] * len(sizes)
        there = [index for index, size in enumerate(sizes) if size and on_device[index]]
        if there:
            half, place = self._device(), _place(self.header.device)
            opened = half.open(place, [sizes[i] for i in there], complete=complete)
            for index, payload in zip(there, opened, strict=True):
                found[index] = payload
        if self.fill_no_frame:
            here = [index for index, size in enumerate(sizes) if size and not on_device[index]]
            place = _place(self.header.shared)
            opened = self.memory.receiving.open(place, [sizes[i] for i in here]) if here else []
            for index, payload in zip(here, opened, strict=True):
                found[index] = payload
            found = [torch.empty(0, dtype=torch.uint8) if p is None else p for p in found]
        return found

    def num_bytes(self, sizes: Sequence[int]) -> int:
        """Return the bytes that the message would have in frames alone: those that are counted."""
        bare = pb.Header()
        bare.CopyFrom(self.header)
        bare.ClearField("shared")
        bare.ClearField("device")
        return framed_bytes(bare.ByteSize(), sum(sizes))

    def _device(self) -> DeviceHalf:
        device = self.memory.device
        if device is None or not self.header.HasField("device"):
            raise CodecError(
                "a payload lies in memory of a GPU that nobody shares with its sender."
            )
        return device.receiving


@dataclass(frozen=True, slots=True)
class Places:
    """Where the payloads of a message that is sent lie."""

    memory: SharedMemory
    on_host: Place | None
    on_device: Place | None

    def answered(self) -> None:
        """Note that the message will not be sent again."""
        if self.on_host is not None:
            self.memory.sending.answered(self.on_host)
        if self.on_device is not None and self.memory.device is not None:
            self.memory.device.sending.answered(self.on_device)


def in_memory(memory: SharedMemory, message: Outgoing) -> tuple[Outgoing, Places]:
    """Return a message with all payloads in shared memory that find room there; the others in frames."""
    there: Place | None = None
    if message.staying:
        there = memory.device.sending.put(message.staying) if memory.device else None
        message = message.on_host() if there is None else message.placed_on_device(there)
    here = memory.sending.put(message.payloads) if message.payloads else None
    if here is not None:
        message = message.placed(here)
    return message, Places(memory, here, there)


def _place(said: pb.SharedPayload) -> Place:
    return Place(said.slot, said.generation, said.offset)
