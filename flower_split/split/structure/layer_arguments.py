"""Tensors among the arguments of a layer, or of a model, by place.

A place is ``"2"`` for the third positional argument, ``"attention_mask"`` for a named one, and
``"position_embeddings.0"`` for the first entry of a named tuple.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from flower_split.errors import SplitError

Arguments = tuple[tuple[object, ...], dict[str, object]]


def tensors_of(args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the tensors among the arguments of a layer's call, without the hidden states, by place."""
    named: dict[str, object] = {str(index): value for index, value in enumerate(args)}
    named.pop("0", None)
    named.update((name, value) for name, value in kwargs.items() if name != "hidden_states")
    return dict(_tensors(named, ""))


def nested_tensors(value: object) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    return [tensor for _, tensor in _tensors(value, "")]


def _tensors(value: object, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{place}.{index}" if place else str(index))


def with_tensors(
    args: tuple[object, ...], kwargs: dict[str, object], tensors: Mapping[str, Tensor]
) -> Arguments:
    """Return the arguments of a layer's call with tensors put at their places; nothing is changed in place.

    Args:
        args: Positional.
        kwargs: Named.
        tensors: By place. A place that the call does not have is added, if it is a name.
    """
    positional, named = list(args), dict(kwargs)
    for place, tensor in tensors.items():
        head, _, rest = place.partition(".")
        if head.isdecimal() and int(head) < len(positional):
            positional[int(head)] = _put(positional[int(head)], rest, tensor)
        else:
            named[head] = _put(named.get(head), rest, tensor)
    return tuple(positional), named


def _put(value: object, place: str, tensor: Tensor) -> object:
    if not place:
        return tensor
    head, _, rest = place.partition(".")
    if isinstance(value, dict):
        return {**value, head: _put(value.get(head), rest, tensor)}
    if not isinstance(value, (tuple, list)):
        raise SplitError(f"a layer's call has no place {head!r} to put a tensor of the client at.")
    items = [_put(item, rest, tensor) if str(i) == head else item for i, item in enumerate(value)]
    return tuple(items) if isinstance(value, tuple) else items


def by_place(values: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the tensors in named values and, nested, in tuples, lists and dicts, by place."""
    return dict(_tensors(dict(values), ""))


def from_places(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Return named values, as :func:`by_place` took them apart; tuples come back as lists."""
    values: dict[str, object] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for place, tensor in tensors.items():
        head, _, rest = place.partition(".")
        if rest:
            parts.setdefault(head, {})[rest] = tensor
        else:
            values[head] = tensor
    for head, inner in parts.items():
        found = from_places(inner)
        numbered = found.keys() == {str(index) for index in range(len(found))}
        values[head] = [found[str(i)] for i in range(len(found))] if numbered else found
    return values
