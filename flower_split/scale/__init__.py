"""A federation on paper: a discrete-event simulation of rounds, from what one micro-batch costs.

Runs on: Any machine; needs no model, no data and no network.
Read first: ``round.py``: one round, from the ServerApp's messages to the commit.
"""
