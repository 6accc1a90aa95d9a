"""Differential privacy of the clients' adapters: Flower's wrappers, their mods, and what they hold.

Central, ``server-`` or ``client-``: every update is clipped to an L2 norm C, and the server adds
Gaussian noise of z · C / n to the mean of n updates (McMahan et al., "Learning Differentially Private
Recurrent Language Models", ICLR 2018; adaptive C: Andrew et al., "Differentially Private Learning
with Adaptive Clipping", NeurIPS 2021). That bound on what one client moves is one of the *plain
mean*: every other rule of aggregation is refused. Local: each client clips and adds the noise itself
(``LocalDpMod``), so that any rule may follow.

What it does not cover, and the report says so: the trunk's server sees smashed data and gradients
without noise; metrics have none; and where the trunk trains (mode ``joint``), each client's update
depends on all clients' data through the trunk, so that no epsilon holds for the run.
"""

# ruff: noqa: TID251
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyAccountant,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting import PrivacyConfig as AccountantConfig
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from flower_split.config import PrivacyConfig, RunConfig, parse_run_config
from flower_split.errors import ConfigError, FederationError
from flower_split.frozen_factors import FrozenFactors
from flower_split.inner_strategies import (
    InnerContext,
    InnerFactory,
    frozen_names,
    make_inner,
)
from flower_split.lora_fedavg import LoraFedAvg
from flower_split.strategy_state import AdaptiveClipping, FixedClipping, chain

CLIENT_SIDE = (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
)
_WRAPPERS: Mapping[str, type[Strategy]] = {
    "server-fixed": DifferentialPrivacyServerSideFixedClipping,
    "server-adaptive": DifferentialPrivacyServerSideAdaptiveClipping,
    "client-fixed": DifferentialPrivacyClientSideFixedClipping,
    "client-adaptive": DifferentialPrivacyClientSideAdaptiveClipping,
}
_ROUNDING = 1e-3  # of an fp32 update that was clipped, added and subtracted again
_MEANS = ("fedavg", "fedprox")  # whose aggregate is the plain mean of the replies

INSTALL = "The epsilon is not computed: install the extra with pip install 'flower-split[dp]'."
TRUNK_TRAINS = (
    'NO EPSILON HOLDS FOR THIS RUN AS A WHOLE: in mode "joint" the trunk trains on the clients\' '
    "gradients without noise, and through it every client's update depends on all clients' data. Any "
    'epsilon below is of the adapters\' noise alone. Mode "frozen" or "forward-only" keeps the trunk '
    "as it is."
)
TRUNK_SEES = (
    "Not private: what the trunk's server sees (smashed data{gradients}) and the training and "
    "evaluation metrics carry no noise. Privacy is towards those who see adapters only."
)
ADAPTIVE = (
    "No epsilon is given for adaptive clipping: Flower has no accountant for it, and scales the noise "
    "by the clipping norm of after the update. As of Flower 1.41 the norm falls while more than "
    "privacy.target-quantile of the updates are clipped, and grows while fewer are."
)


def check_privacy(context: InnerContext) -> None:
    """Refuse what privacy cannot be combined with.

    Raises:
        ConfigError: With the reason and the remedy.
    """
    config, privacy = context.config, context.config.privacy
    if privacy.mechanism == "none":
        return
    if config.local_only_baseline:
        raise ConfigError(
            f'privacy.mechanism = "{privacy.mechanism}" cannot be combined with local-only-baseline: '
            "its adapters go from client to client without clipping or noise. Set "
            "local-only-baseline = false."
        )
    if privacy.central:
        _check_central(context)


def _check_central(context: InnerContext) -> None:
    config, privacy, name = context.config, context.config.privacy, context.config.strategy.name
    what = f'privacy.mechanism = "{privacy.mechanism}"'
    if name == "lora-fedavg":
        raise ConfigError(
            f"{what} adds noise to the aggregate that clients receive, but strategy.name = "
            '"lora-fedavg" goes on from its own ΔW, without that noise. Use strategy.name = "fedavg" '
            'with strategy.aggregator = "ffa-lora" (best: noise on B alone) or "fedit", or '
            'privacy.mechanism = "local".'
        )
    if name not in _MEANS:
        raise ConfigError(
            f"{what} scales its noise to what one client can move a plain mean; strategy.name = "
            f'"{name}" moves by more, or adds its step before the noise. Use strategy.name = '
            '"fedavg" or "fedprox", or privacy.mechanism = "local".'
        )
    if config.strategy.weighting != "uniform":
        raise ConfigError(
            f'{what} needs clients of equal weight; with strategy.weighting = "'
            f'{config.strategy.weighting}" one of much data moves the mean by more than the noise '
            'hides. Set strategy.weighting = "uniform".'
        )
    if config.trunk.quorum_of(context.num_sampled) < 1:
        raise ConfigError(
            f"{what} scales its noise to all {context.num_sampled} clients of a round, and a quorum "
            "below 1 lets rounds go on with fewer. Set trunk.quorum = 1 and trunk.quorum-count = 0."
        )
    if config.resume_previous and privacy.noise_multiplier > 0:
        raise ConfigError(
            "resume-previous would train a round again that clients have seen already, and spend its "
            f"privacy twice without counting it ({what}). Resume from the latest round, or begin anew."
        )


