"""Thread pools that keep torch's pinned thread count."""

from concurrent.futures import ThreadPoolExecutor

import torch


def pinned_pool(workers: int, name: str) -> ThreadPoolExecutor:
    """Return a pool whose threads use as many intra-op threads as the calling thread does now.

    The count that :func:`torch.set_num_threads` sets reaches another thread only after its first
    matrix product, which would run on all cores: slower where they are busy, and with other last
    bits than the next one.
    """
    return ThreadPoolExecutor(
        workers,
        thread_name_prefix=name,
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    )
