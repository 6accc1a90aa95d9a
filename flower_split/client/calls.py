"""The headers of a forward and its backward, and the two calls themselves.

Shapes: smashed data, ``trunk_output`` and their gradients ``[batch, seq, hidden]``, on the CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flower_split.client.micro_batch import MicroBatch
from flower_split.client.trunk_session import TrunkSession
from flower_split.errors import TrunkError
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import cache_to_proto
from flower_split.protocol.values import ForwardMode
from flower_split.split.structure.kv_cache import CacheStep
from flower_split.wire.buffers import Allocate


@dataclass(frozen=True, slots=True)
class Caching:
    """What one forward says about key-value caches."""

    use_cache: bool | None
    step: CacheStep | None
    released: list[int]


class Exchange:
    """The calls of one micro-batch: a forward, then at most one backward.

    Args:
        session: The open session.
        mode: What the trunk keeps.
        micro_batch: Which it is; None: an evaluation.
        extras: Tensors beside the hidden states.
        allocate: Where replies are received.
        caching: What the forward says about key-value caches.

    Raises:
        TrunkError: There is no open session.
    """

    def __init__(
        self,
        session: TrunkSession,
        mode: ForwardMode,
        micro_batch: MicroBatch | None,
        extras: Mapping[str, Tensor],
        allocate: Allocate,
        caching: Caching,
    ) -> None:
        self._session = session
        self._caching = caching
        self._grant = grant = session.require()
        self._mode = mode
        self._micro_batch = micro_batch
        self._extras = extras
        self._allocate = allocate
        self._version = grant.version + (micro_batch.window if micro_batch else 0)
        self._done = False

    def forward(self, smashed: Tensor) -> Tensor:
        """Send the smashed data [batch, seq, hidden]; return ``trunk_output`` of the same shape."""
        header = pb.ForwardHeader(
            session=self._grant.session,
            trunk_epoch=self._grant.epoch,
            version=self._version,
            mode=self._mode.name,
        )
        if self._micro_batch is not None:
            header.key.CopyFrom(self._key(self._micro_batch))
            header.acknowledged = self._session.answered_below(self._micro_batch.window)
        if self._caching.use_cache is not None:
            header.use_cache = self._caching.use_cache
        if self._caching.step is not None:
            header.cache.CopyFrom(cache_to_proto(self._caching.step))
            header.released_caches.extend(self._caching.released)
        output, self._version = self._session.call(
            "Forward",
            pb.Header(forward=header),
            ("hidden_states", smashed),
            self._extras,
            "trunk_output",
            self._allocate,
        )
        self._extras = {}
        return output

    def backward(self, trunk_output_grad: Tensor) -> Tensor:
        """Send the output's gradient; return ``smashed_grad``. Once.

        Raises:
            TrunkError: It has been called before.
        """
        micro_batch = self._micro_batch
        assert micro_batch is not None, "only training forwards are recorded by autograd"
        if self._done:
            raise TrunkError(
                f"{micro_batch} has had its backward; the trunk keeps its activations for one. Call "
                "backward() once, without retain_graph."
            )
        self._done = True
        header = pb.BackwardHeader(
            session=self._grant.session,
            trunk_epoch=self._grant.epoch,
            key=self._key(micro_batch),
            version=self._version,
            num_tokens=micro_batch.num_tokens,
            loss_denominator=micro_batch.loss_denominator,
            last=micro_batch.last,
        )
        smashed_grad, _ = self._session.call(
            "Backward",
            pb.Header(backward=header),
            ("trunk_output_grad", trunk_output_grad),
            {},
            "smashed_grad",
            self._allocate,
        )
        self._session.note_answered(micro_batch.window, micro_batch.index)
        return smashed_grad

    def _key(self, micro_batch: MicroBatch) -> pb.ContributionKey:
        return pb.ContributionKey(
            experiment=self._grant.experiment,
            server_round=self._grant.server_round,
            attempt=self._grant.attempt,
            window=micro_batch.window,
            micro_batch=micro_batch.index,
        )
