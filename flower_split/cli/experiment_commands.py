"""The commands of a researcher: ``sweep``, ``report`` and ``watch``."""

import argparse
from pathlib import Path


def add_experiment_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the commands, each with its function as the default ``handler``."""
    _add_sweep(commands)
    _add_report(commands)
    _add_watch(commands)


def _add_sweep(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    sweep = commands.add_parser(
        "sweep",
        help="run a grid of configurations and their baselines, and print one table",
        description="Runs what is missing, without SuperLink (as run --local), a directory each; then "
        "writes results.csv,\na table and a figure with deviations over seeds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument(
        "what", type=Path, metavar="APP", help="the app's directory; or a sweep's TOML file"
    )
    sweep.add_argument(
        "--grid",
        metavar="'KEY=VALUE,VALUE …'",
        help="every combination runs; the first value of a key is what the others are compared with",
    )
    sweep.add_argument(
        "--baselines",
        metavar="NAME,…",
        help="central, alone, federated, sequential, splitfed-v1, splitfed-v2; default: none",
    )
    sweep.add_argument(
        "--also",
        action="append",
        metavar="'KEY=VALUE …'",
        help="one further variant beside the grid, with every seed; may be given several times",
    )
    sweep.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="where all of it goes"
    )
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    sweep.add_argument(
        "--run-config",
        "-c",
        action="append",
        metavar="KEY=VALUE …",
        help="override the app's configuration in every run",
    )
    _add_limits(sweep)
    sweep.set_defaults(handler=_sweep)


def _add_limits(sweep: argparse.ArgumentParser) -> None:
    asked = sweep.add_argument_group("what a quality costs, from the curves of the runs")
    for name, unit, what in (
        ("--budget-mb", "MB", "quality within a budget of bytes, in millions, of all clients"),
        ("--budget-seconds", "SECONDS", "quality within a budget of time"),
        ("--target-perplexity", "X", "what it cost to get there"),
    ):
        asked.add_argument(name, type=float, default=0.0, metavar=unit, help=what)
    asked.add_argument(
        "--robust-over",
        default="",
        metavar="KEY",
        help="how much worse every variant ends at the other values of this key of the grid",
    )


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = commands.add_parser(
        "report",
        help="write one HTML page about a run, or about several beside each other",
        description="The page needs no network. Of one run, also of one that goes on, it is "
        "RUN/report.html by default.",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    report.add_argument(
        "--form",
        default="html",
        metavar="NAME",
        help="another report: a plug-in's name, or an import path",
    )
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="the page; of several runs: needed"
    )
    report.add_argument(
        "--figures", type=Path, metavar="DIR", help="write every chart there as PNG and PDF, too"
    )
    report.set_defaults(handler=_report)


def _add_watch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    watch = commands.add_parser(
        "watch",
        help="show the page about a run in the browser while the run goes on",
        description="Serves the page on this machine alone, and prints its address. It is made anew when "
        "the run has\nmeasured something. Ctrl-C ends the watching, not the run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    watch.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    watch.add_argument("--port", type=int, default=0, help="default: any free one")
    watch.add_argument(
        "--every", type=float, default=5.0, metavar="SECONDS", help="from one look to the next"
    )
    watch.set_defaults(handler=_watch)


def _sweep(arguments: argparse.Namespace) -> int:
    # Torch and Flower take seconds to load: only the command that needs them does.
    from flower_split.cli.sweep import SweepCommand, sweep
    from flower_split.experiments.protocols import Limits

    return sweep(
        SweepCommand(
            what=arguments.what,
            grid=arguments.grid,
            also=arguments.also,
            baselines=arguments.baselines,
            out=arguments.out,
            jobs=arguments.jobs,
            run_config=arguments.run_config,
            limits=Limits(
                megabytes=arguments.budget_mb,
                seconds=arguments.budget_seconds,
                perplexity=arguments.target_perplexity,
                harder=arguments.robust_over,
            ),
        )
    )


def _report(arguments: argparse.Namespace) -> int:
    from flower_split.cli.report import ReportCommand, report

    return report(
        ReportCommand(
            runs=arguments.runs,
            form=arguments.form,
            out=arguments.out,
            figures=arguments.figures,
        )
    )


def _watch(arguments: argparse.Namespace) -> int:
    from flower_split.cli.watch import WatchCommand, watch

    return watch(WatchCommand(runs=arguments.runs, port=arguments.port, seconds=arguments.every))
