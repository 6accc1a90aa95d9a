"""Save and load what Flower's strategies carry from round to round, so that runs can be resumed.

Flower's classes have no ``state_dict``; this module names, for each of them, the attributes that the
next round depends on. A strategy of the user's own takes part by being
:class:`~flower_split.runs.manifest.Resumable`. Nothing else is guessed: the state of a class that is
neither is unknown, and a run with it cannot be resumed.
"""

import json
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)
from torch import Tensor

from flower_split.errors import RunDirectoryError
from flower_split.runs.manifest import Resumable
from flower_split.server.inner.frozen_factors import FrozenFactors

_STATELESS = (FedAvg, FedProx, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan, QFedAvg)
_MOMENTS = (FedAdam, FedYogi, FedAdagrad)  # m_t and v_t by name
FixedClipping = (
    DifferentialPrivacyServerSideFixedClipping,
    DifferentialPrivacyClientSideFixedClipping,
)
AdaptiveClipping = (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
)
_INNER, _CURRENT, _MOMENTUM = "inner/", "current/", "momentum/"
_FIRST, _SECOND = "m/", "v/"
_NORM, _ACCOUNTANT = "clipping-norm", "accountant"


def chain(strategy: Strategy) -> Iterator[Strategy]:
    """Yield ``strategy`` and everything that it wraps, from the outside in."""
    current: object = strategy
    while isinstance(current, Strategy):
        yield current
        current = getattr(current, "strategy", None)


def state_is_known(strategy: Strategy) -> bool:
    """Return whether :func:`state_of` holds everything that the next round depends on."""
    if isinstance(strategy, Resumable):
        return True
    if type(strategy) in (*_STATELESS, *_MOMENTS, FedAvgM):
        return True
    wraps = getattr(strategy, "strategy", None)
    known = type(strategy) in (*FixedClipping, *AdaptiveClipping, FrozenFactors)
    return known and isinstance(wraps, Strategy) and state_is_known(wraps)


def state_of(strategy: Strategy) -> dict[str, Tensor]:
    """Return what the next round depends on; of an unknown class, what its known ancestors carry."""
    if isinstance(strategy, Resumable):
        return strategy.state_dict()
    state: dict[str, Tensor] = {}
    if isinstance(strategy, FedAvgM) and strategy.current_arrays is not None:
        current = strategy.current_arrays
        state |= {_CURRENT + name: _tensor(current[name].numpy()) for name in current}
        momentum = strategy.momentum_vector or []
        names = current if momentum else []
        state |= {_MOMENTUM + n: _tensor(v) for n, v in zip(names, momentum, strict=True)}
    if isinstance(strategy, _MOMENTS):
        state |= {_FIRST + name: _tensor(value) for name, value in (strategy.m_t or {}).items()}
        state |= {_SECOND + name: _tensor(value) for name, value in (strategy.v_t or {}).items()}
    if isinstance(strategy, AdaptiveClipping):
        state[_NORM] = torch.tensor(strategy.clipping_norm, dtype=torch.float64)
    if isinstance(strategy, FixedClipping) and strategy.accountant is not None:
        text = json.dumps(strategy.accountant.state_dict(), sort_keys=True)
        state[_ACCOUNTANT] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    wrapped = getattr(strategy, "strategy", None)
    if isinstance(wrapped, Strategy):
        state |= {_INNER + name: value for name, value in state_of(wrapped).items()}
    return state


def load_state(strategy: Strategy, state: Mapping[str, Tensor]) -> None:
    """Restore a state of :func:`state_of`, bit for bit.

    Raises:
        RunDirectoryError: The state is that of another strategy.
    """
    if isinstance(strategy, Resumable):
        strategy.load_state_dict(state)
        return
    left = dict(state)
    if isinstance(strategy, FedAvgM):
        current = _take(left, _CURRENT)
        momentum = _take(left, _MOMENTUM)
        arrays = ArrayRecord({name: Array(value) for name, value in current.items()})
        strategy.current_arrays = arrays if current else None
        strategy.momentum_vector = [momentum[name] for name in current] if momentum else None
    if isinstance(strategy, _MOMENTS):
        strategy.m_t = _take(left, _FIRST) or None
        strategy.v_t = _take(left, _SECOND) or None
    if isinstance(strategy, AdaptiveClipping) and _NORM in left:
        strategy.clipping_norm = float(left.pop(_NORM))
    if isinstance(strategy, FixedClipping) and strategy.accountant is not None:
        if _ACCOUNTANT not in left:
            raise RunDirectoryError(
                "the run was begun without an account of its privacy (the extra dp was not "
                "installed), so what it has spent is unknown. Go on without the extra, or begin anew."
            )
        text = bytes(left.pop(_ACCOUNTANT).tolist()).decode()
        strategy.accountant.load_state_dict(json.loads(text))
    wrapped = getattr(strategy, "strategy", None)
    if isinstance(wrapped, Strategy):
        inside = {n: left.pop(n) for n in list(left) if n.startswith(_INNER)}
        load_state(wrapped, {name.removeprefix(_INNER): value for name, value in inside.items()})
    if left:
        raise RunDirectoryError(
            f"the checkpoint holds {', '.join(sorted(left)[:3])}, which {type(strategy).__name__} "
            "does not know. Resume the run with its own strategy, and with the extras it began with."
        )


def check_resumable(strategy: Strategy) -> None:
    """Refuse to resume a run whose strategy has a state that nobody knows.

    Raises:
        RunDirectoryError: It is of a class that is neither Flower's nor Resumable.
    """
    if not state_is_known(strategy):
        names = " around ".join(type(part).__name__ for part in chain(strategy))
        raise RunDirectoryError(
            f"the run cannot be resumed: what {names} carries from round to round is not known, so "
            "nothing of it was kept. Give it state_dict and load_state_dict "
            "(flower_split.runs.manifest.Resumable), and begin a new run."
        )


def begin_again(strategy: Strategy, server_round: int) -> None:
    """Discard pending privacy events of a lost round."""
    for part in chain(strategy):
        if isinstance(part, FixedClipping):
            part._pending_events.pop(server_round, None)


def _take(state: dict[str, Tensor], prefix: str) -> dict[str, np.ndarray]:
    """Pop the arrays under ``prefix`` from ``state``, in the order of their names."""
    names = sorted(name for name in state if name.startswith(prefix))
    return {name.removeprefix(prefix): state.pop(name).numpy().copy() for name in names}


def _tensor(value: np.ndarray) -> Tensor:
    return torch.tensor(np.array(value))
