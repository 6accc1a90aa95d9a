"""What a client's process keeps between messages: the parsed run config, models, data.

A simulation's actor serves several nodes and many rounds, so models and data stay in the process: base
weights are the same for everybody, adapters are overwritten in every round, and the trunk's connection
is swapped. In deployment the node's worker keeps them for a run; without it every message is a new
process, and nothing is kept.

One message is answered at a time in a process, so nothing here takes a lock.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flower_split.config import LoraPartConfig, RunConfig, Scalar, parse_run_config, unknown_keys
from flower_split.data import ClientData, load_client_data, load_tokenizer
from flower_split.errors import TrunkError
from flower_split.lora import adapter_state, attach_lora
from flower_split.parties.client_ranks import OwnLora, at_own_rank
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import held_parts, model_cuts, trained_parts
from flower_split.runtime.devices import resolve_device
from flower_split.runtime.version import __version__
from flower_split.split import CutLayers, load_client_model, load_whole_model
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.structure.compute_mode import compute_fast
from flower_split.split.structure.stack import find_stack

logger = logging.getLogger(__name__)

MOST_IDS = 5_000_000
"""Token ids and labels that a process keeps, about 200 MB; of one client, as many as it has."""


class NoTrunk(nn.Module):
    """Stands in the trunk's place until a round names its address."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Refuse the call: the trunk is not connected.

        Raises:
            TrunkError: Always.
        """
        raise TrunkError("the client model was called before its trunk was connected")


@dataclass(slots=True)
class _Models:
    """The models of the clients that have the same LoRA."""

    parts: dict[CutLayers, PreTrainedModel] = field(default_factory=dict)  # of the clients
    touched: set[CutLayers] = field(default_factory=set)  # whose adapter is not what it began with
    whole: PreTrainedModel | None = None  # for the local-only baseline
    whole_initial: Mapping[str, Tensor] = field(default_factory=dict)


class RunCache:
    """Models, tokenizer and data of one run, each loaded when it is first asked for.

    Attributes:
        config: The run's configuration.

    Args:
        config: The run's configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._models: dict[OwnLora, _Models] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._data: dict[tuple[int, int], ClientData] = {}  # the one used last is last
        self._fingerprint: Mapping[str, str] = {}

    @property
    def device(self) -> torch.device:
        """Where the clients of this process compute."""
        return resolve_device(self.config.train.device, "train.device")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None: its task reads no text."""
        if self._tokenizer is None and self.config.model.reads_text:
            self._tokenizer = load_tokenizer(self.config.model)
        return self._tokenizer

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The fields that must agree with the trunk's."""
        if not self._fingerprint:
            self._fingerprint = fingerprint(self.config)
        return self._fingerprint

    def data(self, partition_id: int, num_partitions: int) -> ClientData:
        """Return the examples of a partition; those used longest ago go where there are too many.

        Raises:
            DataError: They are missing, empty or malformed.
        """
        key = (partition_id, num_partitions)
        if key in self._data:
            self._data[key] = self._data.pop(key)
            return self._data[key]
        data = load_client_data(self.config, self.tokenizer, partition_id, num_partitions)
        self._data[key] = data
        while len(self._data) > 1 and sum(map(_ids, self._data.values())) > MOST_IDS:
            del self._data[next(iter(self._data))]
        return data

    def client_model(self, own: OwnLora, cuts: CutLayers) -> PreTrainedModel:
        """Return the bottom and the top, with LoRA; its adapter is that of whoever used it last.

        Args:
            own: What of the client's LoRA is its own.
            cuts: Where the client's model is cut.

        Raises:
            SplitError: The model cannot be loaded or cut.
        """
        models = self._models.setdefault(own, _Models())
        train = self.config.train
        if cuts not in models.parts:
            model = load_client_model(
                ModelSource.of(self.config.model),
                cuts,
                NoTrunk(),
                device=None if train.device_map else self.device,
                device_map=train.device_map or None,
            )
            attach_lora(
                model,
                model_cuts(self.config),
                self._at_own_rank(held_parts(self.config, cuts), own),
                seed=self.config.seed,
                incomplete=("trunk",),
            )
            if train.compute == "fast":
                # On several GPUs a layer's forward also moves what it is given, which no graph can.
                one_at_a_time = train.gradient_accumulation_steps == 1 and not train.device_map
                compute_fast(model, find_stack(model).layers(model), one_at_a_time=one_at_a_time)
            models.parts[cuts] = model
        return models.parts[cuts]

    def touch(self, own: OwnLora, cuts: CutLayers) -> None:
        """Note that a client's model no longer holds the adapter that it began with."""
        self._models.setdefault(own, _Models()).touched.add(cuts)

    def untouched_model(self, own: OwnLora, cuts: CutLayers) -> PreTrainedModel:
        """Return a client's model with its adapter as it was attached.

        Loaded anew if a round has used it.
        """
        models = self._models.setdefault(own, _Models())
        if cuts in models.touched:
            del models.parts[cuts]
            models.touched.remove(cuts)
        return self.client_model(own, cuts)

    def whole_model(self, own: OwnLora) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
        """Return the unsplit model with LoRA on all three parts, and the adapter it began with.

        Args:
            own: What of the client's LoRA is its own.
        """
        models = self._models.setdefault(own, _Models())
        if models.whole is None:
            model = load_whole_model(
                ModelSource.of(self.config.model),
                device=self.device,
            )
            parts = trained_parts(self.config)
            parts |= self._at_own_rank({n: p for n, p in parts.items() if n != "trunk"}, own)
            attach_lora(model, model_cuts(self.config), parts, seed=self.config.seed)
            models.whole_initial = adapter_state(model)
            models.whole = model
        return models.whole, models.whole_initial

    def _at_own_rank(
        self, parts: dict[str, LoraPartConfig], own: OwnLora
    ) -> dict[str, LoraPartConfig]:
        return at_own_rank(parts, own, self.config.lora.client_scale)


