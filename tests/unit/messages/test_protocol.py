"""Orders and replies come out as they went in, through every strategy and mod of Flower's."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_split.errors import FederationError
from flower_split.messages.local_only import (
    LocalOnlyEvaluateOrder,
    LocalOnlyEvaluateReply,
    LocalOnlyTrainReply,
)
from flower_split.messages.orders import (
    BaseValuesOrder,
    EvaluateOrder,
    HandshakeOrder,
    PrivateOrder,
    TrainOrder,
    TrunkOrder,
    read_query,
    sent_adapter,
)
from flower_split.messages.replies import BaseValuesReply, EvaluateReply, TrainReply, take_steps
from flower_split.server.inner.flower_strategies import CLASSES
from tests.support.fakes import FakeGrid, reply

WEIGHTS = ArrayRecord({"w": Array(np.array([3.0, 4.0], dtype=np.float32))})
MOVED = ArrayRecord({"w": Array(np.array([3.5, 4.0], dtype=np.float32))})
NODES = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}

words = st.text(max_size=8)
counts = st.integers(0, 2**40)
names = st.lists(words, max_size=3).map(lambda found: tuple(sorted(found)))
records = st.floats(-9, 9, width=32).map(
    lambda value: ArrayRecord({"base": Array(np.array([value], dtype=np.float32))})
)
trunks = st.builds(
    TrunkOrder,
    address=words,
    token=words,
    root_certificates=words,
    server_round=counts,
    attempt=counts,
    experiment=words,
)
privates = st.builds(PrivateOrder, names=names, digest=words, folder=words)
train_orders = st.builds(
    TrainOrder,
    trunk=trunks.filter(lambda trunk: bool(trunk.address)),
    base_change=st.none() | records,
    private=st.none() | privates,
    data_pass=counts,
    trainable=st.none() | names,
    wants_weight_norms=st.booleans(),
    rate_factor=st.sampled_from([1.0, 1.5, 2.0]),
)
train_replies = st.builds(
    TrainReply,
    adapter=st.just(MOVED),
    train_loss=st.floats(0, 9),
    num_tokens=counts,
    num_examples=counts,
    bytes_sent=counts,
    bytes_received=counts,
    steps=st.dictionaries(words, st.lists(st.floats(0, 9), max_size=3), max_size=2),
    weight_norms=st.dictionaries(words, st.binary(max_size=4), max_size=2),
    private_digest=words,
)


def over_the_wire(content: RecordDict) -> RecordDict:
    found = recorddict_from_proto(recorddict_to_proto(content))
    assert isinstance(found, RecordDict)
    return found


def flower(name: str) -> Strategy:
    options = {"proximal_mu": 0.25} if name == "fedprox" else {}
    return CLASSES[name](weighted_by_key="num-tokens", **NODES, **options)  # type: ignore[arg-type]


WRAPPERS: dict[str, Callable[[Strategy], Strategy]] = {
    "none": lambda inner: inner,
    "server-fixed": lambda s: DifferentialPrivacyServerSideFixedClipping(s, 0.1, 1.0, 2),
    "server-adaptive": lambda s: DifferentialPrivacyServerSideAdaptiveClipping(s, 0.1, 2),
    "client-fixed": lambda s: DifferentialPrivacyClientSideFixedClipping(s, 0.1, 0.1, 2),
    "client-adaptive": lambda s: DifferentialPrivacyClientSideAdaptiveClipping(s, 0.1, 2),
}


def configured(strategy: Strategy) -> Message:
    """The message that a strategy writes to the first of two nodes."""
    grid = FakeGrid([1, 2], lambda message: None)
    message = next(iter(strategy.configure_train(1, WEIGHTS, ConfigRecord(), grid)))
    message.metadata.__dict__["_message_id"] = "m"
    return message


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=5)
@given(order=train_orders)
def test_training_order_survives_every_strategy_of_flower(
    name: str, wrapper: str, order: TrainOrder
) -> None:
    message = configured(WRAPPERS[wrapper](flower(name)))
    before = dict(message.content.config_records["config"].items())
    content = over_the_wire(order.write(message.content))
    found = TrainOrder.read(content)
    assert found.proximal_mu == (0.25 if name == "fedprox" else 0.0)
    assert found == TrainOrder(
        trunk=order.trunk,
        base_change=order.base_change,
        private=order.private,
        data_pass=order.data_pass,
        trainable=order.trainable,
        wants_weight_norms=order.wants_weight_norms,
        rate_factor=order.rate_factor,
        proximal_mu=found.proximal_mu,
    )
    (record,) = content.config_records.values()
    assert {key: record[key] for key in before} == before  # what Flower wrote is still there
    assert sent_adapter(content) == WEIGHTS


MODS: dict[str, tuple[Mod, str]] = {
    "fixed": (fixedclipping_mod, "client-fixed"),
    "adaptive": (adaptiveclipping_mod, "client-adaptive"),
    "local": (LocalDpMod(0.1, 0.0, 1.0, 0.5), "none"),
}


@pytest.mark.parametrize("mod", MODS)
@settings(max_examples=20)
@given(order=train_orders.filter(lambda o: o.base_change is None), answer=train_replies)
def test_order_and_reply_survive_every_mod_of_flower(
    mod: str, order: TrainOrder, answer: TrainReply
) -> None:
    apply, wrapper = MODS[mod]
    message = configured(WRAPPERS[wrapper](FedAvg(**NODES)))  # type: ignore[arg-type]
    message.content = order.write(message.content)
    seen: list[TrainOrder] = []

    def train(request: Message, _: Context) -> Message:
        seen.append(TrainOrder.read(request.content))
        return reply(request, over_the_wire(answer.write()))

    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    returned = apply(message, context, train)
    assert seen == [order] and not returned.has_error()
    found = TrainReply.read(returned.content)
    # Clipped to 0.1 of the update (0.5, 0), by hand: w goes from 3.5 to 3.1.
    np.testing.assert_allclose(found.adapter["w"].numpy(), [3.1, 4.0], rtol=1e-5)
    for field in ("train_loss", "num_tokens", "steps", "weight_norms", "private_digest"):
        assert getattr(found, field) == getattr(answer, field)


@given(answer=train_replies)
def test_training_reply_without_its_steps_keeps_everything_else(answer: TrainReply) -> None:
    content, steps = take_steps(answer.write())
    assert steps == answer.steps
    assert content.array_records["arrays"] == MOVED
    kept = [key for record in content.config_records.values() for key in record]
    assert not any(key.startswith("flower-split.steps.") for key in kept)
    if answer.private_digest or answer.weight_norms:
        found = TrainReply.read(content)
        assert (found.private_digest, found.weight_norms, found.steps) == (
            answer.private_digest,
            answer.weight_norms,
            {},
        )


@given(trunk=trunks.filter(lambda trunk: bool(trunk.address)), private=st.none() | privates)
def test_evaluation_order_comes_out_as_it_went_in(
    trunk: TrunkOrder, private: PrivateOrder | None
) -> None:
    order = EvaluateOrder(trunk=trunk, private=private)
    assert EvaluateOrder.read(over_the_wire(order.write(RecordDict({"arrays": WEIGHTS})))) == order


@given(loss=st.floats(0, 9), tokens=st.integers(1, 99), asked=names)
def test_other_messages_come_out_as_they_went_in(
    loss: float, tokens: int, asked: tuple[str, ...]
) -> None:
    evaluated = EvaluateReply(loss_sum=loss, num_tokens=tokens, num_examples=2)
    assert EvaluateReply.read(over_the_wire(evaluated.write())) == evaluated
    losses = LocalOnlyEvaluateReply({3: (loss, tokens), 0: (1.5, 2)})
    assert LocalOnlyEvaluateReply.read(over_the_wire(losses.write())) == losses
    adapters = LocalOnlyEvaluateOrder({0: WEIGHTS, 12: MOVED})
    assert LocalOnlyEvaluateOrder.read(over_the_wire(adapters.write())) == adapters
    alone = LocalOnlyTrainReply(WEIGHTS)
    assert LocalOnlyTrainReply.read(over_the_wire(alone.write())) == alone
    values = BaseValuesReply(WEIGHTS)
    assert BaseValuesReply.read(over_the_wire(values.write())) == values
    assert read_query(over_the_wire(BaseValuesOrder(names=asked).write())) == BaseValuesOrder(
        names=asked
    )
    assert read_query(HandshakeOrder().write()) == HandshakeOrder()


def test_order_of_another_format_names_both_versions_and_the_remedy() -> None:
    trunk = TrunkOrder(address="here:1", token="t", server_round=1)
    content = TrainOrder(trunk=trunk).write(RecordDict({"arrays": WEIGHTS}))
    record = dict(content.config_records["config"].items())
    newer = {"flower-split.format": 7, "flower-split.version": "9.9.9"}
    content["config"] = ConfigRecord({**record, **newer, "flower-split.format-of-reader": 6})
    with pytest.raises(
        FederationError,
        match=r"a training order was written in format 7 by flower_split 9\.9\.9, for readers of format 6 "
        r"and later; flower_split 0\.1\.0 reads formats 1 to 1\. Upgrade flower_split 0\.1\.0 where",
    ):
        TrainOrder.read(content)
    older = {"flower-split.format": 0, "flower-split.format-of-reader": 0}
    content["config"] = ConfigRecord({**record, **older})
    with pytest.raises(FederationError, match=r"Upgrade flower_split where it was written\."):
        TrainOrder.read(content)
    content["config"] = ConfigRecord({**record, "flower-split.format": "1"})
    with pytest.raises(FederationError, match="Run the same version"):
        TrainOrder.read(content)


def test_order_of_a_newer_version_that_an_older_one_understands_is_read() -> None:
    order = TrainOrder(trunk=TrunkOrder(address="here:1", token="t", server_round=1))
    content = order.write(RecordDict({"arrays": WEIGHTS}))
    record = dict(content.config_records["config"].items())
    newer = {
        "flower-split.format": 7,
        "flower-split.version": "9.9.9",
        "flower-split.colour": "red",
    }
    content["config"] = ConfigRecord({**record, **newer})
    assert TrainOrder.read(content) == order


def test_value_of_another_type_is_named_with_what_it_must_be() -> None:
    content = EvaluateReply(loss_sum=1.0, num_tokens=2, num_examples=1).write()
    content["metrics"] = MetricRecord({"loss-sum": 1.0, "num-tokens": 2.5, "num-examples": 1})
    with pytest.raises(FederationError, match=r"num-tokens must be an integer; it is 2\.5"):
        EvaluateReply.read(content)


def test_token_of_one_receiver_is_in_no_shared_record_and_no_text() -> None:
    shared = RecordDict({"arrays": WEIGHTS, "config": ConfigRecord({"kept": 1})})
    order = TrainOrder(trunk=TrunkOrder(address="here:1", token="secret", server_round=1))
    order.write(shared)
    assert dict(shared["config"].items()) == {"kept": 1}
    assert "secret" not in repr(order)
