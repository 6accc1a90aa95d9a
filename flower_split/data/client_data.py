"""One client's examples, from the run config and the client's partition; and its tokenizer."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flower_split.config import DataConfig, ModelConfig, RunConfig
from flower_split.data.documents import Document, Record, content_of
from flower_split.data.examples import Example
from flower_split.data.held_out import TooLittleData, in_fair_order, split_held_out
from flower_split.data.model_limits import check_model_limits
from flower_split.data.near_duplicates import without_repeats
from flower_split.data.partitioner import PartitionRequest
from flower_split.data.partitions import NONE, PARTITIONERS, partition_rows
from flower_split.data.source import SourceRequest
from flower_split.data.source_registry import DATA_SOURCES
from flower_split.data.sources.tables import column_of
from flower_split.data.tally import DataCounts, Tally
from flower_split.data.tasks.registry import DATA_TASKS
from flower_split.data.tasks.task import DataTask
from flower_split.errors import ConfigError, DataError
from flower_split.split.loading.model_source import ModelSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClientData:
    """What a client trains on and what it holds out; no document is in both."""

    train: list[Example]
    evaluate: list[Example]
    name: str = ""  # what the data is about, for people; empty where nothing says so
    counts: DataCounts = field(default_factory=DataCounts)
    too_little: str = ""  # why this client takes no part (data.on-small-client = "skip")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; without a padding token of its own it pads with the end token.

    Raises:
        ConfigError: There is no tokenizer at ``model.name``, or nothing to pad with.
    """
    source = ModelSource.of(config)
    try:
        tokenizer = cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(source.name_or_path, revision=source.revision),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name must have a tokenizer; {config.name!r} gives none: {error} Check "
            "model.name and model.revision: a local directory or a hub id."
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer of {config.name!r} must have a pad_token or an eos_token; it has "
                "neither. Add one to its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_source(config: DataConfig) -> None:
    """Check that source and partitioner are known here, and the source has the keys that it needs.

    Raises:
        ConfigError: One is not, or it has not.
    """
    DATA_SOURCES.get(config.source)().check(config)
    PARTITIONERS.get(config.partitioner)


def check_data(config: RunConfig) -> None:
    """Check what can be known of data and model before anything starts; reads no data, no weights.

    Raises:
        ConfigError: The source is unknown or lacks a key, the model is an encoder, or the tokenizer
            or the sequences are too large for it.
    """
    check_source(config.data)
    tokenizer: PreTrainedTokenizerBase | None = None
    with contextlib.suppress(ConfigError):  # the clients have it: they say if it is not there
        if config.model.reads_text:
            tokenizer = load_tokenizer(config.model)
    check_model_limits(config, tokenizer)


def load_client_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    partition_id: int,
    num_partitions: int,
) -> ClientData:
    """Read, divide, split and tokenise the data of one client.

    Everything depends on the config, its seed and the partition alone, so that a client restarted,
    or simulated in another process, has the same examples in the same order.

    Args:
        config: ``data``, ``train.sequence_length`` and ``seed`` are used.
        tokenizer: From :func:`load_tokenizer`; None: the task reads no text.
        partition_id: The client's partition, from 0.
        num_partitions: Over how many clients a shared data set is divided.

    Raises:
        ConfigError: The source is unknown, or lacks a key; or the model cannot take the data, see
            :func:`flower_split.data.model_limits.check_model_limits`.
        DataError: The data is missing, too little or malformed; names the place and the remedy.
    """
    if not 0 <= partition_id < num_partitions:
        raise DataError(
            f"partition-id must be from 0 to num-partitions - 1; they are {partition_id} and "
            f"{num_partitions}. Set both in the node's config."
        )
    check_model_limits(config, tokenizer)
    tally = Tally(skip_bad_records=config.data.on_bad_record == "skip")
    task = DATA_TASKS[config.model.task](config, tokenizer)
    share = _Share(partition_id, num_partitions, tally, task)
    name = ""
    try:
        name, documents = _documents(config, share, config.data)
        sides = _both_sides(config, documents, share)
        train, evaluate = _examples(*sides, task, tally)
    except TooLittleData as error:
        reason = f"partition {partition_id} of {num_partitions}: {error}"
        if config.data.on_small_client == "refuse":
            raise DataError(reason) from error
        logger.warning("left out (data.on-small-client = skip): %s", reason)
        return ClientData([], [], name, tally.result(), too_little=str(error))
    tally.add("train_examples", len(train))
    tally.add("eval_examples", len(evaluate))
    counts = tally.result()
    logger.info(
        "partition=%d documents=%d train_examples=%d eval_examples=%d %s",
        partition_id,
        len(documents),
        len(train),
        len(evaluate),
        "; ".join(counts.losses()),
    )
    return ClientData(train, evaluate, name, counts)


