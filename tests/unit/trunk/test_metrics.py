"""Figures for Prometheus and health, over the real trunk server."""

import logging
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flower_split.cli.main import main
from flower_split.errors import ConfigError
from flower_split.protocol.values import ActivationReport, ProcessReport, SlotReport, TrunkStatus
from tests.support.loopback import FakeEngine, served

prometheus = pytest.importorskip("prometheus_client", reason="the extra metrics")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from flower_split.trunk.service.metrics import MetricsServer, Sources  # noqa: E402

STATUS = TrunkStatus(
    epoch=1,
    version=12,
    experiment="e",
    server_round=3,
    attempt=1,
    phase="open",
    window=2,
    num_tokens=480.0,
    slots=(
        SlotReport(slot=0, joined=True, num_tokens=300.0, bytes_received=7, bytes_sent=8),
        SlotReport(slot=2, joined=True, waited_seconds=41.5, problem="left"),
    ),
    activations=ActivationReport(num_bytes=10, peak_bytes=20, budget_bytes=30, recomputes=1),
    process=ProcessReport(
        package_version="9.9",
        round_seconds=16.0,
        queue_seconds=0.25,
        bytes_received=1000,
        bytes_sent=2000,
        rounds_committed=2,
        rounds_aborted=1,
        checkpoint_seconds=1.5,
        compute_seconds=6.5,
    ),
)


@pytest.fixture
def figures(tmp_path: Path) -> Iterator[dict[tuple[str, ...], float]]:
    assert main(["certs", str(tmp_path / "c")]) == 0
    sources = Sources(
        status=lambda: STATUS,
        refusals=lambda: {("Forward", "UNAUTHENTICATED"): 4},
        checkpoints=tmp_path / "not-yet",
        certificate=tmp_path / "c" / "server.crt",
    )
    with MetricsServer("127.0.0.1:0", sources) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[(sample.name.removeprefix("flower_split_trunk_"), *sample.labels.values())] = (
                sample.value
            )
    yield found


def test_figures_are_those_of_the_status(figures: dict[tuple[str, ...], float]) -> None:
    expected = {
        ("info", "9.9"): 1,
        ("server_round",): 3,
        ("attempt",): 1,
        ("weights_version",): 12,
        ("round_tokens",): 480,
        ("phase", "open"): 1,
        ("phase", "joining"): 0,
        ("slot_waited_seconds", "2"): 41.5,
        ("slot_waited_seconds", "0"): 0,
        ("slot_dropped", "2"): 1,
        ("slot_received_bytes", "0"): 7,
        ("slot_sent_bytes", "0"): 8,
        ("activation_bytes",): 10,
        ("activation_budget_bytes",): 30,
        ("queue_seconds",): 0.25,
        ("received_bytes_total",): 1000,
        ("sent_bytes_total",): 2000,
        ("rounds_committed_total",): 2,
        ("rounds_aborted_total",): 1,
        ("checkpoint_seconds_total",): 1.5,
        ("compute_seconds_total",): 6.5,
        ("refused_calls_total", "Forward", "UNAUTHENTICATED"): 4,
    }
    assert {name: figures[name] for name in expected} == expected
    assert figures[("checkpoint_disk_free_bytes",)] > 1 << 20
    assert figures[("process_resident_memory_bytes",)] > 1 << 20
    ends = figures[("certificate_end_timestamp_seconds",)]
    assert ends > 1e9 and ends == int(ends)


def test_metrics_port_that_is_taken_or_no_port_is_refused() -> None:
    sources = Sources(status=lambda: STATUS, refusals=dict)
    with MetricsServer("127.0.0.1:0", sources) as server:
        with pytest.raises(ConfigError, match="metrics-listen"):
            MetricsServer(f"127.0.0.1:{server.port}", sources)
    with pytest.raises(ConfigError, match="HOST:PORT"):
        MetricsServer("here", sources)


def health_of(port: int) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def test_health_follows_the_compute_thread(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    with caplog.at_level(logging.CRITICAL), served(engine, max_call_seconds=150.0) as port:
        assert health_of(port) == "SERVING"
        engine.queue_seconds = 151.0
        assert health_of(port) == "NOT_SERVING"
        engine.queue_seconds = 1.0
        assert health_of(port) == "SERVING"


def test_health_command_exits_with_what_the_trunk_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = FakeEngine()
    with served(engine, max_call_seconds=150.0) as port:
        assert main(["health", f"127.0.0.1:{port}"]) == 0
        engine.queue_seconds = 151.0
        assert main(["health", f"127.0.0.1:{port}"]) == 1
        assert capsys.readouterr().out == "SERVING\nNOT_SERVING\n"
    assert main(["health", f"127.0.0.1:{port}"]) == 1
    assert "does not answer" in capsys.readouterr().err
