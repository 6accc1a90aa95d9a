"""Differential privacy of the clients' adapters: Flower's wrappers, their mods, and what they hold.

Central, ``server-`` or ``client-``: every update is clipped to an L2 norm C, and the server adds
Gaussian noise of z · C / n to the mean of n updates (McMahan et al., "Learning Differentially Private
Recurrent Language Models", ICLR 2018; adaptive C: Andrew et al., "Differentially Private Learning
with Adaptive Clipping", NeurIPS 2021). That bound on what one client moves is one of the *plain
mean*: every other rule of aggregation is refused. Local: each client clips and adds the noise itself
(``LocalDpMod``), so that any rule may follow.

It does not cover, and the report says so: the trunk's server sees smashed data and gradients
without noise; metrics have none; and where the trunk trains (mode ``joint``), each client's update
depends on all clients' data through the trunk, so that no epsilon holds for the run.
"""

from collections.abc import Mapping

from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)
from flwr.supercore.privacy_accounting import GaussianPrivacyEvent, PrivacyAccountant

from flower_split.config import RunConfig
from flower_split.config.combinations import check_named_strategy
from flower_split.errors import ConfigError
from flower_split.server.inner.flower_strategies import (
    InnerContext,
    InnerFactory,
    frozen_names,
    make_inner,
)
from flower_split.server.inner.frozen_factors import FrozenFactors
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.inner.state import AdaptiveClipping, FixedClipping, chain
from flower_split.server.privacy.accounting import INSTALL, rdp_accountant

_WRAPPERS: Mapping[str, type[Strategy]] = {
    "server-fixed": DifferentialPrivacyServerSideFixedClipping,
    "server-adaptive": DifferentialPrivacyServerSideAdaptiveClipping,
    "client-fixed": DifferentialPrivacyClientSideFixedClipping,
    "client-adaptive": DifferentialPrivacyClientSideAdaptiveClipping,
}


def check_privacy(config: RunConfig) -> None:
    """Check that the strategy and the privacy that a run config names go together.

    Raises:
        ConfigError: They do not; all problems are named.
    """
    check_named_strategy(config)


def with_privacy(context: InnerContext) -> Strategy:
    """Make the inner strategy of a run's configuration, inside the wrapper of its mechanism.

    Raises:
        ConfigError: Something in the configuration cannot be combined.
    """
    check_privacy(context.config)
    inner, privacy = make_inner(context), context.config.privacy
    if privacy.mechanism == "local" and isinstance(inner, LoraFedAvg):
        _check_local(inner, context)
    if privacy.central:
        inner = _wrapped(inner, context)
    frozen = frozen_names(context)
    return FrozenFactors(inner, context.initial, frozen) if frozen else inner


def own_inner(context: InnerContext, factory: InnerFactory) -> Strategy:
    """Make a user's own inner strategy, checked against ``privacy.*``, which does not wrap it.

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
    if context.config.trunk.quorum_of(count) < 1:
        raise ConfigError(
            f'privacy.mechanism = "{privacy.mechanism}" scales its noise to all {count} clients of a '
            "round, and a quorum below 1 lets rounds go on with fewer. Set trunk.quorum = 1 and "
            "trunk.quorum-count = 0."
        )
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
    """Return Flower's accountant of this run; None where its library is not installed.

    Raises:
        ConfigError: The run would spend more than ``privacy.max-epsilon``.
    """
    privacy, limit = context.config.privacy, context.config.privacy.max_epsilon
    accountant = rdp_accountant(privacy.delta, context.num_clients, limit or None)
    if accountant is None:
        if limit:
            raise ConfigError(f"privacy.max-epsilon cannot be kept. {INSTALL}")
        return None
    rounds = context.config.num_server_rounds
    event = GaussianPrivacyEvent(privacy.noise_multiplier, context.num_sampled, context.num_clients)
    if limit and accountant.would_exceed(event, count=rounds):
        fitting = (n for n in range(1, rounds) if not accountant.would_exceed(event, count=n))
        possible = max(fitting, default=0)
        raise ConfigError(
            f"{rounds} rounds would spend more than privacy.max-epsilon = {limit:g} at delta = "
            f"{privacy.delta:g}; {possible} would not. Lower num-server-rounds, raise "
            "privacy.noise-multiplier, or raise the limit."
        )
    return accountant


def check_wrapped(inner: Strategy) -> None:
    """Check that no central wrapper is around this package's aggregation, which would drop the noise.

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
