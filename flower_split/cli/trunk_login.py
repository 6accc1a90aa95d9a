"""How a command reaches a trunk as its coordinator: one value for all that ask one."""

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from flower_split.config.validation import ENVIRONMENT
from flower_split.runtime.secret_files import read_secret, token_in
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate

_SECONDS = 10.0  # of one question


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkLogin:
    """A trunk's address, and what is shown to it."""

    address: str  # host:port
    token_file: Path | None  # None: the environment has the token
    root_certificates: str = ""  # PEM file of the CA for TLS
    certificate: ClientCertificate = NO_CERTIFICATE
    proxy: str = ENVIRONMENT  # as trunk.proxy
    experiment: str = ""  # of several that the trunk serves; empty: the only one

    def coordinator(self) -> "closing[TrunkCoordinator]":
        """Return round control of the trunk, which ends with its block; it connects with the first call.

        Raises:
            ConfigError: The token file or a certificate cannot be read, or the proxy is none.
        """
        return closing(
            TrunkCoordinator(
                self.address,
                _token(self.token_file),
                root_certificates=self.root_certificates,
                timeout=_SECONDS,
                certificate=self.certificate,
                proxy=self.proxy,
                experiment=self.experiment,
            )
        )


def _token(file: Path | None) -> str:
    return (
        token_in(os.environ, "--token-file") if file is None else read_secret(file, "--token-file")
    )
