"""Check that clients have clipped where the server relies on it.

Updates are differences of full adapters, ``returned − sent``, over all weights together.
"""

import math

import numpy as np
from flwr.app import ArrayRecord, Message

from flower_split.errors import FederationError
from flower_split.messages.updates import update_norm

_CLIPPING_ERROR = 1e-3  # of Flower's norm, which it takes in fp32, relative
_ROUNDING = 1e-6  # of an fp32 update that is added and subtracted again, relative to the weights


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
