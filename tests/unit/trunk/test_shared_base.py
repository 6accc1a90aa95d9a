"""One base in memory under several experiments: what is shared, what is not, and what is refused."""

from dataclasses import replace

import pytest
import torch

from flower_split.config import LoraConfigs, LoraPartConfig, OptimizerConfig, RunConfig
from flower_split.errors import ConfigError, RefusalReason, SplitError, TrunkRefused
from flower_split.parties.experiment_settings import adopted, brought
from flower_split.trunk.build import ExperimentEngines
from flower_split.trunk.compute.shared_base import storage_bytes
from flower_split.trunk.engine.engine import TrunkEngine
from tests.acceptance.federation import make_config, write_checkpoint
from tests.support.experiments_rig import ADAM, varied
from tests.support.toy_quantiser import METHOD


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_config(write_checkpoint(tmp_path_factory.mktemp("model")))


def with_trunk(config: RunConfig, part: LoraPartConfig, **trunk: object) -> RunConfig:
    lora = LoraConfigs(bottom=config.lora.bottom, trunk=part, top=config.lora.top)
    return replace(config, lora=lora, trunk=replace(config.trunk, **trunk))


def frozen_bytes(config: RunConfig) -> int:
    """Of the trunk's two layers, by their shapes: attention, MLP and norms, fp32."""
    hidden, inner, keys = 32, 48, 16
    layer = 2 * hidden * hidden + 2 * keys * hidden + 3 * inner * hidden + 2 * hidden
    return 4 * 2 * layer


def tensors_of(engine: TrunkEngine) -> list[torch.Tensor]:
    trunk = engine.compute.trunk
    return [*trunk.parameters(), *trunk.buffers(), *trunk.host.parameters(), *trunk.host.buffers()]


@pytest.mark.parametrize("quantization", ["", f'{{"quant_method": "{METHOD}"}}'])
def test_base_is_in_memory_once_however_many_experiments_there_are(
    config: RunConfig, quantization: str
) -> None:
    config = replace(config, model=replace(config.model, quantization=quantization))
    made = ExperimentEngines(config)
    base = made.base.num_bytes
    if not quantization:
        assert frozen_bytes(config) <= base < 1.05 * frozen_bytes(config)  # and rotary frequencies
    else:
        assert base < 0.4 * frozen_bytes(config)
    runs = [with_trunk(config, LoraPartConfig(r=r, alpha=1.0)) for r in range(1, 9)]
    engines = [made.make("", brought(run)) for run in runs]
    own = sum(parameter.nbytes for e in engines for parameter in e.compute.parameters)
    found = storage_bytes(t for e in engines for t in tensors_of(e))
    assert base + own - 256 <= found <= base + own  # frequencies lie beside the buffers once more
    shared = {id(t): t.data_ptr() for t in tensors_of(engines[0]) if not t.requires_grad}
    for engine in engines[1:]:
        assert shared.keys() <= {id(t) for t in tensors_of(engine)}
    for engine in engines:
        engine.close()


def test_state_of_an_experiment_is_known_before_it_is_made(config: RunConfig) -> None:
    made = ExperimentEngines(config)
    for number in range(4):
        run = varied(config, number)
        engine = made.make("", brought(run))
        trained = sum(parameter.nbytes for parameter in engine.compute.parameters)
        moments = 2 if run.trunk.optimizer.name == "adamw" else 0
        known = made.base.state_bytes(run.lora.trunk, run.trunk.optimizer.name)
        assert known == 3 * (1 + moments) * trained
        engine.close()


def test_base_weights_that_train_whole_are_the_experiments_own(config: RunConfig) -> None:
    made = ExperimentEngines(config)
    part = LoraPartConfig(r=2, modules_to_save="input_layernorm")
    first, second = (made.make("", brought(with_trunk(config, part))) for _ in range(2))
    norms = [
        dict(engine.compute.named)["model.layers.2.input_layernorm.weight"]
        for engine in (first, second)
    ]
    with torch.no_grad():
        norms[0].add_(1.0)
    assert not torch.equal(norms[0], norms[1])
    made.base.check_untouched()
    first.close()
    second.close()


def test_base_that_was_written_to_is_noticed(config: RunConfig) -> None:
    made = ExperimentEngines(config)
    weight = next(made.base.twin().parameters())
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(SplitError, match="written to"):
        made.base.check_untouched()
    with pytest.raises(TrunkRefused, match="written to"):
        made.make("", brought(config))


def test_experiment_beyond_its_memory_is_refused_by_the_key(config: RunConfig) -> None:
    small = replace(config, trunk=replace(config.trunk, experiment_memory=1e-5))
    made = ExperimentEngines(small)
    with pytest.raises(TrunkRefused, match="trunk.experiment-memory") as caught:
        made.make("", brought(with_trunk(config, LoraPartConfig(r=1000))))
    assert caught.value.reason is RefusalReason.OVER_BUDGET


def test_run_brings_what_is_its_own_and_takes_the_rest_from_the_trunk(config: RunConfig) -> None:
    own = replace(config, trunk=replace(config.trunk, activation_memory=0.5, num_threads=2))
    run = with_trunk(
        replace(config, seed=7), LoraPartConfig(r=9), optimizer=ADAM, activation_memory=99.0
    )
    found = adopted(own, brought(run))
    assert (found.seed, found.lora, found.trunk.optimizer) == (7, run.lora, ADAM)
    assert (found.trunk.activation_memory, found.trunk.num_threads) == (0.5, 2)
    assert found.model == own.model
    assert adopted(own, None) == own


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("model.name", "/etc", "not an experiment's to say"),
        ("trunk.activation-memory", 999.0, "not an experiment's to say"),
        ("trunk.no-such-key", 1, "not an experiment's to say"),
        ("lora.trunk.no-such-key", 1, "unknown run-config key"),
        ("lora.trunk.r", "many", "must be of type int"),
        ("trunk.gradient-wire-dtype", "os:system", "import path"),
        ("trunk.window-rule", "os:system", "import path"),
        ("trunk.reduction", "os:system=3", "import path"),
        ("trunk.train", "full", "trains the base itself"),
    ],
)
def test_run_cannot_bring_what_is_the_operators(
    config: RunConfig, key: str, value: object, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        adopted(config, {key: value})
    made = ExperimentEngines(replace(config, mode="joint"))
    with pytest.raises(TrunkRefused, match=match) as caught:
        made.make("", {key: value})
    assert caught.value.reason is RefusalReason.INVALID_REQUEST


def test_operators_own_import_path_may_be_brought(config: RunConfig) -> None:
    rule = "flower_split.trunk.engine.window_rules:QuorumAlone"
    own = replace(config, trunk=replace(config.trunk, window_rule=rule))
    assert adopted(own, {"trunk.window-rule": rule}).trunk.window_rule == rule


def test_optimizer_without_moments_counts_none(config: RunConfig) -> None:
    base = ExperimentEngines(config).base
    part = LoraPartConfig(r=1)
    assert base.state_bytes(part, OptimizerConfig(name="sgd").name) * 3 == base.state_bytes(
        part, OptimizerConfig(name="adamw").name
    )
