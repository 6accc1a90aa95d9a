"""The conformance checks pass for every built-in, and fail for plug-ins that break one clause."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from flower_split.aggregation import METHODS, AggregationResult, Aggregator, Factors, State, Update
from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.methods.fedit import FedIT
from flower_split.aggregation.methods.product_delta import ProductDelta
from flower_split.aggregation.rules.parse import RULES, parse_rules
from flower_split.aggregation.rules.rule import Rule
from flower_split.testing import ConformanceError, check_aggregator, check_rule

RULE_TEXTS = (
    "uniform",
    "clamp-weights=2",
    "norm-clipping=0.5",
    "trimmed-mean=0.2",
    "median",
    "krum=1",
    "multi-krum=2",
)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_conforms(name: str) -> None:
    check_aggregator(METHODS[name]())


@pytest.mark.parametrize("text", RULE_TEXTS)
def test_every_rule_conforms(text: str) -> None:
    check_rule(parse_rules(text)[0])


def test_no_built_in_rule_is_left_out() -> None:
    assert {text.partition("=")[0] for text in RULE_TEXTS} == set(RULES.built_in)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangesUpdates(ProductDelta):
    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        result = ProductDelta.aggregate(self, state, updates)
        if updates:
            updates[0].returned.A.mul_(2)
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class InOrderOfArrival(ProductDelta):
    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        result = ProductDelta.aggregate(self, state, updates)
        extra = {**result.state.extra, "first": torch.tensor(float(updates[0].weight))}
        return replace(result, state=replace(result.state, extra=extra))


@dataclass(frozen=True, kw_only=True, slots=True)
class ForgetsItsState(ProductDelta):
    def state_dict(self, state: State) -> dict[str, torch.Tensor]:
        saved = ProductDelta.state_dict(self, state)
        return saved | {"factors.A": saved["factors.A"].half()}


@dataclass(frozen=True, kw_only=True, slots=True)
class ZerosForNothing(ProductDelta):
    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        if not updates:
            return AggregationResult(state)
        return ProductDelta.aggregate(self, state, updates)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharesItsState(FedIT):
    def distribute(
        self, state: State, rank: int | None = None, scale: float | None = None
    ) -> Factors:
        if rank is None and scale is None:
            return state.factors
        return FedIT.distribute(self, state, rank, scale)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (ChangesUpdates, "not change the clients' factors"),
        (InOrderOfArrival, "whatever the order of the clients"),
        (ForgetsItsState, "continue from a loaded state"),
        (ZerosForNothing, "refuse a round without updates.*it returned"),
        (SharesItsState, "distribute copies"),
    ],
)
def test_a_method_that_breaks_a_clause_is_found(broken: type[Aggregator], words: str) -> None:
    with pytest.raises(ConformanceError, match=f"aggregator {broken.__name__} must .*{words}"):
        check_aggregator(broken())


@dataclass(frozen=True, kw_only=True, slots=True)
class First(Rule):
    """Keeps one client, and does not say so."""

    name: ClassVar[str] = "first"

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        return list(clients[:1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Nobody(Rule):
    name: ClassVar[str] = "nobody"

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubles(Rule):
    name: ClassVar[str] = "doubles"

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        for client in clients:
            client.modules["layers.0.q_proj"].returned.A.mul_(2)
        return list(clients)


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedsThree(Rule):
    """Says that it needs three clients, and takes two."""

    name: ClassVar[str] = "needs-three"

    @property
    def clients_needed(self) -> int:
        return 3

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        return list(clients)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (First, "say leaves_one = True"),
        (Nobody, "return at least one client"),
        (Doubles, "not change the clients"),
        (NeedsThree, "refuse fewer clients than clients_needed.*it returned"),
    ],
)
def test_a_rule_that_breaks_a_clause_is_found(broken: type[Rule], words: str) -> None:
    with pytest.raises(ConformanceError, match=f"rule {broken.__name__} must .*{words}"):
        check_rule(broken())
