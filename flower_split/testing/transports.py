"""The contract of a transport, checked on a trunk that serves and on one that is not there."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from flower_split.errors import TrunkError, TrunkRefused, TrunkUnavailable
from flower_split.proto import trunk_pb2 as pb
from flower_split.testing.failures import ConformanceError, require, require_refusal
from flower_split.wire.receiving import Incoming
from flower_split.wire.sending import Outgoing
from flower_split.wire.transport import Transport

_GRACE = 5.0  # seconds that an answer may take beyond its time, on a busy machine
_CALLS = 8


class _OwnError(Exception):
    """Raised by the reader of a reply."""


def check_transport(transport: Transport, nobody: Transport, *, timeout: float) -> None:
    """Check that a transport keeps the contract of :class:`flower_split.wire.transport.Transport`.

    Both transports are closed at the end.

    Args:
        transport: To a trunk that serves, with the coordinator's token; no round is open.
        nobody: To an address at which no trunk is.
        timeout: Seconds that one call of ``nobody`` may take, retries included.

    Raises:
        ConformanceError: It breaks its contract; the first broken clause is named.
    """
    subject = f"transport {type(transport).__name__}"
    try:
        _check_answers(transport, subject)
        _check_refusals(transport, subject)
        _check_absence(nobody, subject, timeout)
    finally:
        for one in (transport, nobody):
            one.close()
            one.close()  # which must be idempotent
    require_refusal(
        lambda: _status(transport), TrunkError, subject, "refuse calls after close() (TrunkError)"
    )


def _status(transport: Transport) -> pb.StatusReply:
    return transport.unary("Status", pb.StatusRequest(), pb.StatusReply)


def _forward(transport: Transport) -> bytes:
    """Make a forward of no session, of several frames."""
    header = pb.Header(forward=pb.ForwardHeader(session="of nobody", mode="EVALUATE"))
    message = Outgoing(header, {"hidden_states": torch.zeros(1, 1 << 10, 1 << 9)})
    return transport.stream("Forward", message, b"".join)


def _check_answers(transport: Transport, subject: str) -> None:
    first = _status(transport)
    with ThreadPoolExecutor(_CALLS) as threads:
        answers = list(threads.map(lambda _: _status(transport).trunk_epoch, range(_CALLS)))
    require(
        answers == [first.trunk_epoch] * _CALLS and first.trunk_epoch != 0,
        subject,
        "answer calls of several threads at once with the trunk's replies",
    )
    frames = transport.download("GetAdapter", pb.GetAdapterRequest(), list)
    require(
        bool(frames) and Incoming(iter(frames)).header.HasField("reply"),
        subject,
        "give the reader of download() the reply's frames in order",
    )


def _check_refusals(transport: Transport, subject: str) -> None:
    require_refusal(
        lambda: _forward(transport),
        TrunkRefused,
        subject,
        "raise TrunkRefused where the trunk answers no to frames",
    )
    require_refusal(
        lambda: transport.unary("NoSuchMethod", pb.StatusRequest(), pb.StatusReply),
        TrunkError,
        subject,
        "raise a TrunkError for a method that the trunk does not have",
    )

    def failing(frames: Iterator[bytes]) -> None:
        next(frames)
        raise _OwnError

    try:
        transport.download("GetAdapter", pb.GetAdapterRequest(), failing)
    except _OwnError:
        return
    except Exception as error:  # whatever comes instead is the finding
        raise ConformanceError(
            f"{subject} must let through what the reader of a reply raises; it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    raise ConformanceError(f"{subject} must let through what the reader of a reply raises.")


def _check_absence(nobody: Transport, subject: str, timeout: float) -> None:
    began = time.monotonic()
    require_refusal(
        lambda: _status(nobody),
        TrunkUnavailable,
        subject,
        "raise TrunkUnavailable where no trunk answers",
    )
    seconds = time.monotonic() - began
    require(
        seconds < timeout + _GRACE,
        subject,
        f"give up within its timeout of {timeout:g} s; it took {seconds:.1f} s",
    )
