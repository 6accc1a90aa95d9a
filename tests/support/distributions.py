"""Distributions made for one test: modules and metadata in a folder on ``sys.path``; no installer."""

import importlib
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def write_distribution(
    site: Path,
    name: str,
    *,
    entry_points: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, str] | None = None,
) -> None:
    """Write what an installer would leave in ``site``.

    Args:
        site: The folder that stands for site-packages.
        name: The distribution's name; its version is 1.0.
        entry_points: Group -> name -> "module:object".
        modules: Module name -> source.
    """
    metadata = site / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = (
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in entry_points.items()
    )
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    for module, source in (modules or {}).items():
        (site / f"{module}.py").write_text(source)


def install(project: Path, site: Path) -> None:
    """Write what an installer would leave in ``site`` of a project on disk.

    Args:
        project: A folder with a ``pyproject.toml`` and one package of the distribution's name.
        site: The folder that stands for site-packages.
    """
    declared = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    name = declared["name"]
    write_distribution(site, name, entry_points=declared["entry-points"])
    shutil.copytree(project / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))


@contextmanager
def installed(site: Path) -> Iterator[Path]:
    """Have ``site`` on ``sys.path``, and leave no module of it behind."""
    before = set(sys.modules)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    try:
        yield site
    finally:
        sys.path.remove(str(site))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(site):
                del sys.modules[name]
        importlib.invalidate_caches()
