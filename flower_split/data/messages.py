"""Turns of a conversation, checked: OpenAI's form (role, content) and ShareGPT's (from, value).

What is not understood is refused by name, never passed over: a field that was meant for the model
would be missing from its input.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flower_split.data.plain_values import decoded, without_nulls
from flower_split.errors import DataError

MESSAGE_FIELDS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "weight",
)
"""Fields of a message; all but ``weight`` are given to the chat template."""

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
"""Speakers of ShareGPT's ``from`` and the roles that they are."""

Message = dict[str, object]


@dataclass(frozen=True, slots=True)
class Turns:
    """Messages as chat templates take them."""

    messages: list[Message]
    unlearned: frozenset[int]  # indices of assistant's turns with "weight": 0


def parse_turns(value: object, place: str, field: str, ignored: frozenset[str]) -> Turns:
    """Check a list of messages and bring it into the form that chat templates take.

    ``content`` may be a string, or a list of text parts, whose texts are joined. ``arguments`` of a
    tool call may be JSON text. ``weight`` (0 or 1) says whether an assistant's turn is learned.

    Args:
        value: The field's value, without nulls.
        place: The record, for errors.
        field: The field's name, for errors.
        ignored: Names of fields that may be passed over.

    Raises:
        DataError: A message is malformed, or has something that is not understood.
    """
    value = decoded(value, place, field)
    if not isinstance(value, list) or not value:
        raise DataError(
            f'{place}: {field} must be a list like [{{"role": "user", "content": "..."}}, ...] '
            f"with at least one turn; it is {value!r:.60}."
        )
    messages: list[Message] = []
    unlearned = set()
    for index, item in enumerate(value):
        where = f"{place}, {field}[{index}]"
        message = _message(item, where, ignored)
        if "weight" in message and not _is_learned(message.pop("weight"), message, where):
            unlearned.add(index)
        messages.append(message)
    return Turns(messages, frozenset(unlearned))


def _message(item: object, where: str, ignored: frozenset[str]) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(
            f'{where}: every message needs a "role" (system, user, assistant) and "content"; this '
            f"one is {item!r:.60}."
        )
    message = {str(key): value for key, value in item.items() if key not in ignored}
    if "from" in message or "value" in message:
        message = _from_sharegpt(message, where)
    if not isinstance(message.get("role"), str):
        raise DataError(
            f'{where}: every message needs a "role" (system, user, assistant) and "content"; this '
            f"one is {item!r:.60}."
        )
    for name in message:
        if name not in MESSAGE_FIELDS:
            raise DataError(
                f"{where}: the message has the field {name!r}, which is not understood; "
                f"{', '.join(MESSAGE_FIELDS)} are. Remove it, or name it in data.ignore-fields."
            )
    if message.get("tool_calls") == []:
        del message["tool_calls"]  # as APIs write it where there is no call
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message, where)
    for name in ("reasoning_content", "reasoning", "thinking", "name", "tool_call_id"):
        if not isinstance(message.get(name, ""), str):
            raise DataError(f"{where}: {name} must be a string; it is {message[name]!r:.60}.")
    if "content" in message:
        return {**message, "content": text_of(message["content"], where)}
    if not message.keys() & {"tool_calls", "reasoning_content", "reasoning", "thinking"}:
        raise DataError(
            f'{where}: a message without "content" must have tool_calls; this {message["role"]} '
            "turn has neither. Correct or remove the record."
        )
    return {"content": "", **message}


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker = message.pop("from", None)
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES or "role" in message:
        raise DataError(
            f'{where}: "from" must be one of {", ".join(SHAREGPT_ROLES)}, without a "role" beside '
            f"it; it is {speaker!r:.60}. Rename the speakers."
        )
    if "content" in message:
        raise DataError(f'{where}: a message has either "value" or "content"; this one has both.')
    value = message.pop("value", None)
    role = SHAREGPT_ROLES[speaker]
    if role == "function_call":
        calls = decoded(value, where, "value")
        calls = calls if isinstance(calls, list) else [calls]
        named = [{"type": "function", "function": call} for call in calls]
        return {"role": "assistant", "tool_calls": named, **message}
    return {"role": role, **({} if value is None else {"content": value}), **message}


