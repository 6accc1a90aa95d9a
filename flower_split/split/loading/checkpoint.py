"""A checkpoint as one party reads it: its configuration, the shards it needs, the tensors it owns.

Of a sharded checkpoint only the shards that hold owned tensors are fetched, under an index that names
nothing else.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from flower_split.config.model import WITH_OWN_HEAD
from flower_split.errors import SplitError
from flower_split.split.checking.self_check import check_splittable
from flower_split.split.loading.device_map import DeviceMap, check_placed, resolve_device_map
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.loading.partial_class import Carve, holed, quiet_loading
from flower_split.split.loading.tasks import AUTO_CLASSES, begin_head, head_modules, set_labels
from flower_split.split.loading.tensor_parallel import loading_share, note_for_lora
from flower_split.split.structure.cuts import CutLayers
from flower_split.split.structure.quantization import (
    check_quantised,
    keep_trainable,
    quantization_of,
    resolve_quantization,
    settle_dtype,
)
from flower_split.split.structure.stack import LayerStack, find_stack

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_SMALL_FILES = ("config.json", "generation_config.json")


def load_model_config(source: ModelSource) -> PreTrainedConfig:
    """Return the configuration of a checkpoint.

    Raises:
        SplitError: There is none.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.name_or_path, revision=source.revision or "main"
        )
    except (OSError, ValueError, KeyError) as error:
        raise SplitError(
            f"no model configuration could be read from {source.name_or_path!r}: {_one_line(error)} "
            "Give a directory that holds config.json, or the id of a model on the hub."
        ) from error
    if source.attn_implementation:
        config._attn_implementation = source.attn_implementation
    if source.labels:
        set_labels(config, source.labels)
    return config


