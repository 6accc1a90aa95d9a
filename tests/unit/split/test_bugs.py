"""Two published bugs of split learning, in miniature, and that ours is free of them."""

import torch
from torch import Tensor, nn

from flower_split.split import CutLayers, set_trunk, split_model
from tests.support.tiny_models import padded_batch, tiny_model

CUTS = CutLayers(1, 3)


class _RemoteCall(torch.autograd.Function):
    """Autograd across a pretended network: the trunk's graph lives on the other side."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, trunk: nn.Module, mask: Tensor | None) -> Tensor:
        with torch.enable_grad():
            ctx.arrived = hidden_states.detach().requires_grad_()
            ctx.left = trunk(ctx.arrived, mask)
        return ctx.left.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.left.backward(grad)
        return ctx.arrived.grad, None, None


class _Remote(nn.Module):
    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self._trunk = (trunk,)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        return _RemoteCall.apply(hidden_states, self._trunk[0], attention_mask)


class _DetachedSend(_Remote):
    """The bug: what is sent is detached, and made a new leaf when it comes back."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        returned = self._trunk[0](hidden_states.detach(), attention_mask).detach()
        return returned.requires_grad_()


class _InputCached(_Remote):
    """The bug: the server keeps the detached input and calls backward on that."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        class Call(torch.autograd.Function):
            @staticmethod
            def forward(ctx, smashed: Tensor, trunk: nn.Module) -> Tensor:
                ctx.cached = smashed.detach().requires_grad_()
                with torch.enable_grad():
                    return trunk(ctx.cached, attention_mask).detach()

            @staticmethod
            def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
                ctx.cached.backward(grad)
                return ctx.cached.grad, None

        return Call.apply(hidden_states, self._trunk[0])


def _gradients(module: nn.Module, layer: int) -> list[Tensor | None]:
    return [p.grad for name, p in module.named_parameters() if f"layers.{layer}." in name]


def _step(trunk_class: type[_Remote], *, frozen_bottom: bool = False) -> tuple[nn.Module, ...]:
    client, trunk = split_model(tiny_model("llama"), CUTS)
    if frozen_bottom:
        for name, parameter in client.named_parameters():
            if "layers.3." not in name:
                parameter.requires_grad_(False)
    set_trunk(client, trunk_class(trunk))
    client(**padded_batch()).loss.backward()
    return client, trunk


def test_remote_call_joint_step_gives_every_part_gradients() -> None:
    client, trunk = _step(_Remote)
    for gradients in (_gradients(client, 0), _gradients(trunk, 1), _gradients(client, 3)):
        assert gradients and all(g is not None and g.count_nonzero() > 0 for g in gradients)


def test_detached_send_bug_leaves_bottom_without_gradients() -> None:
    client, _ = _step(_DetachedSend)
    assert all(gradient is None for gradient in _gradients(client, 0))
    assert all(gradient is not None for gradient in _gradients(client, 3))


def test_cached_input_bug_trains_no_trunk_parameter() -> None:
    client, trunk = _step(_InputCached)
    assert all(gradient is None for gradient in _gradients(trunk, 1))
    assert all(gradient is not None for gradient in _gradients(client, 0))


def test_remote_call_with_frozen_bottom_still_trains_the_trunk() -> None:
    _, trunk = _step(_Remote, frozen_bottom=True)
    assert all(g is not None and g.count_nonzero() > 0 for g in _gradients(trunk, 1))


def test_remote_call_without_gradient_input_is_skipped_by_autograd() -> None:
    # The trap itself, without the client model's remedy.
    _, trunk = split_model(tiny_model("llama"), CUTS)
    smashed = torch.randn(2, 5, 32)
    assert not _Remote(trunk)(smashed).requires_grad
    assert _Remote(trunk)(smashed.requires_grad_()).requires_grad
