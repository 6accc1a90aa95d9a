"""Key-value caches of a model in two places: each party keeps those of its own layers.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask ``[batch, seq]``.

A model's forward reads from its cache how many positions it has seen, whichever layer it asks. So a
stand-in enters a place holder of one number per position into the client's cache. The number is the
row that the positions stand in, and everything that generation does to a cache afterwards (beam
search reorders rows, assisted decoding cuts positions off) shows in the place holder at the next
call: that is how it reaches the trunk, without a hook into any cache class.
"""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from flower_split.errors import SplitError

_KNOWN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_ids = itertools.count(1)  # of this process; a session is of one process


@dataclass(frozen=True, slots=True)
class CacheStep:
    """One call with a cache that the trunk keeps between calls.

    Args:
        id: The cache's number, from 1, unique within the client's process.
        step: The call with this cache, from 0.
        past_length: Positions that the cache holds before the call.
        rows: ``[batch]``: the row of the call before that each row goes on from; ``None``: the same.
    """

    id: int
    step: int
    past_length: int
    rows: Tensor | None = None


def keeps_only_keys_and_values(config: PreTrainedConfig) -> bool:
    """Return whether a model's layers keep keys and values between calls, and nothing else."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return all(type(layer) in _KNOWN_LAYERS for layer in layers)


def forbid_cache(host: nn.Module) -> None:
    """Let a model run without a cache unless it is told otherwise."""
    config = getattr(host, "config", None)
    if config is not None:
        config.use_cache = False


def find_cache(args: tuple[object, ...], kwargs: dict[str, object]) -> Cache | None:
    """Return the cache among the arguments of a layer's call."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            return value
    return None


def enter_place_holder(cache: Cache, index: int, hidden_states: Tensor) -> bool:
    """Enter the positions of ``hidden_states`` for layer ``index``, whose keys are kept elsewhere.

    Returns:
        Whether the layer's part of the cache is of a known kind; otherwise nothing is entered.
    """
    batch, seq = hidden_states.shape[:2]
    numbers = torch.arange(batch, dtype=torch.float32, device=hidden_states.device)
    values = numbers.view(-1, 1, 1, 1).expand(batch, 1, seq, 1)
    if index >= len(cache.layers) and cache.layer_class_to_replicate not in _KNOWN_LAYERS:
        return False
    if index < len(cache.layers) and _layer(cache, index) is None:
        return False
    cache.update(values, values, index)
    layer = _layer(cache, index)
    assert layer is not None and layer.keys is not None
    layer.keys = numbers.view(-1, 1, 1, 1).expand_as(layer.keys).clone()
    return True


def _layer(cache: Cache, index: int) -> DynamicLayer | None:
    """Return layer ``index`` of a cache, if it is there and of a known kind."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    return layer if isinstance(layer, DynamicLayer) and type(layer) in _KNOWN_LAYERS else None


def _rows_since(layer: DynamicLayer, batch: int) -> Tensor | None:
    """Return which row of the call before each row goes on from; ``None``: all are where they were."""
    assert layer.keys is not None
    rows = layer.keys[:, 0, -1, 0].round().to("cpu", torch.int64)
    return None if torch.equal(rows, torch.arange(batch)) else rows


class CacheBook:
    """What a client model knows of the trunk's caches: one entry per cache object of the client."""

    def __init__(self) -> None:
        self._entries: weakref.WeakKeyDictionary[Cache, _Entry] = weakref.WeakKeyDictionary()

    def begin(
        self,
        cache: Cache,
        index: int,
        hidden_states: Tensor,
        trunk: object,
        release: Callable[[int], None],
    ) -> CacheStep | None:
        """Return the call that is about to be made with ``cache``; ``None``: the trunk keeps nothing of it.

        Args:
            cache: The client's.
            index: The layer of the trunk's slot.
            hidden_states: Those of the call.
            trunk: The one that is called; a cache belongs to one trunk.
            release: Called with the id when the client's cache object is gone.

        Raises:
            SplitError: The cache is another trunk's.
        """
        layer, entry = _layer(cache, index), self._entries.get(cache)
        past_length = layer.get_seq_length() if layer is not None else 0
        if entry is None:
            known = all(type(item) in _KNOWN_LAYERS for item in cache.layers)
            if past_length > 0 or not known:
                return None
            entry = _Entry(next(_ids), weakref.ref(trunk), 0)
            self._entries[cache] = entry
            weakref.finalize(cache, release, entry.id).atexit = False
        if entry.trunk() is not trunk:
            raise SplitError(
                "this key-value cache belongs to the trunk that the model called before; the trunk "
                "it calls now holds nothing of it. Begin generation anew after set_trunk."
            )
        rows = None
        if layer is not None and past_length > 0:
            rows = _rows_since(layer, len(hidden_states))
        step = CacheStep(entry.id, entry.step, past_length, rows)
        entry.step += 1
        return step


@dataclass(slots=True)
class _Entry:
    id: int
    trunk: "weakref.ref[object]"
    step: int


class TrunkCache:
    """The trunk's side of one cache: keys and values of its layers, and the padding mask so far.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.cache = DynamicCache(config=config.get_text_config(decoder=True))
        self.length = 0  # positions
        self._mask: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Return bytes of all tensors held."""
        total = 0 if self._mask is None else self._mask.nbytes
        for layer in self._layers():
            for tensor in (layer.keys, layer.values):
                total += 0 if tensor is None else tensor.nbytes
        return total

    def _layers(self) -> list[DynamicLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, DynamicLayer)]

    def go_back(self, past_length: int, rows: Tensor | None) -> None:
        """Cut positions off, and reorder rows, as the client has done.

        Raises:
            SplitError: It holds fewer positions than the client says, or cannot be cut.
        """
        if past_length > self.length:
            raise SplitError(
                f"the trunk's cache holds {self.length} positions; the client's holds {past_length}."
            )
        if past_length < self.length:
            removed = self.length - past_length
            try:
                self.cache.crop(-removed)
            except (RuntimeError, ValueError) as error:
                raise SplitError(
                    f"{removed} positions cannot be taken back: {error} Generate without assistance, "
                    "or with use_cache=False."
                ) from error
            self.length = past_length
            if self._mask is not None:
                self._mask = self._mask[:, :past_length]
        if rows is not None:
            for layer in self._layers():
                if layer.keys is not None:
                    layer.batch_select_indices(rows.to(layer.keys.device))
            if self._mask is not None:
                self._mask = self._mask[rows.to(self._mask.device)]

    def extend_mask(self, mask: Tensor | None, batch: int, seq: int) -> Tensor | None:
        """Return the whole padding mask ``[batch, past + seq]``; ``mask`` is that of the new positions."""
        if mask is None and self._mask is None:
            return None
        if mask is None:
            assert self._mask is not None
            mask = self._mask.new_ones(batch, seq)
        past = self._mask if self._mask is not None else mask.new_ones(batch, self.length)
        self._mask = torch.cat([past, mask], dim=-1)
        return self._mask

    def advance(self, hidden_states: Tensor, own: range) -> None:
        """Enter the added positions of ``hidden_states`` for the layers not in ``own``."""
        self.length += hidden_states.shape[1]
        for index in range(len(self.cache.layers)):
            if index not in own:
                enter_place_holder(self.cache, index, hidden_states)
