"""What the ClientApp answers, and what it refuses."""

import sys
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

import flower_split.client.client
from flower_split.client import model_cache
from flower_split.client.app import app, make_client_app
from flower_split.client.client import planned_steps
from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.data import ClientData, load_client_data
from flower_split.messages.arrays import to_arrays
from flower_split.messages.client_facts import ClientFacts
from flower_split.messages.error_codes import KEY_LOST
from flower_split.messages.orders import HandshakeOrder, PhaseOrder, TrunkOrder
from flower_split.runtime.simulation import pool_cap, simulated_clients_at_once
from flower_split.server.federation.exchange import failure_text
from flower_split.wire.possession import ClientKey, new_token
from tests.support.tiny_app import make_data, make_model, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scalar]:
    root = tmp_path_factory.mktemp("client")
    return tiny_config(make_model(root / "model"), make_data(root / "data", 2))


def ask(
    kind: str,
    config: dict[str, Scalar],
    content: RecordDict | None = None,
    state: RecordDict | None = None,
    **node: object,
) -> Message:
    node_config = {key.replace("_", "-"): value for key, value in node.items()}
    context = Context(
        run_id=1,
        node_id=7,
        node_config=node_config,  # type: ignore[arg-type]
        state=RecordDict() if state is None else state,
        run_config=dict(config),
    )
    message = Message(content or HandshakeOrder().write(), 7, kind)
    message.metadata.__dict__["_message_id"] = "m"
    return app(message, context)


def test_query_tells_what_the_client_holds(config: dict[str, Scalar]) -> None:
    reply = ask("query", config, partition_id=1, num_partitions=2)
    facts = ClientFacts.read(reply)
    assert (facts.partition_id, facts.num_partitions) == (1, 2)
    assert facts.num_examples + facts.num_eval_examples == 6  # records in the file
    assert facts.planned_steps == 1
    assert facts.concurrency == 0  # no simulation
    assert facts.fingerprint["cut-layers"] == "1:3"


@pytest.mark.parametrize("node", [{}, {"partition_id": 0}, {"partition_id": "0"}])
def test_query_without_a_partition_gives_the_option_to_use(
    config: dict[str, Scalar], node: dict[str, object]
) -> None:
    text = failure_text(ask("query", config, **node))
    assert "--node-config 'partition-id=0 num-partitions=2'" in text


def test_query_tells_the_key_that_the_nodes_state_keeps(config: dict[str, Scalar]) -> None:
    here, there = RecordDict(), RecordDict()
    keys = [
        ClientFacts.read(
            ask("query", config, state=state, partition_id=1, num_partitions=2)
        ).public_key
        for state in (here, here, there)
    ]
    assert [len(key) for key in keys] == [32] * 3
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_token_for_a_key_that_is_lost_is_told_as_such(config: dict[str, Scalar], kind: str) -> None:
    state = RecordDict()
    ask("query", config, state=state, partition_id=0, num_partitions=2)
    token = new_token(ClientKey().public)  # as it was before the SuperNode started again
    order = TrunkOrder(address="127.0.0.1:1", token=token, server_round=3)
    for kept in (state, RecordDict()):
        content = PhaseOrder(trunk=order).write(RecordDict({"arrays": to_arrays({})}))
        reply = ask(kind, config, content, kept, partition_id=0, num_partitions=2)
        assert reply.error.code == KEY_LOST
        assert "round 3" in failure_text(reply) and token not in failure_text(reply)


def test_query_with_a_wrong_config_replies_in_words(config: dict[str, Scalar]) -> None:
    text = failure_text(ask("query", {**config, "mode": "jiont"}, partition_id=0, num_partitions=2))
    assert "joint, frozen, forward-only" in text


def test_query_leaves_out_keys_that_this_version_does_not_know_and_names_them(
    config: dict[str, Scalar], caplog: pytest.LogCaptureFixture
) -> None:
    newer: dict[str, Scalar] = {**config, "trunk.colour": "red", "zeal": 3, "seed": 98}
    with caplog.at_level("WARNING", logger="flower_split.client.model_cache"):
        facts = ClientFacts.read(ask("query", newer, partition_id=1, num_partitions=2))
        ClientFacts.read(ask("query", newer, partition_id=1, num_partitions=2))
    assert facts.ignored_keys == ("trunk.colour", "zeal")
    said = [r.getMessage() for r in caplog.records if r.name.endswith("model_cache")]
    assert len(said) == 1 and "leaves them out: trunk.colour, zeal." in said[0]


