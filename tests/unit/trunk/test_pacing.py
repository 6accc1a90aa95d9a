"""Refusals have a rate for each caller, and wait for it on one thread."""

import threading

from flower_split.trunk.service.pacing import PARTICIPANT, STRANGERS, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_burst_is_refused_at_once_and_what_follows_at_the_rate() -> None:
    pace = Pace(Clock())
    due = [pace.count("one") for _ in range(PARTICIPANT.burst + 50)]
    assert due[: PARTICIPANT.burst] == [100.0] * PARTICIPANT.burst
    assert round(due[-1] - 100.0, 6) == 50 / PARTICIPANT.per_second
    assert due == sorted(due)


def test_callers_have_rates_of_their_own_and_strangers_share_one() -> None:
    pace = Pace(Clock())
    for _ in range(2 * PARTICIPANT.burst):
        pace.count("one")
    assert pace.is_over("one") and not pace.is_over("other") and not pace.is_over("")
    assert pace.count("other") == 100.0
    for _ in range(STRANGERS.burst + 1):
        pace.count("")
    assert pace.is_over("")


def test_caller_that_waits_has_its_burst_again() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(PARTICIPANT.burst + 5):
        pace.count("one")
    assert pace.is_over("one")
    clock.now += 5 / PARTICIPANT.per_second
    assert not pace.is_over("one")
    clock.now += 60.0
    assert pace.count("one") == clock.now


def test_refusals_that_are_not_due_wait_without_a_thread_each() -> None:
    clock = Clock()
    pace = Pace(clock)
    lane = pace.lane("one")
    futures = [lane.submit(lambda: None) for _ in range(PARTICIPANT.burst + 20)]
    for future in futures[: PARTICIPANT.burst]:
        future.result(10)
    assert not any(future.done() for future in futures[PARTICIPANT.burst :])
    assert sum(thread.name == "trunk-refusals" for thread in threading.enumerate()) == 1
    pace.close()  # answers whoever waits
    assert all(future.done() for future in futures)


def test_what_a_refusal_raises_is_its_futures_and_the_next_is_answered() -> None:
    with Pace() as pace:
        lane = pace.lane("")
        broken, whole = lane.submit(lambda: 1 // 0), lane.submit(lambda: 7)
        assert isinstance(broken.exception(10), ZeroDivisionError)
        assert whole.result(10) == 7


def test_flood_beyond_what_may_wait_is_answered_at_once() -> None:
    pace = Pace(Clock())
    lanes = [pace.lane(f"caller {index}") for index in range(40)]
    futures = [
        lane.submit(lambda: None) for lane in lanes for _ in range(2 * PARTICIPANT.burst + 1)
    ]
    later = pace.count("caller 0")
    for lane in lanes:
        futures += [lane.submit(lambda: None) for _ in range(PARTICIPANT.burst)]
    assert later > 100.0 and pace.count("caller 0") == 100.0  # 4096 wait: no more do
    pace.close()
    assert all(future.done() for future in futures)
