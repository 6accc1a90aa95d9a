"""``flower-split health``: a probe for containers and load balancers, with TLS and without a credential."""

from flower_split.runtime.exit_codes import COMPLETED, FAILED
from flower_split.wire.client_certificate import ClientCertificate


def health(address: str, root_certificates: str, certificate: ClientCertificate, proxy: str) -> int:
    """Print what a trunk says of itself, and exit with 0 where it serves.

    Raises:
        TrunkUnavailable: It does not answer.
        TrunkError: The TLS handshake failed; says why.
    """
    from flower_split.wire.grpc_health import health_of

    found = health_of(address, root_certificates, certificate=certificate, proxy=proxy)
    print(found)
    return COMPLETED if found == "SERVING" else FAILED
