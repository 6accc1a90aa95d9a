"""One micro-batch is one trace, from the client over the wire into the trunk, and says nothing more."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flower_split.errors import TrunkRefused
from flower_split.lora import adapter_state
from flower_split.runtime.spans import ATTRIBUTES, Tracing
from flower_split.runtime.tracing import PROCESS_TRACING
from tests.acceptance.federation import federation, make_batch, make_config, write_checkpoint


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """Where the spans of this process go while the test runs."""
    found, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(found))
    PROCESS_TRACING.use(Tracing(provider))
    try:
        yield found
    finally:
        PROCESS_TRACING.use(None)
        provider.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def train_round(checkpoint: Path) -> tuple[dict[int, dict[str, torch.Tensor]], float]:
    """One step of two micro-batches; returns the adapters and the loss."""
    config = make_config(checkpoint, gradient_accumulation_steps=2)
    batches = {0: [make_batch(2, [9, 4], seed=1), make_batch(2, [5, 5], seed=2)]}
    with federation(config) as run:
        returned, results, _ = run.train(adapter_state(run.client_model(0)), batches)
    return returned, results[0].loss


def parent_of(span: ReadableSpan, spans: Sequence[ReadableSpan]) -> str:
    """The name of the span that this one stands in; empty: none."""
    if span.parent is None:
        return ""
    return next(s.name for s in spans if s.context.span_id == span.parent.span_id)


def test_micro_batch_is_one_trace_through_client_wire_and_trunk(
    checkpoint: Path, exporter: InMemorySpanExporter
) -> None:
    train_round(checkpoint)
    spans = exporter.get_finished_spans()
    roots = [span for span in spans if span.name == "micro-batch"]
    # Two are in flight at a time, and a span is told of when it ends: either may be the first.
    assert {(s.attributes or {})["flower_split.micro_batch"] for s in roots} == {0, 1}
    assert len(roots) == len({root.context.trace_id for root in roots}) == 2
    for root in roots:
        trace = [span for span in spans if span.context.trace_id == root.context.trace_id]
        assert sorted((span.name, parent_of(span, trace)) for span in trace) == [
            ("Backward", "ask Backward"),
            ("Forward", "ask Forward"),
            ("ask Backward", "micro-batch"),
            ("ask Forward", "micro-batch"),
            ("compute", "Backward"),
            ("compute", "Forward"),
            ("micro-batch", ""),
            ("queue", "Backward"),
            ("queue", "Forward"),
        ]
        by_name = {span.name: span for span in trace}
        forward, backward = by_name["ask Forward"], by_name["ask Backward"]
        assert (root.start_time or 0) <= (forward.start_time or 0)
        assert (forward.end_time or 0) <= (backward.start_time or 0)
        assert (backward.end_time or 0) <= (root.end_time or 0)


def test_spans_say_names_and_numbers_alone(
    checkpoint: Path, exporter: InMemorySpanExporter
) -> None:
    train_round(checkpoint)
    spans = exporter.get_finished_spans()
    assert {"BeginRound", "OpenSession", "Forward", "CommitRound"} <= {s.name for s in spans}
    allowed = {f"flower_split.{name}" for name in ATTRIBUTES}
    for span in spans:
        assert set(span.attributes or {}) <= allowed, span.to_json()
        assert not span.events and not span.links, span.to_json()
        text = span.to_json()
        assert "token-0" not in text and "coordinator token" not in text, text


def test_refused_calls_span_names_the_errors_class_and_none_of_its_words(
    checkpoint: Path, exporter: InMemorySpanExporter
) -> None:
    config = make_config(checkpoint)
    with federation(config) as run:
        run.begin([0])
        with run.remote(0) as trunk:
            trunk.open(1)
            with pytest.raises(TrunkRefused, match="planned"):
                trunk.shorten_plan(2)
    refused = [s for s in exporter.get_finished_spans() if s.name == "ask ShortenPlan"]
    assert [(s.attributes or {})["error.type"] for s in refused] == ["_InactiveRpcError"]
    for span in exporter.get_finished_spans():
        assert not span.events and span.status.description is None


def test_traces_change_no_number(checkpoint: Path, exporter: InMemorySpanExporter) -> None:
    traced, loss = train_round(checkpoint)
    PROCESS_TRACING.use(None)
    number = len(exporter.get_finished_spans())
    plain, same = train_round(checkpoint)
    assert len(exporter.get_finished_spans()) == number > 0
    assert loss == same
    assert all(torch.equal(traced[0][name], plain[0][name]) for name in plain[0])


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "no trace",
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",  # no trace has this id
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01" + "-x" * 5000,
        "00-4bf92f3577b34da6a3ce929d0e0e473\n-00f067aa0ba902b7-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E473Z-00f067aa0ba902b7-01",
    ],
)
def test_unsound_traceparent_of_a_peer_begins_a_trace_and_is_written_nowhere(
    traceparent: str, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    tracing = PROCESS_TRACING.current
    assert tracing is not None
    with caplog.at_level("DEBUG"), tracing.answering("Forward", traceparent):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    assert span.context.trace_id != int("4bf92f3577b34da6a3ce929d0e0e4736", 16)
    assert not caplog.records


def test_sound_traceparent_of_a_peer_is_the_parent(exporter: InMemorySpanExporter) -> None:
    tracing = PROCESS_TRACING.current
    assert tracing is not None
    with tracing.answering("Forward", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.parent is not None and span.parent.span_id == 0x00F067AA0BA902B7
    assert span.context.trace_id == 0x4BF92F3577B34DA6A3CE929D0E0E4736
    assert not span.context.trace_state


def test_flowers_ids_of_64_bits_can_be_exported(exporter: InMemorySpanExporter) -> None:
    tracing = PROCESS_TRACING.current
    assert tracing is not None
    with tracing.span("micro-batch", {"node": 17255495851487303216, "slot": 3}):
        pass
    sent = encode_spans(exporter.get_finished_spans()).SerializeToString()
    assert b"17255495851487303216" in sent


def test_span_refuses_to_say_anything_else(exporter: InMemorySpanExporter) -> None:
    tracing = PROCESS_TRACING.current
    assert tracing is not None
    with pytest.raises(ValueError, match="text"), tracing.span("step", {"text": "a label"}):
        pass
    with pytest.raises(ValueError, match="Tensor"):
        with tracing.span("step", {"window": torch.zeros(3)}):  # type: ignore[dict-item]
            pass
