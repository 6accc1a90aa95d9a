"""The experiments of one trunk process, and the engine of each.

A trunk serves one experiment after the other with one engine (:class:`OneExperiment`), or several at once
(:mod:`flower_split.trunk.engine.several_experiments`): each has an engine of its own, and with it rounds,
sessions, weights, optimizer, budgets and checkpoints. A call finds its engine by its token, which is of one
experiment, or by the experiment that its coordinator names.
"""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Protocol

from flower_split.config.validation import Scalar
from flower_split.protocol.values import TrunkStatus
from flower_split.trunk.engine.engine import TrunkEngine

Values = Mapping[str, Scalar]
"""What a run brings: run-config keys, and their values."""


class Experiments(Protocol):
    """What the trunk's service asks for an engine. Thread-safe; only :meth:`begin` may take long."""

    maximum: int
    """Experiments at once."""

    def check_tokens(self, owner: str, name: str, tokens: Collection[str]) -> None:
        """Check, before a round begins, that its participants' tokens are of no other experiment.

        Raises:
            TrunkRefused: One is (INVALID_REQUEST).
        """

    def begin(self, owner: str, name: str, values: Values | None) -> TrunkEngine:
        """Return an experiment's engine for a round that its coordinator begins; make it if need be.

        Args:
            owner: The coordinator.
            name: Name of the experiment.
            values: What its run brings; None: nothing.

        Raises:
            TrunkRefused: There is no room for it, or it cannot be served.
        """

    def named(self, owner: str, name: str) -> TrunkEngine:
        """Return the engine of a coordinator's experiment; without a name, of its only one.

        Raises:
            TrunkRefused: It has no such experiment (WRONG_ATTEMPT).
        """

    def of_token(self, token: str) -> TrunkEngine | None:
        """Return the engine whose participant has this token; None: nobody's. Waits for no lock."""

    @property
    def knows_token(self) -> Callable[[str], bool]:
        """Return what says whether a token is a participant's of any experiment. It waits for no lock."""

    def engines(self) -> Mapping[str, TrunkEngine]:
        """Return the engines that there are now, by what logs and figures call their experiments."""

    def heard(self, owner: str, name: str) -> None:
        """Note a word of an experiment's coordinator."""

    def keep_alive(self, owner: str, name: str) -> None:
        """Note that an experiment's coordinator lives, and its open round with it."""

    def end(self, owner: str, name: str) -> None:
        """Let an experiment go whose coordinator has ended it. Idempotent."""

    def status(self, owner: str, name: str) -> TrunkStatus:
        """Return where an experiment stands; of one that is not there, where the trunk does."""

    @property
    def queue_seconds(self) -> float:
        """Return how long a call waits for the compute threads now."""


class OneExperiment:
    """One engine, for one experiment after the other.

    Args:
        engine: It.
    """

    maximum = 1

    def __init__(self, engine: TrunkEngine) -> None:
        self._engine = engine
        self._engines = MappingProxyType({"": engine})
        self.knows_token = engine.knows_token

    def check_tokens(self, owner: str, name: str, tokens: Collection[str]) -> None:
        """Do nothing: there is no other experiment."""

    def begin(self, owner: str, name: str, values: Values | None) -> TrunkEngine:
        """Return the engine, which refuses a round itself while it is at work on another experiment."""
        return self._engine

    def named(self, owner: str, name: str) -> TrunkEngine:
        """Return the engine."""
        return self._engine

    def of_token(self, token: str) -> TrunkEngine | None:
        """Return the engine, which knows its tokens itself."""
        return self._engine

    def engines(self) -> Mapping[str, TrunkEngine]:
        """Return the engine."""
        return self._engines

    def heard(self, owner: str, name: str) -> None:
        """Do nothing: the one engine stays."""

    def keep_alive(self, owner: str, name: str) -> None:
        """Tell the engine."""
        self._engine.keep_alive()

    def end(self, owner: str, name: str) -> None:
        """Do nothing: the next experiment takes its place."""

    def status(self, owner: str, name: str) -> TrunkStatus:
        """Return the engine's status."""
        return self._engine.status()

    @property
    def queue_seconds(self) -> float:
        """Return the engine's."""
        return self._engine.queue_seconds
