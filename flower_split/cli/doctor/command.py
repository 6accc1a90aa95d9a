"""``flower-split doctor``: examine, print, and say by the exit code whether a run may begin here."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flower_split.cli.app_config import load_app
from flower_split.cli.connections import find_connection
from flower_split.cli.doctor import credentials, machine, network
from flower_split.cli.doctor.findings import Finding, Level, problem
from flower_split.cli.doctor.trunk import trunk
from flower_split.cli.overrides import parse_overrides
from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.runtime.exit_codes import COMPLETED, FAILED
from flower_split.runtime.flower_home import flower_home
from flower_split.runtime.secret_files import TOKEN_VARIABLE


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorCommand:
    """What the command line asks for."""

    app: Path | None = None  # whose trunk, token and directories are examined too
    superlink: str | None = None  # name of a SuperLink connection; None: Flower's default
    run_config: Sequence[str] | None = None  # values of --run-config
    listen: Sequence[str] = ()  # host:port that shall be free
    certificates: Sequence[Path] = ()  # PEM files of this machine
    as_json: bool = False


def doctor(command: DoctorCommand) -> int:
    """Examine this machine, print what was found, and return the exit code.

    Raises:
        ConfigError: There is no app where the command says, or its configuration is wrong.
    """
    config = None
    if command.app is not None:
        config = load_app(command.app).config(parse_overrides(command.run_config))
    findings = list(examine(command, config))
    healthy = all(finding.level is not Level.PROBLEM for finding in findings)
    if command.as_json:
        print(json.dumps({"healthy": healthy, "findings": list(map(asdict, findings))}, indent=2))
    else:
        print("\n".join(map(_line, findings)))
    return COMPLETED if healthy else FAILED


def examine(command: DoctorCommand, config: RunConfig | None) -> Iterator[Finding]:
    """Yield what is found, the machine first, then what it reaches."""
    yield machine.versions()
    yield machine.accelerator()
    yield from machine.disks(_places(config))
    yield machine.shared_memory()
    yield machine.open_files()
    yield network.proxies()
    for address in command.listen:
        yield network.can_listen(address)
    for path in command.certificates:
        yield credentials.certificate("certificate", path)
    try:
        yield from network.superlink(find_connection(command.superlink))
    except ConfigError as error:
        yield problem("SuperLink", str(error), "Do what it says, then run doctor again.")
    if config is not None and config.trunk.address:
        yield from credentials.app_credentials(config.trunk)
        if config.trunk.token_file or os.environ.get(TOKEN_VARIABLE):
            yield from trunk(config)


def _places(config: RunConfig | None) -> dict[str, Path]:
    """Return what a run writes, and where."""
    models = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    runs = Path(config.run_dir).expanduser() if config and config.run_dir else Path("runs")
    return {
        "runs": runs,
        "Flower": flower_home(),
        "temporary files": Path(tempfile.gettempdir()),
        "models": models,
    }


def _line(finding: Finding) -> str:
    text = f"{finding.level:<8} {finding.subject}: {finding.text}"
    return text + (f"\n{'':<8} -> {finding.remedy}" if finding.remedy else "")
