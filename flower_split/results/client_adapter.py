"""Read the adapter that a run's clients ended with: one for all, or one client's own.

Where the method keeps factors private (FedSA-LoRA), there is no global model: the run directory has
the shared factors, each client's directory has its own. Together they are that client's model.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flower_split.aggregation import AGGREGATORS, Aggregator
from flower_split.errors import AggregationError, ConfigError, RunDirectoryError
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import FOLDER as CHECKPOINTS
from flower_split.runs.manifest import RunCheckpoints
from flower_split.runs.private_factors import FOLDER as CLIENTS
from flower_split.runs.private_factors import OPTIMIZER, PrivateFolder, digests_of


@dataclass(frozen=True, kw_only=True, slots=True)
class OneClient:
    """One client, whose own model is meant."""

    partition_id: int
    client_dir: Path | None = None  # its directory; None: train.client-dir, or the run directory's


def one_client(partition_id: int | None, client_dir: Path | None) -> OneClient | None:
    """Return the client that the command line's ``--client`` and ``--client-dir`` name together.

    Raises:
        ConfigError: There is a directory without a client.
    """
    if partition_id is None and client_dir is not None:
        raise ConfigError(
            "--client-dir says where a client keeps its factors; name it by --client."
        )
    if partition_id is None:
        return None
    return OneClient(partition_id=partition_id, client_dir=client_dir)


def run_method(run: RunDirectory) -> type[Aggregator]:
    """Return the aggregation method of a run.

    Raises:
        RunDirectoryError: This version does not know it.
    """
    try:
        return AGGREGATORS.get(run.config.strategy.aggregator)
    except AggregationError as error:
        raise RunDirectoryError(
            f"{run.path / 'config.json'}: {error} Or read the run with the version in its "
            "versions.json."
        ) from error


def read_client_adapter(run: RunDirectory, client: OneClient | None = None) -> dict[str, Tensor]:
    """Return the final adapter of bottom and top, by tensor name.

    Args:
        run: A finished run's directory.
        client: Whose own; None where the run has one adapter for all.

    Raises:
        RunDirectoryError: The run did not finish; or its method keeps factors private and no client
            is named, or what that client keeps cannot be read; or it keeps none and one is named.
    """
    state = run.read_adapter("client")
    method = run_method(run)
    if not method.private:
        if client is not None:
            raise RunDirectoryError(
                f'strategy.aggregator = "{method.name}" gives one adapter for all clients, so that '
                f"partition {client.partition_id} has none of its own. Leave --client out."
            )
        return state
    if client is None:
        raise RunDirectoryError(
            f'strategy.aggregator = "{method.name}" has no global adapter: factor '
            f"{' and '.join(sorted(method.private))} of every module is each client's own, and stays "
            "with it. Name one client with --client PARTITION, where its directory can be read."
        )
    last = RunCheckpoints(run.path / CHECKPOINTS).latest()
    digest = digests_of(last.strategy).get(client.partition_id) if last else None
    if last is None or digest is None:
        raise RunDirectoryError(
            f"partition {client.partition_id} took part in no committed round of {run.path}, so that "
            "it has no factors of its own. Name another one with --client."
        )
    named = client.client_dir or run.config.train.client_dir or run.path / CLIENTS
    folder = PrivateFolder.of(Path(named).expanduser(), last.entry.experiment, client.partition_id)
    own = {n: value for n, value in folder.read(digest).items() if not n.startswith(OPTIMIZER)}
    unknown = sorted(own.keys() - state.keys())
    if unknown:
        raise RunDirectoryError(
            f"the file of partition {client.partition_id} has {unknown[0]}, which is not in the run's "
            "adapter. Name the directory of this run's client with --client-dir."
        )
    return state | own
