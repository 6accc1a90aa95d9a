"""Which parts of the model who holds, and their LoRA, as the run config says.

A client may have cut layers of its own within the run's: a strong device keeps more layers. The
layers that it and the trunk both hold are its **overlap**:

- The client runs and trains its own copy of them; its calls run the trunk's layers between its own
  cuts only. The copies' LoRA has the settings of ``lora.trunk`` and, as initial values depend on the
  seed and the name alone, begins equal to the trunk's.
- The clients' copies of a layer are aggregated among the clients that hold it. The trunk's copy
  trains on the data of those that do not.
- Where the trunk does not train (modes ``frozen`` and ``forward-only``), no copy of its layers does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from flower_split.config import LoraPartConfig, RunConfig
from flower_split.config.lora import HEAD
from flower_split.config.model import WITH_OWN_HEAD
from flower_split.errors import ConfigError
from flower_split.split import CutLayers
from flower_split.split.structure.stack import LayerStack


def model_cuts(config: RunConfig) -> CutLayers:
    """Return where the run's model is cut."""
    return CutLayers(config.model.first_cut, config.model.second_cut)


def client_cuts(
    config: RunConfig, partition_id: int, node_config: Mapping[str, object] | None = None
) -> CutLayers:
    """Return where one client's model is cut.

    Args:
        config: The run's configuration; ``model.cuts-by-partition`` may name the partition.
        partition_id: The client's.
        node_config: Its SuperNode's; ``first-cut`` and ``second-cut`` there come before all else.

    Raises:
        ConfigError: They do not lie within the run's, are no integers, or the overlap cannot train.
    """
    run = model_cuts(config)
    first, second = config.model.own_cuts.get(partition_id, (run.first, run.second))
    numbers = []
    for key, value in (("first-cut", first), ("second-cut", second)):
        own = (node_config or {}).get(key, value)
        if isinstance(own, bool) or not isinstance(own, int):
            raise ConfigError(
                f"the node config of partition {partition_id} has {key} = {own!r}; it must be an "
                "integer, as in: flower-supernode … --node-config 'first-cut=3 second-cut=5 …'."
            )
        numbers.append(own)
    config.model.check_cuts(numbers[0], numbers[1], f"partition {partition_id}")
    cuts = CutLayers(numbers[0], numbers[1])
    if cuts != run:
        check_overlap(config, f"partition {partition_id}")
    return cuts


def check_overlap(config: RunConfig, who: str) -> None:
    """Refuse settings of the trunk with which a client cannot train trunk layers of its own.

    Raises:
        ConfigError: The trunk trains something else than LoRA.
    """
    lora = config.lora.trunk
    found = {
        f'trunk.train is "{config.trunk.train}"': config.trunk.train != "lora",
        "lora.trunk.use-dora is set": lora.use_dora,
        f'lora.trunk.bias is "{lora.bias}"': lora.bias != "none",
        "lora.trunk.modules-to-save is set": bool(lora.modules_to_save),
    }
    why = next((what for what, is_so in found.items() if is_so), "")
    if config.mode == "joint" and why:
        raise ConfigError(
            f"{who} has cut layers of its own and would train trunk layers itself, which it does "
            f"with plain LoRA only; {why}. Leave that setting or the client's cut layers out."
        )


def overlap_layers(run: CutLayers, cuts: CutLayers) -> list[int]:
    """Return the layers that both a client with ``cuts`` and the trunk hold, ascending."""
    return [*range(run.first, cuts.first), *range(cuts.second, run.second)]


def held_parts(config: RunConfig, cuts: CutLayers) -> dict[str, LoraPartConfig]:
    """Return the LoRA of what a client with ``cuts`` holds, told apart by the run's cut layers.

    ``trunk`` is there where the client holds trunk layers and the trunk trains.
    """
    parts = client_parts(config)
    if config.mode == "joint" and overlap_layers(model_cuts(config), cuts):
        parts |= trunk_parts(config)
    return parts


def held_modules(
    modules: Iterable[str], stack: LayerStack, run: CutLayers, cuts: CutLayers
) -> frozenset[str]:
    """Return those of ``modules`` that a client with ``cuts`` holds a copy of.

    Args:
        modules: Names of modules or tensors, by the unsplit model's names.
        stack: Where the layers are.
        run: The run's cut layers.
        cuts: The client's.
    """
    trunks = {index for index in range(run.first, run.second) if cuts.part_of(index) == "trunk"}
    return frozenset(name for name in modules if stack.index_of(name) not in trunks)


def client_parts(config: RunConfig) -> dict[str, LoraPartConfig]:
    """Return what trains of the parts that a client holds, LoRA or whole weights.

    A head that the task has put on top trains whole: a base model has none.
    """
    top = config.lora.top
    if config.model.task in WITH_OWN_HEAD and top.train == "lora":
        names = [*(name for name in top.saved_modules if name != HEAD), HEAD]
        top = replace(top, modules_to_save=", ".join(names))
    return _that_train({"bottom": config.lora.bottom, "top": top})


def trunk_parts(config: RunConfig) -> dict[str, LoraPartConfig]:
    """Return the LoRA of the trunk; empty where the trunk has none."""
    return _that_train({"trunk": config.lora.trunk})


def all_parts(config: RunConfig) -> dict[str, LoraPartConfig]:
    """Return the LoRA of the whole model in one process."""
    return client_parts(config) | trunk_parts(config)


def trained_parts(config: RunConfig) -> dict[str, LoraPartConfig]:
    """Return the LoRA of the parts that the run trains: what a client trains alone, too.

    The trunk trains in mode ``joint`` only; in ``forward-only`` no gradient reaches the bottom.
    """
    parts = all_parts(config)
    if config.mode != "joint":
        parts.pop("trunk", None)
    if config.mode == "forward-only":
        parts.pop("bottom", None)
    return parts


def _that_train(parts: dict[str, LoraPartConfig]) -> dict[str, LoraPartConfig]:
    return {name: part for name, part in parts.items() if part.adapts}
