"""What a trunk is given beside the hidden states, as tensors by name: for a network between the two.

Names: ``attention_mask`` (the padding mask ``[batch, seq]``, or the whole mask ``[batch or 1, heads or
1, seq, seq]``), ``attention_mask/KIND`` (one whole mask per kind of layer; an empty tensor where that
kind needs none), ``position_ids`` (``[batch or 1, seq]``, with an axis before them where the model has
several), ``layer_argument/PLACE`` and ``host_argument/PLACE``
(:mod:`flower_split.split.structure.layer_arguments`): see ``TrunkModel.forward``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flower_split.errors import SplitError
from flower_split.split.structure.host_call import Mask

_MASK, _POSITIONS = "attention_mask", "position_ids"
_LAYER, _HOST = "layer_argument", "host_argument"


@dataclass(frozen=True, slots=True)
class TrunkInputs:
    """The arguments of a trunk's call beside the hidden states."""

    attention_mask: Mask = None
    position_ids: Tensor | None = None
    layer_arguments: Mapping[str, Tensor] = field(default_factory=dict)
    host_arguments: Mapping[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name.

        Raises:
            SplitError: A layer's or a host's argument is made by weights that are trained: a network
                returns no gradient of it.
        """
        places = {**self.layer_arguments, **self.host_arguments}
        trained = [place for place, tensor in places.items() if tensor.requires_grad]
        if trained:
            raise SplitError(
                f"the client trains weights that make a tensor for the trunk's layers (argument "
                f"{', '.join(trained)}, such as a relative position bias or features of images), and "
                "a remote trunk returns no gradient of that. Freeze those weights: adapters on the "
                "layers' linear modules leave them frozen."
            )
        tensors: dict[str, Tensor] = {}
        if isinstance(self.attention_mask, Mapping):
            for kind, mask in self.attention_mask.items():
                nothing = torch.empty(0, dtype=torch.bool)
                tensors[f"{_MASK}/{kind}"] = nothing if mask is None else mask
        elif self.attention_mask is not None:
            tensors[_MASK] = self.attention_mask
        if self.position_ids is not None:
            tensors[_POSITIONS] = self.position_ids
        for kind, arguments in ((_LAYER, self.layer_arguments), (_HOST, self.host_arguments)):
            tensors.update({f"{kind}/{place}": tensor for place, tensor in arguments.items()})
        return tensors

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "TrunkInputs":
        """Return the arguments that :meth:`named` gave these tensors for, on ``device``."""
        masks: dict[str, Tensor | None] = {}
        arguments: dict[str, dict[str, Tensor]] = {_LAYER: {}, _HOST: {}}
        for name, tensor in tensors.items():
            head, _, rest = name.partition("/")
            if head == _MASK and rest:
                masks[rest] = tensor.to(device) if tensor.numel() else None
            elif head in arguments:
                arguments[head][rest] = tensor.to(device)
        mask, positions = tensors.get(_MASK), tensors.get(_POSITIONS)
        return cls(
            masks if masks else (None if mask is None else mask.to(device)),
            None if positions is None else positions.to(device),
            arguments[_LAYER],
            arguments[_HOST],
        )
