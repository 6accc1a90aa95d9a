"""The receive pool gives a buffer out again only when nothing refers to it any more."""

import gc

import torch

from flower_split.wire.staging import SMALL, BufferPool


def test_pool_buffer_is_reused_after_its_last_view_dies() -> None:
    pool = BufferPool()
    tensor = pool.allocate(SMALL)
    address = tensor.data_ptr()
    view = tensor.view(torch.float32)[3:]
    del tensor
    gc.collect()
    assert pool.allocate(SMALL).data_ptr() != address
    assert address % 64 == 0
    del view
    gc.collect()
    assert pool.free_bytes() >= SMALL
    first, second = pool.allocate(SMALL), pool.allocate(SMALL)
    assert address in (first.data_ptr(), second.data_ptr())
    assert first.data_ptr() != second.data_ptr()


def test_pool_numpy_view_keeps_the_buffer() -> None:
    pool = BufferPool()
    tensor = pool.allocate(SMALL)
    address, array = tensor.data_ptr(), tensor.numpy()[5:]
    del tensor
    gc.collect()
    assert pool.allocate(SMALL).data_ptr() != address
    assert array.nbytes == SMALL - 5


def test_pool_smaller_request_takes_a_buffer_of_at_most_twice_its_size() -> None:
    pool = BufferPool()
    address = pool.allocate(4 * SMALL).data_ptr()
    gc.collect()
    kept = pool.allocate(SMALL)
    assert kept.data_ptr() != address
    half = pool.allocate(2 * SMALL)
    assert half.data_ptr() == address and half.nbytes == 2 * SMALL


def test_pool_unused_memory_stays_below_its_limit() -> None:
    pool = BufferPool(max_bytes=3 * SMALL)
    held = [pool.allocate(2 * SMALL) for _ in range(4)]
    assert pool.free_bytes() == 0
    del held
    gc.collect()
    assert pool.free_bytes() == 2 * SMALL
