"""Benchmarks of this machine: from the wire to a whole run, each beside its reference.

Runs on: Any machine; every process of a benchmark is this host's.
Read first: ``figures.py``.
"""
