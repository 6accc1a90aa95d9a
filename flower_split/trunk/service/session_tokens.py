"""Which token opened which session."""

import threading
from collections import OrderedDict
from collections.abc import Callable

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.trunk.service.handlers import Context, same_token, token_of

_MAX_SESSIONS = 4096  # whose tokens are remembered; those of the latest rounds


class SessionTokens:
    """The tokens of the latest sessions. Thread-safe.

    Args:
        epoch: Of this trunk process.
    """

    def __init__(self, epoch: Callable[[], int]) -> None:
        self._epoch = epoch
        self._tokens: OrderedDict[str, str] = OrderedDict()  # by session, oldest first
        self._lock = threading.Lock()

    def remember(self, session: str, token: str) -> None:
        """``token`` opened ``session``."""
        with self._lock:
            self._tokens[session] = token
            self._tokens.move_to_end(session)
            while len(self._tokens) > _MAX_SESSIONS:
                self._tokens.popitem(last=False)

    def check(self, context: Context, session: str, epoch: int) -> None:
        """Refuse a call whose session was not opened in this process with the call's own token.

        Raises:
            TrunkRefused: WRONG_EPOCH, UNKNOWN_SESSION or UNAUTHENTICATED.
        """
        if epoch != self._epoch():
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
        if not same_token(token_of(context), expected):
            raise TrunkRefused(
                RefusalReason.UNAUTHENTICATED,
                "the token of this call is not the one that opened its session.",
            )
