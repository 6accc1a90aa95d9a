"""The client machine: ClientApp, local model, and the trunk as a module.

Runs on: Clients (SuperNodes or simulated).
Read first: ``app.py``: who answers Flower's messages; then ``handlers.py``: how.
"""
