"""Each client's text."""

from dataclasses import dataclass

from flower_split.config.validation import above, at_least, one_of
from flower_split.errors import ConfigError

DATA_SOURCES = ("stdlib-docs", "text", "jsonl", "hub")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Each client's text, and how one data set is split over simulated clients."""

    source: str = "stdlib-docs"
    """Where records come from: stdlib-docs, text, jsonl, hub, or a plug-in's name."""
    path: str = ""
    """File or directory of text and jsonl; may contain {partition_id}, the client's partition."""
    dataset: str = ""
    """For hub: the data set's id, or a local directory or file that datasets can load."""
    subset: str = ""
    """For hub: the data set's configuration; empty: its default."""
    split: str = "train"
    """For hub: the split to read."""
    text_field: str = "text"
    """For hub and jsonl: the field that holds the text."""
    partitioner: str = "iid"
    """How one data set is split over clients: a partitioner of flwr-datasets, or none (every client
    reads all of its own file)."""
    partition_by: str = ""
    """The field that dirichlet, natural-id and shard divide by."""
    dirichlet_alpha: float = 0.5
    """Concentration of dirichlet, above 0; smaller is more unequal."""
    eval_fraction: float = 0.2
    """Share of a client's examples that is held out for evaluation, between 0 and 1."""
    max_eval_batches: int = 0
    """Batches of one evaluation of one client, at most; 0: all."""

    def __post_init__(self) -> None:
        """Check choices, ranges and that the source has what it needs."""
        one_of("data.source", self.source, DATA_SOURCES)
        if self.source in ("text", "jsonl") and not self.path:
            raise ConfigError(
                f'data.path must name a file or directory for source "{self.source}".'
            )
        if self.source == "hub" and not self.dataset:
            raise ConfigError('data.dataset must name the data set for source "hub".')
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(
                f"data.eval-fraction must be between 0 and 1; it is {self.eval_fraction!r}."
            )
        above("data.dirichlet-alpha", self.dirichlet_alpha, 0)
        at_least("data.max-eval-batches", self.max_eval_batches, 0)
