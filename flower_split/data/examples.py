"""Examples: token ids with labels, −100 where nothing is learned.

Lengths are in tokens. Labels stand beside their own token (the model shifts them), so the first
token of an example is never predicted.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flower_split.data.documents import Chat, ChatCompletion, Completion, Document, Text
from flower_split.data.rendering import Rendered, render_chat, render_completion
from flower_split.data.tally import Tally
from flower_split.errors import DataError

logger = logging.getLogger(__name__)

NO_LOSS = -100
"""The label that the loss of transformers' models passes over."""


class Image(Protocol):
    """A picture that can be made into what a model sees, again and again."""

    def inputs(self) -> Mapping[str, Tensor]:
        """Return the model's inputs by name, one example's, such as ``pixel_values``.

        Each is ``[1, …]``, or whatever rows the family's processor gives one picture; batches join them
        along that first axis. The numbers are the same every time.
        """


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence, one picture or both, and what is learned of it.

    ``labels`` is as long as ``input_ids`` (form "tokens"), another sequence (form "target"), or of the
    sequence as a whole: its class, or an answer's first and last token (form "record").
    """

    input_ids: list[int]
    labels: list[int]
    form: Literal["tokens", "target", "record"] = "tokens"
    kinds: Mapping[str, list[int]] = field(default_factory=dict)
    """Further inputs with a number for each token, by name, such as ``token_type_ids``."""
    image: Image | None = None  # beside the sequence, or, where that is empty, instead of it

    @property
    def num_tokens(self) -> int:
        """Label tokens: those that the loss is taken over, after the causal shift."""
        return sum(label != NO_LOSS for label in self.labels[1:])


def make_examples(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    tally: Tally | None = None,
) -> list[Example]:
    """Tokenise documents: texts are packed together, every other document is its own example.

    Args:
        documents: In the order to keep.
        tokenizer: Its chat template is needed only for conversations.
        sequence_length: The most tokens of an example; see :func:`pack_texts` and :func:`cut`.
        tally: Counts what is cut, and decides on documents that cannot be used; None: the first one
            is refused.

    Raises:
        DataError: A document has nothing to learn, or cannot be rendered or tokenised; names the
            place.
    """
    tally = tally or Tally()
    texts = [document for document in documents if isinstance(document, Text)]
    examples = pack_texts(texts, tokenizer, sequence_length, tally)
    for document in documents:
        if isinstance(document, Text):
            continue
        try:
            whole = _examples_of(document, tokenizer)
        except DataError as error:
            tally.bad(error)
            continue
        for example in whole:
            lost = len(example.input_ids) - sequence_length
            if lost > 0:
                tally.add("cut_examples")
                tally.add("cut_tokens", lost)
            examples.append(cut(example, sequence_length))
    return examples


def _examples_of(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return a document's examples, uncut; each has something to learn."""
    if isinstance(document, Completion):
        made = [_completion_example(document, tokenizer)]
    elif isinstance(document, Chat):
        made = [
            _spans_example(rendered, tokenizer, document.place)
            for rendered in render_chat(document, tokenizer)
        ]
    else:
        assert isinstance(document, ChatCompletion)
        rendered = render_completion(document, tokenizer)
        made = [_spans_example(rendered, tokenizer, document.place)]
    if not made or any(example.num_tokens == 0 for example in made):
        raise DataError(
            f"{document.place}: an example needs at least one token to learn, in its completion or "
            "an assistant's turn (with a weight that is not 0); this one has none. Remove the "
            'record, or set data.on-bad-record = "skip".'
        )
    return made


def pack_texts(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, sequence_length: int, tally: Tally
) -> list[Example]:
    """Cut one stream of all texts, with an end-of-sequence token after each, into full examples.

    The last example may be shorter; a rest of one token, which predicts nothing, is left out.
    """
    stream: list[int] = []
    for ids in _tokens_of_texts(texts, tokenizer, tally):
        stream += _ended(ids, tokenizer)
    pieces = (stream[i : i + sequence_length] for i in range(0, len(stream), sequence_length))
    return [Example(piece, list(piece)) for piece in pieces if len(piece) > 1]


def _tokens_of_texts(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> Iterator[list[int]]:
    """Yield the ids of each text; all at once, or one by one to find which is not taken."""
    if not texts:
        return
    try:
        together = tokenizer([text.text for text in texts], verbose=False)["input_ids"]
    except Exception:  # a tokenizer may be any code of the model's; told below, with its place
        logger.debug("the tokenizer does not take all of %d texts", len(texts))
    else:
        yield from together
        return
    for text in texts:
        try:
            yield _tokens(text.text, tokenizer, text.place)
        except DataError as error:
            tally.bad(error)


def _tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, place: str, *, special: bool = True
) -> list[int]:
    """Return the ids of ``text``.

    Raises:
        DataError: The tokenizer does not take it.
    """
    try:
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except Exception as error:  # a tokenizer may be any code of the model's
        raise _refused(error, place) from error
    return cast(list[int], ids)


def _refused(error: Exception, place: str) -> DataError:
    return DataError(
        f"{place}: the tokenizer does not take this text: {type(error).__name__}: {error}. Correct "
        'or remove the record, or set data.on-bad-record = "skip".'
    )


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _completion_example(document: Completion, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenise prompt and completion apart, as they will be when the model generates."""
    prompt = _tokens(document.prompt, tokenizer, document.place)
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]  # some tokenizers end every text by themselves
    if not document.completion:
        return Example(prompt, [NO_LOSS] * len(prompt))
    ids = _tokens(document.completion, tokenizer, document.place, special=False)
    completion = _ended(ids, tokenizer)
    return Example([*prompt, *completion], [NO_LOSS] * len(prompt) + completion)


def _spans_example(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, place: str) -> Example:
    """Tokenise a text with loss on the characters of its spans."""
    text, spans = rendered.text, rendered.spans
    ids: list[int] = []
    labels: list[int] = []
    if tokenizer.is_fast:
        try:
            encoded = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        except Exception as error:  # as in _tokens
            raise _refused(error, place) from error
        ids = encoded["input_ids"]
        for token, (start, _) in zip(ids, encoded["offset_mapping"], strict=True):
            inside = any(first <= start < end for first, end in spans)
            labels.append(token if inside else NO_LOSS)
        return Example(ids, labels)
    borders = [0, *(border for span in spans for border in span), len(text)]
    for index, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        piece = _tokens(text[start:end], tokenizer, place, special=False)
        ids = ids + piece
        labels += piece if index % 2 else [NO_LOSS] * len(piece)
    return Example(ids, labels)


def cut(example: Example, length: int) -> Example:
    """Return ``example`` with at most ``length`` tokens, its labels and its beginning among them.

    The tokens before the first label are the prompt. It may take half of the window, or all that
    the rest leaves free. A prompt that is longer keeps its beginning (the system prompt, the token
    that begins texts) and its end (the question), half each, and loses its middle. What follows is
    cut at its end.
    """
    if len(example.input_ids) <= length:
        return example
    first = next(i for i, label in enumerate(example.labels) if label != NO_LOSS)
    room = min(first, max(length // 2, length - (len(example.labels) - first)))
    end = room // 2  # of the prompt's end
    kept = [*range(room - end), *range(first - end, first + length - room)]
    return Example([example.input_ids[i] for i in kept], [example.labels[i] for i in kept])
