"""What ServerApp and ClientApp say to each other through Flower.

Runs on: Both; nothing else names a record or a key.
Read first: ``client_facts.py``: the handshake.
"""
