"""What somebody without a credential tries: to hold workers, to fill memory, to learn something."""

from collections.abc import Callable, Iterator

from flower_split.wire.grpc_options import Metadata, bearer
from tests.hostile.attack import Attack
from tests.hostile.enemy import Enemy

Make = Callable[[Enemy], None]

STREAMS = ("Forward", "Backward", "FinishStep")
CONTROL = ("OpenSession", "WaitVersion", "ShortenPlan", "CloseSession", "ShareMemory")
COORDINATORS = ("BeginRound", "PrepareRound", "CommitRound", "AbortRound", "Status", "GetAdapter")
CREDENTIALS: dict[str, Callable[[Enemy], Metadata]] = {
    "no-credential": lambda enemy: (),
    "unknown-token": lambda enemy: bearer("a token that nobody has"),
    "token-of-the-last-round": lambda enemy: bearer(enemy.stale),
}
STRANGER = frozenset({"UNAUTHENTICATED"})


def called(method: str, *, frames: Callable[[Enemy], list[bytes]] = lambda enemy: [b""]) -> Make:
    """One call, with its own token."""
    return lambda enemy: enemy.call(method, frames(enemy)) and None


def silent(method: str, count: int, metadata: Callable[[Enemy], Metadata] | None = None) -> Make:
    """Streams that say nothing, each with a deadline of a day."""
    return lambda enemy: enemy.start(method, count, (), metadata(enemy) if metadata else None)


def strangers() -> Iterator[Attack]:
    """Without a credential that the trunk knows now."""
    for name, metadata in CREDENTIALS.items():
        for method in STREAMS:
            count = {"Forward": 200, "Backward": 260}.get(method, 100)
            yield Attack(
                "strangers",
                f"{count}-silent-{method}-{name}",
                STRANGER,
                silent(method, count, metadata),
                repeats=False,
            )
        for method in (*CONTROL, *COORDINATORS, "NoSuchMethod"):

            def probe(enemy: Enemy, method: str = method, metadata: object = metadata) -> None:
                enemy.call(method, [b""], metadata(enemy))  # type: ignore[operator]

            yield Attack("strangers", f"{method}-{name}", STRANGER, probe)

        def flood(enemy: Enemy, metadata: object = metadata) -> None:
            given = metadata(enemy)  # type: ignore[operator]
            enemy.start("Forward", 8, [b""], given, silent=False, timeout=20.0)

        # UNAVAILABLE: HTTP/2 refuses streams above those that a connection may have.
        flooded = STRANGER | {"OPEN", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
        yield Attack("strangers", f"a-flood-of-Forward-{name}", flooded, flood)
    health = "/grpc.health.v1.Health/Check"
    yield Attack(
        "strangers",
        "100-silent-health-checks",
        frozenset({"OPEN", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}),
        silent(health, 100, lambda enemy: ()),
        repeats=False,
    )
    checked = frozenset({"OK", "OPEN", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"})
    yield Attack(
        "strangers",
        "a-flood-of-health-checks",
        checked,
        lambda enemy: enemy.start(health, 8, [b""], (), silent=False, timeout=20.0),
    )
    yield Attack(
        "strangers",
        "health-of-every-kind-watched",
        frozenset({"UNIMPLEMENTED"}),
        silent("/grpc.health.v1.Health/Watch", 50, lambda enemy: ()),
        repeats=False,
    )
    yield Attack(
        "strangers",
        "another-service",
        frozenset({"UNIMPLEMENTED"}),
        called("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
    )


def memory() -> Iterator[Attack]:
    """What a stranger makes the trunk hold."""
    large = bytes((8 << 20) - 100)
    for name, metadata in CREDENTIALS.items():

        def first_frames(enemy: Enemy, metadata: object = metadata) -> None:
            given = metadata(enemy)  # type: ignore[operator]
            enemy.start("Forward", 100, [large], given, timeout=20.0)

        yield Attack(
            "memory", f"100-first-frames-of-8-MiB-{name}", STRANGER, first_frames, repeats=False
        )
    stalled = frozenset({"STALLED"})
    for name, token in (
        ("unknown-token", lambda enemy: "nobody's"),
        ("token-of-the-last-round", lambda enemy: enemy.stale),
    ):

        def stall(enemy: Enemy, token: Callable[[Enemy], str] = token) -> None:
            enemy.stall_inside_messages(60, token(enemy))

        yield Attack("memory", f"60-stalls-inside-8-MiB-{name}", stalled, stall, repeats=False)
    connected = frozenset({"CONNECTED"})
    for name, data in (
        ("say-nothing", b""),
        ("stop-after-the-preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("speak-HTTP-1", b"GET / HTTP/1.1\r\nHost: trunk\r\n\r\n"),
        ("are-noise", bytes(range(1, 256)) * 16),
    ):

        def connect(enemy: Enemy, data: bytes = data) -> None:
            enemy.connect(200, data)

        yield Attack("memory", f"200-connections-that-{name}", connected, connect, repeats=False)

    def reconnect(enemy: Enemy) -> None:
        enemy.disconnect()
        enemy.connect(100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

    yield Attack("memory", "400-connections", connected, lambda e: e.connect(400), repeats=False)
    yield Attack("memory", "100-connections-again-and-again", connected, reconnect)

    def many_frames(enemy: Enemy) -> None:
        enemy.start("Forward", 380, [large], bearer("nobody's"), timeout=20.0)

    held = STRANGER | {"OPEN", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
    yield Attack("memory", "380-first-frames-of-8-MiB", held, many_frames, repeats=False)
    yield Attack(
        "memory",
        "metadata-of-7-KiB",
        STRANGER,
        lambda enemy: enemy.call("Forward", [b""], bearer("x" * 7_000)) and None,
    )
