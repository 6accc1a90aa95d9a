"""``flower-split``: write and run an app, follow a run, serve a trunk, export, generate.

Exit codes: see :mod:`flower_split.runtime.exit_codes`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from flower_split.cli.parser import make_parser
from flower_split.errors import ConfigError, FlowerSplitError
from flower_split.runtime.exit_codes import FAILED, STOPPED, WRONG_USE
from flower_split.runtime.loading import loading_modules


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors of this package become one paragraph on standard error."""
    arguments = make_parser().parse_args(argv)
    try:
        return _dispatch(arguments)
    except FlowerSplitError as error:
        print(f"flower-split: {error}", file=sys.stderr)
        return WRONG_USE if isinstance(error, ConfigError) else FAILED
    except KeyboardInterrupt:
        print("flower-split: interrupted; nothing was left running.", file=sys.stderr)
        return STOPPED


def _dispatch(arguments: argparse.Namespace) -> int:
    # Each command imports what it needs: torch and Flower take seconds to load.
    handler: Callable[[argparse.Namespace], int] | None = getattr(arguments, "handler", None)
    if handler is not None:
        return handler(arguments)
    if arguments.command == "run":
        from flower_split.cli.run import RunCommand, run_app

        return run_app(
            RunCommand(
                app=arguments.app,
                superlink=arguments.superlink,
                run_config=arguments.run_config,
                federation_config=arguments.federation_config,
                stream=arguments.stream,
                resume=arguments.resume,
                local=arguments.local,
            )
        )
    if arguments.command == "attach":
        from flower_split.cli.attach import AttachCommand, attach

        return attach(
            AttachCommand(
                run=arguments.run,
                superlink=arguments.superlink,
                stream=arguments.stream,
                stop=arguments.stop,
            )
        )
    if arguments.command == "trunk":
        from flower_split.cli.trunk import serve_trunk, trunk_command

        return serve_trunk(trunk_command(arguments))
    if arguments.command == "audit-log":
        from flower_split.cli.audit_log import verify

        return verify(arguments.files)
    if arguments.command == "generate":
        with loading_modules():
            from flower_split.cli.generate import generate

        return generate(arguments)
    with loading_modules():
        from flower_split.cli.export import export

    return export(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
