"""Codes of the error replies that this package's ClientApp sends, beside Flower's own."""

TRUNK_LOST = 70
"""The client lost the trunk, or its round was given up: no fault of the client's."""
