"""The split of a client's documents into training and held-out ones."""

import hashlib
from collections.abc import Sequence

from flower_split.data.documents import Document, content_of
from flower_split.errors import DataError


class TooLittleData(DataError):
    """A client has too little data to train and evaluate on."""


def split_held_out(
    documents: Sequence[Document], fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split into training and held-out documents by a hash of seed and content.

    Equal documents always fall on the same side, on every client, so that no held-out text is
    trained on anywhere in the federation. ``fraction`` is therefore met on average; each side gets at
    least one document. Training documents keep their order; held-out ones come in that of their hash,
    so that an evaluation of the first few batches is a fair sample.

    Raises:
        TooLittleData: There are not two different documents.
    """
    ranked = {content_of(document): 0.0 for document in documents}
    if len(ranked) < 2:
        raise TooLittleData(
            "training and held-out data need at least two different documents; there are "
            f"{len(ranked)} (of {len(documents)} in all). Give this client more data, use fewer "
            'clients, or leave it out with data.on-small-client = "skip".'
        )
    for content in ranked:
        ranked[content] = _rank(content, seed)
    ordered = sorted(ranked.values())
    # the threshold moves only where it would leave a side empty
    threshold = min(fraction, ordered[-1]) if fraction > ordered[0] else ordered[1]
    train = [document for document in documents if ranked[content_of(document)] >= threshold]
    held_out = [document for document in documents if ranked[content_of(document)] < threshold]
    held_out.sort(key=lambda document: ranked[content_of(document)])
    return train, held_out


def in_fair_order(documents: Sequence[Document], seed: int) -> list[Document]:
    """Return documents in the order of a hash of seed and content.

    An evaluation of the first few batches is then a fair sample, however a file is sorted.
    """
    return sorted(documents, key=lambda document: _rank(content_of(document), seed))


def _rank(content: str, seed: int) -> float:
    """Return a number in [0, 1) that looks random."""
    digest = hashlib.sha256(f"{seed}\0{content}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
