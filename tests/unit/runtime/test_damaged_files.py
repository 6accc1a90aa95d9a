"""JSON and tensors of damaged files: one kind of error, in one line, whatever is wrong."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save

from flower_split.runtime.json_text import (
    plain_file_name,
    read_json_object,
    read_json_text,
    record_of,
)
from flower_split.runtime.tensor_bytes import tensors_from


@dataclass(frozen=True)
class Pair:
    name: str
    number: int


def test_text_that_is_nested_too_deeply_is_no_recursion_error() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json_text("[" * 100_000)


def test_text_that_is_no_utf8_is_told_without_its_content() -> None:
    with pytest.raises(ValueError, match="byte 10 cannot be read") as caught:
        read_json_text(b'{"secret"\x20\xff' + b"x" * 10_000)
    assert "secret" not in repr(caught.value) and len(str(caught.value)) < 100


def test_object_is_asked_for_and_a_list_is_refused() -> None:
    assert read_json_object('{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="it is a list"):
        read_json_object("[1]")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "a"}', "'number' is missing"),
        ('{"name": "a", "number": "1"}', "'number' must be an integer"),
        ('{"name": "a", "number": true}', "'number' must be an integer"),
        ('{"name": null, "number": 1}', "'name' must be text"),
        ('{"name": "a", "number": 1, "more": 2}', "'more' is unknown"),
        ("[]", "it is a list"),
    ],
)
def test_record_with_a_wrong_field_is_refused_by_the_fields_name(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        record_of(Pair, json.loads(text))


def test_record_is_what_its_fields_say() -> None:
    assert record_of(Pair, {"number": 7, "name": "a"}) == Pair("a", 7)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/etc/passwd", "a\0", "a\\b"])
def test_file_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="without a directory"):
        plain_file_name(name)


def header(dtype: str, shape: list[int], size: int) -> bytes:
    """A safetensors file of one tensor."""
    text = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        save({"x": torch.ones(3)})[:-1],
        header("F32", [2], 4),
        header("F4", [2], 1),
        header("F32", [0, 2**62, 2**62], 0),
    ],
)
def test_file_that_is_no_tensors_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError):
        tensors_from(content)


def test_tensors_come_sorted_by_name() -> None:
    found = tensors_from(save({"b": torch.ones(1), "a": torch.zeros(2)}))
    assert list(found) == ["a", "b"] and found["a"].tolist() == [0.0, 0.0]
