"""The local loss of mode forward-only, where no gradient comes back from the trunk."""

import threading

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from flower_split.errors import FlowerSplitError
from flower_split.lora import output_embeddings
from flower_split.training.loss import Batch
from flower_split.training.trunk_protocol import MicroBatchTrunk


class AuxiliaryHead:
    """A local loss for the bottom in mode forward-only, where no gradient comes back to it.

    The smashed data, layer-normalised, is decoded by the model's own frozen output embedding; its
    token loss trains the bottom and nothing else. It has no parameters of its own, so nothing of
    it needs to be aggregated. (Local losses in split federated learning: Han et al., "Accelerating
    Federated Learning with Split Learning on Locally Generated Losses", ICML 2021 workshop.)

    Args:
        model: The client's model.
        trunk: Its trunk; what reaches it is the smashed data.

    Raises:
        FlowerSplitError: The model has no output embedding.
    """

    def __init__(self, model: PreTrainedModel, trunk: MicroBatchTrunk) -> None:
        embedding = output_embeddings(model)
        if embedding is None:
            raise FlowerSplitError(
                f"train.auxiliary-head needs an output embedding, and {type(model).__name__} has none. "
                "Set train.auxiliary-head = false."
            )
        self._decode = embedding
        self._model = model
        self._smashed: dict[int, Tensor] = {}
        trunk.register_forward_pre_hook(self._capture)

    def _capture(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._smashed[threading.get_ident()] = args[0]

    def loss(self, batch: Batch, denominator: int) -> Tensor:
        """Return the local token loss of the forward that this thread ran last."""
        smashed = self._smashed.pop(threading.get_ident())
        logits = self._decode(functional.layer_norm(smashed, smashed.shape[-1:]))
        loss: Tensor = self._model.loss_function(
            logits=logits,
            labels=batch["labels"].to(logits.device),
            vocab_size=logits.shape[-1],
            num_items_in_batch=denominator,
        )
        return loss
