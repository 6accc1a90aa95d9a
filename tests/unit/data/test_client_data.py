"""A client's data from files in every format, offline; and what is said when something is wrong."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from flower_split.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from flower_split.data import Example, load_client_data, load_tokenizer
from flower_split.errors import ConfigError, DataError


def _config(seed: int = 0, **data: str) -> RunConfig:
    return RunConfig(
        seed=seed, train=TrainConfig(sequence_length=6), data=DataConfig(eval_fraction=0.3, **data)
    )


def _jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(count: int) -> list[dict[str, str]]:
    """Prompts that tell the rows apart: the row's number in base 8 in letters."""
    return [
        {"prompt": " ".join("abcdefgh"[int(d)] for d in f"{i:03o}"), "completion": "a"}
        for i in range(count)
    ]


def _prompts(examples: list[Example]) -> set[tuple[int, ...]]:
    return {tuple(example.input_ids[:3]) for example in examples}


def test_jsonl_is_partitioned_over_clients_without_overlap(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = _jsonl(tmp_path / "all.jsonl", _rows(60))
    config = _config(source="jsonl", path=str(path))
    clients = [load_client_data(config, tokenizer, i, 3) for i in range(3)]
    sides = [_prompts(side) for client in clients for side in (client.train, client.evaluate)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 60
    assert all(sides)
    assert clients == [load_client_data(config, tokenizer, i, 3) for i in range(3)]
    assert clients != [
        load_client_data(_config(1, source="jsonl", path=str(path)), tokenizer, i, 3)
        for i in range(3)
    ]


def test_jsonl_of_each_client_is_its_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for number, count in enumerate((5, 9)):
        _jsonl(tmp_path / f"client-{number}.jsonl", _rows(count))
    config = _config(source="jsonl", path=str(tmp_path / "client-{partition_id}.jsonl"))
    for number, count in enumerate((5, 9)):
        data = load_client_data(config, tokenizer, number, 2)
        assert len(data.train) + len(data.evaluate) == count


def test_eval_path_is_held_out_by_every_client_and_trained_on_by_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path, rows = _jsonl(tmp_path / "all.jsonl", _rows(60)), _rows(66)
    test = _jsonl(tmp_path / "test.jsonl", rows[54:])  # six that are in both, six that are not
    config = _config(source="jsonl", path=str(path), eval_path=str(test))
    clients = [load_client_data(config, tokenizer, i, 3) for i in range(3)]
    held_out = [_prompts(client.evaluate) for client in clients]
    assert held_out[0] == held_out[1] == held_out[2] and len(held_out[0]) == 12
    assert clients[0].evaluate == clients[1].evaluate == clients[2].evaluate
    trained = [_prompts(client.train) for client in clients]
    assert sum(map(len, trained)) == len(set.union(*trained)) == 54
    assert not set.union(*trained) & held_out[0]
    assert sum(client.counts.tested_records for client in clients) == 6
    assert "6 training documents are in data.eval-path" in " ".join(
        (clients[0].counts + clients[1].counts + clients[2].counts).losses()
    )
    order = [tuple(example.input_ids[:3]) for example in clients[0].evaluate]
    assert order != sorted(order)  # the file's


def test_eval_path_with_a_partition_is_each_clients_own_and_near_repeats_are_not_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = [" ".join("abcdefgh"[(n + i) % 8] for i in range(9)) for n in range(4)]
    path = _jsonl(tmp_path / "all.jsonl", [{"text": f"{text} a"} for text in words])
    for number in range(2):
        _jsonl(tmp_path / f"{number}.jsonl", [{"text": words[number]}])
    config = _config(
        source="jsonl", path=str(path), partitioner="none", deduplicate="near",
        eval_path=str(tmp_path / "{partition_id}.jsonl"),
    )  # fmt: skip
    for number in range(2):
        data = load_client_data(config, tokenizer, number, 2)
        assert data.counts.tested_records == 1  # its own words with one more
        assert data.counts.records == 4 + 1


def test_eval_path_of_a_source_without_files_is_refused() -> None:
    with pytest.raises(ConfigError, match='data.eval-path.*"stdlib-docs" reads no path'):
        DataConfig(eval_path="test.jsonl")


def test_jsonl_with_chats_texts_and_a_named_field_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    chats = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": "b"}]}
        for w in "abcdefgh"
    ]
    config = _config(source="jsonl", path=str(_jsonl(tmp_path / "chat.jsonl", chats)))
    data = load_client_data(config, tokenizer, 0, 1)
    assert {example.num_tokens for example in [*data.train, *data.evaluate]} == {2}
    texts = [{"body": w + " a"} for w in "abcdefgh"]
    path = _jsonl(tmp_path / "text.jsonl", texts)
    config = _config(source="jsonl", path=str(path), text_field="body")
    data = load_client_data(config, tokenizer, 0, 1)
    packed = sum(len(example.input_ids) for example in [*data.train, *data.evaluate])
    assert packed == 8 * 3  # two words and an end token each


def test_text_of_one_file_has_a_document_per_paragraph(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("\ufeffa b\nc\n\n \n" + "\n\n".join("d e f g h".split()) + "\n")
    data = load_client_data(_config(source="text", path=str(path)), tokenizer, 0, 1)
    packed = [i for e in [*data.train, *data.evaluate] for i in e.input_ids]
    assert packed.count(tokenizer.eos_token_id) == 6 and len(packed) == 3 + 5 + 6
    assert tokenizer.unk_token_id not in packed  # the byte-order mark is no part of the text


def test_text_of_a_directory_has_a_document_per_file_and_divides_by_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for folder, words in (("one", "abc"), ("two", "def")):
        (tmp_path / folder).mkdir()
        for word in words:
            (tmp_path / folder / f"{word}.txt").write_text(f"{word}\n\n{word}")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    config = _config(
        source="text", path=str(tmp_path), partitioner="natural-id", partition_by="folder"
    )
    for number, words in enumerate(("abc", "def")):
        data = load_client_data(config, tokenizer, number, 2)
        tokens = {i for e in [*data.train, *data.evaluate] for i in e.input_ids}
        assert tokens == {0, *tokenizer.convert_tokens_to_ids(list(words))}


LEAVES_FILES_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize(
    "form",
    ["jsonl", pytest.param("csv", marks=LEAVES_FILES_OPEN), "parquet", "folder", "saved"],
)
def test_hub_data_from_local_files_is_divided_by_a_column(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{**row, "user": "xyz"[i % 3]} for i, row in enumerate(_rows(30))]
    target = tmp_path / f"data.{form}"
    if form == "jsonl":
        _jsonl(target, rows)
    elif form == "csv":
        lines = ["prompt,completion,user", *(",".join(row.values()) for row in rows)]
        target.write_text("\n".join(lines) + "\n")
    elif form == "parquet":
        Dataset.from_list(rows).to_parquet(target)
    elif form == "folder":
        target.mkdir()
        _jsonl(target / "train.jsonl", rows)
    else:
        Dataset.from_list(rows).save_to_disk(target)
    config = _config(
        source="hub", dataset=str(target), partitioner="natural-id", partition_by="user"
    )
    data = load_client_data(config, tokenizer, 1, 3)
    expected = [tuple(tokenizer.convert_tokens_to_ids(row["prompt"].split())) for row in rows[1::3]]
    assert _prompts(data.train) | _prompts(data.evaluate) == set(expected)


def test_hub_data_that_is_not_there_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "file.pkl").write_bytes(b"")
    with pytest.raises(DataError, match="file.pkl; its name must end in one of"):
        load_client_data(_config(source="hub", dataset=str(tmp_path / "file.pkl")), tokenizer, 0, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="split 'train' cannot be loaded"):
        load_client_data(_config(source="hub", dataset=str(tmp_path / "empty")), tokenizer, 0, 1)


def test_data_that_is_not_there_or_empty_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def load(source: str, path: Path, **data: str) -> None:
        load_client_data(_config(source=source, path=str(path), **data), tokenizer, 0, 2)

    with pytest.raises(DataError, match="must be a file or directory; .*absent is not there"):
        load("text", tmp_path / "absent")
    with pytest.raises(DataError, match="holds no file ending in .jsonl"):
        load("jsonl", tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="at least one record; .*empty.txt holds none"):
        load("text", tmp_path / "empty.txt")
    with pytest.raises(DataError, match="partition 0 of 2: .*two different documents; there are 1"):
        load("jsonl", _jsonl(tmp_path / "same.jsonl", [{"text": "a"}] * 9))
    with pytest.raises(DataError, match="has no 'user', its fields are completion, prompt"):
        load(
            "jsonl",
            _jsonl(tmp_path / "rows.jsonl", _rows(9)),
            partitioner="natural-id",
            partition_by="user",
        )


def test_data_with_a_bad_line_or_encoding_names_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def load(source: str, content: bytes) -> None:
        (tmp_path / "file").write_bytes(content)
        config = _config(source=source, path=str(tmp_path / "file"))
        load_client_data(config, tokenizer, 0, 1)

    with pytest.raises(DataError, match="file, line 3: every line must be one JSON object"):
        load("jsonl", b'{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match="line 1: .*this one is a list"):
        load("jsonl", b"[1]\n")
    with pytest.raises(DataError, match="line 2: .*'text', which is missing"):
        load("jsonl", b'{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataError, match="must be UTF-8; byte 2 is not"):
        load("text", b"ab\xff")
    with pytest.raises(DataError, match="file: text must not be compressed.*gunzip file"):
        load("jsonl", gzip.compress(b'{"text": "a"}\n'))


def test_partition_out_of_range_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for partition, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(DataError, match="partition-id must be from 0"):
            load_client_data(RunConfig(), tokenizer, partition, count)


def test_tokenizer_without_padding_pads_with_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(ModelConfig(name=str(tmp_path / "model")))
    assert loaded.pad_token_id == loaded.eos_token_id == 0


def test_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.name must have a tokenizer"):
        load_tokenizer(ModelConfig(name=str(tmp_path / "absent")))
