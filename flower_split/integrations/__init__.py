"""Other people's training loops over a split model: transformers' Trainer, TRL's trainers.

Runs on: Clients, in a program of one's own instead of the ClientApp.
Read first: ``trainer.py``: ``connect_trainer``.
"""
