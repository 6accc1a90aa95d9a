"""One frozen base in memory for several trunks, each with an adapter of its own.

A *twin* of a trunk has modules of its own and the trunk's tensors: weights, quantised codes, scales and
buffers have one storage, whoever computes with them. What trains in a twin is the twin's alone. A base
weight that trains whole there (``modules-to-save``, biases) is copied first.
"""

import copy
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from flower_split.config import LoraPartConfig
from flower_split.errors import SplitError
from flower_split.lora.attach import plans_of
from flower_split.split import CutLayers, TrunkModel

_FP32 = 4  # bytes of a number that trains
_COPIES = 3  # of what trains: at work, at the round's beginning, and as the experiment began
_DEPTH = 4  # of the containers in a module's attributes in which tensors are looked for
_MOMENTS = {"adamw": 2, "adam": 2, "sgd": 0}


class SharedBase:
    """A trunk without an adapter, whose tensors several trunks compute with.

    Args:
        trunk: The trunk; nothing in it trains, and it is changed no more.

    Attributes:
        cuts: Its cut layers.
    """

    def __init__(self, trunk: TrunkModel) -> None:
        trunk.requires_grad_(False)
        self.cuts: CutLayers = trunk.cuts
        self._trunk = trunk
        self._tensors = {id(tensor): tensor for tensor in _tensors_of(trunk)}
        self._versions = {key: tensor._version for key, tensor in self._tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the base, every storage counted once."""
        return storage_bytes(self._tensors.values())

    def twin(self, part: LoraPartConfig | None = None) -> TrunkModel:
        """Return a trunk with modules of its own over the base's tensors.

        Nothing is allocated for them but copies of those that will train whole.

        Args:
            part: What will train of the twin; None: nothing.
        """
        memo: dict[int, object] = dict(self._tensors)
        twin = copy.deepcopy(self._trunk, memo)
        copies: dict[int, nn.Parameter] = {}
        parts = {} if part is None else {"trunk": part}
        for plan in plans_of(twin, self.cuts, parts):
            for module, key in plan.whole:
                shared = module._parameters[key]
                if shared is not None and id(shared) in self._tensors:
                    own = copies.setdefault(
                        id(shared), nn.Parameter(shared.detach().clone(), requires_grad=False)
                    )
                    module._parameters[key] = own
        return twin

    def check_untouched(self) -> None:
        """Check that nobody has written into the base.

        Raises:
            SplitError: Somebody has.
        """
        touched = [
            key for key, tensor in self._tensors.items() if tensor._version != self._versions[key]
        ]
        if touched:
            raise SplitError(
                f"{len(touched)} tensors of the base that all experiments share were written to, so "
                "their results cannot be trusted. Serve this configuration on a trunk of its own "
                "(trunk.max-experiments = 1)."
            )

    def state_bytes(self, part: LoraPartConfig, optimizer: str) -> int:
        """Return the bytes that an adapter will take with optimizer and copies, before any is taken.

        Args:
            part: The trunk's settings.
            optimizer: Its name; an unknown one counts as one with two moments.
        """
        elements = 0
        for plan in plans_of(self._trunk, self.cuts, {"trunk": part}):
            for name, module in plan.targets.items():
                rank = part.setting_of(name)[0]
                into, out = _sizes(module)
                elements += rank * (into + out) + (out if part.use_dora else 0)
            whole = {
                id(module._parameters[key]): module._parameters[key] for module, key in plan.whole
            }
            elements += sum(value.numel() for value in whole.values() if value is not None)
        return _FP32 * _COPIES * (1 + _MOMENTS.get(optimizer, 2)) * elements


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, every storage counted once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Return inputs and outputs of a module with LoRA: a linear layer, Conv1D or an embedding."""
    for names in (("in_features", "out_features"), ("num_embeddings", "embedding_dim")):
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(size, int) for size in found):
            return int(found[0] or 0), int(found[1] or 0)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() >= 2:
        return weight.shape[0], weight.shape[1:].numel()
    return 0, 0


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor that a model holds: parameters, buffers, and those of quantisers beside them."""
    seen: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_modules", "_spans", "_caches"):
                yield from _tensors_in(value, seen, _DEPTH)
    for host in getattr(model, "_host", ()):  # outside the module tree
        for tensor in (*host.parameters(), *host.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _tensors_in(value: object, seen: set[int], depth: int) -> Iterator[Tensor]:
    """Yield the tensors in a value, in containers and in plain objects; modules are looked at elsewhere."""
    if id(value) in seen or depth < 0 or isinstance(value, (nn.Module, str, bytes, type)):
        return
    if isinstance(value, Tensor):
        seen.add(id(value))
        yield value
        beside = getattr(value, "__dict__", {})  # such as the state of a quantised weight
    elif isinstance(value, dict):
        beside = value
    elif isinstance(value, (list, tuple, set)):
        beside = dict(enumerate(value))
    elif type(value).__module__ in ("builtins", "torch"):
        return
    else:
        beside = getattr(value, "__dict__", {})
    for item in list(beside.values()):
        yield from _tensors_in(item, seen, depth - 1)
