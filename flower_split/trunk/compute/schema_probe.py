"""Finding out which inputs a trunk's model takes, by offering it each of them once.

A family may read a mask as it is, one per kind of layer, or not at all; nothing in transformers says
which. So the trunk runs its model on a tiny batch with each input that the wire has a name for, and
what runs is what it takes. Inputs that only some families have stand in one table here.

Shapes: hidden states ``[batch, seq, hidden]``.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from flower_split.data.model_limits import max_positions
from flower_split.split import TrunkModel
from flower_split.split.structure.host_call import argument_names, cache_argument
from flower_split.split.structure.layer_arguments import tensors_of
from flower_split.split.structure.probe import quiet
from flower_split.split.structure.quantization import float_dtype
from flower_split.split.trunk_side.model import TrunkInputs
from flower_split.trunk.compute.checks import (
    FEATURES,
    FLOATS,
    INTEGERS,
    MASK,
    POSITIONS,
    VISUAL,
    WHOLE,
    Form,
    InputSchema,
    Size,
)

_SIZES: Mapping[str, int] = {"batch": 2, "seq": 3, "past+seq": 3, "visual": 2}
_AXES = (3, 4)  # of position ids where there are several: time, height, width, and of the text
_KINDS_OF_FAMILIES = ("full_attention", "sliding_attention", "chunked_attention")


def schema_of(trunk: nn.Module, hidden_size: int) -> InputSchema:
    """Return what ``trunk`` takes beside hidden states ``[batch, seq, hidden_size]``.

    Of another module than a :class:`TrunkModel` the names of its arguments are all that is known.

    Args:
        trunk: The trunk as it serves: on its device, with its adapter.
        hidden_size: Width of the hidden states, as its fingerprint says.
    """
    if not isinstance(trunk, TrunkModel):
        return _schema_of_module(trunk, hidden_size)
    config = trunk.config.get_text_config(decoder=True)
    limit, table = max_positions(config), getattr(config, "max_position_embeddings", None)
    with quiet(trunk, trunk.host), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a family may warn of what it then refuses
        plain = _taken(trunk) | _kinds_of_mask(trunk)
        use_cache = _runs(trunk, {}, use_cache=True)
    return InputSchema(
        hidden_size=hidden_size,
        max_positions=limit,
        max_position_id=None if limit is None else max(limit, int(table or 0)) - 1,
        plain=plain | _features(trunk),
        cached=_beside_cache(trunk, plain) if use_cache and _takes_cache(trunk) else None,
        use_cache=use_cache,
        kinds=frozenset(_kinds_of_layers(trunk)),
    )


def _schema_of_module(trunk: nn.Module, hidden_size: int) -> InputSchema:
    names = argument_names(type(trunk).forward)
    forms: dict[str, tuple[Form, ...]] = {
        MASK: (Form(FLOATS + INTEGERS, ("batch", "seq")),),
        POSITIONS: (Form(INTEGERS, ("batch", "seq")), Form(INTEGERS, (1, "seq"))),
    }
    taken = {name: forms[name] for name in forms if name in names}
    return InputSchema(hidden_size=hidden_size, plain=taken, cached=taken)


def _taken(trunk: TrunkModel) -> dict[str, tuple[Form, ...]]:
    """Return the inputs that the model runs with, and the forms in which it takes each."""

    def runs(name: str, form: Form) -> bool:
        return _runs(trunk, {name: _filled(form)})

    axes: list[tuple[Size, ...]] = [("batch", "seq"), (1, "seq")]
    offered = {
        MASK: [Form((torch.int64,), ("batch", "seq"))],
        POSITIONS: [Form((torch.int64,), shape) for shape in axes],
        **_layer_arguments(trunk),
    }
    taken = {name: [form for form in forms if runs(name, form)] for name, forms in offered.items()}
    taken[MASK] += _whole_masks(trunk, lambda form: runs(MASK, form))
    for count in _AXES:
        several = [Form((torch.int64,), (count, *shape)) for shape in axes]
        taken[POSITIONS] += [form for form in several[:1] if runs(POSITIONS, form)]
        if taken[POSITIONS][-1:] == several[:1]:
            taken[POSITIONS] += [form for form in several[1:] if runs(POSITIONS, form)]
    return {name: tuple(forms) for name, forms in taken.items() if forms}


def _whole_masks(trunk: TrunkModel, runs: Callable[[Form], bool]) -> list[Form]:
    """Return the forms of a whole mask that run: ``[batch or 1, heads or 1, seq, seq]``."""
    found: list[Form] = []
    for dtype in (torch.bool, float_dtype(trunk)):
        forms = _whole(trunk, "seq", (dtype,))
        if runs(forms[0]) and runs(forms[-1]):  # the fullest and the one that spreads the most
            found += forms
    return found


def _whole(trunk: TrunkModel, keys: Size, dtypes: tuple[torch.dtype, ...]) -> list[Form]:
    rows: tuple[Size, ...] = ("batch", 1)
    heads = dict.fromkeys((_num_heads(trunk), 1))
    return [
        Form((dtype,), (row, head, "seq", keys))
        for dtype in dtypes
        for row in rows
        for head in heads
    ]


def _num_heads(trunk: TrunkModel) -> int:
    heads = getattr(trunk.config.get_text_config(decoder=True), "num_attention_heads", None)
    return heads if isinstance(heads, int) else 1


def _layer_arguments(trunk: TrunkModel) -> dict[str, list[Form]]:
    """Return what a client's frozen weights may make for all layers: biases by relative position."""
    layer = trunk.stack.layers(trunk)[trunk.cuts.first]
    names = list(inspect.signature(type(layer).forward).parameters)[1:]  # without self
    prepared = _prepared(trunk, layer) if "rel_embeddings" in names else {}
    distances = prepared.get("rel_embeddings")
    offered: dict[str, list[Form]] = {}
    for index, name in enumerate(names):
        shapes: list[tuple[Size, ...]] = []
        if name == "position_bias":
            shapes = [(row, _num_heads(trunk), "seq", "seq") for row in ("batch", 1)]
        elif name == "rel_embeddings" and distances is not None:
            shapes = [tuple(distances.shape)]
        for place in (name, str(index)) if shapes else ():
            forms = [Form((float_dtype(trunk),), shape) for shape in shapes]
            offered[f"layer_argument/{place}"] = forms
    return offered


