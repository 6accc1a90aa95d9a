"""Commands of who sets up and runs machines: their options, and the function that each calls.

Every function imports what it needs: torch and Flower take seconds to load.
"""

import argparse
from pathlib import Path


def add_operator_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the commands, each with its function as the default ``handler``."""
    _add_new(commands)


def _add_new(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    new = commands.add_parser(
        "new",
        help="write an app with a data function and a configuration of its own",
        description="Writes a Flower app that runs as it is: pyproject.toml with every key, and a "
        "function that returns a client's texts, to be replaced by your own.",
    )
    new.add_argument("directory", type=Path, help="new or empty; its name is the app's")
    new.set_defaults(handler=_new)


def _new(arguments: argparse.Namespace) -> int:
    from flower_split.cli.new import new_app

    return new_app(arguments.directory)
