"""OpenTelemetry spans of this package. Imported where traces are on; see :mod:`.tracing`.

A micro-batch is one trace: the client's span of it, in that the client's span of each call, in that the
trunk's span of the same call (the trace's id travels as the W3C ``traceparent`` of the call's
metadata), and in that the trunk's queue and computation. A span has a name, times, and the few
attributes of :data:`ATTRIBUTES`: numbers and names of this package's own, never a tensor, a token, a
text or an error's words.

W3C Trace Context, https://www.w3.org/TR/trace-context/.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flower_split.runtime.log_fields import FIELDS, PROCESS_FIELDS
from flower_split.runtime.tracing import EXPORTER_VARIABLE
from flower_split.runtime.version import __version__

logger = logging.getLogger(__name__)

TRACEPARENT = "traceparent"
"""Name of the metadata that says which span a call belongs to."""

ATTRIBUTES = frozenset({*FIELDS, "window", "micro_batch", "method"})
"""Names of everything that a span of this package may say, beside its times."""

Value = str | int

_PROPAGATOR = TraceContextTextMapPropagator()
_TRACEPARENT_LENGTH = 55  # of version 00; a peer's is looked at no further
_LONGEST = 128  # characters of an attribute's text
_GROUP = "opentelemetry_traces_exporter"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_FLUSH_MILLISECONDS = 2000


class Tracing:
    """Makes the spans of this process. Thread-safe.

    Args:
        provider: OpenTelemetry's provider, which says where spans go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("flower_split", __version__)

    @contextmanager
    def span(
        self,
        name: str,
        attributes: Mapping[str, Value],
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: Context | None = None,
    ) -> Iterator[None]:
        """Be inside a span on this thread; an error that leaves it is named by its class alone.

        Args:
            name: The span's name.
            attributes: Some of :data:`ATTRIBUTES`.
            kind: The span's kind.
            parent: The span that it stands in; None: the one that this thread is inside of.

        Raises:
            ValueError: A span must not say this.
        """
        with self._tracer.start_as_current_span(
            name,
            context=parent,
            kind=kind,
            attributes=checked(attributes),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise

    @contextmanager
    def micro_batch(self, window: int, index: int) -> Iterator[None]:
        """Be inside a client's micro-batch: the first span of its trace."""
        said = {name: v for name, v in PROCESS_FIELDS.now().items() if name in FIELDS}
        with self.span("micro-batch", {**said, "window": window, "micro_batch": index}):
            yield

    @contextmanager
    def asking(self, method: str) -> Iterator[None]:
        """Be inside a call to the trunk, of this process."""
        with self.span(f"ask {method}", {"method": method}, kind=SpanKind.CLIENT):
            yield

    def carried(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a call by which its receiver finds this thread's span."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return tuple((key, text) for key, text in carrier.items() if key == TRACEPARENT)

    @contextmanager
    def answering(self, method: str, traceparent: str) -> Iterator[None]:
        """Be inside a call that a peer has made.

        Args:
            method: The name of a method that is served.
            traceparent: The peer's word; what is none begins a trace here. It is no secret, and proves
                nothing: whoever may call can have a call's spans stand in any trace.
        """
        sound = traceparent if len(traceparent) == _TRACEPARENT_LENGTH else ""
        parent = _PROPAGATOR.extract({TRACEPARENT: sound}, context=Context())
        with self.span(method, {"method": method}, kind=SpanKind.SERVER, parent=parent):
            yield

    def shares(self, queue_seconds: float, compute_seconds: float) -> None:
        """Note, as a call's computation ends, how long it waited and computed: two spans in its own."""
        end = time.time_ns()
        began = end - round(compute_seconds * 1e9)
        asked = began - round(queue_seconds * 1e9)
        for name, start, stop in (("queue", asked, began), ("compute", began, end)):
            self._tracer.start_span(name, start_time=start).end(stop)

    def flush(self) -> None:
        """Hand over what has been collected, within seconds."""
        self._provider.force_flush(_FLUSH_MILLISECONDS)


def checked(attributes: Mapping[str, Value]) -> dict[str, Value]:
    """Return the attributes that a span may have, texts at a bounded length.

    Raises:
        ValueError: One is not of :data:`ATTRIBUTES`, or no number and no text.
    """
    for name, value in attributes.items():
        if name not in ATTRIBUTES or not isinstance(value, (int, str)):
            raise ValueError(
                f"a span may say {sorted(ATTRIBUTES)} as numbers and texts; {name} "
                f"({type(value).__name__}) is not among them."
            )
    return {f"flower_split.{name}": _fitting(value) for name, value in attributes.items()}


def _fitting(value: Value) -> Value:
    """Return a value as an exporter takes it: Flower's node ids have 64 bits, and OTLP's numbers 63."""
    if isinstance(value, int) and abs(value) < 1 << 63:
        return value
    return str(value)[:_LONGEST]


def exporting(name: str, environment: Mapping[str, str], service: str) -> Tracing | None:
    """Return what sends spans to an exporter; None, with a warning, where it is not installed.

    Args:
        name: The value of ``OTEL_TRACES_EXPORTER``.
        environment: The further OTEL variables, which the exporter reads by itself, too.
        service: ``service.name`` where the environment has none.
    """
    protocol = next((environment[key] for key in _PROTOCOLS if environment.get(key)), "grpc")
    wanted = "otlp_proto_http" if name == "otlp" and protocol != "grpc" else name
    found = list(entry_points(group=_GROUP, name=wanted))
    if not found:
        logger.warning(
            "%s=%s names no exporter that is installed (there are: %s): no traces are made. Run: pip "
            "install 'flower-split[tracing]', or set the variable to none.",
            EXPORTER_VARIABLE,
            name,
            ", ".join(sorted({item.name for item in entry_points(group=_GROUP)})) or "none",
        )
        return None
    exporter = found[0].load()()
    if not isinstance(exporter, SpanExporter):
        raise TypeError(f"{wanted} of {_GROUP} makes no SpanExporter.")
    named = (
        OTELResourceDetector().detect().attributes
    )  # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES
    own = {} if SERVICE_NAME in named else {SERVICE_NAME: service}
    provider = TracerProvider(resource=Resource.create(own))  # the sampler: OTEL_TRACES_SAMPLER
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)
