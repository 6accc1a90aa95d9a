"""Compute the adapters of a client with cut layers of its own, for export."""

from collections.abc import Mapping

from torch import Tensor

from flower_split.errors import SplitError
from flower_split.parties.parts import overlap_layers
from flower_split.split import CutLayers
from flower_split.split.structure.stack import LayerStack


def clients_own(
    state: Mapping[str, Tensor], trunk: Mapping[str, Tensor], stack: LayerStack, cuts: CutLayers
) -> dict[str, Tensor]:
    """Return those of the clients' tensors that a model with ``cuts`` has of them and not of the trunk.

    Args:
        state: The clients' global adapter, or its base change.
        trunk: The trunk's adapter.
        stack: Where the layers are.
        cuts: The client's cut layers.
    """
    middle = _middle(trunk, stack, cuts)
    return {name: tensor for name, tensor in state.items() if stack.index_of(name) not in middle}


def with_cuts(
    state: Mapping[str, Tensor],
    trunk: Mapping[str, Tensor],
    stack: LayerStack,
    cuts: CutLayers,
    run: CutLayers,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the adapters of the model that a client with ``cuts`` computes.

    Args:
        state: The clients' global adapter.
        trunk: The trunk's.
        stack: Where the layers are.
        cuts: The client's cut layers, within the run's.
        run: The run's.

    Returns:
        ``(clients', trunk's)``: the trunk's of the layers between ``cuts``, as far as it has them,
        and the clients' of all others.

    Raises:
        SplitError: ``cuts`` do not lie within the run's, or no client held some of the layers.
    """
    if not run.holds(cuts):
        raise SplitError(
            f"the run's trunk is {run}; a client with cut layers {cuts} cannot have been in it. "
            "Name cut layers within the run's."
        )
    own, middle = clients_own(state, trunk, stack, cuts), _middle(trunk, stack, cuts)
    theirs = {name: tensor for name, tensor in trunk.items() if stack.index_of(name) in middle}
    held = {stack.index_of(name) for name in own} & set(range(run.first, run.second))
    trained = {stack.index_of(name) for name in trunk}
    lacking = [index for index in overlap_layers(run, cuts) if index in trained - held]
    if lacking:
        listed = ", ".join(str(index) for index in range(run.first, run.second) if index in held)
        raise SplitError(
            f"no client of the run held trunk layer {', '.join(map(str, lacking))}, so none computed "
            f"a model with cut layers {cuts}. Of the trunk's layers, clients held: {listed or 'none'}."
        )
    return own, theirs


def _middle(trunk: Mapping[str, Tensor], stack: LayerStack, cuts: CutLayers) -> set[int | None]:
    """Return the layers between ``cuts`` that the trunk's adapter has."""
    return {stack.index_of(name) for name in trunk} & set(range(cuts.first, cuts.second))
