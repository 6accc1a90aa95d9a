"""Messages of the trunk's protocol, generated from ``proto/trunk.proto``; change that file, not these.

Runs on: Clients, the trunk and the server.
Read first: ``proto/trunk.proto``, which says what each call means.
"""
