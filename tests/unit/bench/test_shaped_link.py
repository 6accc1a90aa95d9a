"""A shaped link takes the time that its rate and its round trip say, and loses nothing."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from flower_split.bench.shaped_link import Link, serve_link
from flower_split.bench.transport import start_apart
from flower_split.cli.main import main


@contextmanager
def through(link: Link, count: int = 1) -> Iterator[list[socket.socket]]:
    """Connections through one link: the near end of each, then the far end of each."""
    with ExitStack() as stack:
        behind = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        behind.settimeout(20)
        target = behind.getsockname()[1]
        front = start_apart(partial(serve_link, link=link, target=target), stack)
        near, far = [], []
        for _ in range(count):
            near.append(stack.enter_context(socket.create_connection(("127.0.0.1", front))))
            far.append(stack.enter_context(behind.accept()[0]))
        for end in near + far:
            end.settimeout(20)
        yield near + far


def read(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = end.recv(count - len(data))
        assert piece, f"the connection ended after {len(data)} of {count} bytes"
        data += piece
    return data


def test_bytes_arrive_as_sent_no_faster_than_the_rate_and_half_a_round_trip() -> None:
    content = os.urandom(1_000_000)
    with through(Link(megabits=80.0, round_trip=0.1)) as (near, far):
        began = time.perf_counter()
        near.sendall(content)
        arrived = read(far, len(content))
        taken = time.perf_counter() - began
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""  # the end of what is sent passes through, too
    assert arrived == content
    assert taken >= 0.1 + 0.05 - 0.005  # 0.1 s at 10 MB/s, 0.05 s on the way


def test_each_way_has_the_rate_for_itself_and_a_round_trip_takes_its_time() -> None:
    content, both_ways, pauses = bytes(500_000), [], []
    with through(Link(megabits=40.0, round_trip=0.04)) as (near, far):
        for _ in range(5):
            began = time.perf_counter()
            both = [threading.Thread(target=end.sendall, args=(content,)) for end in (near, far)]
            for one in both:
                one.start()
            read(far, len(content))
            read(near, len(content))
            both_ways.append(time.perf_counter() - began)
            for one in both:
                one.join()
            began = time.perf_counter()
            near.sendall(b"?")
            far.sendall(read(far, 1))
            read(near, 1)
            pauses.append(time.perf_counter() - began)
    # A busy machine makes some of five slower; the quickest is what the link does.
    assert 0.1 + 0.02 - 0.005 <= min(both_ways) < 0.19  # both at once; one after the other 0.2 s
    assert 0.04 <= min(pauses) < 0.1


def test_two_connections_share_the_rate() -> None:
    with through(Link(megabits=40.0), count=2) as (one, other, far_one, far_other):
        began = time.perf_counter()
        both = [
            threading.Thread(target=end.sendall, args=(bytes(250_000),)) for end in (one, other)
        ]
        for thread in both:
            thread.start()
        read(far_one, 250_000)
        read(far_other, 250_000)
        taken = time.perf_counter() - began
        for thread in both:
            thread.join()
    assert taken >= 0.1 - 0.005  # 500,000 bytes at 5 MB/s


def test_client_of_a_link_without_a_server_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        target = gone.getsockname()[1]
    with ExitStack() as stack:
        front = start_apart(partial(serve_link, link=Link(megabits=40.0), target=target), stack)
        with socket.create_connection(("127.0.0.1", front), timeout=20) as near:
            assert near.recv(1) == b""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--link", "0"], "--link must be above 0"),
        (["--link", "-1"], "--link must be above 0"),
        (["--link", "nan"], "--link must be above 0"),
        (["--link", "10", "--round-trip", "-1"], "--round-trip 0 ms or more"),
        (["--round-trip", "20"], "none is named"),
        (["--stream-window", "100"], "trunk.stream-window must be"),
    ],
)
def test_command_refuses_what_is_no_link(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "transport", *options]) == 2
    assert named in " ".join(capsys.readouterr().err.split())
