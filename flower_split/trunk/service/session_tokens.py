"""The token that opened each session, so that nobody else uses it."""

import hmac
import threading
from collections import OrderedDict

from flower_split.errors import RefusalReason, TrunkRefused

_MAX_SESSIONS = 4096  # whose tokens are remembered; those of the latest rounds


class SessionTokens:
    """The tokens of the latest sessions. Thread-safe: a lock of its own, taken last."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[str, str] = OrderedDict()  # by session, oldest first
        self._lock = threading.Lock()

    def remember(self, session: str, token: str) -> None:
        """Note that ``token`` opened ``session``."""
        with self._lock:
            self._tokens[session] = token
            self._tokens.move_to_end(session)
            while len(self._tokens) > _MAX_SESSIONS:
                self._tokens.popitem(last=False)

    def check(self, token: str, session: str, epoch: int, trunk_epoch: int) -> None:
        """Refuse a call whose session was not opened in this process with the call's own token.

        Args:
            token: Of the call.
            session: That it names.
            epoch: That it names.
            trunk_epoch: Of this process.

        Raises:
            TrunkRefused: WRONG_EPOCH, UNKNOWN_SESSION or UNAUTHENTICATED.
        """
        if epoch != trunk_epoch:
            raise TrunkRefused(
                RefusalReason.WRONG_EPOCH,
                "the trunk has restarted since this session opened; what the session had "
                "contributed is gone. Leave this round; the next one opens a new session.",
            )
        with self._lock:
            expected = self._tokens.get(session)
        if expected is None:
            raise TrunkRefused(
                RefusalReason.UNKNOWN_SESSION,
                "the trunk knows no such session: it was never opened, or belongs to a round long "
                "past. Open a session for every round.",
            )
        if not same_token(token, expected):
            raise TrunkRefused(
                RefusalReason.UNAUTHENTICATED,
                "the token of this call is not the one that opened its session.",
            )


def same_token(given: str, expected: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), expected.encode())
