"""Flower's mods for clipping and noise on the client, as ``privacy.mechanism`` names them."""

from flwr.app import Context, Message
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable, Mod

from flower_split.config import PrivacyConfig, parse_run_config
from flower_split.messages.updates import move_zero_update


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
