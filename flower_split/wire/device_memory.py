"""Memory of a GPU that a trunk and a client share: tensors go from one to the other beside the host.

The trunk allocates a buffer, apart from torch's own memory, and exports it by a handle of the CUDA
driver (inter-process communication); the client opens that. Half of it is the client's to write, half
the trunk's. A sender copies into a slot of its half, the receiver copies out of it, and a call's frames
carry the slot instead of the bytes. It lies on the trunk's GPU; a client on another one copies between the
two. The driver frees the memory of a process that ends, however it ends.
"""

import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.wire.shared_slots import Place, SlotTable, aligned
from flower_split.wire.staging import side_stream, to_host

_ROW = 4096  # 32-bit words that one row of a digest has
_LAZY_PEER_ACCESS = 1  # flag of cuIpcOpenMemHandle; the one there is


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_byte * 64)]


class _Span:
    """Memory of a GPU, as torch adopts it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _call(name: str, *arguments: object) -> None:
    """Call the CUDA driver.

    Raises:
        OSError: There is none, or it refuses.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(text))
        raise OSError(f"{name} failed with {(text.value or b'an unknown error').decode()}")


@contextmanager
def _context(device: torch.device) -> Iterator[None]:
    """Make the device's context the one that this thread's calls of the driver use."""
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()
        yield


