"""How one node reaches the trunk: what of it is this machine's own, by its node config."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from flower_split.config import TrunkConfig
from flower_split.config.validation import ENVIRONMENT, check_address, check_proxy
from flower_split.errors import ConfigError, KeyLost
from flower_split.messages.orders import TrunkOrder
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.possession import ClientKey, key_of

logger = logging.getLogger(__name__)

_ADDRESS, _PROXY = "trunk-address", "trunk-proxy"  # of the node config


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRoute:
    """A node's own part of the way to the trunk; each at its default: as the run says."""

    address: str = ""  # host:port of the trunk as seen from here; empty: what the ServerApp sends
    proxy: str = ENVIRONMENT  # as trunk.proxy
    certificate: ClientCertificate = NO_CERTIFICATE  # shown over TLS
    key: ClientKey | None = None  # of the run; its public half went to the ServerApp

    @classmethod
    def of(
        cls,
        trunk: TrunkConfig,
        node_config: Mapping[str, object],
        key: ClientKey | None = None,
    ) -> "NodeRoute":
        """Return what the node config says, or else the run.

        Args:
            trunk: What the run says.
            node_config: The node's own.
            key: This node's key for this run.

        Raises:
            ConfigError: An address or a proxy is none, or only one file of a certificate is named.
        """
        address, proxy = (_text(node_config, key) for key in (_ADDRESS, _PROXY))
        if address:
            check_address(f"{_ADDRESS} in this node's --node-config", address)
        if proxy:
            check_proxy(f"{_PROXY} in this node's --node-config", proxy)
        return cls(
            address=address,
            proxy=proxy or trunk.proxy,
            certificate=ClientCertificate.of(trunk, node_config),
            key=key,
        )

    def address_of(self, order: TrunkOrder) -> str:
        """Return where the trunk of an order is, seen from this node."""
        if self.address and self.address != order.address:
            logger.info(
                "the trunk is reached at %s (%s of the node config); the ServerApp named %s",
                self.address,
                _ADDRESS,
                order.address,
            )
        return self.address or order.address

    def key_of(self, order: TrunkOrder) -> ClientKey | None:
        """Return what calls with an order's token prove themselves with; None: it needs no proof.

        Raises:
            KeyLost: The token was made for another key.
        """
        if not key_of(order.token):
            return None
        if self.key is None or not self.key.holds(order.token):
            raise KeyLost(
                f"round {order.server_round}: this client's token is for a key that it made before its "
                "SuperNode started again, and Flower keeps such keys in the SuperNode's memory alone. "
                "The ServerApp asks for the new one."
            )
        return self.key


def _text(node_config: Mapping[str, object], key: str) -> str:
    value = node_config.get(key) or ""
    if isinstance(value, str):
        return value
    raise ConfigError(
        f"{key} in this node's --node-config must be text; it is {value!r}. Write it with quotes: "
        f"--node-config '{key}=\"…\" …'."
    )
