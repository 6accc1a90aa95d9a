"""LoRA of linear layers that several processes divide: PEFT divides one factor as the layer's weight is.

A weight that is divided is a ``DTensor``: of the whole shape, with this process's share as its local
tensor.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def settle_shards(model: nn.Module) -> None:
    """Let divided factors be fp32 and know their whole widths, which transformers asks them for.

    Args:
        model: With LoRA just attached; without divided factors nothing changes.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                weight = factor.weight
                if isinstance(weight, DTensor):
                    vars(factor).update(out_features=weight.shape[0], in_features=weight.shape[1])
                    if weight.dtype != torch.float64:  # ``.data`` of a DTensor cannot change dtype
                        factor.weight = nn.Parameter(weight.detach().to(torch.float32))


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter; into this process's share of it, if it is divided."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            share = distribute_tensor(
                value.to(parameter.device, parameter.dtype),
                parameter.device_mesh,
                parameter.placements,
                src_data_rank=None,  # every process has the whole value
            )
            parameter.to_local().copy_(share.to_local())
        else:
            parameter.copy_(value)
