"""``python -m tests.hostile.targets NAME --seconds N``: atheris looks for what a target cannot stand.

It begins with the corpus, keeps what reaches code that nothing before reached, and ends with the input
that it found, if any, as a file: put that into the corpus, with what mends it. It needs the extra
``fuzz``, whose wheels are for Linux; for other ends see ``tests/hostile/README.md``.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

# Before anything else imports them: what is imported inside is traced.
with atheris.instrument_imports(include=["flower_split"]):
    from tests.hostile.targets.playing import TARGETS
    from tests.hostile.targets.target import LONGEST, made_ready


def main() -> None:
    """Fuzz what the command line names; ends the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.targets")
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--found", type=Path, default=Path(), help="folder for what it finds")
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    with tempfile.TemporaryDirectory() as reached, made_ready(target) as run:

        def one(data: bytes) -> None:
            try:
                run(data)
            except target.documented:
                pass

        options = [
            f"-max_total_time={arguments.seconds}",
            f"-max_len={LONGEST}",
            f"-artifact_prefix={arguments.found}/{target.name}-",
            "-rss_limit_mb=8192",
            "-timeout=60",
        ]
        corpus = [reached, str(target.folder)]
        atheris.Setup([sys.argv[0], *options, *corpus], one, internal_libfuzzer=True)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
