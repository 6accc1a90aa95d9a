"""``flower-split trunk``: serve an app's trunk until a signal ends it."""

import argparse
import logging
import os
import secrets
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_split.cli.app_config import load_app
from flower_split.cli.overrides import parse_overrides
from flower_split.errors import ConfigError, TrunkUnavailable
from flower_split.runtime import failpoints
from flower_split.runtime.logs import LogSettings, log_to_stderr, quiet_libraries
from flower_split.runtime.notify import notify
from flower_split.runtime.secret_files import read_secret
from flower_split.runtime.tracing import PROCESS_TRACING
from flower_split.trunk.ending import end_soon
from flower_split.trunk.serve import RunningTrunk, Serving

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkCommand:
    """What the command line asks for."""

    app: Path  # the app's directory
    listen: str  # host:port; port 0: any free one
    token_file: Path  # made if it is missing
    coordinators: Sequence[str] = ()  # further ones, as NAME=FILE
    tls_certificate: str = ""  # PEM file; required off loopback
    tls_key: str = ""  # PEM file
    client_ca: str = ""  # PEM file; empty: no client certificate is asked for
    allow_clients: Sequence[str] = ()  # subjects, or @FILE
    allow_coordinators: Sequence[str] = ()
    checkpoints: str = ""  # directory; empty: none are kept
    metrics_listen: str = ""  # host:port for Prometheus; empty: no metrics
    health_listen: str = ""  # host:port on loopback, for probes; empty: none
    audit_log: str = ""  # file; empty: none is kept
    log: LogSettings = LogSettings(times=True)
    run_config: Sequence[str] | None = None  # values of --run-config


def trunk_command(arguments: argparse.Namespace) -> TrunkCommand:
    """Return what the command line asks for."""
    return TrunkCommand(
        app=arguments.app,
        listen=arguments.listen,
        token_file=arguments.token_file,
        coordinators=arguments.coordinator,
        tls_certificate=arguments.tls_certificate,
        tls_key=arguments.tls_key,
        client_ca=arguments.client_ca,
        allow_clients=arguments.allow_client,
        allow_coordinators=arguments.allow_coordinator,
        checkpoints=arguments.checkpoints,
        metrics_listen=arguments.metrics_listen,
        health_listen=arguments.health_listen,
        audit_log=arguments.audit_log,
        log=LogSettings(level=arguments.log_level, form=arguments.log_format, times=True),
        run_config=arguments.run_config,
    )


def serve_trunk(command: TrunkCommand) -> int:
    """Serve until SIGINT or SIGTERM.

    Raises:
        FlowerSplitError: The configuration is wrong, the model cannot be loaded, or the port
            cannot be served.
        TrunkUnavailable: A replica was lost while it served.
    """
    log_to_stderr(settings=command.log)
    quiet_libraries()
    PROCESS_TRACING.switch_on_from(os.environ, "flower-split-trunk")
    failpoints.switch_on_from(os.environ.get(failpoints.VARIABLE, ""))
    app = load_app(command.app)
    app.make_importable()
    config = app.config(parse_overrides(command.run_config))
    serving = Serving(
        listen=command.listen,
        token=token_from(command.token_file, command.checkpoints),
        token_file=str(command.token_file),
        coordinators=tuple(_named_file(text) for text in command.coordinators),
        tls_certificate=command.tls_certificate,
        tls_key=command.tls_key,
        client_ca=command.client_ca,
        allow_clients=tuple(command.allow_clients),
        allow_coordinators=tuple(command.allow_coordinators),
        checkpoints=command.checkpoints,
        metrics_listen=command.metrics_listen,
        health_listen=command.health_listen,
        audit_log=command.audit_log,
    )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())

    def fail(why: str) -> None:
        end_soon(why)
        ended.set()

    with RunningTrunk(config, serving) as running:
        running.on_failure(fail)
        host = command.listen.rpartition(":")[0]
        # On standard output, for scripts that asked for port 0.
        print(f"trunk serves on {host}:{running.port}", flush=True)
        if running.metrics_port:
            where = command.metrics_listen.rpartition(":")[0]
            logger.info("metrics at http://%s:%d/metrics", where, running.metrics_port)
        logger.info(
            'use it with: trunk.address="%s:%d" trunk.token-file="%s"',
            host,
            running.port,
            command.token_file.expanduser().absolute(),
        )
        notify(f"READY=1\nSTATUS=serving on port {running.port}")
        ended.wait()
        notify("STOPPING=1")
        if running.failure:
            raise TrunkUnavailable(running.failure)
        logger.info("ending")
    return 0


def _named_file(text: str) -> tuple[str, str]:
    """Return name and file of ``--coordinator``.

    Raises:
        ConfigError: It has no file.
    """
    name, equals, file = text.partition("=")
    if not equals or not file:
        raise ConfigError(f"--coordinator must be NAME=FILE; it is {text!r}.")
    return name, file


def token_from(path: Path, checkpoints: str = "") -> str:
    """Return the coordinator's token; a missing file is made with a fresh one, readable by its owner only.

    Args:
        path: The file.
        checkpoints: The trunk's directory of checkpoints. One that holds something is of a trunk that
            had a token, which the ServerApp goes on with: no other is made in silence.

    Raises:
        ConfigError: The file cannot be read or made, others can read it, or it was deleted.
    """
    path = path.expanduser()
    try:
        if not path.exists():
            kept = Path(checkpoints).expanduser() if checkpoints else None
            if kept is not None and kept.is_dir() and any(kept.iterdir()):
                raise ConfigError(
                    f"--token-file {path} is not there, but --checkpoints {kept} is of a trunk that "
                    "had one. Put the file back; or, if the token is to change, make one for the "
                    f"trunk and the ServerApp: (umask 077; openssl rand -hex 32 > {path})."
                )
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
    except OSError as error:
        raise ConfigError(
            f"--token-file {path} cannot be read or made ({error}). Name a file that this user may "
            "read and write."
        ) from error
    return read_secret(path, "--token-file")
