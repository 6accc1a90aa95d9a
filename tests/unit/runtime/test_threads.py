"""Pools keep the pinned thread count from their threads' first operation on."""

import torch

from flower_split.runtime.threads import pinned_pool


def test_pinned_pool_gives_its_threads_the_callers_count():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pinned_pool(2, "test") as pool:
            torch.set_num_threads(1)  # what the process is set to later does not matter
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
