"""Clients' updates: ``returned − sent`` of full adapters, over all weights."""

import math

import numpy as np
from flwr.app import Array, ArrayRecord, Message


def update_norm(sent: ArrayRecord, returned: ArrayRecord) -> float:
    """Return the L2 norm of ``returned − sent`` over all weights, in fp64."""
    squares = (
        float(np.square(returned[n].numpy().astype(np.float64) - sent[n].numpy()).sum())
        for n in sent
    )
    return math.sqrt(math.fsum(squares))


def move_zero_update(reply: Message, sent: ArrayRecord) -> None:
    """Move an update of exactly zero by the smallest step of its largest weight, in place.

    Flower's clipping divides by the update's norm; one is zero where a warm-up begins at learning
    rate 0.
    """
    for record in reply.content.array_records.values():
        if list(record) != list(sent) or update_norm(sent, record) > 0:
            continue
        name = max(record, key=lambda n: float(np.abs(record[n].numpy()).max(initial=0.0)))
        values = record[name].numpy().copy()
        index = np.unravel_index(np.abs(values).argmax(), values.shape)
        step = np.spacing(np.abs(values[index]), dtype=values.dtype)
        values[index] += max(step, values.dtype.type(1e-12))
        record[name] = Array(values)
