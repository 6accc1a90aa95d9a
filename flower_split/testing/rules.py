"""The contract of a robust rule, checked on seven seeded clients with two modules each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.core.factors import Factors, Update
from flower_split.aggregation.rules.rule import Rule
from flower_split.errors import AggregationError
from flower_split.testing.failures import require, require_refusal

_CLIENTS, _IN, _OUT, _RANK = 7, 6, 5, 2


def check_rule(rule: Rule) -> None:
    """Check that a rule keeps the contract of :class:`flower_split.aggregation.rules.rule.Rule`.

    It must name itself, leave the clients it is given unchanged, give the same bits for the same
    clients, return at least one client with the same modules, and do what its traits say.

    Args:
        rule: The rule with the value to check; a round has seven clients.

    Raises:
        ConformanceError: It breaks its contract; the first broken clause is named.

    Example:
        >>> from flower_split.aggregation.rules.parse import parse_rules
        >>> from flower_split.testing import check_rule
        >>> check_rule(parse_rules("trimmed-mean=0.2")[0])
    """
    subject = f"rule {type(rule).__name__}"
    require(bool(getattr(rule, "name", "")), subject, "have a name, as a class variable")
    clients = _clients(_CLIENTS)
    before = [_tensors(client) for client in clients]
    result = rule(clients)
    require(
        all(_same(kept, _tensors(one)) for kept, one in zip(before, clients, strict=True)),
        subject,
        "not change the clients that it is given",
    )
    again = rule(_clients(_CLIENTS))
    require(
        len(again) == len(result)
        and all(_same(_tensors(a), _tensors(b)) for a, b in zip(result, again, strict=True)),
        subject,
        "give the same bits for the same clients",
    )
    require(len(result) > 0, subject, "return at least one client")
    require(
        all(client.modules.keys() == clients[0].modules.keys() for client in result),
        subject,
        "return clients with the modules that it was given",
    )
    require(all(client.weight >= 0 for client in result), subject, "return weights of at least 0")
    _check_traits(rule, subject, clients, result)


def _check_traits(
    rule: Rule, subject: str, clients: Sequence[ClientUpdate], result: Sequence[ClientUpdate]
) -> None:
    """Check that the traits, by which combinations are refused, are true."""
    require(
        (len(result) == 1) == rule.leaves_one,
        subject,
        f"say leaves_one = {len(result) == 1}: of {len(clients)} clients it returns {len(result)}",
    )
    if rule.changes_weights:
        require(
            len(result) == len(clients)
            and all(_same(_tensors(a), _tensors(b)) for a, b in zip(clients, result, strict=True)),
            subject,
            "leave the factors as they are, as changes_weights says",
        )
    if rule.clients_needed > 1:
        require_refusal(
            lambda: rule(_clients(rule.clients_needed - 1)),
            AggregationError,
            subject,
            "refuse fewer clients than clients_needed with an AggregationError",
        )
    rule(_clients(rule.clients_needed))


def _clients(number: int) -> list[ClientUpdate]:
    made = []
    for client_id in range(number):
        generator = torch.Generator().manual_seed(client_id)
        weight, modules = float(client_id + 1), {}
        for module in ("layers.0.q_proj", "layers.1.q_proj"):
            sent = Factors(torch.ones(_RANK, _IN), torch.ones(_OUT, _RANK), 2.0)
            returned = Factors(
                sent.A + torch.randn(_RANK, _IN, generator=generator),
                sent.B + torch.randn(_OUT, _RANK, generator=generator),
                2.0,
            )
            modules[module] = Update(client_id, sent, returned, weight)
        made.append(ClientUpdate(client_id, weight, modules))
    return made


def _tensors(client: ClientUpdate) -> list[Tensor]:
    return [
        tensor.clone()
        for update in client.modules.values()
        for factors in (update.received, update.returned)
        for tensor in (factors.A, factors.B)
    ]


def _same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
