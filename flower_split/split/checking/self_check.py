"""A self-check that needs no list of families, by running a tiny batch.

A model can be split when its forward runs the trunk's layers once each, in order, as a plain
chain of hidden states, and when what it hands to them beside the hidden states follows from the
padding mask and the position ids alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.client_side.model import trunk_slot
from flower_split.split.client_side.rehearsal import Rehearsal
from flower_split.split.client_side.trunk_slot import TrunkSlot
from flower_split.split.structure.cuts import CutLayers
from flower_split.split.structure.host_call import LayerOutput, StandIn, hidden_states_of
from flower_split.split.structure.kv_cache import forbid_cache
from flower_split.split.structure.layer_arguments import nested_tensors
from flower_split.split.structure.probe import (
    Trace,
    probe_batches,
    quiet,
    same_bits,
    trace,
    with_other_content,
)
from flower_split.split.structure.stack import LayerStack


def check_splittable(model: PreTrainedModel, stack: LayerStack, cuts: CutLayers) -> None:
    """Check what can be checked without running the model.

    Raises:
        SplitError: The model is already split, the cuts do not fit, a weight is shared between
            the trunk and another part, or a setting makes layers depend on each other.
    """
    name = type(model).__name__
    if any(isinstance(layer, StandIn) for layer in stack.layers(model)):
        raise SplitError(f"this {name} is already split. Split the unsplit model.")
    named = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(named, int) and stack.num_layers == 1 < named:
        raise SplitError(
            f"{name} runs one layer's weights {named} times ({stack.path} holds one module), so its "
            "layers cannot live on two machines. This family cannot be split as it is configured."
        )
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
    parts = stack.path.split(".")[:-1]
    for depth in range(len(parts) + 1):
        dropped = getattr(model.get_submodule(".".join(parts[:depth])), "layerdrop", 0)
        if isinstance(dropped, (int, float)) and dropped:
            raise SplitError(
                f"{name} is configured with layerdrop = {dropped}, which skips whole layers at "
                "random while training; client and trunk would not skip the same. Set layerdrop "
                "(encoder_layerdrop, decoder_layerdrop) to 0."
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


def learn_handed_on(found: Trace, cuts: CutLayers, output: LayerOutput) -> bool:
    """See what the layers outside the trunk hand on to the next one; whether they do at all."""
    for call, following in zip(found.calls, found.calls[1:], strict=False):
        if cuts.part_of(call.index) != "trunk":
            output.learn_handed_on(call.output, following.others)
    return bool(output.handed_on)


def check_made_in_trunk(
    found: Trace,
    stack: LayerStack,
    cuts: CutLayers,
    output: LayerOutput,
    name: str,
    known_form: bool,
) -> None:
    """Check that the trunk's layers make nothing for the top but hidden states.

    Args:
        found: Of a client model without a bottom.
        stack: Where its layers are.
        cuts: The cut layers.
        output: The form of layer outputs, learned from ``found``.
        name: Of the model's class.
        known_form: ``output`` was learned from the whole model.

    Raises:
        SplitError: They make something that the top's layers would share, as far as one can tell.
    """
    top = [call for call in found.calls if call.index >= cuts.second]
    if not top:
        return
    shared = sorted(place for place in output.handed_on.values() if place not in top[0].others)
    alone = cuts.second == stack.num_layers - 1 and not output.handed_on and not known_form
    if shared or (alone and len(nested_tensors(top[0].output)) > 1):
        raise SplitError(
            f"the first layer of {name} makes a tensor that all layers share"
            + (f" (argument {shared[0]})" if shared else "")
            + ", so the top would lack what the trunk makes. Leave at least one layer to the bottom "
            "(first cut 1 or more)."
        )


def check_client(
    client: PreTrainedModel,
    stack: LayerStack,
    cuts: CutLayers,
    output: LayerOutput,
    constants: frozenset[str],
    *,
    known_form: bool = False,
) -> None:
    """Check a client model whose trunk is the identity, and prepare it for the real one.

    What the client's forward hands to the layers of the trunk must be what the trunk's forward
    will prepare for them from the mask and the positions; or else be the same tensor for all of
    them, whatever the tokens are: then it is sent along.

    Args:
        client: The client model; its trunk returns the hidden states it is given.
        stack: Where its layers are.
        cuts: The cut layers.
        output: The form of layer outputs shared by the client's stand-ins; set here.
        constants: The embeddings that the trunk keeps.
        known_form: ``output`` is set already, and other layer arguments that differ are no error:
            the whole model is there to compare with.

    Raises:
        SplitError: The family's layers cannot be stood in for.
    """
    name, slot = type(client).__name__, trunk_slot(client)
    slot.others.learned = []
    with quiet(client):
        batches = probe_batches(client)
        for batch in batches:
            if not known_form:
                found = _trace_learning(client, stack, cuts, batch, output)
            else:
                found = trace(client, stack, batch)
            check_chain(found, cuts, name)
            if cuts.first == 0:
                check_made_in_trunk(found, stack, cuts, output, name, known_form)
        try:
            slot.others.rehearsal = Rehearsal(client, stack, cuts, output, constants)
            compared = [_compare_arguments(client, stack, cuts, batch) for batch in batches]
            other = _compare_arguments(client, stack, cuts, with_other_content(batches[-1]))
        except SplitError:
            slot.others.rehearsal = None
            if not known_form:
                raise
            return
        finally:
            slot.others.learned = None
    _settle(slot, compared, other, None if known_form else (name, cuts.first))


@dataclass(slots=True)
class _Compared:
    """How the arguments of the trunk's layers compare with what a trunk would prepare."""

    different: set[str]  # places
    shared: dict[str, Tensor]  # floating point, and the same in all of the trunk's layers


