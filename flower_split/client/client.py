"""One client's work in a round: its part of the model, its data, and the trunk in the middle.

A round's steps are those of ``flower_split/training/round.py``.
"""

import contextlib
import hashlib
import itertools
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flower_split.client.model_cache import NoTrunk, RunCache
from flower_split.client.node_route import NodeRoute
from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import RunConfig
from flower_split.data import ClientData, batches, eval_batches
from flower_split.data.prompts import prompt_batches
from flower_split.lora import (
    base_digests,
    base_values,
    has_base_values,
    load_adapter_state,
    set_trainable,
)
from flower_split.lora.base_change import set_base_change
from flower_split.lora.core_training import trained_cores
from flower_split.messages.client_facts import ClientFacts
from flower_split.messages.orders import EvaluateOrder, TrainOrder, TrunkOrder
from flower_split.parties.client_ranks import OwnLora
from flower_split.parties.parts import client_cuts, client_parts
from flower_split.runtime.tracing import PROCESS_TRACING
from flower_split.split import CutLayers, set_trunk
from flower_split.training.generation import score_texts
from flower_split.training.loss import evaluate
from flower_split.training.measures import EvalResult, RoundPosition, TrainResult
from flower_split.training.optimizers import PartOptimizer
from flower_split.training.round import train_round
from flower_split.training.text_scores import check_libraries
from flower_split.wire.client_certificate import NO_CERTIFICATE
from flower_split.wire.codecs import WireCodecs
from flower_split.wire.transports import TRANSPORTS

logger = logging.getLogger(__name__)

