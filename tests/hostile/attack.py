"""An attack as a value, and the attacker that makes it: in this process, or in one of its own.

An attacker of its own process takes nothing of the honest client's interpreter lock, as any real one. Its
process reads a command a line and answers each with a line, in JSON: ``python -m tests.hostile.attack``.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import IO, Protocol

from tests.hostile.enemy import Enemy

ANSWERED_WITHIN = 10.0  # seconds, for the calls of an attack of which none may stay open


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Args:
        point: Of the threats in ``docs/security.md``: numbers, strangers, memory, members, arguments,
            credentials.
        name: What it does.
        codes: What its calls may be answered with; ``OPEN`` is a call that is still held.
        make: Makes its calls.
        repeats: Whether to make them again and again while the honest client works.
        named: Whether the round must name the attacker as left out for its numbers.
    """

    point: str
    name: str
    codes: frozenset[str]
    make: Callable[[Enemy], None]
    repeats: bool = True
    named: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to attack: what an enemy knows."""

    port: int
    token: str
    stale: str
    experiment: str
    victim: str
    fingerprint: dict[str, str]


@dataclass(slots=True)
class Told:
    """What an attacker says in the end."""

    answers: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Attacker(Protocol):
    """Makes one attack after the other."""

    def join(self, target: Target, name: str) -> None:
        """Open a session, to make the attack of that name."""

    def begin(self) -> None:
        """Attack, or go on; what is to be held is there when this returns."""

    def pause(self) -> None:
        """Make no more calls; those that are held stay."""

    def end(self) -> Told:
        """Let everything go."""


class AttackerHere:
    """An attacker in this process."""

    def __init__(self) -> None:
        self._enemy: Enemy | None = None
        self._attack: Attack | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._problems: list[str] = []

    def join(self, target: Target, name: str) -> None:
        from tests.hostile.attacks import ATTACKS  # they are made of this module's values

        (self._attack,) = (item for item in ATTACKS if item.name == name)
        self._enemy, self._problems = Enemy(**asdict(target)), []
        self._enemy.join()

    def begin(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        if self._attack is not None and not self._attack.repeats:
            self._thread.join()

    def pause(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def end(self) -> Told:
        self.pause()
        if self._enemy is None or self._attack is None:
            return Told()
        self._enemy.close(0.0 if "OPEN" in self._attack.codes else ANSWERED_WITHIN)
        return Told(dict(self._enemy.answers), self._enemy.texts, self._problems)

    def _run(self) -> None:
        assert self._attack is not None and self._enemy is not None
        try:
            self._attack.make(self._enemy)
            while self._attack.repeats and not self._stop.wait(0.01):
                self._attack.make(self._enemy)
        except Exception as error:  # a fault of the attack, which must not look like a defence
            self._problems.append(f"the attack broke: {error!r}")


class AttackerApart:
    """An attacker in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.hostile.attack"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def join(self, target: Target, name: str) -> None:
        self._ask({"join": asdict(target), "name": name})

    def begin(self) -> None:
        self._ask({"do": "begin"})

    def pause(self) -> None:
        self._ask({"do": "pause"})

    def end(self) -> Told:
        return Told(**self._ask({"do": "end"}))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _ask(self, command: dict[str, object]) -> dict[str, object]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer: dict[str, object] = json.loads(self._process.stdout.readline())
        return answer


def serve(commands: IO[str], answers: IO[str]) -> None:
    """Do what each line of ``commands`` says."""
    attacker = AttackerHere()
    for line in commands:
        command, answer = json.loads(line), {}
        if "join" in command:
            attacker.join(Target(**command["join"]), command["name"])
        elif command["do"] == "end":
            answer = asdict(attacker.end())
        else:
            {"begin": attacker.begin, "pause": attacker.pause}[command["do"]]()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
