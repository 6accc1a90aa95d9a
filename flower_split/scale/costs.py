"""What the parts of a round cost, each measured or given: the numbers that a simulation begins with."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from flower_split.config.validation import kebab
from flower_split.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds and bytes of one client's micro-batch, and of what happens once a step or a round."""

    client_seconds: float
    """Computing of a client for one micro-batch, forward and backward, its share of the step in it."""
    trunk_seconds: float
    """Computing of the trunk for one micro-batch, forward and backward."""
    sent_bytes: float
    """Client to trunk, of one micro-batch, in frames."""
    received_bytes: float
    """Trunk to client, of one micro-batch, in frames."""
    adapter_bytes: float = 0.0
    """One client's adapter, one way."""
    trunk_adapter_bytes: float = 0.0
    """What trains of the trunk; replicas would exchange it."""
    call_seconds: float = 0.0
    """Of a call beside the link, the queue and what the trunk does: framing, digests, gRPC."""
    handling_seconds: float = 0.0
    """Of a call, what the trunk's interpreter is busy for beside computing: nobody's call computes then."""
    pass_seconds: float = 0.0
    """That every pass of the trunk takes, however many rows it has."""
    step_seconds: float = 0.0
    """An optimizer step of the trunk."""
    client_round_seconds: float = 0.0
    """A client's own, in every round, beside its steps: to take the order, join and answer."""
    server_client_seconds: float = 0.0
    """The ServerApp's, in every round, for each client of it: aggregation, records."""
    message_seconds: float = 0.0
    """Flower's and the ServerApp's, one after the other, for each message to a client and its reply."""
    round_seconds: float = 0.0
    """Of a round whatever its size: polls, checkpoint, commit."""

    def __post_init__(self) -> None:
        """Check that nothing is negative."""
        for name in cost_names():
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(
                    f"the cost {kebab(name)} must be finite and at least 0; it is {value!r}."
                )

    def changed(self, given: Sequence[str]) -> "Costs":
        """Return the costs with some of them given as ``NAME=VALUE``, names in kebab-case.

        Raises:
            ConfigError: A name is none of a cost, or a value is no number.
        """
        names = {kebab(name): name for name in cost_names()}
        changes: dict[str, float] = {}
        for item in given:
            name, equals, text = item.partition("=")
            try:
                changes[names[name.strip()]] = float(text)
            except (KeyError, ValueError):
                raise ConfigError(
                    f"--cost takes NAME=VALUE, where NAME is one of {', '.join(names)} and VALUE is in "
                    f"seconds or bytes; it is {item!r}."
                ) from None
        return replace(self, **changes)


def cost_names() -> list[str]:
    """Return the costs' names, in snake_case."""
    return [item.name for item in fields(Costs)]
