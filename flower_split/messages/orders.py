"""What the ServerApp tells a client: orders, and queries before the first round.

An order travels as keys in the one ConfigRecord of the message that an inner strategy has written
(:mod:`flower_split.messages.carrier`), so a strategy or a mod of Flower's sees what it always sees.
Several writers add to one message: the inner strategy what its method asks of a client, the strategy
around it how the trunk is reached. ``write`` therefore adds what is set and leaves the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from flwr.app import ArrayRecord, RecordDict

from flower_split.errors import FederationError
from flower_split.messages import keys
from flower_split.messages.carrier import Fields, Value, merged, stamped

_HANDSHAKE, _BASE_VALUES = "handshake", "base-values"  # purposes of a query


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkOrder:
    """How one client reaches the trunk in one phase."""

    address: str  # host:port as the clients see it
    token: str = field(repr=False)  # of this client and this phase
    server_round: int  # from 1; 0: the evaluation before round 1
    root_certificates: str = field(default="", repr=False)  # PEM text; empty: plain text, loopback
    attempt: int = 0  # of the phase; a lost one is tried again under the next number
    experiment: str = ""  # the run's name, the same when it is resumed

    def values(self) -> dict[str, Value]:
        """Return the keys that travel."""
        return {
            keys.TRUNK_ADDRESS: self.address,
            keys.TRUNK_TOKEN: self.token,
            keys.TRUNK_CERTIFICATES: self.root_certificates,
            keys.SERVER_ROUND: self.server_round,
            keys.ATTEMPT: self.attempt,
            keys.EXPERIMENT: self.experiment,
        }

    @classmethod
    def of(cls, fields: Fields) -> Self:
        """Return the trunk's part of an order."""
        return cls(
            address=fields.text(keys.TRUNK_ADDRESS),
            token=fields.text(keys.TRUNK_TOKEN),
            root_certificates=fields.text(keys.TRUNK_CERTIFICATES),
            server_round=fields.count(keys.SERVER_ROUND),
            attempt=fields.count(keys.ATTEMPT),
            experiment=fields.text(keys.EXPERIMENT),
        )


