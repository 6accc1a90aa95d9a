"""What the run's inner strategy is made from: the clients' initial adapter, and what each holds of it."""

import logging
from collections.abc import Mapping

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flower_split.aggregation.core.client_updates import AdapterSpec
from flower_split.aggregation.from_config import check_clients
from flower_split.assets import resolve_model_path
from flower_split.config import RunConfig
from flower_split.lora import initial_client_adapter
from flower_split.messages.client_facts import ClientFacts
from flower_split.parties.client_cuts import cut_notes, cut_specs, overlap_adapter
from flower_split.parties.client_ranks import OwnLora, rank_specs
from flower_split.parties.parts import client_parts, model_cuts
from flower_split.server.federation.base_values import gather_base_values
from flower_split.server.federation.exchange import Federation
from flower_split.server.inner.flower_strategies import InnerContext, InnerFactory, inner_notes
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.privacy.accounting import privacy_notes
from flower_split.server.privacy.mechanisms import own_inner, with_privacy
from flower_split.split import CutLayers

logger = logging.getLogger(__name__)


def inner_context(
    grid: Grid, config: RunConfig, federation: Federation, facts: Mapping[int, ClientFacts]
) -> InnerContext:
    """The clients' adapter before round 1, and who holds which part of it at which rank.

    Args:
        grid: Flower's grid; clients are asked for initial values that only base weights say.
        config: The run's configuration.
        federation: The nodes by slot.
        facts: Slot to what the client said of itself.

    Raises:
        FederationError: Clients do not answer, or their base weights differ.
        ConfigError: Ranks or cut layers do not fit the model.
    """
    state, scales = initial_client_adapter(
        resolve_model_path(config.model.name),
        model_cuts(config),
        client_parts(config),
        seed=config.seed,
        dtype=config.model.dtype,
        revision=config.model.revision or None,
        attn_implementation=config.model.attn_implementation or None,
        fetch=lambda shapes: gather_base_values(
            grid, federation, facts, shapes, timeout=config.round_timeout
        ),
    )
    cuts = client_cut_layers(config, facts)
    overlap, overlap_scales = overlap_adapter(config, cuts.values())
    state, scales = {**state, **overlap}, {**scales, **overlap_scales}
    return InnerContext(
        config=config,
        num_clients=len(federation.nodes),
        initial=state,
        scales=scales,
        slot_of=federation.slot_of,
        specs=cut_specs(config, cuts, state, client_specs(config, facts, scales)),
    )


def inner_strategy(
    context: InnerContext,
    facts: Mapping[int, ClientFacts],
    federation: Federation,
    make_inner: InnerFactory | None = None,
) -> tuple[Strategy, list[str]]:
    """The inner strategy, and what the log and the report should say of it.

    Args:
        context: What it is made from.
        facts: Slot to what the client said of itself.
        federation: The nodes by slot, for errors.
        make_inner: The app's own; None: what ``strategy.*`` and ``privacy.*`` name.

    Raises:
        ConfigError: It does not go with the configuration.
        AggregationError: It does not go with what the clients hold.
    """
    config = context.config
    if make_inner is None and config.strategy.aggregates_lora:
        check_clients(
            config.strategy, context.specs, context.num_sampled, federation.nodes.__getitem__
        )
    inner = with_privacy(context) if make_inner is None else own_inner(context, make_inner)
    if isinstance(inner, LoraFedAvg):
        inner.largest_weights = largest_weights(config, facts)
    notes = inner_notes(context) if make_inner is None else []
    cuts = client_cut_layers(config, facts)
    return inner, notes + privacy_notes(context, inner) + cut_notes(config, cuts)


def client_cut_layers(config: RunConfig, facts: Mapping[int, ClientFacts]) -> dict[int, CutLayers]:
    """Slot to where that client's model is cut."""
    return {slot: item.cuts or model_cuts(config) for slot, item in facts.items()}


def client_specs(
    config: RunConfig, facts: Mapping[int, ClientFacts], scales: Mapping[str, float]
) -> dict[int, AdapterSpec]:
    """What each client holds of the adapter, where that is not all of it as the run has it."""
    own = {
        slot: OwnLora(rank=item.lora_rank, alpha=item.lora_alpha) for slot, item in facts.items()
    }
    specs = rank_specs(config, own, scales, resolve_model_path(config.model.name))
    if specs:
        logger.info(
            "clients with a LoRA rank or scale of their own, by partition: %s",
            ", ".join(f"{slot}: {own[slot]}" for slot in specs),
        )
    return specs


def largest_weights(config: RunConfig, facts: Mapping[int, ClientFacts]) -> dict[int, float]:
    """The largest weight that each client can report truthfully; empty where all count the same."""
    if config.strategy.weighting == "uniform":
        return {}
    train = config.train
    in_a_step = train.batch_size * train.gradient_accumulation_steps
    if config.strategy.weighting == "tokens":
        in_a_step *= train.sequence_length
    return {slot: float(item.planned_steps * in_a_step) for slot, item in facts.items()}
