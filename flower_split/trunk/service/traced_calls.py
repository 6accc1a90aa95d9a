"""A span around every call that is let in, in the trace that the call's metadata names."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc

from flower_split.runtime.spans import TRACEPARENT, Tracing
from flower_split.trunk.service.handlers import Context

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class TracedCalls(grpc.ServerInterceptor):
    """Puts the trunk's own methods into spans; it stands behind the admission, which lets calls in.

    Args:
        tracing: Makes the spans.
    """

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Request, Reply] | None]",
        details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Request, Reply] | None":
        """Return the call's own handler, within a span. Health checks have none."""
        handler = continuation(details)
        if handler is None or handler.stream_stream is None:
            return handler
        behaviour, tracing = handler.stream_stream, self._tracing
        method = details.method.rpartition("/")[2]  # one of ours: it has a handler
        traceparent = next(
            (
                value
                for key, value in details.invocation_metadata or ()
                if key == TRACEPARENT and isinstance(value, str)
            ),
            "",
        )

        def run(requests: Iterator[Request], context: Context) -> Iterator[Reply]:
            with tracing.answering(method, traceparent):
                return behaviour(requests, context)

        return grpc.stream_stream_rpc_method_handler(
            run, handler.request_deserializer, handler.response_serializer
        )
