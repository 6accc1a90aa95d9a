"""Cutting a model that is in memory into the client's model and the trunk."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.checking.self_check import (
    check_chain,
    check_client,
    check_splittable,
    settle_cache,
)
from flower_split.split.client_side.model import client_replacements, set_trunk, wire_client
from flower_split.split.client_side.trunk_slot import IdentityTrunk
from flower_split.split.structure.cuts import CutLayers
from flower_split.split.structure.host_call import LayerOutput
from flower_split.split.structure.probe import probe_batches, quiet, same_bits, trace
from flower_split.split.structure.stack import LayerStack, find_stack
from flower_split.split.trunk_side.carve import (
    constant_embeddings,
    drop_outer_weights,
    trunk_replacements,
)
from flower_split.split.trunk_side.model import TrunkModel


def split_model(model: PreTrainedModel, cuts: CutLayers) -> tuple[PreTrainedModel, TrunkModel]:
    """Split a model in memory; the client calls the trunk in process.

    ``model`` is left as it is: client and trunk hold copies of their weights, under the same
    names. The client is of the model's own class; call ``set_trunk`` to give it another trunk.
    Before returning, a tiny batch is run through ``model`` and through the two parts, and their
    outputs are compared bit for bit.

    Args:
        model: A model of transformers, with or without adapters injected: a language model, an
            encoder with a head, an image classifier, a vision-language model (whose vision tower
            stays with the client), an encoder-decoder model (which is cut in its encoder).
        cuts: The cut layers.

    Returns:
        The client's model and the trunk, both in the training mode of ``model``. What is set on the
        client afterwards, such as another attention implementation, does not reach the trunk; with
        ``output_hidden_states`` or ``output_attentions`` the client gives those of its own layers.

    Raises:
        SplitError: The cuts do not fit the model, or the family does not run its layers in a way
            that a trunk could stand in for.
    """
    if not isinstance(model, PreTrainedModel):
        raise SplitError(
            f"split_model takes a transformers PreTrainedModel; it was given "
            f"{type(model).__name__}. Of a PeftModel, pass get_base_model()."
        )
    stack = find_stack(model)
    check_splittable(model, stack, cuts)
    name = type(model).__name__
    output = LayerOutput()
    with quiet(model):
        batches = probe_batches(model)
        traces = [trace(model, stack, batch) for batch in batches]
        for found in traces:
            check_chain(found, cuts, name)
            output.learn(next(call.output for call in found.calls if call.index == cuts.second - 1))
            for call, following in zip(found.calls, found.calls[1:], strict=False):
                output.learn_handed_on(call.output, following.others)
    trunk_output = LayerOutput()
    constants = _constants(model)
    outside = trunk_replacements(model, stack, cuts, trunk_output, constants)
    trunk_root = copy_with(model, outside)
    drop_outer_weights(trunk_root, stack)
    trunk = TrunkModel(trunk_root, stack, cuts, trunk_output)
    client = copy_with(model, client_replacements(model, stack, cuts, output, IdentityTrunk()))
    wire_client(client, stack)
    check_client(client, stack, cuts, output, constants, known_form=True)
    set_trunk(client, trunk)
    with quiet(client, trunk):
        for batch, found in zip(batches, traces, strict=True):
            assert found.result is not None
            _compare(client, stack, batch, found.result, name)
    settle_cache(client, stack)
    return client, trunk


def _constants(model: PreTrainedModel) -> frozenset[str]:
    """Return the embeddings that the class of ``model`` never trains, whatever is frozen in ``model``."""
    try:
        with torch.device("meta"):
            return constant_embeddings(type(model)(model.config))
    except Exception:  # a constructor of its own; the self-check will tell if it matters
        return frozenset()


def _compare(
    client: PreTrainedModel,
    stack: LayerStack,
    batch: dict[str, Tensor],
    expected: Tensor,
    name: str,
) -> None:
    actual = trace(client, stack, batch).result
    assert actual is not None
    exact = expected.device.type == "cpu"
    if same_bits(actual, expected) or (
        not exact and torch.allclose(actual, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    ):
        return
    raise SplitError(
        f"{name} computes something else when it is split: a probe batch gives other outputs than "
        "the unsplit model. Its layers need more than the hidden states, the padding mask and the "
        "position ids. This family cannot be split."
    )


def copy_with(root: PreTrainedModel, replacements: dict[str, nn.Module]) -> PreTrainedModel:
    """Return a deep copy of ``root`` with some modules replaced; those are never copied.

    The replacements take the training mode of ``root``, and so does a trunk that is put in them.
    """
    for module in replacements.values():
        module.train(root.training)
    memo: dict[int, object] = {
        id(root.get_submodule(path)): module for path, module in replacements.items()
    }
    return copy.deepcopy(root, memo)
