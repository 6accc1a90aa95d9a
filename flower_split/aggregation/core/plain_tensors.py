"""The weighted mean of the tensors of an adapter that are no LoRA factor."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flower_split.aggregation.core.checks import shares_of
from flower_split.aggregation.core.client_updates import ClientUpdate


def mean_plain_tensors(
    current: Mapping[str, Tensor], clients: Sequence[ClientUpdate]
) -> dict[str, Tensor]:
    """Return the weighted mean of every plain tensor over the clients that hold it, summed in fp64.

    Args:
        current: The server's values by name; one that nobody of weight above 0 holds stays.
        clients: The round's checked updates, in the order of summation.
    """
    means: dict[str, Tensor] = {}
    for name, value in current.items():
        holders = [client for client in clients if name in client.others]
        if not any(client.weight > 0 for client in holders):
            means[name] = value
            continue
        shares = shares_of([(client.client_id, client.weight) for client in holders])
        total = torch.zeros(value.shape, dtype=torch.float64)
        for client, share in zip(holders, shares, strict=True):
            total += share * client.others[name][1]
        means[name] = total.to(value.dtype)
    return means
