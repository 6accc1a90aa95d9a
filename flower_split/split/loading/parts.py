"""Loading one party's part of a checkpoint, and nothing else of it.

``from_pretrained`` of a subclass made on the spot, whose constructor puts stand-ins where another
party's layers are, reads only the tensors that are left; transformers does the rest (sharding,
dtype, quantisation, devices). Of a sharded checkpoint only the shards that hold owned tensors are
fetched.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from flower_split.errors import SplitError
from flower_split.split.checking.self_check import check_client, settle_cache
from flower_split.split.client_side.model import carve_client, trunk_slot, wire_client
from flower_split.split.loading.checkpoint import Checkpoint
from flower_split.split.loading.device_map import DeviceMap
from flower_split.split.loading.model_source import ModelSource, as_source
from flower_split.split.loading.tensor_parallel import check_parallel
from flower_split.split.structure.cuts import CutLayers
from flower_split.split.structure.host_call import LayerOutput
from flower_split.split.structure.probe import probe_batches, quiet
from flower_split.split.structure.quantization import (
    Quantization,
    float_dtype,
)
from flower_split.split.trunk_side.carve import carve_trunk, constant_embeddings
from flower_split.split.trunk_side.model import TrunkModel


def load_client_model(
    name_or_path: str | ModelSource,
    cuts: CutLayers,
    trunk: nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    auto_class: type[_BaseAutoModelClass] = AutoModelForCausalLM,
    quantization: Quantization | None = None,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """Load a client's model: bottom and top of a checkpoint, with ``trunk`` called in between.

    Only their tensors are read. A tiny batch is then run to check that the family's layers can be
    stood in for (the trunk itself is not called).

    Args:
        name_or_path: Local directory or hub id of a model in safetensors; or a source, which says
            ``dtype``, ``attn_implementation``, ``revision`` and ``quantization`` itself.
        cuts: The cut layers.
        trunk: Called as ``trunk(hidden_states, attention_mask=None, position_ids=None)``, and
            returns hidden states; ``set_trunk`` replaces it later.
        dtype: Dtype of the weights, such as ``"bfloat16"``; None: the checkpoint's.
        attn_implementation: transformers' name; None: the model's default.
        revision: Hub revision; None: the default branch.
        device: Where the weights go; None: the CPU.
        auto_class: Which kind of model; a head that the checkpoint lacks is initialised anew.
        quantization: That of the base weights: a name, a JSON object, or transformers' object.
        device_map: Instead of ``device``, as :func:`load_trunk_model` takes it; a module beside
            the layers that is not named goes with the first of them.

    Returns:
        A model of the class that ``auto_class`` would load, in evaluation mode.

    Raises:
        SplitError: Not a causal language model, no safetensors, cuts that do not fit, tensors
            missing, a family that cannot be split, a quantisation that cannot be had or trained,
            a setting beside a source, or modules that cannot be placed as asked.
    """
    _check_one_place(device, device_map)
    output = LayerOutput()
    source = as_source(name_or_path, revision, attn_implementation, dtype, quantization)
    checkpoint = Checkpoint.open(source, cuts, auto_class)
    constants = constant_embeddings(checkpoint.skeleton)

    def carve(root: PreTrainedModel) -> None:
        carve_client(root, checkpoint.stack, cuts, output)

    count = len(checkpoint.stack.layers(checkpoint.skeleton))
    outside = [index for index in range(count) if cuts.part_of(index) != "trunk"]
    client = checkpoint.load(carve, device, device_map, outside, beside=True)
    wire_client(client, checkpoint.stack)
    check_client(client, checkpoint.stack, cuts, output, constants)
    settle_cache(client, checkpoint.stack)
    _check_client_trains(client, checkpoint)
    trunk_slot(client).replace(trunk)
    return client


def load_trunk_model(
    name_or_path: str | ModelSource,
    cuts: CutLayers,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    auto_class: type[_BaseAutoModelClass] = AutoModelForCausalLM,
    quantization: Quantization | None = None,
    device_map: DeviceMap | None = None,
    tensor_parallel: int = 1,
) -> TrunkModel:
    """Load the trunk of a checkpoint; only the trunk layers' tensors are read.

    Args:
        name_or_path: Local directory or hub id of a model in safetensors; or a source, which says
            ``dtype``, ``attn_implementation``, ``revision`` and ``quantization`` itself.
        cuts: The cut layers.
        dtype: Dtype of the weights; None: the checkpoint's.
        attn_implementation: transformers' name; None: the model's default.
        revision: Hub revision; None: the default branch.
        device: Where the weights go; None: the CPU.
        auto_class: Which kind of model; the clients' one.
        quantization: How the base weights are quantised; the clients' one.
        device_map: Which layer goes to which of this host's devices, instead of ``device``:
            ``"auto"``, ``"balanced"``, ``"balanced_low_0"`` or ``"sequential"``, or module name ->
            device. A trunk whose layers lie on several takes hidden states from any device, and
            its output comes back to it.
        tensor_parallel: Processes of torch's default process group that divide every layer, and call
            the trunk at once with the same inputs; 1: this one has the whole layers.

    Returns:
        The trunk, in evaluation mode.

    Raises:
        SplitError: As for :func:`load_client_model`; or the layers cannot be placed as asked.
    """
    _check_one_place(device, device_map)
    output = LayerOutput()
    source = as_source(name_or_path, revision, attn_implementation, dtype, quantization)
    checkpoint = Checkpoint.open(source, cuts, auto_class)
    constants = constant_embeddings(checkpoint.skeleton)

    def carve(root: PreTrainedModel) -> None:
        carve_trunk(root, checkpoint.stack, cuts, output, constants)

    if tensor_parallel > 1:
        _check_parallel(checkpoint, tensor_parallel, device_map)
    layers = range(cuts.first, cuts.second)
    root = checkpoint.load(carve, device, device_map, layers, tensor_parallel=tensor_parallel)
    trunk = TrunkModel(root, checkpoint.stack, cuts, output).eval()
    if checkpoint.quantization is not None:
        weight = next(trunk.parameters())
        shape = (1, 3, trunk.hidden_size)
        leaf = torch.linspace(-1, 1, 3 * trunk.hidden_size, dtype=float_dtype(trunk)).view(shape)
        leaf = leaf.to(weight.device).requires_grad_()
        checkpoint.check_trains(trunk, leaf, trunk)
    return trunk


def _check_one_place(device: torch.device | str | None, device_map: DeviceMap | None) -> None:
    """Check that a device and a device map are not asked for at once.

    Raises:
        SplitError: Both are.
    """
    if device is not None and device_map is not None:
        raise SplitError(
            f"device_map places the part's layers, so device must be left out; it is {device!r}."
        )


def _check_parallel(checkpoint: Checkpoint, size: int, device_map: DeviceMap | None) -> None:
    """Check that the layers of a checkpoint can be divided over ``size`` processes.

    Raises:
        SplitError: They cannot (:func:`check_parallel`), or a device map is asked for as well.
    """
    if device_map is not None:
        raise SplitError(
            f"tensor_parallel = {size} divides every layer, and device_map places whole ones. Leave one "
            "of them out."
        )
    quantised = checkpoint.asked_quantization is not None
    check_parallel(
        checkpoint.name_or_path, checkpoint.skeleton, checkpoint.stack, size, quantised=quantised
    )


def load_whole_model(
    name_or_path: str | ModelSource,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    auto_class: type[_BaseAutoModelClass] = AutoModelForCausalLM,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """Load the unsplit model, as the parts are loaded: for a comparison with them.

    Args:
        name_or_path: Local directory or hub id of a checkpoint in safetensors, or a source.
        dtype: Dtype of the weights; None: the checkpoint's.
        attn_implementation: transformers' name; None: the model's default.
        revision: Hub revision; None: the default branch.
        device: Where the weights go; None: the CPU.
        auto_class: Which kind of model.
        quantization: How the base weights are quantised; the parts' one.

    Returns:
        The model, in evaluation mode.

    Raises:
        SplitError: As for :func:`load_client_model`.
    """
    source = as_source(name_or_path, revision, attn_implementation, dtype, quantization)
    return Checkpoint.open(source, None, auto_class).load(lambda root: None, device)


def empty_model(name_or_path: str | ModelSource, cuts: CutLayers | None = None) -> PreTrainedModel:
    """Return a model on the meta device: names and shapes, no weights; it cannot be called.

    Args:
        name_or_path: Local directory or hub id, or a source; only its configuration is read.
        cuts: The cut layers, for a client's model; None: the whole model.

    Raises:
        SplitError: Not a causal language model, or cuts that do not fit.
    """
    checkpoint = Checkpoint.open(as_source(name_or_path), cuts)
    model = checkpoint.skeleton
    if cuts is not None:
        carve_client(model, checkpoint.stack, cuts, LayerOutput())
    return model


def _check_client_trains(client: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Check that gradients flow from a quantised client's output to its embeddings."""
    if checkpoint.quantization is None:
        return
    embeddings = client.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    with quiet(client):
        batch = probe_batches(client)[0]
        found: list[Tensor] = []
        handle = embeddings.register_forward_hook(lambda module, args, made: found.append(made))
        client(**batch)
        handle.remove()

    def run(leaf: Tensor) -> Tensor:
        put = embeddings.register_forward_hook(lambda module, args, made: leaf)
        try:
            output: Tensor = client(**batch)[0]
        finally:
            put.remove()
        return output

    checkpoint.check_trains(client, found[0].detach().requires_grad_(), run)
