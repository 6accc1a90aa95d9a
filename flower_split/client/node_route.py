"""How one node reaches the trunk: what of it is this machine's own, by its node config."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from flower_split.config import TrunkConfig
from flower_split.config.validation import ENVIRONMENT, check_address, check_proxy
from flower_split.errors import ConfigError
from flower_split.messages.orders import TrunkOrder
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate

logger = logging.getLogger(__name__)

_ADDRESS, _PROXY = "trunk-address", "trunk-proxy"  # of the node config


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRoute:
    """A node's own part of the way to the trunk; each at its default: as the run says."""

    address: str = ""  # host:port of the trunk as seen from here; empty: what the ServerApp sends
    proxy: str = ENVIRONMENT  # as trunk.proxy
    certificate: ClientCertificate = NO_CERTIFICATE  # shown over TLS

    @classmethod
    def of(cls, trunk: TrunkConfig, node_config: Mapping[str, object]) -> "NodeRoute":
        """Return what the node config says, or else the run.

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


def _text(node_config: Mapping[str, object], key: str) -> str:
    value = node_config.get(key) or ""
    if isinstance(value, str):
        return value
    raise ConfigError(
        f"{key} in this node's --node-config must be text; it is {value!r}. Write it with quotes: "
        f"--node-config '{key}=\"…\" …'."
    )
