"""The trunk: the middle layers, their optimizer, and the windows of contributions that step it.

Runs on: The trunk machine.
Read first: ``serve.py``, then ``service/client_calls.py`` and ``engine/engine.py``.
"""
