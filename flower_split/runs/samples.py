"""``samples.json``: how a run's base model and its trained model continue the same prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flower_split.errors import RunDirectoryError
from flower_split.runs.files import read_json, write_json

FILE = "samples.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt, and what both models make of it."""

    prompt: str
    base: str  # what the base model says
    trained: str  # what the run's model says


def write_samples(run: Path, samples: Sequence[Sample]) -> None:
    """Keep samples in the run directory ``run``, in place of former ones."""
    write_json(run / FILE, {"samples": [asdict(sample) for sample in samples]})


def read_samples(run: Path) -> list[Sample]:
    """Return what the run directory ``run`` keeps; nothing where nobody made any.

    Raises:
        RunDirectoryError: The file is damaged.
    """
    path = run / FILE
    if not path.is_file():
        return []
    found, fields = read_json(path).get("samples"), Sample.__slots__
    items = found if isinstance(found, list) else [None]
    samples = []
    for item in items:
        if not isinstance(item, Mapping) or set(item) != set(fields):
            raise RunDirectoryError(
                f"{path} must hold a list of samples with {', '.join(fields)} each; it does not. Make "
                "it again: flower-split generate RUN --samples FILE."
            )
        samples.append(Sample(**{name: str(item[name]) for name in fields}))
    return samples
