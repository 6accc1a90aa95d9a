"""What a finished run is good for: metrics as tables, export, generation, personal adapters.

Runs on: Wherever the run directory is.
Read first: ``export.py``: one PEFT adapter out of three parts.
"""

from flower_split.results.frames import load

__all__ = ["load"]
