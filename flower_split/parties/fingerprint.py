"""What client, trunk and ServerApp must agree on, as named values that can be compared.

Weights are told apart by content: :mod:`flower_split.parties.weights_digest` hashes files whole. A hub
checkpoint, of which a party may hold only some shards, is told by its id and commit. Settings are told
apart where they change a number; those that are each party's own (devices, timeouts, data) are left out.

A setting that a later version adds stands in the fingerprint only where it is not at its default, so that
an older party, which does not know it, agrees wherever it would do the same.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from flower_split.config import LoraPartConfig, OptimizerConfig, RunConfig
from flower_split.config.model import CAUSAL_LM
from flower_split.config.validation import kebab
from flower_split.errors import SplitError
from flower_split.parties.protocol_versions import FIELD as PROTOCOL
from flower_split.parties.protocol_versions import SPOKEN, protocols_meet
from flower_split.parties.weights_digest import file_digest
from flower_split.split.loading.checkpoint import INDEX_FILE, WEIGHTS_FILE, fetch
from flower_split.split.loading.model_source import ModelSource

CUT_LAYERS = "cut-layers"
"""The field that parties with cut layers of their own need not share; see ``TrunkModel.span``."""
CODEC = "codec"
"""The field that names the codec of activations, and of their gradients where nothing else does."""
GRADIENT_CODEC = "gradient-codec"
"""The field that names the codec of gradients, where it is not that of activations."""
_TRAINING = frozenset(
    {
        "seed",
        "trunk.compute",
        "trunk.max-client-grad-norm",
        "trunk.num-threads",
        "trunk.on-bad-client",
        "trunk.reduction",
        "trunk.window-batches",
        "trunk.window-rule",
    }
)
OPTIMIZER = "trunk.optimizer."
"""Begins the names of the trunk optimizer's fields."""
# Of config.json: what says nothing about the function that the model computes.
_IGNORED_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
)


def fingerprint(config: RunConfig) -> dict[str, str]:
    """Return the fingerprint of a run's model and settings, the same on every party.

    Returns:
        Field name -> short readable value or hex digest: ``model`` (configuration), ``weights``, and
        those of :func:`settings`.

    Raises:
        SplitError: The model's configuration or weights cannot be read.
    """
    source = ModelSource.of(config.model)
    return {
        **settings(config),
        "model": _model_config_digest(source),
        "weights": _weights_identity(source),
    }


def settings(config: RunConfig) -> dict[str, str]:
    """Return the fields of the fingerprint for which no model is read.

    Returns:
        Field name -> short readable value: ``protocol``, ``mode``, ``cut-layers``, ``dtype``,
        ``attention``, ``quantization``, ``trunk.train``, ``codec``, ``lora.bottom``, ``lora.trunk``,
        ``lora.top``, and those that :func:`is_of_training` names.
    """
    trunk = config.trunk
    return {
        PROTOCOL: str(SPOKEN),
        "mode": config.mode,
        CUT_LAYERS: f"{config.model.first_cut}:{config.model.second_cut}",
        "dtype": config.model.dtype,
        "attention": ModelSource.of(config.model).attn_implementation or "default",
        "quantization": _quantization_text(config.model.quantization),
        "trunk.train": trunk.train,
        CODEC: trunk.wire_dtype,
        "lora.bottom": _lora_text(config.lora.bottom),
        "lora.trunk": _lora_text(config.lora.trunk),
        "lora.top": _lora_text(config.lora.top),
        "seed": str(config.seed),
        "trunk.compute": trunk.compute,
        "trunk.num-threads": str(trunk.num_threads),
        "trunk.reduction": trunk.reduction,
        "trunk.max-client-grad-norm": f"{trunk.max_client_grad_norm:g}",
        "trunk.on-bad-client": trunk.on_bad_client,
        "trunk.window-rule": trunk.window_rule,
        # Only where it is on: a client that knows nothing of it works with a trunk where it is off.
        **(
            {"trunk.window-batches": f"on, passes of {trunk.batch_positions}"}
            if trunk.batch_positions
            else {}
        ),
        **(
            {GRADIENT_CODEC: trunk.gradient_wire_dtype}
            if trunk.gradient_wire_dtype not in ("", trunk.wire_dtype)
            else {}
        ),
        **_optimizer_fields(trunk.optimizer),
        **_task_fields(config),
    }


