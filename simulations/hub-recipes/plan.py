"""Print what the recipes of this folder need, as the table of docs/how-to/hub-models.md.

Nothing is fetched: `models/` holds the size of each base model, as its `config.json` on the hub states it,
and no weights. ::

    python simulations/hub-recipes/plan.py [RECIPE …]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flower_split.cli.app_config import load_app_config
from flower_split.cli.plan.command import client_memory, trunk_memory
from flower_split.cli.plan.dry_run import CLIENT, TRUNK, DryRun, dry_run
from flower_split.cli.plan.wire_bytes import experiment_name, step_bytes
from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.server.federation.handshake import num_participants

FOLDER = Path(__file__).parent
APP = FOLDER.parent / "quickstart"
HEADER = [
    "recipe",
    "clients at once",
    "client GiB (base)",
    "trunk GiB (base)",
    "unsplit client GiB (base)",
    "MiB a step, each way",
    "client TFLOP a step",
    "trunk TFLOP a step",
    "adapter MiB a round, each way",
    "GiB a run, all clients",
]
_TERA, _GIB, _MIB = 1e12, 1 << 30, 1 << 20


def recipe_names() -> list[str]:
    """Return the names of all recipes, in order."""
    return sorted(path.name.removesuffix(".toml") for path in FOLDER.glob("*.toml"))


def model_folder(config: RunConfig) -> Path:
    """Return where the size of a recipe's base model is written down."""
    return FOLDER / "models" / config.model.name.rpartition("/")[2]


def offline_config(name: str) -> RunConfig:
    """Return a recipe's run config with a base model that has a size and no weights.

    Raises:
        ConfigError: There is no such recipe, or a key or value in it is wrong.
    """
    config = load_app_config(APP, [str(FOLDER / f"{name}.toml")])
    return replace(config, model=replace(config.model, name=str(model_folder(config))))


def row(name: str) -> list[str]:
    """Return a recipe's cells, in the order of ``HEADER``.

    Raises:
        ConfigError: ``trunk.activation-memory`` is less than what the clients of a round keep there.
    """
    config = offline_config(name)
    run = dry_run(config)
    check_activation_memory(config, run)
    whole = dry_run(config, whole=True)
    client, trunk, unsplit = (
        client_memory(config, run),
        trunk_memory(config, run),
        client_memory(config, whole),
    )
    step = step_bytes(config, run, experiment_name(config))
    adapter = run.parts[CLIENT].trained_bytes
    micro_batches = config.train.gradient_accumulation_steps
    of_round = config.train.local_steps * (step.sent + step.received) + 2 * adapter
    of_run = config.num_server_rounds * clients_at_once(config) * of_round
    return [
        f"`{name}`",
        str(clients_at_once(config)),
        *(f"{m.total / _GIB:.1f} ({m.weights / _GIB:.1f})" for m in (client, trunk, unsplit)),
        f"{max(step.sent, step.received) / _MIB:.1f}",
        *(f"{micro_batches * run.parts[p].flops / _TERA:.2f}" for p in (CLIENT, TRUNK)),
        f"{adapter / _MIB:.1f}",
        f"{of_run / _GIB:,.0f}",
    ]


def clients_at_once(config: RunConfig) -> int:
    """Return how many clients train in a round."""
    return num_participants(config.num_clients, config.fraction_train)


def check_activation_memory(config: RunConfig, run: DryRun) -> None:
    """Check that the trunk may keep what all clients of a round have it keep at once.

    Raises:
        ConfigError: It may not; names the need.
    """
    rows, positions, width = run.hidden_shape
    arrived = rows * positions * width * run.hidden_dtype.itemsize
    each = config.train.micro_batches_in_flight * (run.parts[TRUNK].waiting_bytes + arrived)
    need = clients_at_once(config) * each / _GIB
    if need > config.trunk.activation_memory:
        raise ConfigError(
            f"trunk.activation-memory must be at least {need:.1f} GiB, which {clients_at_once(config)} "
            f"clients have the trunk keep at once; it is {config.trunk.activation_memory}. Raise it, or "
            "use a smaller train.batch-size with more train.gradient-accumulation-steps."
        )


def line(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, one row as soon as it is planned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="default: all of this folder")
    names = parser.parse_args(arguments).recipes or recipe_names()
    print(line(HEADER))
    print(line([":---"] + ["---:"] * (len(HEADER) - 1)))
    for name in names:
        print(line(row(name)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