def _prepared(trunk: TrunkModel, layer: nn.Module) -> dict[str, Tensor]:
    """Return what the trunk's own forward gives its first layer, by place."""
    found: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        found.update(tensors_of(args, kwargs))

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    _runs(trunk, {})
    handle.remove()
    return found


def _kinds_of_layers(trunk: TrunkModel) -> tuple[str, ...]:
    """Return the kinds of attention of the layers, as their masks are named."""
    kinds = getattr(trunk.config.get_text_config(decoder=True), "layer_types", None)
    if not isinstance(kinds, list | tuple):
        return ()
    return tuple(f"{MASK}/{kind}" for kind in dict.fromkeys(str(kind) for kind in kinds))


def _kinds_of_mask(trunk: TrunkModel) -> dict[str, tuple[Form, ...]]:
    """Return the masks per kind of layer that the model takes as one dictionary.

    A client's model makes one for every kind that its family has, used by its layers or not.
    """
    names = _kinds_of_layers(trunk)
    nothing = Form((torch.bool, *FLOATS), (0,))
    if not names or not _runs(trunk, {name: _filled(nothing) for name in names}):
        return {}
    forms = _whole_masks(trunk, lambda form: _runs(trunk, {name: _filled(form) for name in names}))
    known = (*names, *(f"{MASK}/{kind}" for kind in _KINDS_OF_FAMILIES))
    return {name: (nothing, *forms) for name in dict.fromkeys(known)}


def _features(trunk: TrunkModel) -> dict[str, tuple[Form, ...]]:
    """Return what a forward adds to hidden states between layers: features of images, by layer."""
    names = argument_names(type(trunk.host).forward)
    if not {"visual_pos_masks", "deepstack_visual_embeds"} <= names:
        return {}
    features = Form(FLOATS, ("visual", trunk.hidden_size))
    layers = {f"{FEATURES}.{index}": (features,) for index in range(trunk.stack.num_layers)}
    return {VISUAL: (Form((torch.bool,), ("batch", "seq")),), **layers}


def _takes_cache(trunk: TrunkModel) -> bool:
    """Return whether the model goes on from keys and values that it is given."""
    return bool(cache_argument(type(trunk.host).forward))


def _beside_cache(
    trunk: TrunkModel, plain: Mapping[str, tuple[Form, ...]]
) -> dict[str, tuple[Form, ...]]:
    """Return what a call with a key-value cache may bring: padding, positions, whole masks, features."""
    taken = {POSITIONS: plain[POSITIONS]} if POSITIONS in plain else {}
    padding = tuple(form for form in plain.get(MASK, ()) if len(form.shape) == 2)
    if padding:
        taken[MASK] = padding
    dtypes = (torch.bool, float_dtype(trunk))
    whole = tuple(_whole(trunk, "past+seq", dtypes))
    if any(len(form.shape) == 4 for form in plain.get(MASK, ())):
        taken[WHOLE] = whole
    for name in plain:
        if name.startswith(f"{MASK}/"):
            taken[f"{WHOLE}.{name.partition('/')[2]}"] = whole
    return taken | _features(trunk)


def _runs(trunk: TrunkModel, tensors: Mapping[str, Tensor], use_cache: bool | None = False) -> bool:
    """Return whether the model runs on a tiny batch with these inputs."""
    device = next(trunk.parameters()).device
    shape = (_SIZES["batch"], _SIZES["seq"], trunk.hidden_size)
    hidden = torch.full(shape, 0.5, dtype=float_dtype(trunk), device=device)
    given = TrunkInputs.of(tensors, device)
    try:
        trunk(
            hidden,
            given.attention_mask,
            given.position_ids,
            use_cache=use_cache,
            layer_arguments=given.layer_arguments,
            host_arguments=given.host_arguments,
        )
    except Exception:  # whatever a family's code raises, it does not take this
        return False
    return True


def _filled(form: Form) -> Tensor:
    shape = [size if isinstance(size, int) else _SIZES[size] for size in form.shape]
    dtype = form.dtypes[0]
    return (
        torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)
    )
