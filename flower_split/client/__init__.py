"""The client machine: ClientApp, local model, and the trunk as a module.

Runs on: Clients (SuperNodes or simulated).
Read first: ``app.py``: the handlers of Flower's messages.
"""
