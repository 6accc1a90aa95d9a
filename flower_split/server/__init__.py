"""The ServerApp: one run, its rounds, and the trunk's coordination.

Runs on: The machine where Flower runs the ServerApp.
Read first: ``app.py``: one run, top to bottom.
"""
