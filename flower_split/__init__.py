"""Federated split fine-tuning of transformers on Flower.

The names in ``__all__`` are the public API; everything else may change. They are imported when they
are first used, so that ``import flower_split`` loads neither torch nor Flower.

Cut a model in memory, and run it through its trunk:

>>> import torch
>>> from transformers import AutoModelForCausalLM
>>> from flower_split import CutLayers, split_model
>>> from flower_split.assets import resolve_model_path
>>> path, cuts = resolve_model_path("quickstart"), CutLayers(2, 6)
>>> model = AutoModelForCausalLM.from_pretrained(path)
>>> client, trunk = split_model(model, cuts)
>>> tokens = torch.tensor([[5, 6, 7]])
>>> torch.equal(client(tokens).logits, model(tokens).logits)
True

Load each party's part alone, and give both LoRA under PEFT's names:

>>> from flower_split import attach_lora, load_client_model, load_trunk_model
>>> from flower_split.config import LoraPartConfig
>>> trunk = load_trunk_model(path, cuts)
>>> client = load_client_model(path, cuts, trunk)
>>> attach_lora(trunk, cuts, {"trunk": LoraPartConfig(r=4)}, seed=0)
>>> attach_lora(client, cuts, {"bottom": LoraPartConfig(r=4), "top": LoraPartConfig(r=4)}, seed=0)
>>> sorted({p.shape[0] for n, p in trunk.named_parameters() if "lora_A" in n})
[4]

Compare what the parties of a run must agree on:

>>> from flower_split import fingerprint
>>> from flower_split.config import parse_run_config
>>> fingerprint(parse_run_config({"model.second-cut": 5}))["cut-layers"]
'2:5'

Aggregate without Flower:

>>> from flower_split import make_aggregator
>>> make_aggregator("florist", tau=0.9).name
'florist'

Make a Flower app; its ``pyproject.toml`` names the two objects:

>>> from flwr.clientapp import ClientApp
>>> from flower_split import make_client_app, make_server_app
>>> client_app, server_app = make_client_app(), make_server_app()
>>> isinstance(client_app, ClientApp), type(server_app).__name__
(True, 'ServerApp')

Use a trunk that runs elsewhere, without Flower. Here it runs in this process, which a run never does:

>>> from flower_split import RemoteTrunk, TrunkCoordinator
>>> from flower_split.protocol.values import RoundPlan
>>> from flower_split.trunk.serve import RunningTrunk, Serving
>>> config = parse_run_config({"train.device": "cpu", "trunk.device": "cpu"})
>>> server = RunningTrunk(config, Serving(token="the coordinator's"))
>>> address = f"127.0.0.1:{server.port}"
>>> coordinator = TrunkCoordinator(address, "the coordinator's", timeout=60.0)
>>> def remote_trunk(server_round: int) -> RemoteTrunk:
...     plan = RoundPlan(
...         experiment="e", server_round=server_round, attempt=0, participants={0: "client 0's"}
...     )
...     coordinator.begin_round(plan)
...     mine = {"token": "client 0's", "fingerprint": fingerprint(config), "mode": config.mode}
...     return RemoteTrunk(address, **mine, call_timeout=60.0)
>>> trunk = remote_trunk(1)
>>> _ = trunk.open(planned_steps=1)
>>> cuts = CutLayers(config.model.first_cut, config.model.second_cut)
>>> client = load_client_model(path, cuts, trunk)
>>> attach_lora(client, cuts, {"bottom": config.lora.bottom, "top": config.lora.top}, seed=0)
>>> with trunk.micro_batch(0, 0, num_tokens=2, loss_denominator=2.0, last=True):
...     loss = client(tokens, labels=tokens).loss
>>> loss.backward()  # which steps the trunk: it was the window's only contribution
>>> coordinator.prepare_round("e", 1, 0).optimizer_steps
1
>>> trunk.close()
>>> _ = coordinator.commit_round("e", 1, 0)

Or have a block begin such a round, commit it at its end, and take it back if the block raises:

>>> from pathlib import Path
>>> from tempfile import TemporaryDirectory
>>> from flower_split import trunk_round
>>> from flower_split.split import set_trunk
>>> folder = TemporaryDirectory()
>>> token_file = Path(folder.name) / "token"
>>> token_file.touch(mode=0o600)
>>> _ = token_file.write_text("the coordinator's")
>>> with trunk_round(address, token_file, config, steps=1, experiment="mine") as trunk:
...     set_trunk(client, trunk)
...     with trunk.micro_batch(0, 0, num_tokens=2, loss_denominator=2.0, last=True):
...         loss = client(tokens, labels=tokens).loss
...     loss.backward()

Train the next round with transformers' ``Trainer``:

>>> from transformers import PrinterCallback, Trainer, TrainingArguments
>>> from flower_split import connect_trainer
>>> trunk = remote_trunk(2)
>>> set_trunk(client, trunk)
>>> arguments = TrainingArguments(
...     folder.name, max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
... )
>>> rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 16
>>> trainer = Trainer(client, arguments, train_dataset=rows)
>>> trainer.remove_callback(PrinterCallback)
>>> connect_trainer(trainer)
>>> trainer.train().global_step
2
>>> trunk.close()
>>> coordinator.prepare_round("e", 2, 0).optimizer_steps
2
>>> _ = coordinator.commit_round("e", 2, 0)

Make one PEFT adapter of what a run's directory holds at its end:

>>> from flower_split import export_adapter
>>> from flower_split.lora import adapter_state
>>> from flower_split.runs.directory import RunDirectory
>>> run = RunDirectory.create(parse_run_config({"run-dir": f"{folder.name}/run"}))
>>> _ = run.write_adapter("client", adapter_state(client))
>>> _ = run.write_adapter("trunk", coordinator.get_adapter())
>>> out = export_adapter(run.path, Path(folder.name) / "adapter")
>>> sorted(file.name for file in out.iterdir())
['adapter_config.json', 'adapter_model.safetensors']
>>> folder.cleanup()

Every error that this package raises on purpose is a ``FlowerSplitError``:

>>> from flower_split import FlowerSplitError
>>> coordinator.close()
>>> server.close()
>>> try:
...     coordinator.status()
... except FlowerSplitError as error:
...     print(type(error).__name__)
TrunkError
"""

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING

