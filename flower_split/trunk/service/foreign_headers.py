"""What gRPC logs of a header that is no UTF-8: strangers could write into the trunk's log with it."""

import logging

_LOGGER = "grpc._cython.cygrpc"


class ForeignHeaders(logging.Filter):
    """Keeps gRPC's lines about such headers out of the log; the call is refused and counted as any other.

    gRPC writes the header itself, which may be a token's, and a traceback, with every such call.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is about something else."""
        return "Invalid encoding" not in str(record.msg)

    def begin(self) -> None:
        """Keep them out from now on."""
        logging.getLogger(_LOGGER).addFilter(self)

    def end(self) -> None:
        """Let them in again. Idempotent."""
        logging.getLogger(_LOGGER).removeFilter(self)