def with_privacy(context: InnerContext) -> Strategy:
    """The inner strategy of a run's configuration, inside the wrapper of its mechanism.

    Raises:
        ConfigError: Something in the configuration cannot be combined.
    """
    check_privacy(context)
    inner, privacy = make_inner(context), context.config.privacy
    if privacy.mechanism == "local" and isinstance(inner, LoraFedAvg):
        _check_local(inner, context)
    if privacy.central:
        inner = _wrapped(inner, context)
    frozen = frozen_names(context)
    return FrozenFactors(inner, context.initial, frozen) if frozen else inner


def own_inner(context: InnerContext, factory: InnerFactory) -> Strategy:
    """A user's own inner strategy, checked against ``privacy.*``, which does not wrap it.

    Raises:
        ConfigError: It is no strategy, or has not the wrapper that the mechanism needs.
    """
    inner, privacy = factory(context), context.config.privacy
    if not isinstance(inner, Strategy):
        raise ConfigError(
            f"the inner factory must return a strategy of flwr.serverapp.strategy; it returned "
            f"{type(inner).__name__}."
        )
    wanted = _WRAPPERS.get(privacy.mechanism)
    if wanted is not None and not any(isinstance(part, wanted) for part in chain(inner)):
        raise ConfigError(
            f'privacy.mechanism = "{privacy.mechanism}" needs {wanted.__name__}, and the app\'s own '
            f"inner strategy is {' around '.join(type(p).__name__ for p in chain(inner))}. Wrap it, or "
            'set privacy.mechanism = "none".'
        )
    if privacy.mechanism != "none" and context.config.local_only_baseline:
        check_privacy(context)
    return inner


def _check_local(inner: LoraFedAvg, context: InnerContext) -> None:
    name, method = context.config.strategy.aggregator, inner.aggregator.method
    frozen = context.initial.keys() - set(inner.aggregator.trainable())
    why = "changes the clients' base weights" if method.changes_base else ""
    why = why or ("keeps weights on the clients" if method.private else "")
    why = why or ("freezes weights, to which the clients' noise would be added" if frozen else "")
    if why:
        raise ConfigError(
            f'privacy.mechanism = "local" and strategy.aggregator = "{name}" cannot be combined: the '
            f'method {why}. Use "product-delta", or strategy.name = "fedavg", which can freeze A '
            '(strategy.aggregator = "ffa-lora").'
        )


def _wrapped(inner: Strategy, context: InnerContext) -> Strategy:
    privacy, count = context.config.privacy, context.num_sampled
    try:
        if privacy.adaptive:
            adaptive = (
                DifferentialPrivacyServerSideAdaptiveClipping
                if privacy.mechanism == "server-adaptive"
                else DifferentialPrivacyClientSideAdaptiveClipping
            )
            return adaptive(
                inner,
                privacy.noise_multiplier,
                count,
                initial_clipping_norm=privacy.clipping_norm,
                target_clipped_quantile=privacy.target_quantile,
                clip_norm_lr=privacy.clipping_norm_learning_rate,
                clipped_count_stddev=privacy.clipped_count_stddev or None,
            )
        fixed = (
            DifferentialPrivacyServerSideFixedClipping
            if privacy.mechanism == "server-fixed"
            else DifferentialPrivacyClientSideFixedClipping
        )
        accountant = _accountant(context) if privacy.noise_multiplier > 0 else None
        return fixed(
            inner, privacy.noise_multiplier, privacy.clipping_norm, count, accountant=accountant
        )
    except ValueError as error:
        raise ConfigError(
            f'privacy.mechanism = "{privacy.mechanism}" with {count} clients in a round: {error} '
            "(privacy.clipped-count-stddev, privacy.noise-multiplier)"
        ) from error


