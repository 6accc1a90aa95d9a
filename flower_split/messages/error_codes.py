"""Codes of the error replies that this package's ClientApp sends, beside Flower's own."""

TRUNK_LOST = 70
"""The client lost the trunk, or its round was given up: no fault of the client's."""

KEY_LOST = 71
"""The client's token is for a key that it no longer has: its SuperNode has started again."""
