"""Settings that cannot go together: one table of condition, reason and remedy.

Here is what the run config alone decides. What also depends on the chosen method's traits is in
``flower_split.aggregation.from_config``; what depends on the clients is checked once they are known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from flower_split.config.averaging import averages_factors, why_rate_as_it_is
from flower_split.config.clipping import (
    is_guarded,
    same_max_grad_norm,
    steps_with_every_local_step,
)
from flower_split.config.early_stopping import SCORES
from flower_split.config.model import GENERATING
from flower_split.config.strategy import StrategyConfig
from flower_split.config.validation import kebab
from flower_split.errors import ConfigError

if TYPE_CHECKING:  # run.py checks itself against this table
    from flower_split.config.run import RunConfig

_BUFFER_KEYS = ("buffer_size", "concurrency", "max_staleness", "staleness", "staleness_exponent")
_FLOWER_KEYS = ("name", "options", "weighting", "aggregator")  # that a strategy of Flower's knows
_ONE_CLIENT = ("trimmed-mean", "median", "krum")  # rules that leave a single client
_MEANS = ("fedavg", "fedprox")  # strategies whose aggregate is the plain mean of the replies


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """One row of the table."""

    condition: str  # as the documentation says it
    reason: str
    remedy: str
    keys: "Callable[[RunConfig], tuple[str, ...]]"  # those that do not go together; (): all is well

    def problem(self, config: "RunConfig") -> str | None:
        """Return what is wrong with ``config``, with the values; None: nothing is."""
        keys = self.keys(config)
        if not keys:
            return None
        values = " with ".join(f"{key} = {_literal(_value(config, key))}" for key in keys)
        return f"{values}: {self.reason}. {self.remedy}."


def check_combinations(config: "RunConfig") -> None:
    """Check what holds for every run, whatever strategy its app brings.

    Raises:
        ConfigError: Settings cannot go together; all problems are named, with reason and remedy.
    """
    _check(config, ALWAYS)


def check_named_strategy(config: "RunConfig") -> None:
    """Check what holds where ``strategy.*`` and ``privacy.*`` make the inner strategy.

    Raises:
        ConfigError: As for :func:`check_combinations`.
    """
    _check(config, NAMED_STRATEGY)


def combinations_table() -> str:
    """Return the whole table as Markdown."""
    rows = [
        f"| {row.condition} | {row.reason} | {row.remedy} |" for row in (*ALWAYS, *NAMED_STRATEGY)
    ]
    return "\n".join(["| settings | why not | instead |", "|---|---|---|", *rows, ""])


def _check(config: "RunConfig", table: "Sequence[Combination]") -> None:
    problems = [found for row in table if (found := row.problem(config)) is not None]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        numbered = " ".join(f"({number}) {text}" for number, text in enumerate(problems, start=1))
        raise ConfigError(f"the run config has {len(problems)} problems: {numbered}")


def _when(
    *keys: str, holds: "Callable[[RunConfig], bool]"
) -> "Callable[[RunConfig], tuple[str, ...]]":
    """Make a row's ``keys`` from a condition that always concerns the same keys."""
    return lambda config: keys if holds(config) else ()


def _fedbuff(config: "RunConfig") -> bool:
    return config.strategy.name == "fedbuff"


def _buffer_keys_without_buffer(config: "RunConfig") -> tuple[str, ...]:
    changed = () if _fedbuff(config) else _changed(config.strategy, _BUFFER_KEYS)
    return ("strategy.name", *changed) if changed else ()


def _keys_unknown_to_flower(config: "RunConfig") -> tuple[str, ...]:
    if config.strategy.aggregates_lora:
        return ()
    own = tuple(item.name for item in fields(StrategyConfig) if item.name not in _FLOWER_KEYS)
    changed = _changed(config.strategy, own)
    return ("strategy.name", *changed) if changed else ()


