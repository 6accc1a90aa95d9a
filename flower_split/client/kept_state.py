"""What stays with its client from round to round: weights of the adapter, its optimizer's state."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flower_split.runs.private_factors import OPTIMIZER, PERSONAL, PrivateFolder


@dataclass(frozen=True, slots=True)
class KeptState:
    """What stays with this client, and where it is."""

    names: frozenset[str] = frozenset()  # of the adapter's weights that do
    digest: str = ""  # of what it kept in its last committed round; empty: it has nothing yet
    folder: PrivateFolder | None = None  # None: it keeps nothing
    keeps_optimizer: bool = False
    keeps_personal: bool = False  # the adapter as it was trained, before it was averaged

    @property
    def values(self) -> dict[str, Tensor]:
        """Its own weights by name; empty: it begins with those in the message."""
        if not self.names:
            return {}
        apart = (OPTIMIZER, PERSONAL)
        return {name: v for name, v in self._read().items() if not name.startswith(apart)}

    @property
    def personal(self) -> dict[str, Tensor]:
        """The adapter as its last committed training left it; empty: it has not trained."""
        found = self._read().items()
        return {n.removeprefix(PERSONAL): v for n, v in found if n.startswith(PERSONAL)}

    @property
    def optimizer_state(self) -> dict[str, Tensor] | None:
        """With what its optimizer goes on; empty: it begins; None: it begins anew every round."""
        if not self.keeps_optimizer:
            return None
        found = self._read().items()
        return {n.removeprefix(OPTIMIZER): v for n, v in found if n.startswith(OPTIMIZER)}

    def write(
        self, state: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor], server_round: int
    ) -> str:
        """Keep the round's values; return their digest, empty where nothing is kept.

        They become this client's own only if the round is committed: the next order then names this
        digest, and the one before otherwise.
        """
        if self.folder is None:
            return ""
        own = {name: state[name] for name in self.names}
        own |= {OPTIMIZER + name: value for name, value in optimizer_state.items()}
        if self.keeps_personal:
            own |= {PERSONAL + name: value for name, value in state.items()}
        return self.folder.write(own, server_round=server_round, base=self.digest)

    def _read(self) -> dict[str, Tensor]:
        return self.folder.read(self.digest) if self.folder is not None and self.digest else {}


NOTHING_KEPT = KeptState()
