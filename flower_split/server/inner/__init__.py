"""Strategies that the trunk's strategy wraps: this package's, and Flower's own.

Runs on: The ServerApp's process.
Read first: ``lora_fedavg.py``: FedAvg over adapters.
"""
