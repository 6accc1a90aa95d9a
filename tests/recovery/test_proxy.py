"""The proxy that makes connections fail does so when it is told to, and else passes everything."""

import importlib.util
import socket
import threading
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "simulations" / "chaos" / "proxy.py"


@pytest.fixture(scope="module")
def module():
    import sys

    spec = importlib.util.spec_from_file_location("chaos_proxy", PATH)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["chaos_proxy"] = loaded  # where dataclasses look their module up
    spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules["chaos_proxy"]


@pytest.fixture
def proxy(module):
    """In front of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(4096):
                    connection.sendall(data)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    running = module.Proxy(listener.getsockname())
    yield running
    running.close()
    listener.close()


def talk(proxy, payload: bytes) -> bytes:
    received = b""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as connection:
        try:
            connection.sendall(payload)
            while len(received) < len(payload) and (data := connection.recv(4096)):
                received += data
        except OSError:
            pass
    return received


def test_proxy_without_fault_passes_everything(proxy):
    payload = bytes(range(256)) * 100
    assert talk(proxy, payload) == payload
    assert proxy.fired == {}


def test_proxy_cuts_once_after_so_many_bytes(module, proxy):
    payload = b"x" * 50_000
    proxy.inject(module.Fault("cut", after_bytes=20_000))
    assert len(talk(proxy, payload)) < len(payload)
    assert proxy.fired == {"cut": 1}
    assert talk(proxy, payload) == payload


def test_proxy_refuses_once(module, proxy):
    proxy.inject(module.Fault("refuse"))
    assert talk(proxy, b"hello") == b""
    assert talk(proxy, b"hello") == b"hello"
    assert proxy.fired == {"refuse": 1}


def test_proxy_delays_and_passes(module, proxy):
    proxy.inject(module.Fault("delay", seconds=0.05))
    assert talk(proxy, b"hello") == b"hello"
    assert proxy.fired == {"delay": 1}
