"""The trunk server: the middle layers, their optimizer, and the windows that feed it."""
