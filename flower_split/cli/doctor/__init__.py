"""``flower-split doctor``: what on this machine would stop a run, and what to do about it.

Runs on: Every machine, before anything is started there.
Read first: ``command.py``: ``examine``.
"""
