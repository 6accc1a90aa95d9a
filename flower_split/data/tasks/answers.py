"""Extractive question answering: where in a context the answer stands (SQuAD's form of records)."""

from collections.abc import Mapping, Sequence
from typing import cast

from flower_split.data.documents import Document, Question, Record
from flower_split.data.examples import Example
from flower_split.data.tally import Tally
from flower_split.data.tasks.task import DataTask, fields_of, string_of
from flower_split.errors import ConfigError, DataError

FIELDS = ("question", "context", "answers")


class QuestionAnswering(DataTask):
    """``question-answering``: the first answer's first and last token."""

    def document(self, record: Record, text_field: str, ignored: frozenset[str]) -> Document | None:
        """Return question, context and the first answer; see :class:`DataTask`."""
        place = record.place
        fields = fields_of(record, FIELDS, ignored | {"title"}, self.config.model.task)
        question, context = (string_of(fields, name, place) for name in FIELDS[:2])
        text, start = _first_answer(fields["answers"], place)
        if context[start : start + len(text)] != text:
            raise DataError(
                f"{place}: the answer must stand in the context at its answer_start; at {start} stands "
                f"{context[start : start + len(text)]!r:.60}. Correct the record."
            )
        return Question(place, question, context, start, start + len(text))

    def examples(self, documents: Sequence[Document], tally: Tally) -> list[Example]:
        """Return an example for each question; the context is cut at its end.

        A record whose answer is cut off, or begins or ends within a token, is given to the tally.

        Raises:
            ConfigError: The tokenizer cannot say where its tokens stand.
        """
        if not self.tokenizer.is_fast:
            raise ConfigError(
                "question-answering needs a fast tokenizer, which says where its tokens stand; that of "
                f"{self.config.model.name!r} is none. Save it with a tokenizer.json."
            )
        made = []
        for document in documents:
            assert isinstance(document, Question)
            example = self._example(document)
            if example is None:
                tally.bad(
                    DataError(
                        f"{document.place}: the answer does not stand in the first "
                        f"{self.length} tokens (train.sequence-length). Raise that, or set "
                        'data.on-bad-record = "skip".'
                    )
                )
                continue
            made.append(example)
        return made

    def _example(self, document: Question) -> Example | None:
        encoded = self.tokenizer(
            document.question,
            document.context,
            truncation="only_second",
            max_length=self.length,
            return_offsets_mapping=True,
            verbose=False,
        )
        places = {
            index: offset
            for index, (offset, side) in enumerate(
                zip(encoded["offset_mapping"], encoded.sequence_ids(), strict=True)
            )
            if side == 1
        }
        inside = [
            index
            for index, (start, end) in places.items()
            if start < document.end and end > document.start
        ]
        if not inside or places[inside[-1]][1] < document.end:
            return None
        types = cast(list[int], encoded.get("token_type_ids", []))
        return Example(
            cast(list[int], encoded["input_ids"]),
            [inside[0], inside[-1]],
            form="record",
            kinds={"token_type_ids": types} if types else {},
        )


def _first_answer(answers: object, place: str) -> tuple[str, int]:
    """Return text and first character of an answer.

    Raises:
        DataError: There is none, or it is of another form.
    """
    if isinstance(answers, Mapping):
        texts, starts = _list(answers.get("text")), _list(answers.get("answer_start"))
        if len(texts) == len(starts) > 0:
            text, start = texts[0], starts[0]
            if isinstance(text, str) and text and isinstance(start, int) and start >= 0:
                return text, start
    raise DataError(
        f'{place}: answers must be {{"text": [...], "answer_start": [...]}} with at least one answer; it '
        f"is {answers!r:.60}. Questions without an answer are not learned here: leave them out, or set "
        'data.on-bad-record = "skip".'
    )


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else []
