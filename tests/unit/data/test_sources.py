"""Files as people have them, by their place; sources of other distributions; what is left out."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from flower_split.config import DataConfig, RunConfig, TrainConfig
from flower_split.data import ClientData, load_client_data
from flower_split.errors import ConfigError, DataError
from tests.support.distributions import installed, write_distribution

WORDS = "abcdefgh"
ROWS = [{"prompt": f"{WORDS[i]} a", "completion": "b"} for i in range(8)]


def _load(
    tokenizer: PreTrainedTokenizerFast, partition: int = 0, count: int = 1, **data: str
) -> ClientData:
    config = RunConfig(
        train=TrainConfig(sequence_length=6), data=DataConfig(eval_fraction=0.3, **data)
    )
    return load_client_data(config, tokenizer, partition, count)


def _first_words(data: ClientData, tokenizer: PreTrainedTokenizerFast) -> set[str]:
    examples = [*data.train, *data.evaluate]
    return set(tokenizer.convert_ids_to_tokens([example.input_ids[0] for example in examples]))


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet", "saved", "splits", "json"])
def test_files_of_each_client_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, form: str
) -> None:
    source = {"tsv": "csv", "splits": "saved", "json": "jsonl"}.get(form, form)
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        target = tmp_path / f"{number}.{form}"
        if form in ("csv", "tsv"):
            comma = "," if form == "csv" else "\t"
            lines = [comma.join(["prompt", "completion", "text"])]
            lines += [comma.join([*row.values(), ""]) for row in rows]
            target.write_text("\n".join(lines) + "\n")
        elif form == "json":
            target.write_text(json.dumps(rows, indent=2))
        elif form == "parquet":
            Dataset.from_list(rows).to_parquet(target)
        elif form == "saved":
            Dataset.from_list(rows).save_to_disk(target)
        else:
            DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(target)
    path = str(tmp_path / ("{partition_id}." + form))
    first = _load(tokenizer, 0, 2, source=source, path=path)
    second = _load(tokenizer, 1, 2, source=source, path=path)
    assert _first_words(first, tokenizer) == set("abc")
    assert _first_words(second, tokenizer) == set("defgh")
    assert (first.counts.records, second.counts.records) == (3, 5)


def test_parquet_of_chats_with_tools_has_no_nulls_of_other_records(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}"
        "{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}"
        "{{ k ~ ' ' ~ v ~ ' ' }}{% endfor %}{% endfor %}{{ '<end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )

    def row(word: str, name: str) -> dict[str, object]:
        call = {"type": "function", "function": {"name": "f", "arguments": {name: word}}}
        turns = [
            {"role": "user", "content": word},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        return {"messages": turns}

    path = tmp_path / "all.parquet"
    Dataset.from_list([row(word, "cd"[i % 2]) for i, word in enumerate("abef")]).to_parquet(path)
    data = _load(tokenizer, source="parquet", path=str(path))
    lengths = {len(example.input_ids) for example in [*data.train, *data.evaluate]}
    assert data.counts.records == 4 and data.counts.cut_examples == 4 and lengths == {6}
    words = [w for e in data.train for w in tokenizer.convert_ids_to_tokens(e.input_ids)]
    assert "<unk>" not in words  # "None" would be one


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("f.csv", 'text\na\n"b\nc",d\n', r"f.csv, line 3: the row has 2 cells and the header 1"),
        ("f.csv", "text,text\na,b\n", "line 1: .* names of its columns, each once"),
        ("f.csv", 'text\n"a"b\n', "line 2: this is no CSV"),
        ("f.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2: .*'text' twice"),
        ("f.jsonl", '{"text": "a"}\n{"text": "b\\ud800"}\n', "line 2: .*half of a surrogate"),
        ("f.json", '[{"text": "a"}, 3]', "f.json, record 2: .*this one is a int"),
        ("f.json", '[{"text": "a"}, ', "f.json: the JSON array does not parse"),
        ("f.parquet", "no parquet", "f.parquet' cannot be loaded"),
    ],
)
def test_files_that_are_malformed_name_file_line_and_remedy(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    source = {"csv": "csv", "parquet": "parquet"}.get(name.split(".")[1], "jsonl")
    with pytest.raises(DataError, match=said):
        _load(tokenizer, source=source, path=str(tmp_path / name))


def test_bad_records_are_skipped_and_counted_if_so_configured(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    bad = [
        '{"prompt": "a", ',
        "[1]",
        '{"prompt": "a"}',
        '{"prompt": "a", "completion": "\\ud800"}',
        '{"prompt": "a", "completion": ""}',
        '{"messages": [{"role": "user", "content": "a"}]}',
    ]
    good = [json.dumps(row) for row in ROWS]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join([*good[:4], *bad, *good[4:], '{"text": "  "}']))
    data = _load(tokenizer, source="jsonl", path=str(path), on_bad_record="skip")
    assert _first_words(data, tokenizer) == set(WORDS)
    assert data.counts.bad_records == len(bad) and data.counts.blank_records == 1
    assert data.counts.train_examples + data.counts.eval_examples == 8
    assert data.counts.losses() == [
        "6 bad records were left out (data.on-bad-record)",
        "1 blank records were passed over",
    ]
    with pytest.raises(DataError, match="line 5: every line"):
        _load(tokenizer, source="jsonl", path=str(path))


@pytest.mark.parametrize("content", ["", '{"prompt": "a", "completion": "b"}\n'])
def test_client_with_too_little_is_refused_or_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: str
) -> None:
    (tmp_path / "0.jsonl").write_text(content)
    place = {"source": "jsonl", "path": str(tmp_path / "{partition_id}.jsonl")}
    with pytest.raises(DataError, match="partition 0 of 2: "):
        _load(tokenizer, 0, 2, **place)
    data = _load(tokenizer, 0, 2, on_small_client="skip", **place)
    assert data.train == data.evaluate == [] and data.too_little


def test_cut_examples_and_their_tokens_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "a " * (4 + i), "completion": "b"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = _load(tokenizer, source="jsonl", path=str(path))
    # prompts of 4 to 11 tokens and two learned ones, in a window of 6: 1 to 7 are lost
    assert data.counts.cut_examples == 7 and data.counts.cut_tokens == sum(range(1, 8))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    with installed(tmp_path):
        yield tmp_path


SOURCE = """
from flower_split.data import DataSource, Record, SourceRecords

class Letters(DataSource):
    def read(self, request):
        rows = [Record(f"letter {w}", {"prompt": w, "completion": "b"}) for w in "abcdefgh"]
        return SourceRecords(records=rows, where="letters")

def not_a_source():
    pass
"""


def test_source_of_another_distribution_is_found_by_name(
    site: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    points = {"flower_split.data_sources": {"letters": "letter_source:Letters"}}
    write_distribution(site, "letters", entry_points=points, modules={"letter_source": SOURCE})
    for name in ("letters", "letter_source:Letters"):
        words = [_first_words(_load(tokenizer, i, 2, source=name), tokenizer) for i in range(2)]
        assert words[0] | words[1] == set(WORDS) and not words[0] & words[1]
    with pytest.raises(ConfigError, match="must be a subclass of flower_split.data.DataSource"):
        _load(tokenizer, source="letter_source:not_a_source")


def test_source_that_is_unknown_or_lacks_its_key_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ConfigError, match="'jsnl' is unknown.*Did you mean 'jsonl'"):
        _load(tokenizer, source="jsnl")
    for source, key in (("jsonl", "data.path"), ("csv", "data.path"), ("hub", "data.dataset")):
        with pytest.raises(ConfigError, match=f"{key} must name"):
            _load(tokenizer, source=source)
