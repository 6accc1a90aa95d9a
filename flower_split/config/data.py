"""Each client's text."""

from dataclasses import dataclass

from flower_split.config.validation import above, at_least, one_of
from flower_split.errors import ConfigError

DATA_SOURCES = ("stdlib-docs", "text", "jsonl", "hub")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Each client's text, and how one data set is split over simulated clients."""

    source: str = "stdlib-docs"  # stdlib-docs, text, jsonl or hub
    path: str = ""  # text / jsonl: a file or directory; may contain {partition_id}
    dataset: str = ""  # hub: the data set's id, or a local directory that datasets can load
    subset: str = ""  # hub: the data set's configuration
    split: str = "train"  # hub
    text_field: str = "text"  # hub / jsonl: the field that holds the text
    partitioner: str = "iid"  # of flwr-datasets, or "none": every client reads all of its own file
    partition_by: str = ""  # the column of dirichlet, natural-id and shard
    dirichlet_alpha: float = 0.5  # smaller: more unequal
    eval_fraction: float = 0.2  # share of a client's examples held out
    max_eval_batches: int = 0  # per evaluation and client; 0: all

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
