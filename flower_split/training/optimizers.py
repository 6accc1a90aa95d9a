"""Optimizers and learning-rate schedules, the same for the trunk and for the clients.

A schedule is a function of the optimizer step within the whole run, not an object with state: a
client that makes a new optimizer every round and a trunk that resumes both just ask for the rate.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from flower_split.config import OptimizerConfig
from flower_split.errors import ConfigError


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Make the optimizer that ``config`` names, over ``parameters`` in the order given.

    Args:
        parameters: Floating-point.
        config: Name, rate and decay.
        fused: Step in one kernel, with other last bits than torch's default.
    """
    rate, decay = config.learning_rate, config.weight_decay
    # Over all parameters at a time: the bits of torch's loop over them, which takes half as long again.
    foreach = not fused
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=rate, weight_decay=decay, foreach=foreach, fused=fused
        )
    if config.name == "adam":
        return torch.optim.Adam(
            parameters, lr=rate, weight_decay=decay, foreach=foreach, fused=fused
        )
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, foreach=foreach, fused=fused)


def total_norm(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm over all entries of ``tensors``, of no dimensions.

    That of :func:`torch.nn.utils.get_total_norm`, which asks for every tensor's norm to be moved to where
    it is: of hundreds of tensors, and beside other threads, that takes longer than the norms.

    Args:
        tensors: Floating-point.
        norm_type: As torch's.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or devices.pop().type == "cpu":
        return nn.utils.get_total_norm(tensors, norm_type)
    return norm_of_norms(tensors, norm_type)


def norm_of_norms(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return :func:`total_norm` of tensors on one device, by the kernels that torch takes on a GPU."""
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # one kernel takes one dtype
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        norms.extend(torch._foreach_norm(same, norm_type))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total


def clip_by_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clip ``.grad`` as :func:`torch.nn.utils.clip_grad_norm_` does; return the norm before."""
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def optimizer_tensors(
    named: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return the state of an optimizer as ``NAME/KEY``, bit for bit, on the CPU.

    Args:
        named: Its parameters, by name.
        optimizer: Over them, in their order.
    """
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    named: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
) -> None:
    """Go to the state of :func:`optimizer_tensors`; names that are not in ``named`` are left alone."""
    indices = {name: index for index, (name, _) in enumerate(named)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name in indices:
            state.setdefault(indices[name], {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


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
        parameters: Those of the part; they all require grad.
        config: Optimizer, schedule and clipping.
        total_steps: Optimizer steps of the whole run, over all server rounds.
        fused: Step in one kernel, with other last bits than torch's default.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        config: OptimizerConfig,
        total_steps: int,
        *,
        fused: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self._max_grad_norm = config.max_grad_norm
        self._optimizer = make_optimizer(self.parameters, config, fused=fused)
        self._rate = LearningRate(config, total_steps)

    def state(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the optimizer's state; see :func:`optimizer_tensors`.

        Args:
            names: The parameters' names, in their order.
        """
        return optimizer_tensors(self._named(names), self._optimizer)

    def load_state(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state of :meth:`state`; a parameter that it does not name begins anew.

        Raises:
            ConfigError: It is of parameters of other shapes.
        """
        named = self._named(names)
        for name, parameter in named:
            for key, value in tensors.items():
                if (
                    key.rpartition("/")[0] == name
                    and value.dim()
                    and value.shape != parameter.shape
                ):
                    raise ConfigError(
                        f'train.optimizer-state = "keep": the state {key} is {list(value.shape)}, and '
                        f"the parameter is {list(parameter.shape)} in this round. An aggregation that "
                        'changes ranks between rounds needs train.optimizer-state = "reset".'
                    )
        load_optimizer_tensors(named, self._optimizer, tensors)

    def _named(self, names: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
        return list(zip(names, self.parameters, strict=True))

    def forget_gradients(self) -> None:
        """Drop gradients that a round which was lost may have left behind."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, step: int, *, clip: bool = True) -> tuple[Tensor, float]:
        """Take optimizer step ``step``, counted from 0 over the whole run, with ``.grad`` as it is.

        Args:
            step: Places the learning rate.
            clip: Clip this part's gradient by itself; False: it has been clipped with the others.

        Returns:
            ``(L2 norm of the part's gradient before clipping, learning rate)``; the norm, of no
            dimensions and on the parameters' device, is 0 where it was clipped with the others.
        """
        norm = torch.zeros((), device=self.parameters[0].device)
        if clip and self._max_grad_norm > 0:
            norm = clip_by_norm(self.parameters, self._max_grad_norm)
        elif clip:
            norm = total_norm([p.grad for p in self.parameters if p.grad is not None])
        self._rate.apply(self._optimizer, step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm, self._rate(step)
