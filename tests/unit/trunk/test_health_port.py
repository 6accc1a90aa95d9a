"""Health checks without a certificate, on loopback, beside a port that asks for one."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from flower_split.errors import ConfigError
from flower_split.trunk.service.health_port import HealthPort
from flower_split.wire.grpc_health import health_of
from flower_split.wire.grpc_options import SERVICE, open_channel


def test_probe_reads_the_trunks_health_and_its_changes_in_plain_text() -> None:
    servicer = HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    with HealthPort("127.0.0.1:0", servicer) as port:
        assert health_of(f"127.0.0.1:{port.port}") == "SERVING"
        servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert health_of(f"127.0.0.1:{port.port}") == "NOT_SERVING"


def test_nothing_else_is_served_there() -> None:
    with HealthPort("127.0.0.1:0", HealthServicer()) as port:
        with open_channel(f"127.0.0.1:{port.port}") as channel:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(f"/{SERVICE}/Status")(b"", timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
            with pytest.raises(grpc.RpcError):
                health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(service="another"), timeout=10
                )


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "192.0.2.1:9501"])
def test_another_address_than_loopback_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="--health-listen .* loopback"):
        HealthPort(listen, HealthServicer())
