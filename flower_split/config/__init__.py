"""The run's configuration: frozen dataclasses, parsed once at the edge and passed down.

A field ``trunk.optimizer.learning_rate`` is the run-config key ``trunk.optimizer.learning-rate``.
Every rule that a value must keep is checked on construction; nothing below reads the environment.

Runs on: Every party.
Read first: ``run.py``: the whole configuration, a section in each field.
"""

from flower_split.config.data import DataConfig
from flower_split.config.lora import LORA_INITS, LoraConfigs, LoraPartConfig
from flower_split.config.model import DTYPES, ModelConfig
from flower_split.config.parse import (
    parse_run_config,
    resolved_run_config,
    run_config_keys,
    unknown_keys,
)
from flower_split.config.privacy import MECHANISMS, PrivacyConfig
from flower_split.config.run import MODES, RunConfig
from flower_split.config.strategy import STRATEGIES, StrategyConfig
from flower_split.config.train import DEVICE_MAPS, OPTIMIZERS, OptimizerConfig, TrainConfig
from flower_split.config.trunk import STEP_EVERY, TrunkConfig
from flower_split.config.validation import Scalar

__all__ = [
    "DEVICE_MAPS",
    "DTYPES",
    "LORA_INITS",
    "MECHANISMS",
    "MODES",
    "OPTIMIZERS",
    "STEP_EVERY",
    "STRATEGIES",
    "DataConfig",
    "LoraConfigs",
    "LoraPartConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrivacyConfig",
    "RunConfig",
    "Scalar",
    "StrategyConfig",
    "TrainConfig",
    "TrunkConfig",
    "parse_run_config",
    "resolved_run_config",
    "run_config_keys",
    "unknown_keys",
]
