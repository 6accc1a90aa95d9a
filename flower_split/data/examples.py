"""Examples: token ids with labels, −100 where nothing is learned.

Lengths are in tokens. Labels stand beside their own token (the model shifts them), so the first
token of an example is never predicted.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flower_split.data.documents import Chat, Completion, Document, Text
from flower_split.errors import DataError

logger = logging.getLogger(__name__)

NO_LOSS = -100
"""The label that the loss of transformers' models passes over."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence; ``labels`` is as long as ``input_ids``."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_tokens(self) -> int:
        """Label tokens: those that the loss is taken over, after the causal shift."""
        return sum(label != NO_LOSS for label in self.labels[1:])


def make_examples(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> list[Example]:
    """Tokenise documents: texts are packed together, every other document is its own example.

    Args:
        documents: In the order to keep.
        tokenizer: Its chat template is needed only for chats.
        sequence_length: The most tokens of an example; see :func:`pack_texts` and :func:`_cut`.

    Raises:
        DataError: A document has nothing to learn, or a chat cannot be rendered; names the place.
    """
    texts = [document.text for document in documents if isinstance(document, Text)]
    examples = pack_texts(texts, tokenizer, sequence_length)
    cut = 0
    for document in documents:
        if isinstance(document, Text):
            continue
        if isinstance(document, Completion):
            whole = [_completion_example(document, tokenizer)]
        else:
            whole = _chat_examples(document, tokenizer)
        for example in whole:
            if example.num_tokens == 0:
                raise DataError(
                    f"{document.place}: an example needs at least one token to learn, in its "
                    "completion or an assistant's turn; this one has none. Remove the record."
                )
            cut += len(example.input_ids) > sequence_length
            examples.append(_cut(example, sequence_length))
    if cut:
        logger.info("%d examples were longer than %d tokens and were cut", cut, sequence_length)
    return examples


def pack_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> list[Example]:
    """One stream of all texts with an end-of-sequence token after each, cut into full examples.

    The last example may be shorter; a rest of one token, which predicts nothing, is left out.
    """
    stream: list[int] = []
    if texts:
        for ids in tokenizer(list(texts), verbose=False)["input_ids"]:
            stream += _ended(ids, tokenizer)
    pieces = (stream[i : i + sequence_length] for i in range(0, len(stream), sequence_length))
    return [Example(piece, list(piece)) for piece in pieces if len(piece) > 1]


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _completion_example(document: Completion, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Prompt and completion are tokenised apart, as they will be when the model generates."""
    prompt = tokenizer(document.prompt, verbose=False)["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]  # some tokenizers end every text by themselves
    if not document.completion:
        return Example(prompt, [NO_LOSS] * len(prompt))
    ids = tokenizer(document.completion, add_special_tokens=False, verbose=False)["input_ids"]
    completion = _ended(ids, tokenizer)
    return Example([*prompt, *completion], [NO_LOSS] * len(prompt) + completion)


def _chat_examples(document: Chat, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """One example with loss on every assistant turn, or one per turn where templates need that.

    Some templates render a turn differently once others follow it (they drop its reasoning). Then
    each assistant turn becomes an example of its own, rendered as the model sees it when it has to
    write that turn.
    """
    whole = _render(document, tokenizer, len(document.messages), prompt=False)
    turns = []
    for index, message in enumerate(document.messages):
        if message["role"] == "assistant":
            before = _render(document, tokenizer, index, prompt=True)
            after = _render(document, tokenizer, index + 1, prompt=False)
            if not after.startswith(before):
                raise DataError(
                    f"{document.place}: the chat template must render an assistant's turn after "
                    "the generation prompt; this template does not, so the turn cannot be told "
                    "from the rest. Use prompt and completion instead of messages."
                )
            turns.append((after, len(before)))
    if all(whole.startswith(after) for after, _ in turns):
        return [_spans_example(whole, [(start, len(after)) for after, start in turns], tokenizer)]
    return [_spans_example(after, [(start, len(after))], tokenizer) for after, start in turns]


def _render(document: Chat, tokenizer: PreTrainedTokenizerBase, count: int, *, prompt: bool) -> str:
    """The first ``count`` messages as text, with the generation prompt if asked for."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{document.place}: messages need a chat template, and this model's tokenizer has "
            "none. Use prompt and completion, or a model with a chat template."
        )
    if count == 0 and prompt:
        return ""  # a conversation that the assistant opens; many templates refuse no messages
    messages = cast(list[dict[str, str]], list(document.messages[:count]))
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise DataError(
            f"{document.place}: the chat template refuses these messages: {error}. "
            "Change the roles or their order to what the model's template allows."
        ) from error
    return cast(str, text)


def _spans_example(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Example:
    """``text`` with loss on the characters of ``spans`` (start, end); in order, not overlapping."""
    ids: list[int] = []
    labels: list[int] = []
    if tokenizer.is_fast:
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = encoded["input_ids"]
        for token, (start, _) in zip(ids, encoded["offset_mapping"], strict=True):
            inside = any(first <= start < end for first, end in spans)
            labels.append(token if inside else NO_LOSS)
        return Example(ids, labels)
    borders = [0, *(border for span in spans for border in span), len(text)]
    for index, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        piece = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids + piece
        labels += piece if index % 2 else [NO_LOSS] * len(piece)
    return Example(ids, labels)


def _cut(example: Example, length: int) -> Example:
    """At most ``length`` tokens: the beginning, or where labels begin late, a window around that.

    A prompt may take half of the window when the completion would not fit otherwise, so a long
    prompt never costs an example its labels.
    """
    first = next(i for i, label in enumerate(example.labels) if label != NO_LOSS)
    start = max(0, min(len(example.labels) - length, first - length // 2))
    window = slice(start, start + length)
    return Example(example.input_ids[window], example.labels[window])
