"""What any process needs: devices, threads, logs, files, failpoints; no model, no Flower.

Runs on: All machines.
Read first: ``devices.py``.
"""
