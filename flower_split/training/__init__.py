"""Local training: round, optimizer step, micro-batch; pure torch.

Runs on: Clients.
Read first: ``round.py``; then ``loss.py``, and ``measures.py`` for what is reported.
"""
