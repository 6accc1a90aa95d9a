"""The checks of codecs, data sources and transports pass for what is built in, and find what is broken."""

import doctest
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from google.protobuf.message import Message
from torch import Tensor

from flower_split.config import DataConfig
from flower_split.data import DataSource, Record, SourceRecords, SourceRequest
from flower_split.data.source_registry import DATA_SOURCES
from flower_split.errors import CodecError, TrunkError
from flower_split.testing import (
    ConformanceError,
    check_aggregator,
    check_codec,
    check_data_source,
    check_logger,
    check_report,
    check_rule,
    check_transport,
    check_window_rule,
)
from flower_split.wire.codecs import CODECS, Codec, TensorForm, make_codec
from flower_split.wire.codecs.codec import NativeCodec
from flower_split.wire.grpc_transport import TrunkChannel
from flower_split.wire.sending import Outgoing
from flower_split.wire.transport import Reply, Result
from tests.support.distributions import install, installed
from tests.support.loopback import COORDINATOR_TOKEN, TinyTrunk, make_engine, served

PROJECT = Path(__file__).parents[2] / "support" / "plugin_distribution"
TOLERANCES = {
    "native": 0.0,
    "float32": 0.0,
    "bfloat16": 2**-8,  # half a unit in the last place
    "int8": (1 + 2**-7) / 254 + 2**-8,  # half a level, rounded to the tensor's dtype
}


@pytest.mark.parametrize("name", sorted(CODECS.built_in))
def test_every_codec_conforms(name: str) -> None:
    check_codec(make_codec(name), tolerance=TOLERANCES[name])


def test_every_plug_in_of_the_distribution_conforms(tmp_path: Path) -> None:
    install(PROJECT, tmp_path / "site")
    (tmp_path / "notes.txt").write_text("title\n- one\n- two\n")
    with installed(tmp_path / "site"):
        from newcomer.heaviest import Heaviest
        from newcomer.losses import LossesLogger
        from newcomer.median_lora import MedianLoRA
        from newcomer.needs_first import NeedsFirst
        from newcomer.notes import NotesSource
        from newcomer.rounds import RoundsReport
        from newcomer.row_int8 import RowInt8Codec

        check_logger(LossesLogger)
        check_report(RoundsReport)
        check_window_rule(NeedsFirst())
        check_codec(RowInt8Codec(), tolerance=1 / 254 + 1e-6)
        with pytest.raises(ConformanceError, match="keep values within 0.001"):
            check_codec(RowInt8Codec(), tolerance=0.001)
        check_aggregator(MedianLoRA())
        check_rule(Heaviest(count=2))
        check_data_source(NotesSource, DataConfig(source="notes", path=str(tmp_path / "notes.txt")))


class ChangesItsInput(NativeCodec):
    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        sent = tensor.clone()
        tensor.add_(1)
        return {"": sent}


class Counts(NativeCodec):
    calls = 0

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        Counts.calls += 1
        return {"": tensor + Counts.calls * 1e-3}


class ForgetsTheDtype(NativeCodec):
    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        return {"": tensor.to(torch.float32)}


class TakesAnything(NativeCodec):
    def form(self, parts: Mapping[str, TensorForm]) -> TensorForm:
        return next(iter(parts.values()), TensorForm((1,), torch.float32))


class Transposes(NativeCodec):
    def form(self, parts: Mapping[str, TensorForm]) -> TensorForm:
        batch, seq, hidden = NativeCodec.form(self, parts).shape
        return TensorForm((seq, batch, hidden), parts[""].dtype)


class TooRough(NativeCodec):
    dtype: ClassVar[torch.dtype | None] = torch.float32

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts[""].round()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (ChangesItsInput, "not change the tensor"),
        (Counts, "same bits for the same tensor"),
        (ForgetsTheDtype, "in its form, bfloat16"),
        (TakesAnything, "refuse a part that is not its own.*it returned"),
        (Transposes, "decode what it encodes.*has announced"),
        (TooRough, "keep values within 0.01"),
    ],
)
def test_a_codec_that_breaks_a_clause_is_found(broken: type[Codec], words: str) -> None:
    with pytest.raises(ConformanceError, match=f"codec {broken.__name__} must .*{words}"):
        check_codec(broken(), tolerance=0.01)


def test_a_codec_that_raises_what_it_likes_is_found() -> None:
    class Raises(NativeCodec):
        def form(self, parts: Mapping[str, TensorForm]) -> TensorForm:
            return parts[""] if len(parts) == 1 else {}["more"]

    with pytest.raises(ConformanceError, match="with a CodecError; it raised KeyError"):
        check_codec(Raises(), tolerance=0.0)
    assert issubclass(CodecError, Exception)


