"""Examples against tokens and labels written out by hand."""

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from flower_split.data.documents import Chat, Completion, Text
from flower_split.data.examples import Example, make_examples
from flower_split.errors import DataError
from tests.unit.data.conftest import ids


def _chat(*turns: tuple[str, str]) -> Chat:
    return Chat("chat", [{"role": role, "content": content} for role, content in turns])


def test_texts_are_packed_with_an_end_token_after_each(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = make_examples([Text("", "a b c"), Text("", "d"), Text("", "e f")], tokenizer, 4)
    assert [example.input_ids for example in examples] == [
        ids("a b c <eos>"),
        ids("d <eos> e f"),
    ]  # the last end token alone would predict nothing
    assert all(example.labels == example.input_ids for example in examples)
    assert [example.num_tokens for example in examples] == [3, 3]


def test_texts_shorter_than_a_sequence_give_one_short_example(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    [example] = make_examples([Text("", "a b")], tokenizer, 8)
    assert example.input_ids == ids("a b <eos>")


def test_completion_has_loss_on_the_completion_and_its_end_only(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    [example] = make_examples([Completion("", "a b", "c d")], tokenizer, 8)
    assert example == Example(ids("a b c d <eos>"), ids("- - c d <eos>"))
    assert example.num_tokens == 3


def test_completion_begins_as_the_tokenizer_begins_texts(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="h $A <eos>", special_tokens=[("h", ids("h")[0]), ("<eos>", 0)]
    )
    documents = [Completion("", "a", "b"), Completion("", "", "b"), Text("", "a")]
    text, with_prompt, without = make_examples(documents, tokenizer, 8)
    assert text.input_ids == ids("h a <eos>")
    assert with_prompt == Example(ids("h a b <eos>"), ids("- - b <eos>"))
    assert without == Example(ids("h b <eos>"), ids("- b <eos>"))


@pytest.mark.parametrize(
    ("prompt", "completion", "expected_ids", "expected_labels"),
    [
        # a prompt that is too long keeps its beginning and its end, half of the room each
        ("a b c d e", "f", "a e f <eos>", "- - f <eos>"),
        ("a", "b c d e f", "a b c d", "- b c d"),
        ("a b c d", "e f g h a", "a d e f", "- - e f"),
    ],
)
def test_long_completion_keeps_its_labels_and_the_beginning_of_its_prompt(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    completion: str,
    expected_ids: str,
    expected_labels: str,
) -> None:
    [example] = make_examples([Completion("", prompt, completion)], tokenizer, 4)
    assert example == Example(ids(expected_ids), ids(expected_labels))


def test_completion_that_is_empty_is_refused_by_place(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="x.jsonl, line 7.*at least one token to learn"):
        make_examples([Completion("x.jsonl, line 7", "a b", "")], tokenizer, 8)


def test_chat_has_loss_on_the_assistant_turns_only(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = _chat(
        ("system", "h"), ("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f")
    )
    [example] = make_examples([chat], tokenizer, 64)
    assert example == Example(
        ids(
            "system: h <end> user: a b <end> assistant: c <end> user: d <end> assistant: e f <end>"
        ),
        ids("- - - - - - - - c <end> - - - - e f <end>"),
    )


def test_chat_without_offsets_gives_the_same_example(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = _chat(("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f"))
    with_offsets = make_examples([chat], tokenizer, 64)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert not tokenizer.is_fast
    assert make_examples([chat], tokenizer, 64) == with_offsets


def test_chat_whose_template_rewrites_history_gives_an_example_per_turn(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ 'h ' }}{% endif %}"
        "{{ m['content'] + ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chat = _chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    first, second = make_examples([chat], tokenizer, 64)
    assert first == Example(ids("user: a <end> assistant: h b <end>"), ids("- - - - h b <end>"))
    assert second == Example(
        ids("user: a <end> assistant: b <end> user: c <end> assistant: h d <end>"),
        ids("- - - - - - - - - - h d <end>"),
    )


def test_chat_without_an_assistant_turn_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="chat: an example needs at least one token"):
        make_examples([_chat(("user", "a"))], tokenizer, 64)


def test_chat_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="chat: messages need a chat template"):
        make_examples([_chat(("user", "a"), ("assistant", "b"))], tokenizer, 64)


def test_chat_that_the_template_refuses_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="chat: the chat template refuses.*roles must alternate"):
        make_examples([_chat(("user", "a"), ("assistant", "b"))], tokenizer, 64)


def test_chat_whose_template_ignores_the_generation_prompt_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{% if add_generation_prompt %}{{ 'h ' }}{% endif %}a b"
    with pytest.raises(DataError, match="must render an assistant's turn after"):
        make_examples([_chat(("user", "a"), ("assistant", "b"))], tokenizer, 64)
