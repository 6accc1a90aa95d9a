"""Drives a real engine beside the reference model, call by call, and compares everything visible."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flower_split.errors import RoundAborted, TrunkRefused, TrunkUnavailable
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import (
    BackwardCall,
    ContributionKey,
    ForwardCall,
    ForwardMode,
    SessionGrant,
)
from tests.support.toy_trunk import HIDDEN, ToyTrunk, make_engine, make_plan
from tests.support.window_reference import ReferenceRound

LEARNING_RATE = 0.5
WINDOW_SECONDS = 100.0


class ManualClock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def smashed(content: int) -> Tensor:
    """Small integers: sums over them are exact in fp32."""
    generator = torch.Generator().manual_seed(content)
    return torch.randint(-2, 3, (1, 2, HIDDEN), generator=generator).float()


def gradient_of(content: int) -> Tensor:
    return smashed(content + 1_000_000)


def weight_gradient(forward: int, backward: int) -> Tensor:
    """dL/dW of ``h @ W``, by hand."""
    return smashed(forward)[0].T @ gradient_of(backward)[0]


@dataclass
class Violation(AssertionError):
    """The engine did something else than the reference."""

    what: str

    def __str__(self) -> str:
        return self.what


class Rig:
    """One engine, one reference; both see every operation. ``rounds`` begin with :meth:`begin`."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.engine = make_engine(clock=self.clock)
        self.weight = ToyTrunk().weight.detach().clone()  # of the last committed round
        self.version = 0
        self.server_round, self.attempt = 1, -1
        self.reference: ReferenceRound | None = None
        self.prepared = self.committed = False
        self.grants: dict[tuple[int, int, int], SessionGrant] = {}  # round, attempt, slot
        self.replies: dict[tuple[object, ...], object] = {}
        self.operations = 0

    def close(self) -> None:
        self.engine.close()

    # ---- the coordinator

    def begin(self, slots: list[int], quorum: float, *, per_round: bool) -> None:
        """The next attempt of this round, or the first of the next one if this is committed."""
        if self.committed:
            self.server_round, self.attempt = self.server_round + 1, 0
        else:
            self.attempt += 1
        self.engine.begin_round(
            make_plan(
                slots,
                server_round=self.server_round,
                attempt=self.attempt,
                quorum=quorum,
                join_seconds=WINDOW_SECONDS,
                window_seconds=WINDOW_SECONDS,
                step_every=StepEvery.SERVER_ROUND if per_round else StepEvery.LOCAL_STEP,
            )
        )
        self.reference = ReferenceRound(slots, quorum, per_round=per_round)
        self.prepared = self.committed = False
        self.replies.clear()
        self.compare()

    def prepare(self) -> None:
        expected = self._model.prepare()
        name = ("test", self.server_round, self.attempt, self.clock.now + 1)
        self._same("prepare", expected, lambda: self.engine.prepare_round(*name))
        self.prepared = expected == "ok"
        self.compare()

    def commit(self) -> None:
        self.engine.commit_round("test", self.server_round, self.attempt)
        self.weight = self._expected_weight()
        self.version += len(self._model.steps)
        self.committed = True

    def abort(self) -> None:
        self.engine.abort_round("test", self.server_round, self.attempt, "the test says so")
        self._model.abort()
        self.compare()

    def expire(self) -> None:
        """Let the deadline that is awaited pass."""
        deadline = self.engine.inspect().deadline
        if deadline < float("inf"):
            self.clock.now = deadline
            self.engine.expire()
        self._model.expire()
        self.compare()

    # ---- the clients

    def join(self, slot: int, plan: int) -> str:
        def run() -> None:
            grant = self.engine.open_session(f"token-{slot}", {"model": "toy"}, plan, False)
            self.grants[self.server_round, self.attempt, slot] = grant

        return self._same(f"join({slot}, {plan})", self._word(self._model.join, slot, plan), run)

    def leave(self, slot: int) -> None:
        grant = self.grants.get((self.server_round, self.attempt, slot))
        if grant is not None:
            self.engine.close_session(grant.session, grant.epoch)
            if not self.committed:
                self._model.leave(slot)
            self.compare()

    def forward(
        self,
        slot: int,
        window: int,
        micro_batch: int,
        *,
        lag: int = 0,
        content: int = 0,
        acknowledged: int = 0,
    ) -> str:
        grant = self.grants[self.server_round, self.attempt, slot]
        name = (slot, window, micro_batch)
        expected = self._word(self._model.forward, *name, lag, content, acknowledged)
        wait = 0.0 if expected == "wait" else 50.0
        return self._same(
            f"forward({slot}, {window}, {micro_batch}, lag={lag}, content={content})",
            expected,
            lambda: self.engine.forward(
                ForwardCall(
                    session=grant.session,
                    epoch=grant.epoch,
                    key=self._key(window, micro_batch),
                    version=grant.version + window - lag,
                    mode=ForwardMode.TRAIN,
                    tensors={"hidden_states": smashed(content)},
                    digest=str(content).encode(),
                    deadline=self.clock.now + wait,
                    acknowledged=acknowledged,
                )
            ),
            ("forward", *name),
        )

    def backward(
        self,
        slot: int,
        window: int,
        micro_batch: int,
        *,
        content: int = 0,
        tokens: float = 1.0,
        last: bool = True,
    ) -> str:
        grant = self.grants[self.server_round, self.attempt, slot]
        name = (slot, window, micro_batch)
        return self._same(
            f"backward({slot}, {window}, {micro_batch}, content={content}, last={last})",
            self._word(self._model.backward, *name, content, tokens, last),
            lambda: self.engine.backward(
                BackwardCall(
                    session=grant.session,
                    epoch=grant.epoch,
                    key=self._key(window, micro_batch),
                    version=grant.version + window,
                    grad=gradient_of(content),
                    num_tokens=tokens,
                    loss_denominator=tokens,
                    last=last,
                    digest=str(content).encode(),
                    deadline=self.clock.now + 50.0,
                )
            ),
            ("backward", *name),
        )

    def zombie(self, round_and_attempt: tuple[int, int], slot: int) -> None:
        """A call of a dead attempt has no effect, whatever it says."""
        grant = self.grants[(*round_and_attempt, slot)]
        key = ContributionKey("test", *round_and_attempt, 0, 0)
        try:
            self.engine.backward(
                BackwardCall(
                    session=grant.session,
                    epoch=grant.epoch,
                    key=key,
                    version=grant.version,
                    grad=gradient_of(0),
                    num_tokens=1.0,
                    loss_denominator=1.0,
                    last=True,
                    digest=b"0",
                    deadline=self.clock.now + 50.0,
                )
            )
        except (TrunkRefused, RoundAborted):
            return
        raise Violation(f"a backward of attempt {round_and_attempt} was accepted")

    # ---- the comparison

    def compare(self) -> None:
        """Version, phase, weights, cache and every participant's counts are those of the model."""
        if self.reference is None or self.committed:
            return
        model, status = self._model, self.engine.status()
        pairs = {
            "aborted": (status.phase == "aborted", model.aborted),
            "version": (status.version, self.version + len(model.steps)),
            "window": (status.window if not model.aborted else 0, model.window * (not model.aborted)),
            "cache": (self.engine.inspect().activations.keys(), set(model.open_forwards)),
            "slots": (
                [(s.slot, s.completed, bool(s.problem), s.contributions, s.num_tokens)
                 for s in status.slots],
                [(s, m.finished, m.out, m.count, m.tokens) for s, m in model.members.items()],
            ),
        }  # fmt: skip
        for what, (real, wanted) in pairs.items():
            if real != wanted:
                raise Violation(f"{what}: the engine has {real}, the reference {wanted}")
        weight = self.engine.compute.parameters[0].detach()
        expected = self._expected_weight()
        if not torch.allclose(weight, expected, rtol=1e-4, atol=1e-4):
            raise Violation(f"weights: the engine has {weight}, the reference {expected}")

    def _expected_weight(self) -> Tensor:
        weight = self.weight
        for step in self._model.steps:
            tokens = sum(n for given in step.values() for *_, n in given.values())
            for given in step.values():
                for forward, backward, n in given.values():
                    share = LEARNING_RATE * n / tokens
                    weight = weight - share * weight_gradient(forward, backward)
        return weight

    @property
    def _model(self) -> ReferenceRound:
        assert self.reference is not None
        return self.reference

    def _word(self, operation, *args) -> str:
        return "NO_ROUND" if self.committed else operation(*args)

    def _key(self, window: int, micro_batch: int) -> ContributionKey:
        return ContributionKey("test", self.server_round, self.attempt, window, micro_batch)

    def _same(self, what: str, expected: str, run, name: tuple[object, ...] | None = None) -> str:
        self.operations += 1
        try:
            result, word = run(), "ok"
        except TrunkRefused as error:
            result, word = None, error.reason.name
        except RoundAborted:
            result, word = None, "ABORTED"
        except TrunkUnavailable:
            result, word = None, "wait"
        if word == "ok" and name is not None:
            word = "repeat" if self.replies.get(name) is result else "ok"
            self.replies[name] = result
        if word != expected:
            raise Violation(f"{what}: the engine says {word}, the reference {expected}")
        return word
