"""A run's directory: configuration, metrics, manifest, report; no Flower.

Runs on: The ServerApp's process.
Read first: ``directory.py``: what lies where.
"""
