"""One client's examples, from the run config and the client's partition; and its tokenizer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flower_split.assets import resolve_model_path
from flower_split.config import ModelConfig, RunConfig
from flower_split.data.documents import Document, Record, Text, parse_record, split_held_out
from flower_split.data.examples import Example, make_examples
from flower_split.data.partitions import partition_rows
from flower_split.data.sources import column_of, read_hub, read_jsonl, read_text
from flower_split.data.stdlib_docs import area_docstrings
from flower_split.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PARTITION_FIELD = "{partition_id}"
"""Stands for the client's partition in ``data.path``: every client has its own file."""


@dataclass(frozen=True, slots=True)
class ClientData:
    """What a client trains on and what it holds out; no document is in both."""

    train: list[Example]
    evaluate: list[Example]
    name: str = ""  # what the data is about, for people; empty where nothing says so


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; without a padding token of its own it pads with the end token.

    Raises:
        ConfigError: There is no tokenizer at ``model.name``, or nothing to pad with.
    """
    path = resolve_model_path(config.name)
    try:
        tokenizer = cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(path, revision=config.revision or None),
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


def load_client_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    partition_id: int,
    num_partitions: int,
) -> ClientData:
    """Read, divide, split and tokenise the data of one client.

    Everything depends on the config, its seed and the partition alone, so that a client restarted,
    or simulated in another process, has the same examples in the same order.

    Args:
        config: ``data``, ``train.sequence_length`` and ``seed`` are used.
        tokenizer: From :func:`load_tokenizer`.
        partition_id: The client's partition, from 0.
        num_partitions: Over how many clients a shared data set is divided.

    Raises:
        DataError: The data is missing, empty or malformed; names the place and the remedy.
    """
    if not 0 <= partition_id < num_partitions:
        raise DataError(
            f"partition-id must be from 0 to num-partitions - 1; they are {partition_id} and "
            f"{num_partitions}. Set both in the node's config."
        )
    name, documents = _documents(config, partition_id, num_partitions)
    place = f"partition {partition_id} of {num_partitions}"
    try:
        train_documents, held_out = split_held_out(
            documents, config.data.eval_fraction, config.seed
        )
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    length = config.train.sequence_length
    train = make_examples(train_documents, tokenizer, length)
    evaluate = make_examples(held_out, tokenizer, length)
    for side, examples in (("training", train), ("held-out", evaluate)):
        if not examples:
            raise DataError(
                f"{place}: the {side} documents must give at least one example of two tokens; "
                "they give none. Give this client more data."
            )
    logger.info(
        "partition=%d documents=%d train_examples=%d eval_examples=%d",
        partition_id,
        len(documents),
        len(train),
        len(evaluate),
    )
    return ClientData(train, evaluate, name)


def _documents(
    config: RunConfig, partition_id: int, num_partitions: int
) -> tuple[str, list[Document]]:
    """The client's documents in a fixed order, and a name for them."""
    data = config.data
    if data.source == "stdlib-docs":
        area = area_docstrings(partition_id, num_partitions)
        return area.name, [Text(f"{area.name}, docstring", text) for text in area.docstrings]
    records: Sequence[Record]
    where = data.dataset
    if data.source == "hub":
        records = read_hub(data)
    else:
        path = Path(data.path.replace(PARTITION_FIELD, str(partition_id))).expanduser()
        where = str(path)
        records = read_text(path) if data.source == "text" else read_jsonl(path)
    if len(records) == 0:
        raise DataError(
            f"partition {partition_id}: the data must hold at least one record; "
            f"{where} holds none. Check data.path or data.dataset."
        )
    if PARTITION_FIELD in data.path:
        rows = list(range(len(records)))
    else:
        rows = partition_rows(
            lambda name: column_of(records, name),
            len(records),
            data,
            seed=config.seed,
            partition_id=partition_id,
            num_partitions=num_partitions,
        )
    field = "text" if data.source == "text" else data.text_field
    parsed = (parse_record(records[row], field) for row in rows)
    return "", [document for document in parsed if document is not None]
