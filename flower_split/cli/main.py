"""``flower-split``: run an app, serve a trunk, export a run's adapter.

Exit codes: 0 done; 1 the job failed; 2 the command line or the configuration is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flower_split.errors import ConfigError, FlowerSplitError

FAILED, WRONG_USE = 1, 2


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="flower-split",
        description="Federated split fine-tuning of transformers on Flower.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="check that an app can run, run it, and tell its true outcome",
        description="Like `flwr run`, with checks beforehand and a true exit status: 0 if the run "
        "completed, 1 if it failed, 2 if it cannot start as configured.",
    )
    run.add_argument("app", type=Path, help="the app's directory (with its pyproject.toml)")
    run.add_argument(
        "superlink",
        nargs="?",
        help="a SuperLink connection of Flower's config.toml; default: local",
    )
    run.add_argument("--federation-config", help="as for flwr run; default: what the job needs")
    run.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run of this run directory"
    )
    run.add_argument("--stream", action="store_true", help="show every log line, not only progress")
    _add_run_config(run)

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
    trunk.add_argument("--tls-certificate", default="", help="PEM file; required off loopback")
    trunk.add_argument("--tls-key", default="", help="PEM file")
    trunk.add_argument(
        "--checkpoints",
        default="",
        metavar="DIR",
        help="keep every round there, so that a run goes on after this process was lost",
    )
    _add_run_config(trunk)

    export = commands.add_parser(
        "export", help="write a run's bottom, trunk and top as one standard PEFT adapter"
    )
    export.add_argument("run", type=Path, help="the run directory")
    export.add_argument("--out", required=True, type=Path, help="where the adapter goes")
    _add_cuts(export)
    _add_client(export)

    generate = commands.add_parser(
        "generate",
        help="continue a prompt with the model that a run ended with",
        description="Without --prompt it reads prompts line by line, until the input ends. Text is "
        "shown as it comes.",
    )
    generate.add_argument("run", type=Path, help="the run directory")
    generate.add_argument("--prompt", help="text to continue")
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
    generate.add_argument("--root-certificates", default="", help="PEM file of the CA for TLS")
    return parser


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors of this package become one paragraph on standard error."""
    arguments = make_parser().parse_args(argv)
    try:
        return _dispatch(arguments)
    except FlowerSplitError as error:
        print(f"flower-split: {error}", file=sys.stderr)
        return WRONG_USE if isinstance(error, ConfigError) else FAILED
    except KeyboardInterrupt:
        return FAILED


def _dispatch(arguments: argparse.Namespace) -> int:
    # Each command imports what it needs: torch and Flower take seconds to load.
    if arguments.command == "run":
        from flower_split.cli.run import run_app

        return run_app(
            arguments.app,
            superlink=arguments.superlink,
            run_config=arguments.run_config,
            federation_config=arguments.federation_config,
            stream=arguments.stream,
            resume=arguments.resume,
        )
    if arguments.command == "trunk":
        from flower_split.cli.trunk import serve_trunk

        return serve_trunk(
            arguments.app,
            listen=arguments.listen,
            token_file=arguments.token_file,
            tls_certificate=arguments.tls_certificate,
            tls_key=arguments.tls_key,
            checkpoints=arguments.checkpoints,
            run_config=arguments.run_config,
        )
    if arguments.command == "generate":
        from flower_split.cli.generate import generate

        return generate(arguments)
    from flower_split.results.client_adapter import one_client
    from flower_split.results.export import export_adapter
    from flower_split.split import CutLayers

    cuts = CutLayers.parse(arguments.cuts) if arguments.cuts else None
    client = one_client(arguments.client, arguments.client_dir)
    print(export_adapter(arguments.run, arguments.out, cuts, client))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
