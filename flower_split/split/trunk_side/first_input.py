"""What a model's own forward brings to the trunk's first layer, found out when a trunk is made."""

import itertools

import torch
from torch import Tensor, nn

from flower_split.errors import SplitError
from flower_split.split.structure.host_call import LayerOutput, TrunkInput, host_inputs, probing
from flower_split.split.structure.kv_cache import forbid_cache

_PROBE_SHAPE = (5, 3)  # batch, sequence; no layer returns five things, which a batch could pass for


def first_input(
    host: nn.Module, like: Tensor, width: int, first: int, output: LayerOutput
) -> Tensor:
    """Return what reaches the first trunk layer; find the form of the stand-ins' outputs.

    Args:
        host: The module whose forward runs the layers. Where its stand-ins cannot fill the family's
            key-value cache, it runs without one from now on.
        like: Of the dtype and on the device of the input embeddings.
        width: Their width.
        first: The index of that layer.
        output: The form of the family's layer outputs, set here.

    Raises:
        SplitError: The model's forward cannot be run from hidden states up to the trunk.
    """
    smashed = like.new_zeros(*_PROBE_SHAPE, width)
    problems: dict[str, Exception] = {}
    token = probing.set(True)
    try:
        for use_cache, length in itertools.product((None, False), (None, 1, 2, 3, 4)):
            output.length = length
            try:
                with torch.no_grad():
                    host(**host_inputs(host, smashed, width, None, None, use_cache))
            except TrunkInput as reached:
                found = reached.hidden_states
                if found.dim() >= 3 and found.shape[:2] == _PROBE_SHAPE:
                    if use_cache is False:  # its stand-ins cannot fill the family's cache
                        forbid_cache(host)
                    return found
            except Exception as error:
                problems.setdefault(f"{type(error).__name__}: {error}", error)
    finally:
        probing.reset(token)
    raise SplitError(
        f"{type(host).__name__}'s forward does not bring hidden states of shape [batch, seq, "
        f"...] from its input embeddings to layer {first}"
        + (f" ({'; or '.join(problems)})" if problems else "")
        + ". This family cannot be split."
    ) from next(iter(problems.values()), None)
