"""Benchmarks of this machine: transport, training step, memory, each beside its reference.

Runs on: Any machine; every process of a benchmark is this host's.
Read first: ``figures.py``.
"""
