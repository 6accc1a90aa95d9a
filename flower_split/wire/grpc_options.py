"""gRPC as this package uses it: service name, options, credentials, and where plain text may go."""

import ipaddress

import grpc

from flower_split.config.validation import ENVIRONMENT
from flower_split.errors import ConfigError
from flower_split.runtime.certificate_files import read_pem
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.proxies import proxy_to

SERVICE = "flower_split.Trunk"
MAX_MESSAGE_BYTES = 8 << 20
PROOF = "flower-split-proof-bin"  # of a call: its metadata that shows a token's key
Metadata = tuple[tuple[str, str | bytes], ...]


def channel_options(proxy: str = "") -> list[tuple[str, int | str]]:
    """Return the options of a client channel; its keepalive is above the server's minimum.

    Args:
        proxy: URL of the HTTP proxy to go through; empty: none, whatever the environment says.
    """
    named: list[tuple[str, int | str]] = [("grpc.http_proxy", proxy)] if proxy else []
    return [
        *named,
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_http_proxy", 1 if proxy else 0),
        # The caller's own thread waits for a reply to one message: 0.3 ms less than another one's.
        ("SingleThreadedUnaryStream", 1),
        ("grpc.enable_retries", 0),  # retries are counted and bounded by grpc_transport, not below
        ("grpc.use_local_subchannel_pool", 1),  # control calls get a connection of their own
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


def server_options(max_connections: int, stream_window: int = 128 << 10) -> list[tuple[str, int]]:
    """Return the options of the trunk server.

    Args:
        max_connections: Open at once; one more is closed where it is accepted.
        stream_window: Bytes that a stream may send before anybody reads them.
    """
    return [
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_connection_idle_ms", 1_800_000),  # without a call; the next call connects again
        # gRPC's own estimate of the network would widen the window to megabytes for whoever sends fast:
        # 380 streams without a credential then took 825 MiB, and now take 4.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", stream_window),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", 64),  # of one connection; a client has a few at once
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.so_reuseport", 0),  # a second trunk on the same port must fail, not share it
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def is_loopback(address: str) -> bool:
    """Return whether ``host:port`` stays on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_channel(
    address: str,
    root_certificates: str = "",
    certificate: ClientCertificate = NO_CERTIFICATE,
    proxy: str = ENVIRONMENT,
) -> grpc.Channel:
    """Return a channel with this package's options; it connects with the first call.

    Args:
        address: ``host:port``.
        root_certificates: The CA that signed the trunk's certificate, as PEM text or the path of a
            PEM file; empty: plain text, on loopback only.
        certificate: What this side shows, over TLS.
        proxy: As ``trunk.proxy`` says; loopback is always reached directly.

    Raises:
        ConfigError: Plain text to another machine, or with a certificate; a file that cannot be read;
            a certificate that is not valid now or not its key's; a proxy that is no HTTP proxy.
    """
    if root_certificates:
        if "-----BEGIN" in root_certificates:
            pem = root_certificates.encode()
        else:
            pem = read_pem("trunk.root-certificates", root_certificates)
        pair = certificate.read()
        credentials = grpc.ssl_channel_credentials(
            root_certificates=pem,
            private_key=None if pair is None else pair.key,
            certificate_chain=None if pair is None else pair.certificate,
        )
        way = "" if is_loopback(address) else proxy_to(address, proxy)
        return grpc.secure_channel(address, credentials, options=channel_options(way))
    if certificate != NO_CERTIFICATE:
        raise ConfigError(
            f"trunk.client-certificate {certificate.certificate} can be shown over TLS alone, but "
            f"nothing says which CA the trunk at {address} has. Give its PEM file as "
            "trunk.root-certificates."
        )
    if not is_loopback(address):
        raise ConfigError(
            f"the trunk at {address} is not on this machine's loopback, where alone plain text is "
            "allowed: tokens and activations would travel in the clear. Give the CA's PEM file as "
            "trunk.root-certificates and start the trunk with --tls-certificate and --tls-key."
        )
    return grpc.insecure_channel(address, options=channel_options())


def bearer(token: str) -> Metadata:
    """Return the metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)
