"""The errors this package raises; every message gives the rule, the value, the place, the remedy.

::

    FlowerSplitError
    ├── ConfigError          a run-config key or value is wrong
    ├── SplitError           the model cannot be cut as asked
    ├── DataError            the training data is missing, empty or malformed
    ├── AggregationError     client updates cannot be aggregated
    ├── CodecError           bytes from the wire do not describe a valid tensor
    ├── TrunkError           anything that goes wrong between a client and the trunk
    │   ├── TrunkUnavailable the trunk does not answer within the deadline
    │   ├── TrunkRefused     the trunk answered no; carries a RefusalReason
    │   ├── KeyLost          a client's token is for a key that it no longer has
    │   └── RoundAborted     the trunk gave the round up; nothing of it was kept
    ├── WorkerError          a node's worker cannot be had, or was lost; its ClientApp can do the work
    ├── WorkerStuck          a node's worker can be neither asked nor ended
    ├── FederationError      the federation cannot run the job (too small, no replies, all failed)
    │   └── RoundLost        a process or a connection was lost; the round may be tried again
    └── RunDirectoryError    a run directory is incomplete, damaged or not one of ours
"""

from collections.abc import Mapping
from enum import Enum


class FlowerSplitError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(FlowerSplitError):
    """A run-config key is unknown, or a value breaks its rule."""


class SplitError(FlowerSplitError):
    """The model cannot be cut as asked."""


class DataError(FlowerSplitError):
    """The training or evaluation data is missing, empty or malformed."""


class AggregationError(FlowerSplitError):
    """Client updates cannot be aggregated."""


class CodecError(FlowerSplitError):
    """Bytes from the wire do not describe a valid tensor."""


class WorkerError(FlowerSplitError):
    """A node's worker cannot be had, or was lost: the ClientApp may answer by itself."""


class WorkerStuck(FlowerSplitError):
    """A node's worker was given a message, and can now be neither asked nor ended."""


class FederationError(FlowerSplitError):
    """The federation cannot run the job: too small, no replies, or every client failed."""


class RoundLost(FederationError):
    """A round failed only because processes or connections were lost: it may be tried again.

    Args:
        message: As for any error.
        missing: Slot to node of the clients that gave no answer, or are gone.
    """

    def __init__(self, message: str, missing: Mapping[int, int] | None = None) -> None:
        super().__init__(message)
        self.missing = dict(missing or {})


class RunDirectoryError(FlowerSplitError):
    """A run directory is incomplete, damaged, or not one of ours."""


class RefusalReason(Enum):
    """Why the trunk refused a call; the values are those of the protocol's enum."""

    UNAUTHENTICATED = 1
    """The token is unknown, expired, or not allowed this call."""
    FINGERPRINT_MISMATCH = 2
    """Client and trunk do not hold parts of the same model and configuration."""
    WRONG_EPOCH = 3
    """The trunk process has restarted since the session opened."""
    WRONG_ATTEMPT = 4
    """The round or attempt named is not the one that is open."""
    STALE_VERSION = 5
    """The trunk's weights have stepped since the forward that this call belongs to."""
    DIGEST_MISMATCH = 6
    """The same contribution key came with other content."""
    UNKNOWN_SESSION = 7
    """No such session: never opened, closed, or its lease ended."""
    UNKNOWN_CONTRIBUTION = 8
    """A backward without its forward."""
    NON_FINITE = 9
    """NaN or Inf in the smashed data, the incoming gradient, or a parameter gradient."""
    DROPPED = 10
    """The window closed without this client; it may join the next round."""
    OVER_BUDGET = 11
    """The activation cache is full."""
    INVALID_REQUEST = 12
    """The request breaks the protocol: shapes, dtypes, indices, weights."""
    NO_ROUND = 13
    """No round is open."""
    NO_CHECKPOINT = 14
    """The trunk does not have, and cannot restore, the weights that a round begins with."""
    UNKNOWN_CACHE = 15
    """The trunk holds no such key-value cache: never begun, released, or its lease ended."""


class TrunkError(FlowerSplitError):
    """Something went wrong between a client (or the coordinator) and the trunk."""


class TrunkUnavailable(TrunkError):
    """The trunk does not answer within the deadline."""


class TrunkRefused(TrunkError):
    """The trunk answered no.

    Args:
        reason: The typed reason; code branches on this, never on the text.
        message: What a person needs: the rule, the value, the place, the remedy.
    """

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["TrunkRefused"], tuple[RefusalReason, str]]:
        """Pickle with both arguments, so that the error survives a process boundary."""
        return type(self), (self.reason, str(self))


class KeyLost(TrunkError):
    """A client's token is for a key that it no longer has."""


class RoundAborted(TrunkError):
    """The trunk gave the round up; its weights are those of the round's beginning."""
