"""The contract of an aggregation method, checked on small seeded factors.

Shapes: A is [r, in], B is [out, r], with in = 6, out = 5 and r = 3, or 2 for a smaller client.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.method import Aggregator
from flower_split.errors import AggregationError
from flower_split.testing.failures import require, require_refusal

_IN, _OUT, _RANK, _SCALE = 6, 5, 3, 2.0


def check_aggregator(method: Aggregator) -> None:
    """Check that a method keeps the contract of :class:`flower_split.aggregation.Aggregator`.

    It must name itself, leave what it is given unchanged, give the same bits for the same calls
    whatever the order of the clients, send factors of the rank and scale it is asked for, refuse
    what cannot be aggregated, and continue from a saved state as if nothing had happened.

    Args:
        method: The method with the options to check.

    Raises:
        ConformanceError: It breaks its contract; the first broken clause is named.

    Example:
        >>> from flower_split.aggregation import make_aggregator
        >>> from flower_split.testing import check_aggregator
        >>> check_aggregator(make_aggregator("product-delta"))
    """
    case = _Case(method)
    require(bool(getattr(method, "name", "")), case.subject, "have a name, as a class variable")
    state = case.init()
    case.check_distribution(state)
    updates = case.updates(state)
    result = case.check_round(state, updates)
    case.check_refusals(state, updates)
    case.check_checkpoint(result.state)
    if method.mixed_ranks:
        case.check_mixed_ranks(state)


@dataclass(frozen=True, slots=True)
class _Case:
    """One method under check."""

    method: Aggregator

    @property
    def subject(self) -> str:
        return f"aggregator {type(self.method).__name__}"

    def init(self) -> State:
        """Begin with factors that ``init`` must not change."""
        factors = _factors(seed=0)
        before = _copies(factors)
        state = self.method.init(factors)
        require(_same(before, _copies(factors)), self.subject, "not change what init is given")
        return state

    def check_distribution(self, state: State) -> None:
        """Check shapes, scales, and that nothing is shared with the state."""
        sent = self.method.distribute(state)
        self._check_sent(sent, _RANK, _SCALE, "distribute by default")
        if self.method.mixed_scales:
            scaled = self.method.distribute(state, scale=1.0)
            self._check_sent(scaled, _RANK, 1.0, "distribute at a client's scale")
        again = self.method.distribute(state)
        require(
            _same(_copies(sent), _copies(again)),
            self.subject,
            "distribute the same factors each time it is asked in one state",
        )
        before = _copies(again)  # now: what is shared with the state changes in a moment
        sent.A.add_(1)
        sent.B.add_(1)
        require(
            _same(before, _copies(self.method.distribute(state))),
            self.subject,
            "distribute copies: a client that trains them must not change the state",
        )

    def _check_sent(self, sent: Factors, rank: int, scale: float, contract: str) -> None:
        shapes = (tuple(sent.A.shape), tuple(sent.B.shape))
        require(
            shapes == ((rank, _IN), (_OUT, rank)) and math.isclose(sent.scale, scale),
            self.subject,
            f"{contract}: A of {(rank, _IN)}, B of {(_OUT, rank)} and scale {scale}; they are "
            f"{shapes[0]}, {shapes[1]} and {sent.scale}",
        )

    def updates(
        self, state: State, ranks: Sequence[int | None] = (None, None, None)
    ) -> list[Update]:
        """Have clients of weights 1, 2 and 3 change what they may train."""
        trainable = self.method.trainable(state)
        made = []
        for number, rank in enumerate(ranks):
            sent = self.method.distribute(state, rank=rank)
            change = _factors(seed=number + 1, rank=sent.rank)
            returned = Factors(
                sent.A + 0.1 * change.A if "A" in trainable else sent.A.clone(),
                sent.B + 0.1 * change.B if "B" in trainable else sent.B.clone(),
                sent.scale,
            )
            made.append(Update(number, sent, returned, float(number + 1)))
        return made

    def check_round(self, state: State, updates: list[Update]) -> AggregationResult:
        """Check one round: nothing given changes, and the same calls give the same bits."""
        given = [_copies(one.received) + _copies(one.returned) for one in updates]
        kept = self.method.state_dict(state)
        result = self.method.aggregate(state, updates)
        require(
            all(
                _same(before, _copies(one.received) + _copies(one.returned))
                for before, one in zip(given, updates, strict=True)
            ),
            self.subject,
            "not change the clients' factors in aggregate",
        )
        require(
            _same_state(kept, self.method.state_dict(state)),
            self.subject,
            "not change the state in aggregate: it returns the next one",
        )
        again = self.method.state_dict(self.method.aggregate(state, updates).state)
        turned = self.method.state_dict(self.method.aggregate(state, updates[::-1]).state)
        mine = self.method.state_dict(result.state)
        require(_same_state(mine, again), self.subject, "give the same bits for the same calls")
        require(
            _same_state(mine, turned),
            self.subject,
            "give the same bits whatever the order of the clients: sum in order of client_id",
        )
        delta = self.method.delta(result.state)
        require(
            bool(torch.isfinite(delta.A).all() and torch.isfinite(delta.B).all()),
            self.subject,
            "give finite factors for finite updates",
        )
        return result

    def check_refusals(self, state: State, updates: list[Update]) -> None:
        """Check that what cannot be aggregated is refused, never turned into zeros."""
        bad = replace(
            updates[0],
            returned=Factors(
                torch.full_like(updates[0].returned.A, math.nan),
                torch.full_like(updates[0].returned.B, math.nan),
                updates[0].returned.scale,
            ),
        )
        for wrong, contract in (
            ([], "refuse a round without updates"),
            ([bad, *updates[1:]], "refuse factors that are not finite"),
            ([replace(one, weight=-1.0) for one in updates], "refuse negative weights"),
        ):
            require_refusal(
                lambda wrong=wrong: self.method.aggregate(state, wrong),  # type: ignore[misc]
                AggregationError,
                self.subject,
                f"{contract} with an AggregationError",
            )

    def check_checkpoint(self, state: State) -> None:
        """Check that a saved state goes on bit for bit."""
        saved = self.method.state_dict(state)
        loaded = self.method.load_state_dict({k: v.clone() for k, v in saved.items()})
        require(
            _same_state(saved, self.method.state_dict(loaded)),
            self.subject,
            "load what state_dict saves, bit for bit",
        )
        after = self.method.aggregate(state, self.updates(state))
        resumed = self.method.aggregate(loaded, self.updates(loaded))
        require(
            _same_state(self.method.state_dict(after.state), self.method.state_dict(resumed.state)),
            self.subject,
            "continue from a loaded state bit for bit: keep everything in State.extra",
        )

    def check_mixed_ranks(self, state: State) -> None:
        """Check clients of a smaller rank, where the method says it serves them."""
        small = self.method.distribute(state, rank=2)
        self._check_sent(small, 2, _SCALE, "distribute at a client's rank, as mixed_ranks says")
        self.method.aggregate(state, self.updates(state, (2, None, 2)))


def _factors(seed: int, rank: int = _RANK) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rank, _IN, generator=generator),
        torch.randn(_OUT, rank, generator=generator),
        _SCALE,
    )


def _copies(factors: Factors) -> list[Tensor]:
    return [factors.A.clone(), factors.B.clone()]


def _same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def _same_state(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
