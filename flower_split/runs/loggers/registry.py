"""The loggers by name: those built in, and those of installed distributions."""

from types import MappingProxyType
from typing import TypeGuard

from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.runs.loggers.logger import MetricLogger
from flower_split.runs.loggers.mlflow import MlflowLogger
from flower_split.runs.loggers.tensorboard import TensorBoardLogger
from flower_split.runs.loggers.weights_and_biases import WandbLogger
from flower_split.runtime.registry import Registry


def _is_logger(found: object) -> TypeGuard[type[MetricLogger]]:
    return isinstance(found, type) and issubclass(found, MetricLogger)


LOGGERS: Registry[type[MetricLogger]] = Registry(
    group="flower_split.loggers",
    key="train.report-to",
    form="a subclass of flower_split.runs.loggers.logger.MetricLogger",
    machines="the ServerApp runs",
    built_in=MappingProxyType(
        {logger.extra: logger for logger in (TensorBoardLogger, WandbLogger, MlflowLogger)}
    ),
    accepts=_is_logger,
    error=ConfigError,
)


def make_loggers(config: RunConfig) -> list[MetricLogger]:
    """Return the loggers that ``train.report-to`` names, checked.

    Raises:
        ConfigError: One is unknown, cannot be made without arguments, or lacks what it needs.
    """
    return [_make(name) for name in config.train.loggers]


def _make(name: str) -> MetricLogger:
    made = LOGGERS.get(name)
    try:
        logger = made()
    except Exception as error:  # a plug-in may raise anything, and be abstract still
        raise ConfigError(
            f"train.report-to {name!r} cannot be made without arguments: {type(error).__name__}: "
            f"{error}. Correct the plug-in."
        ) from error
    logger.check()
    return logger
