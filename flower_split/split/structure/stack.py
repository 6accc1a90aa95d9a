"""Finding a model's stack of layers from its structure, whatever the family calls it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.structure.host_call import StandIn


@dataclass(frozen=True, slots=True)
class LayerStack:
    """The list of layers that is cut, and the module whose forward builds the layers' inputs."""

    path: str  # of the list of layers, such as "model.layers"
    host_path: str  # of the nearest PreTrainedModel around it, such as "model"; "" is the root
    num_layers: int

    def layers(self, root: nn.Module) -> nn.ModuleList:
        """Return the list of layers inside ``root``."""
        layers = root.get_submodule(self.path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def layer_path(self, index: int) -> str:
        """Return the dotted name of layer ``index``."""
        return f"{self.path}.{index}"

    def index_of(self, name: str) -> int | None:
        """Return the layer that the module or parameter ``name`` lies in; None outside the stack."""
        if not name.startswith(self.path + "."):
            return None
        return int(name[len(self.path) + 1 :].split(".", 1)[0])


def find_stack(root: nn.Module) -> LayerStack:
    """Find the stack of layers of a model, whole or already cut.

    It is the outermost ``nn.ModuleList`` in the text model whose length is the configuration's
    number of layers; of several, or of none, the one with the most parameters. Whether the
    family's forward really runs that list as a plain chain is for the self-check to find out.

    Raises:
        SplitError: The model has no list of layers.
    """
    config = getattr(root, "config", None)
    text_config = config.get_text_config(decoder=True) if config is not None else None
    expected = getattr(text_config, "num_hidden_layers", None)
    candidates = list(_outermost_lists(root, ""))
    if not candidates:
        raise SplitError(
            f"{type(root).__name__} holds no list of layers (nn.ModuleList), so there is nothing "
            "to cut. Use a model whose layers are a list, such as a decoder-only transformer."
        )

    # Every decoder layer also needs the encoder's output, so it is the encoder that is cut.
    encoder = None
    if config is not None and config.is_encoder_decoder and isinstance(root, PreTrainedModel):
        encoder = root.get_encoder()

    def rank(item: tuple[str, nn.ModuleList]) -> tuple[bool, bool, bool, bool, int]:
        path, layers = item
        in_encoder = encoder is not None and any(module is layers for module in encoder.modules())
        host_config = getattr(root.get_submodule(_host_path(root, path)), "config", None)
        already_cut = any(isinstance(layer, StandIn) for layer in layers)
        size = sum(parameter.numel() for parameter in layers.parameters())
        in_text_model = type(host_config) is type(text_config)
        return already_cut, in_encoder, in_text_model, len(layers) == expected, size

    path, layers = max(candidates, key=rank)
    return LayerStack(path, _host_path(root, path), len(layers))


def _outermost_lists(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Return the module lists that lie in no other one, with their dotted names."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and len(child) > 0:
            yield child_path, child
        else:
            yield from _outermost_lists(child, child_path)


def _host_path(root: nn.Module, path: str) -> str:
    """Return the nearest module around ``path`` that is a PreTrainedModel; the root if there is none."""
    parts = path.split(".")[:-1]
    while parts:
        if isinstance(root.get_submodule(".".join(parts)), PreTrainedModel):
            return ".".join(parts)
        parts.pop()
    return ""


def embedding_width(model: PreTrainedModel | nn.Module) -> int:
    """Return the width of a model's input embeddings.

    Raises:
        SplitError: Its configuration names none: its layers have widths of their own.
    """
    config = getattr(model, "config", None)
    width = None
    if config is not None:
        width = getattr(config.get_text_config(decoder=True), "hidden_size", None)
    if not isinstance(width, int):
        raise SplitError(
            f"{type(model).__name__} has no one width of hidden states (hidden_size in its "
            "configuration), so its layers are no chain that a trunk could be a part of. This "
            "family cannot be split."
        )
    return width


def address_of(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; of this process's share, if it is divided."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()
