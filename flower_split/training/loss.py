"""Token loss, label count, held-out loss.

Shapes: input ids, padding mask and labels ``[batch, seq]``; labels are −100 where there is no loss.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from flower_split.errors import DataError
from flower_split.training.measures import EvalResult

Batch = dict[str, Tensor]


def causal_lm_loss(
    model: PreTrainedModel, batch: Batch, denominator: int, device: torch.device
) -> Tensor:
    """Return the summed token loss of ``batch`` over ``denominator``, by the model's loss function."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"].to(device)
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


def count_label_tokens(batch: Batch) -> int:
    """Count the label tokens after the causal shift.

    Raises:
        DataError: There is none, so the micro-batch has no loss.
    """
    count = int((batch["labels"][:, 1:] != -100).sum())
    if count == 0:
        raise DataError(
            "a micro-batch holds no label token, so it has no loss: every label is -100. Raise "
            "train.sequence-length, or leave out examples whose completion is cut off."
        )
    return count


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: Iterable[Batch], device: torch.device) -> EvalResult:
    """Return the held-out loss of ``model`` over ``batches``.

    Raises:
        DataError: There is no batch.
        TrunkError: The trunk refused or did not answer in time.
    """
    model.train(False)
    loss_sum, num_tokens, num_examples = 0.0, 0, 0
    for batch in batches:
        loss_sum += float(causal_lm_loss(model, batch, 1, device))
        num_tokens += count_label_tokens(batch)
        num_examples += len(batch["input_ids"])
    if num_tokens == 0:
        raise DataError("there is no held-out batch to evaluate on. Raise data.eval-fraction.")
    return EvalResult(loss_sum, num_tokens, num_examples)
