"""Which certificate a machine shows: its node config's, or else the run's."""

import socket
import threading

import pytest

from flower_split.config import TrunkConfig
from flower_split.errors import ConfigError
from flower_split.wire.certificate_errors import asks_for_certificate, certificate_fault
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate

RUN = TrunkConfig(client_certificate="run.crt", client_key="run.key")
NODE = {"partition-id": 0, "client-certificate": "node.crt", "client-key": "node.key"}
CLOSED = (
    "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed"
)


def test_node_config_comes_before_the_run_and_either_may_say_nothing() -> None:
    assert ClientCertificate.of(RUN, NODE) == ClientCertificate("node.crt", "node.key")
    assert ClientCertificate.of(RUN, {"partition-id": 0}) == ClientCertificate("run.crt", "run.key")
    assert ClientCertificate.of(TrunkConfig(), {}) == NO_CERTIFICATE
    assert NO_CERTIFICATE.read() is None


def test_half_a_pair_is_an_error_and_never_made_whole_from_elsewhere() -> None:
    with pytest.raises(ConfigError, match="only one is named"):
        ClientCertificate.of(RUN, {"client-certificate": "node.crt"})
    with pytest.raises(ConfigError, match=r"trunk\.client-certificate and trunk\.client-key"):
        TrunkConfig(client_key="run.key")


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28"]
)
def test_server_that_closes_for_another_reason_is_no_fault_of_a_certificate(answer: bytes) -> None:
    """Nothing, plain text, and a TLS alert: the call is tried again, as for a trunk that restarts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def serve() -> None:
            link, _ = server.accept()
            with link:
                link.recv(1 << 14)
                link.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert certificate_fault(CLOSED, address, NO_CERTIFICATE) == ""
        thread.join(10)
    assert not asks_for_certificate(address)  # nobody listens any more
    assert certificate_fault("Connection refused", "127.0.0.1:1", NO_CERTIFICATE) == ""
