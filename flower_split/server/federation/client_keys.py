"""The keys that clients' tokens are bound to, as the clients told them through Flower."""

from collections.abc import Mapping
from types import MappingProxyType

from flwr.app import Message

from flower_split.messages.client_facts import ClientFacts
from flower_split.wire.possession import new_token


def key_notes(facts: Mapping[int, ClientFacts]) -> list[str]:
    """Return a sentence that names the clients which told no key; nothing where each told one.

    Args:
        facts: Partition to what each client said of itself.
    """
    without = [str(slot) for slot, item in sorted(facts.items()) if not item.public_key]
    if not without:
        return []
    return [
        f"Partitions {', '.join(without)} told no key in the handshake, so whoever sees one of their "
        "tokens can use it until its round ends. Upgrade flower-split on their machines; if it is "
        "this version, somebody on the way has taken the key out."
    ]


class ClientKeys:
    """Makes the clients' tokens, each for the key that its client told last.

    Args:
        public_keys: By partition; a client without one gets tokens that are their bearer's.
    """

    def __init__(self, public_keys: Mapping[int, bytes] = MappingProxyType({})) -> None:
        self._public_keys = dict(public_keys)

    def new_token(self, partition_id: int) -> str:
        """Return a new token for a client."""
        return new_token(self._public_keys.get(partition_id, b""))

    def learn(self, partition_id: int, reply: Message) -> None:
        """Note the key in a client's answer to a handshake, which may be another than before.

        Raises:
            FederationError: The answer is not what this version's ClientApp sends.
        """
        self._public_keys[partition_id] = ClientFacts.read(reply).public_key
