"""Conversations through a tokenizer's chat template: the text, and which characters are learned.

The template is given everything that a record says for it (tools, variables, tool calls, reasoning);
where it has no place for something, the record is refused, since the model would never see it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from flower_split.data.documents import Chat, ChatCompletion, TemplateOptions
from flower_split.data.messages import Message
from flower_split.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that every template may be given; others must be named in the template."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SHAPING = ("tool_calls", *_REASONING)  # fields of a message that a template must know
Span = tuple[int, int]

# Template variables have any name, so these are called with more than their signatures say.
_RENDER = cast(Callable[..., tuple[list[str], list[list[Span]]]], render_jinja_template)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text and the spans (first character, one after the last) of it that are learned, in order."""

    text: str
    spans: list[Span]


def render_completion(document: ChatCompletion, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render a conversational prompt with its completion; what follows the prompt is learned.

    The prompt ends with the generation prompt, as in TRL's SFTTrainer.

    Raises:
        DataError: The template refuses the messages, or renders the prompt otherwise beside them.
    """
    template = _Template(document.place, document.options, tokenizer)
    messages = [dict(message) for message in [*document.prompt, *document.completion]]
    template.check(messages)
    before = template.render(messages[: len(document.prompt)], prompt=True)
    whole = template.render(messages, prompt=False)
    if not whole.startswith(before):
        raise DataError(
            f"{document.place}: the chat template must render the completion after the prompt and "
            "the generation prompt; this template does not, so the completion cannot be told from "
            "the rest. Use prompt and completion as text."
        )
    return Rendered(whole, [(len(before), len(whole))])


def render_chat(document: Chat, tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    """Render a conversation with loss on the assistant's turns.

    Where the template itself marks what the model generates (``{% generation %}``), that is learned.
    Elsewhere a turn is what follows the text of the turns before it with the generation prompt. Some
    templates render a turn differently once others follow it (they drop its reasoning). Then each
    assistant's turn becomes an example of its own, rendered as the model sees it when it has to
    write that turn.

    Raises:
        DataError: The template refuses the messages, or the turns cannot be told from the rest.
    """
    template = _Template(document.place, document.options, tokenizer)
    messages = [dict(message) for message in document.messages]
    template.check(messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if template.marks_generation:
        return [_by_marks(template, messages, turns, document.unlearned)]
    whole = template.render(messages, prompt=False)
    rendered: list[tuple[int, str, Span]] = []
    for index in turns:
        before = template.render(messages[:index], prompt=True)
        after = template.render(messages[: index + 1], prompt=False)
        if not after.startswith(before):
            raise DataError(
                f"{document.place}: the chat template must render an assistant's turn after "
                "the generation prompt; this template does not, so the turn cannot be told "
                "from the rest. Use prompt and completion instead of messages."
            )
        rendered.append((index, after, (len(before), len(after))))
    learned = [item for item in rendered if item[0] not in document.unlearned]
    if all(whole.startswith(after) for _, after, _ in rendered):
        return [Rendered(whole, [span for _, _, span in learned])]
    return [Rendered(after, [span]) for _, after, span in learned]


def _by_marks(
    template: "_Template", messages: list[Message], turns: list[int], unlearned: frozenset[int]
) -> Rendered:
    """Take the template's own marks; marks belong to turns in their order."""
    text, spans = template.render_marked(messages)
    if unlearned:
        if len(spans) != len(turns):
            raise DataError(
                f"{template.place}: the chat template marks {len(spans)} generated spans for "
                f'{len(turns)} assistant\'s turns, so the turns with "weight": 0 cannot be told. '
                "Remove the weights, or use a template with one mark for each turn."
            )
        spans = [span for index, span in zip(turns, spans, strict=True) if index not in unlearned]
    return Rendered(text, spans)


class _Template:
    """A tokenizer's chat template with what one record gives it."""

    def __init__(
        self, place: str, options: TemplateOptions, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"{place}: messages need a chat template, and this model's tokenizer has "
                "none. Use prompt and completion, or a model with a chat template."
            )
        self.place = place
        self._tokenizer = tokenizer
        self._tools = [dict(tool) for tool in options.tools] or None
        self._variables = dict(options.variables)
        try:
            self._source = tokenizer.get_chat_template(None, self._tools)
        except ValueError as error:
            raise DataError(
                f"{place}: the tokenizer has no default chat template: {error} "
                "Use prompt and completion, or a model with one."
            ) from error

    @property
    def marks_generation(self) -> bool:
        """Whether the template marks what the model generates."""
        return _GENERATION.search(self._source) is not None

    def check(self, messages: Sequence[Message]) -> None:
        """Check that the template has a place for what it is given.

        Raises:
            DataError: It names something nowhere, so it would be left out of the model's input.
        """
        wanted = list(self._variables) + (["tools"] if self._tools else [])
        for message in messages:
            wanted += [name for name in _SHAPING if name in message]
            role = str(message["role"])
            wanted += [role] if role not in ROLES else []
        for name in dict.fromkeys(wanted):
            # transformers gives reasoning to the template under each of its names
            names = _REASONING if name in _REASONING else (name,)
            if not any(re.search(rf"\b{re.escape(other)}\b", self._source) for other in names):
                raise DataError(
                    f"{self.place}: the chat template of this model has no place for {name!r}: it "
                    "would be left out of what the model is given. Use a model whose template "
                    f"has one, remove it, or name it in data.ignore-fields (a field of that name)."
                )

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Return the text of ``messages``, with the generation prompt if asked for.

        Raises:
            DataError: The template refuses them.
        """
        if not messages and prompt:
            return ""  # a conversation that the assistant opens; many templates refuse no messages
        try:
            apply = cast(Callable[..., object], self._tokenizer.apply_chat_template)
            text = apply(
                list(messages),
                tools=self._tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except Exception as error:  # a template is a program of the model's: it may raise anything
            raise self._refusal(error) from error
        return str(text)

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return the text of ``messages`` and the spans that the template marks as generated.

        Raises:
            DataError: The template refuses them.
        """
        variables = {**self._tokenizer.special_tokens_map, **self._variables}
        try:
            texts, marks = _RENDER(
                conversations=[list(messages)],
                tools=self._tools,
                chat_template=self._source,
                return_assistant_tokens_mask=True,
                **variables,
            )
        except Exception as error:  # as above
            raise self._refusal(error) from error
        return texts[0], [(start, end) for start, end in marks[0]]

    def _refusal(self, error: Exception) -> DataError:
        kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        return DataError(
            f"{self.place}: the chat template refuses these messages: {kind}{error}. Change the "
            "roles, their order or their fields to what the model's template allows, or set "
            'data.on-bad-record = "skip".'
        )
