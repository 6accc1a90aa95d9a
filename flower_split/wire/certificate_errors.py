"""A trunk that turned a client's certificate down, or missed one: told at once, and not tried again.

The trunk's TLS library closes the connection without a word, which may mean other things, too: so the
trunk is asked, by the first messages of a handshake, whether it wants certificates at all.
"""

import socket
import ssl

from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.proxies import connect

_CLOSED = ("Socket closed", "Connection reset by peer", "Broken pipe")
_SECONDS = 5.0
_HANDSHAKE, _CERTIFICATE_REQUEST, _SERVER_HELLO_DONE = (
    22,
    13,
    14,
)  # RFC 5246, sections 6.2.1 and 7.4
_RECORD_HEADER, _MESSAGE_HEADER = 5, 4  # bytes


def certificate_fault(
    details: str | None, address: str, shown: ClientCertificate, proxy: str = ""
) -> str:
    """Return what is wrong with a client's certificate, and the remedy; empty: nothing is known of it.

    Args:
        details: What gRPC says of a call that was UNAVAILABLE, over TLS.
        address: ``host:port`` of the trunk.
        shown: What was shown to it.
        proxy: URL of the proxy on the way to it; empty: none.
    """
    text = details or ""
    if not any(mark in text for mark in _CLOSED) or not asks_for_certificate(address, proxy):
        return ""
    if shown == NO_CERTIFICATE:
        return (
            "the trunk asks for a client certificate, and none is shown. Give one that the CA of its "
            "--client-ca signed: trunk.client-certificate and trunk.client-key, a SuperNode's "
            '--node-config \'client-certificate="…" client-key="…" …\', or --client-certificate and '
            "--client-key of a command"
        )
    return (
        f"the trunk does not take the certificate {shown.certificate}: it is not signed by the CA in "
        "--client-ca there, or not valid by that machine's clock. Show one that this CA signed, or have "
        "the trunk's operator add its CA"
    )


def asks_for_certificate(address: str, proxy: str = "") -> bool:
    """Return whether a TLS server asks its clients for certificates; False also where it cannot be asked.

    Nothing is sent but the first message of a handshake of TLS 1.2, whose answer is readable.

    Args:
        address: ``host:port``.
        proxy: URL of the proxy on the way to it; empty: none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is told to it
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    hello = ssl.MemoryBIO()
    talk = context.wrap_bio(ssl.MemoryBIO(), hello)
    try:
        talk.do_handshake()
    except ssl.SSLWantReadError:
        pass
    try:
        with connect(address, proxy, _SECONDS) as link:
            link.sendall(hello.read())
            return _CERTIFICATE_REQUEST in _first_answer(link)
    except (OSError, ValueError):
        return False


def _first_answer(link: socket.socket) -> set[int]:
    """Return the kinds of messages that a server sends before it waits for its client."""
    received, messages, kinds = b"", b"", set[int]()
    while _SERVER_HELLO_DONE not in kinds:
        chunk = link.recv(1 << 14)
        if not chunk:
            break
        received += chunk
        while len(received) >= _RECORD_HEADER:
            end = _RECORD_HEADER + int.from_bytes(received[3:5])
            if len(received) < end:
                break
            if received[0] != _HANDSHAKE:  # an alert
                return kinds
            messages, received = messages + received[_RECORD_HEADER:end], received[end:]
        while len(messages) >= _MESSAGE_HEADER:
            end = _MESSAGE_HEADER + int.from_bytes(messages[1:4])
            if len(messages) < end:
                break
            kinds.add(messages[0])
            messages = messages[end:]
    return kinds
