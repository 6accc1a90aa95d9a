"""The trunk's figures for Prometheus: read from a status when they are asked for, never counted twice.

Needs ``prometheus_client`` (``pip install 'flower-split[metrics]'``). Names end in their unit; those of
a round begin again with each round. Where the trunk serves several experiments, those of one have the label
``experiment``. Plain HTTP, without a credential: listen on a network that is the
monitoring's own, or on loopback.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flower_split.errors import ConfigError
from flower_split.protocol.values import SlotReport, TrunkStatus
from flower_split.runtime.closing import Closing

PREFIX = "flower_split_trunk_"
_PHASES = ("idle", "joining", "open", "done", "prepared", "aborted")
_SLOT_GAUGES: Mapping[str, tuple[str, Callable[[SlotReport], float]]] = {
    "slot_waited_seconds": ("the others have waited for it now", lambda s: s.waited_seconds),
    "slot_silent_seconds": ("since its latest call", lambda s: s.silent_seconds),
    "slot_joined": ("1: it has joined the round", lambda s: s.joined),
    "slot_dropped": ("1: the round goes on without it", lambda s: bool(s.problem)),
    "slot_tokens": ("label tokens, in this round", lambda s: s.num_tokens),
    "slot_received_bytes": ("in this round", lambda s: s.bytes_received),
    "slot_sent_bytes": ("in this round", lambda s: s.bytes_sent),
}
_GAUGES: Mapping[str, tuple[str, Callable[[TrunkStatus], float]]] = {
    "server_round": ("that was begun last", lambda s: s.server_round),
    "attempt": ("of that round, from 0", lambda s: s.attempt),
    "window": ("of that round, from 0", lambda s: s.window),
    "weights_version": ("optimizer steps of the weights", lambda s: s.version),
    "round_seconds": ("since the round began", lambda s: s.process.round_seconds),
    "round_tokens": ("label tokens of the round", lambda s: s.num_tokens),
    "queue_seconds": (
        "that the compute thread lets a call wait",
        lambda s: s.process.queue_seconds,
    ),
    "activation_bytes": ("kept between forward and backward", lambda s: s.activations.num_bytes),
    "activation_peak_bytes": ("in this round", lambda s: s.activations.peak_bytes),
    "activation_budget_bytes": ("trunk.activation-memory", lambda s: s.activations.budget_bytes),
    "activation_recomputes": ("graphs not kept, in this round", lambda s: s.activations.recomputes),
    "activation_refusals": ("forwards refused, in this round", lambda s: s.activations.refusals),
    "batches": ("joint, in this round", lambda s: s.batches.batches),
    "partial_batches": ("without somebody, in this round", lambda s: s.batches.partial),
}
_PROCESS_GAUGES: Mapping[str, tuple[str, Callable[[TrunkStatus], float]]] = {
    "accelerator_bytes": ("allocated by torch", lambda s: s.process.accelerator_bytes),
    "accelerator_peak_bytes": (
        "allocated by torch at most",
        lambda s: s.process.accelerator_peak_bytes,
    ),
}
_COUNTERS: Mapping[str, tuple[str, Callable[[TrunkStatus], float]]] = {
    "received_bytes": ("in clients' calls", lambda s: s.process.bytes_received),
    "sent_bytes": ("in clients' replies", lambda s: s.process.bytes_sent),
    "rounds_committed": ("rounds that last", lambda s: s.process.rounds_committed),
    "rounds_aborted": ("rounds that were given up", lambda s: s.process.rounds_aborted),
    "checkpoint_seconds": ("spent on writing", lambda s: s.process.checkpoint_seconds),
    "compute_seconds": ("of forwards and backwards", lambda s: s.process.compute_seconds),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where the figures come from."""

    status: Callable[[], TrunkStatus]  # of the trunk
    # Of each experiment, where the trunk serves several; None: it serves one, and that is its status.
    experiments: Callable[[], Mapping[str, TrunkStatus]] | None = None
    refusals: Callable[[], Mapping[tuple[str, str], int]]  # by method and reason
    checkpoints: Path | None = None  # whose disk may fill; None: none are kept
    certificate: Path | None = None  # PEM file of the trunk's TLS; None: plain text


