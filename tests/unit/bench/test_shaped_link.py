"""A shaped link takes the time that its rate and its round trip say, and loses nothing."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from flower_split.bench.shaped_link import Link, serve_link
from flower_split.bench.transport import start_apart


@contextmanager
def through(link: Link, count: int = 1) -> Iterator[list[socket.socket]]:
    """Connections through one link: the near end of each, then the far end of each."""
    with ExitStack() as stack:
        behind = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
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
        data += end.recv(count - len(data)) or b"the connection ended early"
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
    assert 0.1 + 0.05 - 0.005 <= taken < 1.0  # 0.1 s at 10 MB/s, 0.05 s on the way


def test_each_way_has_the_rate_for_itself_and_a_round_trip_takes_its_time() -> None:
    content = bytes(500_000)
    with through(Link(megabits=40.0, round_trip=0.04)) as (near, far):
        began = time.perf_counter()
        both = [threading.Thread(target=end.sendall, args=(content,)) for end in (near, far)]
        for one in both:
            one.start()
        read(far, len(content))
        read(near, len(content))
        taken = time.perf_counter() - began
        for one in both:
            one.join()
        began = time.perf_counter()
        near.sendall(b"?")
        far.sendall(read(far, 1))
        read(near, 1)
        pause = time.perf_counter() - began
    assert 0.1 + 0.02 - 0.005 <= taken < 0.19  # both at once; one after the other 0.2 s
    assert 0.04 <= pause < 0.5


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
