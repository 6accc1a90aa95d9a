"""A client's private data: from documents to token batches; nothing here leaves the client.

``load_client_data`` reads the source (``sources``, ``stdlib_docs``), takes this client's share of
it (``partitions``), holds some documents out (``documents``), and makes examples (``examples``);
``batches`` makes training steps of them.
"""

from flower_split.data.batches import batches, eval_batches
from flower_split.data.client_data import ClientData, load_client_data, load_tokenizer
from flower_split.data.examples import Example

__all__ = [
    "ClientData",
    "Example",
    "batches",
    "eval_batches",
    "load_client_data",
    "load_tokenizer",
]
