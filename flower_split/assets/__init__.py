"""Files that come with the package: the quick-start's base model.

Runs on: Every party.
Read first: ``resolve_model_path`` below: from ``model.name`` to a place that transformers takes.
"""

from pathlib import Path

from flower_split.errors import ConfigError

QUICKSTART = "quickstart"


def resolve_model_path(name: str) -> str:
    """Return the model's location as transformers takes it.

    Args:
        name: ``model.name`` of the run config. "quickstart" is the model in this package (a local
            directory of that name is "./quickstart"); everything else is returned unchanged.

    Raises:
        ConfigError: The package was installed without the model.
    """
    if name != QUICKSTART:
        return name
    directory = Path(__file__).parent / QUICKSTART
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f'model.name "{QUICKSTART}" is the model in the package, but {directory} is not there. '
            "Install the package again, or name another model."
        )
    return str(directory)
