"""The trunk's state: rounds, windows, the ledger, exactly once; no gRPC.

Runs on: The trunk.
Read first: ``engine.py``: one method per call.
"""
