"""Key-value caches that generation keeps on the trunk: within a byte budget, leased, exactly once.

Shapes: hidden states ``[batch, seq, hidden]`` of the new positions only.

A cache belongs to one session. It is freed when the client says that it is done with it, when the
session closes or its round ends, and when it was silent for its lease. Every call carries its number:
the one made last, sent again with the same content, gets the same reply and adds nothing.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flower_split.errors import RefusalReason, SplitError, TrunkRefused
from flower_split.split import CutLayers, TrunkModel
from flower_split.split.structure.kv_cache import (
    CacheStep,
    TrunkCache,
    keeps_only_keys_and_values,
)
from flower_split.split.trunk_side.model import TrunkInputs
from flower_split.trunk.compute.checks import check_finite
from flower_split.trunk.compute.compute import TrunkCompute

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """One cache, between two calls."""

    kept: TrunkCache
    version: int  # of the weights that computed it
    step: int
    digest: bytes  # of the last call
    reply: Tensor  # to it
    expires: float

    @property
    def num_bytes(self) -> int:
        return self.kept.num_bytes + self.reply.nbytes


class CacheStore:
    """The caches of all sessions. Only the compute thread calls it, but for ``is_empty``.

    Args:
        compute: What runs the trunk.
        budget: Bytes, over all caches.
        clock: Monotonic seconds.
        per_session: Bytes, over the caches of one session.
    """

    def __init__(
        self, compute: TrunkCompute, budget: int, clock: Callable[[], float], per_session: int
    ) -> None:
        self.budget = budget
        self._per_session = per_session
        self._compute = compute
        self._clock = clock
        self._entries: dict[tuple[str, int], _Entry] = {}
        self._bytes_per_position: dict[CutLayers | None, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether there is no cache; any thread may ask."""
        return not self._entries

    @property
    def num_bytes(self) -> int:
        """Bytes that the caches hold."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def forward(
        self,
        session: str,
        step: CacheStep,
        tensors: Mapping[str, Tensor],
        digest: bytes,
        lease_seconds: float,
        cuts: CutLayers | None = None,
    ) -> Tensor:
        """Return ``trunk_output`` of new positions; their keys and values are kept. Safe to retry.

        Args:
            session: The session that owns the cache.
            step: Which cache, and which call with it.
            tensors: The tensors of the new positions, as for any forward.
            digest: Digest of the request's content.
            lease_seconds: The cache is freed when it is silent for so long.
            cuts: The session's; None: the trunk's.

        Raises:
            TrunkRefused: No such cache (UNKNOWN_CACHE), the weights have stepped since it began
                (STALE_VERSION), no room (OVER_BUDGET), or a call out of order (INVALID_REQUEST).
        """
        key = (session, step.id)
        entry = self._entries.get(key)
        if entry is not None and entry.step == step.step:
            if entry.digest != digest:
                raise TrunkRefused(
                    RefusalReason.DIGEST_MISMATCH,
                    f"call {step.step} with cache {step.id} came before with other content.",
                )
            entry.expires = self._clock() + lease_seconds
            return entry.reply
        kept, reply = self._advance(key, entry, step, tensors, cuts)
        self._entries[key] = _Entry(
            kept=kept,
            version=self._compute.version,
            step=step.step,
            digest=digest,
            reply=reply,
            expires=self._clock() + lease_seconds,
        )
        return reply

    def release(self, session: str, cache_ids: Iterable[int]) -> None:
        """Free some of a session's caches. Idempotent."""
        for cache_id in cache_ids:
            self._entries.pop((session, cache_id), None)

    def expire(self, is_open: Callable[[str], bool]) -> None:
        """Free what belongs to sessions that are over, and what was silent for its lease."""
        now = self._clock()
        for key in list(self._entries):
            if now >= self._entries[key].expires or not is_open(key[0]):
                entry = self._entries.pop(key)
                logger.info("freed an abandoned key-value cache of %d bytes", entry.num_bytes)

    def _advance(
        self,
        key: tuple[str, int],
        entry: _Entry | None,
        step: CacheStep,
        tensors: Mapping[str, Tensor],
        cuts: CutLayers | None,
    ) -> tuple[TrunkCache, Tensor]:
        """Run one call that was not made before."""
        hidden = tensors["hidden_states"]
        expected = 0 if entry is None else entry.step + 1
        if entry is None and step.step > 0:
            raise TrunkRefused(
                RefusalReason.UNKNOWN_CACHE,
                f"the trunk holds no key-value cache {step.id} of this session: it was silent for "
                "longer than its lease, or a call with it failed. Begin generation anew.",
            )
        if step.step != expected or (entry is None and step.past_length > 0):
            raise _invalid(f"call {step.step} with cache {step.id} is not call {expected}")
        if entry is not None and entry.version != self._compute.version:
            raise TrunkRefused(
                RefusalReason.STALE_VERSION,
                f"cache {step.id} is of version {entry.version} of the weights, which are at "
                f"{self._compute.version}. Begin generation anew.",
            )
        kept = _new_cache(self._compute) if entry is None else entry.kept
        rows_before = len(hidden) if entry is None else len(entry.reply)
        self._check_rows(step.rows, rows_before, len(hidden))
        self._check_room(key, step, hidden, cuts)
        # From here on the cache changes: a call that fails leaves none behind.
        self._entries.pop(key, None)
        try:
            kept.go_back(step.past_length, step.rows)
        except SplitError as error:
            raise _invalid(str(error)) from error
        return kept, _forward(self._compute, tensors, kept, cuts)

    def _check_rows(self, rows: Tensor | None, before: int, batch: int) -> None:
        if rows is None:
            fits = before == batch
        else:
            fits = rows.dtype == torch.int64 and rows.shape == (batch,)
            fits = fits and bool(((rows >= 0) & (rows < before)).all())
        if not fits:
            raise _invalid(
                f"the cache holds {before} rows, and the call has {batch}: cache_rows must name for "
                "each of them the row that it goes on from"
            )

    def _check_room(
        self, key: tuple[str, int], step: CacheStep, hidden: Tensor, cuts: CutLayers | None
    ) -> None:
        if cuts not in self._bytes_per_position:
            self._bytes_per_position[cuts] = bytes_per_position(self._compute, cuts)
        rows, positions = len(hidden), step.past_length + hidden.shape[1]
        needed = rows * positions * self._bytes_per_position[cuts] + hidden.nbytes
        beside = {other: entry.num_bytes for other, entry in self._entries.items() if other != key}
        others = sum(beside.values())
        own = sum(num_bytes for other, num_bytes in beside.items() if other[0] == key[0])
        if own + needed > self._per_session:
            raise TrunkRefused(
                RefusalReason.OVER_BUDGET,
                f"the other key-value caches of this session have {own} bytes of at most "
                f"{self._per_session} (trunk.held-memory-per-client), and {rows} sequences of "
                f"{positions} positions need {needed}. Generate fewer sequences at once.",
            )
        if others + needed > self.budget:
            raise TrunkRefused(
                RefusalReason.OVER_BUDGET,
                f"the trunk keeps {others} bytes of other key-value caches of a budget of "
                f"{self.budget}, and {rows} sequences of {positions} positions need {needed}. Raise "
                "trunk.cache-memory, generate fewer sequences at once, or use_cache=False.",
            )


