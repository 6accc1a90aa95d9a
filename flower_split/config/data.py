"""Each client's text."""

from dataclasses import dataclass

from flower_split.config.validation import above, at_least, kebab, one_of, plug_in_name
from flower_split.errors import ConfigError

REFUSE_OR_SKIP = ("refuse", "skip")
WITHOUT_PATH = ("stdlib-docs", "hub")  # sources that are no files
DEDUPLICATE = ("auto", "exact", "near")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Each client's text, and how one data set is split over simulated clients."""

    source: str = "stdlib-docs"
    """Where records come from: stdlib-docs, text, jsonl (JSON lines, or an array in a .json file),
    csv, parquet, saved (by datasets, to disk), hub, a plug-in's name, or an import path."""
    path: str = ""
    """File or directory of all but stdlib-docs and hub; may contain {partition_id}, the client's
    partition."""
    eval_path: str = ""
    """File or directory of what is held out, read as path is: one test set for all clients, or with
    {partition_id} one for each; all of path is then trained on. Empty: eval-fraction of each client."""
    dataset: str = ""
    """For hub: the data set's id, or a local directory or file that datasets can load."""
    subset: str = ""
    """For hub: the data set's configuration; empty: its default."""
    split: str = "train"
    """For hub and saved: the split to read."""
    text_field: str = "text"
    """The field that holds the text of records that are running text."""
    label_field: str = "label"
    """Of a classification: the field with a record's label, or with the labels of its tokens."""
    image_field: str = "image"
    """Of image-classification and image-text-to-text: the field with a path, which begins at the folder
    of the file that holds the record, or with the bytes of an image file."""
    ignore_fields: str = ""
    """Fields of records and messages that may be passed over, as "name, name"; any other that is not
    understood is refused. Metadata such as id and source is passed over always."""
    on_bad_record: str = "refuse"
    """On a record that cannot be used: refuse the run, or skip and count it."""
    on_small_client: str = "refuse"
    """On a client with too little data to train and evaluate on: refuse the run, or skip and count
    it."""
    on_unassigned: str = "refuse"
    """On records that the partitioner gives to no client: refuse the run, or skip and count them."""
    partitioner: str = "iid"
    """How one data set is split over clients: a partitioner of flwr-datasets, none (every client reads
    all of its own file), a plug-in's name, or an import path."""
    partition_by: str = ""
    """The field that dirichlet, natural-id and shard divide by; of stdlib-docs "area"."""
    dirichlet_alpha: float = 0.5
    """Concentration of dirichlet, above 0; smaller is more unequal."""
    eval_fraction: float = 0.2
    """Share of a client's examples that is held out for evaluation, between 0 and 1, where eval-path
    names nothing."""
    deduplicate: str = "auto"
    """Held-out text that is trained on: exact (equal documents are on one side, on every client),
    near (also, no held-out document has more than half of its 8-grams in the client's training
    text), or auto (near for stdlib-docs, else exact). With eval-path, what is trained on gives way."""
    max_eval_batches: int = 0
    """Batches of one evaluation of one client, at most; 0: all."""

    @property
    def leaves_repeats_out(self) -> bool:
        """Whether held-out text that nearly repeats training text is left out."""
        return self.deduplicate == "near" or (
            self.deduplicate == "auto" and self.source == "stdlib-docs"
        )

    @property
    def ignored(self) -> frozenset[str]:
        """The names in ``ignore_fields``."""
        return frozenset(filter(None, (name.strip() for name in self.ignore_fields.split(","))))

    def __post_init__(self) -> None:
        """Check choices and ranges; the source is looked up, and checked, where it is used."""
        if not self.source:
            raise ConfigError("data.source must not be empty: a source's name, or an import path.")
        for name in ("on_bad_record", "on_small_client", "on_unassigned"):
            one_of(f"data.{kebab(name)}", getattr(self, name), REFUSE_OR_SKIP)
        plug_in_name("data.partitioner", self.partitioner)
        if self.eval_path and self.source in WITHOUT_PATH:
            raise ConfigError(
                f'data.eval-path is read as data.path is, and the source "{self.source}" reads no path. '
                "Leave it empty, or use a source of files."
            )
        one_of("data.deduplicate", self.deduplicate, DEDUPLICATE)
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(
                f"data.eval-fraction must be between 0 and 1; it is {self.eval_fraction!r}."
            )
        above("data.dirichlet-alpha", self.dirichlet_alpha, 0)
        at_least("data.max-eval-batches", self.max_eval_batches, 0)
