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
    _add_certs(commands)
    _add_doctor(commands)
    _add_plan(commands)
    _add_worker(commands)
    _add_supernode(commands)


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


def _add_worker(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    worker = commands.add_parser(
        "worker",
        help="show this user's workers on this machine, end them, or start one",
        description="A deployed client's worker keeps model and data between a node's messages. It is "
        "started by the first message of a run, and ends with its SuperNode, with the first message of "
        "another run, or after ten minutes without a message. --start starts one beforehand.",
    )
    worker.add_argument("node", nargs="?", type=int, help="Flower's id of the node; default: all")
    what = worker.add_mutually_exclusive_group()
    what.add_argument(
        "--end", action="store_true", help="end them, each when it has answered its message"
    )
    what.add_argument(
        "--start",
        action="store_true",
        help="start the node's worker before its first message, with this command's environment",
    )
    worker.add_argument(
        "--idle",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="with --start: without a message, after which it ends (600)",
    )
    worker.set_defaults(handler=_worker)


def _worker(arguments: argparse.Namespace) -> int:
    from flower_split.cli.worker import show_workers, start_beforehand

    if arguments.start:
        return start_beforehand(arguments.node, idle=arguments.idle)
    return show_workers(arguments.node, end=arguments.end)


def _add_supernode(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    supernode = commands.add_parser(
        "supernode",
        help="Flower's SuperNode, whose ClientApps start at once; takes flower-supernode's options",
        add_help=False,  # --help is flower-supernode's own
        prefix_chars="\0",  # nothing is an option here: all goes on as it is
    )
    supernode.add_argument("arguments", nargs="*")
    supernode.set_defaults(handler=_supernode)


def _supernode(arguments: argparse.Namespace) -> int:
    from flower_split.client.launcher.supernode import run_supernode

    run_supernode(arguments.arguments)
