"""What this machine reaches, and what would be in the way: ports, proxies, SuperLink, clock."""

import email.utils
import http.client
import os
import socket
import ssl
import sys
import time
from pathlib import Path
from urllib.request import getproxies_environment, proxy_bypass

from flower_split.cli import processes
from flower_split.cli.connections import Connection
from flower_split.cli.doctor.findings import Finding, ok, problem, warning

_SECONDS = 5.0  # of one connection
_CLOCKS = 60.0  # seconds that two machines may be apart
_FLOWERS_PORT = "39091"


def can_listen(address: str) -> Finding:
    """Say whether a server could listen at ``host:port`` now."""
    subject = f"port {address}"
    host, _, port = address.rpartition(":")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), int(port)))
    except (OSError, ValueError, OverflowError) as error:
        holder = processes.listener_of(int(port)) if port.isdigit() else None
        who = f" (process {holder} has it)" if holder else ""
        remedy = "End what listens there, or choose another port."
        return problem(subject, f"cannot be listened on: {error}{who}", remedy)
    return ok(subject, "is free")


def proxies(environment_note: str = "") -> Finding:
    """Say which proxies this process was given, and whether loopback would go through one.

    Args:
        environment_note: Said beside them, such as what ignores them.
    """
    subject = "proxy"
    found = {name: url for name, url in getproxies_environment().items() if name != "no"}
    if not found:
        return ok(subject, "none is set")
    text = ", ".join(f"{name}_proxy" for name in sorted(found)) + " is set"
    if not proxy_bypass("127.0.0.1"):
        return warning(
            subject,
            f"{text}, and not taken off for loopback: Flower on this machine would ask the proxy for it",
            "Run: export no_proxy=127.0.0.1,localhost (beside what it has now).",
        )
    return ok(subject, f"{text}, not for loopback{environment_note}")


def superlink(connection: Connection) -> list[Finding]:
    """Ask the SuperLink of a connection for its health, and compare clocks with it."""
    if connection.is_local:
        return [local_superlink()]
    subject = f"SuperLink {connection.name or 'default'}"
    host, _, port = connection.address.rpartition(":")
    try:
        asked = _asked(host.strip("[]"), int(port), connection)
    except ssl.SSLError as error:
        remedy = "Correct root-certificates of the connection, or start the SuperLink with TLS."
        return [
            problem(subject, f"{connection.address} has no TLS that is trusted: {error}", remedy)
        ]
    except (OSError, ValueError, http.client.HTTPException) as error:
        remedy = "Look whether it runs there, and whether a firewall or a proxy is in between."
        return [problem(subject, f"{connection.address} does not answer: {error!r}", remedy)]
    return [ok(subject, f"{connection.address} answers"), *_clock(asked, time.time())]


def _asked(host: str, port: int, connection: Connection) -> str:
    """Return the Date of the SuperLink's answer; empty: it gave none."""
    link: http.client.HTTPConnection
    if connection.insecure:
        link = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    else:
        context = ssl.create_default_context(cafile=connection.root_certificates or None)
        link = http.client.HTTPSConnection(host, port, timeout=_SECONDS, context=context)
    try:
        link.request("GET", "/health")
        return link.getresponse().headers.get("Date", "")
    finally:
        link.close()


def _clock(date: str, now: float) -> list[Finding]:
    if not date:
        return []
    apart = email.utils.parsedate_to_datetime(date).timestamp() - now
    text = f"the SuperLink's is {abs(apart):.0f} s {'ahead' if apart > 0 else 'behind'}"
    if abs(apart) <= _CLOCKS:
        return [ok("clock", text)]
    remedy = "Set both machines' clocks (chrony, ntp): a SuperNode whose clock is off ends at once."
    return [problem("clock", text, remedy)]


def local_superlink(port: int | None = None) -> Finding:
    """Say who listens where ``flwr run`` expects the SuperLink that Flower starts by itself.

    Args:
        port: Where; None: Flower's, by its own environment variable.
    """
    subject = "local SuperLink"
    if port is None:
        port = int(os.environ.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", _FLOWERS_PORT))
    holder = processes.listener_of(port)
    if holder is None:
        return ok(subject, f"nothing listens on Flower's port {port}; one is started when needed")
    program = processes.program_of(holder)
    if Path(program).parent == Path(sys.executable).parent:
        return ok(subject, f"process {holder} on port {port}, of this environment")
    return warning(
        subject,
        f"process {holder} listens on Flower's port {port}, and is not of this environment: {program}",
        f"flower-split run does not use it, but flwr run would. End it (kill {holder}), or set "
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT to another port.",
    )
