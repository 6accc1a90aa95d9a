"""A self-check that needs no list of families: run a tiny batch whole and split, and compare.

A model fits when its forward runs the trunk's layers once each, in order, as a plain chain of
hidden states, and when the trunk alone, given the smashed data, the padding mask and the position
ids, computes the same bits.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.cuts import CutLayers
from flower_split.split.stack import LayerStack
from flower_split.split.stand_in import hidden_states_of, take_hidden_states

_SEQUENCE = 6


@dataclass(slots=True)
class LayerCall:
    """One call of one layer: what went in and what came out."""

    index: int
    hidden_states: Tensor
    output: object


@dataclass(slots=True)
class Trace:
    """The calls of a stack's layers during one forward, and the model's first output."""

    calls: list[LayerCall] = field(default_factory=list)
    result: Tensor | None = None


def probe_batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Two tiny batches: one without a mask, one with a left- and a right-padded row."""
    device = model.device
    vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = (torch.arange(3 * _SEQUENCE, device=device) * 7 + 3).remainder(vocab_size)
    ids = ids.view(3, _SEQUENCE)
    batches = [{"input_ids": ids}]
    if "attention_mask" in inspect.signature(model.forward).parameters:
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        mask[2, -2:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@contextlib.contextmanager
def quiet(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient, and the random state as before afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    try:
        with torch.no_grad(), torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
            for module in modules:
                module.eval()
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def trace(model: PreTrainedModel, stack: LayerStack, batch: dict[str, Tensor]) -> Trace:
    """Run ``model`` on ``batch`` and record every call of every layer of the stack.

    Raises:
        SplitError: The model does not run on the probe.
    """
    found = Trace()
    handles = []
    for index, layer in enumerate(stack.layers(model)):

        def record(
            module: nn.Module,
            args: tuple[object, ...],
            kwargs: dict[str, object],
            output: object,
            index: int = index,
        ) -> None:
            found.calls.append(LayerCall(index, take_hidden_states(args, kwargs), output))

        handles.append(layer.register_forward_hook(record, with_kwargs=True))
    try:
        output = model(**batch, use_cache=False) if _takes_use_cache(model) else model(**batch)
        found.result = output[0]
    except SplitError:
        raise
    except Exception as error:
        raise SplitError(
            f"{type(model).__name__} does not run on a batch of 3 x {_SEQUENCE} token ids, which "
            f"the self-check of a split needs: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return found


def _takes_use_cache(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "use_cache" in parameters


def check_chain(found: Trace, cuts: CutLayers, name: str) -> None:
    """Check that the trunk's layers ran once each, in order, each on the one before's output.

    Raises:
        SplitError: They did not.
    """
    span = [call for call in found.calls if cuts.part_of(call.index) == "trunk"]
    order = [call.index for call in span]
    if order != list(range(cuts.first, cuts.second)):
        raise SplitError(
            f"{name} does not run layers {cuts.first} to {cuts.second - 1} once each and in order, "
            f"but {order}, so a trunk cannot stand in their place. This family cannot be split."
        )
    for before, after in zip(span, span[1:], strict=False):
        if not same_bits(hidden_states_of(before.output), after.hidden_states):
            raise SplitError(
                f"{name} changes the hidden states between layers {before.index} and "
                f"{after.index}, outside of both, so a trunk cannot stand in their place. Choose "
                "cut layers on one side of that, or another model."
            )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit (NaN equals NaN)."""
    return one.shape == other.shape and bool(
        torch.equal(one.isnan(), other.isnan())
        and torch.equal(one.nan_to_num(), other.nan_to_num())
    )
