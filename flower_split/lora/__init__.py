"""What trains of the three parts of a model: LoRA through PEFT, and whole weights beside it.

``model_parts`` says which module belongs to which part, ``attach`` puts the adapter in,
``whole_weights`` is the weights that train whole, ``initial_values`` is what training begins with,
``state`` reads and writes the adapter under the names that PEFT saves it by.

Runs on: Clients and the trunk; the ServerApp makes the clients' initial adapter with it.
Read first: ``attach.py``: ``attach_lora``.
"""

from flower_split.lora.attach import attach_lora
from flower_split.lora.initial_adapter import initial_client_adapter
from flower_split.lora.initial_values import (
    base_digests,
    base_values,
    has_base_values,
    weight_norms,
)
from flower_split.lora.model_parts import embedding_names, output_embeddings, part_of, stack_of
from flower_split.lora.state import (
    adapter_name,
    adapter_state,
    load_adapter_state,
    lora_scales,
    set_trainable,
)
from flower_split.lora.whole_weights import BaseWeight

__all__ = [
    "BaseWeight",
    "adapter_name",
    "adapter_state",
    "attach_lora",
    "base_digests",
    "base_values",
    "embedding_names",
    "has_base_values",
    "initial_client_adapter",
    "load_adapter_state",
    "lora_scales",
    "output_embeddings",
    "part_of",
    "set_trainable",
    "stack_of",
    "weight_norms",
]
