"""What a run brings to a trunk that serves several experiments, and what the trunk makes of it.

The base model, where and how it computes, and every budget are the trunk's own. What says how one
experiment trains is the run's: the adapters, the seed, the optimizer, how clients' gradients become one.
Only what differs from its default is brought, so that a run with a key that an older trunk does not know
is refused only where it uses it.
"""

from collections.abc import Mapping

from flower_split.config import RunConfig, parse_run_config, resolved_run_config, run_config_keys
from flower_split.config.validation import Scalar
from flower_split.errors import ConfigError
from flower_split.parties.fingerprint import CUT_LAYERS, settings
from flower_split.parties.protocol_versions import FIELD as PROTOCOL
from flower_split.runtime.registry import IMPORT_PATH

# Of the trunk section: how this experiment's trunk trains, and what its clients send.
_TRUNK_KEYS = frozenset(
    f"trunk.{name}"
    for name in (
        "train",
        "step-every",
        "quorum",
        "quorum-count",
        "wire-dtype",
        "gradient-wire-dtype",
        "window-rule",
        "window-batches",
        "window-batch-positions",
        "reduction",
        "max-client-grad-norm",
        "outlier-factor",
        "on-bad-client",
    )
)
# Beside it: what the rules of settings that go together look at.
_GROUPS = ("lora.", "trunk.optimizer.", "train.", "strategy.", "privacy.")
_KEYS = frozenset(
    {
        "seed",
        "mode",
        "num-server-rounds",
        "num-clients",
        "fraction-train",
        "fraction-evaluate",
        "evaluate-every",
    }
)
# Of client machines; no trunk reads them.
_NOT_BROUGHT = frozenset(
    {
        "train.device",
        "train.device-map",
        "train.num-threads",
        "train.compute",
        "train.client-dir",
        "train.report-to",
    }
)
# Those that name code which the trunk loads.
_PLUG_INS = (
    "trunk.wire-dtype",
    "trunk.gradient-wire-dtype",
    "trunk.window-rule",
    "trunk.reduction",
)

_BASE_FIELDS = frozenset(
    {
        PROTOCOL,
        CUT_LAYERS,
        "dtype",
        "attention",
        "quantization",
        "task",
        "labels",
        "trunk.compute",
        "trunk.num-threads",
    }
)


def is_brought(key: str) -> bool:
    """Return whether a run-config key is the run's own on a trunk of several experiments."""
    own = key in _KEYS or key in _TRUNK_KEYS or key.startswith(_GROUPS)
    return own and key not in _NOT_BROUGHT


def brought(config: RunConfig) -> dict[str, Scalar]:
    """Return what a run brings: its keys for the trunk, where they are not at their defaults."""
    defaults = run_config_keys()
    return {
        key: value
        for key, value in resolved_run_config(config).items()
        if is_brought(key) and value != defaults.get(key)
    }


def adopted(own: RunConfig, values: Mapping[str, Scalar] | None) -> RunConfig:
    """Return the configuration of an experiment on a trunk.

    Args:
        own: The trunk's.
        values: What the run brings; None: nothing, it trains as the trunk's own configuration says.

    Raises:
        ConfigError: A key is not the run's to bring or unknown, a value breaks its rule, names code by
            an import path, or needs a base of its own.
    """
    if values is None:
        return _over_one_base(own)
    strange = sorted(key for key in values if not is_brought(key))
    if strange:
        raise ConfigError(
            f"{strange[0]!r} is not an experiment's to say on a trunk that serves several: base model, "
            "devices and budgets are those of the trunk's own configuration. Start a trunk for it."
        )
    theirs = resolved_run_config(own)
    mine = {
        key: value
        for key, value in theirs.items()
        if key.startswith(("model.", "trunk.")) and not is_brought(key)
    }
    config = parse_run_config({**mine, **values})
    for key in _PLUG_INS:
        text = str(values.get(key, ""))
        if text != theirs[key] and any(IMPORT_PATH.search(item) for item in text.split(",")):
            raise ConfigError(
                f"{key} = {text!r} names code by an import path, which a trunk of several experiments "
                "loads at its operator's word alone. Name a built-in or an installed plug-in."
            )
    return _over_one_base(config)


def _over_one_base(config: RunConfig) -> RunConfig:
    if config.trunk.train == "full" and config.mode == "joint":
        raise ConfigError(
            'trunk.train = "full" trains the base itself, which all experiments of this trunk share. '
            'Use trunk.train = "lora", or start a trunk for this run alone.'
        )
    return config


def is_of_base(name: str) -> bool:
    """Return whether a field of the fingerprint must be the trunk's, whatever the experiment."""
    return name in _BASE_FIELDS


def experiment_fields(mine: Mapping[str, str], theirs: Mapping[str, str]) -> frozenset[str]:
    """Return the fields in which a run may differ from a trunk of several experiments: it brings them."""
    files = {"model", "weights"}
    return frozenset(n for n in mine.keys() | theirs.keys() if n not in files and not is_of_base(n))


def experiment_fingerprint(base: Mapping[str, str], config: RunConfig) -> dict[str, str]:
    """Return the fingerprint of an experiment.

    Args:
        base: The trunk's own, which names model and weights by their files.
        config: The experiment's.
    """
    files = {name: base[name] for name in ("model", "weights") if name in base}
    return {**settings(config), **files}
