"""A trunk whose layers several processes divide, as the leader's engine calls it.

It has the whole trainable weights under the names of the unsplit model, so that the optimizer, checks,
checkpoints and rounds are those of any trunk. A call sends the followers its inputs, and the weights where
they have changed; every process computes its share of each layer, and torch's process group adds them up.
A backward does the same, and brings the followers' gradients back.

Shapes: hidden states ``[batch, seq, hidden]``.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flower_split.errors import RefusalReason, SplitError, TrunkRefused
from flower_split.split import CutLayers, TrunkModel
from flower_split.split.structure.host_call import Mask
from flower_split.split.structure.kv_cache import CacheStep, TrunkCache
from flower_split.split.trunk_side.model import TrunkInputs
from flower_split.trunk.compute.checks import HIDDEN
from flower_split.trunk.replicas.link import FollowerLink, OrderFailed
from flower_split.trunk.replicas.orders import CallBackOrder, CalledBack, CallOrder
from flower_split.trunk.replicas.packing import length_of, pack, unpack
from flower_split.trunk.tensor_parallel.shards import LocalCall, Shards

Value = TypeVar("Value")

_FAILED_SECONDS = 10.0  # that a follower has to fail as the leader did


class ParallelTrunk(TrunkModel):
    """The leader's trunk. One thread at a time calls it.

    Args:
        shards: The leader's share.
        whole: The trainable weights, by ``shards.names``.
        links: To the followers, by rank from 1.
    """

    def __init__(
        self, shards: Shards, whole: Sequence[Tensor], links: Sequence[FollowerLink]
    ) -> None:
        nn.Module.__init__(self)  # it has no layers of its own
        local = shards.trunk
        self.cuts, self.stack, self.config = local.cuts, local.stack, local.config
        self._hidden_size = local.hidden_size
        self._shards = (shards,)  # not a module of this one: its names would be there twice
        self._links = list(links)
        self._calls: weakref.WeakValueDictionary[int, LocalCall] = weakref.WeakValueDictionary()
        self._next = 0
        self._caches = {}  # of clients in this process: there are none
        self._sent: tuple[list[Tensor], list[int]] = ([], [])  # weights that all have, and versions
        for name, parameter in local.named_parameters():
            if not parameter.requires_grad and not isinstance(parameter, DTensor):
                _register(self, name, parameter)  # every process has it whole
        pairs = zip(shards.names, whole, strict=True)
        self._places = [_register(self, name, nn.Parameter(value)) for name, value in pairs]

    @property
    def hidden_size(self) -> int:
        """Return the width of the hidden states as they cross the cut layer."""
        return self._hidden_size

    @property
    def host(self) -> nn.Module:
        """Return the module whose forward runs this process's share of the layers."""
        return self._shards[0].trunk.host

    @property
    def storages(self) -> Set[int]:
        """Return the addresses of the memory of this process's weights; those of its next ones, too."""
        return self._shards[0].storages

    def train(self, mode: bool = True) -> "ParallelTrunk":
        """Set training mode, for the followers with the next call."""
        nn.Module.train(self, mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ParallelTrunk":
        raise SplitError("a trunk that several processes divide stays on their devices.")

    def span(self, cuts: CutLayers) -> TrunkModel:
        """Return this trunk itself, if ``cuts`` are its own.

        Raises:
            SplitError: They are others.
        """
        if cuts == self.cuts:
            return self
        raise SplitError(
            f"this trunk runs all of its layers, {self.cuts.first} to {self.cuts.second - 1}, in every "
            f"call: {1 + len(self._links)} processes divide them. Use its cut layers, or set "
            "trunk.tensor-parallel = 1."
        )

    def run_cached(
        self,
        kept: TrunkCache,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        host_arguments: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Refuse to go on from keys and values: they would be divided, too.

        Raises:
            TrunkRefused: Always (INVALID_REQUEST).
        """
        raise TrunkRefused(
            RefusalReason.INVALID_REQUEST,
            f"{1 + len(self._links)} processes divide this trunk's layers, and keep no keys and values "
            "between calls. Generate with use_cache=False.",
        )

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
        """Run the trunk layers in all processes; see :meth:`TrunkModel.forward`.

        Raises:
            SplitError: A key-value cache is asked for.
            ReplicaLost: A follower has ended, or takes too long.
        """
        if cache is not None:
            raise SplitError("a trunk that several processes divide keeps no key-value cache.")
        given = TrunkInputs(
            attention_mask, position_ids, layer_arguments or {}, host_arguments or {}
        )
        inputs = {HIDDEN: hidden_states, **given.named()}
        weights: list[Any] = [owner._parameters[key] for owner, key in self._places]
        if not torch.is_grad_enabled():
            return self._begin(inputs, use_cache, weights, graph=False).output
        output: Tensor = _Across.apply(self, inputs, use_cache, hidden_states, *weights)  # type: ignore[no-untyped-call]
        return output

    def _begin(
        self,
        inputs: Mapping[str, Tensor],
        use_cache: bool | None,
        weights: list[Tensor],
        *,
        graph: bool,
    ) -> LocalCall:
        """Compute a call's forward in all processes."""
        (shards,), versions = self._shards, [weight._version for weight in weights]
        before, at = self._sent
        news = at != versions or any(a is not b for a, b in zip(before, weights, strict=True))
        layout, buffer = pack([*(weights if news else ()), *inputs.values()], shards.device)
        number, self._next = self._next, self._next + 1
        order = CallOrder(
            number=number,
            alive=frozenset(self._calls.keys()),
            weights=news,
            graph=graph,
            training=self.training,
            seed=torch.initial_seed(),
            use_cache=use_cache,
            names=tuple(inputs),
            layout=layout,
        )

        def compute() -> LocalCall:
            if news:
                shards.take(weights)
            return shards.call(inputs, use_cache, training=self.training, graph=graph)

        call, _ = self._together(order, buffer, compute, "compute its share of a forward")
        self._sent = (weights, versions)
        if graph:
            self._calls[number] = call
        return call

    def _back(self, call: LocalCall, grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Compute a call's backward in all processes; return whole gradients."""
        (shards,) = self._shards
        number = next(number for number, known in self._calls.items() if known is call)
        layout, buffer = pack([grad], shards.device)
        (smashed_grad, own), replies = self._together(
            CallBackOrder(number, layout),
            buffer,
            lambda: call.backward(grad),
            "compute its share of a backward",
        )
        return smashed_grad, shards.joined([own, *replies])

    def _together(
        self,
        order: CallOrder | CallBackOrder,
        buffer: Tensor,
        compute: Callable[[], Value],
        what: str,
    ) -> tuple[Value, list[list[Tensor | None]]]:
        """Have all followers carry ``order`` out while this process computes; return what they have.

        Every reply is read, whatever happens here, so that all ends stay in step. What fails in one process
        fails alike in all, before they exchange anything; otherwise some wait for others in the middle of
        a layer, and the trunk cannot go on.

        Raises:
            ReplicaLost: One has ended, takes too long, or failed where another did not.
            Exception: What failed alike everywhere.
        """
        for link in self._links:
            link.ask(order, buffer)
        failure: Exception | None = None
        replies: list[list[Tensor | None]] = []
        found: list[Value] = []
        try:
            found.append(compute())
        except Exception as error:
            failure = error
        here = None if failure is None else f"{type(failure).__name__}: {failure}"
        for link in self._links:
            cause = None
            try:
                replies.append(self._read(link, what, None if here is None else _FAILED_SECONDS))
            except OrderFailed as error:
                cause = error.cause
            if cause != here:
                raise link.lost(
                    f"was to {what}, which {_ended(cause)} there, and {_ended(here)} in the process that "
                    "serves"
                ) from failure
        if failure is not None:
            raise failure
        return found[0], replies

    def _read(self, link: FollowerLink, what: str, timeout: float | None) -> list[Tensor | None]:
        """Read a follower's reply; return the gradients of its shares, None where it has none."""
        reply = link.answer(what, timeout)
        if not isinstance(reply, CalledBack):
            return []
        tensors = iter(unpack(reply.layout, link.tensors(length_of(reply.layout))))
        present = iter(reply.present)
        divided = self._shards[0].divided
        return [next(tensors) if d is not None and next(present) else None for d in divided]


def _ended(failure: str | None) -> str:
    return "succeeded" if failure is None else f"failed ({failure})"


class _Across(torch.autograd.Function):
    """A call as one node of the graph: its backward runs in all processes at once."""

    @staticmethod
    def forward(
        ctx: Any,
        trunk: ParallelTrunk,
        inputs: Mapping[str, Tensor],
        use_cache: bool | None,
        hidden_states: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        """Return the output of all layers."""
        ctx.trunk = trunk
        ctx.call = trunk._begin(inputs, use_cache, list(weights), graph=True)
        output: Tensor = ctx.call.output.detach()
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of the hidden states and of the whole weights."""
        smashed_grad, gradients = ctx.trunk._back(ctx.call, grads[0])
        return None, None, None, smashed_grad, *gradients


def _register(root: nn.Module, name: str, parameter: nn.Parameter) -> tuple[nn.Module, str]:
    """Put a parameter under its dotted name; return where it lies."""
    *path, key = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.register_parameter(key, parameter)
    return owner, key
