"""The command line of ``flower-split``."""

import argparse
from pathlib import Path

from flower_split.cli.bench import add_bench
from flower_split.cli.experiment_commands import add_experiment_commands
from flower_split.cli.operator_commands import add_operator_commands
from flower_split.cli.scale_commands import add_simulate
from flower_split.cli.trunk_commands import add_tls_options, add_trunk_commands
from flower_split.runs.resuming import resume_table
from flower_split.runtime.exit_codes import exit_code_table
from flower_split.runtime.logs import FORMATS, LEVELS

_RUN_EPILOG = f"""exit status:
{exit_code_table()}

Ctrl-C or SIGTERM stops the run; a second Ctrl-C within five seconds leaves it running, and
flower-split attach RUN follows it again.

--resume RUN goes on after the last committed round, with the configuration in RUN/config.json.
What may change then, by --run-config:
{resume_table()}
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="flower-split",
        description="Federated split fine-tuning of transformers on Flower.",
        epilog=f"exit status:\n{exit_code_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_attach(commands)
    _add_trunk(commands)
    _add_audit_log(commands)
    _add_export(commands)
    _add_generate(commands)
    add_experiment_commands(commands)
    add_operator_commands(commands)
    add_trunk_commands(commands)
    add_bench(commands)
    add_simulate(commands)
    return parser


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = commands.add_parser(
        "run",
        help="check that an app can run, run it, and tell its true outcome",
        description="Checks, then runs an app as `flwr run` does, and exits with its true outcome. "
        "A simulation runs\nunder a SuperLink of its own, on free ports, which ends with it.",
        epilog=_RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("app", type=Path, help="the app's directory (with its pyproject.toml)")
    run.add_argument(
        "superlink",
        nargs="?",
        help="a SuperLink connection of Flower's config.toml; default: Flower's, usually local",
    )
    run.add_argument(
        "--local",
        action="store_true",
        help="simulate without SuperLink and Ray: the same apps, in processes forked from this one",
    )
    run.add_argument("--federation-config", help="as for flwr run; default: what the job needs")
    run.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run of this run directory"
    )
    _add_stream(run)
    _add_run_config(run)


def _add_attach(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    attach = commands.add_parser(
        "attach",
        help="follow a run that was left running, to its end",
        epilog=f"exit status:\n{exit_code_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    attach.add_argument("run", help="the run directory; or Flower's run id, at a SuperLink")
    attach.add_argument("superlink", nargs="?", help="with a run id: its SuperLink connection")
    attach.add_argument("--stop", action="store_true", help="stop the run instead")
    _add_stream(attach)


def _add_certificates(trunk: argparse.ArgumentParser) -> None:
    trunk.add_argument("--tls-certificate", default="", help="PEM file; required off loopback")
    trunk.add_argument("--tls-key", default="", help="PEM file")
    trunk.add_argument(
        "--client-ca",
        default="",
        metavar="FILE",
        help="PEM file: whoever calls must show a certificate that this CA signed",
    )
    for role in ("client", "coordinator"):
        trunk.add_argument(
            f"--allow-{role}",
            action="append",
            default=[],
            metavar="SUBJECT",
            help=f"common name or alternative name of a {role}'s certificate, or @FILE with one a line, "
            "read again when it changes; again for each; default: whoever the CA signed",
        )


def _add_trunk(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    trunk = commands.add_parser(
        "trunk",
        help="serve the trunk of an app on this machine",
        description="Serves until it gets SIGINT or SIGTERM. Clients and the ServerApp reach it by "
        "trunk.address; the ServerApp needs the same token file as trunk.token-file.",
    )
    trunk.add_argument("app", type=Path, help="the app's directory (with its pyproject.toml)")
    trunk.add_argument("--listen", required=True, metavar="HOST:PORT", help="port 0: any free one")
    trunk.add_argument(
        "--token-file", required=True, type=Path, help="the coordinator's token; made if missing"
    )
    trunk.add_argument(
        "--coordinator",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a further coordinator and its token's file, with experiments that no other coordinator sees, "
        "where trunk.max-experiments is above 1; again for each",
    )
    _add_certificates(trunk)
    trunk.add_argument(
        "--checkpoints",
        default="",
        metavar="DIR",
        help="keep every round there, so that a run goes on after this process was lost",
    )
    trunk.add_argument(
        "--metrics-listen",
        default="",
        metavar="HOST:PORT",
        help="serve figures for Prometheus there, at /metrics, as plain HTTP; needs the extra metrics",
    )
    trunk.add_argument(
        "--health-listen",
        default="",
        metavar="HOST:PORT",
        help="also answer health checks there, on loopback, without TLS: for a probe that has no client "
        "certificate",
    )
    trunk.add_argument(
        "--audit-log",
        default="",
        metavar="FILE",
        help="append every call there: who, what, its outcome; see flower-split audit-log verify",
    )
    trunk.add_argument("--log-level", default="", choices=LEVELS, help="info by default")
    trunk.add_argument(
        "--log-format",
        default="text",
        choices=FORMATS,
        help="json: an object on each line, with time, level, experiment, round, attempt and slot",
    )
    _add_run_config(trunk)


def _add_audit_log(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    log = commands.add_parser(
        "audit-log",
        help="check a trunk's audit log",
        description="Checks the hash chain of an audit log's files, and prints its last hash, beside "
        "which lines that were cut off at the end would show.",
    )
    log.add_argument("action", choices=("verify",), help="that no line was changed or taken out")
    log.add_argument("files", nargs="+", type=Path, help="of one log, oldest first")


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    export = commands.add_parser(
        "export", help="write a run's bottom, trunk and top as one standard PEFT adapter"
    )
    export.add_argument("run", type=Path, help="the run directory")
    export.add_argument("--out", required=True, type=Path, help="where the adapter goes")
    export.add_argument(
        "--base",
        default="",
        metavar="NAME",
        help="how the adapter names its base model: a hub id, or a path on the reader's machine; "
        "default: the run's hub id, or the content digest of its local model",
    )
    _add_cuts(export)
    _add_client(export)


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt with the model that a run ended with",
        description="Without --prompt it reads prompts line by line, until the input ends. Text is "
        "shown as it comes.",
    )
    generate.add_argument("run", type=Path, help="the run directory")
    generate.add_argument("--prompt", help="text to continue")
    generate.add_argument(
        "--samples",
        type=Path,
        metavar="FILE",
        help="continue every line of FILE with the base model and with the run's, and keep both for the "
        "run's report",
    )
    generate.add_argument(
        "--chat",
        action="store_true",
        help="the prompts are messages of a conversation, in the tokenizer's chat template",
    )
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--num-beams", type=int, default=1)
    generate.add_argument("--seed", type=int, default=0)
    _add_cuts(generate)
    _add_client(generate)
    generate.add_argument(
        "--trunk-address",
        default="",
        metavar="HOST:PORT",
        help="of a trunk server that holds the run's trunk; default: load it here",
    )
    generate.add_argument("--token-file", default="", help="the trunk server's")
    add_tls_options(generate)


def _add_stream(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stream", action="store_true", help="show every log line, not only progress"
    )


def _add_client(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--client",
        type=int,
        metavar="PARTITION",
        help="this client's own model, where strategy.aggregator leaves factors with each client",
    )
    parser.add_argument(
        "--client-dir",
        type=Path,
        metavar="DIR",
        help="with --client: where that client keeps them; default: train.client-dir, or RUN/clients",
    )


def _add_cuts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cuts",
        default="",
        metavar="FIRST:SECOND",
        help="the model of a client with these cut layers of its own; default: the run's",
    )


def _add_run_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-config",
        "-c",
        action="append",
        metavar="KEY=VALUE …",
        help="override the app's configuration, as for flwr run",
    )
