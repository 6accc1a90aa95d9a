"""What LoraFedAvg sends and remembers for methods that change the base or keep factors private."""

from collections.abc import Callable, Mapping

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from flower_split.aggregation.adapter_aggregator import AdapterSpec
from flower_split.config import StrategyConfig
from flower_split.errors import AggregationError
from flower_split.messages.arrays import from_arrays, to_arrays
from flower_split.server.federation.exchange import exchange
from flower_split.server.federation.nodes import Federation
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.node_view import NodeView
from tests.support.fakes import FakeGrid, train_content

# As they travel; spelled out, so that a change of the format shows.
BASE_CHANGE = "flower-split.base-change"
PRIVATE = "flower-split.private-names"
PRIVATE_DIGEST = "flower-split.private-digest"
PRIVATE_FOLDER = "flower-split.private-folder"

FEDERATION = Federation({0: 9, 1: 4})
MODULES = ("m", "n")
INITIAL = {
    f"{module}.lora_{part}.weight": value
    for module in MODULES
    for part, value in (("A", torch.tensor([[1.0, 2.0]])), ("B", torch.zeros(3, 1)))
}
DIGESTS = {0: "ab" * 32, 1: "cd" * 32}
Answer = Callable[[int], RecordDict]


def strategy_of(
    aggregator: str, specs: Mapping[int, AdapterSpec] | None = None, **changes: str
) -> LoraFedAvg:
    config = StrategyConfig(aggregator=aggregator, **changes)
    scales = dict.fromkeys(MODULES, 2.0)
    return LoraFedAvg(config, scales, INITIAL, FEDERATION.partition_of, specs or {})


def messages_of(strategy: LoraFedAvg, *, evaluate: bool = False) -> dict[int, Message]:
    """Slot → the message that it would get."""
    grid = NodeView(FakeGrid([9, 4], lambda message: None), [9, 4])
    configure = strategy.configure_evaluate if evaluate else strategy.configure_train
    arrays = to_arrays(strategy.aggregator.distribute())
    sent = configure(1, arrays, ConfigRecord({"kept": 1}), grid)
    return {FEDERATION.partition_of(message.metadata.dst_node_id): message for message in sent}


def one_round(strategy: LoraFedAvg, answer: Answer) -> None:
    """A round in which every client answers for its slot."""

    def reply(message: Message) -> RecordDict:
        return answer(FEDERATION.partition_of(message.metadata.dst_node_id))

    grid = FakeGrid([9, 4], reply)
    arrays = to_arrays(strategy.aggregator.distribute())
    sent = strategy.configure_train(1, arrays, ConfigRecord(), NodeView(grid, [9, 4]))
    strategy.aggregate_train(1, exchange(grid, sent, timeout=1))


def trained(
    slot: int, *, keep: str = "AB", modules: tuple[str, ...] = MODULES, digest: str = ""
) -> RecordDict:
    """Other values of A and B from either client."""
    state = {
        f"{module}.lora_{part}.weight": torch.full(shape, 1.0 + slot)
        for module in modules
        for part, shape in (("A", (1, 2)), ("B", (3, 1)))
        if part in keep
    }
    state = {n: t * torch.arange(1.0, t.numel() + 1).reshape(t.shape) for n, t in state.items()}
    if slot:
        state = {
            name: tensor.flip(tensor.shape.index(max(tensor.shape)))
            for name, tensor in state.items()
        }
    return train_content(to_arrays(state), tokens=1, private_digest=digest)


def dense(state: Mapping[str, Tensor], module: str) -> Tensor:
    return state[f"{module}.base_B"].double() @ state[f"{module}.base_A"].double()


def test_messages_of_other_methods_carry_no_further_record() -> None:
    strategy = strategy_of("product-delta")
    one_round(strategy, trained)
    for evaluate in (False, True):
        for message in messages_of(strategy, evaluate=evaluate).values():
            assert list(message.content.array_records) == ["arrays"]
            (config,) = message.content.config_records.values()
            assert not any("private" in key for key in config)


def test_base_change_goes_to_every_client_from_round_two_on() -> None:
    strategy = strategy_of("flora")
    assert all(BASE_CHANGE not in m.content for m in messages_of(strategy).values())
    one_round(strategy, trained)
    # By hand: both have weight 1/2 and scale 2.
    first = 2 * torch.tensor([1.0, 2, 3])[:, None] @ torch.tensor([[1.0, 2]])
    second = 2 * torch.tensor([6.0, 4, 2])[:, None] @ torch.tensor([[4.0, 2]])
    expected = (first + second).double() / 2
    for evaluate in (False, True):
        for message in messages_of(strategy, evaluate=evaluate).values():
            state = from_arrays(message.content.array_records[BASE_CHANGE])
            for module in MODULES:
                torch.testing.assert_close(dense(state, module), expected, rtol=1e-6, atol=1e-6)


