"""Certificates and secrets in files: readable, private, valid today and for a while."""

import datetime
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from cryptography import x509

from flower_split.cli.doctor.findings import Finding, ok, problem, warning
from flower_split.config import TrunkConfig
from flower_split.errors import ConfigError
from flower_split.runtime.secret_files import TOKEN_VARIABLE, read_secret, token_in

_SOON = datetime.timedelta(days=14)


def certificate(name: str, path: Path, now: datetime.datetime | None = None) -> Finding:
    """Examine the certificates in a PEM file.

    Args:
        name: What they are for, such as "trunk.root-certificates".
        path: The file.
        now: The time; None: this machine's clock.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    try:
        found = x509.load_pem_x509_certificates(path.expanduser().read_bytes())
    except (OSError, ValueError) as error:
        return problem(name, f"{path} cannot be read: {error}", "Give a readable PEM file.")
    first_end = min(item.not_valid_after_utc for item in found)
    begins = max(item.not_valid_before_utc for item in found)
    text = f"{path} is valid until {first_end:%Y-%m-%d %H:%M} UTC"
    renew = "Make a new one (flower-split certs, or your own CA) and restart what uses it."
    if begins > now:
        return problem(
            name,
            f"{path} is valid from {begins:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} here",
            "Set this machine's clock; or wait, if it is right.",
        )
    if first_end <= now:
        return problem(name, f"{path} has ended, at {first_end:%Y-%m-%d %H:%M} UTC", renew)
    return warning(name, text, renew) if first_end - now < _SOON else ok(name, text)


def secret(name: str, path: Path) -> Finding:
    """Examine a token file: there, not empty, its owner's alone.

    Args:
        name: Of the setting, such as "trunk.token-file".
        path: The file.
    """
    try:
        read_secret(path, name)
    except ConfigError as error:
        return problem(name, str(error), "Do what it says, then run doctor again.")
    return ok(name, f"{path} is readable and private")


def token_of_environment(environment: Mapping[str, str]) -> Finding:
    """Examine the token of an app that names no file."""
    if not environment.get(TOKEN_VARIABLE, "").strip():
        return warning(
            TOKEN_VARIABLE,
            "is not set here, and trunk.token-file names no file: the trunk was not asked",
            "Where the ServerApp runs, set the variable for its SuperLink, or name a file. Where jobs are "
            "submitted alone, nothing: the ServerApp asks the trunk.",
        )
    try:
        token_in(environment, "trunk.token-file")
    except ConfigError as error:
        return problem(TOKEN_VARIABLE, str(error), "Set it to the first line of the trunk's file.")
    return ok(TOKEN_VARIABLE, "is set, and long enough")


def app_credentials(trunk: TrunkConfig) -> Iterator[Finding]:
    """Examine what an app's configuration names; empty names are passed over."""
    if trunk.root_certificates:
        yield certificate("trunk.root-certificates", Path(trunk.root_certificates))
    if trunk.client_certificate:
        yield certificate("trunk.client-certificate", Path(trunk.client_certificate))
    if trunk.token_file:
        yield secret("trunk.token-file", Path(trunk.token_file))
    else:
        yield token_of_environment(os.environ)
