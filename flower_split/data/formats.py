"""Formats of records: from the fields of a record to the document that it is.

================== ============================================ ==================================
format             fields                                       beside them
================== ============================================ ==================================
chat               ``messages``                                 ``tools``, ``chat_template_kwargs``
ShareGPT           ``conversations``                            the same, ``system``
prompt, completion ``prompt``, ``completion``: both text        none
the same, as turns ``prompt``, ``completion``: both messages    ``tools``, ``chat_template_kwargs``
Alpaca             ``instruction``, ``output`` or ``response``  ``input`` or ``context``
text               ``data.text-field``                          none
================== ============================================ ==================================

A field that is null is absent. What is in neither column of the record's format is refused by name,
unless it is metadata (:data:`METADATA_FIELDS`, or a name that ends in ``_id``), the column that the
data is divided by, or named in ``data.ignore-fields``.
"""

from collections.abc import Mapping

from flower_split.data.documents import (
    Chat,
    ChatCompletion,
    Completion,
    Document,
    Record,
    TemplateOptions,
    Text,
)
from flower_split.data.messages import (
    Message,
    parse_template_variables,
    parse_tools,
    parse_turns,
)
from flower_split.data.plain_values import check_text, without_nulls
from flower_split.errors import DataError

METADATA_FIELDS = frozenset(
    {
        *("id", "uuid", "idx", "index", "source", "dataset", "split", "category", "language"),
        *("lang", "license", "url", "metadata", "meta", "timestamp", "created_at"),
        *("file", "folder"),  # of data.source = "text"
        *("__index_level_0__", "Unnamed: 0", ""),  # the index that pandas writes
    }
)
"""Fields that say something about a record and nothing that a model is given: passed over."""

_TEMPLATE_FIELDS = frozenset({"tools", "chat_template_kwargs"})
_FORMATS: dict[str, tuple[frozenset[str], frozenset[str]]] = {  # name -> (its own, beside them)
    "chat": (frozenset({"messages"}), _TEMPLATE_FIELDS),
    "ShareGPT": (frozenset({"conversations"}), _TEMPLATE_FIELDS | {"system"}),
    "prompt and completion": (frozenset({"prompt", "completion"}), _TEMPLATE_FIELDS),
    "Alpaca": (frozenset({"instruction"}), frozenset({"input", "output", "context", "response"})),
}
_MEANINGS = {
    "chosen": "preferences (chosen, rejected) are not learned here",
    "rejected": "preferences (chosen, rejected) are not learned here",
    "label": "labels of whole records are not learned here",
    "input_ids": "data that is tokenised already is not read",
    "functions": 'OpenAI\'s older form of "tools"',
}

# Stanford Alpaca's own prompts: github.com/tatsu-lab/stanford_alpaca, train.py.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def parse_record(
    record: Record, text_field: str, ignored: frozenset[str] = frozenset()
) -> Document | None:
    """Return the document that ``record`` is, or None if it is blank text.

    Args:
        record: As it was read.
        text_field: The field of running text.
        ignored: Further fields that may be passed over.

    Raises:
        DataError: A field is missing, of the wrong type, or not understood; names place and field.
    """
    place = record.place
    given = {
        str(name): without_nulls(value)
        for name, value in record.content.items()
        if value is not None and name not in ignored
    }
    name = _format_of(given, text_field, place)
    own, beside = _FORMATS.get(name, (frozenset({text_field}), frozenset()))
    _refuse_unknown(given, own | beside, name, place)
    for field in own | beside:
        check_text(given.get(field), place, field)
    if name == "text":
        if text_field not in given and record.content.get(text_field, "") is None:
            return None  # a null text is a blank one
        text = _string(given, text_field, record).strip()
        return Text(place, text) if text else None
    if name == "Alpaca":
        return _alpaca(given, record)
    if name == "prompt and completion":
        return _completion(given, record, ignored)
    return _chat(given, place, ignored)


def _format_of(given: Mapping[str, object], text_field: str, place: str) -> str:
    found = [name for name, (own, _) in _FORMATS.items() if own & given.keys()]
    if text_field in given and not any(text_field in _FORMATS[name][0] for name in found):
        found.append("text")
    if len(found) > 1:
        raise DataError(
            f"{place}: a record must be in one format; this one has the fields of {' and of '.join(found)} "
            f"({', '.join(given)}). Name the fields that are not to be used in data.ignore-fields, "
            "or remove them."
        )
    return found[0] if found else "text"


