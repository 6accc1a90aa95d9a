"""Protocol messages as the values of :mod:`flower_split.protocol.values`, and back.

The shell uses one direction of each pair, the coordinator the other.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from flower_split.config.validation import Scalar
from flower_split.errors import RefusalReason, SplitError, TrunkRefused
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import (
    Arrival,
    Dispatch,
    FinishRule,
    RoundBase,
    RoundPlan,
    SessionGrant,
)
from flower_split.split import CutLayers
from flower_split.split.structure.kv_cache import CacheStep

_MAX_SETTINGS_BYTES = 1 << 16

_STEP_EVERY = {
    StepEvery.LOCAL_STEP: pb.LOCAL_STEP,
    StepEvery.SERVER_ROUND: pb.SERVER_ROUND,
    StepEvery.CONTRIBUTION: pb.CONTRIBUTION,
    StepEvery.BUFFER: pb.BUFFER,
}


def cache_to_proto(step: CacheStep) -> pb.CacheUse:
    """Return the message of a call with a key-value cache; its rows travel as a tensor."""
    return pb.CacheUse(id=step.id, step=step.step, past_length=step.past_length)


def cache_from_proto(cache: pb.CacheUse, rows: Tensor | None) -> CacheStep:
    """Return a call with a key-value cache."""
    return CacheStep(cache.id, cache.step, cache.past_length, rows)


def cuts_to_proto(cuts: CutLayers | None) -> pb.CutLayers | None:
    """Return the message of a client's own cut layers; None: it has none."""
    return None if cuts is None else pb.CutLayers(first=cuts.first, second=cuts.second)


def cuts_from_proto(request: pb.OpenSessionRequest) -> CutLayers | None:
    """Return a client's own cut layers; None: it names none.

    Raises:
        TrunkRefused: They are none (INVALID_REQUEST).
    """
    if not request.HasField("cuts"):
        return None
    try:
        return CutLayers(request.cuts.first, request.cuts.second)
    except SplitError as error:
        raise TrunkRefused(RefusalReason.INVALID_REQUEST, f"OpenSession: {error}") from error


def grant_to_proto(grant: SessionGrant, max_tensor_bytes: int) -> pb.OpenSessionReply:
    """Return the message of what a client learns when it joins."""
    return pb.OpenSessionReply(
        session=grant.session,
        trunk_epoch=grant.epoch,
        version=grant.version,
        experiment=grant.experiment,
        server_round=grant.server_round,
        attempt=grant.attempt,
        max_tensor_bytes=max_tensor_bytes,
        lease_seconds=grant.lease_seconds,
        slot=grant.slot,
        finish=_finish_to_proto(grant.finish),
        without_zeros=True,
    )


def grant_from_proto(reply: pb.OpenSessionReply) -> SessionGrant:
    """Return what a client learns when it joins."""
    return SessionGrant(
        session=reply.session,
        epoch=reply.trunk_epoch,
        version=reply.version,
        experiment=reply.experiment,
        server_round=reply.server_round,
        attempt=reply.attempt,
        lease_seconds=reply.lease_seconds,
        slot=reply.slot,
        finish=_finish_from_proto(reply),
    )


def plan_to_proto(plan: RoundPlan) -> pb.BeginRoundRequest:
    """Return the message of a round's plan."""
    return pb.BeginRoundRequest(
        experiment=plan.experiment,
        server_round=plan.server_round,
        attempt=plan.attempt,
        participants=[
            pb.Participant(slot=slot, token=token)
            for slot, token in sorted(plan.participants.items())
        ],
        step_every=_STEP_EVERY[plan.step_every],
        steps_per_round=plan.steps_per_round,
        num_server_rounds=plan.num_server_rounds,
        quorum=plan.quorum,
        join_seconds=plan.join_seconds,
        window_seconds=plan.window_seconds,
        coordinator_seconds=plan.coordinator_seconds,
        evaluate=plan.evaluate,
        base=(
            pb.RoundBase(server_round=plan.base.server_round, digest=plan.base.digest)
            if plan.base
            else None
        ),
        dispatches=[
            pb.Dispatch(number=entry.number, slot=entry.slot, token=entry.token)
            for entry in plan.dispatches
        ],
        finish=_finish_to_proto(plan.finish),
    )


