"""Export one standard PEFT adapter from the adapters of the three parts.

Names are the unsplit model's, so the parts' tensors are simply put together. Where parts differ in
rank or alpha, PEFT's ``rank_pattern`` and ``alpha_pattern`` say so; rsLoRA is written as the plain
alpha of the same scale. What a method put beside the clients' base weights goes into the adapter,
whose modules then have ranks of their own. What trained whole, a trunk in full or modules of a part,
goes into the adapter as PEFT's ``modules_to_save``.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from peft import LoraConfig, TaskType
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flower_split.config import LoraPartConfig, RunConfig
from flower_split.config import model as tasks
from flower_split.errors import RunDirectoryError
from flower_split.lora import embedding_names, part_of
from flower_split.lora.base_change import with_base_change
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import model_cuts
from flower_split.results.client_adapter import OneClient, read_client_adapter, run_method
from flower_split.results.client_view import clients_own, with_cuts
from flower_split.results.peft_form import PeftForm, neutral_magnitudes, peft_form, tied_copies
from flower_split.runs.directory import RunDirectory
from flower_split.split import CutLayers
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.loading.parts import empty_model
from flower_split.split.structure.stack import LayerStack, find_stack

# PEFT has no type for masked tokens, and its model for answers drops the token types (0.21).
_TASK_TYPES = {
    tasks.CAUSAL_LM: TaskType.CAUSAL_LM,
    tasks.SEQ2SEQ: TaskType.SEQ_2_SEQ_LM,
    tasks.SEQUENCE_CLASSIFICATION: TaskType.SEQ_CLS,
    tasks.TOKEN_CLASSIFICATION: TaskType.TOKEN_CLS,
}
_PREFIX = "base_model.model."
_A_WEIGHT = (".lora_A.weight", ".lora_embedding_A")


def export_adapter(
    run_dir: Path,
    out: Path,
    cuts: CutLayers | None = None,
    client: OneClient | None = None,
    *,
    base: str = "",
) -> Path:
    """Merge a run's bottom, trunk and top adapters into one PEFT adapter directory.

    The result is loaded by ``PeftModel.from_pretrained(base_model, out)`` on the plain base model
    and computes what the split model computes.

    Args:
        run_dir: A finished run's directory.
        out: Where ``adapter_config.json`` and ``adapter_model.safetensors`` go; made if need be.
        cuts: Export the model that a client with these cut layers computed: its own copies of the
            trunk's layers outside of them. None: the trunk's copies of all its layers.
        client: Whose own model to export, where the method keeps factors private; None: there is
            one for all.
        base: How the adapter names its base model; empty: see :func:`portable_base`.

    Returns:
        ``out``.

    Raises:
        RunDirectoryError: The run has no final adapters, ``out`` holds other files, or ``client`` is
            missing, out of place or cannot be read.
        SplitError: The base model's configuration cannot be read, or no client had such cut layers.
    """
    run = RunDirectory.open(run_dir)
    config, out = run.config, Path(out)
    _check_free(out)
    # The default attention: the run's own may need what this machine lacks, and no weight depends on it.
    source = replace(ModelSource.of(config.model), attn_implementation=None)
    model = empty_model(source)
    state, scales = _merged(run, model, cuts or model_cuts(config), client)
    form = peft_form(config, state, model)
    state |= tied_copies(state, form, model)
    if form.use_dora:
        state |= neutral_magnitudes(source, state, scales)
    peft_config = _peft_config(config, state, scales, model, form)
    peft_config.base_model_name_or_path = base or portable_base(config)
    out.mkdir(parents=True, exist_ok=True)
    peft_config.save_pretrained(str(out))
    save_file(
        {_PREFIX + name: state[name].contiguous() for name in sorted(state)},
        out / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return out


def _check_free(out: Path) -> None:
    """Check that an export may be written to ``out``: nothing is there but an earlier export.

    Raises:
        RunDirectoryError: Other files are.
    """
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    if out.is_dir() and any(item.name not in names for item in out.iterdir()):
        raise RunDirectoryError(
            f"the export goes to an empty directory; {out} holds other files. Name another one."
        )


def _merged(
    run: RunDirectory, model: PreTrainedModel, cuts: CutLayers, client: OneClient | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return a run's adapter over all three parts, as a client with ``cuts`` computed it.

    Args:
        run: The finished run.
        model: The whole base model; on the meta device will do.
        cuts: Where the client's model is cut.
        client: Whose own model, where the method keeps factors private.

    Returns:
        Tensors by name, and the ΔW scale of every module with LoRA.
    """
    config = run.config
    state, change = read_client_adapter(run, client), read_base_change(run)
    trunk = _trunk_state(run)
    stack = find_stack(model)
    if config.trunk.train == "full":
        _check_in_layers(trunk, stack)
    change = clients_own(change, trunk, stack, cuts)
    state, trunk = with_cuts(state, trunk, stack, cuts, model_cuts(config))
    state, scales = with_base_change(state, _scales(config, state, model), change)
    return state | trunk, scales | _scales(config, trunk, model)


