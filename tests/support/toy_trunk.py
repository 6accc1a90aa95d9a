"""A trunk small enough to work out by hand, and an engine around it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from flower_split.config import OptimizerConfig
from flower_split.protocol.values import (
    BackwardCall,
    ContributionKey,
    FinishCall,
    ForwardCall,
    ForwardMode,
    RoundPlan,
)
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.compute.joint import Divider
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.shares import Shares
from flower_split.trunk.engine.window_rules import WindowRule

HIDDEN = 3
SGD = OptimizerConfig(name="sgd", learning_rate=0.5, max_grad_norm=0.0)


class ToyTrunk(nn.Module):
    """``h ↦ h · W`` with dropout, masked positions passing as zeros."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator))
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        out = self.drop(hidden_states) @ self.weight
        return out if attention_mask is None else out * attention_mask[..., None]


def make_engine(
    *,
    optimizer: OptimizerConfig = SGD,
    mode: str = "joint",
    dropout: float = 0.0,
    activation_bytes: int = 2**20,
    activation_bytes_per_client: int = 0,
    reduction: Reduction | None = None,
    weight_bytes: int = 2**20,
    checkpoints: CheckpointStore | None = None,
    window_rule: WindowRule | None = None,
    shares: Shares | None = None,
    batch_positions: int = 0,
    divide: Callable[[TrunkCompute], Divider] | None = None,
    clock=time.monotonic,
) -> TrunkEngine:
    """An engine around a fresh :class:`ToyTrunk`."""
    trunk = ToyTrunk(dropout).requires_grad_(mode == "joint")
    compute = TrunkCompute(trunk, optimizer, seed=0)
    return TrunkEngine(
        compute,
        mode=mode,
        hidden_size=HIDDEN,
        fingerprint={"model": "toy"},
        activation_bytes=activation_bytes,
        activation_bytes_per_client=activation_bytes_per_client,
        reduction=reduction,
        weight_bytes=weight_bytes,
        checkpoints=checkpoints,
        window_rule=window_rule,
        shares=shares,
        batch_positions=batch_positions,
        divider=None if divide is None else divide(compute),
        clock=clock,
    )


def make_plan(slots=(0, 1), **changes) -> RoundPlan:
    """A plan for ``slots``, with token ``token-<slot>`` each."""
    plan = RoundPlan(
        experiment="test",
        server_round=1,
        attempt=0,
        participants={slot: f"token-{slot}" for slot in slots},
        join_seconds=30.0,
        window_seconds=30.0,
        steps_per_round=2,
    )
    return replace(plan, **changes)


class ToyClient:
    """One client of an engine, without a network."""

    def __init__(self, engine: TrunkEngine, slot: int, steps: int = 1, *, evaluate: bool = False):
        self.engine = engine
        self.grant = engine.open_session(f"token-{slot}", {"model": "toy"}, steps, evaluate)

    def key(self, window: int, micro_batch: int = 0) -> ContributionKey:
        return ContributionKey(
            self.grant.experiment,
            self.grant.server_round,
            self.grant.attempt,
            window,
            micro_batch,
        )

    def forward(
        self,
        hidden: Tensor,
        window: int = 0,
        micro_batch: int = 0,
        *,
        mode: ForwardMode = ForwardMode.TRAIN,
        version: int | None = None,
        digest: bytes = b"f",
        timeout: float = 20.0,
        acknowledged: int = 0,
        last: bool = True,
        **tensors: Tensor,
    ):
        return self.engine.forward(
            ForwardCall(
                session=self.grant.session,
                epoch=self.grant.epoch,
                key=None if mode is ForwardMode.EVALUATE else self.key(window, micro_batch),
                version=self.grant.version + window if version is None else version,
                mode=mode,
                tensors={"hidden_states": hidden, **tensors},
                digest=digest,
                deadline=time.monotonic() + timeout,
                acknowledged=acknowledged,
                last=last,
            )
        )

    def backward(
        self,
        grad: Tensor,
        window: int = 0,
        micro_batch: int = 0,
        *,
        num_tokens: float = 1.0,
        denominator: float | None = None,
        last: bool = True,
        version: int | None = None,
        digest: bytes = b"b",
        timeout: float = 20.0,
    ):
        return self.engine.backward(
            BackwardCall(
                session=self.grant.session,
                epoch=self.grant.epoch,
                key=self.key(window, micro_batch),
                version=self.grant.version + window if version is None else version,
                grad=grad,
                num_tokens=num_tokens,
                loss_denominator=num_tokens if denominator is None else denominator,
                last=last,
                digest=digest,
                deadline=time.monotonic() + timeout,
            )
        )

    def finish_step(
        self,
        window: int = 0,
        *,
        norm_squared: float = 0.0,
        num_micro_batches: int = 1,
        gradients: Mapping[str, Tensor] = MappingProxyType({}),
        digest: bytes = b"e",
        timeout: float = 20.0,
    ):
        return self.engine.finish_step(
            FinishCall(
                session=self.grant.session,
                epoch=self.grant.epoch,
                key=self.key(window, num_micro_batches),
                grad_norm_squared=norm_squared,
                gradients=gradients,
                digest=digest,
                deadline=time.monotonic() + timeout,
            )
        )

    def shorten_plan(self, steps: int) -> None:
        self.engine.shorten_plan(self.grant.session, self.grant.epoch, steps)

    def close(self) -> None:
        self.engine.close_session(self.grant.session, self.grant.epoch)