def bytes_per_position(compute: TrunkCompute, cuts: CutLayers | None = None) -> int:
    """Return the bytes that one position of one row takes in a key-value cache, at most.

    Raises:
        TrunkRefused: The trunk keeps other states than keys and values (INVALID_REQUEST).
    """
    kept, trunk, whole = _new_cache(compute), compute.spans.of(cuts), compute.trunk
    assert isinstance(trunk, TrunkModel) and isinstance(whole, TrunkModel)
    probe = torch.zeros(1, 1, whole.hidden_size, device=compute.device, dtype=compute.dtype)
    mask = torch.ones(1, 1, dtype=torch.int64, device=compute.device)
    whole.train(False)
    with torch.no_grad():
        trunk.run_cached(kept, probe, mask, None)
    return kept.num_bytes


def _new_cache(compute: TrunkCompute) -> TrunkCache:
    """Return an empty key-value cache of the trunk's layers.

    Raises:
        TrunkRefused: The trunk keeps other states than keys and values (INVALID_REQUEST).
    """
    trunk = compute.trunk
    if isinstance(trunk, TrunkModel) and keeps_only_keys_and_values(trunk.config):
        return TrunkCache(trunk.config)
    raise TrunkRefused(
        RefusalReason.INVALID_REQUEST,
        "between calls, this trunk's layers keep states other than keys and values. Generate with "
        "use_cache=False.",
    )


def _forward(
    compute: TrunkCompute, tensors: Mapping[str, Tensor], kept: TrunkCache, cuts: CutLayers | None
) -> Tensor:
    """Return ``trunk_output`` of new positions in evaluation; ``kept`` grows by them."""
    trunk = compute.spans.of(cuts)
    assert isinstance(trunk, TrunkModel)  # which made ``kept``
    hidden = tensors["hidden_states"]
    given = TrunkInputs.of(tensors, compute.device)
    mask = given.attention_mask
    compute.trunk.train(False)
    with torch.no_grad():
        output = trunk.run_cached(
            kept,
            hidden.to(compute.device, compute.dtype),
            mask if isinstance(mask, Tensor) else None,
            given.position_ids,
            given.host_arguments,
        ).to(hidden.dtype)
    check_finite("trunk_output", output)  # waits: what is returned is complete
    return output


def _invalid(what: str) -> TrunkRefused:
    return TrunkRefused(RefusalReason.INVALID_REQUEST, f"{what}.")
