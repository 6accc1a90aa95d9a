"""``flower-split status``: what a trunk answers, for people and for programs."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from flower_split.cli.main import main
from flower_split.cli.status import look, picture
from flower_split.protocol.values import EVALUATION_ENDED, ProcessReport, SlotReport, TrunkStatus
from tests.support.loopback import (
    COORDINATOR_TOKEN,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    served,
)


def status(tokens: float, seconds: float, server_round: int = 3) -> TrunkStatus:
    return TrunkStatus(
        epoch=1,
        version=4,
        experiment="exp",
        server_round=server_round,
        phase="open",
        window=1,
        num_tokens=tokens,
        slots=(
            SlotReport(
                slot=0, joined=True, silent_seconds=2.0, num_tokens=tokens, bytes_sent=3 << 20
            ),
            SlotReport(slot=2, joined=True, waited_seconds=41.0, silent_seconds=44.0),
            SlotReport(slot=5),
        ),
        process=ProcessReport(round_seconds=seconds, resident_bytes=100 << 20, rounds_aborted=1),
    )


def test_rate_is_of_the_round_and_then_between_two_looks() -> None:
    first = status(600.0, 10.0)
    assert look(first).tokens_per_second == 60.0
    assert look(status(900.0, 15.0), first, 5.0).tokens_per_second == 60.0
    assert look(status(700.0, 15.0), first, 5.0).tokens_per_second == 20.0
    assert look(status(80.0, 2.0, server_round=4), first, 5.0).tokens_per_second == 40.0
    evaluated = status(80.0, 2.0)  # the same round, which counts anew
    assert look(evaluated, first, 5.0).tokens_per_second == 40.0


def test_picture_says_who_is_waited_for_and_since_when() -> None:
    text = io.StringIO()
    Console(file=text, width=120).print(picture("trunk.example:9500", look(status(600.0, 10.0))))
    shown = text.getvalue()
    [late] = [line for line in shown.splitlines() if line.startswith("│ 2 ")]
    assert "41 s" in late and "44 s ago" in late
    [absent] = [line for line in shown.splitlines() if line.startswith("│ 5 ")]
    assert "not joined" in absent
    assert "60 tokens/s" in shown and "round 3" in shown and "3.0 MiB" in shown
    assert "1 aborted" in shown and "100.0 MiB" in shown


@pytest.mark.parametrize(
    ("why", "first_line", "problem"),
    [
        (EVALUATION_ENDED, "evaluated", ""),  # how every evaluation ends is no problem of anybody's
        ("slot 1 left", "aborted", "problem: slot 1 left"),
    ],
)
def test_evaluation_that_ended_is_told_from_a_round_that_was_given_up(
    why: str, first_line: str, problem: str
) -> None:
    engine = make_engine(TinyTrunk())
    with served(engine) as port, coordinator(port) as link:
        begun = replace(plan(2), evaluate=True)
        link.begin_round(begun)
        link.abort_round(begun.experiment, begun.server_round, begun.attempt, why)
        found = link.status()
    text = io.StringIO()
    Console(file=text, width=120).print(picture("trunk.example:9500", look(found)))
    assert text.getvalue().splitlines()[0].startswith(f"trunk trunk.example:9500  {first_line} ")
    assert problem in text.getvalue() and ("problem" in text.getvalue()) == bool(problem)


def test_status_of_a_serving_trunk_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text(COORDINATOR_TOKEN)
    token.chmod(0o600)
    engine = make_engine(TinyTrunk())
    with served(engine) as port:
        with coordinator(port) as link:
            link.begin_round(plan(2))
        address = f"127.0.0.1:{port}"
        assert main(["status", address, "--token-file", str(token), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        token.write_text("of somebody else entirely")
        assert main(["status", address, "--token-file", str(token)]) == 1
    assert found["phase"] == "joining" and [slot["slot"] for slot in found["slots"]] == [0, 1]
    assert found["process"]["uptime_seconds"] > 0 and found["tokens_per_second"] == 0.0
    assert "token" in capsys.readouterr().err


def test_watch_faster_than_it_helps_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--token-file", str(tmp_path / "t"), "--watch", "0.01"]
    assert main(["status", "127.0.0.1:1", *options]) == 2
    assert "0.2" in capsys.readouterr().err
