"""What the trunk keeps between a micro-batch's forward and its backward, within a byte budget.

``graph`` keeps the autograd graph. Where that would pass the budget, ``recompute`` keeps only the
inputs and runs the forward again, with the same weights version and dropout seed, so that the
gradient is the same. Where even the inputs do not fit, the call is refused: nothing is evicted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import ActivationReport

Key = tuple[int, int, int]  # slot, window, micro-batch


@dataclass(slots=True)
class Activation:
    """One micro-batch between forward and backward."""

    version: int
    num_bytes: int
    hidden: Tensor  # the leaf that receives smashed_grad
    output: Tensor | None  # trunk_output with its graph; None: recompute
    recompute: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor] | None = None  # that it computed with; None: the trunk's own


class ActivationCache:
    """Activations by key, in at most ``budget`` bytes.

    Args:
        budget: Bytes over all clients.
        per_client: Bytes of one client; 0: an equal share (:meth:`begin`).
    """

    def __init__(self, budget: int, per_client: int = 0) -> None:
        self.budget = budget
        self.per_client = per_client or budget
        self._limit = per_client
        self.num_bytes = 0
        self._peak = self._recomputes = self._refusals = 0
        self._of_slot: dict[int, int] = {}  # bytes
        self._entries: dict[Key, Activation] = {}
        self._held: dict[Key, int] = {}  # bytes of micro-batches whose activation is joint

    def report(self) -> ActivationReport:
        """Return the cache's figures since :meth:`clear`."""
        return ActivationReport(
            num_bytes=self.num_bytes,
            peak_bytes=self._peak,
            budget_bytes=self.budget,
            recomputes=self._recomputes,
            refusals=self._refusals,
        )

    def require_room(self, slot: int, num_bytes: int) -> None:
        """Refuse a forward whose input alone does not fit, before anything is computed.

        Raises:
            TrunkRefused: The budget is used up (OVER_BUDGET).
        """
        if self._fits(slot, num_bytes):
            return
        self._refusals += 1
        own = self._of_slot.get(slot, 0)
        of = f"slot {slot} keeps {own} bytes of activations of its {self.per_client}"
        if own + num_bytes <= self.per_client:
            of = f"the trunk keeps {self.num_bytes} bytes of activations of its {self.budget}"
        raise TrunkRefused(
            RefusalReason.OVER_BUDGET,
            f"{of}, and this micro-batch of slot {slot} needs {num_bytes} more even without its "
            "graph. Raise trunk.activation-memory or trunk.activation-memory-per-client, or lower "
            "train.batch-size or train.micro-batches-in-flight.",
        )

    def _fits(self, slot: int, num_bytes: int) -> bool:
        own = self._of_slot.get(slot, 0)
        return self.num_bytes + num_bytes <= self.budget and own + num_bytes <= self.per_client

    def put(self, key: Key, activation: Activation) -> None:
        """Keep ``activation``, without its graph if the graph does not fit.

        Raises:
            TrunkRefused: Not even its input fits (OVER_BUDGET).
        """
        slot = key[0]
        if not self._fits(slot, activation.num_bytes):
            activation.output = None
            activation.hidden = activation.hidden.detach()
            activation.num_bytes = activation.hidden.nbytes
            self.require_room(slot, activation.num_bytes)
            self._recomputes += 1
        self.num_bytes += activation.num_bytes
        self._peak = max(self._peak, self.num_bytes)
        self._of_slot[slot] = self._of_slot.get(slot, 0) + activation.num_bytes
        self._entries[key] = activation

    def reserve(self, key: Key, num_bytes: int) -> None:
        """Hold room for a micro-batch that will be part of a joint pass.

        Raises:
            TrunkRefused: There is none (OVER_BUDGET).
        """
        self.require_room(key[0], num_bytes)
        self.hold(key, num_bytes)

    def hold(self, key: Key, num_bytes: int) -> None:
        """Count a micro-batch in a joint pass as so many bytes from now on."""
        change = num_bytes - self._held.get(key, 0)
        self._held[key] = num_bytes
        self.num_bytes += change
        self._peak = max(self._peak, self.num_bytes)
        self._of_slot[key[0]] = self._of_slot.get(key[0], 0) + change

    def put_joint(self, shares: Mapping[Key, float], activation: Activation) -> None:
        """Keep the activation of a joint pass, without its graph if the graph does not fit.

        Args:
            shares: The share of each micro-batch; each has reserved what it needs without the graph.
            activation: The activation of the pass.
        """
        wanted = {
            key: max(self._held.get(key, 0), int(share * activation.num_bytes))
            for key, share in shares.items()
        }
        more = {key: num_bytes - self._held.get(key, 0) for key, num_bytes in wanted.items()}
        fits = self.num_bytes + sum(more.values()) <= self.budget and all(
            self._of_slot.get(key[0], 0) + extra <= self.per_client for key, extra in more.items()
        )
        if not fits:
            activation.output = None
            activation.hidden = activation.hidden.detach()
            self._recomputes += len(shares)
            return
        for key, num_bytes in wanted.items():
            self.hold(key, num_bytes)

    def keys(self) -> set[Key]:
        """Return what is kept."""
        return self._entries.keys() | self._held.keys()

    def get(self, key: Key) -> Activation | None:
        """Return the activation of ``key``, which stays."""
        return self._entries.get(key)

    def release(self, key: Key) -> None:
        """Free the activation of ``key``: its backward is done."""
        entry = self._entries.pop(key, None)
        held = self._held.pop(key, 0) + (0 if entry is None else entry.num_bytes)
        if held:
            self.num_bytes -= held
            self._of_slot[key[0]] -= held

    def release_slot(self, slot: int) -> None:
        """Free all that a client that has left kept here."""
        for key in [key for key in self.keys() if key[0] == slot]:
            self.release(key)

    def release_before(self, window: int) -> None:
        """Free what earlier windows left behind: the weights have stepped, nobody can use it."""
        for key in [key for key in self.keys() if key[1] < window]:
            self.release(key)

    def begin(self, num_shares: int) -> None:
        """Begin a round: free everything and divide the budget.

        Args:
            num_shares: In how many parts the budget is divided where clients have no limit of
                their own, so that one that never comes back cannot take what others need.
        """
        self.clear()
        self.per_client = self._limit or self.budget // num_shares

    def clear(self) -> None:
        """Free everything: a round is over."""
        self._entries.clear()
        self._held.clear()
        self._of_slot.clear()
        self.num_bytes = self._peak = self._recomputes = self._refusals = 0
