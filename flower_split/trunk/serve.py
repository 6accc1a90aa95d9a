"""The trunk as a process of its own: the ServerApp's child on loopback, or a machine's service.

As a child it reads one JSON line from standard input (what to serve; the token never stands in an
argument list), answers with one JSON line on standard output (its port, or why it cannot serve),
and serves until its standard input ends. Standard input ends when the parent ends, however the
parent ended, so no trunk outlives its run. Log lines go to standard error.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flower_split.config import RunConfig, parse_run_config
from flower_split.errors import ConfigError, FlowerSplitError
from flower_split.runtime import failpoints
from flower_split.runtime.closing import Closing
from flower_split.runtime.exit_codes import FAILED
from flower_split.runtime.loading import loading_modules
from flower_split.runtime.logs import quiet_libraries
from flower_split.runtime.secret_files import TokenFile, check_token
from flower_split.runtime.tracing import PROCESS_TRACING
from flower_split.trunk.ending import end_soon

if TYPE_CHECKING:
    from flower_split.trunk.engine.engine import TrunkEngine
    from flower_split.trunk.engine.several_experiments import SeveralExperiments
    from flower_split.trunk.replicas.processes import Followers
    from flower_split.trunk.service.limits import Limits

logger = logging.getLogger(__name__)

_WORKERS = 1024  # threads of the RPC shell; a waiting forward must never starve a backward
_GRACE_SECONDS = 2.0
_COORDINATOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """Where and how to serve."""

    listen: str = "127.0.0.1:0"  # host:port; port 0: any free one
    token: str  # the coordinator's token
    token_file: str = ""  # from which it is read again when it changes; empty: it stays
    coordinators: tuple[tuple[str, str], ...] = ()  # further ones: name, and file of the token
    tls_certificate: str = ""  # PEM file; empty: plain text, loopback only
    tls_key: str = ""  # PEM file
    client_ca: str = ""  # PEM file; empty: no client certificate is asked for
    allow_clients: tuple[str, ...] = ()  # subjects, or @FILE; none: whoever the CA signed
    allow_coordinators: tuple[str, ...] = ()  # the same, of calls with the coordinator's token
    checkpoints: str = ""  # directory of the trunk's checkpoints; empty: none are kept
    metrics_listen: str = ""  # host:port for Prometheus; empty: no metrics
    health_listen: str = ""  # host:port on loopback for probes without a certificate; empty: none
    audit_log: str = ""  # file; empty: none is kept

    def __post_init__(self) -> None:
        """Check what needs no socket."""
        host, colon, port = self.listen.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"--listen must be HOST:PORT; it is {self.listen!r}.")
        check_token(self.token)
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("TLS needs both files: give --tls-certificate and --tls-key.")
        names = [name for name, _ in self.coordinators]
        for name in names:
            if not _COORDINATOR.fullmatch(name) or names.count(name) > 1:
                raise ConfigError(
                    f"--coordinator must be NAME=FILE, with a name of its own of letters, digits, - and _; "
                    f"it is {name!r}."
                )
        if (self.allow_clients or self.allow_coordinators) and not self.client_ca:
            raise ConfigError(
                "--allow-client and --allow-coordinator name subjects of certificates, which the trunk "
                "asks for only with --client-ca. Give the CA's PEM file."
            )


class RunningTrunk(Closing):
    """A trunk that serves in this process, until the ``with`` block ends.

    Args:
        config: The run's configuration: model, cuts, LoRA, windows, device.
        serving: Where to listen.

    Attributes:
        engine: What computes; of a trunk of several experiments, all of them.
        failure: Why it cannot serve any more, after one of its processes was lost; empty: it serves.

    Raises:
        FlowerSplitError: The model cannot be loaded or cut, or the port cannot be served.
    """

    def __init__(self, config: RunConfig, serving: Serving) -> None:
        # Loading torch and the model takes seconds: only the process that serves pays for it.
        with loading_modules():
            import flower_split.trunk.build  # noqa: F401, what makes the engine needs most of them
            from flower_split.trunk.follow import start_followers
            from flower_split.trunk.service.audit_log import AuditLog
            from flower_split.trunk.service.client_certificates import MutualTls
            from flower_split.trunk.service.server import TrunkServer

        self._audit = AuditLog(Path(serving.audit_log)) if serving.audit_log else None
        directory = Path(serving.checkpoints) if serving.checkpoints else None
        mutual = (
            MutualTls(
                client_ca=serving.client_ca,
                clients=serving.allow_clients,
                coordinators=serving.allow_coordinators,
            )
            if serving.client_ca
            else None
        )
        self.failure = ""
        self._fail: Callable[[str], None] = logger.error
        self._followers = start_followers(config)
        try:
            self.engine = _engines(config, directory, serving, self._followers)
        except BaseException:
            self._close_followers()
            raise
        if self._followers is not None:
            self._followers.on_loss(self._on_loss)
        self._server = TrunkServer(
            self.engine,
            listen=serving.listen,
            coordinator_token=(
                TokenFile(serving.token_file, "--token-file")
                if serving.token_file
                else serving.token
            ),
            coordinators={
                name: TokenFile(file, "--coordinator") for name, file in serving.coordinators
            },
            tls_certificate=serving.tls_certificate or None,
            tls_key=serving.tls_key or None,
            mutual=mutual,
            max_workers=_WORKERS,
            max_call_seconds=config.trunk.call_timeout,
            limits=_limits(config),
            audit=self._audit,
        )
        self._beside: list[Closing] = []  # other ports
        self.metrics_port = self.health_port = 0
        self.port = self._server.start()
        try:
            if serving.metrics_listen:
                self._serve_metrics(serving, directory)
            if serving.health_listen:
                self._serve_health(serving.health_listen)
        except ConfigError:
            self.close()
            raise

    def _serve_health(self, listen: str) -> None:
        from flower_split.trunk.service.health_port import HealthPort

        served = HealthPort(listen, self._server.health)
        self._beside.append(served)
        self.health_port = served.port

    def _serve_metrics(self, serving: Serving, checkpoints: Path | None) -> None:
        from flower_split.trunk.engine.several_experiments import SeveralExperiments

        try:
            from flower_split.trunk.service.metrics import MetricsServer, Sources
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--metrics-listen needs {error.name}, which is not installed. Run: pip install "
                "'flower-split[metrics]'"
            ) from error
        sources = Sources(
            status=self.engine.status,
            experiments=(
                self.engine.statuses if isinstance(self.engine, SeveralExperiments) else None
            ),
            refusals=lambda: self._server.refusals.counts,
            checkpoints=checkpoints,
            certificate=Path(serving.tls_certificate) if serving.tls_certificate else None,
        )
        served = MetricsServer(serving.metrics_listen, sources)
        self._beside.append(served)
        self.metrics_port = served.port

    def on_failure(self, tell: Callable[[str], None]) -> None:
        """Have ``tell`` called, on another thread, with the reason why this trunk must end."""
        self._fail = tell
        if self.failure:
            tell(self.failure)

    def close(self) -> None:
        """Stop serving; calls in progress get a short grace."""
        for served in self._beside:
            served.close()
        self._server.stop(_GRACE_SECONDS)
        self.engine.close(self.failure or "the trunk is shutting down")
        self._close_followers()
        if self._audit is not None:
            self._audit.close()

    def _close_followers(self) -> None:
        if self._followers is not None:
            self._followers.close()

    def _on_loss(self, why: str) -> None:
        """Turn calls away, say that nothing is served any more, and leave the rest to the process."""
        self.failure = why
        self._server.health.enter_graceful_shutdown()
        self._fail(why)


def _engines(
    config: RunConfig, checkpoints: Path | None, serving: Serving, followers: "Followers | None"
) -> "TrunkEngine | SeveralExperiments":
    """Return the engine of one experiment after the other, or those of several at once.

    Raises:
        ConfigError: Several are to be served without a directory for what they have committed, or one
            with several coordinators.
    """
    from flower_split.trunk.build import ExperimentEngines, make_engine
    from flower_split.trunk.engine.several_experiments import SeveralExperiments

    if config.trunk.max_experiments == 1:
        if serving.coordinators:
            raise ConfigError(
                "--coordinator gives further coordinators experiments of their own, and this trunk serves "
                "one at a time. Set trunk.max-experiments."
            )
        return make_engine(config, checkpoints, followers)
    if checkpoints is None:
        raise ConfigError(
            f"trunk.max-experiments = {config.trunk.max_experiments}: a trunk of several experiments lets "
            "go of those whose coordinator is silent, and brings them back from their checkpoints. Name a "
            "directory: --checkpoints DIR."
        )
    engines = ExperimentEngines(config, checkpoints)
    return SeveralExperiments(
        engines.make,
        engines.fingerprint,
        maximum=config.trunk.max_experiments,
        lease_seconds=config.trunk.experiment_lease,
    )


def _limits(config: RunConfig) -> "Limits":
    """Return what one client's calls may take at once."""
    from flower_split.trunk.service.limits import Limits

    return Limits(
        calls=config.trunk.max_calls_in_flight,
        call_bytes=int(config.trunk.call_memory_per_client * 2**30),
        call_positions=config.trunk.max_call_positions,
        first_frame_seconds=config.trunk.first_frame_timeout,
        connections=config.trunk.max_connections,
        stream_window=config.trunk.stream_window,
    )


def main() -> int:
    """Serve as a child: see the module's docstring."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    with loading_modules():
        quiet_libraries()
    answer = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not stand where the answer is read
    line = sys.stdin.readline()
    if not line.strip():
        return 0
    order = json.loads(line)
    try:
        failpoints.switch_on_from(os.environ.get(failpoints.VARIABLE, ""))
        PROCESS_TRACING.switch_on_from(os.environ, "flower-split-trunk")
        config = parse_run_config(order["config"])
        config = replace(config, trunk=replace(config.trunk, max_experiments=1))  # its parent's own
        serving = Serving(
            token=order["token"], listen=order["listen"], checkpoints=order["checkpoints"]
        )
        running = RunningTrunk(config, serving)
    except FlowerSplitError as error:
        print(json.dumps({"error": str(error)}), file=answer, flush=True)
        return 1

    def end(why: str) -> None:
        end_soon(why)
        running.close()
        os._exit(FAILED)  # the main thread waits for its parent

    running.on_failure(end)
    with running:
        print(json.dumps({"port": running.port}), file=answer, flush=True)
        while sys.stdin.readline():  # nothing more is said; the end is what counts
            pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