def _accountant(context: InnerContext) -> PrivacyAccountant | None:
    """Flower's accountant of this run; None where its library is not installed.

    Raises:
        ConfigError: The run would spend more than ``privacy.max-epsilon``.
    """
    privacy, limit = context.config.privacy, context.config.privacy.max_epsilon
    accountant = _rdp(privacy.delta, context.num_clients, limit or None)
    if accountant is None:
        if limit:
            raise ConfigError(f"privacy.max-epsilon cannot be kept. {INSTALL}")
        return None
    rounds = context.config.num_server_rounds
    event = GaussianPrivacyEvent(privacy.noise_multiplier, context.num_sampled, context.num_clients)
    if limit and accountant.would_exceed(event, count=rounds):
        possible = next(n for n in range(rounds - 1, -1, -1)
                        if n == 0 or not accountant.would_exceed(event, count=n))  # fmt: skip
        raise ConfigError(
            f"{rounds} rounds would spend more than privacy.max-epsilon = {limit:g} at delta = "
            f"{privacy.delta:g}; {possible} would not. Lower num-server-rounds, raise "
            "privacy.noise-multiplier, or raise the limit."
        )
    return accountant


def _rdp(delta: float, population: int, limit: float | None) -> RdpAccountant | None:
    config = AccountantConfig(
        target_delta=delta,
        population_size=population,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
        max_epsilon=limit,
    )
    try:
        return RdpAccountant(config)
    except ImportError:
        return None


def check_wrapped(inner: Strategy) -> None:
    """Refuse a central wrapper around this package's aggregation, which would drop the noise.

    Raises:
        ConfigError: It is one.
    """
    *around, inside = chain(inner)
    wrappers = [w for w in around if isinstance(w, (*FixedClipping, *AdaptiveClipping))]
    if wrappers and isinstance(inside, LoraFedAvg):
        raise ConfigError(
            f"{type(wrappers[0]).__name__} adds noise to the aggregate that clients receive, but "
            "LoraFedAvg goes on from its own ΔW, without that noise. Put FedAvg inside; "
            'strategy.name = "fedavg" with strategy.aggregator = "ffa-lora" does.'
        )


def check_clipped(
    reply: Message, sent: ArrayRecord, clipping_norm: float, who: str, server_round: int
) -> None:
    """Check that a client has clipped where the server relies on it.

    Raises:
        FederationError: Its update is longer than the norm: its ClientApp runs without the mod.
    """
    (returned,) = reply.content.array_records.values()
    norm = update_norm(sent, returned)
    if norm > clipping_norm * (1 + _ROUNDING) + _ROUNDING:
        raise FederationError(
            f"round {server_round}: {who} returned an update of L2 norm {norm:.4g}, above the clipping "
            f"norm {clipping_norm:.4g}: its ClientApp does not clip. Use this package's ClientApp with "
            'privacy.mechanism = "client-fixed" or "client-adaptive", or Flower\'s fixedclipping_mod '
            "or adaptiveclipping_mod around training."
        )


# ------------------------------------------------------------------ the clients' side


def client_mod(privacy: PrivacyConfig) -> Mod | None:
    """Flower's mod that the mechanism needs on the clients; None: it needs none."""
    if privacy.mechanism == "client-fixed":
        return fixedclipping_mod
    if privacy.mechanism == "client-adaptive":
        return adaptiveclipping_mod
    if privacy.mechanism == "local":
        return LocalDpMod(
            privacy.clipping_norm, privacy.local_sensitivity, privacy.epsilon, privacy.delta
        )
    return None