class Checkpoint:
    """A checkpoint whose configuration is read and whose cut layers are checked."""

    def __init__(
        self,
        source: ModelSource,
        config: PreTrainedConfig,
        model_class: type[PreTrainedModel],
        new_head: bool,
    ) -> None:
        self.name_or_path = source.name_or_path
        self.config = config
        self.model_class = model_class
        self.dtype = _torch_dtype(source.dtype)
        self.revision = source.revision
        self.asked_quantization = source.quantization
        self.new_head = new_head  # whether the head may be missing from the checkpoint
        self.quantization: QuantizationConfigMixin | None = None  # what it was loaded with
        try:
            with torch.device("meta"):
                self.skeleton = model_class(config)
        except (ImportError, ValueError) as error:
            raise SplitError(
                f"{model_class.__name__} of {self.name_or_path!r} cannot be made here: "
                f"{_one_line(error)} Install what it needs, or set model.attn-implementation to "
                '"sdpa" or "eager".'
            ) from error
        self.stack: LayerStack = find_stack(self.skeleton)

    @classmethod
    def open(
        cls,
        source: ModelSource,
        cuts: CutLayers | None,
        auto_class: type[_BaseAutoModelClass] = AutoModelForCausalLM,
    ) -> "Checkpoint":
        """Read the configuration and make the model without weights.

        Raises:
            SplitError: It is no such model, or ``cuts`` do not fit it.
        """
        config = load_model_config(source)
        auto_class = AUTO_CLASSES[source.task] if source.task else auto_class
        mapping: Any = auto_class._model_mapping
        found = mapping.get(type(config), None)
        model_class = found[0] if isinstance(found, tuple) else found
        if model_class is None:
            raise SplitError(
                f"{source.name_or_path!r} is a {config.model_type!r} model, which {auto_class.__name__} "
                "does not load. Use a model of the kind that is asked for."
            )
        own_head = source.task in WITH_OWN_HEAD  # which trains whole, so that it may be new
        new_head = own_head if source.task else auto_class is not AutoModelForCausalLM
        checkpoint = cls(source, config, model_class, new_head)
        if cuts is not None:
            check_splittable(checkpoint.skeleton, checkpoint.stack, cuts)
        return checkpoint

    def load(
        self,
        carve: Carve,
        device: torch.device | str | None,
        device_map: DeviceMap | None = None,
        indices: Sequence[int] = (),
        *,
        beside: bool = False,
        tensor_parallel: int = 1,
    ) -> PreTrainedModel:
        """Read the tensors that are left when ``carve`` has taken out the others.

        Args:
            carve: Takes them out.
            device: Where the weights go; None: the CPU, or where ``device_map`` says.
            device_map: As :func:`resolve_device_map` takes it.
            indices: Of the layers that are left, for ``device_map``.
            beside: Whether modules beside the layers are left, too.
            tensor_parallel: Processes that divide the layers, this one's share of which is read;
                torch's default process group has them all.
        """
        # Quantised weights cannot all be moved afterwards: they are made where they stay.
        places: dict[str, torch.device] | str = {"": torch.device(device or "cpu")}
        asked = self._settle_quantization(places)
        whole_modules = frozenset(
            type(layer).__name__ for layer in self.stack.layers(self.skeleton)
        )
        carve(self.skeleton)
        if device_map is not None:
            places = resolve_device_map(
                device_map, self.skeleton, self.stack, indices, beside=beside
            )
        placed = tensor_parallel > 1 or device_map is not None or self.quantization is not None
        part = holed(self.model_class, carve, whole_modules)
        owned = set(self.skeleton.state_dict())
        if tensor_parallel > 1:
            with loading_share(tensor_parallel, device) as options:
                model, missing_keys = self._read(part, owned, asked, options)
            note_for_lora(model, self.stack)
        else:
            options = {"device_map": places if placed else None}
            model, missing_keys = self._read(part, owned, asked, options)
        keep_trainable(model)
        if asked is not self.quantization and self.dtype is not None:
            settle_dtype(model, owned, self.dtype)
        self._settle_missing(model, missing_keys)
        model.__class__ = self.model_class
        model.config.name_or_path = self.name_or_path
        model.name_or_path = self.name_or_path
        if device_map is not None:
            check_placed(model, self.stack, indices, beside=beside)
        return model if placed or device is None else nn.Module.to(model, device)

    def _settle_quantization(
        self, places: dict[str, torch.device] | str
    ) -> QuantizationConfigMixin | None:
        """Settle what the weights are quantised with; return what ``from_pretrained`` is told.

        Raises:
            SplitError: It cannot be had here.
        """
        self.quantization = resolve_quantization(
            self.name_or_path,
            self.config,
            self.skeleton,
            self.asked_quantization,
            self.dtype,
            places,
        )
        if quantization_of(self.config) is None or self.quantization is None:
            return self.quantization
        # A checkpoint that is quantised says so in its configuration, and there alone.
        self.config.quantization_config = self.quantization.to_dict()
        return None

    def _read(
        self,
        part: type[PreTrainedModel],
        owned: set[str],
        quantization: QuantizationConfigMixin | None,
        options: dict[str, Any],
    ) -> tuple[PreTrainedModel, list[str]]:
        """Read the owned tensors; return the part and the names that the checkpoint lacks.

        Raises:
            SplitError: They cannot be read.
        """
        with self._owned_shards(owned) as directory, quiet_loading():
            try:
                loaded: Any = part.from_pretrained(
                    str(directory),
                    config=self.config,
                    dtype=self.dtype if self.dtype is not None else "auto",
                    revision=self.revision or "main",
                    use_safetensors=True,
                    output_loading_info=True,
                    quantization_config=quantization,
                    **options,
                )
            except (OSError, RuntimeError, ValueError, ImportError) as error:
                raise SplitError(
                    f"the weights of {self.name_or_path!r} could not be read: {_one_line(error)} "
                    "They must be complete and in safetensors (model.safetensors, or shards with "
                    f"{INDEX_FILE})."
                ) from error
        return loaded[0], list(loaded[1]["missing_keys"])

    def _settle_missing(self, model: PreTrainedModel, missing_keys: list[str]) -> None:
        """Begin a head that the checkpoint lacks, and refuse one that lacks anything else.

        Raises:
            SplitError: It does.
        """
        heads = head_modules(self.skeleton) if self.new_head else []
        missing = sorted(
            name
            for name in missing_keys
            if self.stack.index_of(name) is not None
            or not any(name.startswith(f"{head}.") for head in heads)
        )
        if missing:
            raise SplitError(
                f"the checkpoint {self.name_or_path!r} lacks {len(missing)} tensors of this part, "
                f"such as {missing[0]}. Use a complete checkpoint of {self.model_class.__name__}."
            )
        if missing_keys:
            begin_head(model, missing_keys)

    def check_trains(self, model: nn.Module, leaf: Tensor, run: Callable[[Tensor], Tensor]) -> None:
        """Check that a quantised part can be trained (:func:`check_quantised`)."""
        if self.quantization is not None:
            check_quantised(self.name_or_path, model, self.skeleton, self.quantization, leaf, run)

    @contextlib.contextmanager
    def _owned_shards(self, owned: set[str]) -> Iterator[Path | str]:
        """Return a directory with the shards that hold owned tensors, or the checkpoint itself."""
        index_path = fetch(self.name_or_path, INDEX_FILE, self.revision)
        if index_path is None:
            yield self.name_or_path
            return
        index = json.loads(index_path.read_text())
        weight_map: dict[str, str] = {
            key: shard
            for key, shard in index["weight_map"].items()
            if _may_be_owned(key, owned, self.stack)
        }
        with tempfile.TemporaryDirectory(prefix="flower-split-") as name:
            directory = Path(name)
            for shard in sorted(set(weight_map.values())):
                path = fetch(self.name_or_path, shard, self.revision)
                if path is None:
                    raise SplitError(
                        f"the checkpoint {self.name_or_path!r} lacks {shard}, which its index "
                        "names and this part needs. Fetch the missing file."
                    )
                (directory / shard).symlink_to(path.resolve())
            for small in _SMALL_FILES:
                path = fetch(self.name_or_path, small, self.revision)
                if path is not None:
                    (directory / small).symlink_to(path.resolve())
            (directory / INDEX_FILE).write_text(
                json.dumps({"metadata": index.get("metadata", {}), "weight_map": weight_map})
            )
            yield directory


def fetch(name_or_path: str, filename: str, revision: str | None) -> Path | None:
    """Return the local path of one file of a checkpoint, downloaded if need be; None if it has none."""
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / filename
        return path if path.is_file() else None
    found = cached_file(
        name_or_path,
        filename,
        revision=revision or "main",
        _raise_exceptions_for_missing_entries=False,
    )
    return None if found is None else Path(found)


def _may_be_owned(key: str, owned: set[str], stack: LayerStack) -> bool:
    """Return whether the checkpoint's tensor ``key`` may belong to a part with ``owned`` names.

    Checkpoints may lack the base model's prefix, or fuse and rename tensors within a layer; so a
    layer's tensors are told by the list's name and the layer's index, and the others by name.
    """
    list_name = stack.path.rsplit(".", 1)[-1]
    match = re.search(rf"(?:^|\.){re.escape(list_name)}\.(\d+)\.", key)
    if match:
        prefix = stack.layer_path(int(match[1])) + "."
        return any(name.startswith(prefix) for name in owned)
    outside = {name for name in owned if stack.index_of(name) is None}
    return bool(outside)


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise SplitError(
            f"{dtype!r} is no dtype of torch; use float32, bfloat16, float16 or float64."
        )
    return found


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:300] + "…") if len(text) > 300 else text
