"""Weights of the adapter that stay with their client, from round to round."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flower_split.runs.private_factors import PrivateFolder


@dataclass(frozen=True, slots=True)
class KeptFactors:
    """Which weights stay with this client, and where they are."""

    names: frozenset[str] = frozenset()
    digest: str = ""  # of its values after its last committed round; empty: it has none yet
    folder: PrivateFolder | None = None  # None: it keeps nothing

    @property
    def values(self) -> dict[str, Tensor]:
        """Its own values by name; empty: it begins with those in the message."""
        return self.folder.read(self.digest) if self.folder is not None and self.digest else {}

    def write(self, state: Mapping[str, Tensor], server_round: int) -> str:
        """Keep the round's values; return their digest, empty where nothing is kept.

        They become this client's own only if the round is committed: the next order then names this
        digest, and the one before otherwise.
        """
        if self.folder is None:
            return ""
        own = {name: state[name] for name in self.names}
        return self.folder.write(own, server_round=server_round, base=self.digest)


NOTHING_KEPT = KeptFactors()