def privacy_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The mod of this app's clients: Flower's one for ``privacy.mechanism``, around training."""
    mod = client_mod(parse_run_config(context.run_config).privacy)
    if mod is None:
        return call_next(message, context)

    def train(request: Message, node: Context) -> Message:
        reply = call_next(request, node)
        if not reply.has_error():
            (sent,) = request.content.array_records.values()
            move_zero_update(reply, sent)
        return reply

    return mod(message, context, train)


def move_zero_update(reply: Message, sent: ArrayRecord) -> None:
    """Move an update of exactly zero by the smallest step of its largest weight, in place.

    Flower's clipping divides by the update's norm; one is zero where a warm-up begins at learning
    rate 0.
    """
    for record in reply.content.array_records.values():
        if list(record) != list(sent) or update_norm(sent, record) > 0:
            continue
        name = max(record, key=lambda n: float(np.abs(record[n].numpy()).max(initial=0.0)))
        values = record[name].numpy().copy()
        place = np.unravel_index(np.abs(values).argmax(), values.shape)
        step = np.spacing(np.abs(values[place]), dtype=values.dtype)
        values[place] += max(step, values.dtype.type(1e-12))
        record[name] = Array(values)


def update_norm(sent: ArrayRecord, returned: ArrayRecord) -> float:
    """The L2 norm of ``returned − sent`` over all weights, in fp64."""
    squares = (
        float(np.square(returned[n].numpy().astype(np.float64) - sent[n].numpy()).sum())
        for n in sent
    )
    return math.sqrt(math.fsum(squares))


# ------------------------------------------------------------------ what holds


@dataclass(frozen=True, slots=True)
class PrivacyReport:
    """What the run's report says of privacy."""

    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def privacy_notes(context: InnerContext, inner: Strategy) -> list[str]:
    """What a reader of the log and the report must know of the run's privacy, before it begins."""
    config, privacy = context.config, context.config.privacy
    wrappers = [w for w in chain(inner) if isinstance(w, (*FixedClipping, *AdaptiveClipping))]
    if privacy.mechanism == "none" and not wrappers:
        return []
    notes = [TRUNK_TRAINS] if config.mode == "joint" else []
    seen = "" if config.mode == "forward-only" else " and gradients"
    notes.append(TRUNK_SEES.format(gradients=seen))
    for wrapper in wrappers:
        if wrapper.noise_multiplier == 0:
            notes.append("The noise multiplier is 0: updates are clipped, and nothing is private.")
        elif isinstance(wrapper, AdaptiveClipping):
            notes.append(ADAPTIVE)
    if privacy.mechanism == "local" and privacy.epsilon >= 1:
        notes.append(
            "LocalDpMod's rule for the noise is proven for epsilon below 1; the epsilon of all "
            "updates in this report comes from the noise itself."
        )
    if privacy.mechanism == "local" and privacy.local_sensitivity < 2 * privacy.clipping_norm:
        notes.append(
            f"privacy.sensitivity = {privacy.sensitivity:g} is below the distance of two clipped "
            f"updates ({2 * privacy.clipping_norm:g}): an update has less privacy than "
            "privacy.epsilon says."
        )
    frozen = any(isinstance(part, FrozenFactors) for part in chain(inner))
    if not frozen:
        notes.append(
            "Noise on A and on B multiplies in B @ A; ffa-lora, which freezes A, avoids it."
        )
    return notes


def privacy_spent(inner: Strategy, config: RunConfig, releases: int) -> PrivacyReport:
    """The privacy that the adapters' noise has spent.

    Args:
        inner: The run's inner strategy, wherever in it the wrapper is.
        config: The run's configuration.
        releases: Updates that one client has sent at most, repeated rounds included.
    """
    privacy = config.privacy
    wrappers = [
        part for part in chain(inner) if isinstance(part, (*FixedClipping, *AdaptiveClipping))
    ]
    facts: dict[str, int | float | str] = {}
    if privacy.mechanism != "none" or wrappers:
        facts["privacy"] = privacy.mechanism if privacy.mechanism != "none" else "own wrapper"
    for wrapper in wrappers:
        facts["privacy clipping norm"] = wrapper.clipping_norm
        facts["privacy noise multiplier"] = wrapper.noise_multiplier
        if not isinstance(wrapper, FixedClipping) or wrapper.noise_multiplier == 0:
            continue
        spent = wrapper.privacy_spent()
        if spent is None:
            return PrivacyReport(facts, (INSTALL,))
        facts |= _spent(spent.epsilon, spent.delta, spent.num_releases)
        facts["privacy neighbours"] = "one client more or less, all of its data"
    if privacy.mechanism == "local":
        deviation = _local_deviation(privacy)
        facts |= {"privacy clipping norm": privacy.clipping_norm, "privacy noise": deviation}
        accountant = _rdp(privacy.delta, 1, None)
        if accountant is None:
            return PrivacyReport(facts, (INSTALL,))
        # Two clipped updates are at most twice the norm apart, whatever sensitivity was set.
        multiplier = deviation / (2 * privacy.clipping_norm)
        accountant.compose(GaussianPrivacyEvent(multiplier, 1, 1), max(releases, 1))
        facts |= _spent(accountant.get_epsilon(privacy.delta), privacy.delta, max(releases, 1))
        facts["privacy neighbours"] = "any two data sets of a client"
    return PrivacyReport(facts)


def _spent(epsilon: float, delta: float, releases: int) -> dict[str, int | float | str]:
    """As facts; JSON has no word for infinity."""
    shown: float | str = epsilon if math.isfinite(epsilon) else "infinite"
    return {
        "privacy epsilon of the adapters' noise": shown,
        "privacy delta": delta,
        "privacy releases": releases,
        "privacy accounting": "Rényi, no amplification by sampling",
    }


def _local_deviation(privacy: PrivacyConfig) -> float:
    """Standard deviation of LocalDpMod's noise on every weight."""
    scale = math.sqrt(2 * math.log(1.25 / privacy.delta))
    return privacy.local_sensitivity * scale / privacy.epsilon
