"""A whole federation on this machine: Flower's ServerApp and ClientApps without SuperLink and Ray.

Runs on: One machine. The ServerApp runs in one process, every client that works at a time in a
process of its own, all forked from one that has loaded torch and Flower already.
Read first: ``job.py``: what a local run is, from its processes to its end.
"""
