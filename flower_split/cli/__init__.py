"""The ``flower-split`` command: start and follow runs, serve a trunk, generate, export.

Runs on: The machine of whoever starts a run, and the trunk machine (``flower-split trunk``).
Read first: ``main.py``: from the arguments to a subcommand's function.
"""
