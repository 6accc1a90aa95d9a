"""Forwards that keep nothing for a backward: evaluation, generation, and mode forward-only.

Generation's key-value caches are the only thing that outlives a call here; they belong to the compute
thread and are freed when their session ends or falls silent.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from torch import Tensor

from flower_split.protocol.values import CallResult, ForwardCall
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.kv_caches import CacheStore
from flower_split.trunk.engine.compute_thread import ComputeThread
from flower_split.trunk.engine.round_index import RoundIndex
from flower_split.trunk.engine.round_state import Round
from flower_split.trunk.engine.sessions import Session
from flower_split.trunk.engine.shares import Shares


class UnrecordedForwards:
    """Forwards that may be repeated at will: they change neither weights nor ledger.

    Args:
        index: Finds the open round; holds the engine's lock.
        compute: The trunk module.
        thread: Where calls run.
        caches: The key-value caches of generation.
        shares: What one client may take of a round.
    """

    def __init__(
        self,
        index: RoundIndex,
        compute: TrunkCompute,
        thread: ComputeThread,
        caches: CacheStore,
        shares: Shares,
    ) -> None:
        self._index = index
        self._compute = compute
        self._thread = thread
        self._caches = caches
        self._shares = shares
        self._freeing: Future[None] | None = None  # the deadline thread's alone

    def evaluate(self, call: ForwardCall, current: Round, member: Session) -> CallResult:
        """Run a forward without dropout, which may go on from a key-value cache."""
        lease = current.plan.window_seconds
        run = partial(self._evaluate, call, member, lease)
        return self._computed(current, member, run, call.deadline)

    def forward(
        self, call: ForwardCall, current: Round, member: Session, seed_of: str
    ) -> CallResult:
        """Run a training forward that no backward follows.

        Args:
            call: The forward.
            current: The round that it is of.
            member: The client that calls.
            seed_of: Names the micro-batch for its dropout seed.
        """
        run = partial(
            self._compute.forward,
            call.tensors,
            train=True,
            seed_of=seed_of,
            use_cache=call.use_cache,
            cuts=member.cuts,
        )
        return self._computed(current, member, run, call.deadline)

    def cache_bytes(self) -> int:
        """Return the bytes of key-value caches, after freeing those that nobody uses any more."""

        def run() -> int:
            self._caches.expire(self._is_open)
            return self._caches.num_bytes

        return self._thread.do(run)

    def free_caches(self) -> None:
        """Free the key-value caches of closed sessions and ended leases, without waiting for it."""
        if not self._caches.is_empty and (self._freeing is None or self._freeing.done()):
            self._freeing = self._thread.submit(self._caches.expire, self._is_open)

    def _computed(
        self, current: Round, member: Session, run: Callable[[], Tensor], deadline: float
    ) -> CallResult:
        """Compute, if the client may still, and note for how long."""
        with self._index.changed:
            self._shares.check_seconds(current.usage, member.slot)
        result = self._thread.call(member.id, run, deadline)
        with self._index.changed:
            spent = current.usage.compute_seconds
            spent[member.slot] = spent.get(member.slot, 0.0) + result.compute_seconds
        return result

    def _evaluate(self, call: ForwardCall, member: Session, lease: float) -> Tensor:
        self._caches.release(call.session, call.released)
        if call.cache is not None:
            return self._caches.forward(
                call.session, call.cache, call.tensors, call.digest, lease, member.cuts
            )
        return self._compute.forward(
            call.tensors, train=False, seed_of="", use_cache=call.use_cache, cuts=member.cuts
        )

    def _is_open(self, session: str) -> bool:
        with self._index.changed:
            return self._index.is_open(session)
