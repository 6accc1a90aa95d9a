"""Several micro-batches of one optimizer step, of which one computes while others wait on the wire.

Each micro-batch runs on its own thread. A lock lets one compute at a time and is given up while a
micro-batch waits for the trunk; the random state goes with the micro-batch, so that dropout is the
same however the waits fall.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ComputeTurns:
    """The lock, and the random states that go with it.

    Args:
        device: Of the client's model; its generator is kept too.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._holder: int | None = None  # thread id

    @contextmanager
    def computing(self, seed: int) -> Iterator[None]:
        """Compute one micro-batch, with random numbers from ``seed``."""
        self._acquire()
        outside = self._random_state()
        torch.manual_seed(seed)
        try:
            yield
        finally:
            self._set_random_state(outside)
            self._release()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let another micro-batch compute while this one waits on the wire.

        Called from a thread that does not hold the turn, as autograd's own threads do in a backward
        on CUDA, it changes nothing: they serve all micro-batches and must not wait for a turn.
        """
        if self._holder != threading.get_ident():
            yield
            return
        mine = self._random_state()
        self._release()
        try:
            yield
        finally:
            self._acquire()
            self._set_random_state(mine)

    def _acquire(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()

    def _release(self) -> None:
        self._holder = None
        self._lock.release()

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        cuda = torch.cuda.get_rng_state(self._cuda) if self._cuda else None
        return torch.get_rng_state(), cuda

    def _set_random_state(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if self._cuda and state[1] is not None:
            torch.cuda.set_rng_state(state[1], self._cuda)
