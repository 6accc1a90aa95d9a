"""The ``flower-split`` command."""
