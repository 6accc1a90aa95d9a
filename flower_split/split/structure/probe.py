"""Running a tiny batch through a model and recording what each of its layers is given."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.structure.host_call import StandIn, argument_names, take_hidden_states
from flower_split.split.structure.layer_arguments import tensors_of
from flower_split.split.structure.stack import LayerStack

_SEQUENCE = 6
_CHARACTERS = 128  # of a model that reads text without a vocabulary


@dataclass(slots=True)
class LayerCall:
    """One call of one layer: what went in and what came out."""

    index: int
    hidden_states: Tensor
    others: dict[str, Tensor]  # the other tensors among the arguments, by place
    output: object


@dataclass(slots=True)
class Trace:
    """The calls of a stack's layers during one forward, and the model's first output."""

    calls: list[LayerCall] = field(default_factory=list)
    result: Tensor | None = None


def probe_batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Make two tiny batches: one without a mask, one with a left- and a right-padded row."""
    device = next(model.parameters()).device
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": _probe_images(model)}]
    vocab_size = getattr(model.config.get_text_config(decoder=True), "vocab_size", _CHARACTERS)
    ids = (torch.arange(3 * _SEQUENCE, device=device) * 7 + 3).remainder(vocab_size)
    ids = ids.view(3, _SEQUENCE)
    accepted = argument_names(type(model).forward)
    end = getattr(model.config, "eos_token_id", None)
    given = {}
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        given = {"decoder_input_ids": ids}  # it is the encoder that is cut
        if isinstance(end, int):  # whose last state stands for a whole text
            ids[:, _SEQUENCE - 3] = end
    batches = [{"input_ids": ids, **given}]
    if "attention_mask" in accepted:
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        mask[2, -2:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, **given})
    return batches


def with_other_content(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch with other tokens, or other images, and everything else as in ``batch``."""
    if "input_ids" in batch:
        return {**batch, "input_ids": batch["input_ids"].flip(0, 1)}
    return {**batch, "pixel_values": batch["pixel_values"].flip(0) * 0.5}


def _probe_images(model: PreTrainedModel) -> Tensor:
    """Make two images of the size that the model's configuration names."""
    weight = next(model.parameters())
    size = getattr(model.config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (2, getattr(model.config, "num_channels", 3), height, width)
    values = torch.arange(math.prod(shape), device=weight.device, dtype=torch.float32)
    return values.mul(0.37).sin().view(shape).to(weight.dtype)


@contextlib.contextmanager
def quiet(*modules: nn.Module) -> Iterator[None]:
    """Evaluate without gradient; modes, random state and what forwards note are put back."""
    states = [(part, _plain_state(part)) for module in modules for part in module.modules()]
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    try:
        with torch.no_grad(), torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
            for module in modules:
                module.eval()
            yield
    finally:
        for part, state in states:
            part.__dict__.update(state)


def _plain_state(module: nn.Module) -> dict[str, object]:
    """Return the values that a forward may change: a capacity for so many tokens, the last positions.

    Of stand-ins, whose own fields are no part of the model, the mode alone. What a forward with
    autograd noted is not kept: nothing that is part of a graph can be copied.
    """
    if isinstance(module, StandIn):
        return {"training": module.training}
    return {
        name: value
        for name, value in vars(module).items()
        if value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, Tensor) and value.grad_fn is None)
    }


def trace(
    model: PreTrainedModel,
    stack: LayerStack,
    batch: dict[str, Tensor],
    *,
    use_cache: bool | None = False,
) -> Trace:
    """Run ``model`` on ``batch`` and record every call of every layer of the stack.

    Args:
        model: Whole or split.
        stack: Where its layers are.
        batch: Its inputs.
        use_cache: As the model's argument, where it has one; None: its default.

    Raises:
        SplitError: The model does not run on the probe.
    """
    found = Trace()
    accepted = "use_cache" in argument_names(type(model).forward)
    options = {"use_cache": use_cache} if accepted else {}
    without = contextlib.nullcontext() if accepted or use_cache is None else _no_cache(model)
    with recording(stack.layers(model), found.calls), without:
        try:
            found.result = model(**batch, **options)[0]
        except SplitError:
            raise
        except Exception as error:
            raise SplitError(
                f"{type(model).__name__} does not run on the tiny batch that the self-check of a "
                f"split needs ({', '.join(batch)}): {type(error).__name__}: {error}"
            ) from error
    return found


@contextlib.contextmanager
def _no_cache(model: PreTrainedModel) -> Iterator[None]:
    """Switch off the key-value cache of a model that does not take this as an argument."""
    configs = [model.config, model.config.get_text_config(decoder=True)]
    before = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in reversed(before):
            config.use_cache = value


@contextlib.contextmanager
def recording(layers: nn.ModuleList, calls: list[LayerCall]) -> Iterator[None]:
    """Append every call of every layer to ``calls``, while open."""

    def recorder(index: int) -> Callable[..., None]:
        def record(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
        ) -> None:
            others = tensors_of(args, kwargs)
            calls.append(LayerCall(index, take_hidden_states(args, kwargs), others, output))

        return record

    handles = [
        layer.register_forward_hook(recorder(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit (NaN equals NaN)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(), other.nan_to_num()
    )
