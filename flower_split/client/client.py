"""One client's side of a run: its part of the model, its data, and its work in a round.

A simulation's actor serves several nodes and many rounds, so the model and the data are kept in the
process: base weights are the same for everybody, adapters are overwritten in every round, and the
trunk's connection is swapped. In deployment every message is a new process and nothing is kept.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flower_split.assets import resolve_model_path
from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import LoraPartConfig, RunConfig, resolved_run_config
from flower_split.data import (
    ClientData,
    batches,
    eval_batches,
    load_client_data,
    load_tokenizer,
)
from flower_split.errors import TrunkError
from flower_split.lora import (
    adapter_state,
    attach_lora,
    base_digests,
    base_values,
    has_base_values,
    load_adapter_state,
    lora_scales,
    set_trainable,
)
from flower_split.lora.base_change import set_base_change
from flower_split.parties.client_ranks import OwnLora, at_own_rank, widened
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import (
    client_cuts,
    client_parts,
    held_parts,
    model_cuts,
    trunk_parts,
)
from flower_split.runtime.devices import resolve_device
from flower_split.split import CutLayers, load_client_model, load_whole_model, set_trunk
from flower_split.training.round import (
    EvalResult,
    RoundPlace,
    StepMetrics,
    TrainResult,
    evaluate,
    train_round,
)

logger = logging.getLogger(__name__)

NOTHING: Mapping[str, Tensor] = MappingProxyType({})
_SAME_AS_RUN = OwnLora()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkOrder:
    """What the strategy tells one client about the trunk in one phase."""

    address: str  # host:port
    token: str  # of this client and this round
    root_certificates: str  # PEM text; empty: plain text on loopback
    server_round: int
    turn: int = 0  # which part of the data is trained on, from 1; 0: that of the server round
    experiment: str = ""  # the run's name, the same when it is resumed


@dataclass(frozen=True, slots=True)
class TrainReply:
    """What a client reports beside its adapter."""

    metrics: Mapping[str, int | float]
    steps: Mapping[str, list[int] | list[float]]  # per-step lists, all equally long


class NoTrunk(nn.Module):
    """Stands in the trunk's place until a round names its address."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Nobody may call it.

        Raises:
            TrunkError: Always.
        """
        raise TrunkError("the client model was called before its trunk was connected")


def planned_steps(config: RunConfig, num_examples: int) -> int:
    """Return the optimizer steps that a client with ``num_examples`` takes in a round."""
    if config.train.local_steps:
        return config.train.local_steps
    micro_batches = epoch_micro_batches(config, num_examples)
    steps = math.ceil(micro_batches / config.train.gradient_accumulation_steps)
    return steps * config.train.local_epochs


def epoch_micro_batches(config: RunConfig, num_examples: int) -> int:
    """Return the micro-batches of one pass over the data; 0 where rounds are counted in steps."""
    return math.ceil(num_examples / config.train.batch_size) if config.train.local_epochs else 0


def stable_seed(*parts: int | str) -> int:
    """A seed that depends on ``parts`` alone, the same in every process."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


@dataclass(slots=True)
class _Models:
    """The models of the clients that have the same LoRA."""

    parts: dict[CutLayers, PreTrainedModel] = field(default_factory=dict)  # of the clients
    touched: set[CutLayers] = field(default_factory=set)  # whose adapter is not what it began with
    whole: PreTrainedModel | None = None  # for the local-only baseline
    whole_initial: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class _Cache:
    """What this process keeps; one run at a time."""

    run: str = ""  # the configuration that it belongs to
    models: dict[OwnLora, _Models] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    data: dict[tuple[int, int], ClientData] = field(default_factory=dict)
    fingerprint: Mapping[str, str] = field(default_factory=dict)


_cache = _Cache()


