"""A client's private data: from documents to token batches; nothing here leaves the client.

Runs on: Clients; the ServerApp and the command only check settings with it.
Read first: ``client_data.py``: ``load_client_data``.

It reads the source (``source``, ``sources``), takes this client's share of it (``partitions``), reads
each record by its format (``formats``, ``messages``), holds some documents out (``held_out``), and
makes examples (``examples``, ``rendering``); ``batches`` makes training steps of them. What is left
out on the way is counted (``tally``).
"""

from flower_split.data.batches import batches, eval_batches
from flower_split.data.client_data import (
    ClientData,
    check_data,
    load_client_data,
    load_tokenizer,
)
from flower_split.data.documents import Record
from flower_split.data.examples import Example
from flower_split.data.partitioner import Partitioner, PartitionRequest
from flower_split.data.partitions import PARTITIONERS
from flower_split.data.source import DataSource, SourceRecords, SourceRequest
from flower_split.data.source_registry import DATA_SOURCES
from flower_split.data.tally import DataCounts

__all__ = [
    "DATA_SOURCES",
    "PARTITIONERS",
    "ClientData",
    "DataCounts",
    "DataSource",
    "Example",
    "PartitionRequest",
    "Partitioner",
    "Record",
    "SourceRecords",
    "SourceRequest",
    "batches",
    "check_data",
    "eval_batches",
    "load_client_data",
    "load_tokenizer",
]
