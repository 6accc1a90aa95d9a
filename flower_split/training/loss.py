"""Loss of a task, label count, held-out loss.

Shapes: input ids and padding mask ``[batch, seq]``; labels as in ``flower_split.data.batches``, −100 where
there is no loss.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from flower_split.config import ModelConfig
from flower_split.config import model as tasks
from flower_split.errors import DataError
from flower_split.training.measures import EvalResult
from flower_split.training.scores import add, sums_of

Batch = dict[str, Tensor]


def causal_lm_loss(
    model: PreTrainedModel, batch: Batch, denominator: int, device: torch.device
) -> Tensor:
    """Return the summed token loss of ``batch`` over ``denominator``, by the model's loss function."""
    inputs = {
        name: tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
        if name != "labels"
    }
    logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"].to(device, non_blocking=True)
    if logits.dtype == torch.float64 and model.loss_function is ForCausalLMLoss:
        # The same loss, which transformers computes in fp32 whatever the logits are.
        summed = cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return summed / denominator
    loss: Tensor = model.loss_function(
        logits=logits,
        labels=labels,
        vocab_size=logits.shape[-1],
        num_items_in_batch=denominator,
    )
    return loss


def task_loss(
    model: PreTrainedModel, batch: Batch, denominator: int, device: torch.device, task: str
) -> Tensor:
    """Return the summed loss of ``batch`` over ``denominator``, as ``model.task`` takes it."""
    if task in tasks.NEXT_TOKEN:
        return causal_lm_loss(model, batch, denominator, device)
    return loss_of(
        logits_of(model, batch, device, task),
        batch["labels"].to(device, non_blocking=True),
        denominator,
        task,
    )


def logits_of(model: PreTrainedModel, batch: Batch, device: torch.device, task: str) -> Tensor:
    """Return what a model says of a batch of any task but those of the next token.

    Returns:
        ``[batch, seq, classes]`` of tokens, ``[batch, classes]`` of records, or ``[batch, 2, seq]``
        of the first and the last token of an answer.
    """
    given = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    labels = given.pop("labels")
    if task == tasks.SEQ2SEQ:
        given["labels"] = labels  # of which the model makes what its decoder reads
    if task != tasks.QUESTION_ANSWERING:
        logits: Tensor = model(**given).logits
        return logits
    output = model(**given)
    return torch.stack([output.start_logits, output.end_logits], dim=1)


def loss_of(logits: Tensor, labels: Tensor, denominator: int, task: str) -> Tensor:
    """Return summed cross entropy over ``denominator``; of answers, the mean of first and last token's."""
    flat = logits if logits.dtype == torch.float64 else logits.float()
    summed = cross_entropy(
        flat.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=-100
    )
    if task == tasks.QUESTION_ANSWERING:
        summed = summed / 2
    return summed / denominator


def count_labels(batch: Batch, task: str) -> int:
    """Count what the loss of ``batch`` is taken over: label tokens, or records.

    Raises:
        DataError: There is none, so the micro-batch has no loss.
    """
    if task in tasks.NEXT_TOKEN:
        return count_label_tokens(batch)
    if task in tasks.OF_RECORDS:
        return len(batch["labels"])
    return _some_labels(int((batch["labels"] != -100).sum()))


def count_label_tokens(batch: Batch) -> int:
    """Count the label tokens after the causal shift.

    Raises:
        DataError: There is none, so the micro-batch has no loss.
    """
    return _some_labels(int((batch["labels"][:, 1:] != -100).sum()))


def _some_labels(count: int) -> int:
    if count == 0:
        raise DataError(
            "a micro-batch holds no label token, so it has no loss: every label is -100. Raise "
            "train.sequence-length, or leave out examples whose completion is cut off."
        )
    return count


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, batches: Iterable[Batch], device: torch.device, config: ModelConfig
) -> EvalResult:
    """Return the held-out loss of ``model`` over ``batches``, and what its scores are made of.

    Args:
        model: The client's model with its trunk, or a whole model.
        batches: Held-out batches.
        device: Where the model is.
        config: The task and its classes.

    Raises:
        DataError: There is no batch.
        TrunkError: The trunk refused or did not answer in time.
    """
    model.train(False)
    loss_sum, num_tokens, num_examples = 0.0, 0, 0
    sums: dict[str, float] = {}
    for batch in batches:
        if config.task in tasks.NEXT_TOKEN:
            loss_sum += float(causal_lm_loss(model, batch, 1, device))
        else:
            logits, labels = (
                logits_of(model, batch, device, config.task),
                batch["labels"].to(device, non_blocking=True),
            )
            loss_sum += float(loss_of(logits, labels, 1, config.task))
            add(sums, sums_of(logits, labels, config))
        num_tokens += count_labels(batch, config.task)
        num_examples += len(batch["labels"])
    if num_tokens == 0:
        raise DataError("there is no held-out batch to evaluate on. Raise data.eval-fraction.")
    return EvalResult(loss_sum, num_tokens, num_examples, sums=sums)