def is_of_training(name: str) -> bool:
    """Return whether a field says how a trunk trains; an evaluation is the same whatever it is."""
    return name in _TRAINING or name.startswith(OPTIMIZER)


def differing_fields(
    mine: Mapping[str, str], theirs: Mapping[str, str], *, own_cuts: bool = False
) -> list[str]:
    """Return the names of the fields that differ or that only one side has, sorted.

    Protocols differ where the parties speak no version that is the same.

    Args:
        mine: One party's.
        theirs: The other's.
        own_cuts: One of them names its own cut layers, which are checked against the other's span:
            ``cut-layers`` does not count.
    """
    alike = {CUT_LAYERS} if own_cuts else set()
    if protocols_meet(mine, theirs):
        alike.add(PROTOCOL)
    return sorted(
        name for name in (mine.keys() | theirs.keys()) - alike if mine.get(name) != theirs.get(name)
    )


def differences(
    mine: Mapping[str, str],
    theirs: Mapping[str, str],
    names: Sequence[str],
    *,
    labels: tuple[str, str],
) -> str:
    """Return fields with both parties' values, as part of an error.

    Args:
        mine: One party's.
        theirs: The other's.
        names: The fields' names.
        labels: What the two are called.
    """
    return "; ".join(
        f"{name} ({labels[0]}: {mine.get(name)}, {labels[1]}: {theirs.get(name)})" for name in names
    )


def _task_fields(config: RunConfig) -> dict[str, str]:
    model = config.model
    if model.task == CAUSAL_LM:
        return {}
    return {"task": model.task, "labels": ", ".join(model.label_names) or "none"}


def _optimizer_fields(optimizer: OptimizerConfig) -> dict[str, str]:
    return {OPTIMIZER + kebab(name): str(value) for name, value in asdict(optimizer).items()}


def _lora_text(part: LoraPartConfig) -> str:
    if part.train == "full":
        return "full"
    text = _beside_lora(part)
    if part.r == 0:
        return text.strip() or "none"
    targets = ",".join(sorted(name.strip() for name in part.target_modules.split(",")))
    rule = ("rslora" if part.use_rslora else "lora") + (" dora" if part.use_dora else "")
    factors = f"{rule} r={part.r} alpha={part.alpha:g} dropout={part.dropout:g} targets={targets}"
    for label, values in (("ranks", part.ranks), ("alphas", part.alphas)):
        if values:
            factors += f" {label}=" + ",".join(f"{n}:{v:g}" for n, v in sorted(values.items()))
    return factors + ("" if part.init == "kaiming" else f" init={part.init}") + text


def _beside_lora(part: LoraPartConfig) -> str:
    """Return the weights that train whole."""
    text = "" if part.bias == "none" else f" bias={part.bias}"
    saved = ",".join(sorted(part.saved_modules))
    return text + (f" whole={saved}" if saved else "")


def _quantization_text(text: str) -> str:
    """Return a name as it is, and a JSON object with its keys in order."""
    if text.lstrip().startswith("{"):
        return json.dumps(json.loads(text), sort_keys=True)
    return text or "none"


def _model_config_digest(source: ModelSource) -> str:
    path = fetch(source.name_or_path, "config.json", source.revision)
    if path is None:
        raise SplitError(
            f"{source.name_or_path!r} has no config.json. Give a directory that holds one, or the id "
            "of a model on the hub."
        )
    content = json.loads(path.read_text())
    kept = {key: value for key, value in content.items() if key not in _IGNORED_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _weights_identity(source: ModelSource) -> str:
    name = source.name_or_path
    if not Path(name).is_dir():
        path = fetch(name, "config.json", source.revision)
        # The hub's cache keeps a checkpoint's files under snapshots/<commit>/.
        commit = path.parent.name if path is not None else source.revision or ""
        return f"{name}@{commit}"
    directory = Path(name)
    index = directory / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [WEIGHTS_FILE]
    whole = hashlib.sha256()
    for file_name in names:
        path = directory / file_name
        if not path.is_file():
            raise SplitError(
                f"{name!r} lacks {file_name}, so its weights cannot be told from others. Fetch the "
                "missing file."
            )
        whole.update(file_digest(path))
    return whole.hexdigest()
