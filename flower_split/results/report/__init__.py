"""A run's report: one HTML page with everything in it, of one run or of several beside each other.

Runs on: Wherever the run directories are.
Read first: ``page.py``: the page, section by section.
"""
