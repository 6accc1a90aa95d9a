"""A client's numbers never scale others' work: each attack beside honest clients.

The honest result is that of a run in which the attacker never was, bit for bit.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest
import torch

from flower_split.aggregation.rules.parse import parse_rules
from flower_split.config import OptimizerConfig
from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import RoundReport
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.toy_trunk import HIDDEN, SGD, ToyClient, ToyTrunk, make_engine, make_plan

ADAMW = OptimizerConfig(name="adamw")
ATTACKER = 1
HONEST = (0, 2, 3, 4)
STEPS = 2


@dataclass(frozen=True, slots=True)
class Attack:
    """What the attacker does with the numbers of an honest backward."""

    denominator: Callable[[float], float] = lambda tokens: tokens
    gradient: float = 1.0  # times the honest one
    micro_batches: int = 1


ATTACKS = {
    "denominator-1e300": Attack(denominator=lambda tokens: 1e300),
    "denominator-times-1e6": Attack(denominator=lambda tokens: 1e6 * tokens),
    "denominator-of-tokens-it-has-not": Attack(denominator=lambda tokens: 2 * tokens + 1),
    "denominator-1e-300-then-honest": Attack(micro_batches=2, denominator=lambda tokens: 1e-300),
    "gradient-times-1e30": Attack(gradient=1e30),
    "gradient-times-1e13": Attack(gradient=1e13),
}


NAN, INF = float("nan"), float("inf")
# Numbers that are no numbers, or that a micro-batch cannot have: the call itself is refused.
REFUSED: dict[str, dict[str, float]] = {
    "smashed-nan": {"smashed": NAN},
    "smashed-inf": {"smashed": INF},
    "gradient-nan": {"gradient": NAN},
    "gradient-inf": {"gradient": INF},
    "gradient-minus-inf": {"gradient": -INF},
    "gradient-that-overflows": {"gradient": 3e38},
    "tokens-zero": {"num_tokens": 0.0},
    "tokens-minus-four": {"num_tokens": -4.0},
    "tokens-nan": {"num_tokens": NAN},
    "tokens-above-the-positions": {"num_tokens": 5.0},
    "tokens-1e300": {"num_tokens": 1e300},
    "denominator-zero": {"denominator": 0.0},
    "denominator-minus-four": {"denominator": -4.0},
    "denominator-nan": {"denominator": NAN},
    "denominator-inf": {"denominator": INF},
}


def data(slot: int, window: int, micro_batch: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * slot + 10 * window + micro_batch)
    return torch.randn(1, 4, HIDDEN, generator=generator)


def contribute(client: ToyClient, slot: int, window: int, attack: Attack) -> None:
    """One window of a client; the attack's denominator is of the first micro-batch alone."""
    for index in range(attack.micro_batches):
        digest = bytes([index])
        client.forward(data(slot, window, index), window, index, digest=digest)
        client.backward(
            attack.gradient * data(slot + 50, window, index),
            window,
            index,
            num_tokens=4.0,
            denominator=attack.denominator(4.0) if index == 0 else 4.0,
            last=index == attack.micro_batches - 1,
            digest=digest,
        )


def send_refused(client: ToyClient, numbers: Mapping[str, float]) -> str:
    """A micro-batch with one bad number; return the refusal that it must get."""
    values = {"num_tokens": 4.0, "denominator": 4.0, **numbers}
    smashed, gradient = (values.pop(name, 1.0) for name in ("smashed", "gradient"))
    with pytest.raises(TrunkRefused) as refused:
        client.forward(smashed * data(ATTACKER, 0))
        client.backward(gradient * data(ATTACKER + 50, 0), **values)
    assert refused.value.reason in (RefusalReason.NON_FINITE, RefusalReason.INVALID_REQUEST)
    return str(refused.value)


def honest_round(engine: TrunkEngine, attack: Attack | None, **plan: object) -> RoundReport:
    """A round of the honest clients, with the attacker in the first window where there is one."""
    slots = sorted((*HONEST, ATTACKER) if attack else HONEST)
    engine.begin_round(make_plan(slots, **plan))
    clients = {slot: ToyClient(engine, slot, STEPS) for slot in slots}
    for window in range(STEPS):
        for slot in HONEST:
            contribute(clients[slot], slot, window, Attack())
        if attack and window == 0:
            contribute(clients[ATTACKER], ATTACKER, window, attack)  # accepted: the attack happened
    return engine.prepare_round("test", 1, 0, time.monotonic() + 5)


