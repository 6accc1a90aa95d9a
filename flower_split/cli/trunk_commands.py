"""Commands that ask a trunk that runs: their options, and the function that each calls.

Every function imports what it needs: torch and Flower take seconds to load.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flower_split.cli.trunk_login import TrunkLogin
    from flower_split.wire.client_certificate import ClientCertificate


def add_trunk_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands, each with its function as the default ``handler``."""
    _add_status(commands)
    _add_release(commands)
    _add_revoke(commands)
    _add_health(commands)


def _add_status(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    status = commands.add_parser(
        "status",
        help="show who is in a trunk's round, who is waited for and since when, and how fast it goes",
    )
    _add_trunk_address(status)
    _add_experiment(status)
    status.add_argument("--json", action="store_true", help="print JSON, a line for each look")
    status.add_argument(
        "--watch",
        nargs="?",
        const=2.0,
        type=float,
        metavar="SECONDS",
        help="look again and again, every 2 seconds or as often as said, until Ctrl-C",
    )
    status.set_defaults(handler=_status)


def _status(arguments: argparse.Namespace) -> int:
    from flower_split.cli.status import StatusCommand, show_status

    return show_status(
        StatusCommand(
            trunk=_trunk(arguments),
            as_json=arguments.json,
            watch=arguments.watch,
        )
    )


def _add_release(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    release = commands.add_parser(
        "trunk-release",
        help="free a trunk from the open round of a run that has gone",
        description="Gives the trunk's open round up, so that another run may begin. Committed rounds "
        "stay, and the run can be resumed.",
    )
    _add_trunk_address(release)
    _add_experiment(release)
    release.add_argument(
        "--force", action="store_true", help="also where the round's clients are at work"
    )
    release.set_defaults(handler=_release)


def _release(arguments: argparse.Namespace) -> int:
    from flower_split.cli.trunk_release import ReleaseCommand, release

    return release(
        ReleaseCommand(
            trunk=_trunk(arguments),
            force=arguments.force,
        )
    )


def _add_revoke(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    revoke = commands.add_parser(
        "trunk-revoke",
        help="take one client out of the experiment that a trunk serves, at once",
        description="The client's token is unknown from now on. The round goes on without it, or is given "
        "up, as trunk.on-bad-client and trunk.quorum say; the client stays out in later rounds, until the "
        "trunk is restarted.",
    )
    _add_trunk_address(revoke)
    _add_experiment(revoke)
    who = revoke.add_mutually_exclusive_group(required=True)
    who.add_argument("--slot", type=int, metavar="N", help="the client's data partition")
    who.add_argument(
        "--subject", default="", help="a name in the certificate that the client calls with"
    )
    revoke.set_defaults(handler=_revoke)


def _revoke(arguments: argparse.Namespace) -> int:
    from flower_split.cli.trunk_revoke import RevokeCommand, revoke

    return revoke(
        RevokeCommand(
            trunk=_trunk(arguments),
            slot=arguments.slot,
            subject=arguments.subject,
        )
    )


def _add_health(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    health = commands.add_parser(
        "health",
        help="ask a trunk whether it serves; exits with 0 where it does",
        description="gRPC's standard health check, with TLS and without a credential: a probe for "
        "containers.",
    )
    health.add_argument("address", metavar="ADDRESS", help="HOST:PORT of the trunk")
    add_tls_options(health)
    health.set_defaults(handler=_health)


def _health(arguments: argparse.Namespace) -> int:
    from flower_split.cli.health import health

    return health(
        arguments.address, arguments.root_certificates, _certificate(arguments), arguments.proxy
    )


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experiment",
        default="",
        metavar="NAME",
        help="of a trunk that serves several; status without it lists them",
    )


def _add_trunk_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", help="HOST:PORT of the trunk")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="the coordinator's token; without it, FLOWER_SPLIT_TRUNK_TOKEN of the environment",
    )
    add_tls_options(parser)


def add_tls_options(parser: argparse.ArgumentParser) -> None:
    """Add how a command reaches a trunk over TLS."""
    parser.add_argument("--root-certificates", default="", help="PEM file of the CA for TLS")
    parser.add_argument(
        "--client-certificate", default="", help="PEM file shown to a trunk with --client-ca"
    )
    parser.add_argument("--client-key", default="", help="PEM file of that certificate's key")
    parser.add_argument(
        "--proxy",
        default="environment",
        metavar="URL",
        help="HTTP proxy to a trunk off loopback: http://host:port, none, or environment (the default)",
    )


def _trunk(arguments: argparse.Namespace) -> "TrunkLogin":
    from flower_split.cli.trunk_login import TrunkLogin

    return TrunkLogin(
        address=arguments.address,
        token_file=arguments.token_file,
        root_certificates=arguments.root_certificates,
        certificate=_certificate(arguments),
        proxy=arguments.proxy,
        experiment=arguments.experiment,
    )


def _certificate(arguments: argparse.Namespace) -> "ClientCertificate":
    from flower_split.wire.client_certificate import ClientCertificate

    return ClientCertificate(arguments.client_certificate, arguments.client_key)
