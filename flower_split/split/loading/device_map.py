"""Where a party's own modules go on a host with several GPUs.

A layer is placed whole. transformers divides the modules and accelerate's hooks move what goes from
one to the next; the other parties' have no weights here, so they count for nothing.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from accelerate.utils import find_tied_parameters  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from flower_split.config import DEVICE_MAPS
from flower_split.errors import SplitError
from flower_split.split.structure.stack import LayerStack

DeviceMap = str | Mapping[str, int | str | torch.device]


def resolve_device_map(
    device_map: DeviceMap,
    skeleton: PreTrainedModel,
    stack: LayerStack,
    indices: Sequence[int],
    *,
    beside: bool = False,
) -> str | dict[str, torch.device]:
    """Return what ``from_pretrained`` takes so that a part's modules go where ``device_map`` says.

    Args:
        device_map: One of transformers' names, or module name -> device. Names are those of the
            unsplit model, a layer's or one around it; what does not concern the part is ignored.
        skeleton: The part without weights: everything else replaced.
        stack: Where its layers are.
        indices: Of the layers that are the part's own.
        beside: Whether modules beside the layers are its own, too, and go where their names say;
            those that are not named go with the first layer.

    Returns:
        A name as it is; otherwise every module of ``skeleton`` -> device.

    Raises:
        SplitError: A name is unknown, a layer of the trunk has no place, or a device cannot be used.
    """
    if isinstance(device_map, str):
        if device_map not in DEVICE_MAPS:
            raise SplitError(
                f"a device map must be one of {', '.join(DEVICE_MAPS)}, or name a device for each "
                f"of the part's layers; it is {device_map!r}. For one device, use device."
            )
        return device_map
    asked = {name: _device(name, device) for name, device in device_map.items()}
    layers = {
        stack.layer_path(index): _place_of(stack.layer_path(index), asked) for index in indices
    }
    within = [n for n in asked if any(n.startswith(layer + ".") for layer in layers)]
    if within:
        raise SplitError(
            f"the device map places {within[0]}, a part of a layer; a layer is placed whole. Name "
            f"the layer, such as {next(iter(layers))}."
        )
    if len({device.type for device in layers.values()}) > 1:
        raise SplitError(
            "the device map puts some of the part's layers on the CPU and others on an "
            "accelerator; layers that are moved there only to compute cannot be trained. Put all "
            "of them on accelerators, or all on the CPU."
        )
    places = _complete(skeleton, layers, asked if beside else {})
    _check_shared(skeleton, places)
    return places


def check_placed(
    model: PreTrainedModel, stack: LayerStack, indices: Sequence[int], *, beside: bool = False
) -> None:
    """Check that nothing with weights was left without an accelerator for lack of room.

    Args:
        model: As it was loaded.
        stack: Where its layers are.
        indices: Of the layers that are the part's own.
        beside: Whether modules beside the layers are its own, too.

    Raises:
        SplitError: Something was.
    """
    places: Mapping[str, object] = getattr(model, "hf_device_map", {})
    kinds = {name: str(place).split(":")[0] for name, place in places.items()}
    if len({kind for kind in kinds.values() if kind in ("cpu", "disk")}) == len(
        set(kinds.values())
    ):
        return  # nothing but the CPU: there is no accelerator
    layers = [stack.layer_path(index) for index in indices]
    others = [name for name in kinds if beside and name and stack.index_of(name) is None]
    weighty = [name for name in others if any(True for _ in _parameters_of(model, name))]
    for own in [*layers, *weighty]:
        for name, kind in kinds.items():
            if kind in ("cpu", "disk") and (own + ".").startswith(f"{name}." if name else ""):
                raise SplitError(
                    f"the accelerators of this host have no room for {own}: the device map would "
                    f"leave it on the {kind}, where it cannot be trained. Use more or larger "
                    "accelerators, model.quantization, or cut layers that leave this part fewer."
                )


def _parameters_of(model: PreTrainedModel, name: str) -> Iterator[torch.nn.Parameter]:
    """Return the parameters of a module, or the one parameter, of a name in a device map."""
    try:
        yield from model.get_submodule(name).parameters()
    except AttributeError:
        yield model.get_parameter(name)


def _check_shared(skeleton: PreTrainedModel, places: Mapping[str, torch.device]) -> None:
    """Check that a weight which several modules share gets one place.

    Raises:
        SplitError: It gets several.
    """
    for names in find_tied_parameters(skeleton):
        shared = {
            name: device
            for name in names
            for place, device in places.items()
            if name.startswith(place + ".")
        }
        if len(set(shared.values())) > 1:
            told = " and ".join(f"{name} on {device}" for name, device in shared.items())
            raise SplitError(
                f"the device map puts {told}, and they are one weight. Put these modules on one device."
            )


def _device(name: str, place: int | str | torch.device) -> torch.device:
    try:
        device = torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise SplitError(
            f"the device map puts {name or 'everything'} on {place!r}, which is no device to compute "
            'on. Use "cuda:0", "cuda:1" and so on.'
        ) from error
    if device.type == "meta" or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise SplitError(
            f"the device map puts {name or 'everything'} on {device}, and torch sees "
            f"{torch.cuda.device_count()} CUDA devices here. Name devices that are there."
        )
    return device


def _place_of(layer: str, asked: Mapping[str, torch.device]) -> torch.device:
    """Return the device of the longest name that is the layer's or one around it."""
    around = [name for name in asked if name in ("", layer) or layer.startswith(name + ".")]
    if not around:
        raise SplitError(
            f"the device map gives {layer}, a layer of this part, no place. Name every layer of the "
            'part, or "" for the rest.'
        )
    return asked[max(around, key=len)]


def _complete(
    skeleton: PreTrainedModel,
    layers: Mapping[str, torch.device],
    asked: Mapping[str, torch.device],
) -> dict[str, torch.device]:
    """Return the places of the layers and of every module beside them.

    Args:
        skeleton: The part without weights.
        layers: The places of its layers.
        asked: Those of modules beside them; others go with the first layer.
    """
    first = next(iter(layers.values()))
    places: dict[str, torch.device] = {}

    def walk(path: str) -> None:
        module = skeleton.get_submodule(path)
        for name, _ in module.named_children():
            child_path = f"{path}.{name}" if path else name
            if child_path in layers:
                places[child_path] = layers[child_path]
            elif any(layer.startswith(child_path + ".") for layer in layers):
                walk(child_path)
            else:
                around = [n for n in asked if n == child_path or child_path.startswith(n + ".")]
                places[child_path] = asked[max(around, key=len)] if around else first

    walk("")
    return places
