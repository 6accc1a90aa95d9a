"""A split model whose trunk is behind real gRPC, against the unsplit model, bit for bit."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from flower_split.config import OptimizerConfig
from flower_split.split import CutLayers, set_trunk, split_model
from flower_split.trunk.compute.activations import Activation
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.loopback import FINGERPRINT, coordinator, plan, remote, served
from tests.support.tiny_models import (
    FAMILIES,
    assert_same_bits,
    loss_and_gradients,
    padded_batch,
    tiny_model,
)

CUTS = CutLayers(1, 3)


class RecordingCompute(TrunkCompute):
    """Keeps the gradients of the last backward by name."""

    gradients: dict[str, Tensor | None]

    def backward(
        self, activation: Activation, trunk_output_grad: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        smashed_grad, gradients = super().backward(activation, trunk_output_grad)
        names = [name for name, _ in self.named]
        self.gradients = dict(zip(names, gradients, strict=True))
        return smashed_grad, gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_split_model_over_grpc_matches_unsplit_bitwise(family: str) -> None:
    model = tiny_model(family)
    client, trunk = split_model(model, CUTS)
    loss, expected = loss_and_gradients(model, padded_batch())
    compute = RecordingCompute(
        trunk, OptimizerConfig(name="sgd", learning_rate=0.1, max_grad_norm=0.0), seed=0
    )
    engine = TrunkEngine(
        compute,
        mode="joint",
        hidden_size=model.config.hidden_size,
        fingerprint=FINGERPRINT,
        activation_bytes=1 << 26,
    )
    with served(engine) as port, coordinator(port) as control:
        control.begin_round(plan())
        with remote(port) as wire:
            wire.open(1)
            set_trunk(client, wire)
            with wire.micro_batch(0, 0, num_tokens=20, loss_denominator=20.0, last=True):
                split_loss = client(**padded_batch()).loss
            split_loss.backward()
    gradients = {name: p.grad for name, p in client.named_parameters()} | compute.gradients
    assert torch.equal(loss, split_loss)
    assert_same_bits(expected, gradients)
    assert any(torch.count_nonzero(g) for g in compute.gradients.values() if g is not None)
