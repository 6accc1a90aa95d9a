"""The trunk's cache store: retries, order, rows and crops, against the trunk run in one go."""

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from torch import Tensor

from flower_split.config import OptimizerConfig
from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import CallResult, ForwardCall, ForwardMode
from flower_split.split import TrunkModel, split_model
from flower_split.split.structure.kv_cache import CacheStep
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.shares import Shares
from tests.support.generation_rig import CUTS, lively_model
from tests.unit.results.test_generation_over_grpc import FINGERPRINT, evaluation

HIDDEN = 32


class Direct:
    """Calls an engine without a wire."""

    def __init__(self, shares: Shares | None = None) -> None:
        _, trunk = split_model(lively_model("llama"), CUTS)
        self.trunk: TrunkModel = trunk
        self.engine = TrunkEngine(
            TrunkCompute(trunk, OptimizerConfig(), seed=0),
            mode="joint",
            hidden_size=HIDDEN,
            fingerprint=FINGERPRINT,
            activation_bytes=1 << 20,
            shares=shares,
        )
        self.engine.begin_round(evaluation())
        self.grant = self.engine.open_session("token-0", FINGERPRINT, 0, True)

    def call(
        self,
        hidden: Tensor,
        step: int,
        past_length: int,
        *,
        cache: int = 1,
        rows: Tensor | None = None,
        digest: bytes = b"digest",
        mode: ForwardMode = ForwardMode.EVALUATE,
        released: tuple[int, ...] = (),
    ) -> CallResult:
        return self.engine.forward(
            ForwardCall(
                session=self.grant.session,
                epoch=self.grant.epoch,
                version=0,
                mode=mode,
                tensors={"hidden_states": hidden},
                digest=digest,
                deadline=time.monotonic() + 60,
                use_cache=True,
                cache=CacheStep(cache, step, past_length, rows),
                released=released,
            )
        )

    def at_once(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return self.trunk(hidden)


@pytest.fixture
def direct() -> Iterator[Direct]:
    value = Direct()
    yield value
    value.engine.close()


def hidden(batch: int, seq: int, seed: int) -> Tensor:
    return torch.randn(batch, seq, HIDDEN, generator=torch.Generator().manual_seed(seed))


def refusal(direct: Direct, *args: object, **kwargs: object) -> RefusalReason:
    with pytest.raises(TrunkRefused) as refused:
        direct.call(*args, **kwargs)
    return refused.value.reason


def test_cached_calls_in_pieces_equal_the_trunk_at_once(direct: Direct) -> None:
    whole = hidden(2, 9, seed=1)
    pieces = [
        direct.call(whole[:, :4], 0, 0).tensor,
        direct.call(whole[:, 4:5], 1, 4).tensor,
        direct.call(whole[:, 5:], 2, 5).tensor,
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), direct.at_once(whole))


def test_cached_call_repeated_gets_the_same_reply_and_adds_nothing(direct: Direct) -> None:
    whole = hidden(2, 6, seed=1)
    direct.call(whole[:, :4], 0, 0)
    reply = direct.call(whole[:, 4:5], 1, 4).tensor
    held = direct.engine.cache_bytes()
    assert torch.equal(direct.call(whole[:, 4:5], 1, 4).tensor, reply)
    assert direct.engine.cache_bytes() == held
    last = direct.call(whole[:, 5:], 2, 5).tensor
    torch.testing.assert_close(last, direct.at_once(whole)[:, 5:])


def test_cached_call_with_rows_goes_on_from_those_rows(direct: Direct) -> None:
    whole, more = hidden(2, 4, seed=1), hidden(3, 1, seed=2)
    direct.call(whole, 0, 0)
    rows = torch.tensor([1, 1, 0])
    found = direct.call(more, 1, 4, rows=rows).tensor
    expected = direct.at_once(torch.cat([whole[rows], more], dim=1))[:, 4:]
    torch.testing.assert_close(found, expected)


