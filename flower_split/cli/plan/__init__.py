"""``flower-split plan``: what a job needs, before any weight is loaded.

Runs on: Any machine; needs the model's configuration alone.
Read first: ``command.py``.
"""
