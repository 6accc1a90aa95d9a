"""A model class that leaves out what another party owns, so that it can be loaded without it."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flower_split.split.structure.host_call import StandIn
from flower_split.split.structure.place_holders import Absent, AbsentEmbedding

_PLACE_HOLDERS = (StandIn, Absent, AbsentEmbedding)  # of another party's modules
_REPORTS = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")  # loggers

Carve = Callable[[PreTrainedModel], None]  # takes out, in place, what another party owns


def holed(
    model_class: type[PreTrainedModel], carve: Carve, whole_modules: frozenset[str]
) -> type[PreTrainedModel]:
    """Return a subclass whose constructor leaves out what another party owns.

    Args:
        model_class: The family's class.
        carve: Takes out what is left out.
        whole_modules: Names of the classes of modules that are never divided over devices.
    """

    def construct(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        model_class.__init__(self, config)
        carve(self)
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        self.all_tied_weights_keys = {
            target: source
            for target, source in self.all_tied_weights_keys.items()
            if target in names and source in names
        }
        self._no_split_modules = set(self._no_split_modules or ()) | whole_modules
        absent = {
            re.sub(r"\.\d+(?=\.|$)", ".*", name)
            for name, module in self.named_modules()
            if isinstance(module, _PLACE_HOLDERS)
        }
        # How to divide the modules; those outside the layers are not there to be divided.
        self._tp_plan = {n: style for n, style in (self._tp_plan or {}).items() if n not in absent}

    def initialize(self: PreTrainedModel, module: nn.Module) -> None:
        # What is around stand-ins has no weights of its own, but a family may reach into it.
        if not any(isinstance(part, _PLACE_HOLDERS) for part in module.modules()):
            model_class._init_weights(self, module)  # type: ignore[no-untyped-call]

    body = {
        "__init__": construct,
        "_init_weights": initialize,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "_keys_to_ignore_on_load_unexpected": [".*"],
    }
    return type(model_class.__name__, (model_class,), body)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' reports of the tensors, and of rules for them, that this part leaves."""
    loggers = [logging.getLogger(name) for name in _REPORTS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