def portable_base(config: RunConfig) -> str:
    """Return a name of the run's base model that means the same on every machine.

    A hub id stays as it is (the adapter has its revision beside it). A model that is files, of a
    local directory or of this package, is ``NAME@sha256:DIGEST``: the directory's name and the digest
    of its weights that all parties of the run agreed on (:mod:`flower_split.parties.fingerprint`).

    Raises:
        SplitError: The local model cannot be read.
    """
    path = Path(ModelSource.of(config.model).name_or_path).expanduser()
    if not path.is_dir():
        return config.model.name
    return f"{path.resolve().name}@sha256:{fingerprint(config)['weights']}"


def describe_export(out: Path) -> str:
    """Return what an exported adapter directory holds, for people."""
    config = json.loads((out / "adapter_config.json").read_bytes())
    path = out / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    number = sum(math.prod(shape) for shape in shapes)
    whole = config.get("modules_to_save") or []
    beside = f", {len(whole)} modules whole" if whole else ""
    base = config["base_model_name_or_path"]
    return (
        f"wrote {out}: {path.name} ({len(shapes)} tensors, {number:,} parameters, "
        f"{path.stat().st_size:,} bytes{beside}) and adapter_config.json (rank {config['r']}).\n"
        f"Base model: {base}. Load it with: PeftModel.from_pretrained(base_model, {str(out)!r})"
    )


def read_base_change(run: RunDirectory) -> dict[str, Tensor]:
    """Return what a run's method put beside the clients' base weights; empty where it puts nothing.

    Raises:
        RunDirectoryError: The file is missing (the run did not finish) or damaged.
    """
    return run.read_adapter("base") if run_method(run).changes_base else {}


def _trunk_state(run: RunDirectory) -> dict[str, Tensor]:
    """Return the trunk's tensors; none where the mode trains no trunk and none were kept."""
    if run.config.mode != "joint" and not (run.path / "adapters/trunk.safetensors").exists():
        return {}
    return run.read_adapter("trunk")


def _check_in_layers(trunk: dict[str, Tensor], stack: LayerStack) -> None:
    for name in trunk:
        if stack.index_of(name) is None:
            raise RunDirectoryError(
                f"the trunk's tensor {name} lies in no layer of {stack.path}. Restore the run's "
                "adapters/trunk.safetensors."
            )


def _modules(state: dict[str, Tensor]) -> dict[str, int]:
    """Return the modules with LoRA of an adapter, with their ranks."""
    ranks: dict[str, int] = {}
    for name, tensor in state.items():
        module = next((name[: -len(end)] for end in _A_WEIGHT if name.endswith(end)), None)
        if module is not None:
            ranks[module] = tensor.shape[0]
    return ranks


def _scales(
    config: RunConfig, state: dict[str, Tensor], model: PreTrainedModel
) -> dict[str, float]:
    """Return the ΔW scales of an adapter's modules, by the part that each lies in."""
    cuts = CutLayers(config.model.first_cut, config.model.second_cut)
    settings = {"bottom": config.lora.bottom, "trunk": config.lora.trunk, "top": config.lora.top}
    stack, embeddings = find_stack(model), embedding_names(model)
    return {
        module: _scale(settings[part_of(module, stack, cuts, embeddings)], module)
        for module in _modules(state)
    }


def _peft_config(
    config: RunConfig,
    state: dict[str, Tensor],
    scales: dict[str, float],
    model: PreTrainedModel,
    form: PeftForm,
) -> LoraConfig:
    """Return the PEFT configuration of the adapter in ``state``; ``model`` is the whole base model."""
    shapes = {module: (rank, scales[module] * rank) for module, rank in _modules(state).items()}
    if not state:
        raise RunDirectoryError(
            "the run's adapters hold no tensor, so there is no adapter to export. Export a run that "
            "trained one (lora.*.r above 0)."
        )
    # The commonest setting is the adapter's own; the others are named module by module.
    settings = Counter(shapes.values()).items()
    rank, alpha = min(settings, key=lambda item: (-item[1], item[0]), default=((1, 1.0), 0))[0]
    return LoraConfig(
        r=rank,
        lora_alpha=_number(alpha),
        rank_pattern={name: r for name, (r, _) in sorted(shapes.items()) if r != rank},
        alpha_pattern={name: _number(a) for name, (_, a) in sorted(shapes.items()) if a != alpha},
        target_modules=sorted(shapes) or DUMMY_TARGET_MODULES,  # PEFT's word for "none"
        use_dora=form.use_dora,
        bias=cast(Literal["none", "all", "lora_only"], form.bias),
        modules_to_save=form.whole_modules or None,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in shapes),
        revision=ModelSource.of(config.model).revision,
        task_type=_TASK_TYPES.get(config.model.task),
        inference_mode=True,
    )


def _scale(part: LoraPartConfig, module: str) -> float:
    rank, alpha = part.setting_of(module)
    return alpha / (rank**0.5 if part.use_rslora else rank)


def _number(alpha: float) -> int:
    """Return ``alpha`` as PEFT takes it: an int where it is one; PEFT computes with any number."""
    return int(alpha) if alpha == int(alpha) else alpha  # type: ignore[return-value]
