"""What can be known of a run before anything is loaded: its directory, its model, its data.

Nothing here imports torch, so that a command answers within seconds; the ServerApp runs the same
checks for a plain ``flwr run``.
"""

from pathlib import Path

from flower_split.config import RunConfig
from flower_split.errors import ConfigError, DataError
from flower_split.runs.files import check_new_directory, read_config
from flower_split.runs.resuming import check_may_change

_PARTITION = "{partition_id}"
_PATH_BEGINS = ("/", "./", "../", "~")


def check_directory(config: RunConfig) -> None:
    """Check that the run's directory is empty, or, of a resumed run, that it may go on so.

    Raises:
        RunDirectoryError: It is not, or may not.
    """
    if config.resume:
        check_may_change(read_config(Path(config.resume).expanduser()), config)
    elif config.run_dir:
        check_new_directory(Path(config.run_dir).expanduser().absolute())


def check_files(config: RunConfig, *, simulated: bool) -> None:
    """Check that the local files that the configuration names are there.

    Args:
        config: The run's configuration; relative paths are meant from the working directory.
        simulated: Whether the clients run on this machine, so that their data must be here.

    Raises:
        ConfigError: A model, a token file or a certificate is missing.
        DataError: Data is missing.
    """
    name = config.model.name
    if name.startswith(_PATH_BEGINS) and not Path(name).expanduser().is_dir():
        raise ConfigError(
            f"model.name must be a hub id, or a directory with a model; there is no directory "
            f"{name}. Correct the path."
        )
    for key, value in (
        ("trunk.token-file", config.trunk.token_file),
        ("trunk.root-certificates", config.trunk.root_certificates),
        ("trunk.client-certificate", config.trunk.client_certificate),
        ("trunk.client-key", config.trunk.client_key),
    ):
        if config.trunk.address and value and not Path(value).expanduser().is_file():
            raise ConfigError(f"{key}: there is no file {value}. Give a readable file.")
    if simulated:
        _check_data(config)


def _check_data(config: RunConfig) -> None:
    data = config.data
    if data.source == "hub":
        if data.dataset.startswith(_PATH_BEGINS) and not Path(data.dataset).expanduser().exists():
            raise DataError(
                f"data.dataset must be a hub id, or a file or directory; {data.dataset} does not "
                "exist. Correct the path."
            )
        return
    for key, named in (("data.path", data.path), ("data.eval-path", data.eval_path)):
        if named:
            _check_paths(key, named, config.num_clients)


def _check_paths(key: str, named: str, num_clients: int) -> None:
    for partition in range(num_clients if _PARTITION in named else 1):
        path = Path(named.replace(_PARTITION, str(partition))).expanduser()
        if not path.exists():
            whose = f" of partition {partition}" if _PARTITION in named else ""
            raise DataError(
                f"{key} must name a file or directory; {path}{whose} does not exist. Correct {key}, or "
                "num-clients where there are fewer files."
            )
