"""What a task does with records: it reads each as a document, and makes examples of documents."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from flower_split.config import RunConfig
from flower_split.data.documents import Document, Record
from flower_split.data.examples import Example
from flower_split.data.formats import METADATA_FIELDS
from flower_split.data.tally import Tally
from flower_split.errors import DataError


@dataclass(frozen=True, slots=True)
class DataTask(ABC):
    """A ``model.task``, for one client."""

    config: RunConfig
    given: PreTrainedTokenizerBase | None  # None: the task reads no text

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, of a task that reads text."""
        assert self.given is not None, "only tasks without text are made without a tokenizer"
        return self.given

    @property
    def length(self) -> int:
        """The most tokens of an example."""
        return self.config.train.sequence_length

    @abstractmethod
    def document(self, record: Record, text_field: str, ignored: frozenset[str]) -> Document | None:
        """Return what a record says; None: nothing.

        Args:
            record: As it was read.
            text_field: The field of running text.
            ignored: Further fields that may be passed over.

        Raises:
            DataError: A field is missing, of the wrong type, or not understood.
        """

    @abstractmethod
    def examples(self, documents: Sequence[Document], tally: Tally) -> list[Example]:
        """Return examples, in the order of the documents.

        Args:
            documents: From :meth:`document`.
            tally: Counts what is cut, and decides on documents that cannot be used.

        Raises:
            DataError: A document has nothing to learn, or cannot be tokenised; names the place.
        """


def fields_of(
    record: Record, wanted: Collection[str], ignored: frozenset[str], task: str
) -> Mapping[str, object]:
    """Return the fields of a record that a task reads.

    Raises:
        DataError: One is missing, or another is there that may not be passed over.
    """
    given = {str(name): value for name, value in record.content.items() if value is not None}
    missing = [name for name in wanted if name not in given]
    if missing:
        raise DataError(
            f"{record.place}: {task} needs the fields {', '.join(wanted)}; {', '.join(missing)} is "
            f"missing. Its fields are {', '.join(sorted(given)) or 'none'}. Name them in "
            "data.text-field and data.label-field, or correct the record."
        )
    passed = METADATA_FIELDS | ignored | set(wanted)
    strange = [name for name in given if name not in passed and not name.endswith("_id")]
    if strange:
        raise DataError(
            f"{record.place}: {', '.join(map(repr, strange))} is not understood by {task}, which reads "
            f"{', '.join(wanted)}. So that nothing is dropped in silence, name what may be passed over "
            f'in data.ignore-fields = "{", ".join(strange)}", or remove it.'
        )
    return {name: given[name] for name in wanted}


def string_of(fields: Mapping[str, object], name: str, place: str) -> str:
    """Return a field that must be text.

    Raises:
        DataError: It is something else, or blank.
    """
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {name!r} must be text; it is {value!r:.60}. Correct the record.")
    return value


def count_cut(tally: Tally, lost: int) -> None:
    """Count an example that lost tokens."""
    if lost > 0:
        tally.add("cut_examples")
        tally.add("cut_tokens", lost)
