"""Compilation of a trunk in mode ``fast`` before its first round opens, so that no client waits for it.

Shapes: hidden states ``[batch, seq, hidden]``.
"""

import logging
import time

import torch

from flower_split.trunk.compute.compute import TrunkCompute

logger = logging.getLogger(__name__)


def warm_up(compute: TrunkCompute, hidden_size: int, rows: int, length: int) -> float:
    """Run a forward and a backward of zeros, so that the layers are compiled; return the seconds.

    Two lengths are run: the first compiles for it alone, the second for any.

    Args:
        compute: Nothing of it changes: there is no optimizer step.
        hidden_size: Width of the hidden states.
        rows: Rows of a micro-batch.
        length: Length of its sequences, in positions.
    """
    started = time.monotonic()
    for seq in sorted({length, max(1, length // 2)}, reverse=True):
        hidden = torch.zeros(rows, seq, hidden_size, dtype=compute.dtype, device=compute.device)
        mask = torch.ones(rows, seq, dtype=torch.int64)
        tensors = {"hidden_states": hidden, "attention_mask": mask}
        _, activation = compute.forward_train(tensors, seed_of="warm-up")
        compute.backward(activation, torch.zeros_like(hidden))
    seconds = time.monotonic() - started
    logger.info(
        "trunk.compute = fast: compiled for %d x %d positions and shorter in %.1f s; results have "
        "other last bits than those of exact, and may have others again after a restart",
        rows,
        length,
        seconds,
    )
    return seconds