from flower_split.runtime.version import __version__ as __version__

if TYPE_CHECKING:
    from flower_split.aggregation import make_aggregator
    from flower_split.client.app import make_client_app
    from flower_split.client.remote_trunk import RemoteTrunk
    from flower_split.errors import FlowerSplitError
    from flower_split.integrations.trainer import connect_trainer
    from flower_split.integrations.trunk_round import trunk_round
    from flower_split.lora import attach_lora
    from flower_split.parties.fingerprint import fingerprint
    from flower_split.results.export import export_adapter
    from flower_split.server.app import make_server_app
    from flower_split.server.coordinator import TrunkCoordinator
    from flower_split.split import CutLayers, load_client_model, load_trunk_model, split_model

__all__ = [
    "CutLayers",
    "FlowerSplitError",
    "RemoteTrunk",
    "TrunkCoordinator",
    "attach_lora",
    "connect_trainer",
    "export_adapter",
    "fingerprint",
    "load_client_model",
    "load_trunk_model",
    "make_aggregator",
    "make_client_app",
    "make_server_app",
    "split_model",
    "trunk_round",
]

_MODULES = MappingProxyType(
    {
        "CutLayers": "split",
        "FlowerSplitError": "errors",
        "RemoteTrunk": "client.remote_trunk",
        "TrunkCoordinator": "server.coordinator",
        "attach_lora": "lora",
        "connect_trainer": "integrations.trainer",
        "export_adapter": "results.export",
        "fingerprint": "parties.fingerprint",
        "load_client_model": "split",
        "load_trunk_model": "split",
        "make_aggregator": "aggregation",
        "make_client_app": "client.app",
        "make_server_app": "server.app",
        "split_model": "split",
        "trunk_round": "integrations.trunk_round",
    }
)


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562).

    Raises:
        AttributeError: There is no such public name.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names beside the module's own."""
    return sorted({*globals(), *__all__})
