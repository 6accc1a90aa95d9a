"""What a participant tries: more than its share, numbers that scale others' work, tensors of its choice."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.sending import Outgoing
from tests.hostile.attack import Attack
from tests.hostile.attacks_of_strangers import (
    CONTROL,
    COORDINATORS,
    STRANGER,
    STREAMS,
    Make,
    called,
    silent,
)
from tests.hostile.enemy import HIDDEN, Enemy, smashed

SHARE = frozenset({"RESOURCE_EXHAUSTED", "OPEN", "DEADLINE_EXCEEDED"})
INVALID = frozenset({"INVALID_ARGUMENT"})


def members() -> Iterator[Attack]:
    """A participant that wants more than its share."""
    for method in (*STREAMS, *CONTROL):
        yield Attack("members", f"silent-{method}", SHARE, silent(method, 60), repeats=False)
    for method in COORDINATORS:
        yield Attack("members", f"silent-{method}", STRANGER, silent(method, 60), repeats=False)

    def announce(enemy: Enemy) -> None:
        frames = enemy.forward(enemy.count, {"hidden_states": smashed(8, 64, 4096)})[:1]
        enemy.start("Forward", 40, frames)

    yield Attack("members", "40-forwards-announce-8-MiB-and-stall", SHARE, announce, repeats=False)

    def announce_gradients(enemy: Enemy) -> None:
        enemy.start("Backward", 40, enemy.backward(enemy.count, smashed(8, 64, 4096))[:1])

    yield Attack(
        "members", "40-backwards-announce-8-MiB-and-stall", SHARE, announce_gradients, repeats=False
    )

    def ahead(enemy: Enemy) -> None:
        for _ in range(192):
            frames = enemy.forward(enemy.count, version=enemy.version + 1)
            enemy.start("Forward", 1, frames, silent=False)

    # UNAVAILABLE: HTTP/2 refuses streams above those that a connection may have.
    waiting = SHARE | {"UNAVAILABLE"}
    yield Attack("members", "192-forwards-wait-for-a-version", waiting, ahead, repeats=False)

    def wait_version(enemy: Enemy) -> None:
        request = pb.WaitVersionRequest(
            session=enemy.session, trunk_epoch=enemy.epoch, version=10**6
        )
        enemy.start("WaitVersion", 100, [request.SerializeToString()], silent=False)

    yield Attack("members", "100-waits-for-version-a-million", SHARE, wait_version, repeats=False)

    def evaluate(enemy: Enemy) -> None:
        enemy.call("Forward", enemy.forward(enemy.count, mode=pb.EVALUATE))

    exhausted = frozenset({"RESOURCE_EXHAUSTED"})
    yield Attack("members", "evaluations-in-a-training-round", exhausted, evaluate)

    def evaluate_with_cache(enemy: Enemy) -> None:
        use = pb.CacheUse(id=enemy.count)
        enemy.call("Forward", enemy.forward(enemy.count, mode=pb.EVALUATE, cache=use))

    yield Attack("members", "key-value-caches-in-a-training-round", exhausted, evaluate_with_cache)

    def flood(enemy: Enemy) -> None:
        enemy.start("Forward", 8, enemy.forward(enemy.count), silent=False, timeout=20.0)

    # UNAVAILABLE: HTTP/2 refuses streams above those that a connection may have.
    flooded = SHARE | {"OK", "FAILED_PRECONDITION", "UNAVAILABLE"}

    def forwards(enemy: Enemy) -> None:
        for _ in range(8):
            enemy.start("Forward", 1, enemy.forward(enemy.count), silent=False, timeout=20.0)

    yield Attack("members", "forwards-that-no-backward-follows", flooded, forwards)
    yield Attack("members", "one-forward-sent-eight-times", flooded, flood)

    def unrecorded(enemy: Enemy) -> None:
        for _ in range(8):
            frames = enemy.forward(enemy.count, mode=pb.NO_GRAD)
            enemy.start("Forward", 1, frames, silent=False, timeout=20.0)

    yield Attack("members", "forwards-that-keep-nothing", flooded, unrecorded)

    def refused(enemy: Enemy) -> None:
        for _ in range(8):
            frames = enemy.forward(enemy.count, trunk_epoch=enemy.epoch ^ 1)
            enemy.start("Forward", 1, frames, silent=False, timeout=20.0)

    yield Attack("members", "a-flood-of-calls-that-are-each-refused", flooded, refused)

    def reread(enemy: Enemy) -> None:
        enemy.call("Forward", enemy.forward(enemy.count))

    read = frozenset({"OK", "RESOURCE_EXHAUSTED"})
    yield Attack("members", "forwards-that-are-read-and-never-followed", read, reread)

    def pairs(enemy: Enemy) -> None:
        index = enemy.count
        enemy.call("Forward", enemy.forward(index))
        enemy.call("Backward", enemy.backward(index))

    paired = frozenset({"OK", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"})
    yield Attack("members", "micro-batches-without-end", paired, pairs)

    def backwards_from_the_end(enemy: Enemy) -> None:
        index = 10**6 - enemy.count
        enemy.call("Forward", enemy.forward(index))
        enemy.call("Backward", enemy.backward(index))

    yield Attack("members", "micro-batches-from-the-last-one-on", paired, backwards_from_the_end)
    for name, shape in (("rows", (600, 1)), ("positions", (1, 600)), ("both", (64, 64))):

        def large(enemy: Enemy, shape: tuple[int, int] = shape) -> None:
            enemy.call("Forward", enemy.forward(enemy.count, {"hidden_states": smashed(*shape)}))

        yield Attack("members", f"too-many-{name}", exhausted, large)

    def longer(enemy: Enemy) -> None:
        enemy.call("Forward", enemy.forward(enemy.count, {"hidden_states": smashed(1, 400)}))

    yield Attack("members", "a-sequence-longer-than-the-models", INVALID, longer)

    def reopen(enemy: Enemy) -> None:
        enemy.answers[enemy.join()] += 1

    yield Attack("members", "its-session-opened-again-and-again", frozenset({"OK"}), reopen)

    def replan(enemy: Enemy) -> None:
        enemy.answers[enemy.join(planned_steps=2**31)] += 1

    yield Attack("members", "two-billion-steps-planned", INVALID, replan)

    def released(enemy: Enemy) -> None:
        ids = list(range(100_000))
        frames = enemy.forward(enemy.count, mode=pb.EVALUATE, released_caches=ids)
        enemy.call("Forward", frames)

    yield Attack("members", "100000-caches-released", exhausted, released)


def numbers() -> Iterator[Attack]:
    """Numbers that would scale the others' work; each window is the attacker's whole contribution."""

    def lie(
        name: str, codes: frozenset[str], grad: Tensor | None = None, **values: float
    ) -> Attack:
        def make(enemy: Enemy) -> None:
            enemy.call("Forward", enemy.forward(0))
            enemy.call("Backward", enemy.backward(0, grad, last=True, **values))

        named = codes == frozenset({"OK"})
        return Attack("numbers", name, codes, make, repeats=False, named=named)

    accepted = frozenset({"OK"})
    yield lie("denominator-1e300", accepted, loss_denominator=1e300)
    yield lie("denominator-times-1e6", accepted, loss_denominator=256e6)
    yield lie("denominator-of-one-token-more", accepted, loss_denominator=257.0)
    yield lie("gradient-times-1e15", accepted, 1e15 * smashed())
    yield lie("gradient-times-1e25", accepted, 1e25 * smashed())
    refused = frozenset({"OK", "FAILED_PRECONDITION"})
    yield lie("gradient-times-1e38", refused, 1e38 * smashed())
    for name, value in (("nan", math.nan), ("inf", math.inf), ("minus-inf", -math.inf)):
        one = smashed()
        one[0, 0, 0] = value
        yield lie(f"gradient-with-{name}", refused, one)
    invalid = frozenset({"OK", "INVALID_ARGUMENT"})
    for name, value in (
        ("zero", 0.0),
        ("minus-one", -1.0),
        ("nan", math.nan),
        ("inf", math.inf),
        ("minus-inf", -math.inf),
    ):
        yield lie(f"denominator-{name}", invalid, loss_denominator=value)
        yield lie(f"tokens-{name}", invalid, num_tokens=value)
    yield lie("more-tokens-than-positions", invalid, num_tokens=257.0)
    yield lie("tokens-1e300", invalid, num_tokens=1e300)


def arguments() -> Iterator[Attack]:
    """Tensors that its model does not take, and messages that are none."""
    names: dict[str, Tensor] = {
        "attention_mask/KIND": torch.ones(4, 64, dtype=torch.bool),
        "attention_mask/self": torch.ones(4, 64, dtype=torch.bool),
        "layer_argument/self": torch.ones(1),
        "layer_argument/hidden_states": smashed(),
        "layer_argument/past_key_values": torch.ones(1),
        "host_argument/self": torch.ones(1),
        "host_argument/input_ids": torch.ones(4, 64, dtype=torch.int64),
        "host_argument/past_key_values": torch.ones(1),
        "__class__.__init__": torch.ones(1),
        "attention_mask": torch.full((4, 64), 7, dtype=torch.int64),
        "position_ids": torch.full((4, 64), -1, dtype=torch.int64),
    }
    extra = {name: {name: tensor} for name, tensor in names.items()}
    extra["mask-of-7-heads"] = {"attention_mask": torch.ones(4, 7, 64, 64)}
    extra["position-2-to-the-40"] = {"position_ids": torch.full((4, 64), 2**40)}
    extra["another-width"] = {"hidden_states": smashed(width=HIDDEN + 1)}
    extra["no-rows"] = {"hidden_states": smashed(rows=0)}
    extra["no-positions"] = {"hidden_states": smashed(positions=0)}
    extra["numbers-as-hidden-states"] = {"hidden_states": torch.ones(4, 64, HIDDEN).long()}
    for name, tensors in extra.items():

        def ask(enemy: Enemy, tensors: dict[str, Tensor] = tensors) -> None:
            found = {"hidden_states": smashed(), **tensors}
            enemy.call("Forward", enemy.forward(enemy.count, found))

        yield Attack("arguments", f"forward-with-{name}", INVALID, ask)
    for name, value in (("nan", math.nan), ("inf", math.inf)):

        def poison(enemy: Enemy, value: float = value) -> None:
            found = {"hidden_states": value * smashed()}
            enemy.call("Forward", enemy.forward(enemy.count, found))

        codes = frozenset({"FAILED_PRECONDITION"})
        yield Attack("arguments", f"forward-with-{name}", codes, poison)

    def broken(frames: Callable[[Enemy], list[bytes]], method: str = "Forward") -> Make:
        return lambda enemy: enemy.call(method, frames(enemy)) and None

    streams: dict[str, Make] = {
        "no-frame": broken(lambda enemy: []),
        "noise": broken(lambda enemy: [b"\xff" * 100]),
        "no-header": broken(lambda enemy: [b"\x7a\x03abc"]),
        "a-payload-too-short": broken(lambda enemy: enemy.forward(0)[:0] + [short(enemy)]),
        "a-payload-too-long": broken(lambda enemy: [*enemy.forward(enemy.count), b"\x7a\x01x"]),
        "the-header-of-a-backward": broken(lambda enemy: enemy.backward(0)),
        "mode-9": broken(lambda enemy: enemy.forward(enemy.count, mode=9)),
        "no-request": broken(lambda enemy: [], "WaitVersion"),
        "noise-for-a-request": broken(lambda enemy: [b"\xff" * 9], "WaitVersion"),
    }
    for name, make in streams.items():
        yield Attack("arguments", f"message-with-{name}", INVALID, make)


def short(enemy: Enemy) -> bytes:
    """A first frame that announces more than follows."""
    header = pb.ForwardHeader(session=enemy.session, trunk_epoch=enemy.epoch, mode=pb.NO_GRAD)
    header.key.CopyFrom(enemy.key(0))
    frame = next(Outgoing(pb.Header(forward=header), {"hidden_states": smashed()}).frames())
    size = smashed().nbytes
    head = frame[:-size]  # the header, then the payload's tag and length
    return head[: head.rindex(b"\x7a")]


def credentials() -> Iterator[Attack]:
    """Its own credential, for what is not its own; and what it has sent, sent again."""
    for method in COORDINATORS:
        yield Attack("credentials", f"a-participant-calls-{method}", STRANGER, called(method))

    def forward(enemy: Enemy) -> None:
        enemy.call("Forward", enemy.forward(enemy.count, session=enemy.victim))

    def backward(enemy: Enemy) -> None:
        enemy.call("Backward", enemy.backward(0, session=enemy.victim))

    def close(enemy: Enemy) -> None:
        request = pb.CloseSessionRequest(session=enemy.victim, trunk_epoch=enemy.epoch)
        enemy.call("CloseSession", [request.SerializeToString()])

    def shorten(enemy: Enemy) -> None:
        request = pb.ShortenPlanRequest(
            session=enemy.victim, trunk_epoch=enemy.epoch, planned_steps=0
        )
        enemy.call("ShortenPlan", [request.SerializeToString()])

    def wait(enemy: Enemy) -> None:
        request = pb.WaitVersionRequest(session=enemy.victim, trunk_epoch=enemy.epoch)
        enemy.call("WaitVersion", [request.SerializeToString()])

    for name, make in (
        ("Forward", forward),
        ("Backward", backward),
        ("CloseSession", close),
        ("ShortenPlan", shorten),
        ("WaitVersion", wait),
    ):
        yield Attack("credentials", f"{name}-in-the-honest-session", STRANGER, make)
    refused = frozenset({"FAILED_PRECONDITION"})
    wrong: dict[str, dict[str, object]] = {
        "another-experiment": {"experiment": "another"},
        "the-next-round": {"server_round": 2},
        "another-attempt": {"attempt": 1},
    }
    for name, key in wrong.items():

        def misname(enemy: Enemy, key: dict[str, object] = key) -> None:
            enemy.call("Forward", enemy.forward(enemy.count, key=key))

        yield Attack("credentials", f"a-contribution-to-{name}", refused, misname)

    def epoch(enemy: Enemy) -> None:
        enemy.call("Forward", enemy.forward(enemy.count, trunk_epoch=enemy.epoch ^ 1))

    def session(enemy: Enemy) -> None:
        enemy.call("Forward", enemy.forward(enemy.count, session="0" * 32))

    def other_content(enemy: Enemy) -> None:
        enemy.call("Forward", enemy.forward(7, {"hidden_states": enemy.count * smashed()}))

    def unknown_backward(enemy: Enemy) -> None:
        enemy.call("Backward", enemy.backward(10**6 + enemy.count))

    yield Attack("credentials", "the-epoch-of-another-process", refused, epoch)
    yield Attack("credentials", "a-session-that-is-not-there", refused, session)
    replayed = frozenset({"OK", "FAILED_PRECONDITION"})
    yield Attack("credentials", "one-name-with-other-content", replayed, other_content)
    yield Attack("credentials", "a-backward-without-its-forward", refused, unknown_backward)
