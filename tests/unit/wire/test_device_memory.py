"""Tensors that stay on a GPU on their way; here a buffer on the CPU stands for the GPU's."""

import gc
import mmap
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flower_split.client.passing import Passing
from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.device_memory import DeviceHalf, device_digest
from flower_split.wire.placed_payloads import in_memory
from flower_split.wire.receiving import Incoming, Received
from flower_split.wire.sending import Outgoing
from flower_split.wire.shared_memory import SharedFrames, SharedMemory
from flower_split.wire.shared_slots import Place, SlotTable, TableSize

CPU = torch.device("cpu")
HALF = 1 << 14
SIZE = TableSize(slots=4, uses=8)


class Buffer:
    """What :class:`DeviceBuffer` is, on the CPU."""

    handle = b"handle"

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.num_bytes = data.nbytes
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


Ends = tuple[SharedMemory, SharedMemory]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The trunk's side and the client's, over one buffer."""
    trunk = SharedMemory.make(1 << 20)
    client = SharedMemory.of_process(os.getpid(), trunk.descriptor, trunk.num_bytes, trunk.nonce)
    data = torch.zeros(2 * HALF, dtype=torch.uint8)
    for end in (trunk, client):
        end.share_device(Buffer(data), CPU)  # type: ignore[arg-type]
    yield trunk, client
    trunk.close_file()


def halves() -> tuple[DeviceHalf, DeviceHalf]:
    """One direction, as its sender and as its receiver see it."""
    memory = mmap.mmap(-1, 4096)
    data = torch.zeros(HALF, dtype=torch.uint8)
    sender, receiver = (DeviceHalf(data, SlotTable(memory, 0, SIZE, HALF), CPU) for _ in range(2))
    return sender, receiver


def test_copies_come_out_as_they_went_in_and_are_the_receivers_own() -> None:
    sender, receiver = halves()
    first, second = torch.arange(300.0), torch.arange(7, dtype=torch.bfloat16)
    place = sender.put([first, second])
    assert place is not None
    one, two = receiver.open(place, [first.nbytes, second.nbytes])
    one.fill_(1)
    again, _ = receiver.open(place, [first.nbytes, second.nbytes])  # a repetition, not yet answered
    assert torch.equal(again.view(torch.float32), first)
    assert torch.equal(two.view(torch.bfloat16), second)


def test_a_slot_is_written_again_once_it_was_opened_and_answered() -> None:
    sender, receiver = halves()
    place = sender.put([torch.ones(10)])
    assert place is not None
    sender.answered(place)
    other = sender.put([torch.ones(10)])
    assert other is not None and other.slot != place.slot  # nobody has opened the first
    receiver.open(place, [40])
    again = sender.put([torch.zeros(10)])
    assert again is not None and (again.slot, again.generation) == (place.slot, 2)
    with pytest.raises(CodecError, match="replaced"):
        receiver.open(place, [40])


def test_without_room_or_after_the_end_nothing_is_put() -> None:
    sender, receiver = halves()
    assert sender.put([torch.ones(HALF)]) is None
    place = sender.put([torch.ones(10)])
    assert place is not None
    receiver.close()
    with pytest.raises(CodecError, match="given back"):
        receiver.open(place, [40])
    sender.close()
    assert sender.put([torch.ones(10)]) is None


@pytest.mark.parametrize("place", [Place(4, 1, 0), Place(0, 1, HALF - 3), Place(0, 1, 1 << 62)])
def test_a_place_outside_is_refused(place: Place) -> None:
    with pytest.raises(CodecError, match="must lie within"):
        halves()[1].open(place, [40])


def over(sender: SharedMemory, receiver: SharedMemory, message: Outgoing) -> tuple[Received, int]:
    """A message from one end to the other; also the bytes of its frames."""
    placed, _ = in_memory(sender, message)
    frames = list(placed.frames())
    incoming = Incoming(SharedFrames(iter(frames), receiver))
    received = incoming.receive(1 << 20, digest=True)
    return received, sum(len(frame) for frame in frames)


def sample(staying: tuple[str, ...]) -> Outgoing:
    mask = torch.tensor([[True, False, True]])
    hidden = torch.arange(1200.0).view(1, 3, 400).bfloat16()
    return Outgoing(pb.Header(), {"hidden_states": hidden, "attention_mask": mask}, staying)


def test_a_message_keeps_its_tensors_on_the_device_and_counts_as_in_frames(ends: Ends) -> None:
    trunk, client = ends
    message, framed = sample(("hidden_states",)), sample(())
    received, travelled = over(client, trunk, message)
    hidden = torch.arange(1200.0).view(1, 3, 400).bfloat16()
    assert torch.equal(received.tensors["hidden_states"], hidden)
    assert received.tensors["attention_mask"].tolist() == [[True, False, True]]
    assert travelled < 200 < framed.num_bytes
    assert received.num_bytes == message.num_bytes
    assert message.num_bytes - framed.num_bytes in range(3)  # the flag in the header


def test_a_message_that_finds_no_room_travels_with_copies(ends: Ends) -> None:
    trunk, client = ends
    client.close_device()
    received, _ = over(client, trunk, sample(("hidden_states",)))
    assert torch.equal(
        received.tensors["hidden_states"], torch.arange(1200.0).view(1, 3, 400).bfloat16()
    )


def test_a_message_that_lies_in_memory_of_nobody_is_refused(ends: Ends) -> None:
    trunk, client = ends
    placed, _ = in_memory(client, sample(("hidden_states",)))
    trunk.device = None
    with pytest.raises(CodecError, match="nobody shares"):
        Incoming(SharedFrames(placed.frames(), trunk)).receive(1 << 20)


def test_closing_gives_the_buffer_back_once(ends: Ends) -> None:
    trunk, _ = ends
    buffer = Buffer(torch.zeros(2 * HALF, dtype=torch.uint8))
    trunk.share_device(buffer, CPU)  # type: ignore[arg-type]
    for _ in range(2):
        trunk.close_device()
    assert buffer.closed == 1


def test_device_digest_tells_one_changed_bit_and_two_rows_exchanged() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (5 * 16384 + 12,), generator=generator, dtype=torch.uint8)
    found = {device_digest(data)}
    assert device_digest(data.clone()) in found and len(device_digest(data)) == 16
    for index in (0, 1, 16383, 16384, data.nbytes - 1):
        changed = data.clone()
        changed[index] ^= 1
        found.add(device_digest(changed))
    swapped = data.clone()
    swapped[:16384], swapped[16384:32768] = data[16384:32768], data[:16384]
    found.add(device_digest(swapped))
    assert len(found) == 7


class Doubling:
    """Two calls whose forward is 2 h, and whose backward is 2 g."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def forward(self, smashed: Tensor) -> Tensor:
        self.seen.append(float(smashed.sum()))
        return 2 * smashed

    def backward(self, trunk_output_grad: Tensor) -> Tensor:
        self.seen.append(float(trunk_output_grad.sum()))
        return 2 * trunk_output_grad


class Call(torch.autograd.Function):
    """A node that calls what it is given, as the client's does."""

    @staticmethod
    def forward(ctx: object, smashed: Tensor, calls: Passing) -> Tensor:
        ctx.calls = calls  # type: ignore[attr-defined]
        assert smashed.device.type == "cpu" and smashed.stride() == (0, 0)
        return calls.forward(smashed)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.calls.backward(gradient), None  # type: ignore[attr-defined]


def test_tensors_pass_around_autograds_node_in_both_directions() -> None:
    calls = Doubling()
    passing = Passing(calls)
    hidden = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    output = passing.give_out(Call.apply(passing.take_in(hidden * 10), passing))
    assert output.tolist() == [[20.0, 40.0, 60.0]]
    (output * torch.tensor([[1.0, 0.0, 3.0]])).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[20.0, 0.0, 60.0]]
    assert calls.seen == [60.0, 4.0]
    del output
    gc.collect()
