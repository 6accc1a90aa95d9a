"""Formats that people have, each against the document or the tokens that its own convention says."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from flower_split.config import ModelConfig
from flower_split.data import load_tokenizer
from flower_split.data.documents import (
    Chat,
    ChatCompletion,
    Completion,
    Record,
    TemplateOptions,
    Text,
)
from flower_split.data.examples import Example, make_examples
from flower_split.data.formats import parse_record
from flower_split.errors import DataError
from tests.unit.data.conftest import ids

USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TOOL_TEMPLATE = (
    "{% if tools %}{{ 'system: ' }}{% for t in tools %}{{ t.function.name + ' ' }}{% endfor %}"
    "{{ '<end> ' }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' }}"
    "{% for k, v in c.function.arguments.items() %}{{ k ~ ' ' ~ v ~ ' ' }}{% endfor %}{% endfor %}"
    "{{ m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def _parse(ignored: str = "", /, **fields: object) -> object:
    return parse_record(Record("here", fields), "text", frozenset(ignored.split()))


def test_null_fields_are_absent() -> None:
    assert _parse(text="a", messages=None, prompt=None, tools=None, strange=None) == Text(
        "here", "a"
    )
    assert _parse(text=None, messages=None) is None  # nothing at all: blank, and counted so


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    chat = _parse(messages=[{"role": "user", "content": parts}, ASSISTANT])
    assert chat == Chat("here", [{"role": "user", "content": "a b"}, ASSISTANT])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "'input_audio'"),
        ([{"type": "text", "text": "a", "cache_control": {"type": "x"}}], "cache_control"),
        (["a"], "'str'"),
        (3, "it is a int"),
        ({"text": "a"}, "it is a dict"),
        (True, "it is a bool"),
    ],
)
def test_content_of_other_types_is_refused_by_name(content: object, named: str) -> None:
    with pytest.raises(DataError, match=rf"here, messages\[1\]: .*{named}"):
        _parse(messages=[USER, {"role": "assistant", "content": content}])


def test_sharegpt_is_read_with_its_speakers() -> None:
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("observation", "c"), ("gpt", "d")]
    chat = _parse(conversations=[{"from": who, "value": what} for who, what in turns], id="7")
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert chat == Chat(
        "here",
        [{"role": role, "content": what} for role, (_, what) in zip(roles, turns, strict=True)],
    )
    assert _parse(conversations=[USER, ASSISTANT]) == Chat("here", [USER, ASSISTANT])
    assert _parse(conversations=[USER, ASSISTANT], system="s") == Chat(
        "here", [{"role": "system", "content": "s"}, USER, ASSISTANT]
    )
    call = '{"name": "f", "arguments": {"x": 1}}'
    called = _parse(conversations=[USER, {"from": "function_call", "value": call}])
    assert isinstance(called, Chat)
    assert called.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    with pytest.raises(DataError, match='"from" must be one of human, .*it is .alien'):
        _parse(conversations=[{"from": "alien", "value": "x"}])


def test_alpaca_is_read_with_the_prompt_of_its_paper() -> None:
    with_input = _parse(instruction="Add {x}.", input="1", output="2")
    assert with_input == Completion(
        "here",
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1\n\n### Response:",
        "2",
    )
    without = _parse(instruction="Say a.", input="", output="a")
    assert without == Completion(
        "here",
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay a.\n\n### Response:",
        "a",
    )
    assert _parse(instruction="Say a.", context="", response="a", category="qa") == without
    with pytest.raises(DataError, match="'output', which is missing"):
        _parse(instruction="Say a.")


def test_tools_kwargs_and_weights_travel_with_the_chat() -> None:
    chat = _parse(
        messages=[USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}],
        tools=json.dumps([TOOL]),
        chat_template_kwargs={"enable_thinking": False, "empty": None},
    )
    assert chat == Chat(
        "here",
        [USER, ASSISTANT, USER, ASSISTANT],
        frozenset({1}),
        TemplateOptions([TOOL], {"enable_thinking": False}),
    )


def test_nulls_in_tool_calls_are_absent_but_those_in_json_text_are_values() -> None:
    filled = {"name": "f", "arguments": {"city": "x", "unit": None}}
    text = {"name": "f", "arguments": '{"city": "x", "unit": null}'}
    found = []
    for function in (filled, text):
        call = {"id": None, "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        chat = _parse(messages=[USER, message])
        assert isinstance(chat, Chat)
        found.append(chat.messages[1])
    assert found[0] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"city": "x"}}}],
    }
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"city": "x", "unit": None}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"messages": [USER, ASSISTANT], "functions": [TOOL]},
            "'functions' is not understood.*tools",
        ),
        ({"messages": [{**USER, "train": False}]}, "field 'train', which is not understood"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, '"weight" must be 0 .*0.5'),
        ({"messages": [{**USER, "weight": 1}, ASSISTANT]}, "only the assistant's turns"),
        ({"messages": [USER, {"role": "assistant"}]}, 'without "content" must have tool_calls'),
        ({"messages": [USER, ASSISTANT], "tools": "x"}, "tools must be a list"),
        ({"messages": [USER, ASSISTANT], "tools": "[x"}, "tools is text that begins as JSON"),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tools": []}},
            "may not set tools",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences .chosen, rejected."),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "'tools' is not understood"),
        ({"prompt": [USER], "completion": "b"}, "must both be text, or both lists"),
        ({"prompt": [USER], "completion": [{**ASSISTANT, "weight": 0}]}, "has no meaning"),
        ({"text": "a", "labels": [1]}, "'labels' is not understood beside text"),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "either 'input'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(fields: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=f"here.*{said}"):
        _parse(**fields)


def test_fields_named_as_ignored_and_metadata_are_passed_over() -> None:
    chat = Chat("here", [USER, ASSISTANT])
    fields = {"messages": [USER, ASSISTANT], "source": "x", "prompt_id": "1", "prompt": "a"}
    assert _parse("prompt", **fields) == chat
    assert _parse("train", messages=[{**USER, "train": False}, ASSISTANT]) == chat


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "ab\ud800"},
        {"prompt": "a", "completion": "b\udfffc"},
        {"instruction": "a\ud800", "output": "b"},
        {"messages": [USER, {"role": "assistant", "content": "\ud83d"}]},
        {"messages": [USER, ASSISTANT], "tools": [{"name": "\ud800"}]},
        {"messages": [USER, ASSISTANT], "tools": '[{"name": "\\ud800"}]'},
        {"conversations": [{"from": "human", "value": "\udc80"}, {"from": "gpt", "value": "b"}]},
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_place(fields: dict[str, object]) -> None:
    with pytest.raises(DataError, match="here: .*half of a surrogate pair.*on-bad-record"):
        _parse(**fields)


def test_a_whole_surrogate_pair_in_json_is_one_character() -> None:
    assert _parse(text=json.loads('"\\ud83d\\ude00"')) == Text("here", "\U0001f600")


def test_conversational_completion_is_learned_after_its_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    document = _parse(prompt=[USER], completion=[ASSISTANT])
    assert document == ChatCompletion("here", [USER], [ASSISTANT])
    [example] = make_examples([document], tokenizer, 32)
    assert example == Example(ids("user: a <end> assistant: b <end>"), ids("- - - - b <end>"))
    # as TRL's SFTTrainer: the completion is what follows the prompt with the generation prompt
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([USER, ASSISTANT])["input_ids"]
    assert example.input_ids == whole
    assert example.labels == [-100] * len(prompt) + whole[len(prompt) :]


def test_tools_and_calls_reach_the_template_and_only_the_assistant_is_learned(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    call = {"type": "function", "function": {"name": "f", "arguments": {"c": "d", "e": None}}}
    document = _parse(
        messages=[
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "g"},
            {"role": "assistant", "content": "h"},
        ],
        tools=[TOOL],
    )
    [example] = make_examples([document], tokenizer, 64)
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    expected = (
        "system: f <end> user: a <end> assistant: f c d <end> <unk> g <end> assistant: h <end>"
    )
    assert tokens == expected.split()  # "tool:" is no word of the toy tokenizer
    learned = "- - - - - - - f c d <end> - - - - h <end>"
    assert example.labels == ids(learned)


def test_weight_zero_takes_a_turn_out_of_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [USER, {**ASSISTANT, "weight": 0}, {"role": "user", "content": "c"}]
    document = _parse(messages=[*turns, {"role": "assistant", "content": "d", "weight": 1}])
    [example] = make_examples([document], tokenizer, 64)
    assert example == Example(
        ids("user: a <end> assistant: b <end> user: c <end> assistant: d <end>"),
        ids("- - - - - - - - - - d <end>"),
    )
    nothing = _parse(messages=[USER, {**ASSISTANT, "weight": 0}])
    with pytest.raises(DataError, match="here: an example needs at least one token to learn"):
        make_examples([nothing], tokenizer, 64)


MARKED = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] }}{%- endgeneration -%}{% else %}{{ m['content'] }}{% endif %}"
    "{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_marks_of_the_template_decide_what_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = MARKED
    turns = [
        USER,
        ASSISTANT,
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    [example] = make_examples([_parse(messages=turns)], tokenizer, 64)
    assert example == Example(
        ids("user: a <end> assistant: b <end> user: c <end> assistant: d <end>"),
        ids("- - - - b - - - - - d -"),  # the end of a turn is outside the marks
    )
    reference = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True)
    mask = [int(label != -100) for label in example.labels]
    assert mask == reference["assistant_masks"] and example.input_ids == reference["input_ids"]
    turns[1] = {**ASSISTANT, "weight": 0}
    [example] = make_examples([_parse(messages=turns)], tokenizer, 64)
    assert example.labels == ids("- - - - - - - - - - d -")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "enable_thinking"),
        ({"messages": [USER, {**ASSISTANT, "reasoning_content": "c"}]}, "reasoning_content"),
        ({"messages": [{"role": "critic", "content": "a"}, ASSISTANT]}, "critic"),
    ],
)
def test_what_the_template_has_no_place_for_is_refused(
    tokenizer: PreTrainedTokenizerFast, fields: dict[str, object], named: str
) -> None:
    document = _parse(**{"messages": [USER, ASSISTANT], **fields})
    with pytest.raises(DataError, match=f"here: the chat template .* no place for '{named}'"):
        make_examples([document], tokenizer, 64)


def test_template_variables_reach_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ 'h ' if loud else '' }}" + str(tokenizer.chat_template)
    with_it = _parse(messages=[USER, ASSISTANT], chat_template_kwargs={"loud": True})
    [example] = make_examples([with_it], tokenizer, 64)
    assert example.input_ids == ids("h user: a <end> assistant: b <end>")


@pytest.mark.parametrize("raised", ["{{ messages[0]['content'] + 1 }}", "{{ messages.x.y.z }}"])
def test_whatever_a_template_raises_keeps_its_place(
    tokenizer: PreTrainedTokenizerFast, raised: str
) -> None:
    tokenizer.chat_template = raised
    with pytest.raises(DataError, match="here: the chat template refuses these messages"):
        make_examples([_parse(messages=[USER, ASSISTANT])], tokenizer, 64)


def test_whatever_a_tokenizer_raises_keeps_its_place(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("no such piece")

    monkeypatch.setattr(type(tokenizer), "__call__", fail)
    for document in (Text("p, line 3", "a"), Completion("p, line 3", "a", "b")):
        with pytest.raises(DataError, match="p, line 3: the tokenizer does not take.*KeyError"):
            make_examples([document], tokenizer, 64)


def test_quickstart_template_shows_tools_and_calls_and_learns_the_assistants_turns() -> None:
    tokenizer = load_tokenizer(ModelConfig())
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    [example] = make_examples([_parse(messages=turns, tools=[TOOL])], tokenizer, 256)
    end = tokenizer.eos_token
    learned = f'{{"name": "f", "arguments": {{"x": 1}}}}{end}'
    assert tokenizer.decode(example.input_ids) == (
        f"system:\n[{json.dumps(TOOL)}]\nuser:\na\nassistant:\n{learned}\n"
    )
    assert tokenizer.decode([label for label in example.labels if label != -100]) == learned