def device_name(device: torch.device) -> str:
    """Return what names a GPU over all processes of its host; empty: it is no GPU."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def named_devices(own: torch.device) -> dict[str, torch.device]:
    """Return the GPUs that this process sees, by their names; ``own`` last."""
    if own.type != "cuda":
        return {}
    seen = [torch.device(own.type, index) for index in range(torch.cuda.device_count())]
    names = {device_name(device): device for device in seen if device != own}
    return {**names, device_name(own): own}


class DeviceBuffer:
    """A buffer on a GPU that two processes have. Made by :meth:`make` or :meth:`open`.

    Attributes:
        data: uint8 [num_bytes].
        handle: By which another process opens it.
    """

    def __init__(self, data: Tensor, handle: bytes, address: int, release: str) -> None:
        self.data, self.handle = data, handle
        self._address, self._release = address, release

    @property
    def num_bytes(self) -> int:
        """Of the whole buffer."""
        return self.data.nbytes

    @classmethod
    def make(cls, num_bytes: int, device: torch.device) -> "DeviceBuffer":
        """Allocate a buffer and export it.

        Raises:
            OSError: The driver has no memory, or does not share it.
        """
        address, handle = ctypes.c_uint64(), _Handle()
        with _context(device):
            _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
            _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        data = torch.as_tensor(_Span(address.value, num_bytes), device=device)
        return cls(data, bytes(handle), address.value, "cuMemFree_v2")

    @classmethod
    def open(cls, handle: bytes, num_bytes: int, device: torch.device) -> "DeviceBuffer":
        """Open the buffer of another process.

        Args:
            handle: Of the buffer.
            num_bytes: Its size.
            device: On which it lies, as this process calls it.

        Raises:
            OSError: The driver does not let this process have it.
        """
        address = ctypes.c_uint64()
        with _context(device):
            _call(
                "cuIpcOpenMemHandle_v2",
                ctypes.byref(address),
                _Handle.from_buffer_copy(handle.ljust(64, b"\0")[:64]),
                ctypes.c_uint(_LAZY_PEER_ACCESS),
            )
        data = torch.as_tensor(_Span(address.value, num_bytes), device=device)
        return cls(data, handle, address.value, "cuIpcCloseMemHandle")

    def close(self) -> None:
        """Give the buffer back; nobody may use :attr:`data` any more."""
        if self._release:
            with _context(self.data.device):
                _call(self._release, ctypes.c_uint64(self._address))


@contextmanager
def _copying(device: torch.device, *, complete: bool = True) -> Iterator[None]:
    """Copy on a side stream, behind what this thread's stream has.

    Args:
        device: The one of this process; the other end may lie on another GPU.
        complete: Whether all is done at the block's end; False: this thread's stream waits for it.
    """
    if device.type != "cuda":
        yield
        return
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
        if complete:
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(stream)
    if complete:
        copied.synchronize()
    else:
        torch.cuda.current_stream(device).wait_stream(stream)


class DeviceHalf:
    """One direction of a buffer; a process uses it as sender or as receiver. Thread-safe.

    Args:
        data: uint8, the half of the buffer.
        table: The table of its slots.
        device: On which this process computes.
    """

    def __init__(self, data: Tensor, table: SlotTable, device: torch.device) -> None:
        self._data: Tensor | None = data
        self._table = table
        self._device = device
        self._lock = threading.Lock()  # copies come one after the other, and none after the end

    def put(self, tensors: Sequence[Tensor]) -> Place | None:
        """Copy tensors in; None: there is no room, so they must travel otherwise."""
        with self._lock:
            data = self._data
            if data is None:
                return None
            place = self._table.take(sum(aligned(tensor.nbytes) for tensor in tensors))
            if place is None:
                return None
            at = place.offset
            with _copying(self._device):
                for tensor in tensors:
                    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
                    data[at : at + flat.nbytes].copy_(flat)
                    at += aligned(flat.nbytes)
        return place

    def answered(self, place: Place) -> None:
        """Note that the message will not be sent again: its slot is free once nobody uses it."""
        self._table.answered(place)

    def open(self, place: Place, sizes: Sequence[int], *, complete: bool = True) -> list[Tensor]:
        """Return copies of the payloads of a message, uint8, for any stream.

        Args:
            place: As the message says; not trusted.
            sizes: The payloads' sizes in bytes; they have been checked.
            complete: Whether to wait for the copies; False: the caller waits for something that this
                thread's stream does after them, before it answers the message.

        Raises:
            CodecError: It is no place in this half, its content has been replaced, or the memory has
                been given back.
        """
        with self._lock:
            data = self._data
            if data is None:
                raise CodecError("the memory of the GPU that this message lies in is given back.")
            (entry,) = self._table.enter(place, sum(aligned(size) for size in sizes), 1)
            try:
                copies, at = [], place.offset
                with _copying(self._device, complete=complete):
                    for size in sizes:
                        copies.append(data[at : at + size].to(self._device, copy=True))
                        at += aligned(size)
            finally:
                self._table.leave(entry)
        if self._device.type == "cuda":
            for (
                copy
            ) in copies:  # of the side stream; the caller's, or the compute thread's, uses it
                copy.record_stream(torch.cuda.default_stream(self._device))
                copy.record_stream(torch.cuda.current_stream(self._device))
        return copies

    def close(self) -> None:
        """Copy nothing more."""
        with self._lock:
            self._data = None


class DeviceMemory:
    """Both halves of a buffer, as one of its two processes sees them.

    Args:
        buffer: The buffer that both have.
        tables: The table of the client's half, then that of the trunk's.
        device: On which this process computes.
        trunk: Whether it is the trunk.

    Attributes:
        device: On which this process computes.
        handle: By which the other process opens it.
        num_bytes: Size of both halves.
        sending: The half that this process writes.
        receiving: The half that it reads.
    """

    def __init__(
        self,
        buffer: DeviceBuffer,
        tables: Sequence[SlotTable],
        device: torch.device,
        *,
        trunk: bool,
    ) -> None:
        half = buffer.num_bytes // 2
        client = DeviceHalf(buffer.data[:half], tables[0], device)
        other = DeviceHalf(buffer.data[half : 2 * half], tables[1], device)
        self.device = device
        self.handle, self.num_bytes = buffer.handle, buffer.num_bytes
        self.sending, self.receiving = (other, client) if trunk else (client, other)
        self._buffer: DeviceBuffer | None = buffer

    def close(self) -> None:
        """Give the buffer back; calls that still need it fail. Idempotent."""
        buffer, self._buffer = self._buffer, None
        self.sending.close()
        self.receiving.close()
        if buffer is not None:
            buffer.close()


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Return the fixed odd multipliers of a digest, int64 [2, 1, _ROW]."""
    generator = torch.Generator().manual_seed(0x5EED)
    drawn = torch.randint(-(2**63), 2**63 - 1, (2, 1, _ROW), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(device)


@functools.lru_cache(maxsize=64)
def _row_weights(device: torch.device, rows: int) -> Tensor:
    """Return the odd multipliers of the sums of so many rows, int64 [2, rows]."""
    weights = _weights(device)[:, 0]
    return torch.arange(1, 2 * rows, 2, device=device) * weights[:, 1:2] * weights[0, 0]


def device_digest(data: Tensor) -> bytes:
    """Return 16 bytes that tell a tensor of a GPU from another one, computed where it lies.

    Two multilinear hashes modulo 2^64 over its 32-bit words, row by row and then over the rows (Lemire
    and Kaser, "Strongly universal string hashing is fast", The Computer Journal, 2014): integer sums,
    which no order changes. No protection against an attacker.

    Args:
        data: uint8, contiguous.
    """
    missing = -data.nbytes % (4 * _ROW)
    whole = torch.nn.functional.pad(data, (0, missing)) if missing else data
    rows = whole.view(torch.int32).view(-1, _ROW)
    sums = (rows * _weights(data.device)).sum(2)
    sums = sums ^ (sums >> 29)  # so that equal rows do not simply add up
    found = (sums * _row_weights(data.device, len(rows))).sum(1)
    # Not cpu(): a copy to pageable memory keeps the other threads from launching until it is done.
    return to_host(found).numpy().tobytes()