@contextmanager
def engine_with(optimizer: OptimizerConfig = ADAMW, **reduction: object) -> Iterator[TrunkEngine]:
    with closing(make_engine(optimizer=optimizer, reduction=Reduction(**reduction))) as engine:
        yield engine


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize(
    "reduction",
    [{}, {"max_client_norm": 0.5}, {"rules": parse_rules("trimmed-mean=0.2")}],
    ids=["mean", "clipped", "trimmed-mean"],
)
def test_round_with_an_attacker_is_bit_for_bit_that_of_the_honest(attack, reduction):
    with engine_with(**reduction) as engine:
        wanted = honest_round(engine, None)
    with engine_with(**reduction) as engine:
        report = honest_round(engine, attack, quorum=0.8)
        engine.commit_round("test", 1, 0)
        assert report.digest == wanted.digest
        assert report.optimizer_steps == STEPS
        left_out = {item.slot: item.problem for item in report.slots if not item.completed}
        assert list(left_out) == [ATTACKER]
        assert "may be at most" in left_out[ATTACKER]
        with pytest.raises(TrunkRefused) as refused:
            engine.open_session(f"token-{ATTACKER}", {"model": "toy"}, STEPS, False)
        assert refused.value.reason is RefusalReason.NO_ROUND  # the round is over, and kept


@pytest.mark.parametrize("numbers", REFUSED.values(), ids=REFUSED)
def test_round_with_a_client_whose_numbers_are_refused_is_that_of_the_honest(numbers):
    with engine_with() as engine:
        wanted = honest_round(engine, None)
    with engine_with() as engine:
        engine.begin_round(make_plan(sorted((*HONEST, ATTACKER)), quorum=0.8))
        clients = {slot: ToyClient(engine, slot, STEPS) for slot in (*HONEST, ATTACKER)}
        said = send_refused(clients[ATTACKER], numbers)
        assert f"slot {ATTACKER}" in said  # the call's own refusal names who it was
        clients[ATTACKER].close()
        for window in range(STEPS):
            for slot in HONEST:
                contribute(clients[slot], slot, window, Attack())
        report = engine.prepare_round("test", 1, 0, time.monotonic() + 5)
        engine.commit_round("test", 1, 0)
        assert report.digest == wanted.digest
        assert [item.slot for item in report.slots if not item.completed] == [ATTACKER]


@pytest.mark.parametrize("times", [1e2, 1e6])
@pytest.mark.parametrize("step_every", [StepEvery.LOCAL_STEP, StepEvery.SERVER_ROUND])
def test_gradient_far_above_the_others_is_left_out_bit_for_bit(times, step_every):
    reports = []
    for attack in (None, Attack(gradient=times)):
        with engine_with(outlier_factor=20.0) as engine:
            slots = sorted((*HONEST, ATTACKER) if attack else HONEST)
            engine.begin_round(make_plan(slots, quorum=0.8, step_every=step_every))
            for slot in reversed(slots):  # whatever the order of arrival
                client = ToyClient(engine, slot, 1)
                contribute(client, slot, 0, attack if attack and slot == ATTACKER else Attack())
            reports.append(engine.prepare_round("test", 1, 0, time.monotonic() + 5))
    honest, attacked = reports
    assert attacked.digest == honest.digest
    left_out = {item.slot: item.problem for item in attacked.slots if not item.completed}
    assert list(left_out) == [ATTACKER]
    assert "times the median of the window's 5 clients" in left_out[ATTACKER]


@pytest.mark.parametrize("reduction", [{}, {"exclude_bad": False}], ids=["quorum-of-all", "abort"])
def test_gradient_far_above_the_others_that_cannot_be_left_out_ends_the_round(reduction):
    plan = {"quorum": 0.5} if reduction else {}
    with engine_with(outlier_factor=20.0, **reduction) as engine:
        before = engine.adapter()["weight"]
        with pytest.raises(RoundAborted, match=f"slot {ATTACKER}: .*trunk.outlier-factor"):
            honest_round(engine, Attack(gradient=1e4), **plan)
        assert torch.equal(engine.adapter()["weight"], before)


def test_gradient_far_above_one_other_is_taken():
    with engine_with(outlier_factor=20.0) as engine:
        engine.begin_round(make_plan((0, ATTACKER)))
        clients = {slot: ToyClient(engine, slot, 1) for slot in (0, ATTACKER)}
        contribute(clients[0], 0, 0, Attack())
        contribute(clients[ATTACKER], ATTACKER, 0, Attack(gradient=1e4))
        assert engine.prepare_round("test", 1, 0, time.monotonic() + 5).optimizer_steps == 1


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize(
    ("reduction", "plan"),
    [(Reduction(), {}), (Reduction(exclude_bad=False), {"quorum": 0.2})],
    ids=["quorum-of-all", "policy-abort"],
)
def test_round_that_cannot_go_on_names_the_attacker_and_keeps_nothing(attack, reduction, plan):
    with closing(make_engine(optimizer=ADAMW, reduction=reduction)) as engine:
        before = engine.adapter()["weight"]
        with pytest.raises(RoundAborted, match=f"slot {ATTACKER}: .*may be at most"):
            honest_round(engine, attack, **plan)
        assert torch.equal(engine.adapter()["weight"], before)