def test_cached_call_with_a_shorter_past_forgets_the_rest(direct: Direct) -> None:
    whole, other = hidden(1, 6, seed=1), hidden(1, 2, seed=2)
    direct.call(whole, 0, 0)
    found = direct.call(other, 1, 3).tensor
    expected = direct.at_once(torch.cat([whole[:, :3], other], dim=1))[:, 3:]
    torch.testing.assert_close(found, expected)


def test_cached_calls_out_of_order_are_refused(direct: Direct) -> None:
    whole = hidden(2, 6, seed=1)
    assert refusal(direct, whole[:, :1], 1, 4) is RefusalReason.UNKNOWN_CACHE
    assert refusal(direct, whole[:, :1], 0, 4) is RefusalReason.INVALID_REQUEST
    direct.call(whole[:, :4], 0, 0)
    assert refusal(direct, whole[:, :4], 0, 0, digest=b"other") is RefusalReason.DIGEST_MISMATCH
    assert refusal(direct, whole[:, 4:], 2, 4) is RefusalReason.INVALID_REQUEST
    for rows in (torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([0.0, 1.0])):
        assert refusal(direct, whole[:, 4:], 1, 4, rows=rows) is RefusalReason.INVALID_REQUEST
    assert refusal(direct, hidden(3, 1, seed=2), 1, 4) is RefusalReason.INVALID_REQUEST
    # None of these changed the cache.
    found = direct.call(whole[:, 4:], 1, 4).tensor
    torch.testing.assert_close(found, direct.at_once(whole)[:, 4:])


def test_cached_call_that_fails_leaves_no_cache_behind(direct: Direct) -> None:
    whole = hidden(2, 6, seed=1)
    direct.call(whole[:, :4], 0, 0)
    assert refusal(direct, whole[:, 4:], 1, 7) is RefusalReason.INVALID_REQUEST
    assert direct.engine.cache_bytes() == 0
    assert refusal(direct, whole[:, 4:], 1, 4) is RefusalReason.UNKNOWN_CACHE


def test_cached_call_in_training_is_refused(direct: Direct) -> None:
    reason = refusal(direct, hidden(1, 2, seed=1), 0, 0, mode=ForwardMode.TRAIN)
    assert reason is RefusalReason.INVALID_REQUEST


def test_cache_after_a_step_of_the_weights_is_refused(direct: Direct) -> None:
    whole = hidden(2, 6, seed=1)
    direct.call(whole[:, :4], 0, 0)
    direct.engine.compute.version += 1
    assert refusal(direct, whole[:, 4:], 1, 4) is RefusalReason.STALE_VERSION


def test_caches_of_one_session_are_released_by_number(direct: Direct) -> None:
    whole = hidden(1, 3, seed=1)
    direct.call(whole, 0, 0, cache=1)
    one = direct.engine.cache_bytes()
    direct.call(whole, 0, 0, cache=2)
    assert direct.engine.cache_bytes() == 2 * one
    direct.call(whole, 0, 0, cache=3, released=(1, 2, 99))
    assert direct.engine.cache_bytes() == one
    direct.engine.close_session(direct.grant.session, direct.grant.epoch)
    assert direct.engine.cache_bytes() == 0


def test_caches_of_one_session_are_within_its_share() -> None:
    """Four positions of keys and values have 1024 bytes, their reply 512: one cache fits, not two."""
    direct = Direct(Shares(held_bytes=3000))
    with closing(direct.engine) as engine:
        direct.call(hidden(1, 4, seed=1), 0, 0)
        assert 1024 + 512 <= engine.cache_bytes() < 1700  # and what says where the rows begin
        with pytest.raises(TrunkRefused, match="trunk.held-memory-per-client") as over:
            direct.call(hidden(1, 4, seed=2), 0, 0, cache=2)
        assert over.value.reason is RefusalReason.OVER_BUDGET
        direct.call(hidden(1, 1, seed=3), 1, 4)  # the one that is there goes on
        direct.grant = engine.open_session("token-1", FINGERPRINT, 0, True)
        direct.call(hidden(1, 4, seed=2), 0, 0)  # and another session has a share of its own