def _changed(strategy: StrategyConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys of the fields that differ from their defaults."""
    defaults = StrategyConfig()
    return tuple(
        f"strategy.{kebab(name)}"
        for name in names
        if getattr(strategy, name) != getattr(defaults, name)
    )


def _rule_names(config: "RunConfig") -> list[str]:
    return [item.partition("=")[0].strip() for item in config.strategy.rules.split(",")]


def _value(config: "RunConfig", key: str) -> object:
    found: object = config
    for name in key.split("."):
        found = getattr(found, name.replace("-", "_"))
    return found


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _clips_over_model(config: "RunConfig") -> bool:
    return config.train.max_grad_norm_over == "model"


def _beside_shared_gradients(config: "RunConfig", **wanted: object) -> tuple[str, ...]:
    """Return train.sync and the keys that differ from what it needs; (): it is off, or all is well.

    Args:
        config: The run's.
        wanted: Section and field, joined by two underscores, to the one value that goes with it.
    """
    keys = {".".join(kebab(part) for part in name.split("__")): v for name, v in wanted.items()}
    differing = tuple(key for key, value in keys.items() if _value(config, key) != value)
    return ("train.sync", *differing) if config.shares_gradients and differing else ()


def _misses_steps(config: "RunConfig") -> tuple[str, ...]:
    return _beside_shared_gradients(
        config, train__local_epochs=0, fraction_train=1.0, trunk__quorum=1.0, trunk__quorum_count=0
    )


def _unlike_clients(config: "RunConfig") -> tuple[str, ...]:
    return _beside_shared_gradients(config, model__cuts_by_partition="", lora__rank_by_partition="")


def _guards_of_shared_gradients(config: "RunConfig") -> tuple[str, ...]:
    return _beside_shared_gradients(
        config,
        privacy__mechanism="none",
        trunk__reduction="mean",
        trunk__max_client_grad_norm=0.0,
        strategy__rules="",
    )


def _not_the_identity(config: "RunConfig") -> tuple[str, ...]:
    return _beside_shared_gradients(
        config,
        strategy__name="lora-fedavg",
        strategy__aggregator="fedit",
        strategy__server_optimizer="none",
        strategy__server_learning_rate=1.0,
    )


def _batches(config: "RunConfig") -> bool:
    return config.trunk.window_batches == "on"


def _each_gradient_is_needed(config: "RunConfig") -> tuple[str, ...]:
    wanted = {"trunk.reduction": "mean", "trunk.max-client-grad-norm": 0.0}
    differing = tuple(key for key, value in wanted.items() if _value(config, key) != value)
    return ("trunk.window-batches", *differing) if _batches(config) and differing else ()


def _not_to_be_divided(config: "RunConfig") -> tuple[str, ...]:
    wanted = {
        "model.quantization": "",
        "lora.trunk.train": "lora",
        "lora.trunk.use-dora": False,
        "lora.trunk.bias": "none",
        "lora.trunk.modules-to-save": "",
    }
    differing = tuple(key for key, value in wanted.items() if _value(config, key) != value)
    divides = config.trunk.tensor_parallel > 1 and differing
    return ("trunk.tensor-parallel", *differing) if divides else ()


ALWAYS = (
    Combination(
        condition="`resume-previous` without `resume`",
        reason="there is no run directory to continue",
        remedy="Set resume to the run directory",
        keys=_when("resume-previous", "resume", holds=lambda c: c.resume_previous and not c.resume),
    ),
    Combination(
        condition="`early-stopping.metric` of held-out data with `fraction-evaluate = 0`",
        reason="no client evaluates between the first and the last round, so there is nothing to look at",
        remedy='Set fraction-evaluate above 0, or early-stopping.metric = "train-loss"',
        keys=_when(
            "early-stopping.metric",
            "fraction-evaluate",
            holds=lambda c: (
                c.early_stopping.metric in ("eval-loss", *SCORES) and c.fraction_evaluate == 0
            ),
        ),
    ),
    Combination(
        condition="`evaluation.text-scores` with a `model.task` that continues no prompt",
        reason="text is generated by causal-lm, seq2seq and image-text-to-text",
        remedy='Set evaluation.text-scores = ""',
        keys=_when(
            "evaluation.text-scores",
            "model.task",
            holds=lambda c: bool(c.evaluation.names) and c.model.task not in GENERATING,
        ),
    ),
    Combination(
        condition="`evaluation.personalised` with another method than `fedit` or `ffa-lora`",
        reason="only where A and B are averaged as they are is a client's own adapter a model beside the "
        "global one; methods that keep factors on the client evaluate each client's own model anyway",
        remedy="Set evaluation.personalised = false",
        keys=_when(
            "evaluation.personalised",
            "strategy.name",
            "strategy.aggregator",
            holds=lambda c: c.evaluation.personalised and not averages_factors(c),
        ),
    ),
    Combination(
        condition="`train.auxiliary-head` outside mode `forward-only`",
        reason="train.auxiliary-head trains the bottom where no gradient arrives, and here one does",
        remedy='Set mode = "forward-only", or train.auxiliary-head = false',
        keys=_when(
            "train.auxiliary-head",
            "mode",
            holds=lambda c: c.train.auxiliary_head and c.mode != "forward-only",
        ),
    ),
    Combination(
        condition="`train.auxiliary-head` with another `model.task` than `causal-lm`",
        reason="the auxiliary head predicts the next token from the bottom's output",
        remedy="Set train.auxiliary-head = false",
        keys=_when(
            "train.auxiliary-head",
            "model.task",
            holds=lambda c: c.train.auxiliary_head and c.model.task != "causal-lm",
        ),
    ),
    Combination(
        condition="`local-only-baseline` with `trunk.train = full` or `train.auxiliary-head`",
        reason="a client alone trains the run's LoRA in one process, so that it would be no baseline",
        remedy="Set local-only-baseline = false",
        keys=_when(
            "local-only-baseline",
            "trunk.train",
            "train.auxiliary-head",
            holds=lambda c: (
                c.local_only_baseline
                and (c.train.auxiliary_head or (c.mode == "joint" and c.trunk.train == "full"))
            ),
        ),
    ),
    Combination(
        condition="mode `joint` with `trunk.train = lora` and nothing that trains in `lora.trunk`",
        reason='mode "joint" trains the trunk, and nothing of it would train',
        remedy='Set lora.trunk.r, or trunk.train = "full", or mode = "frozen"',
        keys=_when(
            "mode",
            "trunk.train",
            "lora.trunk.r",
            holds=lambda c: (
                c.mode == "joint" and c.trunk.train == "lora" and not c.lora.trunk.adapts
            ),
        ),
    ),
    Combination(
        condition="`train.max-grad-norm-over = model` where the trunk does not step with every local "
        "step",
        reason="one norm over bottom, trunk and top needs all three gradients at the same step",
        remedy='Set mode = "joint" and trunk.step-every = "local-step", or '
        'train.max-grad-norm-over = "part"',
        keys=_when(
            "train.max-grad-norm-over",
            "mode",
            "trunk.step-every",
            holds=lambda c: _clips_over_model(c) and not steps_with_every_local_step(c),
        ),
    ),
    Combination(
        condition="`train.max-grad-norm-over = model` with different `max-grad-norm` of clients and "
        "trunk",
        reason="one norm over the whole model is clipped to one value",
        remedy='Set both to the same, or train.max-grad-norm-over = "part"',
        keys=_when(
            "train.max-grad-norm-over",
            "train.optimizer.max-grad-norm",
            "trunk.optimizer.max-grad-norm",
            holds=lambda c: _clips_over_model(c) and not same_max_grad_norm(c),
        ),
    ),
    Combination(
        condition="`train.max-grad-norm-over = model` with a mechanism of `privacy.*`, or with rules "
        "in `trunk.reduction`",
        reason="every client tells the norm of its gradient, which is neither noised nor robust and "
        "scales everybody's step",
        remedy='Set train.max-grad-norm-over = "part"',
        keys=_when(
            "train.max-grad-norm-over",
            "privacy.mechanism",
            "trunk.reduction",
            holds=lambda c: _clips_over_model(c) and is_guarded(c),
        ),
    ),
    Combination(
        condition="`train.sync = gradients` where the trunk does not step with every local step",
        reason="the clients share their gradients at the end of every step, when the trunk steps",
        remedy='Set mode = "joint" and trunk.step-every = "local-step", or train.sync = "rounds"',
        keys=_when(
            "train.sync",
            "mode",
            "trunk.step-every",
            holds=lambda c: c.shares_gradients and not steps_with_every_local_step(c),
        ),
    ),
    Combination(
        condition="`train.sync = gradients` with `train.local-epochs`, `fraction-train` or "
        "`trunk.quorum` below 1, or `trunk.quorum-count`",
        reason="a client that misses a step no longer has the others' adapter and optimizer state",
        remedy="Set train.local-steps, fraction-train = 1.0 and trunk.quorum = 1.0, or train.sync = "
        '"rounds"',
        keys=_misses_steps,
    ),
    Combination(
        condition="`train.sync = gradients` with `model.cuts-by-partition` or "
        "`lora.rank-by-partition`",
        reason="a mean of gradients is over the same parameters on every client",
        remedy='Leave them empty, or set train.sync = "rounds"',
        keys=_unlike_clients,
    ),
    Combination(
        condition="`train.sync = gradients` with a mechanism of `privacy.*`, `trunk.reduction`, "
        "`trunk.max-client-grad-norm` or `strategy.rules`",
        reason="the trunk sees every client's gradient as it is, and all clients step with the plain "
        "mean",
        remedy='Set train.sync = "rounds", or leave the others at their defaults',
        keys=_guards_of_shared_gradients,
    ),
    Combination(
        condition="`train.sync = gradients` with an aggregation that is not the plain mean "
        "(`lora-fedavg` with `fedit`, no server optimizer)",
        reason="all clients return the same adapter, and the aggregation must leave it as it is, or "
        "the optimizer's state would be of other weights",
        remedy='Set strategy.name = "lora-fedavg", strategy.aggregator = "fedit", '
        'strategy.server-optimizer = "none" and strategy.server-learning-rate = 1.0',
        keys=_not_the_identity,
    ),
    Combination(
        condition="`trunk.window-batches = on` where the trunk does not step with every local step",
        reason="a batch waits for all clients of a window, and there they need not run at once",
        remedy='Set mode = "joint" and trunk.step-every = "local-step", or trunk.window-batches = '
        '"off"',
        keys=_when(
            "trunk.window-batches",
            "mode",
            "trunk.step-every",
            holds=lambda c: _batches(c) and not steps_with_every_local_step(c),
        ),
    ),
    Combination(
        condition="`trunk.window-batches = on` with `trunk.reduction` or `trunk.max-client-grad-norm`",
        reason="one backward gives the clients' sum, and no gradient of one client that could be "
        "clipped or compared",
        remedy='Set trunk.window-batches = "off", or leave the others at their defaults',
        keys=_each_gradient_is_needed,
    ),
    Combination(
        condition="`trunk.tensor-parallel` above 1 with quantised weights, or with more than LoRA",
        reason="processes divide weights as they are, and LoRA beside them",
        remedy="Leave the other keys as they are by default, or set trunk.tensor-parallel = 1",
        keys=_not_to_be_divided,
    ),
    Combination(
        condition="`train.optimizer-state = keep` with a strategy other than `lora-fedavg`",
        reason="the strategy does not tell a client which of its states is of the last committed round",
        remedy='Set strategy.name = "lora-fedavg", or train.optimizer-state = "reset"',
        keys=_when(
            "train.optimizer-state",
            "strategy.name",
            holds=lambda c: c.train.optimizer_state == "keep" and c.strategy.name != "lora-fedavg",
        ),
    ),
    Combination(
        condition="`train.rate-scale = sqrt-clients` with `sgd`, `train.sync = gradients` or a strategy "
        "other than `lora-fedavg`",
        reason="the factor makes up for Adam's steps being averaged by lora-fedavg, one by each client",
        remedy='Set train.rate-scale = "auto" or "none"',
        keys=_when(
            "train.rate-scale",
            "train.optimizer.name",
            "train.sync",
            "strategy.name",
            holds=lambda c: c.train.rate_scale == "sqrt-clients" and why_rate_as_it_is(c) != "",
        ),
    ),
    Combination(
        condition="nothing that trains in `lora.bottom` and `lora.top`",
        reason="lora.bottom.r and lora.top.r are both 0, so a client would have nothing to train",
        remedy="Set one of them",
        keys=_when(
            "lora.bottom.r",
            "lora.top.r",
            holds=lambda c: not c.lora.top.adapts and not c.lora.bottom.adapts,
        ),
    ),
    Combination(
        condition="`train.auxiliary-head` with a top that trains whole weights",
        reason="the auxiliary head decodes the bottom's output with the frozen output embedding, "
        "which may not train then",
        remedy="Use LoRA on the top alone, or set train.auxiliary-head = false",
        keys=_when(
            "train.auxiliary-head",
            "lora.top.train",
            "lora.top.modules-to-save",
            holds=lambda c: (
                c.train.auxiliary_head
                and (c.lora.top.train == "full" or bool(c.lora.top.modules_to_save))
            ),
        ),
    ),
    Combination(
        condition="a mechanism of `privacy.*` with `local-only-baseline`",
        reason="the baseline's adapters go from client to client without clipping or noise",
        remedy="Set local-only-baseline = false",
        keys=_when(
            "privacy.mechanism",
            "local-only-baseline",
            holds=lambda c: c.local_only_baseline and c.privacy.mechanism != "none",
        ),
    ),
    Combination(
        condition="`strategy.buffer-size`, `concurrency`, `max-staleness` or `staleness*` without "
        "`strategy.name = fedbuff`",
        reason="the strategy has no buffer of arrivals",
        remedy='Set strategy.name = "fedbuff", or leave them at their defaults',
        keys=_buffer_keys_without_buffer,
    ),
    Combination(
        condition="`fedbuff` in mode `joint` with `trunk.step-every` other than `server-round`",
        reason="the trunk steps once for every buffer of arrivals; otherwise clients would wait for "
        "each other, or step by themselves",
        remedy='Set trunk.step-every = "server-round"',
        keys=_when(
            "strategy.name",
            "trunk.step-every",
            holds=lambda c: (
                _fedbuff(c) and c.mode == "joint" and c.trunk.step_every != "server-round"
            ),
        ),
    ),
    Combination(
        condition="`fedbuff` with `trunk.window-rule` other than `quorum`",
        reason="a buffer of arrivals is no window that somebody could leave",
        remedy='Set trunk.window-rule = "quorum"',
        keys=_when(
            "strategy.name",
            "trunk.window-rule",
            holds=lambda c: _fedbuff(c) and c.trunk.window_rule != "quorum",
        ),
    ),
    Combination(
        condition="`fedbuff` with an aggregator other than `product-delta`",
        reason="a late client counts by what it changed against the version that it was sent; other "
        "methods combine what clients return, and would pull the global adapter back to old versions",
        remedy='Set strategy.aggregator = "product-delta"',
        keys=_when(
            "strategy.name",
            "strategy.aggregator",
            holds=lambda c: _fedbuff(c) and c.strategy.aggregator != "product-delta",
        ),
    ),
    Combination(
        condition="`fedbuff` with `fraction-train` below 1",
        reason="its clients are not sampled by round",
        remedy="Set strategy.concurrency, and leave fraction-train at 1.0",
        keys=_when(
            "strategy.name",
            "fraction-train",
            holds=lambda c: _fedbuff(c) and c.fraction_train != 1.0,
        ),
    ),
    Combination(
        condition="`fedbuff` with a mechanism of `privacy.*`",
        reason="the clipping, the noise and their accounting are those of rounds in which every "
        "client takes part once",
        remedy='Set strategy.name = "fedavg"',
        keys=_when(
            "strategy.name",
            "privacy.mechanism",
            holds=lambda c: _fedbuff(c) and c.privacy.mechanism != "none",
        ),
    ),
    Combination(
        condition="`fedbuff` with the rules `trimmed-mean`, `median` or `krum`",
        reason="the rule makes one client of all, and clients of several versions must each keep "
        "their staleness",
        remedy="Use norm-clipping or multi-krum",
        keys=_when(
            "strategy.name",
            "strategy.rules",
            holds=lambda c: _fedbuff(c) and any(n in _ONE_CLIENT for n in _rule_names(c)),
        ),
    ),
)
"""Rows that hold for every run; checked when a RunConfig is made."""

NAMED_STRATEGY = (
    Combination(
        condition="a strategy of Flower's with a key of this package's own aggregation, such as "
        "`strategy.rules` or `strategy.max-rank`",
        reason="the key is of this package's own aggregation, which a strategy of Flower's does not "
        "know",
        remedy='Leave the keys at their defaults, or set strategy.name = "lora-fedavg"',
        keys=_keys_unknown_to_flower,
    ),
    Combination(
        condition="a strategy of Flower's with an aggregator other than `fedit` and `ffa-lora`",
        reason="the strategy averages the weights of A and B itself, so the aggregator would not be "
        "used",
        remedy='Set strategy.aggregator = "fedit" (A and B) or "ffa-lora" (A frozen), or '
        'strategy.name = "lora-fedavg"',
        keys=_when(
            "strategy.name",
            "strategy.aggregator",
            holds=lambda c: (
                not c.strategy.aggregates_lora
                and c.strategy.aggregator not in ("product-delta", "fedit", "ffa-lora")
            ),
        ),
    ),
    Combination(
        condition="`server-*` or `client-*` privacy with `strategy.name = lora-fedavg`",
        reason="the noise is added to the aggregate that clients receive, but lora-fedavg goes on "
        "from its own ΔW, without that noise",
        remedy='Set strategy.name = "fedavg" with strategy.aggregator = "ffa-lora" (best: noise on B '
        'alone) or "fedit", or privacy.mechanism = "local"',
        keys=_when(
            "privacy.mechanism",
            "strategy.name",
            holds=lambda c: c.privacy.central and c.strategy.name == "lora-fedavg",
        ),
    ),
    Combination(
        condition="`server-*` or `client-*` privacy with a strategy other than `fedavg` and "
        "`fedprox`",
        reason="the noise is scaled to what one client can move a plain mean; this strategy moves by "
        "more, or adds its step before the noise",
        remedy='Set strategy.name = "fedavg" or "fedprox", or privacy.mechanism = "local"',
        keys=_when(
            "privacy.mechanism",
            "strategy.name",
            holds=lambda c: (
                c.privacy.central and c.strategy.name not in (*_MEANS, "lora-fedavg", "fedbuff")
            ),
        ),
    ),
    Combination(
        condition="`server-*` or `client-*` privacy with `strategy.weighting` other than `uniform`",
        reason="it needs clients of equal weight: one of much data would move the mean by more than "
        "the noise hides",
        remedy='Set strategy.weighting = "uniform"',
        keys=_when(
            "privacy.mechanism",
            "strategy.weighting",
            holds=lambda c: c.privacy.central and c.strategy.weighting != "uniform",
        ),
    ),
    Combination(
        condition="`server-*` or `client-*` privacy with noise and `resume-previous`",
        reason="a round that clients have seen would be trained again, and its privacy spent twice "
        "without being counted",
        remedy="Resume from the latest round, or begin anew",
        keys=_when(
            "privacy.mechanism",
            "resume-previous",
            holds=lambda c: (
                c.privacy.central and c.resume_previous and c.privacy.noise_multiplier > 0
            ),
        ),
    ),
)
"""Rows that hold where the run config names the inner strategy; an app's own one is exempt."""
