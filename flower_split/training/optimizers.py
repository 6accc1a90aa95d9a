"""Optimizers and learning-rate schedules, the same for the trunk and for the clients.

A schedule is a function of the optimizer step within the whole run, not an object with state: a
client that makes a new optimizer every round and a trunk that resumes both just ask for the rate.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from flower_split.config import OptimizerConfig
from flower_split.errors import ConfigError


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Make the optimizer that ``config`` names, over ``parameters`` in the order given."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay)
    if config.name == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


class LearningRate:
    """The learning rate at an optimizer step of the run.

    Args:
        config: ``schedule`` is a name of :func:`transformers.get_scheduler`.
        total_steps: Optimizer steps of the whole run, over all server rounds.

    Raises:
        ConfigError: The schedule is unknown, or depends on more than the step.
    """

    def __init__(self, config: OptimizerConfig, total_steps: int) -> None:
        probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
        try:
            schedule = get_scheduler(
                config.schedule,
                probe,
                num_warmup_steps=round(config.warmup_ratio * total_steps),
                num_training_steps=total_steps,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"*.optimizer.schedule must name a schedule of transformers' get_scheduler; "
                f"{config.schedule!r} does not work: {error}."
            ) from error
        if not isinstance(schedule, LambdaLR):
            raise ConfigError(
                f"*.optimizer.schedule {config.schedule!r} depends on more than the step; use "
                "constant, linear, cosine, polynomial or another schedule of the step alone."
            )
        self._peak = config.learning_rate
        self._factor = schedule.lr_lambdas[0]

    def __call__(self, step: int) -> float:
        """Return the rate for optimizer step ``step``, counted from 0 over the whole run."""
        return float(self._peak * self._factor(step))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the rate of every parameter group for optimizer step ``step``."""
        for group in optimizer.param_groups:
            group["lr"] = self(step)


class PartOptimizer:
    """The optimizer of one part of a model: learning rate, clipping and step, in this order.

    Args:
        parameters: Of the part; they all require grad.
        config: Optimizer, schedule and clipping.
        total_steps: Optimizer steps of the whole run, over all server rounds.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], config: OptimizerConfig, total_steps: int
    ) -> None:
        self.parameters = list(parameters)
        self._max_grad_norm = config.max_grad_norm
        self._optimizer = make_optimizer(self.parameters, config)
        self._rate = LearningRate(config, total_steps)

    def forget_gradients(self) -> None:
        """Drop gradients that a round which was lost may have left behind."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, step: int, *, clip: bool = True) -> None:
        """Take optimizer step ``step``, counted from 0 over the whole run, with ``.grad`` as it is.

        Args:
            step: Places the learning rate.
            clip: Clip this part's gradient by itself; False: it has been clipped with the others.
        """
        if clip and self._max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm)
        self._rate.apply(self._optimizer, step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
