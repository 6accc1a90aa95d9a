"""Shared memory: what is put in comes out, nothing is written over while it is in use, all of it ends."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from flower_split.errors import CodecError, TrunkError
from flower_split.proto import trunk_pb2 as pb
from flower_split.testing import check_transport
from flower_split.wire.receiving import Incoming
from flower_split.wire.sending import Outgoing
from flower_split.wire.shared_memory import Place, SharedFrames, SharedMemory
from flower_split.wire.shared_memory_transport import AutomaticChannel, SharedMemoryChannel
from flower_split.wire.transports import TRANSPORTS
from tests.support.loopback import (
    COORDINATOR_TOKEN,
    HIDDEN,
    FakeEngine,
    TinyTrunk,
    make_engine,
    remote,
    served,
)

HALF = 1 << 20

Ends = tuple[SharedMemory, SharedMemory]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The trunk's side and the client's."""
    trunk = SharedMemory.make(HALF)
    client = SharedMemory.of_process(os.getpid(), trunk.descriptor, trunk.num_bytes, trunk.nonce)
    yield trunk, client
    trunk.close_file()


def payload(value: int, size: int = 1000) -> memoryview:
    return memoryview(bytes([value]) * size)


def test_each_half_carries_one_direction(ends: Ends) -> None:
    trunk, client = ends
    one = client.sending.put([payload(1), payload(2, 5)])
    two = trunk.sending.put([payload(3)])
    assert one is not None and two is not None
    first, second = trunk.receiving.open(one, [1000, 5])
    (third,) = client.receiving.open(two, [1000])
    assert first.eq(1).all() and second.eq(2).all() and third.eq(3).all()
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    first.fill_(9)  # the receiver's own: writable
    assert second.eq(2).all()


def test_a_slot_is_used_again_only_when_its_tensors_are_gone_and_its_call_is_answered(
    ends: Ends,
) -> None:
    trunk, client = ends
    place = client.sending.put([payload(1)])
    assert place is not None
    tensors = trunk.receiving.open(place, [1000])
    client.sending.answered(place)
    view = tensors[0].view(torch.uint8)[:10]
    del tensors
    gc.collect()
    other = client.sending.put([payload(2)])
    assert other is not None and other.slot != place.slot  # the view is alive
    assert view.eq(1).all()
    del view
    gc.collect()
    again = client.sending.put([payload(3)])
    assert again is not None
    assert (again.slot, again.offset, again.generation) == (place.slot, place.offset, 2)
    third = client.sending.put([payload(4)])  # the second and third calls are not answered
    assert third is not None and third.slot not in (other.slot, again.slot)


def test_a_message_that_was_never_opened_keeps_its_slot(ends: Ends) -> None:
    _, client = ends
    place = client.sending.put([payload(1)])
    assert place is not None
    client.sending.answered(place)
    other = client.sending.put([payload(2)])
    assert other is not None and other.slot != place.slot


def test_a_late_repetition_is_refused_and_leaves_no_use_behind(ends: Ends) -> None:
    trunk, client = ends
    place = client.sending.put([payload(1)])
    assert place is not None
    trunk.receiving.open(place, [1000])
    gc.collect()
    client.sending.answered(place)
    again = client.sending.put([payload(2)])
    assert again is not None and again.slot == place.slot
    with pytest.raises(CodecError, match="late repetition"):
        trunk.receiving.open(place, [1000])
    (tensor,) = trunk.receiving.open(again, [1000])
    assert tensor.eq(2).all()


@pytest.mark.parametrize(
    "place", [Place(256, 1, 0), Place(0, 1, HALF - 63), Place(0, 1, 1 << 62)], ids=str
)
def test_a_place_outside_is_refused(ends: Ends, place: Place) -> None:
    with pytest.raises(CodecError, match="must lie within"):
        ends[0].receiving.open(place, [64])


def test_what_finds_no_room_is_left_to_frames(ends: Ends) -> None:
    _, client = ends
    assert client.sending.put([payload(1, HALF + 1)]) is None
    assert client.sending.put([payload(1, HALF)]) is not None
    assert client.sending.put([payload(1, 64)]) is None