def text_of(content: object, where: str) -> str:
    """Return the text of a message's content, joining text parts as chat templates do.

    Raises:
        DataError: It is neither text nor a list of text parts.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(
            f"{where}: content must be a string or a list of text parts; it is a "
            f"{type(content).__name__}. Correct or remove the record."
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str) or len(part) > 2:
            names = ", ".join(map(str, part)) if isinstance(part, Mapping) else kind
            raise DataError(
                f'{where}: a part of content must be {{"type": "text", "text": "..."}}; one is of '
                f"type {kind!r} (it has: {names}). This model reads text alone: remove the record "
                'or its other parts, or set data.on-bad-record = "skip".'
            )
        texts.append(text)
    return "".join(texts)


def _tool_calls(message: Message, where: str) -> list[Message]:
    """Check tool calls; ``arguments`` as JSON text become the object that they hold."""
    calls = decoded(message["tool_calls"], where, "tool_calls")
    if message["role"] != "assistant" or not isinstance(calls, list):
        raise DataError(
            f"{where}: tool_calls must be a list in an assistant's turn; it is {calls!r:.60} in a "
            f"turn of role {message['role']!r}."
        )
    checked = []
    for call in calls:
        nested = isinstance(call, Mapping) and "function" in call
        function = call["function"] if nested else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f'{where}: a tool call must be {{"type": "function", "function": {{"name": "...", '
                f'"arguments": {{...}}}}}}; one is {call!r:.60}.'
            )
        arguments = decoded(function.get("arguments") or {}, where, "arguments")
        if not isinstance(arguments, Mapping):
            raise DataError(
                f"{where}: the arguments of tool call {function['name']!r} must be a JSON object; "
                f"they are {arguments!r:.60}."
            )
        function = {**function, "arguments": dict(arguments)}
        checked.append({**call, "function": function} if nested else function)
    return checked


def _is_learned(weight: object, message: Message, where: str) -> bool:
    """Return whether ``weight`` lets a turn be learned; only an assistant's turn can be."""
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(
            f'{where}: "weight" must be 0 (not learned) or 1; it is {weight!r:.60}. Loss with other '
            "weights is not computed here."
        )
    if weight == 1 and message["role"] != "assistant":
        raise DataError(
            f'{where}: "weight" 1 asks for loss on a turn of role {message["role"]!r}; only the '
            "assistant's turns are learned. Remove the weight."
        )
    return weight == 1


def parse_tools(value: object, place: str) -> list[Message]:
    """Return the tools that a chat template is given: JSON schemas, or text that holds them.

    Raises:
        DataError: It is no list of objects.
    """
    tools = decoded(value, place, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(
            f"{place}: tools must be a list of JSON schemas, or JSON text of one; it is "
            f"{tools!r:.60}. Correct or remove the record."
        )
    return [dict(tool) for tool in tools]


def parse_template_variables(value: object, place: str) -> Message:
    """Return ``chat_template_kwargs``: variables that the chat template is given.

    Raises:
        DataError: It is no object, or sets what is set here.
    """
    variables = decoded(value, place, "chat_template_kwargs")
    if not isinstance(variables, Mapping):
        raise DataError(
            f"{place}: chat_template_kwargs must be an object of template variables; it is "
            f"{variables!r:.60}. Correct or remove the record."
        )
    taken = {"messages", "tools", "documents", "chat_template", "add_generation_prompt"}
    taken |= {"continue_final_message", "tokenize", "return_dict", "tokenizer_kwargs"}
    taken |= {"padding", "truncation", "max_length", "return_tensors", "conversation"}
    taken |= {"return_assistant_tokens_mask", "sanitize_control_tokens"}
    clash = sorted(taken & variables.keys())
    if clash:
        raise DataError(
            f"{place}: chat_template_kwargs may not set {', '.join(clash)}, which is set here. "
            "Remove it from the record."
        )
    return {str(name): without_nulls(item) for name, item in variables.items()}
