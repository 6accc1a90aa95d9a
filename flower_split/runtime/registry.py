"""Names of a run config to the objects they stand for: built-ins, plug-ins and import paths.

A registry belongs to one entry-point group. Its built-ins are a table in code. Everything else comes
from installed distributions, which declare ``name = "package.module:object"`` in that group::

    [project.entry-points."flower_split.aggregators"]
    my-method = "my_package.my_method:MyMethod"

or from an import path in the run config itself (``strategy.aggregator = "my_package.my_method:MyMethod"``),
which needs no distribution. Plug-ins are imported only when they are asked for by name, so a broken
one stops no run but those that name it.
"""

import difflib
import functools
import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeGuard, TypeVar

from flower_split.errors import ConfigError, FlowerSplitError

T = TypeVar("T")

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Registry(Generic[T]):
    """The objects of one kind, by name.

    Hold an instance in the module that knows the built-ins; it never changes, so it may be shared
    by threads. Nothing is remembered between calls: what is installed is looked up each time.
    """

    group: str  # the entry-point group, such as "flower_split.aggregators"
    key: str  # the run-config key that names one, such as "strategy.aggregator"; for errors
    form: str  # what an object must be, as in "a subclass of flower_split.aggregation.Aggregator"
    machines: str  # which processes look it up, as in "the ServerApp runs"
    built_in: Mapping[str, T]
    accepts: Callable[[object], TypeGuard[T]]  # whether an object that was loaded has the form
    error: type[FlowerSplitError] = ConfigError  # raised for everything below

    def get(self, name: str) -> T:
        """Return the object that ``name`` stands for.

        Args:
            name: A built-in's name, an entry point's name, or an import path ``"module:object"``.

        Raises:
            FlowerSplitError: Of the registry's own kind. The name is unknown (the nearest one, all
                known ones and how to add one are given), two distributions claim it, its module
                cannot be imported, or the object is not of the registry's form.
        """
        plugins = self._plugins(name)
        if len(plugins) + (name in self.built_in) > 1:
            raise self._claimed_twice(name, plugins)
        if name in self.built_in:
            return self.built_in[name]
        if plugins:
            return self._checked(self._load(plugins[0]), f"{name!r} of {_origin(plugins[0])}")
        if IMPORT_PATH.fullmatch(name):
            return self._checked(self._import(name), f"{name!r}")
        raise self._unknown(name)

    def names(self) -> list[str]:
        """Return all known names: the built-ins in their order, then the plug-ins', sorted."""
        plugins = {point.name for point in _points(self.group)}
        return [*self.built_in, *sorted(plugins - self.built_in.keys())]

    def origins(self) -> dict[str, str]:
        """Return name -> where it comes from: "built in", or the distribution and its version.

        A name that is claimed more than once names all claimants; :meth:`get` refuses it.
        """
        found: dict[str, list[str]] = {name: ["built in"] for name in self.built_in}
        for point in _points(self.group):
            found.setdefault(point.name, []).append(_origin(point))
        return {name: ", ".join(found[name]) for name in self.names()}

    def _plugins(self, name: str) -> list[EntryPoint]:
        return [point for point in _points(self.group) if point.name == name]

    def _load(self, point: EntryPoint) -> object:
        try:
            return point.load()
        except Exception as error:  # a plug-in's module may raise anything while it is imported
            raise self.error(
                f"{self.key} {point.name!r} is {point.value!r} of {_origin(point)}, which cannot be "
                f"imported: {type(error).__name__}: {error}. Correct or uninstall that distribution."
            ) from error

    def _import(self, path: str) -> object:
        module, _, attributes = path.partition(":")
        try:
            found: object = importlib.import_module(module)
            for attribute in attributes.split("."):
                found = getattr(found, attribute)
        except Exception as error:  # as for a plug-in
            raise self.error(
                f"{self.key} names the import path {path!r}, which cannot be imported: "
                f"{type(error).__name__}: {error}. The module must be importable where {self.machines}."
            ) from error
        return found

    def _checked(self, found: object, label: str) -> T:
        if not self.accepts(found):
            raise self.error(
                f"{self.key} {label} must be {self.form}; it is {found!r}. Correct the plug-in."
            )
        return found

    def _claimed_twice(self, name: str, plugins: list[EntryPoint]) -> FlowerSplitError:
        claims = ["flower_split itself"] if name in self.built_in else []
        claims += [f"{_origin(point)} ({point.value})" for point in plugins]
        return self.error(
            f"{self.key} {name!r} is claimed by {' and by '.join(claims)} in the entry-point group "
            f"{self.group}; a name must stand for one object. Rename the plug-in's, or uninstall it."
        )

    def _unknown(self, name: str) -> FlowerSplitError:
        known = self.names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return self.error(
            f"{self.key} {name!r} is unknown; it must be one of {', '.join(known)}.{hint} To add one, "
            f'install, where {self.machines}, a distribution with an entry point in "{self.group}", '
            f'or give an import path "module:object"; the object must be {self.form}.'
        )


def _points(group: str) -> tuple[EntryPoint, ...]:
    return _points_on(tuple(sys.path), group)


@functools.cache  # finding them reads the metadata of every distribution that is installed
def _points_on(path: tuple[str, ...], group: str) -> tuple[EntryPoint, ...]:
    """Return a group's entry points of the distributions on ``sys.path``, which is ``path``."""
    return tuple(entry_points(group=group))


def _origin(point: EntryPoint) -> str:
    """Name the distribution of an entry point."""
    if point.dist is None:
        return "a distribution without metadata"
    return f"distribution {point.dist.name} {point.dist.version}"