def _write_data(root: Path) -> dict[str, DataConfig]:
    from datasets import Dataset

    rows = [{"text": f"text number {number}"} for number in range(4)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rows.csv").write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
    (root / "rows.txt").write_text("\n\n".join(row["text"] for row in rows))
    made = Dataset.from_list(rows)
    made.to_parquet(str(root / "rows.parquet"))
    made.save_to_disk(str(root / "saved"))
    paths = {
        "jsonl": "rows.jsonl",
        "csv": "rows.csv",
        "text": "rows.txt",
        "parquet": "rows.parquet",
        "saved": "saved",
    }
    return {name: DataConfig(source=name, path=str(root / path)) for name, path in paths.items()}


def test_every_data_source_of_files_conforms(tmp_path: Path) -> None:
    configs = _write_data(tmp_path)
    for name, config in configs.items():
        check_data_source(DATA_SOURCES.get(name), config)
    # The standard library's texts take a minute to split, and the hub is another machine's.
    assert {*configs, "stdlib-docs", "hub"} == set(DATA_SOURCES.built_in)


class Lines(DataSource):
    """Reads nothing: two records, the same for all."""

    def read(self, request: SourceRequest) -> SourceRecords:
        return SourceRecords(records=self.records(request), where="here")

    def records(self, request: SourceRequest) -> list[Record]:
        return [Record("line 1", {"text": "one"}), Record("line 2", {"text": "two"})]


class OneForEach(Lines):
    def records(self, request: SourceRequest) -> list[Record]:
        return [Record("line 1", {"text": f"of partition {request.partition_id}"})]


class AnotherEachTime(Lines):
    asked = 0

    def records(self, request: SourceRequest) -> list[Record]:
        AnotherEachTime.asked += 1
        return [Record("line 1", {"text": f"answer {AnotherEachTime.asked}"})]


class NoPlaces(Lines):
    def records(self, request: SourceRequest) -> list[Record]:
        return [Record("a file", {"text": "one"}), Record("a file", {"text": "two"})]


class UnknownFields(Lines):
    def records(self, request: SourceRequest) -> list[Record]:
        return [Record("line 1", {"colour": "red"})]


class NeedsArguments(Lines):
    def __init__(self, path: str) -> None:
        self.path = path


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (OneForEach, "every client the same records"),
        (AnotherEachTime, "when it is asked again"),
        (NoPlaces, "another place for each record"),
        (UnknownFields, "records of a known format"),
        (NeedsArguments, "made without arguments"),
    ],
)
def test_a_data_source_that_breaks_a_clause_is_found(broken: type[DataSource], words: str) -> None:
    check_data_source(Lines, DataConfig(source="lines"))
    with pytest.raises(ConformanceError, match=f"data source {broken.__name__} must .*{words}"):
        check_data_source(broken, DataConfig(source="lines"))


@pytest.fixture
def port() -> Iterator[int]:
    with served(make_engine(TinyTrunk()), max_workers=16) as number:
        yield number


def nobody(timeout: float) -> TrunkChannel:
    return TrunkChannel("127.0.0.1:9", token="t", timeout=timeout)  # the port of "discard"


def test_the_grpc_transport_conforms(port: int) -> None:
    channel = TrunkChannel(f"127.0.0.1:{port}", token=COORDINATOR_TOKEN, timeout=20.0)
    check_transport(channel, nobody(0.3), timeout=0.3)


class Swallows(TrunkChannel):
    def download(
        self, method: str, request: Message, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        def quiet(frames: Iterator[bytes]) -> Result:
            try:
                return read(frames)
            except Exception as error:
                raise TrunkError("something") from error

        return TrunkChannel.download(self, method, request, quiet)


class Untyped(TrunkChannel):
    def stream(
        self, method: str, message: Outgoing, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        try:
            return TrunkChannel.stream(self, method, message, read)
        except TrunkError as error:
            raise RuntimeError(str(error)) from error


class LivesOn(TrunkChannel):
    def close(self) -> None:
        pass


class Backwards(TrunkChannel):
    def unary(
        self,
        method: str,
        request: Message,
        reply_type: type[Reply],
        *,
        timeout: float | None = None,
        retry: bool = True,
    ) -> Reply:
        del method, request, timeout, retry
        return reply_type()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Swallows, "let through what the reader of a reply raises"),
        (Untyped, "raise TrunkRefused where .*it raised RuntimeError"),
        (LivesOn, r"refuse calls after close\(\).*it returned"),
        (Backwards, "answer calls of several threads"),
    ],
)
def test_a_transport_that_breaks_a_clause_is_found(
    port: int, broken: type[TrunkChannel], words: str
) -> None:
    channel = broken(f"127.0.0.1:{port}", token=COORDINATOR_TOKEN, timeout=20.0)
    try:
        with pytest.raises(ConformanceError, match=f"transport {broken.__name__} must .*{words}"):
            check_transport(channel, nobody(0.3), timeout=0.3)
    finally:
        TrunkChannel.close(channel)


@pytest.mark.parametrize("name", ["codecs", "data_sources", "partitioners"])
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(sys.modules[f"flower_split.testing.{name}"])
    assert failed == 0 and tried > 0
