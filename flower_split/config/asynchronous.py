"""What a buffered asynchronous run needs of the other sections, and cannot be combined with."""

from dataclasses import fields

from flower_split.config.privacy import PrivacyConfig
from flower_split.config.strategy import StrategyConfig
from flower_split.config.trunk import TrunkConfig
from flower_split.config.validation import kebab
from flower_split.errors import ConfigError

FEDBUFF = "fedbuff"
_OWN = ("buffer_size", "concurrency", "max_staleness", "staleness", "staleness_exponent")
_COLLAPSING = (
    "trimmed-mean",
    "median",
    "krum",
)  # they leave one client, of no version in particular


def check_asynchronous(
    strategy: StrategyConfig,
    trunk: TrunkConfig,
    privacy: PrivacyConfig,
    *,
    mode: str,
    fraction_train: float,
) -> None:
    """Refuse what does not go together, with the reason.

    Raises:
        ConfigError: A key is of the other kind of run, or a combination has no meaning.
    """
    if strategy.name != FEDBUFF:
        defaults = {item.name: item.default for item in fields(strategy)}
        for name in _OWN:
            if getattr(strategy, name) != defaults[name]:
                raise ConfigError(
                    f"strategy.{kebab(name)} is {getattr(strategy, name)!r}, but strategy.name = "
                    f'"{strategy.name}" has no buffer of arrivals. Set strategy.name = "fedbuff", '
                    f"or leave it at {defaults[name]!r}."
                )
        return
    if mode == "joint" and trunk.step_every != "server-round":
        raise ConfigError(
            f'strategy.name = "fedbuff" needs trunk.step-every = "server-round": the trunk steps once '
            f'for every buffer of arrivals. It is "{trunk.step_every}", which would have clients wait '
            "for each other or step by themselves."
        )
    if strategy.aggregator != "product-delta":
        raise ConfigError(
            'strategy.name = "fedbuff" needs strategy.aggregator = "product-delta": a late client '
            "counts by what it changed against the version that it was sent. "
            f'"{strategy.aggregator}" combines what clients return, and would pull the global adapter '
            "back to old versions."
        )
    if fraction_train != 1.0:
        raise ConfigError(
            f'fraction-train is {fraction_train}, but with strategy.name = "fedbuff" clients are not '
            "sampled by round. Set strategy.concurrency, and leave fraction-train at 1.0."
        )
    if privacy.mechanism != "none":
        raise ConfigError(
            f'privacy.mechanism = "{privacy.mechanism}" cannot be combined with strategy.name = '
            '"fedbuff": the clipping, the noise and their accounting are those of rounds in which '
            'every client takes part once. Use strategy.name = "fedavg".'
        )
    for rule in _COLLAPSING:
        names = [item.partition("=")[0].strip() for item in strategy.rules.split(",")]
        if rule in names:
            raise ConfigError(
                f"strategy.rules has {rule}, which makes one client of all; with strategy.name = "
                '"fedbuff" clients of several versions each keep their staleness. Use norm-clipping '
                "or multi-krum."
            )
