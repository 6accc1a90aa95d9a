"""The running call of a model around the trunk: what the trunk needs of it.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from flower_split.errors import SplitError
from flower_split.split.structure.host_call import Mask
from flower_split.split.structure.kv_cache import keeps_only_keys_and_values
from flower_split.split.structure.layer_arguments import nested_tensors
from flower_split.split.structure.probe import same_bits

# Arguments of the model that no layer computes with, or that the trunk is given or builds itself.
_KNOWN_ARGUMENTS = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "hidden_states",
        "attention_mask",
        "position_ids",
        "use_cache",
        "cache_position",
        "labels",
        "num_items_in_batch",
    }
)
# Where packed sequences begin: told by the position ids as well, which the trunk is given.
_PACKING_ARGUMENTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})


@dataclass(slots=True)
class Expected:
    """What the trunk's layers are given, where the call leaves that in doubt."""

    prepared: dict[int, dict[str, Tensor]]  # layer -> place -> tensor
    apart: frozenset[str]  # places that need not agree
    # Pairs that do, kept so that none of the ids is used again: most are the same in all layers.
    agreed: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Return whether the two are equal bit for bit."""
        pair = id(one), id(other)
        if pair not in self.agreed:
            if not same_bits(one.detach(), other):
                return False
            self.agreed[pair] = one, other
        return True


@dataclass(slots=True)
class ModelCall:
    """What the trunk needs of the running call of a model around the layers."""

    attention_mask: object
    position_ids: Tensor | None
    use_cache: bool | None
    has_past: bool  # whether it goes on with a key-value cache
    unknown: dict[str, object]  # arguments with tensors in them that the trunk does not receive
    outer: "ModelCall | None"  # the call of a model around this one
    returned: tuple[Tensor, int] | None = None  # by the trunk, and autograd's count of its changes
    rehearsed: Expected | None = None
    shared: bool = False  # whether the trunk is given the unknown ones after all


running_call: ContextVar[ModelCall | None] = ContextVar("call", default=None)


@functools.lru_cache(maxsize=64)
def _signature(forward: Callable[..., object]) -> inspect.Signature:
    return inspect.signature(forward)


def note_call(model: PreTrainedModel, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Keep a model's mask and positions for the trunk, before it runs.

    Raises:
        SplitError: It is called with what no model in two places can do.
    """
    bound = _signature(type(model).forward).bind(model, *args, **kwargs)
    named = dict(bound.arguments)
    named.update(named.pop("kwargs", {}))
    named.pop("self", None)
    config = getattr(model, "config", None)
    routing = named.get("output_router_logits", getattr(config, "output_router_logits", False))
    if routing:
        raise SplitError(
            "the model was called with output_router_logits, for an auxiliary loss over all layers, "
            "of which the client has some. Set output_router_logits to False."
        )
    cache = named.pop("past_key_values", None)
    layers = getattr(cache, "layers", ())  # a pair, of encoder and decoder, has none itself
    if any(isinstance(layer, StaticLayer) for layer in layers):
        raise SplitError(
            f"the model was called with a {type(cache).__name__} of a fixed length, and the trunk's "
            'grows with the positions it is sent. Generate with cache_implementation="dynamic" (the '
            "default), or with use_cache=False."
        )
    use_cache = named.get("use_cache")
    if use_cache is None and getattr(model.config, "use_cache", None) is False:
        use_cache = False
    known = _KNOWN_ARGUMENTS | {model.main_input_name}
    if _PACKING_ARGUMENTS & named.keys() and isinstance(named.get("position_ids"), Tensor):
        # Layers of other kinds, such as linear attention, need them themselves.
        if keeps_only_keys_and_values(model.config):
            known |= _PACKING_ARGUMENTS
    unknown = {n: v for n, v in named.items() if n not in known and nested_tensors(v)}
    running_call.set(
        ModelCall(
            attention_mask=named.get("attention_mask"),
            position_ids=named.get("position_ids"),
            use_cache=use_cache,
            has_past=isinstance(cache, Cache) and bool(cache.get_seq_length() > 0),
            unknown=unknown,
            outer=running_call.get(),
        )
    )


def forget_call(model: nn.Module, args: tuple[object, ...], output: object) -> None:
    """Forget a model's call, after it has run."""
    call = running_call.get()
    running_call.set(None if call is None else call.outer)


def mask_for_trunk(call: ModelCall) -> Mask:
    """Return the mask that the trunk is given in a call of the module that owns the layers.

    A model may hand that module a mask that it made; then the padding mask it was given itself
    counts, as long as it made the other from that alone.

    Raises:
        SplitError: The mask is of no form that there is.
    """
    around: ModelCall | None = call
    while around is not None:
        mask = around.attention_mask
        if around is not call and around.unknown:
            break  # which may have gone into the mask
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return mask
        around = around.outer
    made = call.attention_mask
    masks = made.values() if isinstance(made, Mapping) else [made]
    if not all(m is None or (isinstance(m, Tensor) and m.dim() in (2, 4)) for m in masks):
        raise SplitError(
            "a split model takes a padding mask of shape [batch, seq], or the whole mask, [batch, 1, "
            f"seq, seq]; it was given {list(made.shape) if isinstance(made, Tensor) else made!r}."
        )
    return made  # type: ignore[return-value]


def padding_mask(call: ModelCall) -> Tensor | None:
    """Return the padding mask of a call, or of the nearest one around it that has one."""
    around: ModelCall | None = call
    while around is not None:
        mask = around.attention_mask
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask
        around = around.outer
    return None
