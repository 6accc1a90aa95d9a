"""``flower-split new``: write an app, with a data function and a configuration of its own."""

import importlib.util
import json
import keyword
import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Template

from flower_split.config import Scalar
from flower_split.config.reference import config_keys
from flower_split.errors import ConfigError
from flower_split.runtime.version import __version__

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")  # Flower's rule for the name of an app

_VALUES: dict[str, Scalar] = {
    "num-clients": 2,
    "num-server-rounds": 4,
    "evaluate-every": 2,
    "train.local-steps": 5,
    "strategy.aggregator": "fedit",
    "train.batch-size": 4,
    "train.optimizer.learning-rate": 0.008,
    "trunk.optimizer.learning-rate": 0.008,
    "data.max-eval-batches": 16,
}  # where a first run should be quick, and end before anybody loses patience


def new_app(directory: Path) -> int:
    """Write an app into a directory that is new or empty, and say how to run it.

    Args:
        directory: Its last part names the app.

    Raises:
        ConfigError: The name cannot be an app's, or the directory holds something or cannot be made.
    """
    name, package = _names(directory)
    names = {"name": name, "package": package, "version": __version__}
    written = {
        "pyproject.toml": _filled("pyproject.toml", {**names, "config": _config(package)}),
        "README.md": _filled("README.md", names),
        ".gitignore": _filled("gitignore", names),
        f"{package}/__init__.py": _filled("__init__.py", names),
        f"{package}/data.py": _filled("data.py", names),
    }
    try:
        if directory.exists() and any(directory.iterdir()):
            raise ConfigError(
                f"new writes into a new or empty directory; {directory} is not empty."
            )
        for place, text in written.items():
            path = directory / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error}. Name another one.") from error
    print(f"wrote {directory}: {', '.join(written)}")
    print(f"its data is what texts() in {directory / package / 'data.py'} returns. Run it with:")
    print(f"  flower-split run {directory}")
    return 0


def _names(directory: Path) -> tuple[str, str]:
    """Return the app's name and its package's.

    Raises:
        ConfigError: Flower would refuse the name, or the package would hide another one.
    """
    name = directory.absolute().name
    if not _NAME.fullmatch(name) or name.endswith("-"):
        raise ConfigError(
            "an app is named after its directory, by a letter and then letters, digits and hyphens, 32 "
            f"at most (Flower's rule); this one would be {name!r}."
        )
    package = name.lower().replace("-", "_")
    hidden = package in sys.stdlib_module_names or _is_installed(package)
    if hidden or keyword.iskeyword(package):
        raise ConfigError(
            f"the app's package would be {package!r}, which is a word of Python's or hides a module "
            "that is installed. Name the directory otherwise."
        )
    return name, package


def _is_installed(package: str) -> bool:
    """Return whether a module of that name is there; a mere folder on the path is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def _filled(file: str, values: dict[str, str]) -> str:
    template = files("flower_split.assets").joinpath("app", f"{file}.template")
    return Template(template.read_text(encoding="utf-8")).substitute(values)


def _config(package: str) -> str:
    return "\n".join(_config_lines({**_VALUES, "data.source": f"{package}.data:AppData"}))


def _config_lines(values: dict[str, Scalar]) -> Iterator[str]:
    """Yield every key with its value and meaning, a blank line between sections."""
    section = ""
    for item in config_keys():
        group = item.key.rpartition(".")[0]
        if group != section:
            section = group
            yield ""
        value = json.dumps(values.get(item.key, item.default), ensure_ascii=False)
        yield f"{item.key} = {value}  # {item.meaning}"
