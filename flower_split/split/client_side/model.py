"""The client's model: the ordinary model class with the trunk called in place of its layers.

The first of the trunk's layers is replaced by a :class:`TrunkSlot`, which calls the trunk, and the
others by :class:`PassThrough`; hooks hand the running call's mask and positions to the slot.
"""

from torch import nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.client_side.saving import refuse_plain_saving
from flower_split.split.client_side.trunk_slot import (
    CachingTrunk,
    IdentityTrunk,
    PassThrough,
    TrunkSlot,
    forget_call,
    note_call,
)
from flower_split.split.structure.cuts import CutLayers
from flower_split.split.structure.host_call import LayerOutput
from flower_split.split.structure.kv_cache import keeps_only_keys_and_values
from flower_split.split.structure.place_holders import replace_in_place
from flower_split.split.structure.stack import LayerStack


def client_replacements(
    root: nn.Module, stack: LayerStack, cuts: CutLayers, output: LayerOutput, trunk: nn.Module
) -> dict[str, nn.Module]:
    """Return what to put where, so that ``root`` keeps the bottom's and the top's weights alone.

    Returns:
        Dotted name in ``root`` -> replacement.
    """
    layers = stack.layers(root)
    replacements: dict[str, nn.Module] = {
        stack.layer_path(index): PassThrough(layers[index], output, index)
        for index in range(cuts.first + 1, cuts.second)
    }
    first = layers[cuts.first]
    replacements[stack.layer_path(cuts.first)] = TrunkSlot(first, output, cuts.first, trunk)
    return replacements


def carve_client(root: nn.Module, stack: LayerStack, cuts: CutLayers, output: LayerOutput) -> None:
    """Leave the bottom's and the top's weights alone in ``root``, in place; its trunk is the identity."""
    replace_in_place(root, client_replacements(root, stack, cuts, output, IdentityTrunk()))


def wire_client(client: PreTrainedModel, stack: LayerStack) -> None:
    """Make ``client``, whose layers are replaced, hand its mask and positions to the trunk."""
    parts = stack.host_path.split(".") if stack.host_path else []
    for depth in range(len(parts) + 1):
        model = client.get_submodule(".".join(parts[:depth]))
        if isinstance(model, PreTrainedModel):
            model.register_forward_pre_hook(note_call, with_kwargs=True)
            model.register_forward_hook(forget_call, always_call=True)
    refuse_plain_saving(client)
    _note_caching(client)


def _note_caching(client: nn.Module) -> None:
    """Let generate() keep keys and values where the trunk does; elsewhere it computes the prefix."""
    generation_config = getattr(client, "generation_config", None)
    model_config = getattr(client, "config", None)
    if generation_config is not None and model_config is not None:
        trunk = trunk_slot(client).trunk
        generation_config.use_cache = (
            trunk_slot(client).runs_with_cache
            and isinstance(trunk, CachingTrunk)
            and keeps_only_keys_and_values(model_config)
        )


def trunk_slot(client: nn.Module) -> TrunkSlot:
    """Return the place in a client model from which the trunk is called.

    Raises:
        SplitError: ``client`` is not a client model.
    """
    for module in client.modules():
        if isinstance(module, TrunkSlot):
            return module
    raise SplitError(
        f"{type(client).__name__} is not a client model: it has no trunk. Make one with "
        "split_model or load_client_model."
    )


def set_trunk(client: nn.Module, trunk: nn.Module) -> None:
    """Make a client model call another trunk from now on.

    Args:
        client: A client model, or a wrapper around one.
        trunk: Any module called as ``trunk(hidden_states, attention_mask=None,
            position_ids=None) -> hidden_states``.

    Raises:
        SplitError: ``client`` is not a client model.
    """
    trunk_slot(client).replace(trunk)
    _note_caching(client)
