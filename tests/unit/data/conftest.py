"""A tokenizer whose ids can be worked out by hand: one per word, in the order of ``WORDS``."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<eos>", "<pad>", "<unk>", *"abcdefgh", "user:", "assistant:", "system:", "<end>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + ' <end> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def ids(words: str) -> list[int]:
    """The ids of space-separated words; "-" is a label without loss."""
    return [-100 if word == "-" else WORDS.index(word) for word in words.split()]
