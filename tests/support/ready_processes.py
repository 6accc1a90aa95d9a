"""Processes that have loaded torch and this package when they start: in milliseconds, not ten seconds.

They are forked from a server process that has done nothing else, so they hold no thread or lock of
the tests'. Each process of pytest starts that server once, with the first of them.
"""

import multiprocessing

READY = multiprocessing.get_context("forkserver")
READY.set_forkserver_preload(["tests.support.loopback"])
