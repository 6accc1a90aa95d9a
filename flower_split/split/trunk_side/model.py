"""The trunk: the middle layers of a model, run by the model's own forward.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.

The whole model's forward is called with the smashed data as its input embeddings, so that it
builds masks and rotary positions itself; where the first trunk layer begins, the smashed data
takes the place of whatever the prologue made, and where the last one ends, the forward ends.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.structure.cuts import CutLayers
from flower_split.split.structure.host_call import (
    LayerOutput,
    Mask,
    Smashed,
    StandIn,
    TrunkOutput,
    cache_argument,
    enter_trunk,
    give_arguments,
    host_inputs,
    leave_trunk,
    random_state_of,
    running,
)
from flower_split.split.structure.kv_cache import CacheStep, TrunkCache
from flower_split.split.structure.layer_arguments import from_places
from flower_split.split.structure.quantization import float_dtype
from flower_split.split.structure.stack import LayerStack, embedding_width
from flower_split.split.trunk_side.first_input import first_input

MASK, POSITIONS = "attention_mask", "position_ids"
_LAYER, _HOST = "layer_argument", "host_argument"


@dataclass(frozen=True, slots=True)
class TrunkInputs:
    """The arguments of a trunk's call beside the hidden states, as tensors by name for a network.

    Names: ``attention_mask`` (the padding mask ``[batch, seq]``, or the whole mask ``[batch or 1,
    heads or 1, seq, seq]``), ``attention_mask/KIND`` (one whole mask per kind of layer; an empty tensor
    where that kind needs none), ``position_ids`` (``[batch or 1, seq]``, with an axis before them where
    the model has several), ``layer_argument/PLACE`` and ``host_argument/PLACE``
    (:mod:`flower_split.split.structure.layer_arguments`): see ``TrunkModel.forward``.
    """

    attention_mask: Mask = None
    position_ids: Tensor | None = None
    layer_arguments: Mapping[str, Tensor] = field(default_factory=dict)
    host_arguments: Mapping[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name.

        Raises:
            SplitError: A layer's or a host's argument is made by weights that are trained: a network
                returns no gradient of it.
        """
        places = {**self.layer_arguments, **self.host_arguments}
        trained = [place for place, tensor in places.items() if tensor.requires_grad]
        if trained:
            raise SplitError(
                f"the client trains weights that make a tensor for the trunk's layers (argument "
                f"{', '.join(trained)}, such as a relative position bias or features of images), and "
                "a remote trunk returns no gradient of that. Freeze those weights: adapters on the "
                "layers' linear modules leave them frozen."
            )
        tensors: dict[str, Tensor] = {}
        if isinstance(self.attention_mask, Mapping):
            for kind, mask in self.attention_mask.items():
                nothing = torch.empty(0, dtype=torch.bool)
                tensors[f"{MASK}/{kind}"] = nothing if mask is None else mask
        elif self.attention_mask is not None:
            tensors[MASK] = self.attention_mask
        if self.position_ids is not None:
            tensors[POSITIONS] = self.position_ids
        for kind, arguments in ((_LAYER, self.layer_arguments), (_HOST, self.host_arguments)):
            tensors.update({f"{kind}/{place}": tensor for place, tensor in arguments.items()})
        return tensors

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "TrunkInputs":
        """Return the arguments that :meth:`named` gave these tensors for, on ``device``."""
        masks: dict[str, Tensor | None] = {}
        arguments: dict[str, dict[str, Tensor]] = {_LAYER: {}, _HOST: {}}
        for name, tensor in tensors.items():
            head, _, rest = name.partition("/")
            if head == MASK and rest:
                masks[rest] = tensor.to(device, non_blocking=True) if tensor.numel() else None
            elif head in arguments:
                arguments[head][rest] = tensor.to(device, non_blocking=True)
        mask, positions = tensors.get(MASK), tensors.get(POSITIONS)
        return cls(
            masks if masks else (None if mask is None else mask.to(device, non_blocking=True)),
            None if positions is None else positions.to(device, non_blocking=True),
            arguments[_LAYER],
            arguments[_HOST],
        )


