"""Classification: a class for each record, or for each of its tokens."""

from collections.abc import Sequence
from typing import cast

from flower_split.data.documents import Document, Labelled, Record, Tagged
from flower_split.data.examples import NO_LOSS, Example
from flower_split.data.tally import Tally
from flower_split.data.tasks.task import DataTask, count_cut, fields_of, string_of
from flower_split.errors import ConfigError, DataError

TOKENS = "tokens"
"""The field with a record's words, where each has a label."""


class SequenceClassification(DataTask):
    """``sequence-classification``: one class for a text."""

    def document(self, record: Record, text_field: str, ignored: frozenset[str]) -> Document | None:
        """Return a text with its class, by index; see :class:`DataTask`."""
        label_field = self.config.data.label_field
        fields = fields_of(record, (text_field, label_field), ignored, self.config.model.task)
        text = string_of(fields, text_field, record.place)
        names = self.config.model.label_names
        return Labelled(record.place, text, class_of(fields[label_field], names, record.place))

    def examples(self, documents: Sequence[Document], tally: Tally) -> list[Example]:
        """Return an example for each text, cut as the tokenizer cuts; see :class:`DataTask`."""
        made = []
        for document in documents:
            assert isinstance(document, Labelled)
            whole = self.tokenizer(document.text, verbose=False)["input_ids"]
            count_cut(tally, len(whole) - self.length)
            ids = self.tokenizer(
                document.text, truncation=True, max_length=self.length, verbose=False
            )["input_ids"]
            made.append(Example(cast(list[int], ids), [document.label], form="record"))
        return made


class TokenClassification(DataTask):
    """``token-classification``: a class for each word; the first token of a word stands for it."""

    def document(self, record: Record, text_field: str, ignored: frozenset[str]) -> Document | None:
        """Return words with their classes, by index; see :class:`DataTask`."""
        label_field, place = self.config.data.label_field, record.place
        fields = fields_of(record, (TOKENS, label_field), ignored, self.config.model.task)
        words, labels = fields[TOKENS], fields[label_field]
        well = isinstance(words, Sequence) and not isinstance(words, str) and len(words) > 0
        if not well or not all(isinstance(word, str) and word.strip() for word in words):  # type: ignore[attr-defined]
            raise DataError(
                f"{place}: {TOKENS!r} must be a list of words, none of them blank; it is {words!r:.60}. "
                "Correct the record."
            )
        assert isinstance(words, Sequence)
        if not isinstance(labels, Sequence) or len(labels) != len(words):
            raise DataError(
                f"{place}: {label_field!r} must be a list with a label for each of the {len(words)} "
                f"words; it is {labels!r:.60}. Correct the record."
            )
        names = self.config.model.label_names
        classes = tuple(class_of(label, names, place) for label in labels)
        return Tagged(place, tuple(words), classes)

    def examples(self, documents: Sequence[Document], tally: Tally) -> list[Example]:
        """Return an example for each record; see :class:`DataTask`.

        Raises:
            ConfigError: The tokenizer cannot say which word a token is of.
        """
        if not self.tokenizer.is_fast:
            raise ConfigError(
                "token-classification needs a fast tokenizer, which says which word a token is of; that "
                f"of {self.config.model.name!r} is none. Save it with a tokenizer.json."
            )
        made = []
        for document in documents:
            assert isinstance(document, Tagged)
            try:
                encoded = self.tokenizer(
                    list(document.words), is_split_into_words=True, verbose=False
                )
                cut = self.tokenizer(
                    list(document.words),
                    is_split_into_words=True,
                    truncation=True,
                    max_length=self.length,
                    verbose=False,
                )
            except AssertionError as error:  # byte-level BPE that was not made for words
                raise ConfigError(
                    f"the tokenizer of {self.config.model.name!r} does not take words: {error} Set "
                    '"add_prefix_space": true in its tokenizer_config.json.'
                ) from error
            count_cut(tally, len(encoded["input_ids"]) - self.length)
            labels, last = [], None
            for word in cut.word_ids():
                labels.append(NO_LOSS if word is None or word == last else document.classes[word])
                last = word
            if all(label == NO_LOSS for label in labels):
                tally.bad(
                    DataError(f"{document.place}: no word is left of this record. Correct it.")
                )
                continue
            made.append(Example(cast(list[int], cut["input_ids"]), labels))
        return made


def class_of(value: object, names: Sequence[str], place: str) -> int:
    """Return the index of a class that a record gives by name or index.

    Raises:
        DataError: There is no such class.
    """
    if isinstance(value, str) and value in names:
        return names.index(value)
    text = str(value)
    if not isinstance(value, bool | float) and text.isdecimal() and int(text) < len(names):
        return int(text)
    raise DataError(
        f"{place}: a label must be one of {', '.join(names)} (model.labels), or its index from 0; it is "
        f"{value!r:.60}. Correct the record or model.labels."
    )
