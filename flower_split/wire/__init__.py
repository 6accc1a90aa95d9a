"""Tensors and calls on the wire between a client and the trunk."""
