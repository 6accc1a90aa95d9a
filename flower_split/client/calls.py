"""One micro-batch at the trunk: its name, the headers of its two calls, and autograd making them.

Shapes: smashed data, ``trunk_output`` and their gradients ``[batch, seq, hidden]``.

The autograd function lives on the CPU, with the copies to and from a GPU around it: then autograd
runs it on the thread that called ``backward``, not on the device's one backward thread, and
micro-batches in flight do not wait for each other's calls.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flower_split.client.trunk_session import TrunkSession
from flower_split.errors import TrunkError
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import cache_to_proto
from flower_split.protocol.values import ForwardMode
from flower_split.split.structure.kv_cache import CacheStep
from flower_split.wire.staging import Allocate, to_device, to_host


@dataclass(slots=True)
class MicroBatch:
    """What is said of the one forward made inside a ``micro_batch`` block."""

    window: int  # the optimizer step within the round, from 0; 0 where a window is a round
    index: int  # within the window, from 0
    num_tokens: int  # label tokens
    loss_denominator: float  # what its summed token loss is divided by
    last: bool  # whether the window gets no further micro-batch from this client
    used: bool = False  # whether it has made its forward

    def __str__(self) -> str:
        return f"micro-batch {self.index} of window {self.window}"


class CurrentMicroBatch:
    """The micro-batch that each thread is inside of."""

    def __init__(self) -> None:
        self._current = threading.local()  # .value: MicroBatch or None

    @contextmanager
    def inside(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Be inside ``micro_batch``, on this thread.

        Raises:
            TrunkError: The thread is inside another one.
        """
        outer: MicroBatch | None = getattr(self._current, "value", None)
        if outer is not None:
            raise TrunkError(
                f"micro_batch(window={micro_batch.window}, index={micro_batch.index}) stands inside "
                f"{outer}; end that block first."
            )
        self._current.value = micro_batch
        try:
            yield
        finally:
            self._current.value = None

    def take(self) -> MicroBatch:
        """Return the micro-batch for the one forward that it names.

        Raises:
            TrunkError: The thread is inside none, or it has made its forward.
        """
        micro_batch: MicroBatch | None = getattr(self._current, "value", None)
        if micro_batch is None:
            raise TrunkError(
                "a training forward through the remote trunk must be made inside "
                "RemoteTrunk.micro_batch(...), on the same thread; or turn autograd off "
                "(torch.no_grad()) to evaluate."
            )
        if micro_batch.used:
            raise TrunkError(
                f"{micro_batch} has made its forward; each needs a block of its own (and gradient "
                "checkpointing must not wrap the trunk)."
            )
        micro_batch.used = True
        return micro_batch


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


def call_trunk(smashed: Tensor, always: Tensor, exchange: Exchange) -> Tensor:
    """Return ``trunk_output`` of ``smashed``, whose backward calls the trunk again.

    Args:
        smashed: [batch, seq, hidden], on any device, in the dtype that travels.
        always: Requires grad, so that the backward is called even where ``smashed`` does not.
        exchange: The micro-batch's two calls.
    """
    device, on_gpu = smashed.device, smashed.device.type != "cpu"
    if on_gpu:
        smashed = _ToHost.apply(smashed)  # type: ignore[no-untyped-call]
    output: Tensor = _CallTrunk.apply(smashed, always, exchange)  # type: ignore[no-untyped-call]
    if on_gpu:
        output = _ToDevice.apply(output, device)  # type: ignore[no-untyped-call]
    return output


class _ToHost(torch.autograd.Function):
    """Smashed data to the CPU; its gradient to the device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.device = tensor.device
        return to_host(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return to_device(gradient, ctx.device)


class _ToDevice(torch.autograd.Function):
    """trunk_output to the device; its gradient to the CPU."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        return to_device(tensor, device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return to_host(gradient), None


class _CallTrunk(torch.autograd.Function):
    """CPU tensors to the trunk and back, in both directions."""

    @staticmethod
    def forward(ctx: Any, smashed: Tensor, always: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.forward(smashed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, trunk_output_grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.backward(trunk_output_grad), None, None
