"""The command that simulates a federation: its options, and the function that it calls."""

import argparse
from pathlib import Path


def add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``simulate``, with its function as the default ``handler``."""
    parser = commands.add_parser(
        "simulate",
        help="predict a federation's rounds for any number of clients, links and machines",
        description="Simulates rounds event by event, with the costs of flower-split plan (an app's "
        "directory) or those that a real run measured (a run's directory). Needs the extra simulate.",
    )
    parser.add_argument("job", type=Path, help="an app's directory, or a run's")
    for name, what in (("clients", "of the federation"), ("cohort", "that train in a round")):
        parser.add_argument(
            f"--{name}",
            type=_numbers,
            default=(),
            metavar="N[,N…]",
            help=f"clients {what}, one or several numbers; default: the run config's",
        )
    parser.add_argument(
        "--link",
        action="append",
        metavar="MBIT:MS[:SHARE]",
        help="a client's link: megabits a second each way (inf: no limit), milliseconds there and back; "
        "again for another share of the clients; default: 100:20",
    )
    parser.add_argument(
        "--slower",
        action="append",
        default=[],
        metavar="FACTOR:SHARE",
        help="a share of the clients computes so many times as long; again for another",
    )
    _add_machines(parser)
    parser.add_argument(
        "--cost",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a cost in seconds or bytes instead of the plan's or the run's; again for another",
    )
    for name, what in (
        ("trunk-hour", "an hour of the trunk's machine"),
        ("client-hour", "an hour of a client at work"),
        ("gigabyte", "a gigabyte on the wire"),
    ):
        parser.add_argument(
            f"--price-{name}", type=float, default=0.0, metavar="P", help=f"of {what}"
        )
    parser.add_argument("--rounds", type=int, default=1, help="how many are simulated; 1")
    parser.add_argument("--json", action="store_true", help="print costs and predictions as JSON")
    parser.add_argument(
        "--run-config", "-c", action="append", metavar="KEY=VALUE …", help="as for run"
    )
    parser.set_defaults(handler=_simulate)


def _add_machines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trunk-link",
        type=float,
        default=10_000.0,
        metavar="MBIT",
        help="megabits a second of the trunk, each way, and of the ServerApp; 10,000",
    )
    for party in ("client", "trunk"):
        parser.add_argument(
            f"--{party}-gflops",
            type=float,
            default=0.0,
            metavar="N",
            help=f"with an app: 1e9 operations a second of the {party}'s machine; default: this one's",
        )
    parser.add_argument(
        "--replicas",
        type=int,
        default=1,
        help="a what-if: so many trunks that step together; a run has one",
    )
    parser.add_argument(
        "--cores",
        type=int,
        default=0,
        help="all clients and the trunk share so many cores, as in a simulation; 0: a machine each",
    )
    parser.add_argument(
        "--places",
        type=int,
        default=768,
        help="a what-if: so many waiting calls that the trunk holds; a trunk holds 768",
    )


def _numbers(text: str) -> tuple[int, ...]:
    """Return whole numbers between commas; 1e6 is one."""
    return tuple(int(float(part)) for part in text.split(","))


def _simulate(arguments: argparse.Namespace) -> int:
    import importlib.util

    from flower_split.errors import ConfigError

    if importlib.util.find_spec("simpy") is None:
        raise ConfigError(
            "flower-split simulate needs simpy, which is not installed. Install it: "
            "pip install 'flower-split[simulate]'."
        )
    from flower_split.cli.simulate import SimulateCommand, simulate
    from flower_split.scale.setting import Prices

    return simulate(
        SimulateCommand(
            job=arguments.job,
            run_config=arguments.run_config,
            clients=arguments.clients,
            cohort=arguments.cohort,
            links=arguments.link or ("100:20",),
            slower=arguments.slower,
            hub_megabits=arguments.trunk_link,
            replicas=arguments.replicas,
            cores=arguments.cores,
            places=arguments.places,
            rounds=arguments.rounds,
            costs=arguments.cost,
            client_gflops=arguments.client_gflops,
            trunk_gflops=arguments.trunk_gflops,
            prices=Prices(
                trunk_hour=arguments.price_trunk_hour,
                client_hour=arguments.price_client_hour,
                gigabyte=arguments.price_gigabyte,
            ),
            as_json=arguments.json,
        )
    )
