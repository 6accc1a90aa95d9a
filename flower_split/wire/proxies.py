"""The HTTP proxy on the way to a trunk: which one there is, and a connection through it.

A proxy is asked to CONNECT to the trunk, and passes on what it cannot read: only TLS goes through one,
since plain text stays on loopback, to which no proxy is asked.
"""

import base64
import socket
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from flower_split.config.validation import ENVIRONMENT, NO_PROXY, check_proxy
from flower_split.errors import ConfigError

_VARIABLES = ("grpc", "https", "http")  # NAME_proxy and NAME_PROXY, the first that is set
_HEAD_BYTES = 1 << 14  # of a proxy's answer


def proxy_to(address: str, setting: str = ENVIRONMENT) -> str:
    """Return the URL of the proxy to ask for a trunk off loopback; empty: it is reached directly.

    Args:
        address: ``host:port`` of the trunk.
        setting: ``environment`` (``https_proxy`` and the like), ``none``, or a URL. Hosts in
            ``no_proxy`` are reached directly whatever it is, which gRPC itself holds to, too.

    Raises:
        ConfigError: The proxy is no HTTP proxy.
    """
    if setting == NO_PROXY or proxy_bypass(address.rpartition(":")[0].strip("[]")):
        return ""
    if setting != ENVIRONMENT:
        check_proxy("trunk.proxy", setting)
        return setting
    found = getproxies_environment()
    for name in _VARIABLES:
        if url := found.get(name, ""):
            url = url if "://" in url else f"http://{url}"
            try:
                check_proxy(f"{name}_proxy of the environment", url)
            except ConfigError as error:
                raise ConfigError(f'{error} Or set trunk.proxy = "none".') from None
            return url
    return ""


def without_credentials(url: str) -> str:
    """Return a proxy as ``host:port``, fit for logs."""
    return urlsplit(url).netloc.rpartition("@")[2]


def connect(address: str, proxy: str, seconds: float) -> socket.socket:
    """Return a TCP connection to ``address``, through ``proxy`` where one is named.

    Raises:
        OSError: There is none within ``seconds``, or the proxy refused.
        ValueError: The address has no port that is a number.
    """
    if not proxy:
        host, _, port = address.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout=seconds)
    parts = urlsplit(proxy)
    link = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=seconds)
    try:
        link.sendall(_request(address, parts.username, parts.password))
        head = b""
        while b"\r\n\r\n" not in head:
            chunk = link.recv(_HEAD_BYTES)
            head += chunk
            if not chunk or len(head) > _HEAD_BYTES:
                raise OSError(f"the proxy {without_credentials(proxy)} gave no answer to CONNECT")
        status = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(status) < 2 or not status[1].startswith("2"):
            raise OSError(f"the proxy {without_credentials(proxy)} refused CONNECT: {status[1:]}")
    except BaseException:
        link.close()
        raise
    return link


def _request(address: str, user: str | None, password: str | None) -> bytes:
    lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
    if user is not None:
        pair = f"{unquote(user)}:{unquote(password or '')}"
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}")
    return "\r\n".join([*lines, "", ""]).encode()