def test_base_change_of_modules_that_a_client_does_not_hold_is_not_sent_to_it() -> None:
    strategy = strategy_of("fedex-lora", {1: AdapterSpec(modules=frozenset({"m"}))})
    # Two clients on "m" leave a residual; one client on "n" leaves none, so add a round of flora's.
    one_round(strategy, lambda slot: trained(slot, modules=MODULES if slot == 0 else ("m",)))
    changed = {name.split(".")[0] for name in strategy.base_change()}
    assert changed == {"m"}
    flora = strategy_of("flora", {1: AdapterSpec(modules=frozenset({"m"}))})
    one_round(flora, lambda slot: trained(slot, modules=MODULES if slot == 0 else ("m",)))
    sent = {
        slot: {name.split(".")[0] for name in message.content.array_records[BASE_CHANGE]}
        for slot, message in messages_of(flora).items()
    }
    assert sent == {0: {"m", "n"}, 1: {"m"}}


def test_load_state_dict_of_a_state_before_the_change_takes_the_change_back() -> None:
    strategy = strategy_of("flora")
    before = strategy.state_dict()
    one_round(strategy, trained)
    assert strategy.base_change()
    strategy.load_state_dict(before)
    assert strategy.base_change() == {}


def with_digest(slot: int) -> RecordDict:
    return trained(slot, keep="A", digest=DIGESTS[slot])


def test_private_factors_are_named_by_the_digest_of_the_last_aggregated_round() -> None:
    strategy = strategy_of("fedsa-lora")
    strategy.private_folder = "somewhere"
    names = sorted(name for name in INITIAL if "lora_B" in name)
    for message in messages_of(strategy).values():
        config = message.content.config_records["config"]
        assert config[PRIVATE] == names and config[PRIVATE_DIGEST] == ""
        assert config["kept"] == 1 and config[PRIVATE_FOLDER] == "somewhere"
        assert set(message.content.array_records["arrays"]) == set(INITIAL)
    one_round(strategy, with_digest)
    for evaluate in (False, True):
        for slot, message in messages_of(strategy, evaluate=evaluate).items():
            config = message.content.config_records["config"]
            assert config[PRIVATE] == names and config[PRIVATE_DIGEST] == DIGESTS[slot]
            assert set(message.content.array_records["arrays"]) == set(INITIAL) - set(names)


def test_private_digests_go_with_the_state() -> None:
    strategy, other = strategy_of("fedsa-lora"), strategy_of("fedsa-lora")
    before = strategy.state_dict()
    one_round(strategy, with_digest)
    other.load_state_dict(strategy.state_dict())
    digests = [m.content["config"][PRIVATE_DIGEST] for m in messages_of(other).values()]
    assert sorted(map(str, digests)) == sorted(DIGESTS.values())
    other.load_state_dict(before)
    assert all(m.content["config"][PRIVATE_DIGEST] == "" for m in messages_of(other).values())


def test_reply_without_the_digest_of_its_private_factors_names_the_client() -> None:
    strategy = strategy_of("fedsa-lora")
    with pytest.raises(AggregationError, match="client 1: .*64 hexadecimal digits"):
        one_round(strategy, lambda slot: trained(slot, keep="A") if slot else with_digest(slot))
    assert all(m.content["config"][PRIVATE_DIGEST] == "" for m in messages_of(strategy).values())


def test_private_factors_of_a_client_that_was_excluded_stay_those_before() -> None:
    strategy = strategy_of("fedsa-lora", on_invalid="exclude")

    def answer(slot: int) -> RecordDict:
        if slot == 0:
            return with_digest(slot)
        bad = {
            "m.lora_A.weight": torch.full((1, 2), float("nan")),
            "n.lora_A.weight": torch.ones(1, 2),
        }
        return train_content(to_arrays(bad), tokens=1, private_digest=DIGESTS[slot])

    one_round(strategy, answer)
    assert sorted(strategy.last_summary.excluded) == [1]
    digests = {s: m.content["config"][PRIVATE_DIGEST] for s, m in messages_of(strategy).items()}
    assert digests == {0: DIGESTS[0], 1: ""}
