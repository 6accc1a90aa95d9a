"""The typed messages between ServerApp and ClientApp, as they travel through Flower.

Runs on: Both. Nothing outside this package names a record or a key.
Read first: ``orders.py``: what a client is told; then ``replies.py``: what it answers.
"""
