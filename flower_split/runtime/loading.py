"""Load modules by the thousand, as torch and transformers are, without Python's collector in the way."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MANY = 500  # modules; fewer are no reason to keep anything for good


@contextmanager
def loading_modules() -> Iterator[None]:
    """Collect no garbage in the block; where it loaded many modules, never look at what is there again.

    torch, transformers and PEFT make 400,000 objects that live as long as the process. The collector
    would walk over them many times while they come, and then at every full collection, each a third
    of a second: loading takes 8.7 s of processor so instead of 10.4 s, and reading the documents of a
    quick-start's client 1.1 s instead of 2.6 s. Processes forked afterwards go on sharing this memory.
    """
    was_enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - before > _MANY:
            gc.freeze()
        if was_enabled:
            gc.enable()
