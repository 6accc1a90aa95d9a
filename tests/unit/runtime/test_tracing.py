"""When traces are on, and what is said where they cannot be made."""

import logging
import subprocess
import sys

import pytest

from flower_split.runtime.tracing import TracingSwitch

OFF = [
    {},
    {"OTEL_TRACES_EXPORTER": ""},
    {"OTEL_TRACES_EXPORTER": "none"},
    {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"},
    {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"},  # others' traces may go there
]


@pytest.mark.parametrize("environment", OFF)
def test_traces_are_off_unless_the_environment_asks_for_them(environment: dict[str, str]) -> None:
    switch = TracingSwitch()
    switch.switch_on_from(environment, "a service")
    assert switch.current is None


def test_console_exporter_switches_traces_on_once(capsys: pytest.CaptureFixture[str]) -> None:
    switch = TracingSwitch()
    switch.switch_on_from({"OTEL_TRACES_EXPORTER": "console"}, "a service")
    first = switch.current
    assert first is not None
    switch.switch_on_from({"OTEL_TRACES_EXPORTER": "console"}, "another")
    assert switch.current is first


def test_missing_opentelemetry_is_said_once_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "flower_split.runtime.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    switch = TracingSwitch()
    with caplog.at_level(logging.WARNING):
        switch.switch_on_from({"OTEL_TRACES_EXPORTER": "otlp"}, "a service")
    assert switch.current is None
    assert "pip install 'flower-split[tracing]'" in caplog.text


def test_unknown_exporter_is_named_with_those_that_are_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    switch = TracingSwitch()
    with caplog.at_level(logging.WARNING):
        switch.switch_on_from({"OTEL_TRACES_EXPORTER": "zipkin"}, "a service")
    assert switch.current is None
    assert "OTEL_TRACES_EXPORTER=zipkin" in caplog.text and "console" in caplog.text


def test_transport_imports_nothing_of_opentelemetry_where_traces_are_off() -> None:
    code = (
        "import sys, flower_split.wire.grpc_transport as t; "
        "t.TrunkChannel('127.0.0.1:1', token='x', timeout=1.0).close(); "
        "print([m for m in sys.modules if m.startswith('opentelemetry') or m.endswith('spans')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr
