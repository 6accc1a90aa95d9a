"""Gradients without their rows of zeros: a mask says where the rows that travel belong.

The gradient of a padded position is zero, whatever the model, unless something reads the position; so
is that of a sequence's last one in causal language modelling, and of every one without a label where
the top is a head alone. What travels is found in the bits: a row is left out where each is 0, and comes
back as it was. No mask of the model is asked, and no family needs to be known.

Hidden states at padded positions do travel: whether their values matter is the model's to say (routers
of experts, convolutions, pooling, quantised layers that look at a whole column), and the wire cannot
see it.

Shapes: gradients ``[batch, seq, hidden]``; the mask ``[batch, seq, 1]``; what travels
``[1, rows, hidden]``.
"""

import math

import torch
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.wire.codecs.codec import TensorForm
from flower_split.wire.staging import pooled

SUFFIX = ".rows"
"""Ends the name under which a tensor's mask travels."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def rows_to_send(tensor: Tensor) -> Tensor | None:
    """Return the mask of the rows of ``tensor`` that are not all +0; None: every row must travel.

    A dense tensor costs one look at the first number of every row.
    """
    if tensor.device.type != "cpu" or tensor.ndim != 3 or not tensor.numel():
        return None
    bits = tensor.contiguous().view(_BITS[tensor.element_size()])
    mask = bits[..., 0] != 0
    if bool(mask.all()):
        return None
    unsure = ~mask
    mask[unsure] = (bits[unsure] != 0).any(-1)
    if not bool(mask.any()):
        mask[0, 0] = True  # codecs need not know tensors without a number
    return None if bool(mask.all()) else mask.unsqueeze(-1)


def gathered(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the rows of ``tensor`` that ``mask`` names."""
    return tensor[mask.squeeze(-1)].unsqueeze(0)


def whole_form(rows: TensorForm, mask: TensorForm) -> TensorForm:
    """Return the form of the tensor that rows and their mask make.

    Raises:
        CodecError: They cannot belong together.
    """
    if (
        mask.dtype != torch.bool
        or len(mask.shape) != 3
        or mask.shape[2] != 1
        or len(rows.shape) != 3
        or rows.shape[0] != 1
        or rows.shape[1] > math.prod(mask.shape)
    ):
        raise CodecError(
            f"rows [1, rows, hidden] come with a mask of booleans, [batch, seq, 1], of at least so many; "
            f"they are {rows} with {mask}."
        )
    return TensorForm((*mask.shape[:2], rows.shape[2]), rows.dtype)


def scattered(rows: Tensor, mask: Tensor) -> Tensor:
    """Return the tensor that ``rows`` were gathered from, with zeros where none was.

    Raises:
        CodecError: The mask names another number of rows.
    """
    named = int(mask.sum())
    if named != rows.shape[1]:
        raise CodecError(f"the mask names {named} rows, and {rows.shape[1]} came.")
    shape = (*mask.shape[:2], rows.shape[2])
    whole = pooled(math.prod(shape) * rows.element_size()).view(rows.dtype).view(shape)
    whole.zero_()
    whole[mask.squeeze(-1)] = rows[0]
    return whole
