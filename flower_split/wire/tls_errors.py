"""What a failed TLS handshake means: told at once, for trying again does not mend a certificate.

gRPC reports every one of them as UNAVAILABLE, with what the TLS library said in its text.
"""

# Part of the library's text -> what is wrong, and what to do.
_FAULTS = (
    (
        "unable to get local issuer certificate",
        "the trunk's certificate is not signed by the CA in trunk.root-certificates. Give the CA that "
        "signed it; if it was meant to be another trunk, check trunk.address",
    ),
    (
        "self signed certificate",
        "the trunk's certificate is signed by itself, or by a CA that is not in "
        "trunk.root-certificates. Give that certificate there",
    ),
    (
        "self-signed certificate",
        "the trunk's certificate is signed by itself, or by a CA that is not in "
        "trunk.root-certificates. Give that certificate there",
    ),
    (
        "Hostname Verification Check failed",
        "the trunk's certificate is not for the host in trunk.address. Make one whose subject "
        "alternative names have that host, or use a name that it has",
    ),
    (
        "certificate has expired",
        "the trunk's certificate, or its CA's, has expired. Renew it at the trunk, which reads it "
        "again by itself; if it is new, set this machine's clock",
    ),
    (
        "certificate is not yet valid",
        "the trunk's certificate is not valid yet. Set the clocks of this machine and of the one that "
        "made it",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "the trunk there speaks plain text, and this side TLS. Start it with --tls-certificate and "
        "--tls-key, or leave trunk.root-certificates empty on loopback",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the trunk's certificate was not accepted. Compare it with the CA in trunk.root-certificates",
    ),
)


def tls_fault(details: str | None) -> str:
    """Return what is wrong with a handshake, and the remedy; empty: it did not fail for its TLS.

    Args:
        details: What gRPC says of a call that was UNAVAILABLE.
    """
    text = details or ""
    return next((fault for mark, fault in _FAULTS if mark in text), "")
