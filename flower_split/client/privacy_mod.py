"""Flower's mods for clipping and noise on the client, as ``privacy.mechanism`` names them."""

from flwr.app import Context, Message
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable, Mod

from flower_split.client.model_cache import ClientCache
from flower_split.config import PrivacyConfig
from flower_split.messages.orders import sent_adapter
from flower_split.messages.updates import move_zero_update


def client_mod(privacy: PrivacyConfig) -> Mod | None:
    """Return Flower's mod that the mechanism needs on the clients; None: it needs none."""
    if privacy.mechanism == "client-fixed":
        return fixedclipping_mod
    if privacy.mechanism == "client-adaptive":
        return adaptiveclipping_mod
    if privacy.mechanism == "local":
        return LocalDpMod(
            privacy.clipping_norm, privacy.local_sensitivity, privacy.epsilon, privacy.delta
        )
    return None


class PrivacyMod:
    """The mod of this app's clients: Flower's one for ``privacy.mechanism``, around training.

    Args:
        cache: The app's cache, for its parsed run config.
    """

    def __init__(self, cache: ClientCache) -> None:
        self._cache = cache

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer ``message`` as the app does, clipped and noised as the run config says."""
        mod = client_mod(self._cache.config(context.run_config).privacy)
        if mod is None:
            return call_next(message, context)

        def train(request: Message, node: Context) -> Message:
            reply = call_next(request, node)
            if not reply.has_error():
                move_zero_update(reply, sent_adapter(request.content))
            return reply

        return mod(message, context, train)