class TrunkModel(nn.Module):
    """The trunk of a model, called as ``trunk(hidden_states, attention_mask, position_ids)``.

    Its parameters are the trunk layers' only and keep the unsplit model's names. Calls from
    several threads at once are fine. ``torch.autograd.grad`` through it works as through any
    module.

    Args:
        root: The model with everything outside the trunk replaced (:func:`carve_trunk`).
        stack: Where its layers are.
        cuts: The cut layers.
        output: The form of the family's layer outputs, shared with the stand-ins; set here.

    Raises:
        SplitError: The model's forward cannot be run from hidden states up to the trunk.
    """

    def __init__(
        self, root: PreTrainedModel, stack: LayerStack, cuts: CutLayers, output: LayerOutput
    ) -> None:
        super().__init__()
        self.cuts = cuts
        self.stack = stack
        self.config = root.config
        host = root.get_submodule(stack.host_path)
        # The host is held outside the module tree, and the children under their own names, so
        # that names are those of the unsplit model whether or not the host is its root.
        self._host = (host,)
        branch = stack.path.split(".", 1)[0]
        for name, child in root.named_children():
            if host is root or name == branch:
                self.add_module(name, child)
        self._layer_output = output
        self._width = embedding_width(root)
        self._hook_ends()
        self._takes_arguments = False  # whether the layers have been hooked for them
        # The shape of one position's hidden states; families with several streams have two sizes.
        like = torch.zeros(0, dtype=float_dtype(self), device=next(self.parameters()).device)
        found = first_input(host, like, self._width, cuts.first, output)
        self._position_shape = tuple(found.shape[2:])
        self._caches: dict[int, TrunkCache] = {}  # of clients in this process
        self._spans: dict[CutLayers, TrunkModel] = {}

    def _hook_ends(self) -> None:
        """Let the forward begin and end at this trunk's first and last layer."""
        layers = self.stack.layers(self)
        self._ends = (layers[self.cuts.first], layers[self.cuts.second - 1])
        self._ends[0].register_forward_pre_hook(enter_trunk, with_kwargs=True)
        self._ends[1].register_forward_hook(leave_trunk)

    def _hook_layers(self) -> None:
        """Let the layers be given the arguments that come with the smashed data, from now on.

        Most models need none; a second hook of another thread, or of a span, would do no harm.
        """
        self._takes_arguments = True
        for index in range(self.cuts.first, self.cuts.second):
            layer = self.stack.layers(self)[index]
            layer.register_forward_pre_hook(give_arguments, with_kwargs=True)

    def span(self, cuts: CutLayers) -> "TrunkModel":
        """Return the trunk for clients with other cut layers: some of these layers, the same weights.

        What trains one trains the other. A client that holds some of this trunk's layers itself
        trains those for itself; the trunk trains them on the other clients' data alone.

        Args:
            cuts: Cut layers within this trunk's.

        Returns:
            A trunk of the layers between ``cuts``, made once; this trunk itself if they are its
            own. Attach adapters to this trunk, not to its spans.

        Raises:
            SplitError: The trunk does not hold all of these layers.
        """
        if cuts == self.cuts:
            return self
        if cuts.first < self.cuts.first or cuts.second > self.cuts.second:
            raise SplitError(
                f"this trunk holds layers {self.cuts.first} to {self.cuts.second - 1}; a client "
                f"with first cut {cuts.first} and second cut {cuts.second} would need layers "
                f"{cuts.first} to {cuts.second - 1}. Give the client more layers, or the trunk."
            )
        if cuts not in self._spans:
            self._spans[cuts] = self._make_span(cuts)
        return self._spans[cuts]

    def _make_span(self, cuts: CutLayers) -> "TrunkModel":
        memo: dict[int, object] = {id(self._spans): {}, id(self._caches): {}}
        for index, layer in enumerate(self.stack.layers(self)):
            shared = cuts.part_of(index) == "trunk"
            memo[id(layer)] = layer if shared else StandIn(layer, self._layer_output)
        span = copy.deepcopy(self, memo)
        span.cuts = cuts
        span._hook_ends()
        return span

    @property
    def host(self) -> nn.Module:
        """Return the module whose forward runs the layers."""
        return self._host[0]

    @property
    def hidden_size(self) -> int:
        """Return the width of the hidden states as they cross the cut layer."""
        return math.prod(self._position_shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrunkModel":
        self._spans.clear()  # they have buffers of their own; span() makes them anew
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def train(self, mode: bool = True) -> "TrunkModel":
        """Set training mode, also on the module whose forward is called."""
        super().train(mode)
        self._host[0].training = mode
        for span in self._spans.values():
            span.train(mode)
        return self

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
        """Run the trunk layers.

        Args:
            hidden_states: Smashed data, ``[batch, seq, hidden]``.
            attention_mask: Padding mask, ``[batch, seq]``, nonzero where there is a token; None
                where nothing is padded. Where the client's model made another mask than follows
                from padding: that one, ``[batch or 1, heads or 1, seq, seq]``, or one per kind of
                layer.
            position_ids: ``[batch or 1, seq]``, with an axis before them where the model has several
                (``[3, batch or 1, seq]``); None: the model's own default.
            use_cache: As the model's own argument; None: its configuration's. Without ``cache``
                nothing outlives the call, but a model may read the position ids otherwise, or
                compute with another memory layout and so with other last bits.
            cache: Go on from the keys and values kept in this process under its id.
            layer_arguments: What the client's model makes with weights of its own for all layers,
                such as a position bias, by place (:mod:`flower_split.split.structure.layer_arguments`).
            host_arguments: What the model's forward adds to the hidden states between the trunk's
                layers, such as features of images: the arguments that it takes them by, by place.

        Returns:
            The last trunk layer's hidden states, ``[batch, seq, hidden]``.

        Raises:
            SplitError: The model's forward ended without reaching the trunk's last layer, or there
                is no such cache.
        """
        if cache is None:
            more = from_places(host_arguments) if host_arguments else {}
            given = layer_arguments or {}
            return self._run(
                hidden_states, attention_mask, position_ids, use_cache, None, given, more
            )
        if layer_arguments or not (attention_mask is None or isinstance(attention_mask, Tensor)):
            raise SplitError("with a key-value cache a trunk takes the padding mask alone.")
        if cache.step == 0:
            self._caches[cache.id] = TrunkCache(self.config)
        kept = self._caches.get(cache.id)
        if kept is None:
            raise SplitError(
                f"this trunk keeps no key-value cache {cache.id}. Begin generation anew."
            )
        kept.go_back(cache.past_length, cache.rows)
        return self.run_cached(kept, hidden_states, attention_mask, position_ids, host_arguments)

    def run_cached(
        self,
        kept: TrunkCache,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        host_arguments: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run the trunk layers on new positions, after those in ``kept``, which grows by them.

        Args:
            kept: Keys and values; of no use any more if this raises.
            hidden_states: Smashed data of the new positions, ``[batch, seq, hidden]``.
            attention_mask: Their padding mask, ``[batch, seq]``, or None.
            position_ids: Theirs, ``[batch or 1, seq]``; None: the model's own default.
            host_arguments: As for :meth:`forward`; ``attention_mask`` among them is the whole mask,
                over the positions before as well, where it does not follow from padding.

        Returns:
            The last trunk layer's hidden states, ``[batch, seq, hidden]``.
        """
        batch, seq = hidden_states.shape[:2]
        mask = kept.extend_mask(attention_mask, batch, seq)
        more = from_places(host_arguments or {})
        output = self._run(hidden_states, mask, position_ids, True, kept.cache, {}, more)
        kept.advance(hidden_states, range(self.cuts.first, self.cuts.second))
        return output

    def release_cache(self, cache_id: int) -> None:
        """Forget the keys and values kept under ``cache_id``."""
        self._caches.pop(cache_id, None)

    def _run(
        self,
        hidden_states: Tensor,
        attention_mask: Mask,
        position_ids: Tensor | None,
        use_cache: bool | None,
        past: DynamicCache | None,
        layer_arguments: Mapping[str, Tensor],
        host_arguments: Mapping[str, object],
    ) -> Tensor:
        host = self._host[0]
        width = self._width
        inputs = host_inputs(host, hidden_states, width, attention_mask, position_ids, use_cache)
        inputs.update(host_arguments)
        if past is not None:
            inputs[cache_argument(type(host).forward)] = past
        begin = hidden_states.view(*hidden_states.shape[:2], *self._position_shape)
        if layer_arguments and not self._takes_arguments:
            self._hook_layers()
        # A model's prologue may draw random numbers for dropout; the layers get those it left.
        state = random_state_of(begin.device) if self.training else None
        token = running.set(Smashed(begin, *self._ends, layer_arguments, state))
        try:
            host(**inputs)
        except TrunkOutput as reached:
            # The layers may lie on several devices; a caller knows one.
            return reached.hidden_states.flatten(2).to(hidden_states.device)
        finally:
            running.reset(token)
        raise SplitError(
            f"{type(host).__name__}'s forward ended without calling layer "
            f"{self.cuts.second - 1}. This family does not run its layers as a chain."
        )
