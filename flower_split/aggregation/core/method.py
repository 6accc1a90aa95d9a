"""The interface of an aggregation method, its options, and what methods share.

An aggregator is a value: its fields are its options, and everything that changes from round to
round is in the :class:`State` it is handed. One state describes one module; the same aggregator
serves all modules of a model (``flower_split.aggregation.adapter_aggregator``).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.aggregation.core.checks import check_factors
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.lowrank import row_length
from flower_split.errors import AggregationError


@dataclass(frozen=True, kw_only=True, slots=True)
class Aggregator(ABC):
    """Aggregate one module's LoRA over rounds; the base of all methods.

    Nothing passed in is ever modified, and the same calls give the same results, bit for bit.

    Args:
        max_rank: The largest rank the server keeps; None: whatever the method needs.
        learning_rate: η of the server, on ΔW; 1 is the plain method.
        seed: For rows of A that the server must invent.

    Each method also says whether it takes a server learning rate, changes the clients' base
    weights, serves mixed ranks and mixed scales, recompresses ΔW (so that ``max_rank`` means
    something), counts the clients' weights, has clients train a core between frozen factors, and
    which factors stay private to each client. ``paper`` (an arXiv number), ``exactness`` and
    ``deviation`` (what it does otherwise than the paper; empty: nothing) are printed with it.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    exactness: ClassVar[str] = ""
    deviation: ClassVar[str] = ""
    takes_learning_rate: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False
    mixed_scales: ClassVar[bool] = True
    recompresses: ClassVar[bool] = False
    counts_weights: ClassVar[bool] = True
    trains_core: ClassVar[bool] = False
    private: ClassVar[frozenset[str]] = frozenset()

    max_rank: int | None = None
    learning_rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            AggregationError: An option is out of range, or means nothing for this method.
        """
        for label, value in (("max_rank", self.max_rank), ("seed", self.seed)):
            optional = label == "max_rank" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int)):
                raise AggregationError(f"{label} must be an integer; it is {value!r}.")
        if not -(2**63) <= self.seed < 2**63:
            raise AggregationError(f"seed must be an integer of 64 bits; it is {self.seed!r}.")
        if self.max_rank is not None and self.max_rank < 1:
            raise AggregationError(f"max_rank must be at least 1 or None; it is {self.max_rank!r}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise AggregationError(
                f"learning_rate must be finite and above 0; it is {self.learning_rate!r}."
            )
        if self.learning_rate != 1 and not self.takes_learning_rate:
            raise AggregationError(
                f"{self.name} takes no server learning rate (it is {self.learning_rate!r}): its "
                "merged ΔW is not linear in what is averaged, so a step on the factors is no step "
                'on ΔW. Use "product-delta", or leave learning_rate at 1.'
            )

    def init(self, factors: Factors) -> State:
        """Return the state before the first round.

        Args:
            factors: The initial global factors of one module.

        Raises:
            AggregationError: They do not describe a ΔW, or exceed ``max_rank``.
        """
        check_factors(factors, f"{self.name}: init got factors")
        if self.max_rank is not None and factors.rank > self.max_rank:
            raise AggregationError(
                f"{self.name} keeps the rank it is given, {factors.rank}, which is above max_rank "
                f"{self.max_rank}; raise max_rank or lower the adapter's rank."
            )
        copy = Factors(factors.A.clone(), factors.B.clone(), float(factors.scale))
        return State(factors=copy, basis=copy.A, scale=copy.scale)

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round.

        Args:
            state: The state ``distribute`` was called with for these clients.
            updates: One per client, in any order.

        Raises:
            AggregationError: There is no update, or one cannot be aggregated; the client is named.
        """

    def distribute(
        self, state: State, rank: int | None = None, scale: float | None = None
    ) -> Factors:
        """Return what a client of this rank and scale receives.

        Methods with mixed ranks send the leading components, the others their one pair of factors.

        Args:
            state: The current state.
            rank: The client's rank; None: that of ``init``.
            scale: The client's alpha / r (or alpha / sqrt(r)); None: that of ``init``.

        Raises:
            AggregationError: The method cannot serve this rank.
        """
        return distribute_factors(self, state, rank, scale)

    def delta(self, state: State) -> Factors:
        """Return the global ΔW as factors, before any truncation to a client's rank."""
        return state.factors

    def trainable(self, state: State) -> frozenset[str]:
        """Return which of "A" and "B" a client trains in the coming round; it freezes the other."""
        return frozenset({"A", "B"})

    def core_columns(self, state: State) -> Tensor | None:
        """Return the frozen P of a round in which clients train only R of B = P R; else None.

        Returns:
            P [out, r] in fp32, with orthonormal or zero columns. A client's optimizer steps on R
            [r, r], which begins as Pᵀ B.
        """
        return None

    def state_dict(self, state: State) -> dict[str, Tensor]:
        """Return the state as named tensors that share no memory, for a checkpoint."""
        tensors = {
            "factors.A": state.factors.A,
            "factors.B": state.factors.B,
            "factors.scale": torch.tensor(state.factors.scale, dtype=torch.float64),
            "basis": state.basis,
            "scale": torch.tensor(state.scale, dtype=torch.float64),
            "server_round": torch.tensor(state.server_round, dtype=torch.int64),
        }
        tensors |= {f"extra.{name}": tensor for name, tensor in state.extra.items()}
        return {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> State:
        """Return the state that :meth:`state_dict` wrote, bit for bit.

        Raises:
            AggregationError: A tensor is missing.
        """
        try:
            return State(
                factors=Factors(
                    tensors["factors.A"], tensors["factors.B"], float(tensors["factors.scale"])
                ),
                basis=tensors["basis"],
                scale=float(tensors["scale"]),
                server_round=int(tensors["server_round"]),
                extra={
                    key.removeprefix("extra."): tensor
                    for key, tensor in tensors.items()
                    if key.startswith("extra.")
                },
            )
        except KeyError as missing:
            raise AggregationError(
                f"the checkpoint of a {self.name} state lacks {missing}; it was written by another "
                "version or is damaged."
            ) from None


def at_scale(factors: Factors, scale: float) -> Factors:
    """Write the same ΔW at another scale: B takes the difference."""
    if scale == factors.scale:
        return factors
    return Factors(factors.A, (factors.B.double() * (factors.scale / scale)).float(), scale)


def checked_rank_scale(state: State, rank: int | None, scale: float | None) -> tuple[int, float]:
    """Fill in and check the arguments of ``distribute``.

    Raises:
        AggregationError: A rank below 1 or a scale that is not above 0.
    """
    rank = int(state.basis.shape[0]) if rank is None else rank
    scale = state.scale if scale is None else float(scale)
    if rank < 1:
        raise AggregationError(f"a client's rank must be at least 1; it is {rank!r}.")
    if not (math.isfinite(scale) and scale > 0):
        raise AggregationError(f"a client's scale must be finite and above 0; it is {scale!r}.")
    return rank, scale


def padded(factors: Factors, rank: int) -> Factors:
    """Fill factors of the same ΔW up to ``rank`` with rows and columns of 0.

    Needed where an orthonormal A of [r, in] cannot have r rows because r is above ``in``.
    """
    missing = rank - factors.rank
    if missing <= 0:
        return factors
    a = factors.A.new_zeros(missing, factors.in_features)
    b = factors.B.new_zeros(factors.out_features, missing)
    return Factors(torch.cat([factors.A, a]), torch.cat([factors.B, b], dim=1), factors.scale)


def distribute_factors(
    method: Aggregator, state: State, rank: int | None, scale: float | None
) -> Factors:
    """Return the state's factors for one client; see :meth:`Aggregator.distribute`.

    Raises:
        AggregationError: The method has one rank for everybody, and another was asked for.
    """
    rank, scale = checked_rank_scale(state, rank, scale)
    if method.mixed_ranks:
        return leading(state, rank, scale, method.seed)
    if rank != state.factors.rank:
        raise AggregationError(
            f"{method.name} has one rank for all clients, {state.factors.rank}; a client of rank "
            f'{rank} cannot take part. Use "product-delta" for mixed ranks.'
        )
    factors = at_scale(state.factors, scale)
    return Factors(factors.A.clone(), factors.B.clone(), scale)


def fresh_rows(state: State, first: int, last: int, seed: int) -> Tensor:
    """Return rows [first, last) of A for ranks that ΔW does not use; B is 0 there.

    They are the initial A's rows as far as those go, then seeded ones of the same length, so that
    a client of more rank than ΔW has can train all of it.
    """
    known = state.basis[first:last]
    missing = last - max(first, int(state.basis.shape[0]))
    if missing <= 0:
        return known
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(last - int(state.basis.shape[0]), state.in_features, generator=generator)
    rows = rows * (row_length(state.basis) / state.in_features**0.5)
    return torch.cat([known, rows[-missing:].to(known.device)])


def leading(state: State, rank: int, scale: float, seed: int) -> Factors:
    """Return the leading ``rank`` components of ordered global factors at a client's scale."""
    top = Factors(state.factors.A[:rank], state.factors.B[:, :rank], state.factors.scale)
    missing = rank - top.rank
    top = at_scale(top, scale)
    if missing <= 0:
        return Factors(top.A.clone(), top.B.clone(), scale)
    rows = fresh_rows(state, top.rank, rank, seed)
    zeros = top.B.new_zeros(top.B.shape[0], missing)
    return Factors(torch.cat([top.A, rows]), torch.cat([top.B, zeros], dim=1), scale)
