"""The trunk as a module: where autograd crosses the network.

:class:`RemoteTrunk` stands in a client's model where the trunk's layers were. Its forward sends the
smashed data ``[batch, seq, hidden]`` and returns ``trunk_output`` of the same shape; autograd's
backward sends ``trunk_output_grad`` and returns ``smashed_grad``. The padding mask and the position
ids go with the forward; token ids and labels never leave the client.

Next: ``flower_split/wire/sending.py``.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from torch import Tensor, nn

from flower_split.client.calls import (
    Caching,
    Exchange,
    MicroBatch,
    call_trunk,
)
from flower_split.client.step_end import finish_step
from flower_split.client.trunk_session import TrunkSession
from flower_split.config.validation import ENVIRONMENT
from flower_split.errors import TrunkError
from flower_split.protocol.values import FinishResult, FinishRule, ForwardMode, SessionGrant
from flower_split.runtime.closing import Closing
from flower_split.split import CutLayers
from flower_split.split.structure.host_call import Mask
from flower_split.split.structure.kv_cache import CacheStep
from flower_split.split.trunk_side.model import MASK, POSITIONS, TrunkInputs
from flower_split.training.trunk_protocol import CallStats
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.possession import ClientKey
from flower_split.wire.staging import allocator, pooled, tensors_to_host
from flower_split.wire.transports import TRANSPORTS


class RemoteTrunk(nn.Module, Closing):
    """A trunk that runs elsewhere; called like any trunk. Thread-safe.

    In training, every forward is made inside :meth:`micro_batch`. Where autograd is off, or the
    session evaluates, the trunk evaluates too (no dropout, nothing kept). In mode ``forward-only``
    the output does not require grad: nothing flows back to the bottom.

    Args:
        address: ``host:port``.
        token: This client's, for this round.
        key: Proves with every call that the token is this client's; None: the token needs no proof.
        fingerprint: Fingerprint of model and configuration; the trunk must hold the same. Its fields
            ``codec`` and ``gradient-codec`` say how activations and gradients travel; without them,
            as they are.
        mode: ``joint``, ``frozen`` or ``forward-only``.
        call_timeout: Seconds per call, retries and the wait for other clients included.
        root_certificates: CA for TLS, as PEM text or a PEM file's path; empty: plain text, loopback.
        cuts: Where this client's model is cut, within the trunk's own span; None: where the
            fingerprint says, which must then be the trunk's span.
        transport: The name of what carries the calls: ``auto`` (shared memory where client and trunk
            share host and user, else gRPC), ``grpc``, ``shared-memory``, or a plug-in's.
        certificate: What this client shows to a trunk that asks for one.
        proxy: HTTP proxy to a trunk off loopback, as ``trunk.proxy`` says.

    Attributes:
        waiting: Entered around every call: give back there what other micro-batches need to
            compute. Does nothing by default.
        always: An input of every training forward that always requires grad. Without it autograd
            would skip the backward call wherever nothing of the bottom trains, and the trunk would
            learn nothing. ``loss.backward()`` reaches it by itself; ``torch.autograd.grad`` must be
            given it among its inputs (its gradient is ``None``).
        finish: How the steps of the open round end together with the trunk; None: they do not.
        take_stats: ``take_stats()`` returns the totals over the calls, which begin anew.

    Raises:
        ConfigError: Plain text to another machine, a PEM file that cannot be read, or a codec or a
            transport that is not installed here.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str,
        fingerprint: Mapping[str, str],
        mode: str,
        call_timeout: float,
        root_certificates: str = "",
        key: ClientKey | None = None,
        cuts: CutLayers | None = None,
        transport: str = "grpc",
        certificate: ClientCertificate = NO_CERTIFICATE,
        proxy: str = ENVIRONMENT,
    ) -> None:
        super().__init__()
        self.always = torch.empty(0, requires_grad=True)
        self._session = TrunkSession(
            TRANSPORTS.get(transport)(
                address,
                token=token,
                timeout=call_timeout,
                key=key,
                root_certificates=root_certificates,
                certificate=certificate,
                proxy=proxy,
            ),
            fingerprint,
            cuts,
            call_timeout,
        )
        self._calls = self._session.calls
        self.take_stats = self._calls.take_stats
        self.finish: FinishRule | None = None
        self._mode = mode
        self._current = CurrentMicroBatch()
        self._released: deque[int] = deque()  # key-value caches that the trunk may forget

    @property
    def waiting(self) -> Callable[[], AbstractContextManager[object]]:
        """The block that every call is made inside."""
        return self._calls.waiting

    @waiting.setter
    def waiting(self, enter: Callable[[], AbstractContextManager[object]]) -> None:
        self._calls.waiting = enter

    def open(self, planned_steps: int, *, evaluate: bool = False) -> SessionGrant:
        """Join the round that the token is for.

        Args:
            planned_steps: Optimizer steps this client will take: its windows.
            evaluate: Only evaluate.

        Raises:
            TrunkUnavailable: There is no trunk within the call timeout.
            TrunkRefused: The trunk does not take this client; the reason is typed.
            RoundAborted: The round was given up.
        """
        grant = self._session.open(planned_steps, evaluate=evaluate)
        self.finish = grant.finish
        return grant

    @property
    def grant(self) -> SessionGrant | None:
        """What :meth:`open` returned; ``None`` without an open session."""
        return self._calls.grant

    def shorten_plan(self, planned_steps: int) -> None:
        """Take only so many steps in all, of those that :meth:`open` said; what is done is kept.

        Raises as :meth:`open`; TrunkRefused also for more than planned, or fewer than done.
        """
        self._session.shorten_plan(planned_steps)

    def close(self) -> None:
        """Leave the round and close the connections. Idempotent; raises nothing of the trunk's."""
        self._session.close()
        self.finish = None

    def wait_version(self, version: int) -> int:
        """Wait until the trunk's weights have ``version``; return the version they have.

        Raises:
            TrunkUnavailable: They do not within the call timeout.
            RoundAborted: The round was given up.
        """
        return self._session.wait_version(version)

    def micro_batch(
        self, window: int, index: int, *, num_tokens: int, loss_denominator: float, last: bool
    ) -> AbstractContextManager[None]:
        """Name the one forward made inside, on this thread; required in training.

        Its backward may run after the block, on any thread.

        Args:
            window: The optimizer step within the round, from 0; 0 where a window is a round.
            index: The micro-batch within the window, from 0.
            num_tokens: Its label tokens.
            loss_denominator: What its summed token loss is divided by.
            last: Whether the window gets no further micro-batch from this client.

        Raises:
            TrunkError: Nested in another one.
        """
        return self._current.inside(MicroBatch(window, index, num_tokens, loss_denominator, last))

    def finish_step(
        self,
        window: int,
        num_micro_batches: int,
        grad_norm_squared: float,
        gradients: Mapping[str, Tensor],
    ) -> FinishResult:
        """End an optimizer step together with the trunk; required where :attr:`finish` is set.

        Called after the last backward of every window; waits until the trunk has stepped.

        Args:
            window: The optimizer step within the round, from 0.
            num_micro_batches: How many the step had.
            grad_norm_squared: L2, of this client's own gradient for the mean loss of its tokens.
            gradients: This client's own by name, where the round shares them; else empty.

        Raises:
            TrunkUnavailable: No answer within the call timeout.
            TrunkRefused: The trunk answered no; the reason is typed.
            RoundAborted: The round was given up.
        """
        on_host = tensors_to_host(gradients)
        return finish_step(self._calls, window, num_micro_batches, grad_norm_squared, on_host)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        cache: CacheStep | None = None,
        layer_arguments: Mapping[str, Tensor] | None = None,
        host_arguments: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return ``trunk_output`` [batch, seq, hidden], of the dtype and on the device of the input.

        Args:
            hidden_states: The smashed data, [batch, seq, hidden].
            attention_mask: The padding mask of zeros and ones, [batch, seq]; where layers need
                another one, that: [batch or 1, heads or 1, seq, seq], or one per kind of layer.
            position_ids: [batch or 1, seq], with an axis before them where the model has several.
            use_cache: As the model's own argument; ``None``: its configuration's.
            cache: Go on from the key-value cache that the trunk keeps under its id: the tensors are
                those of the new positions only. Not in training.
            layer_arguments: What the client's frozen weights make for all layers, by place.
            host_arguments: What the model's forward adds between layers, by place; constants.

        Raises:
            SplitError: One of these arguments would need a gradient.
            TrunkError: Called outside :meth:`micro_batch` in training, twice within one, or without
                a session.
            TrunkUnavailable: No answer within the call timeout.
            TrunkRefused: The trunk answered no; the reason is typed.
            RoundAborted: The round was given up.
        """
        given = TrunkInputs(
            attention_mask, position_ids, layer_arguments or {}, host_arguments or {}
        )
        on_host, extras = hidden_states.device.type == "cpu", given.named()
        if not on_host:
            extras = tensors_to_host(extras)
        if MASK in extras and extras[MASK].ndim != 4:
            extras[MASK] = _padding_mask(extras[MASK])
        if POSITIONS in extras:
            extras[POSITIONS] = extras[POSITIONS].to(torch.int64)
        if self._session.evaluate or not torch.is_grad_enabled():
            mode, micro_batch = ForwardMode.EVALUATE, None
        else:
            train = self._mode != "forward-only"
            mode = ForwardMode.TRAIN if train else ForwardMode.NO_GRAD
            micro_batch = self._current.take()
        if cache is not None and cache.rows is not None:
            extras["cache_rows"] = cache.rows
        allocate = pooled if on_host else allocator(hidden_states.device)
        caching = Caching(use_cache, cache, self._take_released() if cache else [])
        exchange = Exchange(self._calls, mode, micro_batch, extras, allocate, caching)
        with torch.set_grad_enabled(mode is ForwardMode.TRAIN):
            # Ordinary casts: autograd converts the gradients back.
            smashed = hidden_states.to(self._calls.codecs.activations.dtype or hidden_states.dtype)
            return call_trunk(smashed, self.always, exchange).to(hidden_states.dtype)

    def release_cache(self, cache_id: int) -> None:
        """Let the trunk forget a key-value cache; it is told with the next call that uses one."""
        self._released.append(cache_id)

    def _take_released(self) -> list[int]:
        taken: list[int] = []
        with suppress(IndexError):  # deques are safe between threads: caches end on any
            while True:
                taken.append(self._released.popleft())
        return taken

    @property
    def stats(self) -> CallStats:
        """Totals since the beginning, or since the last ``take_stats()``."""
        return self._calls.stats


def _padding_mask(mask: Tensor) -> Tensor:
    """Return a mask as booleans, which travel as bits.

    Raises:
        TrunkError: It is not a mask of zeros and ones, [batch, seq].
    """
    as_bool = mask.to(torch.bool)
    if mask.ndim != 2 or not bool((as_bool.to(mask.dtype) == mask).all()):
        raise TrunkError(
            "the remote trunk takes the 2-D padding mask of zeros and ones, [batch, seq]; it got "
            f"{mask.dtype} {list(mask.shape)}. Pass the tokenizer's attention_mask."
        )
    return as_bool


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
