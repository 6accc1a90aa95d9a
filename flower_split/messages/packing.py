"""ArrayRecords as one array each, while they pass through Flower.

Flower sends every array of a message as an object of its own, with a request for each at every machine
that it passes: an adapter of a hundred small matrices takes seconds of requests in a deployment. Packed,
the bytes of a record's arrays follow each other behind a list of what they are. Strategies and mods see
the record as it was.
"""

import copy
import json
import struct
from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, Message, RecordDict

from flower_split.errors import FederationError

_SERIALIZATION = "flower-split.packed"  # the array's stype, which tells how its bytes are read
_NAME = "packed"
_LENGTH = struct.Struct("!Q")  # bytes of the list, in front of it


def packed(message: Message) -> Message:
    """Return a message with the same metadata whose records of arrays are packed.

    What is no record of several arrays stays as it is; ``message`` is not changed.
    """
    records = {
        name: _pack(record)
        for name, record in message.content.array_records.items()
        if len(record) > 1
    }
    return _with_records(message, records)


def is_packed(message: Message) -> bool:
    """Return whether a message holds a packed record."""
    return any(_holds_packed(record) for record in message.content.array_records.values())


def unpacked(message: Message) -> Message:
    """Return a message with the same metadata whose records are as they were before :func:`packed`.

    Raises:
        FederationError: A packed record is not what :func:`packed` makes.
    """
    records = {
        name: _unpack(record, name)
        for name, record in message.content.array_records.items()
        if _holds_packed(record)
    }
    return _with_records(message, records)


def _with_records(message: Message, records: Mapping[str, ArrayRecord]) -> Message:
    """Return a message that shares the metadata, with other records under the same names."""
    if not records:
        return message
    changed = copy.copy(message)
    changed.content = RecordDict(
        {name: records.get(name, record) for name, record in message.content.items()}
    )
    return changed


def _holds_packed(record: ArrayRecord) -> bool:
    return len(record) == 1 and next(iter(record.values())).stype == _SERIALIZATION


def _pack(record: ArrayRecord) -> ArrayRecord:
    arrays = list(record.items())
    described = [
        [name, array.dtype, list(array.shape), array.stype, len(array.data)]
        for name, array in arrays
    ]
    listed = json.dumps(described).encode()
    data = b"".join([_LENGTH.pack(len(listed)), listed, *(array.data for _, array in arrays)])
    return ArrayRecord({_NAME: Array("uint8", (len(data),), _SERIALIZATION, data)})


def _unpack(record: ArrayRecord, what: str) -> ArrayRecord:
    """Return the arrays of a packed record, in their order.

    Raises:
        FederationError: The list cannot be read, names an array twice, or is not as long as the bytes.
    """
    data = memoryview(next(iter(record.values())).data)
    try:
        begin = _LENGTH.size + _LENGTH.unpack_from(data)[0]
        described = json.loads(bytes(data[_LENGTH.size : begin]))
        arrays: dict[str, Array] = {}
        for name, dtype, shape, serialization, length in described:
            if not isinstance(name, str) or name in arrays:
                raise ValueError(f"the name {name!r} stands twice, or is none")
            if isinstance(length, bool) or not 0 <= length <= len(data) - begin:
                raise ValueError(f"{name!r} is said to take {length} bytes, of {len(data) - begin}")
            content = bytes(data[begin : begin + length])
            arrays[name] = Array(dtype, tuple(shape), serialization, content)
            begin += length
        if begin != len(data):
            raise ValueError(f"{len(data) - begin} bytes belong to no array")
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise FederationError(
            f"the packed arrays {what!r} cannot be read: {error}. Run the same version of flower_split "
            "on every machine."
        ) from error
    return ArrayRecord(arrays)
