"""Status codes and errors of the trunk's protocol, in both directions.

====================  ==================================================  =================
raised at the trunk   status code                                         raised at the client
====================  ==================================================  =================
TrunkRefused          FAILED_PRECONDITION (UNAUTHENTICATED, INVALID_    TrunkRefused, same reason
                      ARGUMENT and RESOURCE_EXHAUSTED for those three
                      reasons), with the typed ``Refusal`` in the
                      trailing metadata
RoundAborted          ABORTED                                             RoundAborted
TrunkUnavailable      DEADLINE_EXCEEDED                                   retried, TrunkUnavailable
TrunkBusy             UNAVAILABLE                                         retried, TrunkUnavailable
CodecError            INVALID_ARGUMENT                                    TrunkRefused
anything else         INTERNAL, with the id of the trunk's log entry      TrunkError
====================  ==================================================  =================

Only UNAVAILABLE and DEADLINE_EXCEEDED are retried, with the same bytes: every call names what it is
about, so the trunk recognises a repetition.
"""

from typing import cast

import grpc

from flower_split.errors import (
    CodecError,
    FlowerSplitError,
    RefusalReason,
    RoundAborted,
    TrunkError,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.proto import trunk_pb2 as pb

REFUSAL_KEY = "flower-split-refusal-bin"
_MAX_DETAILS = 2000  # characters; trailing metadata as a whole may have 8 KiB


class TrunkBusy(TrunkError):
    """The trunk has no worker free for a call that may wait; the client tries again."""


def status_of(error: FlowerSplitError) -> tuple[grpc.StatusCode, str, pb.Refusal | None]:
    """Return the status code, its text, and the typed refusal if ``error`` is one."""
    text = str(error)[:_MAX_DETAILS]
    if isinstance(error, TrunkRefused):
        code = {
            RefusalReason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
            RefusalReason.OVER_BUDGET: grpc.StatusCode.RESOURCE_EXHAUSTED,
            RefusalReason.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
        }.get(error.reason, grpc.StatusCode.FAILED_PRECONDITION)
        reason = pb.Refusal.Reason.Name(error.reason.value)
        return code, text, pb.Refusal(reason=reason, message=text)
    if isinstance(error, RoundAborted):
        return grpc.StatusCode.ABORTED, text, None
    if isinstance(error, TrunkBusy):
        return grpc.StatusCode.UNAVAILABLE, text, None
    if isinstance(error, TrunkUnavailable):
        return grpc.StatusCode.DEADLINE_EXCEEDED, text, None
    if isinstance(error, CodecError):
        return grpc.StatusCode.INVALID_ARGUMENT, text, None
    return grpc.StatusCode.INTERNAL, text, None


def error_of(error: grpc.RpcError, what: str) -> TrunkError:
    """Return the error that a status which is not retried stands for.

    Args:
        error: From the call.
        what: The call and the address, for the message.
    """
    code, text = failed_call(error).code(), failed_call(error).details()
    refusal = _refusal(error)
    if refusal is not None:
        return refusal
    if code is grpc.StatusCode.ABORTED:
        return RoundAborted(text)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return TrunkRefused(RefusalReason.UNAUTHENTICATED, text)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return TrunkRefused(RefusalReason.INVALID_REQUEST, text)
    if code is grpc.StatusCode.CANCELLED:
        return TrunkUnavailable(
            f"{what} was cut off: {text}. The trunk or the connection has ended."
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return TrunkError(
            f"{what}: the server there is not a trunk of this protocol version ({text}). Run the "
            "same version of flower-split on both sides, and check trunk.address."
        )
    return TrunkError(f"{what} failed with {code.name}: {text}")


def failed_call(error: grpc.RpcError) -> grpc.Call:
    """Return ``error`` as the call itself, which it is, though grpc's types do not say so."""
    return cast(grpc.Call, error)


def _refusal(error: grpc.RpcError) -> TrunkRefused | None:
    for key, value in failed_call(error).trailing_metadata() or ():
        if key == REFUSAL_KEY and isinstance(value, bytes):
            refusal = pb.Refusal.FromString(value)
            known = {reason.value: reason for reason in RefusalReason}
            reason = known.get(refusal.reason, RefusalReason.INVALID_REQUEST)
            return TrunkRefused(reason, refusal.message)
    return None