def _examples(
    train: Sequence[Document],
    held_out: Sequence[Document],
    task: DataTask,
    tally: Tally,
) -> tuple[list[Example], list[Example]]:
    """Return training and held-out examples.

    Raises:
        TooLittleData: One of them is empty.
    """
    made = []
    for side, its in (("training", train), ("held-out", held_out)):
        examples = task.examples(its, tally)
        if not examples:
            raise TooLittleData(
                f"the {side} documents must give at least one example of two tokens; they give "
                "none. Give this client more data, or leave it out with data.on-small-client = "
                '"skip"; see data.deduplicate too.'
            )
        made.append(examples)
    return made[0], made[1]


def _both_sides(
    config: RunConfig, documents: Sequence[Document], share: "_Share"
) -> tuple[list[Document], list[Document]]:
    """Return what is trained on and what is held out; what would be in both is in one, and counted.

    Raises:
        TooLittleData: There are not two different documents.
    """
    data, tally = config.data, share.tally
    if data.eval_path:
        _, held_out = _documents(
            config, share, replace(data, path=data.eval_path, partitioner=NONE)
        )
        tested = {content_of(document) for document in held_out}
        train = [document for document in documents if content_of(document) not in tested]
        if data.leaves_repeats_out:
            train = without_repeats(train, held_out)
        tally.add("tested_records", len(documents) - len(train))
        return train, in_fair_order(held_out, config.seed)
    train, held_out = split_held_out(documents, data.eval_fraction, config.seed)
    if data.leaves_repeats_out:
        kept = without_repeats(held_out, train)
        tally.add("near_duplicates", len(held_out) - len(kept))
        held_out = kept
    return train, held_out


@dataclass(frozen=True, slots=True)
class _Share:
    """Whose data is read."""

    partition_id: int
    num_partitions: int
    tally: Tally
    task: DataTask


def _documents(config: RunConfig, share: _Share, data: DataConfig) -> tuple[str, list[Document]]:
    """Return a name for the client's documents, and the documents in a fixed order."""
    check_source(data)
    found = DATA_SOURCES.get(data.source)().read(
        SourceRequest(
            config=data,
            partition_id=share.partition_id,
            num_partitions=share.num_partitions,
            tally=share.tally,
            app=config.app,
        )
    )
    records = found.records
    if len(records) == 0:
        raise TooLittleData(
            f"the data must hold at least one record; {found.where} holds none. Check data.path, "
            "data.eval-path or data.dataset."
        )
    rows = list(range(len(records)))
    if not found.own:
        rows = partition_rows(
            PartitionRequest(
                config=data,
                num_rows=len(records),
                partition_id=share.partition_id,
                num_partitions=share.num_partitions,
                seed=config.seed,
                column=lambda name: column_of(records, name),
                tally=share.tally,
                app=config.app,
            )
        )
    ignored = data.ignored | ({data.partition_by} - {""})
    text_field = found.text_field or data.text_field
    return found.name, list(_parsed(records, rows, text_field, ignored, share))


def _parsed(
    records: Sequence[Record],
    rows: Sequence[int],
    text_field: str,
    ignored: frozenset[str],
    share: _Share,
) -> Iterator[Document]:
    tally = share.tally
    for row in rows:
        try:
            document = share.task.document(records[row], text_field, ignored)
        except DataError as error:
            tally.bad(error)
            continue
        tally.add("blank_records" if document is None else "records")
        if document is not None:
            yield document