def test_a_message_is_the_same_either_way_and_counts_the_same_bytes(ends: Ends) -> None:
    trunk, client = ends
    tensors = {
        "x": torch.arange(200_000, dtype=torch.float32),
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
    }
    message = Outgoing(pb.Header(reply=pb.ReplyHeader(version=3)), tensors)
    place = client.sending.put(message.payloads)
    assert place is not None
    (frame,) = message.placed(place).frames()
    assert len(frame) < 200
    framed = Incoming(message.frames()).receive(1 << 22, digest=True)
    shared = Incoming(iter([frame]), "reply", lambda: trunk).receive(1 << 22, digest=True)
    assert shared.digest == framed.digest
    assert shared.num_bytes == framed.num_bytes == message.num_bytes
    assert shared.tensors.keys() == tensors.keys()
    assert all(torch.equal(shared.tensors[name], tensors[name]) for name in tensors)
    with pytest.raises(CodecError, match="nobody shares"):
        Incoming(iter([frame]))
    with pytest.raises(CodecError, match="one frame without any"):
        Incoming(SharedFrames(iter([frame, frame]), trunk)).receive(1 << 22)


def test_only_the_memory_that_was_offered_is_opened(ends: Ends) -> None:
    trunk, _ = ends
    offered = (os.getpid(), trunk.descriptor, trunk.num_bytes, trunk.nonce)
    for changed in ((0, 1 << 22), (2, trunk.num_bytes - 4096), (3, b"x" * 16)):
        wrong = [*offered]
        wrong[changed[0]] = changed[1]
        with pytest.raises(OSError):
            SharedMemory.of_process(*wrong)
    with open(__file__, "rb") as file, pytest.raises(OSError, match="not a trunk's"):
        SharedMemory.of_process(os.getpid(), file.fileno(), trunk.num_bytes, trunk.nonce)
    with pytest.raises(OSError):  # sealed: nobody ends the other process by shrinking it
        os.ftruncate(trunk.descriptor, 4096)


def memories() -> int:
    """How many mappings of shared memory this process has."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("/memfd:flower-split" in line for line in maps)


def test_calls_give_the_same_bits_and_bytes_and_leave_nothing() -> None:
    gc.collect()
    before, results = memories(), {}
    for transport in ("grpc", "shared-memory"):
        engine = FakeEngine()
        with served(engine) as port, remote(port, transport=transport) as trunk:
            trunk.open(4)
            for index in range(3):
                hidden = torch.full((2, 300, HIDDEN), 1.5 + index, requires_grad=True)
                mask = torch.ones(2, 300, dtype=torch.int64)
                with trunk.micro_batch(
                    0, index, num_tokens=5, loss_denominator=5.0, last=index == 2
                ):
                    output = trunk(hidden, mask)
                (3 * output).sum().backward()
            digests = [call[0].digest for name, call in engine.calls if name != "open_session"][:6]
            results[transport] = (
                output.detach().clone(),
                hidden.grad.clone(),
                digests,
                trunk.stats.bytes_sent,
            )
            assert (memories() > before) == (transport == "shared-memory")
            del output, hidden
        engine.calls.clear()
        del trunk, engine
    one, two = results.values()
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2:] == two[2:]
    gc.collect()
    assert memories() == before


def test_a_trunk_elsewhere_is_reached_by_frames_unless_memory_is_demanded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "flower_split.wire.shared_memory_transport.host_identity", lambda: ("another host", 0)
    )
    with served(FakeEngine()) as port:
        with remote(port, transport="auto") as trunk, torch.no_grad():
            trunk.open(1)
            assert trunk(torch.ones(1, 1, HIDDEN)).eq(2).all()
        with remote(port, transport="shared-memory") as trunk, torch.no_grad():
            trunk.open(1)
            with pytest.raises(
                TrunkError, match="another host or as another user.*trunk.transport"
            ):
                trunk(torch.ones(1, 1, HIDDEN))


@pytest.mark.parametrize("made", [AutomaticChannel, SharedMemoryChannel])
def test_the_transports_keep_the_contract(made: type[AutomaticChannel]) -> None:
    with served(make_engine(TinyTrunk())) as port:
        check_transport(
            made(f"127.0.0.1:{port}", token=COORDINATOR_TOKEN, timeout=20.0),
            made("127.0.0.1:1", token=COORDINATOR_TOKEN, timeout=0.3),
            timeout=0.3,
        )


def test_transports_have_names() -> None:
    assert TRANSPORTS.names()[:3] == ["auto", "grpc", "shared-memory"]
