"""Flower's flat run config as dataclasses, and back."""

import difflib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from typing import Any, TypeVar

from flower_split.config.lora import refuse_peft_option
from flower_split.config.run import RunConfig
from flower_split.config.validation import Scalar, kebab
from flower_split.errors import ConfigError

APP = "app."
"""Begins the keys that are the app's own."""

Section = TypeVar("Section")


def _leaves(section: type, prefix: str = "") -> Iterator[tuple[str, type, Any]]:
    """Yield every key with its type and default, depth first in field order; not the app's own."""
    hints = typing.get_type_hints(section)
    for item in fields(section):
        key, hint = prefix + kebab(item.name), hints[item.name]
        if is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), key + ".")
        elif item.default is not MISSING:
            yield key, hint, item.default


def run_config_keys() -> dict[str, Scalar]:
    """Return every run-config key with its default, as ``[tool.flwr.app.config]`` may hold."""
    return {key: default for key, _, default in _leaves(RunConfig)}


def unknown_keys(run_config: Mapping[str, Scalar]) -> tuple[str, ...]:
    """Return the keys that this version does not know and that are not the app's own, sorted."""
    known = run_config_keys()
    return tuple(sorted(k for k in run_config if k not in known and not k.startswith(APP)))


def _coerce(key: str, value: Scalar, kind: type) -> Scalar:
    """Return ``value`` as ``kind``; an int is taken for a float, nothing else converts."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key} must be of type {kind.__name__}; it is {value!r}.")
    return value


def _build(section: type[Section], values: Mapping[str, Scalar], prefix: str = "") -> Section:
    hints = typing.get_type_hints(section)
    arguments: dict[str, Any] = {}
    for item in fields(typing.cast(Any, section)):
        key, hint = prefix + kebab(item.name), hints[item.name]
        if is_dataclass(hint):
            arguments[item.name] = _build(typing.cast(type, hint), values, key + ".")
        elif key in values and item.default is not MISSING:
            arguments[item.name] = _coerce(key, values[key], hint)
    return section(**arguments)


def parse_run_config(run_config: Mapping[str, Scalar]) -> RunConfig:
    """Parse Flower's flat run config.

    Args:
        run_config: Keys in kebab-case with dots between groups, such as ``context.run_config``. Those
            under ``app.`` are the app's own: they become ``RunConfig.app`` as they are.

    Raises:
        ConfigError: A key is unknown (the nearest known one is named), a value has the wrong type,
            or breaks its rule.
    """
    for key in unknown_keys(run_config):
        refuse_peft_option(key)
        near = difflib.get_close_matches(key, run_config_keys(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown run-config key {key!r}.{hint}")
    own = {key.removeprefix(APP): v for key, v in run_config.items() if key.startswith(APP)}
    return replace(_build(RunConfig, run_config), app=own)


def resolved_run_config(config: RunConfig) -> dict[str, Scalar]:
    """Return ``config`` as flat run-config keys: the inverse of :func:`parse_run_config`."""

    def flatten(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Scalar]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{kebab(name)}.")
            else:
                yield prefix + kebab(name), value

    own = {APP + name: value for name, value in config.app.items()}
    return {**dict(flatten(asdict(replace(config, app={})), "")), **own}
