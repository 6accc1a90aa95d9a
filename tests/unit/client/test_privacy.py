"""Labels and token ids stay with the client: nothing of them is in any request's bytes."""

import struct

import torch
from torch import nn

from tests.support.loopback import (
    HIDDEN,
    Recorder,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)


def test_requests_hold_neither_token_ids_nor_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    # Large ids, so that their bytes cannot stand in a request by chance.
    ids = torch.randint(1 << 20, 1 << 21, (2, 16), generator=generator)
    labels = torch.randint(1 << 20, 1 << 21, (2, 16), generator=generator)
    embedding = torch.randn(64, HIDDEN, generator=generator)
    top = nn.Linear(HIDDEN, 8)
    recorder = Recorder()
    engine = make_engine(TinyTrunk())
    with served(engine, interceptors=[recorder]) as port, coordinator(port) as control:
        control.begin_round(plan())
        with remote(port) as trunk:
            trunk.open(1)
            mask = torch.ones(2, 16, dtype=torch.int64)
            with trunk.micro_batch(0, 0, num_tokens=32, loss_denominator=32.0, last=True):
                output = trunk(embedding[ids % 64], mask, torch.arange(16).unsqueeze(0))
            nn.functional.cross_entropy(top(output).flatten(0, 1), labels.flatten() % 8).backward()
    methods = {method for method, _ in recorder.requests}
    assert methods == {"BeginRound", "OpenSession", "Forward", "Backward", "CloseSession"}
    forward = b"".join(data for method, data in recorder.requests if method == "Forward")
    assert embedding[ids % 64].numpy().tobytes() in forward  # the recorder sees what is sent
    everything = b"".join(data for _, data in recorder.requests)
    for row in torch.cat([ids, labels]).tolist():
        for pair in zip(row, row[1:], strict=False):
            for code in ("<qq", "<ii"):
                assert struct.pack(code, *pair) not in everything
