"""A transport: gRPC that says in the log how long every call with tensors took."""

import logging
import time
from collections.abc import Callable, Iterator

from flower_split.wire.grpc_transport import TrunkChannel
from flower_split.wire.sending import Outgoing
from flower_split.wire.transport import Result

logger = logging.getLogger(__name__)


class MeasuredChannel(TrunkChannel):
    """Times its calls; what it sends is what gRPC sends."""

    def stream(
        self, method: str, message: Outgoing, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        """Make one call that sends and reads frames."""
        began = time.perf_counter()
        result = super().stream(method, message, read)
        seconds = time.perf_counter() - began
        logger.info("%s: %d bytes in %.4f s", method, message.num_bytes, seconds)
        return result