NOTHING: Mapping[str, Tensor] = MappingProxyType({})
SAME_AS_RUN = OwnLora()


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
    """Return a seed that depends on ``parts`` alone, the same in every process."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def trunk_class() -> type[RemoteTrunk]:
    """Return what stands for the trunk; where there are traces, what makes them of micro-batches."""
    if PROCESS_TRACING.current is None:
        return RemoteTrunk
    from flower_split.client.traced_trunk import TracedTrunk

    return TracedTrunk


class Client:
    """One client of one run.

    Attributes:
        kept: What this process keeps of the run.
        config: The run's configuration.
        partition_id: Its data partition.
        num_partitions: How many partitions there are.
        own: What of its LoRA is its own.
        cuts: Where its model is cut.
        route: What of the way to the trunk is this node's own.

    Args:
        kept: What this process keeps of the run; clients of one run share it.
        partition_id: The client's data partition.
        num_partitions: How many partitions there are.
        own: What of its LoRA is its own.
        cuts: Its own cut layers; None: what the run's configuration says.
        route: What of the way to the trunk is this node's own; None: as the run's configuration says.
    """

    def __init__(
        self,
        kept: RunCache,
        partition_id: int,
        num_partitions: int,
        own: OwnLora = SAME_AS_RUN,
        cuts: CutLayers | None = None,
        route: NodeRoute | None = None,
    ) -> None:
        self.kept = kept
        self.config = kept.config
        self.partition_id = partition_id
        self.num_partitions = num_partitions
        self.own = own
        self.cuts = cuts or client_cuts(kept.config, partition_id)
        self.route = route or NodeRoute.of(kept.config.trunk, {})

    @property
    def device(self) -> torch.device:
        """Where this client computes."""
        return self.kept.device

    @property
    def data(self) -> ClientData:
        """This client's examples; raises as :meth:`RunCache.data` does."""
        return self.kept.data(self.partition_id, self.num_partitions)

    @property
    def model(self) -> PreTrainedModel:
        """The bottom and the top, with LoRA; its adapter is that of whoever used it last."""
        return self.kept.client_model(self.own, self.cuts)

    def facts(self, concurrency: int) -> ClientFacts:
        """Return what this client says of itself in the handshake.

        Args:
            concurrency: How many clients its simulation runs at once; 0: not a simulation.

        Raises:
            ConfigError: A codec of the run, or a library of its scores, is not installed here.
        """
        WireCodecs.make(self.config.trunk.wire_dtype, self.config.trunk.gradient_wire_dtype)
        TRANSPORTS.get(self.config.trunk.transport)
        check_libraries(self.config.evaluation.names)
        return ClientFacts(
            partition_id=self.partition_id,
            num_partitions=self.num_partitions,
            num_examples=len(self.data.train),
            num_eval_examples=len(self.data.evaluate),
            planned_steps=planned_steps(self.config, len(self.data.train)),
            concurrency=concurrency,
            fingerprint=self.kept.fingerprint,
            name=self.data.name,
            lora_rank=self.own.rank,
            lora_alpha=self.own.alpha,
            cuts=self.cuts,
            base_digests=self.base_digests(),
            data_counts=self.data.counts.as_dict(),
            too_little=self.data.too_little,
        )

    def base_digests(self) -> dict[str, str]:
        """Return the digest of each weight that a base value of the adapter comes from, by name.

        See :mod:`flower_split.lora.initial_values`.
        """
        if not has_base_values(client_parts(self.config)):
            return {}
        return base_digests(self.kept.untouched_model(self.own, self.cuts))

    def base_values(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return what the adapter begins with where the base weights say it, fp32, sorted by name."""
        values = base_values(self.kept.untouched_model(self.own, self.cuts))
        return {name: value for name, value in values.items() if name in names}

    def train(
        self,
        adapter: Mapping[str, Tensor],
        order: TrainOrder,
        base_change: Mapping[str, Tensor] = NOTHING,
        optimizer_state: Mapping[str, Tensor] | None = None,
    ) -> TrainResult:
        """Train one round with the trunk, from ``adapter``; the model holds the result afterwards.

        Args:
            adapter: Full weights of the client's LoRA.
            order: How to reach the trunk, what trains, and on which pass over the data.
            base_change: What the method adds to the frozen base weights; and the frozen factors of
                the cores that train instead of B.
            optimizer_state: With what the optimizer goes on, and then is in the result; None: it
                begins anew, and is forgotten.

        Raises:
            TrunkError: The trunk refused, aborted the round, or did not answer in time.
        """
        self._load(adapter, base_change)
        set_trainable(self.model, order.trainable)
        position = self.position(order.trunk.server_round)
        with trained_cores(self.model, base_change), self._trunk(order.trunk) as trunk:
            named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            settings = self.config.train.optimizer
            settings = replace(settings, learning_rate=settings.learning_rate * order.rate_factor)
            fast = self.config.train.compute == "fast"
            trained = list(named.values())
            optimizer = PartOptimizer(trained, settings, position.total_steps, fused=fast)
            optimizer.load_state(list(named), optimizer_state or NOTHING)
            trunk.open(position.num_steps)
            result = train_round(
                self.model,
                self.batches(order.data_pass or order.trunk.server_round),
                self.config,
                position,
                trunk,
                proximal_mu=order.proximal_mu or self.config.train.proximal_mu,
                optimizers=[optimizer],
            )
            if optimizer_state is None:
                return result
            # What does not train in this round stays as it was left.
            return replace(
                result, optimizer_state={**optimizer_state, **optimizer.state(list(named))}
            )

    def evaluate(
        self,
        adapter: Mapping[str, Tensor],
        order: EvaluateOrder,
        base_change: Mapping[str, Tensor] = NOTHING,
        personal: Mapping[str, Tensor] | None = None,
    ) -> EvalResult:
        """Return the held-out loss of ``adapter``, with the trunk's current weights.

        Args:
            adapter: Full weights of the client's LoRA.
            order: How to reach the trunk.
            base_change: What the method adds to the frozen base weights.
            personal: The client's own adapter, which is evaluated as well; empty: it has not trained
                yet, so that the global one is its own; None: it is not asked for.

        Raises:
            TrunkError: The trunk refused or did not answer in time.
        """
        self._load(adapter, base_change)
        with self._trunk(order.trunk) as trunk:
            trunk.open(0, evaluate=True)
            result = self.held_out(self.model)
            if personal:
                self._load(personal, base_change)
                result = replace(result, personal=self.held_out(self.model))
            elif personal is not None:
                result = replace(result, personal=result)
            wire = trunk.take_stats()
        return replace(result, bytes_sent=wire.bytes_sent, bytes_received=wire.bytes_received)

    def held_out(self, model: PreTrainedModel) -> EvalResult:
        """Return what a model comes to on the held-out data: its loss, and the sums of its scores.

        Args:
            model: This client's, with its trunk in place, or a whole model.

        Raises:
            DataError: Text is to be scored, and no held-out record has a prompt.
            TrunkError: The trunk refused or did not answer in time.
        """
        result = evaluate(model, self.eval_batches(), self.device, self.config.model)
        scores = self.config.evaluation
        if not scores.names:
            return result
        assert self.kept.tokenizer is not None, "a task that continues prompts reads text"
        prompts = prompt_batches(
            self.data.evaluate,
            self.config.train.batch_size,
            self._pad_token_id,
            scores.max_prompts,
        )
        texts = score_texts(model, prompts, self.kept.tokenizer, scores)
        return replace(result, sums={**result.sums, **texts})

    def position(self, server_round: int) -> RoundPosition:
        """Return where a round stands in the run, for this client."""
        return RoundPosition(
            server_round=server_round,
            num_server_rounds=self.config.num_server_rounds,
            num_steps=planned_steps(self.config, len(self.data.train)),
            partition_id=self.partition_id,
            epoch_micro_batches=epoch_micro_batches(self.config, len(self.data.train)),
        )

    def batches(self, data_pass: int) -> Iterator[dict[str, Tensor]]:
        """Return endless micro-batches of the training examples, in the order of a pass, from 1."""
        return batches(
            self.data.train,
            self.config.train.batch_size,
            seed=stable_seed(self.config.seed, self.partition_id, data_pass),
            pad_token_id=self._pad_token_id,
        )

    def eval_batches(self) -> Iterator[dict[str, Tensor]]:
        """Return the held-out examples in batches, at most ``data.max-eval-batches``."""
        limit = self.config.data.max_eval_batches or None
        once = eval_batches(self.data.evaluate, self.config.train.batch_size, self._pad_token_id)
        return itertools.islice(once, limit)

    @property
    def _pad_token_id(self) -> int:
        """Any id does where there is none: the mask and the labels leave it out."""
        tokenizer = self.kept.tokenizer
        pad = None if tokenizer is None else tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    def _load(self, adapter: Mapping[str, Tensor], base_change: Mapping[str, Tensor]) -> None:
        load_adapter_state(self.model, adapter)
        self.kept.touch(self.own, self.cuts)
        set_base_change(self.model, base_change)

    @contextlib.contextmanager
    def _trunk(self, order: TrunkOrder) -> Iterator[RemoteTrunk]:
        """Put the trunk into the model's middle, for one phase."""
        # A trunk without TLS is on loopback, and asks for no certificate.
        shown = self.route.certificate if order.root_certificates else NO_CERTIFICATE
        with contextlib.ExitStack() as stack:
            trunk = trunk_class()(
                self.route.address_of(order),
                token=order.token,
                key=self.route.key_of(order),
                fingerprint=self.kept.fingerprint,
                mode=self.config.mode,
                call_timeout=self.config.trunk.call_timeout,
                root_certificates=order.root_certificates,
                cuts=self.cuts,
                transport=self.config.trunk.transport,
                certificate=shown,
                proxy=self.route.proxy,
            )
            stack.callback(set_trunk, self.model, NoTrunk())
            stack.callback(trunk.close)
            set_trunk(self.model, trunk)
            yield trunk
