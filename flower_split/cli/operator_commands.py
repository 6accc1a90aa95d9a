"""Commands of who sets up and runs machines: their options, and the function that each calls.

Every function imports what it needs: torch and Flower take seconds to load.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flower_split.cli.trunk_login import TrunkLogin
    from flower_split.wire.client_certificate import ClientCertificate


def add_operator_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the commands, each with its function as the default ``handler``."""
    _add_new(commands)
    _add_certs(commands)
    _add_doctor(commands)
    _add_plan(commands)
    _add_status(commands)
    _add_release(commands)
    _add_revoke(commands)
    _add_health(commands)
    _add_worker(commands)


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


def _add_certs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    certs = commands.add_parser(
        "certs",
        help="make a development CA, and certificates of a server and of clients",
        description="Writes ca.crt, server.crt and server.key (for the trunk and for the SuperLink), and "
        "for each client its certificate and key for the trunk (NAME.crt, NAME.key) and its key pair for "
        "Flower's SuperLink (NAME.node, NAME.node.pub). A CA that is there signs again; no file is "
        "replaced.",
    )
    certs.add_argument("directory", type=Path, help="where the files go; their owner's alone")
    certs.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="HOST",
        help="a DNS name or address of the server; again for each; this machine's loopback is in",
    )
    certs.add_argument(
        "--client", action="append", default=[], metavar="NAME", help="again for each client"
    )
    certs.add_argument("--days", type=int, default=90, help="until they end; 90")
    certs.set_defaults(handler=_certs)


def _certs(arguments: argparse.Namespace) -> int:
    from flower_split.cli.certs import CertsCommand, write_certificates

    return write_certificates(
        CertsCommand(
            directory=arguments.directory,
            hosts=arguments.host,
            clients=arguments.client,
            days=arguments.days,
        )
    )


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="examine this machine, and say what to do about what it finds",
        description="Examines versions, accelerator, disks, shared memory, file limits, proxies, "
        "Flower's SuperLink and clock; with an app whose trunk.address is set, its trunk, token and "
        "certificates too. Exits with 0 where nothing would stop a run, else with 1.",
    )
    doctor.add_argument("app", nargs="?", type=Path, help="the app's directory")
    doctor.add_argument(
        "superlink", nargs="?", help="a SuperLink connection of Flower's config.toml"
    )
    doctor.add_argument(
        "--listen",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a port that shall be free here, such as the trunk's; again for each",
    )
    doctor.add_argument(
        "--certificate",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a PEM file of this machine that shall be valid; again for each",
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument(
        "--run-config", "-c", action="append", metavar="KEY=VALUE …", help="as for run"
    )
    doctor.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from flower_split.cli.doctor.command import DoctorCommand, doctor

    return doctor(
        DoctorCommand(
            app=arguments.app,
            superlink=arguments.superlink,
            run_config=arguments.run_config,
            listen=arguments.listen,
            certificates=arguments.certificate,
            as_json=arguments.json,
        )
    )


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser(
        "plan",
        help="say what memory, bytes and seconds a job needs, before any weight is loaded",
        description="Reads the model's configuration alone. Seconds are by the rates given, or by a probe "
        "of this machine.",
    )
    plan.add_argument("app", type=Path, help="the app's directory")
    plan.add_argument(
        "--link", type=float, default=100.0, metavar="MBIT", help="megabits a second, of one client"
    )
    plan.add_argument(
        "--latency", type=float, default=20.0, metavar="MS", help="milliseconds, there and back"
    )
    for party in ("client", "trunk"):
        plan.add_argument(
            f"--{party}-gflops",
            type=float,
            default=0.0,
            metavar="N",
            help=f"1e9 operations a second that the {party}'s machine does; default: this one's",
        )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument(
        "--run-config", "-c", action="append", metavar="KEY=VALUE …", help="as for run"
    )
    plan.set_defaults(handler=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from flower_split.cli.plan.command import PlanCommand, plan

    return plan(
        PlanCommand(
            app=arguments.app,
            run_config=arguments.run_config,
            link=arguments.link,
            latency=arguments.latency,
            client_gflops=arguments.client_gflops,
            trunk_gflops=arguments.trunk_gflops,
            as_json=arguments.json,
        )
    )


def _add_status(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    status = commands.add_parser(
        "status",
        help="show who is in a trunk's round, who is waited for and since when, and how fast it goes",
    )
    _add_trunk_address(status)
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


def _add_trunk_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", help="HOST:PORT of the trunk")
    parser.add_argument(
        "--token-file", required=True, type=Path, metavar="FILE", help="the coordinator's token"
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
    )


def _certificate(arguments: argparse.Namespace) -> "ClientCertificate":
    from flower_split.wire.client_certificate import ClientCertificate

    return ClientCertificate(arguments.client_certificate, arguments.client_key)


def _add_worker(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    worker = commands.add_parser(
        "worker",
        help="show this user's workers on this machine, or end them",
        description="A deployed client's worker keeps model and data between a node's messages. It is "
        "started by the first message of a run, and ends with its SuperNode, with the first message of "
        "another run, or after ten minutes without a message.",
    )
    worker.add_argument("node", nargs="?", type=int, help="Flower's id of the node; default: all")
    worker.add_argument(
        "--end", action="store_true", help="end them, each when it has answered its message"
    )
    worker.set_defaults(handler=_worker)


def _worker(arguments: argparse.Namespace) -> int:
    from flower_split.cli.worker import show_workers

    return show_workers(arguments.node, end=arguments.end)