def plan_from_proto(request: pb.BeginRoundRequest) -> RoundPlan:
    """Return a round's plan.

    Raises:
        TrunkRefused: A slot or token is repeated or empty, or a number is out of its range.
    """
    participants = {entry.slot: entry.token for entry in request.participants}
    tokens = set(participants.values())
    if not len(request.participants) == len(participants) == len(tokens) or "" in tokens:
        raise _invalid("every participant needs a slot and a token of its own")
    dispatches = tuple(
        Dispatch(entry.number, entry.slot, entry.token) for entry in request.dispatches
    )
    numbers = {entry.number for entry in dispatches}
    tokens = {entry.token for entry in dispatches}
    if not len(dispatches) == len(numbers) == len(tokens) or "" in tokens or 0 in numbers:
        raise _invalid("every dispatch needs a number from 1 and a token of its own")
    if not 0 < request.quorum <= 1:
        raise _invalid(f"quorum must be in (0, 1]; it is {request.quorum}")
    if not (request.join_seconds > 0 and request.window_seconds > 0):
        raise _invalid(
            "join_seconds and window_seconds must be above 0; they are "
            f"{request.join_seconds} and {request.window_seconds}"
        )
    if not (request.finish.max_grad_norm >= 0 and math.isfinite(request.finish.max_grad_norm)):
        raise _invalid(
            "finish.max_grad_norm must be finite and not negative; it is "
            f"{request.finish.max_grad_norm}"
        )
    if request.HasField("finish") and request.step_every != pb.LOCAL_STEP:
        raise _invalid("finish is for rounds that step with every local step")
    step_every = {number: value for value, number in _STEP_EVERY.items()}.get(request.step_every)
    if step_every is None:
        raise _invalid(f"step_every has the unknown number {request.step_every}")
    return RoundPlan(
        experiment=request.experiment,
        server_round=request.server_round,
        attempt=request.attempt,
        participants=participants,
        step_every=step_every,
        steps_per_round=request.steps_per_round,
        num_server_rounds=request.num_server_rounds,
        quorum=request.quorum,
        join_seconds=request.join_seconds,
        window_seconds=request.window_seconds,
        coordinator_seconds=request.coordinator_seconds,
        evaluate=request.evaluate,
        base=(
            RoundBase(request.base.server_round, request.base.digest)
            if request.HasField("base")
            else None
        ),
        dispatches=dispatches,
        finish=_finish_from_proto(request),
    )


def settings_to_proto(values: Mapping[str, Scalar]) -> pb.ExperimentSettings:
    """Return the message of what a run brings to a trunk of several experiments."""
    return pb.ExperimentSettings(values={key: _setting(value) for key, value in values.items()})


def settings_from_proto(request: pb.BeginRoundRequest) -> dict[str, Scalar] | None:
    """Return what a run brings; None: nothing.

    Raises:
        TrunkRefused: It is too much, or a value is missing (INVALID_REQUEST).
    """
    if not request.HasField("settings"):
        return None
    if request.settings.ByteSize() > _MAX_SETTINGS_BYTES:
        raise _invalid(
            f"settings may have {_MAX_SETTINGS_BYTES} bytes; they have {request.settings.ByteSize()}"
        )
    found: dict[str, Scalar] = {}
    for key, message in request.settings.values.items():
        kind = message.WhichOneof("value")
        if kind is None:
            raise _invalid("a setting has no value")
        found[key] = getattr(message, kind)
    return found


def _setting(value: Scalar) -> pb.SettingValue:
    if isinstance(value, bool):  # which is an int, too
        return pb.SettingValue(flag=value)
    if isinstance(value, int):
        return pb.SettingValue(whole=value)
    return (
        pb.SettingValue(number=value) if isinstance(value, float) else pb.SettingValue(text=value)
    )


def arrivals_to_proto(arrivals: Sequence[Arrival]) -> list[pb.Arrival]:
    """Return the message of an asynchronous round's buffer."""
    return [pb.Arrival(dispatch=item.dispatch, factor=item.factor) for item in arrivals]


def arrivals_from_proto(request: pb.PrepareRoundRequest) -> tuple[Arrival, ...]:
    """Return the buffer of an asynchronous round.

    Raises:
        TrunkRefused: A dispatch is there twice, or a factor is out of its range.
    """
    arrivals = tuple(Arrival(item.dispatch, item.factor) for item in request.arrivals)
    if len({item.dispatch for item in arrivals}) < len(arrivals):
        raise TrunkRefused(
            RefusalReason.INVALID_REQUEST, "PrepareRound: a dispatch arrives twice in one buffer."
        )
    for item in arrivals:
        if not 0 < item.factor <= 1:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"PrepareRound: the factor of dispatch {item.dispatch} must be in (0, 1]; it is "
                f"{item.factor}.",
            )
    return arrivals


def _finish_to_proto(rule: FinishRule | None) -> pb.FinishRule | None:
    if rule is None:
        return None
    return pb.FinishRule(max_grad_norm=rule.max_grad_norm, share_gradients=rule.share_gradients)


def _finish_from_proto(message: pb.OpenSessionReply | pb.BeginRoundRequest) -> FinishRule | None:
    if not message.HasField("finish"):
        return None
    return FinishRule(message.finish.max_grad_norm, message.finish.share_gradients)


def _invalid(what: str) -> TrunkRefused:
    return TrunkRefused(RefusalReason.INVALID_REQUEST, f"BeginRound: {what}.")