def _ids(data: ClientData) -> int:
    """Return how many token ids and labels a client's data has."""
    examples = (*data.train, *data.evaluate)
    return sum(len(example.input_ids) + len(example.labels) for example in examples)


class ClientCache:
    """What this process keeps, for one run at a time."""

    def __init__(self) -> None:
        self._parsed: tuple[str, RunConfig] | None = None
        self._ignored: tuple[str, ...] = ()
        self._run: RunCache | None = None

    def config(self, run_config: Mapping[str, Scalar]) -> RunConfig:
        """Return Flower's run config as dataclasses; it is parsed once for each distinct one.

        Keys that this version does not know are left out, so that a federation can be upgraded node by
        node. The handshake tells them to the ServerApp, which knows their defaults and refuses the run
        where one is at another value; that a key is no version's, it has found before.

        Raises:
            ConfigError: A value is out of range.
        """
        text = repr(sorted(run_config.items()))  # with types: 1, 1.0 and True are equal keys
        if self._parsed is None or self._parsed[0] != text:
            self._ignored = unknown_keys(run_config)
            if self._ignored:
                logger.warning(
                    "flower-split %s does not know these keys of the run config, and leaves them out: %s. "
                    "The run is refused unless they are at their defaults.",
                    __version__,
                    ", ".join(self._ignored),
                )
            known = {key: run_config[key] for key in run_config.keys() - set(self._ignored)}
            self._parsed = (text, parse_run_config(known))
        return self._parsed[1]

    @property
    def ignored_keys(self) -> tuple[str, ...]:
        """The keys that the last :meth:`config` left out, sorted."""
        return self._ignored

    def of(self, config: RunConfig) -> RunCache:
        """Return what is kept of a run; what was kept of another configuration is dropped."""
        if self._run is None or self._run.config != config:
            self._run = None  # the other run's models go before this one's are loaded
            self._run = RunCache(config)
            torch.set_num_threads(config.train.num_threads)
        return self._run
