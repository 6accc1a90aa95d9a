"""A remote trunk whose micro-batches are traces; used where traces are on."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.runtime.tracing import PROCESS_TRACING


class TracedTrunk(RemoteTrunk):
    """A :class:`RemoteTrunk` whose every micro-batch is a span around its forward and its backward."""

    @contextmanager
    def micro_batch(
        self, window: int, index: int, *, num_tokens: int, loss_denominator: float, last: bool
    ) -> Iterator[None]:
        """See :meth:`RemoteTrunk.micro_batch`; a backward after the block is a trace of its own."""
        inside: AbstractContextManager[None] = super().micro_batch(
            window, index, num_tokens=num_tokens, loss_denominator=loss_denominator, last=last
        )
        tracing = PROCESS_TRACING.current
        assert tracing is not None, "made where traces are on"
        with tracing.micro_batch(window, index), inside:
            yield
