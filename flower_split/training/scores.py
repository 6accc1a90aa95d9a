"""Scores of a task beside its loss: sums that add up over batches and clients, and what follows of them.

A sum's name begins with :data:`COUNT`. Nothing here depends on how held-out data is divided: the scores
of two clients' sums together are those of their data together.

Tensors: logits ``[batch, seq, classes]``, ``[batch, classes]``, or start and end ``[batch, 2, seq]``.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flower_split.config import ModelConfig
from flower_split.config import model as tasks
from flower_split.training.text_scores import text_scores_of

if TYPE_CHECKING:  # whoever reads scores needs no torch
    from torch import Tensor

COUNT = "count-"
_NO_LOSS = -100
_OUTSIDE = "O"  # the class of a word that is no entity: it counts for accuracy, not for F1


def sums_of(logits: "Tensor", labels: "Tensor", config: ModelConfig) -> dict[str, float]:
    """Return the sums of one batch; none for a task of the next token.

    Args:
        logits: As :func:`flower_split.training.loss.logits_of` gives them.
        labels: ``[batch, seq]``, ``[batch]``, or start and end ``[batch, 2]``.
        config: The task and its classes.
    """
    if config.task in tasks.NEXT_TOKEN:
        return {}
    found = logits.argmax(-1)
    if config.task == tasks.QUESTION_ANSWERING:
        return _of_spans(found, labels)
    counted = labels != _NO_LOSS
    right = (found == labels) & counted
    sums = {COUNT + "right": float(right.sum()), COUNT + "labels": float(counted.sum())}
    if config.task == tasks.SEQ2SEQ:
        whole = (right | ~counted).all(-1)
        sums |= {COUNT + "exact": float(whole.sum()), COUNT + "records": float(len(labels))}
    for index in range(len(config.label_names)):
        said, true = (found == index) & counted, labels == index
        for name, where in (("both", said & true), ("said", said), ("true", true)):
            sums[f"{COUNT}{name}-{index}"] = float(where.sum())
    return sums


def scores_of(sums: Mapping[str, float], config: ModelConfig) -> dict[str, float]:
    """Return the scores that sums come to: ``accuracy``, ``f1``, ``exact_match``, as the task has them.

    Beside them those of generated text, where the run asks for it
    (:mod:`flower_split.training.text_scores`).

    ``f1`` of a classification is the mean over classes (macro; the class "O" of tokens left out), a class
    that is neither there nor said left out; of answers it is that of their tokens, a mean over records.
    """
    scores = {}
    for name, part, whole in (
        ("accuracy", "right", "labels"),
        ("exact_match", "exact", "records"),
        ("f1", "overlap", "records"),
    ):
        total = sums.get(COUNT + whole, 0.0)
        if COUNT + part in sums and total:
            scores[name] = sums[COUNT + part] / total
    classes = _class_f1(sums, config.label_names)
    if classes:
        scores["f1"] = sum(classes) / len(classes)
    return scores | text_scores_of(sums)


def _of_spans(found: "Tensor", labels: "Tensor") -> dict[str, float]:
    """Return sums over records of spans from first to last token."""
    overlap = 0.0
    for (first, last), (start, end) in zip(found.tolist(), labels.tolist(), strict=True):
        both = max(0, min(last, end) - max(first, start) + 1)
        said = max(0, last - first + 1)
        overlap += 2 * both / (said + end - start + 1)
    exact = (found == labels).all(-1)
    return {
        COUNT + "exact": float(exact.sum()),
        COUNT + "overlap": overlap,
        COUNT + "records": float(len(labels)),
    }


def _class_f1(sums: Mapping[str, float], names: Sequence[str]) -> list[float]:
    found = []
    for index, name in enumerate(names):
        both, said, true = (
            sums.get(f"{COUNT}{part}-{index}", 0.0) for part in ("both", "said", "true")
        )
        if name != _OUTSIDE and said + true:
            found.append(2 * both / (said + true))
    return found


def add(total: dict[str, float], sums: Mapping[str, float]) -> None:
    """Add sums to a total, in place."""
    for name, value in sums.items():
        total[name] = total.get(name, 0.0) + value


def sums_in(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return those of a client's metrics that are sums of scores."""
    return {name: float(value) for name, value in metrics.items() if name.startswith(COUNT)}