def test_train_without_a_trunk_in_the_message_names_the_strategy(
    config: dict[str, Scalar],
) -> None:
    text = failure_text(ask("train", config, partition_id=0, num_partitions=2))
    assert "TrunkStrategy" in text


def test_an_unforeseen_error_is_replied_with_its_kind(
    config: dict[str, Scalar], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("flower_split.client.model_cache.fingerprint", fail)
    reply = ask("query", {**config, "seed": 99}, partition_id=0, num_partitions=2)
    assert "ZeroDivisionError: by zero" in failure_text(reply)


@pytest.mark.parametrize(
    ("local_steps", "epochs", "batch", "accumulation", "expected"),
    [(7, 0, 4, 2, 7), (0, 1, 4, 1, 3), (0, 2, 4, 1, 6), (0, 1, 4, 2, 2), (0, 3, 16, 1, 3)],
)
def test_planned_steps_of_ten_examples(
    local_steps: int, epochs: int, batch: int, accumulation: int, expected: int
) -> None:
    config = parse_run_config(
        {
            "train.local-steps": local_steps,
            "train.local-epochs": epochs,
            "train.batch-size": batch,
            "train.gradient-accumulation-steps": accumulation,
        }
    )
    assert planned_steps(config, 10) == expected


def test_clients_at_once_outside_a_simulation_are_unknown() -> None:
    assert simulated_clients_at_once() == 0
    assert pool_cap() >= 5


class FakeRay:
    """As an actor sees it: four CPUs and one GPU, of which this actor has one and a half."""

    def __init__(self, assigned: dict[str, float]) -> None:
        self.assigned = assigned

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, "GPU": 1.0, "memory": 1e9}

    def get_runtime_context(self) -> "FakeRay":
        return self

    def get_assigned_resources(self) -> dict[str, float]:
        return self.assigned


@pytest.mark.parametrize(
    ("assigned", "expected"),
    [({"CPU": 1.0}, 4), ({"CPU": 2.0}, 2), ({"CPU": 1.0, "GPU": 0.5}, 2), ({"CPU": 0.5}, 5)],
)
def test_clients_at_once_follow_from_the_actors_share(
    assigned: dict[str, float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(assigned))
    monkeypatch.setattr(
        "flower_split.runtime.simulation.os.cpu_count", lambda: 1
    )  # the pool takes 5
    assert simulated_clients_at_once() == expected


def test_client_reads_no_flower_and_no_server_code() -> None:
    source = Path(flower_split.client.client.__file__).read_text()
    assert not any(name in source for name in ("flwr", "flower_split.server", "flower_split.trunk"))


def test_client_app_travels_to_a_simulations_actors() -> None:
    """Flower's simulation hands the app to Ray, which pickles it with all that its handlers name."""
    pickle = pytest.importorskip("ray.cloudpickle", reason="the simulation's own")
    assert len(pickle.dumps(make_client_app())) > 0


def test_client_app_unpickled_for_every_message_loads_its_data_once(
    config: dict[str, Scalar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulation's actor unpickles the app anew for each message."""
    pickle = pytest.importorskip("ray.cloudpickle", reason="the simulation's own")
    loaded: list[int] = []

    def load(config: RunConfig, tokenizer: object, partition: int, number: int) -> ClientData:
        loaded.append(partition)
        return load_client_data(config, tokenizer, partition, number)  # type: ignore[arg-type]

    monkeypatch.setattr(model_cache, "load_client_data", load)
    sent = pickle.dumps(make_client_app())
    for _ in range(3):
        context = Context(
            run_id=1,
            node_id=7,
            node_config={"partition-id": 0, "num-partitions": 2},
            state=RecordDict(),
            run_config={**config, "seed": 77},  # another run than the other tests'
        )
        message = Message(HandshakeOrder().write(), 7, "query")
        assert not pickle.loads(sent)(message, context).has_error()
    assert loaded == [0]