class TrunkCollector(Collector):
    """Makes all metrics from one status, whenever Prometheus asks."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def describe(self) -> list[Metric]:
        """Return nothing: the names are known by :meth:`collect` alone, and clash with nobody's."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with its values now."""
        status = self._sources.status()
        yield _labelled(
            "info", "1, with the package's version", {"version": status.process.package_version}
        )
        for name, (meaning, value) in _PROCESS_GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, meaning, value=value(status))
        if self._sources.experiments is None:
            yield from _of_experiments([], [((), status)])
        else:
            yield GaugeMetricFamily(
                PREFIX + "max_experiments", "at once", value=status.max_experiments
            )
            found = self._sources.experiments()
            yield from _of_experiments(
                ["experiment"], [((name,), each) for name, each in sorted(found.items())]
            )
        yield self._refused()
        yield from self._of_files()

    def _refused(self) -> Metric:
        refused = CounterMetricFamily(
            PREFIX + "refused_calls", "by method and reason", labels=["method", "reason"]
        )
        for (method, reason), count in sorted(self._sources.refusals().items()):
            refused.add_metric([method, reason], count)
        return refused

    def _of_files(self) -> Iterator[Metric]:
        if (directory := self._sources.checkpoints) is not None:
            there = next(path for path in (directory, *directory.parents) if path.exists())
            yield GaugeMetricFamily(
                PREFIX + "checkpoint_disk_free_bytes",
                "of the disk that checkpoints go to",
                value=shutil.disk_usage(there).free,
            )
        if (certificate := self._sources.certificate) is not None:
            found = x509.load_pem_x509_certificates(certificate.read_bytes())
            yield GaugeMetricFamily(
                PREFIX + "certificate_end_timestamp_seconds",
                "when the first of its certificates ends, in Unix time",
                value=min(item.not_valid_after_utc.timestamp() for item in found),
            )


def _of_experiments(
    labels: Sequence[str], each: Sequence[tuple[tuple[str, ...], TrunkStatus]]
) -> Iterator[Metric]:
    """Yield the figures of experiments.

    Args:
        labels: Names of what tells them apart.
        each: The values of the labels, and the status.
    """
    for name, (meaning, value) in _GAUGES.items():
        gauge = GaugeMetricFamily(PREFIX + name, meaning, labels=labels)
        for of, status in each:
            gauge.add_metric(of, value(status))
        yield gauge
    for name, (meaning, value) in _COUNTERS.items():
        counter = CounterMetricFamily(PREFIX + name, meaning, labels=labels)
        for of, status in each:
            counter.add_metric(of, value(status))
        yield counter
    phases = GaugeMetricFamily(PREFIX + "phase", "1: the round is in it", labels=[*labels, "phase"])
    for of, status in each:
        for phase in _PHASES:
            phases.add_metric([*of, phase], float(phase == status.phase))
    yield phases
    for name, (meaning, report) in _SLOT_GAUGES.items():
        family = GaugeMetricFamily(PREFIX + name, meaning, labels=[*labels, "slot"])
        for of, status in each:
            for slot in status.slots:
                family.add_metric([*of, str(slot.slot)], float(report(slot)))
        yield family


def _labelled(name: str, meaning: str, labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, meaning, labels=list(labels))
    family.add_metric(list(labels.values()), 1.0)
    return family


class MetricsServer(Closing):
    """Serves the figures at ``/metrics``, beside those of the process, until it is closed.

    Args:
        listen: ``host:port``; port 0: any free one.
        sources: Where the figures come from.

    Attributes:
        port: Where it listens.

    Raises:
        ConfigError: The address cannot be served.
    """

    def __init__(self, listen: str, sources: Sources) -> None:
        host, _, port = listen.rpartition(":")
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(TrunkCollector(sources))
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--metrics-listen {listen!r} cannot be served: {error}. Give HOST:PORT with a free "
                "port of this machine."
            ) from error
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)
