"""Held-out text that repeats training text, by the 8-grams of words that they share.

A held-out document most of which also stands in training text measures memory, not what was learned
(Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C, removes it likewise; Lee et
al., "Deduplicating Training Data Makes Language Models Better", ACL 2022, show what it does).
"""

import re
from collections.abc import Iterable, Sequence

from flower_split.data.documents import Document, text_of_document

NGRAM = 8
"""Words of one n-gram."""

COVERED = 0.5
"""A document more of whose n-grams than this share stand in training text repeats it."""

_WORD = re.compile(r"\w+")


def ngrams(text: str) -> list[tuple[str, ...]]:
    """Return the n-grams of the words of ``text``, without regard to case; all words if it is shorter."""
    words = _WORD.findall(text.lower())
    if len(words) <= NGRAM:
        return [tuple(words)] if words else []
    return [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]


def coverage(held_out: Sequence[Document], train: Iterable[Document]) -> list[float]:
    """Return, for each held-out document, the share of its n-grams that stand in training text.

    Exact, and linear in the size of both; a document without words has 0.
    """
    known = {gram for document in train for gram in ngrams(text_of_document(document))}
    shares = []
    for document in held_out:
        grams = ngrams(text_of_document(document))
        shares.append(sum(gram in known for gram in grams) / len(grams) if grams else 0.0)
    return shares


def without_repeats(held_out: Sequence[Document], train: Iterable[Document]) -> list[Document]:
    """Return the held-out documents, in their order, that do not repeat training text.

    Training text stays as it is, so what a run learns does not depend on this.
    """
    shares = coverage(held_out, train)
    return [document for document, share in zip(held_out, shares, strict=True) if share <= COVERED]
