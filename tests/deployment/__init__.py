"""A deployment whose processes stand for machines, and what an operator sees when one of them fails.

``python -m tests.deployment`` prints the table that stands in ``docs/deployment.md``.
"""
