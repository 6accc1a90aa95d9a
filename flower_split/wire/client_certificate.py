"""The certificate that a client or the coordinator shows to a trunk which asks for one."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flower_split.config.trunk import TrunkConfig
from flower_split.errors import ConfigError
from flower_split.runtime.certificate_files import Pair, PairNames, read_pair

_NAMES = PairNames("trunk.client-certificate", "trunk.client-key")
_NODE_KEYS = ("client-certificate", "client-key")
_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """Two PEM files; both empty: nothing is shown.

    Raises:
        ConfigError: Only one of them is named.
    """

    certificate: str = ""  # with the CAs between it and the root after it
    key: str = ""

    def __post_init__(self) -> None:
        """Check that there are both or none."""
        if bool(self.certificate) != bool(self.key):
            raise ConfigError(
                "a client's certificate needs both files, trunk.client-certificate and "
                f"trunk.client-key (node config: {', '.join(_NODE_KEYS)}); only one is named."
            )

    @classmethod
    def of(
        cls, trunk: TrunkConfig, node_config: Mapping[str, object] = _NOTHING
    ) -> "ClientCertificate":
        """Return what this machine shows: its node config's files, or else the run's.

        Args:
            trunk: The run's configuration of the trunk.
            node_config: The node config of a client's SuperNode.

        Raises:
            ConfigError: Only one file of a pair is named.
        """
        named = [str(node_config.get(key) or "") for key in _NODE_KEYS]
        return cls(*named) if any(named) else cls(trunk.client_certificate, trunk.client_key)

    def read(self) -> Pair | None:
        """Return the certificate and its key; None: nothing is shown.

        Raises:
            ConfigError: See :func:`~flower_split.runtime.certificate_files.read_pair`.
        """
        if not self.certificate:
            return None
        return read_pair(self.certificate, self.key, _NAMES)


NO_CERTIFICATE = ClientCertificate()
"""Nothing is shown: for trunks that do not ask."""