def _refuse_unknown(
    given: Mapping[str, object], known: frozenset[str], name: str, place: str
) -> None:
    strange = [
        field
        for field in given
        if field not in known and field not in METADATA_FIELDS and not field.endswith("_id")
    ]
    if not strange or (name == "text" and not known & given.keys()):
        return  # without any field of a format, the error is that the text is missing
    meant = "; ".join(f"{field}: {_MEANINGS[field]}" for field in strange if field in _MEANINGS)
    raise DataError(
        f"{place}: {', '.join(map(repr, strange))} is not understood beside {name}, for which "
        f"{', '.join(sorted(known))} are used{f' ({meant})' if meant else ''}. So that nothing is "
        "dropped in silence, name what may be passed over in data.ignore-fields = "
        f'"{", ".join(strange)}", or remove it. Metadata is passed over: '
        f"{', '.join(sorted(METADATA_FIELDS - {''}))} and names that end in _id."
    )


def _string(given: Mapping[str, object], name: str, record: Record) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        fields = ", ".join(sorted(map(str, record.content))) or "none"
        found = f"is a {type(value).__name__}" if name in given else "is missing"
        if name not in given and name in record.content:
            found = "is null"
        raise DataError(
            f"{record.place}: a record needs the string field {name!r}, which {found}; its fields "
            f"are {fields}. Use messages, conversations, prompt and completion, or instruction and "
            "output; or name the field of the text in data.text-field."
        )
    return value


def _options(given: Mapping[str, object], place: str) -> TemplateOptions:
    tools = parse_tools(given["tools"], place) if given.get("tools") else []
    variables: Message = {}
    if "chat_template_kwargs" in given:
        variables = parse_template_variables(given["chat_template_kwargs"], place)
    check_text([tools, variables], place, "tools or chat_template_kwargs")
    return TemplateOptions(tools, variables)


def _chat(given: Mapping[str, object], place: str, ignored: frozenset[str]) -> Chat:
    field = "messages" if "messages" in given else "conversations"
    turns = parse_turns(given[field], place, field, ignored)
    messages, unlearned = turns.messages, turns.unlearned
    if "system" in given:
        system = given["system"]
        if not isinstance(system, str) or messages[0]["role"] == "system":
            raise DataError(
                f"{place}: system must be a string, and the only system turn; it is "
                f"{system!r:.60}. Correct or remove the record."
            )
        if system.strip():
            messages = [{"role": "system", "content": system}, *messages]
            unlearned = frozenset(index + 1 for index in unlearned)
    check_text(messages, place, field)
    return Chat(place, messages, unlearned, _options(given, place))


def _completion(
    given: Mapping[str, object], record: Record, ignored: frozenset[str]
) -> Completion | ChatCompletion:
    place = record.place
    if not any(isinstance(given.get(name), list) for name in ("prompt", "completion")):
        _refuse_unknown(given, frozenset({"prompt", "completion"}), "prompt and completion", place)
        return Completion(
            place, _string(given, "prompt", record), _string(given, "completion", record)
        )
    sides = []
    for name in ("prompt", "completion"):
        if not isinstance(given.get(name), list):
            raise DataError(
                f"{place}: prompt and completion must both be text, or both lists of messages; "
                f"{name} is {given.get(name)!r:.60}. Correct or remove the record."
            )
        sides.append(parse_turns(given[name], place, name, ignored))
    prompt, completion = sides
    if prompt.unlearned or completion.unlearned:
        raise DataError(
            f'{place}: "weight" has no meaning in prompt and completion, of which the completion is '
            'learned. Use "messages", or remove the weights.'
        )
    check_text([prompt.messages, completion.messages], place, "prompt or completion")
    return ChatCompletion(place, prompt.messages, completion.messages, _options(given, place))


def _alpaca(given: Mapping[str, object], record: Record) -> Completion:
    """Return the record under the prompt with which Stanford's Alpaca was trained."""
    for one, other in (("input", "context"), ("output", "response")):
        if one in given and other in given:
            raise DataError(
                f"{record.place}: a record has either {one!r} or {other!r}; this one has both. "
                f"Name one of them in data.ignore-fields."
            )
    instruction = _string(given, "instruction", record)
    output = _string(given, "response" if "response" in given else "output", record)
    name = "context" if "context" in given else "input"
    more = _string(given, name, record) if name in given else ""
    template = _ALPACA_WITH_INPUT if more.strip() else _ALPACA
    return Completion(record.place, template.format(instruction=instruction, input=more), output)
