"""Account for a run's privacy: what it does not cover, and what it has spent.

No more is claimed than holds: the figure is that of the adapters' noise, composed over everything
that was sent, by Rényi differential privacy (Mironov, "Rényi Differential Privacy", CSF 2017); and
where other ways out of a client are open, that is said beside it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.serverapp.strategy import Strategy
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyAccountant,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting import PrivacyConfig as AccountantConfig
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from flower_split.config import PrivacyConfig, RunConfig
from flower_split.server.inner.flower_strategies import InnerContext
from flower_split.server.inner.frozen_factors import FrozenFactors
from flower_split.server.inner.state import AdaptiveClipping, FixedClipping, chain

INSTALL = "The epsilon is not computed: install the extra with pip install 'flower-split[dp]'."
TRUNK_TRAINS = (
    'NO EPSILON HOLDS FOR THIS RUN AS A WHOLE: in mode "joint" the trunk trains on the clients\' '
    "gradients without noise, and through it every client's update depends on all clients' data. Any "
    'epsilon below is of the adapters\' noise alone. Mode "frozen" or "forward-only" keeps the trunk '
    "as it is."
)
TRUNK_SEES = (
    "Not private: what the trunk's server sees (smashed data{gradients}) and the metrics and "
    "counts of data that clients report carry no noise. Privacy is towards those who see adapters only."
)
ADAPTIVE = (
    "No epsilon is given for adaptive clipping: Flower has no accountant for it, and scales the noise "
    "by the clipping norm of after the update. As of Flower 1.41 the norm falls while more than "
    "privacy.target-quantile of the updates are clipped, and grows while fewer are."
)


def rdp_accountant(
    delta: float, population: int, limit: float | None = None
) -> PrivacyAccountant | None:
    """Return Flower's Rényi accountant, without amplification by sampling; None: its library is absent.

    Args:
        delta: At which epsilon is given.
        population: Clients of the run.
        limit: Largest epsilon; None: any.
    """
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


@dataclass(frozen=True, slots=True)
class PrivacyReport:
    """Facts and notes of privacy for the run's report."""

    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def privacy_notes(context: InnerContext, inner: Strategy) -> list[str]:
    """Return what a reader must know of the run's privacy, before it begins."""
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
    """Return the privacy that the adapters' noise has spent.

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
        accountant = rdp_accountant(privacy.delta, 1)
        if accountant is None:
            return PrivacyReport(facts, (INSTALL,))
        # Two clipped updates are at most twice the norm apart, whatever sensitivity was set.
        multiplier = deviation / (2 * privacy.clipping_norm)
        accountant.compose(GaussianPrivacyEvent(multiplier, 1, 1), max(releases, 1))
        facts |= _spent(accountant.get_epsilon(privacy.delta), privacy.delta, max(releases, 1))
        facts["privacy neighbours"] = "any two data sets of a client"
    return PrivacyReport(facts)


def _spent(epsilon: float, delta: float, releases: int) -> dict[str, int | float | str]:
    """Return the figures as facts; JSON has no word for infinity."""
    shown: float | str = epsilon if math.isfinite(epsilon) else "infinite"
    return {
        "privacy epsilon of the adapters' noise": shown,
        "privacy delta": delta,
        "privacy releases": releases,
        "privacy accounting": "Rényi, no amplification by sampling",
    }


def _local_deviation(privacy: PrivacyConfig) -> float:
    """Return the standard deviation of LocalDpMod's noise on every weight."""
    scale = math.sqrt(2 * math.log(1.25 / privacy.delta))
    return privacy.local_sensitivity * scale / privacy.epsilon
