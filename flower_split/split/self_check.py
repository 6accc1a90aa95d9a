"""A self-check that needs no list of families, by running a tiny batch.

A model can be split when its forward runs the trunk's layers once each, in order, as a plain
chain of hidden states, and when what it hands to them beside the hidden states follows from the
padding mask and the position ids alone.
"""

import contextvars

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.carve import trunk_replacements
from flower_split.split.client_model import trunk_slot
from flower_split.split.cuts import CutLayers
from flower_split.split.host_call import forbid_cache, host_inputs
from flower_split.split.probe import (
    LayerCall,
    Trace,
    probe_batches,
    quiet,
    recording,
    same_bits,
    trace,
)
from flower_split.split.stack import LayerStack
from flower_split.split.stand_in import LayerOutput, StandIn, hidden_states_of, replace_in_place


def check_splittable(model: PreTrainedModel, stack: LayerStack, cuts: CutLayers) -> None:
    """Check what can be checked without running the model.

    Raises:
        SplitError: The model is already split, the cuts do not fit, a weight is shared between
            the trunk and another part, or a setting makes layers depend on each other.
    """
    name = type(model).__name__
    if any(isinstance(layer, StandIn) for layer in stack.layers(model)):
        raise SplitError(f"this {name} is already split. Split the unsplit model.")
    cuts.check(stack.num_layers, name)
    inside: dict[int, str] = {}
    outside: dict[int, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        index = stack.index_of(path)
        trunk = index is not None and cuts.part_of(index) == "trunk"
        (inside if trunk else outside)[id(parameter)] = path
    for shared in inside.keys() & outside.keys():
        raise SplitError(
            f"{name} shares one weight between the trunk ({inside[shared]}) and another part "
            f"({outside[shared]}), so it cannot live on two machines. This family cannot be split "
            "there."
        )
    text_config = model.config.get_text_config(decoder=True)
    if getattr(text_config, "output_router_logits", False):
        raise SplitError(
            f"{name} is configured with output_router_logits, an auxiliary loss over all layers "
            "that a split model cannot compute. Set output_router_logits to False."
        )
    for setting in ("layerdrop", "decoder_layerdrop"):
        if getattr(text_config, setting, 0):
            raise SplitError(
                f"{name} is configured with {setting} = {getattr(text_config, setting)}, which "
                "skips whole layers at random while training; client and trunk would not skip the "
                f"same. Set {setting} to 0."
            )


def check_chain(found: Trace, cuts: CutLayers, name: str) -> None:
    """Check that the trunk's layers ran once each, in order, each on the one before's output.

    Raises:
        SplitError: They did not.
    """
    span = [call for call in found.calls if cuts.part_of(call.index) == "trunk"]
    order = [call.index for call in span]
    if order != list(range(cuts.first, cuts.second)):
        raise SplitError(
            f"{name} does not run layers {cuts.first} to {cuts.second - 1} once each and in order, "
            f"but {order}, so a trunk cannot stand in their place. This family cannot be split."
        )
    for before, after in zip(span, span[1:], strict=False):
        if not same_bits(hidden_states_of(before.output), after.hidden_states):
            raise SplitError(
                f"{name} changes the hidden states between layers {before.index} and "
                f"{after.index}, outside of both, so a trunk cannot stand in their place. Choose "
                "cut layers on one side of that, or another model."
            )


def check_client(
    client: PreTrainedModel,
    stack: LayerStack,
    cuts: CutLayers,
    output: LayerOutput,
    constants: frozenset[str],
) -> None:
    """Check a client model whose trunk is the identity, and learn the form of layer outputs.

    What the client's forward hands to the layers of the trunk must be what the trunk's forward
    will prepare for them from the mask and the positions alone.

    Args:
        client: The client model; its trunk returns the hidden states it is given.
        stack: Where its layers are.
        cuts: The cut layers.
        output: The form of layer outputs shared by the client's stand-ins; set here.
        constants: The embeddings that the trunk keeps.

    Raises:
        SplitError: The family's layers cannot be stood in for.
    """
    name = type(client).__name__
    with quiet(client):
        for batch in probe_batches(client):
            seen = _trace_learning(client, stack, cuts, batch, output)
            check_chain(seen, cuts, name)
            shape = seen.calls[0].hidden_states.shape
            as_trunk = _trace_as_trunk(client, stack, cuts, batch, shape, output, constants)
            prepared = {call.index: call.others for call in as_trunk}
            for call in seen.calls:
                if cuts.part_of(call.index) == "trunk":
                    _compare_arguments(call, prepared.get(call.index, {}), name)


def settle_cache(client: PreTrainedModel, stack: LayerStack) -> None:
    """Let a client model whose stand-ins cannot fill the family's cache run without one."""
    slot = trunk_slot(client)
    with quiet(client, slot.trunk):
        batch = probe_batches(client)[-1]
        try:
            with_cache = trace(client, stack, batch, use_cache=None).result
        except SplitError:
            with_cache = None
        without = trace(client, stack, batch).result
    if (
        with_cache is None
        or without is None
        or not torch.allclose(with_cache, without, rtol=1e-2, atol=1e-2, equal_nan=True)
    ):
        slot.runs_with_cache = False
        for module in (client, client.get_submodule(stack.host_path)):
            forbid_cache(module)
        client.generation_config.use_cache = False


def _compare_arguments(call: LayerCall, prepared: dict[str, Tensor], name: str) -> None:
    different = sorted(call.others.keys() ^ prepared.keys()) or [
        place for place, value in call.others.items() if not same_bits(value, prepared[place])
    ]
    if different:
        raise SplitError(
            f"{name} hands layer {call.index} a tensor (argument {different[0].strip('.')}) that "
            "depends on more than the padding mask and the position ids, which is all that a "
            "trunk receives beside the hidden states. This family cannot be split."
        )


def _trace_learning(
    client: PreTrainedModel,
    stack: LayerStack,
    cuts: CutLayers,
    batch: dict[str, Tensor],
    output: LayerOutput,
) -> Trace:
    """Trace the client, setting ``output`` to the form that its layers return."""
    if cuts.first > 0:
        first = stack.layers(client)[0]
        handle = first.register_forward_hook(lambda module, args, result: output.learn(result))
        try:
            return trace(client, stack, batch)
        finally:
            handle.remove()
    # No real layer runs before the trunk: try the forms that there are.
    problem: SplitError | None = None
    for length in (None, 1, 2, 3):
        output.length = length
        try:
            found = trace(client, stack, batch)
        except SplitError as error:
            problem = problem or error
            continue
        shapes = {call.hidden_states.shape for call in found.calls}
        if len(shapes) == 1 and found.result is not None and found.result.dim() == 3:
            return found
    raise problem or SplitError(
        f"the form in which the layers of {type(client).__name__} return their output could not "
        "be found out. Leave at least one layer to the bottom (first cut 1 or more)."
    )


def _trace_as_trunk(
    client: PreTrainedModel,
    stack: LayerStack,
    cuts: CutLayers,
    batch: dict[str, Tensor],
    smashed_shape: torch.Size,
    output: LayerOutput,
    constants: frozenset[str],
) -> list[LayerCall]:
    """The layer calls when the client's forward is run as a trunk's is."""
    host = client.get_submodule(stack.host_path)
    weight = next(client.parameters())
    width = int(client.config.get_text_config(decoder=True).hidden_size)
    shape = (*smashed_shape[:2], width)
    smashed = torch.rand(shape, device=weight.device, dtype=weight.dtype)
    inputs = host_inputs(host, smashed, width, batch.get("attention_mask"), None, False)
    calls: list[LayerCall] = []
    replaced = replace_in_place(client, trunk_replacements(client, stack, cuts, output, constants))
    last = stack.layers(client)[cuts.second - 1]
    # A trunk has weights, of which a forward may ask the dtype; here there are none left.
    last.register_parameter("weight_of_trunk", nn.Parameter(weight.detach().new_empty(0)))
    try:
        with recording(stack.layers(client), calls):
            handle = last.register_forward_hook(_stop)  # after the recorder
            try:
                # In a context of its own: a forward that _Stop ends does not take back what it noted.
                contextvars.copy_context().run(lambda: host(**inputs))
            except _Stop:
                pass
            except Exception as error:
                raise SplitError(
                    f"{type(client).__name__} does not run from hidden states, the padding mask "
                    f"and the position ids alone: {type(error).__name__}: {error}"
                ) from error
            finally:
                handle.remove()
    finally:
        del last.weight_of_trunk
        replace_in_place(client, replaced)
    return calls


class _Stop(BaseException):
    """Ends a forward; not an Exception, so that no model swallows it."""


def _stop(module: nn.Module, args: tuple[object, ...], output: object) -> None:
    raise _Stop
