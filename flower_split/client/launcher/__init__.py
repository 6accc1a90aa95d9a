"""A SuperNode whose ClientApp processes start at once: forked from one that has loaded Flower.

Runs on: Clients in a deployment, started by ``flower-split supernode``.
Read first: ``supernode.py``: how Flower comes to start processes this way.
"""
