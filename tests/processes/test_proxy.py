"""The proxy that makes connections fail does so when it is told to, and else passes everything."""

import importlib.util
import socket
import threading
from pathlib import Path

import pytest
import torch

from tests.support.loopback import (
    HIDDEN,
    Recorder,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)

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


def test_proxy_delivers_a_connection_twice(module):
    received: list[bytes] = []
    done = threading.Semaphore(0)

    def take(connection: socket.socket) -> None:
        with connection:
            data = b"".join(iter(lambda: connection.recv(4096), b""))
        received.append(data)
        done.release()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = module.Proxy(listener.getsockname())
        proxy.inject(module.Fault("duplicate"))
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
            for _ in range(2):
                threading.Thread(target=take, args=listener.accept()[:1], daemon=True).start()
            client.sendall(b"x" * 50_000)
            client.shutdown(socket.SHUT_WR)
            assert done.acquire(timeout=10) and done.acquire(timeout=10)
        proxy.close()
    assert received == [b"x" * 50_000] * 2
    assert proxy.fired == {"duplicate": 1}


def test_calls_that_arrive_twice_count_once(module):
    hidden = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    adapters, arrived = [], []
    for twice in (False, True):
        recorder, engine = Recorder(), make_engine(TinyTrunk())
        with served(engine, interceptors=[recorder]) as port:
            proxy = module.Proxy(("127.0.0.1", port))
            if twice:
                proxy.inject(module.Fault("duplicate", times=2))  # control and data connection
            with coordinator(port) as control:
                control.begin_round(plan(1))
                trunk = remote(proxy.port)
                trunk.open(2)
                for window in range(2):
                    with trunk.micro_batch(window, 0, num_tokens=4, loss_denominator=4, last=True):
                        output = trunk(hidden.clone().requires_grad_())
                        output.square().sum().backward()
                report = control.prepare_round("e", 1, 0)
            trunk.close()
            proxy.close()
            assert report.slots[0].contributions == 2
            assert report.optimizer_steps == 2
            adapters.append(engine.adapter())
            arrived.append(len(recorder.requests))
            assert proxy.fired == ({"duplicate": 2} if twice else {})
    assert arrived[1] > arrived[0]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_proxy_duplicates_the_connections_it_is_told_to(module):
    answers = iter([True, False, True])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = module.Proxy(listener.getsockname(), lambda: next(answers))
        counts = []
        for twice in (2, 1, 2):
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=10):
                listener.settimeout(10)
                for _ in range(twice):
                    listener.accept()[0].close()
            counts.append(proxy.fired.get("duplicate", 0))
        proxy.close()
    assert counts == [1, 1, 2]
