"""Clipping and noise on the clients: Flower's mods, and what the server checks of their work.

Updates are differences of full adapters, ``returned − sent``, over all weights together.
"""

# ruff: noqa: TID251
import math

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable, Mod

from flower_split.config import PrivacyConfig, parse_run_config
from flower_split.errors import FederationError

_CLIPPING_ERROR = 1e-3  # of Flower's norm, which it takes in fp32, relative
_ROUNDING = 1e-6  # of an fp32 update that is added and subtracted again, relative to the weights


def client_mod(privacy: PrivacyConfig) -> Mod | None:
    """Flower's mod that the mechanism needs on the clients; None: it needs none."""
    if privacy.mechanism == "client-fixed":
        return fixedclipping_mod
    if privacy.mechanism == "client-adaptive":
        return adaptiveclipping_mod
    if privacy.mechanism == "local":
        return LocalDpMod(
            privacy.clipping_norm, privacy.local_sensitivity, privacy.epsilon, privacy.delta
        )
    return None


def privacy_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The mod of this app's clients: Flower's one for ``privacy.mechanism``, around training."""
    mod = client_mod(parse_run_config(context.run_config).privacy)
    if mod is None:
        return call_next(message, context)

    def train(request: Message, node: Context) -> Message:
        reply = call_next(request, node)
        if not reply.has_error():
            (sent,) = request.content.array_records.values()
            move_zero_update(reply, sent)
        return reply

    return mod(message, context, train)


def move_zero_update(reply: Message, sent: ArrayRecord) -> None:
    """Move an update of exactly zero by the smallest step of its largest weight, in place.

    Flower's clipping divides by the update's norm; one is zero where a warm-up begins at learning
    rate 0.
    """
    for record in reply.content.array_records.values():
        if list(record) != list(sent) or update_norm(sent, record) > 0:
            continue
        name = max(record, key=lambda n: float(np.abs(record[n].numpy()).max(initial=0.0)))
        values = record[name].numpy().copy()
        place = np.unravel_index(np.abs(values).argmax(), values.shape)
        step = np.spacing(np.abs(values[place]), dtype=values.dtype)
        values[place] += max(step, values.dtype.type(1e-12))
        record[name] = Array(values)


def update_norm(sent: ArrayRecord, returned: ArrayRecord) -> float:
    """The L2 norm of ``returned − sent`` over all weights, in fp64."""
    squares = (
        float(np.square(returned[n].numpy().astype(np.float64) - sent[n].numpy()).sum())
        for n in sent
    )
    return math.sqrt(math.fsum(squares))


def check_clipped(
    reply: Message, sent: ArrayRecord, clipping_norm: float, who: str, server_round: int
) -> None:
    """Check that a client has clipped where the server relies on it.

    Raises:
        FederationError: Its update is longer than the norm: its ClientApp runs without the mod.
    """
    (returned,) = reply.content.array_records.values()
    norm = update_norm(sent, returned)
    size = math.sqrt(
        math.fsum(float(np.square(a.numpy()).sum(dtype=np.float64)) for a in sent.values())
    )
    if norm > clipping_norm * (1 + _CLIPPING_ERROR) + _ROUNDING * size:
        raise FederationError(
            f"round {server_round}: {who} returned an update of L2 norm {norm:.4g}, above the clipping "
            f"norm {clipping_norm:.4g}: its ClientApp does not clip. Use this package's ClientApp with "
            'privacy.mechanism = "client-fixed" or "client-adaptive", or Flower\'s fixedclipping_mod '
            "or adaptiveclipping_mod around training."
        )
