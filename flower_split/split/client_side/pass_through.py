"""The stand-in for a layer of the trunk that the client passes by."""

from torch import nn

from flower_split.split.client_side.running_call import (
    check_arguments,
    check_unchanged,
    running_call,
)
from flower_split.split.structure.stand_in import LayerOutput, StandIn, take_hidden_states


class PassThrough(StandIn):
    """Stands where another of the trunk's layers is; what comes in must be what the trunk returned.

    Args:
        layer: The layer that it replaces.
        output: The form of the family's layer outputs.
        index: The layer's index in the model.
    """

    def __init__(self, layer: nn.Module, output: LayerOutput, index: int) -> None:
        super().__init__(layer, output, index)
        self._index = index

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the first argument, in the form of the family's layer outputs.

        Raises:
            SplitError: The model's forward changes the hidden states between the trunk's layers, or
                gives this one what the trunk's layer is not given.
        """
        call = running_call.get()
        if call is not None and call.returned is not None:
            check_arguments(self._index, args, kwargs, call)
            if call.shared:  # what the client's forward added, the trunk's has added itself
                return self._layer_output.wrap(call.returned[0], args, kwargs)
            check_unchanged(take_hidden_states(args, kwargs), *call.returned, self._index)
        return super().forward(*args, **kwargs)