class Client:
    """One client of one run. Made by :meth:`of`.

    Attributes:
        config: The run's configuration.
        partition_id: Its data partition.
        num_partitions: How many partitions there are.
        own: What of its LoRA is its own.
        cuts: Where its model is cut.
    """

    def __init__(
        self,
        config: RunConfig,
        partition_id: int,
        num_partitions: int,
        own: OwnLora = _SAME_AS_RUN,
        cuts: CutLayers | None = None,
    ) -> None:
        self.config = config
        self.partition_id = partition_id
        self.num_partitions = num_partitions
        self.own = own
        self.cuts = cuts or client_cuts(config, partition_id)

    @classmethod
    def of(
        cls,
        config: RunConfig,
        partition_id: int,
        num_partitions: int,
        own: OwnLora = _SAME_AS_RUN,
        cuts: CutLayers | None = None,
    ) -> "Client":
        """The client of a partition; drops what this process kept of another configuration.

        Args:
            config: The run's configuration.
            partition_id: The client's data partition.
            num_partitions: How many partitions there are.
            own: What of its LoRA is its own.
            cuts: Its own cut layers; None: what the run's configuration says.
        """
        global _cache
        run = json.dumps(resolved_run_config(config), sort_keys=True)
        if _cache.run != run:
            _cache = _Cache(run=run)
            torch.set_num_threads(config.train.num_threads)
        return cls(config, partition_id, num_partitions, own, cuts)

    @property
    def _models(self) -> _Models:
        """The models that clients with this client's LoRA share."""
        return _cache.models.setdefault(self.own, _Models())

    def _at_own_rank(self, parts: dict[str, LoraPartConfig]) -> dict[str, LoraPartConfig]:
        return at_own_rank(parts, self.own, self.config.lora.client_scale)

    @property
    def device(self) -> torch.device:
        """Where this client computes."""
        return resolve_device(self.config.train.device, "train.device")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if _cache.tokenizer is None:
            _cache.tokenizer = load_tokenizer(self.config.model)
        return _cache.tokenizer

    @property
    def data(self) -> ClientData:
        """This client's examples.

        Raises:
            DataError: They are missing, empty or malformed.
        """
        key = (self.partition_id, self.num_partitions)
        if key not in _cache.data:
            _cache.data[key] = load_client_data(
                self.config, self.tokenizer, self.partition_id, self.num_partitions
            )
        return _cache.data[key]

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """What must agree with the trunk."""
        if not _cache.fingerprint:
            _cache.fingerprint = fingerprint(self.config)
        return _cache.fingerprint

    @property
    def model(self) -> PreTrainedModel:
        """The bottom and the top, with LoRA; its adapter is that of whoever used it last.

        Raises:
            SplitError: The model cannot be loaded or cut.
        """
        if self.cuts not in self._models.parts:
            model = load_client_model(
                resolve_model_path(self.config.model.name),
                self.cuts,
                NoTrunk(),
                dtype=self.config.model.dtype,
                attn_implementation=self.config.model.attn_implementation or None,
                revision=self.config.model.revision or None,
                device=self.device,
                quantization=self.config.model.quantization or None,
            )
            attach_lora(
                model,
                model_cuts(self.config),
                self._at_own_rank(held_parts(self.config, self.cuts)),
                seed=self.config.seed,
                incomplete=("trunk",),
            )
            self._models.parts[self.cuts] = model
        return self._models.parts[self.cuts]

    def base_digests(self) -> dict[str, str]:
        """Of the weights that the adapter's base values come from, by name; see ``lora.initial``."""
        if not has_base_values(client_parts(self.config)):
            return {}
        return base_digests(self._untouched_model())

    def base_values(self, names: Collection[str]) -> dict[str, Tensor]:
        """What the adapter begins with where the base weights say it, fp32, sorted by name."""
        values = base_values(self._untouched_model())
        return {name: value for name, value in values.items() if name in names}

    def _untouched_model(self) -> PreTrainedModel:
        """The model with its adapter as it was attached: loaded anew if a round has used it."""
        if self.cuts in self._models.touched:
            del self._models.parts[self.cuts]
            self._models.touched.remove(self.cuts)
        return self.model

    def train(
        self,
        adapter: Mapping[str, Tensor],
        order: TrunkOrder,
        trainable: Collection[str] | None = None,
        base_change: Mapping[str, Tensor] = NOTHING,
        proximal_mu: float = 0.0,
    ) -> TrainReply:
        """One round with the trunk, from ``adapter``; the model holds the result afterwards.

        Args:
            adapter: Full weights of the client's LoRA.
            order: How to reach the trunk.
            trainable: Names of the weights that train in this round; None: all.
            base_change: What the method adds to the frozen base weights.
            proximal_mu: As for :func:`flower_split.training.round.train_round`; 0: as the run config has
                it.

        Raises:
            TrunkError: The trunk refused, aborted the round, or did not answer in time.
        """
        load_adapter_state(self.model, adapter)
        self._models.touched.add(self.cuts)
        set_base_change(self.model, base_change)
        set_trainable(self.model, trainable)
        place = self._place(order.server_round)
        with self._trunk(order) as trunk:
            trunk.open(place.num_steps)
            batches = self._batches(order.turn or order.server_round)
            result = train_round(
                self.model,
                batches,
                self.config,
                place,
                trunk,
                proximal_mu=proximal_mu or self.config.train.proximal_mu,
            )
        return _train_reply(result)

    def evaluate(
        self,
        adapter: Mapping[str, Tensor],
        order: TrunkOrder,
        base_change: Mapping[str, Tensor] = NOTHING,
    ) -> dict[str, int | float]:
        """Held-out loss of ``adapter``, on the changed base, with the trunk's current weights.

        Raises:
            TrunkError: The trunk refused or did not answer in time.
        """
        load_adapter_state(self.model, adapter)
        self._models.touched.add(self.cuts)
        set_base_change(self.model, base_change)
        with self._trunk(order) as trunk:
            trunk.open(0, evaluate=True)
            result = evaluate(self.model, self._eval_batches(), self.device)
        return {
            "loss-sum": result.loss_sum,
            "eval_loss": result.loss_sum / result.num_tokens,
            "num-tokens": result.num_tokens,
            "num-examples": result.num_examples,
        }

    def train_alone(self) -> dict[str, Tensor]:
        """The local-only baseline: all three parts, as many steps as the run, from the same start.

        Returns:
            The adapter of the whole model; trained at this client's ranks, written at the run's.
        """
        model = self._whole_model()
        load_adapter_state(model, self._models.whole_initial)
        for server_round in range(1, self.config.num_server_rounds + 1):
            place, batches = self._place(server_round), self._batches(server_round)
            train_round(model, batches, self.config, place, None)
        state = adapter_state(model)
        if self.own == _SAME_AS_RUN:
            return state
        other = self._with_the_runs_lora()
        scales = lora_scales(other._whole_model())
        return widened(state, lora_scales(model), other._models.whole_initial, scales)

    def _with_the_runs_lora(self) -> "Client":
        return Client(self.config, self.partition_id, self.num_partitions)

    def evaluate_alone(self, adapter: Mapping[str, Tensor]) -> EvalResult:
        """Held-out loss of an adapter of the whole model, at the run's ranks."""
        model = self._with_the_runs_lora()._whole_model()
        load_adapter_state(model, adapter)
        return evaluate(model, self._eval_batches(), self.device)

    def _place(self, server_round: int) -> RoundPlace:
        return RoundPlace(
            server_round=server_round,
            num_server_rounds=self.config.num_server_rounds,
            num_steps=planned_steps(self.config, len(self.data.train)),
            partition_id=self.partition_id,
            epoch_micro_batches=epoch_micro_batches(self.config, len(self.data.train)),
        )

    def _batches(self, server_round: int) -> Iterator[dict[str, Tensor]]:
        return batches(
            self.data.train,
            self.config.train.batch_size,
            seed=stable_seed(self.config.seed, self.partition_id, server_round),
            pad_token_id=self._pad_token_id,
        )

    def _eval_batches(self) -> Iterator[dict[str, Tensor]]:
        limit = self.config.data.max_eval_batches or None
        once = eval_batches(self.data.evaluate, self.config.train.batch_size, self._pad_token_id)
        return itertools.islice(once, limit)

    @property
    def _pad_token_id(self) -> int:
        """Any id does where there is none: the mask and the labels leave it out."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @contextlib.contextmanager
    def _trunk(self, order: TrunkOrder) -> Iterator[RemoteTrunk]:
        """The trunk in the model's middle, for one phase."""
        with contextlib.ExitStack() as stack:
            trunk = RemoteTrunk(
                order.address,
                token=order.token,
                fingerprint=self.fingerprint,
                mode=self.config.mode,
                call_timeout=self.config.trunk.call_timeout,
                wire_dtype=self.config.trunk.wire_dtype,
                root_certificates=order.root_certificates,
                cuts=self.cuts,
            )
            stack.callback(set_trunk, self.model, NoTrunk())
            stack.callback(trunk.close)
            set_trunk(self.model, trunk)
            yield trunk

    def _whole_model(self) -> PreTrainedModel:
        """The unsplit model with LoRA on all three parts, in this process."""
        if self._models.whole is None:
            model = load_whole_model(
                resolve_model_path(self.config.model.name),
                dtype=self.config.model.dtype,
                attn_implementation=self.config.model.attn_implementation or None,
                revision=self.config.model.revision or None,
                device=self.device,
                quantization=self.config.model.quantization or None,
            )
            cuts = model_cuts(self.config)
            parts = self._at_own_rank(client_parts(self.config)) | trunk_parts(self.config)
            attach_lora(model, cuts, parts, seed=self.config.seed)
            self._models.whole_initial = adapter_state(model)
            self._models.whole = model
        return self._models.whole


def _train_reply(result: TrainResult) -> TrainReply:
    """A round's training as the numbers that travel."""
    names = [item.name for item in fields(StepMetrics) if item.name != "step"]
    steps = {name: [getattr(step, name) for step in result.steps] for name in names}
    return TrainReply(
        metrics={
            "train_loss": result.loss,
            "num-tokens": result.num_tokens,
            "num-examples": result.num_examples,
            "bytes-sent": sum(step.bytes_sent for step in result.steps),
            "bytes-received": sum(step.bytes_received for step in result.steps),
        },
        steps=steps,
    )
