"""Flower's strategies, wrappers and mods inside the trunk's strategy, in whole small runs.

Expected adapters come from Flower's own classes, fed the same replies by hand, or from arithmetic.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Message
from flwr.clientapp.mod import fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp.strategy import (
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
    Strategy,
)

from flower_split.client.app import make_client_app
from flower_split.config import Scalar, parse_run_config
from flower_split.errors import ConfigError, FederationError, FlowerSplitError, RunDirectoryError
from flower_split.lora import initial_client_adapter
from flower_split.messages.updates import update_norm
from flower_split.parties.parts import client_parts, model_cuts
from flower_split.server.inner.flower_strategies import InnerContext, inner_notes
from flower_split.server.privacy.mechanisms import with_privacy
from tests.support.composition import (
    CLIENTS,
    Exchanged,
    Job,
    Outcome,
    Weights,
    by_hand,
    equal,
    record_of,
)
from tests.support.local_grid import TrunkHere
from tests.support.sampling import sampled
from tests.support.tiny_app import make_data, make_model

NODES = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
TOKENS = {**NODES, "weighted_by_key": "num-tokens"}
NOISE = 0.001  # what the tests put in the place of a draw with standard deviation 1


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("parts")
    return make_model(root / "model"), make_data(root / "data", CLIENTS)


@pytest.fixture
def job(tmp_path: Path, parts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    return Job(tmp_path, *parts)


def trunk_stepped(outcome: Outcome) -> bool:
    state = outcome.directory.read_adapter("trunk")
    return all(bool(t.count_nonzero()) for n, t in state.items() if n.endswith("lora_B.weight"))


# ------------------------------------------------------------------ Flower's strategies

FLOWERS: dict[str, tuple[str, Strategy]] = {
    "fedavg": ("", FedAvg(**TOKENS)),
    "fedavgm": (
        "server-learning-rate=0.7, server-momentum=0.9",
        FedAvgM(server_learning_rate=0.7, server_momentum=0.9, **TOKENS),
    ),
    "fedadam": ("eta=0.02, tau=0.01", FedAdam(eta=0.02, tau=0.01, **TOKENS)),
    "fedyogi": ("eta=0.02, beta_1=0.8", FedYogi(eta=0.02, beta_1=0.8, **TOKENS)),
    "fedadagrad": ("eta=0.02", FedAdagrad(eta=0.02, **TOKENS)),
    "fedmedian": ("", FedMedian(**TOKENS)),
    "fedtrimmedavg": ("beta=0.34", FedTrimmedAvg(beta=0.34, **TOKENS)),
    "krum": ("", Krum(**TOKENS)),
    "multikrum": ("num-nodes-to-select=1", MultiKrum(num_nodes_to_select=1, **TOKENS)),
    "fedprox": ("proximal-mu=0.3", FedProx(proximal_mu=0.3, **TOKENS)),
}


@pytest.mark.parametrize(
    "name", sampled(FLOWERS, "fedavgm", "fedadam", "fedmedian", "krum", "fedprox")
)
def test_run_with_a_strategy_of_flower_ends_on_what_its_class_makes_of_the_same_replies(
    job: Job, name: str
) -> None:
    options, strategy = FLOWERS[name]
    outcome = job.run("run", strategy__name=name, strategy__options=options)
    rounds = outcome.grid.rounds()
    assert [len(items) for items in rounds] == [CLIENTS, CLIENTS]
    first, second = by_hand(strategy, rounds)
    assert equal(rounds[1][0].sent, first)
    assert equal(outcome.adapter(), second)
    assert not equal(first, rounds[0][0].sent)
    assert trunk_stepped(outcome)
    assert all(item.config.get("proximal-mu", 0.3) == 0.3 for item in rounds[0])


def test_run_with_uniform_weights_ignores_how_much_data_a_client_has(job: Job) -> None:
    outcome = job.run("run", strategy__name="fedavg", strategy__weighting="uniform")
    *_, last = outcome.grid.rounds()
    assert len({item.metrics["num-tokens"] for item in last}) > 1
    for name, value in outcome.adapter().items():
        expected = sum(item.returned[name].astype(np.float64) for item in last) / CLIENTS
        assert np.abs(value - expected).max() <= 1e-7


def test_run_with_frozen_a_averages_b_and_leaves_a_as_it_began(job: Job) -> None:
    outcome = job.run("run", strategy__name="fedavg", strategy__aggregator="ffa-lora")
    rounds = outcome.grid.rounds()
    begun, found = rounds[0][0].sent, outcome.adapter()
    for name, value in found.items():
        frozen = name.endswith("lora_A.weight")
        assert np.array_equal(value, begun[name]) == frozen, name
        assert all(np.array_equal(i.returned[name], begun[name]) == frozen for i in rounds[0])
    (expected,) = by_hand(FedAvg(**TOKENS), rounds[1:])
    assert all(np.array_equal(found[n], expected[n]) for n in found if "lora_B" in n)


def test_inner_factory_in_code_takes_any_strategy_of_flower(job: Job) -> None:
    seen: list[InnerContext] = []

    def inner(context: InnerContext) -> Strategy:
        seen.append(context)
        return FedMedian(**TOKENS)

    outcome = job.run("run", inner=inner)
    assert seen[0].num_clients == seen[0].num_sampled == CLIENTS
    assert equal(outcome.adapter(), by_hand(FedMedian(**TOKENS), outcome.grid.rounds())[-1])


def test_inner_factory_that_returns_no_strategy_is_refused(job: Job) -> None:
    with pytest.raises(ConfigError, match="must return a strategy .* returned int"):
        job.run("run", inner=lambda context: 3)  # type: ignore[arg-type, return-value]


# ------------------------------------------------------------------ differential privacy


def clipped(item: Exchanged, norm: float) -> Weights:
    """The update of one client, clipped in fp64."""
    update = {n: item.returned[n].astype(np.float64) - item.sent[n] for n in item.sent}
    length = math.sqrt(sum(float((u**2).sum()) for u in update.values()))
    return {n: u * min(1.0, norm / length) for n, u in update.items()}


def length_of(item: Exchanged) -> float:
    return update_norm(record_of(item.sent), record_of(item.returned))


def same_draw(monkeypatch: pytest.MonkeyPatch, module: str) -> list[float]:
    """Flower's noise becomes ``NOISE`` times its standard deviation on every weight; the deviations."""
    seen: list[float] = []

    def add(arrays: list[np.ndarray], std_dev: float) -> None:
        seen.append(float(std_dev))
        for array in arrays:
            array += np.float32(NOISE * std_dev)

    monkeypatch.setattr(f"{module}.add_gaussian_noise_inplace", add)
    return seen


