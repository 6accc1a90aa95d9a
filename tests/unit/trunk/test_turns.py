"""Clients take turns on the compute thread, whatever each of them has waiting."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from flower_split.errors import RoundAborted
from flower_split.protocol.step_every import StepEvery
from flower_split.trunk.engine.ledger import Turns
from tests.support.toy_trunk import HIDDEN, ToyClient, make_engine, make_plan

INPUT = torch.ones(1, 4, HIDDEN)


def test_sessions_take_turns_and_the_calls_of_each_keep_their_order() -> None:
    turns, ran = Turns(), []
    for name in ("a1", "a2", "a3", "b1", "c1", "c2"):
        turns.put(name[0], lambda name=name: ran.append(name), Future())
    for _ in range(3):
        turns.run_next()
    turns.put("b", lambda: ran.append("b2"), Future())
    for _ in range(4):
        turns.run_next()
    assert ran == ["a1", "b1", "c1", "a2", "b2", "c2", "a3"]
    turns.run_next()  # nothing waits: nothing happens
    assert len(ran) == 7


def test_session_that_comes_late_is_next() -> None:
    turns, ran = Turns(), []
    for index in range(5):
        turns.put("many", lambda index=index: ran.append(index), Future())
    turns.run_next()
    turns.put("one", lambda: ran.append("one"), Future())
    turns.run_next()
    assert ran == [0, "one"]


def test_calls_that_wait_are_told_that_the_trunk_shuts_down() -> None:
    turns, reply = Turns(), Future()
    turns.put("a", lambda: None, reply)
    turns.give_up()
    with pytest.raises(RoundAborted, match="shutting down"):
        reply.result(0)


def test_honest_forward_waits_for_one_of_many_calls_of_another_client() -> None:
    started, go = threading.Event(), threading.Event()
    order: list[float] = []

    def note(_: object, args: tuple[torch.Tensor, ...]) -> None:
        order.append(float(args[0].detach()[0, 0, 0]))
        started.set()
        assert go.wait(20)

    with closing(make_engine()) as engine, ThreadPoolExecutor(12) as pool:
        engine.begin_round(make_plan((0, 1), step_every=StepEvery.SERVER_ROUND))
        honest, flooding = (ToyClient(engine, slot) for slot in (0, 1))
        engine.compute.trunk.register_forward_pre_hook(note)
        calls = [
            pool.submit(flooding.forward, 5 * INPUT, 0, index, digest=bytes([index]))
            for index in range(8)
        ]
        assert started.wait(20)
        calls.append(pool.submit(honest.forward, INPUT))
        end = time.monotonic() + 20
        while engine.inspect().num_replies < 9:  # until the engine has all of them
            assert time.monotonic() < end
            threading.Event().wait(0.01)
        go.set()
        for call in calls:
            call.result(20)
    assert order.index(1.0) <= 2  # of nine