NO_TRUNK = TrunkOrder(address="", token="", server_round=0)
"""Stands in an order until the strategy has opened the trunk's round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivateOrder:
    """What stays with the client, weights or its optimizer's state, and from which it goes on."""

    names: tuple[str, ...]  # of the adapter's weights that do, sorted
    digest: str = ""  # of its values after its last committed round; empty: it has none yet
    folder: str = ""  # where a simulated client keeps them, unless its node config says otherwise
    optimizer: bool = False  # whether its optimizer goes on from the last committed round's state
    personal: bool = False  # whether it keeps what it trained, and evaluates that as well

    def values(self) -> dict[str, Value]:
        """Return the keys that travel."""
        return {
            keys.PRIVATE_NAMES: list(self.names),
            keys.PRIVATE_DIGEST: self.digest,
            keys.PRIVATE_FOLDER: self.folder,
            keys.KEEPS_OPTIMIZER: self.optimizer,
            **({keys.KEEPS_PERSONAL: True} if self.personal else {}),
        }

    @classmethod
    def of(cls, fields: Fields) -> Self | None:
        """Return the private part of an order; None where everything is shared."""
        if not fields.has(keys.PRIVATE_NAMES):
            return None
        return cls(
            names=fields.names(keys.PRIVATE_NAMES),
            digest=fields.text(keys.PRIVATE_DIGEST),
            folder=fields.text(keys.PRIVATE_FOLDER),
            optimizer=fields.flag(keys.KEEPS_OPTIMIZER),
            personal=fields.flag(keys.KEEPS_PERSONAL),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseOrder:
    """What a client is told in a phase of either kind; see the subclasses."""

    trunk: TrunkOrder = NO_TRUNK
    base_change: ArrayRecord | None = None  # what the method adds to the frozen base weights
    private: PrivateOrder | None = None

    def write(self, content: RecordDict) -> RecordDict:
        """Return a copy of ``content`` that carries this order.

        A field at its default leaves what ``content`` says already. The adapter is not part of the
        order: it is the message's one ArrayRecord, written by the inner strategy.
        """
        copied = merged(content, self._values())
        if self.base_change is not None:
            copied[keys.BASE_CHANGE] = self.base_change
        return copied

    def _values(self) -> dict[str, Value]:
        values: dict[str, Value] = {}
        if self.trunk != NO_TRUNK:
            values |= self.trunk.values()
        if self.private is not None:
            values |= self.private.values()
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOrder(PhaseOrder):
    """What a client is told when it shall evaluate the adapter in the message."""

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Read the order of a message.

        Raises:
            FederationError: It names no trunk, or was written by another version.
        """
        fields = _fields_with_trunk(content, "an evaluation order")
        return cls(
            trunk=TrunkOrder.of(fields),
            base_change=content.array_records.get(keys.BASE_CHANGE),
            private=PrivateOrder.of(fields),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOrder(PhaseOrder):
    """What a client is told when it shall train the adapter in the message for a round."""

    data_pass: int = 0  # 1-based count of this client's training messages; 0: the server round
    trainable: tuple[str, ...] | None = None  # names of the weights that train, sorted; None: all
    wants_weight_norms: bool = False  # the reply shall hold the norms of the modules with DoRA
    rate_factor: float = 1.0  # on the client's learning rate
    proximal_mu: float = 0.0  # FedProx's μ, as Flower's strategy sends it; 0: it sends none

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Read the order of a message; raises as :meth:`EvaluateOrder.read` does."""
        fields = _fields_with_trunk(content, "a training order")
        trains_all = not fields.has(keys.TRAINABLE)
        return cls(
            trunk=TrunkOrder.of(fields),
            base_change=content.array_records.get(keys.BASE_CHANGE),
            private=PrivateOrder.of(fields),
            data_pass=fields.count(keys.DATA_PASS, 0),
            trainable=None if trains_all else fields.names(keys.TRAINABLE),
            wants_weight_norms=fields.flag(keys.WANTS_WEIGHT_NORMS),
            rate_factor=fields.number(keys.RATE_FACTOR, 1.0),
            proximal_mu=fields.number(keys.PROXIMAL_MU, 0.0),
        )

    def _values(self) -> dict[str, Value]:
        values = PhaseOrder._values(self)
        if self.data_pass:
            values[keys.DATA_PASS] = self.data_pass
        if self.trainable is not None:
            values[keys.TRAINABLE] = list(self.trainable)
        if self.wants_weight_norms:
            values[keys.WANTS_WEIGHT_NORMS] = True
        if self.rate_factor != 1.0:
            values[keys.RATE_FACTOR] = self.rate_factor
        if self.proximal_mu:
            values[keys.PROXIMAL_MU] = self.proximal_mu
        return values


def _fields_with_trunk(content: RecordDict, what: str) -> Fields:
    fields = Fields.find(content, what)
    if fields is None or not fields.has(keys.TRUNK_TOKEN):
        raise FederationError(
            f"{what} does not say where the trunk is. The ServerApp must use "
            "flower_split.server.trunk_strategy.TrunkStrategy around its strategy, in the version of "
            "flower_split that the clients run."
        )
    return fields


def sent_adapter(content: RecordDict) -> ArrayRecord:
    """Return the adapter in an order's message: its one ArrayRecord beside the base change.

    Raises:
        FederationError: There is none, or more than one.
    """
    records = [r for name, r in content.array_records.items() if name != keys.BASE_CHANGE]
    if len(records) != 1:
        raise FederationError(
            f"a message must carry one ArrayRecord; it carries {len(records)}. Use an inner "
            "strategy of flwr.serverapp.strategy."
        )
    return records[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class HandshakeOrder:
    """Asks a client what it holds; it answers with its facts."""

    def write(self) -> RecordDict:
        """Return the content of the query."""
        return _query({keys.PURPOSE: _HANDSHAKE})


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseValuesOrder:
    """Asks a client for values with which its adapter begins as the base weights say."""

    names: tuple[str, ...]  # of the values

    def write(self) -> RecordDict:
        """Return the content of the query."""
        return _query({keys.PURPOSE: _BASE_VALUES, keys.NAMES: list(self.names)})


def read_query(content: RecordDict) -> HandshakeOrder | BaseValuesOrder:
    """Read what a query asks for.

    Raises:
        FederationError: It asks for something else, or was written by another version.
    """
    fields = Fields.of(content, "a query")
    purpose = fields.text(keys.PURPOSE)
    if purpose == _HANDSHAKE:
        return HandshakeOrder()
    if purpose == _BASE_VALUES:
        return BaseValuesOrder(names=fields.names(keys.NAMES))
    raise FederationError(
        f"a query must ask for {_HANDSHAKE} or {_BASE_VALUES}; it asks for {purpose!r}. Run the same "
        "version of flower_split on every machine."
    )


def _query(values: Mapping[str, Value]) -> RecordDict:
    return RecordDict({keys.CONFIG: stamped(values)})