CENTRAL: dict[str, Scalar] = {
    "strategy__name": "fedavg",
    "strategy__weighting": "uniform",
    "strategy__aggregator": "ffa-lora",
}


def test_run_with_server_side_clipping_is_the_mean_of_clipped_updates_and_noise(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = same_draw(monkeypatch, "flwr.serverapp.strategy.dp_fixed_clipping")
    norm, multiplier = 0.05, 2.0
    outcome = job.run(
        "run",
        privacy__mechanism="server-fixed",
        privacy__clipping_norm=norm,
        privacy__noise_multiplier=multiplier,
        **CENTRAL,
    )
    rounds = outcome.grid.rounds()
    assert all(length_of(item) > norm for item in rounds[0])  # clipping has something to do
    deviation = multiplier * norm / CLIENTS
    assert drawn == pytest.approx([deviation, deviation])
    updates = [clipped(item, norm) for item in rounds[1]]
    for name, value in outcome.adapter().items():
        expected = rounds[1][0].sent[name] + sum(u[name] for u in updates) / CLIENTS
        if "lora_A" not in name:  # A stays, without noise
            expected = expected + NOISE * deviation
        assert np.abs(value - expected).max() <= 1e-7
    assert trunk_stepped(outcome)


def test_run_with_client_side_clipping_clips_before_anything_leaves_the_client(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = same_draw(monkeypatch, "flwr.serverapp.strategy.dp_fixed_clipping")
    plain = job.run("plain", num_server_rounds=1, strategy__name="fedavg").grid.rounds()[0]
    norm = 0.05
    outcome = job.run(
        "run",
        num_server_rounds=1,
        privacy__mechanism="client-fixed",
        privacy__clipping_norm=norm,
        strategy__name="fedprox",
        strategy__options="proximal-mu=0.0001",
        strategy__weighting="uniform",
    )
    (items,) = outcome.grid.rounds()
    for item, unclipped in zip(items, plain, strict=True):
        assert length_of(item) == pytest.approx(norm, rel=1e-4)
        for name, update in clipped(unclipped, norm).items():
            assert np.abs(item.returned[name] - item.sent[name] - update).max() <= 1e-6
    assert drawn == pytest.approx([norm / CLIENTS])
    for name, value in outcome.adapter().items():
        mean = sum(item.returned[name].astype(np.float64) for item in items) / CLIENTS
        assert np.abs(value - (mean + NOISE * norm / CLIENTS)).max() <= 1e-7


@pytest.mark.parametrize("side", ["server", "client"])
def test_run_with_adaptive_clipping_ends_on_what_flowers_wrapper_makes_of_the_same_replies(
    job: Job, side: str
) -> None:
    outcome = job.run(
        "run",
        privacy__mechanism=f"{side}-adaptive",
        privacy__clipping_norm=0.08,
        privacy__noise_multiplier=0.0,
        strategy__name="fedavg",
        strategy__weighting="uniform",
    )
    rounds = outcome.grid.rounds()
    wrapper = {
        "server": DifferentialPrivacyServerSideAdaptiveClipping,
        "client": DifferentialPrivacyClientSideAdaptiveClipping,
    }[side]
    equally = [[_with_metric(item, "one", 1.0) for item in items] for items in rounds]
    reference = wrapper(
        FedAvg(weighted_by_key="one", **NODES), 0.0, CLIENTS, initial_clipping_norm=0.08
    )
    first, second = by_hand(reference, equally)
    assert equal(rounds[1][0].sent, first) and equal(outcome.adapter(), second)
    assert reference.clipping_norm != 0.08
    facts = outcome.directory.summary()["facts"]
    assert facts["privacy clipping norm"] == reference.clipping_norm  # type: ignore[index, call-overload]
    if side == "client":
        # 0.08 · exp(−0.2 (share clipped − 0.5)), with everybody clipped in round 1
        assert {item.metrics["norm_bit"] for item in rounds[0]} == {1}
        assert rounds[1][0].config["clipping_norm"] == pytest.approx(0.08 * math.exp(-0.1))


def _with_metric(item: Exchanged, key: str, value: float) -> Exchanged:
    return Exchanged(
        item.server_round,
        item.node,
        item.sent,
        item.returned,
        {**item.metrics, key: value},
        item.config,
    )


@pytest.mark.parametrize(
    "aggregator", ["product-delta", pytest.param("fedit", marks=pytest.mark.slow)]
)
def test_run_with_local_privacy_adds_the_noise_on_the_client(
    job: Job, monkeypatch: pytest.MonkeyPatch, aggregator: str
) -> None:
    drawn = same_draw(monkeypatch, "flwr.clientapp.mod.localdp_mod")
    outcome = job.run(
        "run",
        num_server_rounds=1,
        privacy__mechanism="local",
        privacy__clipping_norm=0.05,
        privacy__epsilon=0.9,
        privacy__delta=1e-4,
        strategy__aggregator=aggregator,
    )
    plain = job.run("plain", num_server_rounds=1, strategy__name="fedavg").grid.rounds()[0]
    # Dwork and Roth: sensitivity · √(2 ln(1.25 / δ)) / ε, for updates 2 · 0.05 apart.
    deviation = 0.1 * math.sqrt(2 * math.log(1.25 / 1e-4)) / 0.9
    assert drawn == pytest.approx([deviation] * CLIENTS)
    for item, unclipped in zip(outcome.grid.rounds()[0], plain, strict=True):
        for name, update in clipped(unclipped, 0.05).items():
            expected = update + NOISE * deviation
            assert np.abs(item.returned[name] - item.sent[name] - expected).max() <= 1e-6
    assert trunk_stepped(outcome)


def test_run_with_real_noise_moves_the_adapter_by_the_noise_that_it_names(job: Job) -> None:
    def final(name: str, multiplier: float) -> Weights:
        return job.run(
            name,
            num_server_rounds=1,
            privacy__mechanism="server-fixed",
            privacy__clipping_norm=0.3,
            privacy__noise_multiplier=multiplier,
            **CENTRAL,
        ).adapter()

    without, noisy = final("without", 0.0), final("noisy", 1.0)
    moved = np.concatenate([(noisy[n] - without[n]).ravel() for n in noisy if "lora_B" in n])
    # 0.3 / 3 = 0.1; the deviation of m draws is within 6 / √(2 m) of it but for one in 10⁸
    assert moved.std() == pytest.approx(0.1, rel=6 / math.sqrt(2 * moved.size))
    assert abs(moved.mean()) <= 6 * 0.1 / math.sqrt(moved.size)


def test_report_says_what_is_not_private_and_how_to_get_an_account(job: Job) -> None:
    outcome = job.run("run", privacy__mechanism="client-fixed", **CENTRAL)
    summary, report = outcome.directory.summary(), outcome.directory.path / "report.md"
    text = report.read_text()
    assert summary["facts"]["privacy"] == "client-fixed"  # type: ignore[index, call-overload]
    assert "NO EPSILON HOLDS FOR THIS RUN" in text  # the trunk trains
    assert "smashed data and gradients" in text
    assert any("NO EPSILON" in str(note) for note in summary["notes"])  # type: ignore[union-attr]
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        assert "flower-split[dp]" in text


def test_report_of_a_frozen_trunk_does_not_say_that_the_trunk_trains(job: Job) -> None:
    outcome = job.run("run", mode="frozen", privacy__mechanism="server-fixed", **CENTRAL)
    text = (outcome.directory.path / "report.md").read_text()
    assert "NO EPSILON" not in text and "smashed data and gradients" in text


def gaussian_epsilon(multiplier: float, releases: int, delta: float) -> float:
    """Epsilon of Gaussian releases by Rényi orders: ε(α) = T α / 2z², converted to (ε, δ).

    Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020,
    proposition 12.
    """
    orders = np.linspace(1.01, 200, 400_000)
    renyi = releases * orders / (2 * multiplier**2)
    converted = renyi + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return float(converted.min())


def test_report_with_the_accountant_gives_the_epsilon_spent(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting", reason="the extra dp is not installed")
    same_draw(monkeypatch, "flwr.clientapp.mod.localdp_mod")  # a large draw overflows the model
    outcome = job.run(
        "run", mode="frozen", num_server_rounds=3, privacy__mechanism="server-fixed", **CENTRAL
    )
    facts = outcome.directory.summary()["facts"]
    assert isinstance(facts, dict)
    assert facts["privacy releases"] == 3 and facts["privacy delta"] == 1e-5
    expected = gaussian_epsilon(1.0, 3, 1e-5)
    assert facts["privacy epsilon of the adapters' noise"] == pytest.approx(expected, rel=0.01)
    assert "epsilon" in (outcome.directory.path / "report.md").read_text()
    local = job.run("local", mode="frozen", privacy__mechanism="local", privacy__epsilon=0.5)
    facts = local.directory.summary()["facts"]
    assert isinstance(facts, dict)
    multiplier = math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.5
    expected = gaussian_epsilon(multiplier, 2, 1e-5)
    assert facts["privacy epsilon of the adapters' noise"] == pytest.approx(expected, rel=0.02)


def test_run_that_would_spend_more_than_its_limit_is_refused_before_round_1(job: Job) -> None:
    pytest.importorskip("dp_accounting", reason="the extra dp is not installed")
    spent = gaussian_epsilon(1.0, 2, 1e-5)
    with pytest.raises(ConfigError, match="4 rounds would spend more .* 2 would not"):
        job.run(
            "run",
            num_server_rounds=4,
            privacy__mechanism="server-fixed",
            privacy__max_epsilon=spent * 1.05,
            **CENTRAL,
        )


@pytest.mark.parametrize(
    "mechanism",
    [
        "server-fixed",
        "local",
        pytest.param("client-fixed", marks=pytest.mark.slow),
        pytest.param("client-adaptive", marks=pytest.mark.slow),
    ],
)
def test_update_of_zero_is_clipped_without_an_error(job: Job, mechanism: str) -> None:
    outcome = job.run(
        "run",
        train__optimizer__schedule="linear",
        train__optimizer__warmup_ratio=0.5,  # the first of two steps has learning rate 0
        privacy__mechanism=mechanism,
        privacy__noise_multiplier=0.0,
        privacy__epsilon=1e9,
        privacy__sensitivity=1e-9,
        strategy__name="fedavg",
        strategy__weighting="uniform",
    )
    first, second = (items[0] for items in outcome.grid.rounds())
    assert length_of(first) <= 1e-6
    assert all(np.abs(second.sent[n] - first.sent[n]).max() <= 1e-6 for n in first.sent)
    assert length_of(second) > 0.01


# ------------------------------------------------------------------ mods of the user's own


def test_client_app_in_code_takes_mods_of_the_users_own_around_training(job: Job) -> None:
    kinds: list[str] = []

    def watching(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        kinds.append(message.metadata.message_type)
        assert len(message.content.config_records) == len(message.content.array_records) == 1
        return call_next(message, context)

    def inner(context: InnerContext) -> Strategy:
        return DifferentialPrivacyClientSideFixedClipping(
            FedAvg(**TOKENS), 0.0, 0.05, context.num_sampled
        )

    app = make_client_app([watching, fixedclipping_mod])
    outcome = job.run("run", num_server_rounds=1, inner=inner, client_app=app)
    assert kinds == ["train"] * CLIENTS
    (items,) = outcome.grid.rounds()
    assert all(length_of(item) == pytest.approx(0.05, rel=1e-4) for item in items)
    assert equal(outcome.adapter(), by_hand(FedAvg(**TOKENS), [items])[0])


def test_what_a_mod_of_the_users_own_does_is_clipped_as_well(job: Job) -> None:
    def enlarging(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        (sent,) = message.content.array_records.values()
        answer = call_next(message, context)
        (record,) = answer.content.array_records.values()
        for name in record:
            grown = sent[name].numpy() + 100 * (record[name].numpy() - sent[name].numpy())
            record[name] = Array(grown)
        return answer

    outcome = job.run(
        "run",
        num_server_rounds=1,
        client_app=make_client_app([enlarging]),
        privacy__mechanism="client-fixed",
        privacy__clipping_norm=2.0,
        **CENTRAL,
    )
    assert [length_of(i) for i in outcome.grid.rounds()[0]] == pytest.approx([2.0] * 3, rel=1e-4)


def test_wrapper_that_relies_on_clipping_clients_refuses_those_that_do_not(job: Job) -> None:
    def inner(context: InnerContext) -> Strategy:
        return DifferentialPrivacyClientSideFixedClipping(
            FedAvg(**TOKENS), 1.0, 0.05, context.num_sampled
        )

    with pytest.raises(FederationError, match="does not clip.*fixedclipping_mod"):
        job.run("run", inner=inner)


def test_clients_told_to_clip_without_the_wrapper_are_refused(job: Job) -> None:
    with pytest.raises(ConfigError, match="needs DifferentialPrivacyClientSideFixedClipping"):
        job.run(
            "run",
            inner=lambda context: FedAvg(**TOKENS),
            privacy__mechanism="client-fixed",
        )


# ------------------------------------------------------------------ resume

STATEFUL: dict[str, dict[str, Scalar]] = {
    "fedavgm": {"strategy__options": "server-learning-rate=0.7, server-momentum=0.9"},
    "fedadam": {"strategy__options": "eta=0.02"},
    "fedyogi": {"strategy__options": "eta=0.02"},
    "fedadagrad": {"strategy__options": "eta=0.02"},
    "server-adaptive": {},
    "client-adaptive": {},
}


@pytest.mark.parametrize(
    "name",
    sampled(
        ("fedavgm", "fedadam", "client-adaptive", "fedyogi", "fedadagrad", "server-adaptive"),
        *("fedadam", "client-adaptive"),
    ),
)
def test_resumed_run_goes_on_with_the_strategys_state_bit_for_bit(job: Job, name: str) -> None:
    changes: dict[str, Scalar] = {"num_server_rounds": 3, **STATEFUL[name]}
    if name.endswith("adaptive"):
        changes |= {"strategy__name": "fedavg", "strategy__weighting": "uniform"}
        changes |= {"privacy__mechanism": name, "privacy__noise_multiplier": 0.0}
        changes |= {"privacy__clipping_norm": 0.05}
    else:
        changes["strategy__name"] = name
    calm = job.run("calm", **changes)
    with pytest.raises(KeyboardInterrupt):
        job.run("broken", stop_at=3, **changes)
    resumed = job.run("broken", resume=True, **changes)
    assert [items[0].server_round for items in resumed.grid.rounds()] == [3]
    assert equal(resumed.adapter(), calm.adapter())
    for part in ("client", "trunk"):
        expected, found = calm.directory.read_adapter(part), resumed.directory.read_adapter(part)
        assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_resume_with_a_strategy_of_unknown_state_is_refused(job: Job) -> None:
    class Own(FedAvg):
        pass

    with pytest.raises(KeyboardInterrupt):
        job.run("run", inner=lambda context: Own(**TOKENS), stop_at=2)
    with pytest.raises(RunDirectoryError, match="cannot be resumed.*Own.*Resumable"):
        job.run("run", inner=lambda context: Own(**TOKENS), resume=True)


# ------------------------------------------------------------------ what cannot be combined

DP: dict[str, Scalar] = {"privacy__mechanism": "server-fixed", **CENTRAL}
REFUSED: list[tuple[dict[str, Scalar], str]] = [
    ({"strategy__name": "fedsgd"}, "strategy.name must be one of"),
    (
        {"strategy__name": "krum", "strategy__options": "num-malicious-nodes=1"},
        "at least 5 clients",
    ),
    ({"strategy__name": "multikrum", "strategy__options": "num-nodes-to-select=2"}, "from 1 to 1"),
    ({"strategy__name": "krum", "trunk__quorum": 0.5}, "quorum below 1"),
    ({"strategy__name": "fedprox"}, "proximal-mu"),
    ({"strategy__name": "fedadam", "strategy__options": "eta=fast"}, "must be a number"),
    ({"strategy__name": "fedadam", "strategy__options": "eta=nan"}, "must be a number"),
    ({"strategy__name": "fedadam", "strategy__options": "beta_1=1.0"}, "below 1"),
    ({"strategy__name": "fedadam", "strategy__options": "lr=1"}, "no option 'lr'; .*eta"),
    ({"strategy__name": "fedadam", "strategy__options": "eta_l=1"}, "train.optimizer"),
    ({"strategy__name": "fedtrimmedavg", "strategy__options": "beta=0.5"}, "beta"),
    ({"strategy__name": "krum", "strategy__options": "num-malicious-nodes=0.5"}, "whole number"),
    ({"strategy__name": "fedavg", "strategy__server_learning_rate": 0.5}, "this package's own"),
    ({"strategy__name": "fedavg", "strategy__rules": "median"}, "strategy.rules"),
    ({"strategy__name": "fedavg", "strategy__server_optimizer": "adam"}, "server-optimizer"),
    ({"strategy__name": "fedavg", "strategy__aggregator": "flexlora"}, "would not be used"),
    (
        {**DP, "strategy__name": "lora-fedavg", "strategy__aggregator": "fedit"},
        "without that noise",
    ),
    ({**DP, "strategy__name": "fedmedian"}, "plain mean"),
    ({**DP, "strategy__name": "fedadam"}, "plain mean"),
    ({**DP, "strategy__weighting": "tokens"}, "equal weight"),
    ({**DP, "trunk__quorum_count": 2}, "quorum below 1"),
    ({**DP, "local_only_baseline": True}, "local-only-baseline"),
    ({**DP, "resume": "run", "resume_previous": True}, "resume-previous"),
    ({**DP, "privacy__mechanism": "server-adaptive"}, "clipped-count-stddev"),
    ({"privacy__mechanism": "local", "strategy__aggregator": "ffa-lora"}, "freezes weights"),
    ({"privacy__mechanism": "local", "strategy__aggregator": "fedex-lora"}, "changes the clients'"),
    ({"privacy__mechanism": "local", "strategy__aggregator": "rolora"}, "freezes weights"),
    ({"privacy__mechanism": "local", "strategy__aggregator": "fedsa-lora"}, "keeps weights"),
    ({"privacy__mechanism": "local", "local_only_baseline": True}, "local-only-baseline"),
    ({"privacy__mechanism": "local", "privacy__delta": 1.0}, "privacy.delta"),
    ({"privacy__mechanism": "local", "privacy__max_epsilon": 1.0}, "max-epsilon"),
    ({"privacy__mechanism": "fixed"}, "privacy.mechanism must be one of"),
]


def context_of(
    parts: tuple[Path, str], changes: Mapping[str, Scalar], num_clients: int = CLIENTS
) -> InnerContext:
    """What an inner strategy of a run with ``changes`` would be made from."""
    config = parse_run_config(Job(Path(), *parts).config("run", **changes))
    state, scales = initial_client_adapter(
        config.model.name, model_cuts(config), client_parts(config), seed=0
    )
    return InnerContext(
        config=config,
        num_clients=num_clients,
        initial=state,
        scales=scales,
        partition_of=lambda node: node,
    )


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_what_cannot_be_combined_is_refused_with_the_reason(
    parts: tuple[Path, str], changes: dict[str, Scalar], reason: str
) -> None:
    with pytest.raises(FlowerSplitError, match=reason) as caught:
        with_privacy(context_of(parts, changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy__name": "fedavg", "lora__rank_by_partition": "0=2"}, "cannot mix clients"),
        (DP | {"strategy__name": "fedmedian"}, "plain mean"),
    ],
)
def test_what_cannot_be_combined_ends_the_run_before_any_client_trains(
    job: Job, changes: dict[str, Scalar], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        job.run("run", stop_at=1, **changes)


def test_noise_is_scaled_to_the_clients_of_a_round_not_of_the_run(parts: tuple[Path, str]) -> None:
    changes = {**DP, "fraction_train": 0.5, "strategy__aggregator": "fedit"}
    wrapper = with_privacy(context_of(parts, changes, num_clients=8))
    assert isinstance(wrapper, DifferentialPrivacyServerSideFixedClipping)
    assert wrapper.num_sampled_clients == 4


@pytest.mark.parametrize(
    ("changes", "num_clients", "note"),
    [
        ({"strategy__name": "fedtrimmedavg"}, 4, "trims no client: beta = 0.2 of 4 clients"),
        ({"strategy__name": "fedtrimmedavg"}, 5, ""),
        ({"strategy__name": "fedmedian"}, 2, "is their mean"),
        ({"strategy__name": "fedadam"}, 3, "Flower's default eta"),
        ({"strategy__name": "fedadam", "strategy__options": "eta=0.01"}, 3, ""),
    ],
)
def test_report_says_when_a_strategy_of_flower_does_not_do_what_its_name_promises(
    parts: tuple[Path, str], changes: dict[str, Scalar], num_clients: int, note: str
) -> None:
    first, *rest = inner_notes(context_of(parts, changes, num_clients))
    assert "not the average of the clients' ΔW" in first
    assert len(rest) == (1 if note else 0) and note in "".join(rest)
