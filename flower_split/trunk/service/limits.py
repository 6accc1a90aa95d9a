"""What the calls of one client may take at once; the trunk's own configuration says it."""

from dataclasses import dataclass

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.trunk.service.pacing import PARTICIPANT, Rate

_LEAST_UNREAD = 8  # replies under way, however few calls a session may have


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Past one of them, a call is refused by its key, and no other client loses anything."""

    calls: int = 32  # trunk.max-calls-in-flight
    call_bytes: int = (
        1 << 30
    )  # trunk.call-memory-per-client: of their tensors, as announced and decoded
    call_positions: int = 1 << 18  # trunk.max-call-positions: rows x positions of each
    first_frame_seconds: float = 20.0  # trunk.first-frame-timeout: until a call says what it is
    connections: int = 512  # trunk.max-connections: of everybody
    stream_window: int = 1 << 17  # trunk.stream-window: bytes of a call that nobody has read
    refusals: Rate = PARTICIPANT  # how fast a session's calls are refused

    def over_calls(self) -> TrunkRefused:
        """Return the refusal of a call too many."""
        return _over(
            f"a client may have {self.calls} calls in progress (trunk.max-calls-in-flight); this one "
            "has as many. Lower train.micro-batches-in-flight, or raise the key at the trunk."
        )

    @property
    def unread(self) -> int:
        """Return how many replies may be under way; the end of one is noted a little late."""
        return max(_LEAST_UNREAD, self.calls)

    def over_unread(self) -> TrunkRefused:
        """Return the refusal of a client that does not read its replies."""
        return _over(
            f"a client may leave {self.unread} replies unread (trunk.max-calls-in-flight); this one has as "
            "many. Read them first."
        )

    def over_bytes(self, held: int, num_bytes: int) -> TrunkRefused:
        """Return the refusal of a call with too many bytes beside those of its client's others."""
        return _over(
            f"the calls in progress of a client may hold {self.call_bytes} bytes of tensors "
            f"(trunk.call-memory-per-client); this one's hold {held}, and its next call has "
            f"{num_bytes}. Lower train.batch-size or train.micro-batches-in-flight."
        )

    def over_positions(self, rows: int, positions: int) -> TrunkRefused:
        """Return the refusal of a call that is too large."""
        return _over(
            f"a call may have {self.call_positions} rows x positions (trunk.max-call-positions); this "
            f"one has {rows} x {positions}. Send smaller batches, or raise the key at the trunk."
        )


def over_refusals() -> TrunkRefused:
    """Return the refusal of a client that was refused too often a moment ago."""
    return _over(
        "too many calls of this client were refused a moment ago, so its next ones are refused unread. "
        "Correct what its log names, and let it try again in some seconds."
    )


def over_checks() -> TrunkRefused:
    """Return the refusal of a health check too many."""
    return _over("too many health checks were made a moment ago; ask again in some seconds.")


def _over(message: str) -> TrunkRefused:
    return TrunkRefused(RefusalReason.OVER_BUDGET, message)