def test_attacker_in_a_single_window_of_all_steps_is_left_out():
    plan = {"step_every": StepEvery.SERVER_ROUND}
    digests = []
    for attack in (None, Attack(denominator=lambda tokens: 1e300)):
        with engine_with() as engine:
            slots = sorted((*HONEST, ATTACKER) if attack else HONEST)
            engine.begin_round(make_plan(slots, quorum=0.8, **plan))
            for slot in slots:
                client = ToyClient(engine, slot, 1)
                contribute(client, slot, 0, attack if attack and slot == ATTACKER else Attack())
            digests.append(engine.prepare_round("test", 1, 0, time.monotonic() + 5).digest)
    assert digests[0] == digests[1]


def test_gradient_of_zeros_with_a_huge_denominator_makes_no_nan_of_a_step():
    # Where every contribution is a step, the window's tokens do not bound it: 0 x 1e300 in fp32 is NaN.
    with engine_with() as engine:
        engine.begin_round(make_plan((0, ATTACKER), quorum=0.5, step_every=StepEvery.CONTRIBUTION))
        clients = {slot: ToyClient(engine, slot, 1) for slot in (0, ATTACKER)}
        zeros = Attack(gradient=0.0, denominator=lambda tokens: 1e300)
        contribute(clients[ATTACKER], ATTACKER, 0, zeros)
        contribute(clients[0], 0, 0, Attack())  # the honest one goes on
        report = engine.prepare_round("test", 1, 0, time.monotonic() + 5)
        left_out = {item.slot: item.problem for item in report.slots if not item.completed}
        assert list(left_out) == [ATTACKER] and "loss_denominator is 1e+300" in left_out[ATTACKER]
        assert report.optimizer_steps == 1


def test_excluded_client_is_told_why_at_its_next_call():
    with engine_with() as engine:
        engine.begin_round(make_plan((0, ATTACKER), quorum=0.5))
        clients = {slot: ToyClient(engine, slot, STEPS) for slot in (0, ATTACKER)}
        contribute(clients[0], 0, 0, Attack())
        contribute(clients[ATTACKER], ATTACKER, 0, Attack(gradient=1e30))
        with pytest.raises(TrunkRefused, match="largest entry of its gradient") as refused:
            clients[ATTACKER].forward(data(1, 1), 1)
        assert refused.value.reason is RefusalReason.DROPPED
        contribute(clients[0], 0, 1, Attack())  # the honest one goes on
        assert engine.prepare_round("test", 1, 0, time.monotonic() + 5).optimizer_steps == STEPS


def test_denominators_of_micro_batches_and_of_the_whole_step_are_honest():
    # The mean over 2 + 6 tokens, by hand: (2 g0 + 6 g1) / 8, whichever denominator was used.
    weights = []
    for own in (True, False):
        with engine_with(SGD) as engine:
            engine.begin_round(make_plan((0,)))
            client = ToyClient(engine, 0)
            ones = torch.ones(1, 6, HIDDEN)
            for index, tokens in enumerate((2.0, 6.0)):
                digest = bytes([index])
                client.forward(ones, 0, index, digest=digest)
                client.backward(
                    ones * (index + 1) / (tokens if own else 8.0),
                    0,
                    index,
                    num_tokens=tokens,
                    denominator=tokens if own else 8.0,
                    last=index == 1,
                    digest=digest,
                )
            engine.prepare_round("test", 1, 0, time.monotonic() + 5)
            weights.append(engine.adapter()["weight"])
    # h^T g over six positions of ones: 6 and 12 in every entry; their sum over 8 tokens, rate 0.5.
    expected = ToyTrunk().weight.detach() - 0.5 * (6.0 + 12.0) / 8.0
    for weight in weights:
        torch.testing.assert_close(weight, expected)


def test_step_to_weights_beyond_measure_is_never_promised():
    steep = OptimizerConfig(name="sgd", learning_rate=1e20, max_grad_norm=0.0)
    with engine_with(steep) as engine:
        before = engine.adapter()["weight"]
        with pytest.raises(RoundAborted, match="after the optimizer step, the weight"):
            honest_round(engine, None)
        assert torch.equal(engine.adapter()["weight"], before)


def test_optimizer_state_that_is_not_finite_is_never_promised():
    compute = TrunkCompute(ToyTrunk(), ADAMW, seed=0)
    compute.step([torch.ones(HIDDEN, HIDDEN)])
    compute.check_state()
    state = compute.state_tensors()
    moment = next(name for name in state if name.endswith("exp_avg_sq"))
    state[moment] = torch.full_like(state[moment], float("inf"))
    compute.load_state_tensors(state, 1)
    with pytest.raises(TrunkRefused, match="exp_avg_sq") as refused:
        compute.check_state()
    assert refused.value.reason is RefusalReason.NON_FINITE
