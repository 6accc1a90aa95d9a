"""Two processes that divide a trunk's layers, and compare it with the whole trunk in each of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn  # type: ignore[attr-defined]

from flower_split.config import LoraPartConfig
from flower_split.lora import attach_lora
from flower_split.split import CutLayers, TrunkModel, load_trunk_model
from flower_split.trunk.tensor_parallel.ranks import meet_all
from flower_split.trunk.tensor_parallel.shards import HIDDEN, Shards

CUTS = CutLayers(1, 3)
HIDDEN_SIZE = 32
_LORA = LoraPartConfig(r=4, alpha=8.0)


def compare_divided(checkpoints: Sequence[Path], folder: Path, dtype: str) -> None:
    """Compare forward, backward and weights of every checkpoint; an assertion fails where they differ."""
    spawn(_compare, (list(checkpoints), folder, dtype), nprocs=2)


def _compare(rank: int, checkpoints: list[Path], folder: Path, dtype: str) -> None:
    torch.set_num_threads(1)
    meet_all(folder, rank, 2, torch.device("cpu"))
    for checkpoint in checkpoints:
        whole = _trunk(checkpoint, dtype, 1)
        shards = Shards(_trunk(checkpoint, dtype, 2))
        assert any(one is not None for one in shards.divided), "nothing is divided"
        begun = [p for _, p in sorted(whole.named_parameters()) if p.requires_grad]
        for mine, theirs in zip(begun, shards.whole(), strict=True):
            assert torch.equal(mine, theirs), "LoRA begins with other values"
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in begun:  # B is zero at first
                parameter.copy_(0.1 * torch.randn_like(parameter))
        shards.take(begun)
        _same(whole, shards, begun, rank, 1e-4 if dtype == "float32" else 0.1)


def _same(
    whole: TrunkModel, shards: Shards, parameters: list[Tensor], rank: int, tolerance: float
) -> None:
    like = next(whole.parameters()).dtype
    hidden, grad = (torch.randn(2, 5, HIDDEN_SIZE).to(like) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    leaf = hidden.clone().requires_grad_()
    wanted = whole(leaf, attention_mask=mask, position_ids=positions)
    inputs = {HIDDEN: hidden, "attention_mask": mask, "position_ids": positions}
    evaluated = shards.call(inputs, None, training=False, graph=False)
    call = shards.call(inputs, None, training=False, graph=True)
    seen = mask.bool()  # what stands at padded positions is anybody's
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(call.output[seen], wanted[seen], **near)
    torch.testing.assert_close(evaluated.output[seen], wanted[seen], **near)
    grad = grad * seen[..., None]
    smashed_grad, *gradients = torch.autograd.grad(wanted, [leaf, *parameters], grad)
    own_smashed, own = call.backward(grad)
    torch.testing.assert_close(own_smashed, smashed_grad, **near)
    for gradient, local, dimension in zip(gradients, own, shards.divided, strict=True):
        assert local is not None
        share = gradient if dimension is None else gradient.chunk(2, dimension)[rank]
        torch.testing.assert_close(local, share, **near)


def _trunk(checkpoint: Path, dtype: str, processes: int) -> TrunkModel:
    trunk = load_trunk_model(checkpoint.as_posix(), CUTS, dtype=dtype, tensor_parallel=processes)
    trunk.requires_grad_(False)
    attach_lora(trunk, CUTS, {"trunk": _LORA}, seed=3)
    return trunk
