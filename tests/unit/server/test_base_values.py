"""Initial values that only the clients know: who is asked, and what is not believed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message, RecordDict
from torch import Tensor

from flower_split.client.client import Client
from flower_split.client.model_cache import RunCache
from flower_split.config import parse_run_config
from flower_split.errors import FederationError, TrunkUnavailable
from flower_split.lora import adapter_state
from flower_split.lora.initial_values import digest_of
from flower_split.messages.arrays import to_arrays
from flower_split.messages.client_facts import ClientFacts
from flower_split.messages.orders import BaseValuesOrder, EvaluateOrder, TrunkOrder, read_query
from flower_split.messages.replies import BaseValuesReply
from flower_split.server.federation.base_values import gather_base_values
from flower_split.server.federation.nodes import Federation
from tests.support.fakes import FakeGrid
from tests.support.tiny_app import make_data, make_model, tiny_config

NODES = {0: 70, 1: 20, 2: 30}
VALUES = {
    "lm_head.weight": torch.arange(6.0).view(2, 3),
    "layers.0.q.lora_magnitude_vector": torch.tensor([1.0, 2.0]),
}
DIGESTS = {"lm_head.weight": digest_of(VALUES["lm_head.weight"]), [*VALUES][1]: "of-the-weight"}
SHAPES = {name: value.shape for name, value in VALUES.items()}

Answer = Callable[[int, list[str]], dict[str, Tensor] | Error]


def facts(partition_id: int, digests: dict[str, str]) -> ClientFacts:
    return ClientFacts(
        partition_id=partition_id,
        num_partitions=3,
        num_examples=1,
        num_eval_examples=1,
        planned_steps=1,
        concurrency=0,
        fingerprint={},
        base_digests=digests,
    )


def gather(
    answer: Answer, digests: dict[int, dict[str, str]] | None = None
) -> tuple[dict[str, Tensor], list[tuple[int, list[str]]]]:
    """The values, and which partition was asked for what."""
    asked: list[tuple[int, list[str]]] = []
    partition_ids = {node: partition_id for partition_id, node in NODES.items()}

    def reply(message: Message) -> RecordDict | Error:
        order = read_query(message.content)
        assert isinstance(order, BaseValuesOrder)
        partition_id, names = partition_ids[message.metadata.dst_node_id], list(order.names)
        asked.append((partition_id, names))
        found = answer(partition_id, names)
        return found if isinstance(found, Error) else BaseValuesReply(to_arrays(found)).write()

    known = {
        partition_id: facts(partition_id, (digests or {}).get(partition_id, DIGESTS))
        for partition_id in NODES
    }
    grid = FakeGrid(NODES.values(), reply)
    return gather_base_values(grid, Federation(NODES), known, SHAPES, timeout=1.0), asked


def honest(partition_id: int, names: list[str]) -> dict[str, Tensor]:
    return {name: VALUES[name] for name in names}


def test_base_values_of_a_client_whose_adapter_has_moved_are_still_the_base_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_run_config(
        tiny_config(
            make_model(tmp_path / "model"),
            make_data(tmp_path / "data", 1),
            lora__top__modules_to_save="lm_head",
            lora__bottom__use_dora=True,
        )
    )
    client = Client(RunCache(config), 0, 1)
    digests = client.base_digests()
    before = client.base_values(digests)
    assert before.keys() == digests.keys() and "lm_head.weight" in digests
    moved = {name: value + 1 for name, value in adapter_state(client.model).items()}

    def unreachable(self: Client, order: TrunkOrder) -> None:
        raise TrunkUnavailable("nobody is there")

    monkeypatch.setattr(Client, "_trunk", unreachable)
    order = EvaluateOrder(trunk=TrunkOrder(address="", token="", server_round=1))
    with pytest.raises(TrunkUnavailable, match="nobody is there"):
        client.evaluate(moved, order)
    assert torch.equal(adapter_state(client.model)["lm_head.weight"], moved["lm_head.weight"])
    assert client.base_digests() == digests
    after = client.base_values(digests)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_base_values_come_from_the_lowest_slot_alone() -> None:
    values, asked = gather(honest)
    assert asked == [(0, sorted(VALUES))]
    assert values.keys() == VALUES.keys()
    assert all(torch.equal(values[name], VALUES[name]) for name in VALUES)


def test_base_values_that_one_client_does_not_hold_come_from_another() -> None:
    only_head = {"lm_head.weight": DIGESTS["lm_head.weight"]}
    values, asked = gather(honest, {0: only_head})
    assert [partition_id for partition_id, _ in asked] == [0, 1] and values.keys() == VALUES.keys()


def test_base_values_of_a_client_that_is_lost_come_from_the_next() -> None:
    def answer(partition_id: int, names: list[str]) -> dict[str, Tensor] | Error:
        return Error(code=1, reason="gone") if partition_id == 0 else honest(partition_id, names)

    values, asked = gather(answer)
    assert [partition_id for partition_id, _ in asked] == [0, 1] and values.keys() == VALUES.keys()


def test_base_values_of_nobody_name_the_reason() -> None:
    with pytest.raises(FederationError, match=r"no client gave .*magnitude.*no memory left"):
        gather(lambda partition_id, names: Error(code=2, reason="no memory left"))


def test_base_weights_that_differ_name_both_clients_and_the_weight() -> None:
    other = {**DIGESTS, "lm_head.weight": "another"}
    with pytest.raises(FederationError, match=r"0 \(node 70\) and 2 \(node 30\).*lm_head\.weight"):
        gather(honest, {2: other})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value + 1, "is not the weight whose digest"),
        (lambda value: value * torch.nan, "NaN"),
    ],
)
def test_base_value_that_is_not_what_was_promised_is_refused(
    change: Callable[[Tensor], Tensor], words: str
) -> None:
    with pytest.raises(FederationError, match=f"partition 0 was .*{words}"):
        gather(lambda partition_id, names: {name: change(VALUES[name]) for name in names})


def test_base_value_that_is_not_in_the_reply_is_refused() -> None:
    with pytest.raises(FederationError, match="partition 0 .*lm_head.weight is missing"):
        gather(lambda partition_id, names: {[*VALUES][1]: VALUES[[*VALUES][1]]})
