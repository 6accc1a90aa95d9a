"""What a finished run is good for: export, generation, personal adapters.

Runs on: Wherever the run directory is.
Read first: ``export.py``: one PEFT adapter out of three parts.
"""