def _settle(
    slot: TrunkSlot,
    compared: Sequence[_Compared],
    other: _Compared,
    strict: tuple[str, int] | None,
) -> None:
    """Decide which of the arguments that differ the trunk is sent, and which it has no need of.

    Args:
        slot: Where the decision is noted.
        compared: One per probe batch.
        other: Of the last batch with other content: what differs then depends on the tokens.
        strict: The model's class and its first trunk layer, if what cannot be sent is an error.

    Raises:
        SplitError: The trunk would need something that depends on the tokens.
    """
    different: set[str] = set().union(*(found.different for found in compared))
    carried = {
        place
        for place in different
        if all(place in found.shared for found in compared)
        and same_bits(compared[-1].shared[place], other.shared[place])
    }
    if strict is not None and different - carried:
        place = min(different - carried)
        raise SplitError(
            f"{strict[0]} hands layer {strict[1]}, or one after it, a tensor (argument {place}) that "
            "depends on more than the padding mask and the position ids, which is all that a "
            "trunk receives beside the hidden states. This family cannot be split there."
        )
    slot.others.carried = tuple(sorted(carried))
    slot.others.ignored = frozenset(different - carried)


def _compare_arguments(
    client: PreTrainedModel,
    stack: LayerStack,
    cuts: CutLayers,
    batch: dict[str, Tensor],
) -> _Compared:
    learned = trunk_slot(client).others.learned = []
    found = trace(client, stack, batch)
    prepared = learned[-1] if learned else {}
    calls = [call for call in found.calls if cuts.part_of(call.index) == "trunk"]
    different: set[str] = set()
    for call in calls:
        expected = prepared.get(call.index, {})
        different |= call.others.keys() ^ expected.keys()
        both = call.others.keys() & expected.keys()
        different |= {p for p in both if not same_bits(call.others[p], expected[p])}
    shared = {
        place: tensor
        for place, tensor in calls[0].others.items()
        if tensor.is_floating_point()
        and all(place in c.others and same_bits(tensor, c.others[place]) for c in calls)
    }
    return _Compared(different, shared)


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
        generation_config = getattr(client, "generation_config", None)
        if generation_config is not None:
            generation_config.use_cache = False


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
            found = trace(client, stack, batch)
            if learn_handed_on(found, cuts, output):
                found = trace(client, stack, batch)
            return found
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
        rows = len(next(iter(batch.values())))
        if len(shapes) == 1 and found.result is not None and len(found.result) == rows:
            learn_handed_on(found, cuts, output)
            return found
    raise problem or SplitError(
        f"the form in which the layers of {type(client).__name__} return their output could not "
        "be found out. Leave at least one layer to the bottom (first cut 1 or more)."
    )
