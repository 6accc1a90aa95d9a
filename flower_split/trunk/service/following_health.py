"""Health that follows the compute thread: a trunk whose thread is stuck does not serve."""

from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2


class FollowingHealth(health.HealthServicer):  # type: ignore[misc]  # it has no types
    """Answers NOT_SERVING while the compute thread lets calls wait for too long, or it drains.

    Args:
        queue_seconds: How long the compute thread lets a call wait now.
        limit: Seconds of waiting from which clients have given up.
    """

    def __init__(self, queue_seconds: Callable[[], float], limit: float) -> None:
        super().__init__()
        self._queue_seconds = queue_seconds
        self._limit = limit

    def Check(  # noqa: N802 - grpc's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Return whether a call would be served now."""
        if self._queue_seconds() > self._limit:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
        answer: health_pb2.HealthCheckResponse = super().Check(request, context)
        return answer
