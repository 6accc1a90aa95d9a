"""Plug-ins of flower_split: one for each extension point, each in one file."""
