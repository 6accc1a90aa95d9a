"""Tensors and calls on the wire between a client and the trunk.

Runs on: Clients, the trunk, and the server, whose control calls use the same connections.
Read first: ``codec.py``, then ``frames.py`` and ``grpc_transport.py``.
"""
