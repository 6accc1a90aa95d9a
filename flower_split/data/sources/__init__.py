"""The data sources that are built in, one in each module.

Runs on: Clients.
Read first: ``text.py``: the shortest; ``../source.py`` has the protocol that all of them follow.
"""
