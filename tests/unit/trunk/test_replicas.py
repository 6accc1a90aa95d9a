"""Window batches divided over replicas: followers are threads here, met over gloo.

What is expected is worked out by autograd on the trunk's own module in the order that the division
defines, or by the module called for each client alone.
"""

import gc
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from flower_split.config import LoraPartConfig, OptimizerConfig, TrunkConfig
from flower_split.errors import ConfigError, RefusalReason, TrunkRefused, TrunkUnavailable
from flower_split.lora import attach_lora
from flower_split.split import CutLayers, TrunkModel, split_model
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import reduce_in_slot_order
from flower_split.trunk.compute.joining import Part
from flower_split.trunk.compute.joint import Joint
from flower_split.trunk.compute.joint_pass import Given, JointCompute, JointPass
from flower_split.trunk.compute.window_sum import Counted, WindowSum
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.replicas.divided import divide
from flower_split.trunk.replicas.link import FollowerLink, ReplicaLost
from flower_split.trunk.replicas.packing import length_of, pack, unpack
from tests.support.replica_threads import ThreadReplicas
from tests.support.tiny_models import tiny_model
from tests.support.toy_trunk import HIDDEN, SGD, ToyClient, ToyTrunk, make_engine, make_plan

TOKENS = {0: 2.0, 1: 6.0, 2: 3.0}
ROWS = {0: 2, 1: 1, 2: 3}
LENGTHS = {0: 4, 1: 7, 2: 5}
CUTS = CutLayers(1, 3)
ADAMW = OptimizerConfig(name="adamw", learning_rate=0.01, max_grad_norm=1.0)

# ---------------------------------------------------------------------- the rule of the division


def part(slot: int, rows: int, length: int) -> Part:
    return Part(slot=slot, tensors={"hidden_states": torch.zeros(rows, length, 1)})


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({0: 8, 1: 7, 2: 15}, [[2], [0, 1]]),
        ({0: 4, 1: 4, 2: 4, 3: 4}, [[0, 2], [1, 3]]),
        ({5: 9}, [[5], []]),
        ({0: 1, 1: 2, 2: 3, 3: 10}, [[3], [0, 1, 2]]),
    ],
)
def test_division_gives_the_next_largest_to_whom_has_least(sizes, expected):
    for order in itertools.permutations(sizes.items()):
        shares = divide([part(slot, 1, size) for slot, size in order], 2)
        assert [[item.slot for item in share] for share in shares] == expected


def test_packed_tensors_come_back_bit_for_bit():
    tensors = [
        torch.tensor([[True, False, True]]),
        torch.arange(6, dtype=torch.int64).view(2, 3).T,  # not contiguous
        torch.randn(3, 5).bfloat16(),
        torch.empty(0, 4),
        torch.tensor(float("nan"), dtype=torch.float64),
        torch.randn(7, dtype=torch.float32),
    ]
    layout, buffer = pack(tensors, torch.device("cpu"))
    assert buffer.numel() == length_of(layout)
    for found, tensor in zip(unpack(layout, buffer), tensors, strict=True):
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.nan_to_num(9.0), tensor.nan_to_num(9.0)), tensor


# ---------------------------------------------------------------------- an engine


class Rig:
    """An engine of so many replicas, its clients, and a thread for each call that waits."""

    def __init__(self, size: int, slots: Sequence[int] = (0, 1, 2), **settings: object) -> None:
        made: list[ThreadReplicas] = []
        optimizer = settings.get("optimizer", SGD)

        def follow(compute: TrunkCompute) -> ThreadReplicas:
            made.append(
                ThreadReplicas(compute, lambda: TrunkCompute(ToyTrunk(), optimizer, seed=0), size)
            )
            return made[-1]

        self.engine: TrunkEngine = make_engine(batch_positions=1000, divide=follow, **settings)
        (self.replicas,) = made
        self.engine.begin_round(make_plan(slots))
        self.clients = {slot: ToyClient(self.engine, slot, 2) for slot in slots}
        self.pool = ThreadPoolExecutor(16)

    def window(self, order: Sequence[int], window: int = 0, *, twice: bool = False) -> None:
        """One window, whose calls come in ``order``; each is answered as it should be."""
        for call in (self._forward, self._backward):
            futures = []
            for slot in order * (2 if twice else 1):
                before = self.engine.inspect().num_replies
                futures.append(self.pool.submit(call, slot, window))
                until(
                    lambda future=futures[-1], before=before: (
                        twice or future.done() or self.engine.inspect().num_replies != before
                    )
                )
            for future in futures:
                future.result(20)

    def _forward(self, slot: int, window: int) -> None:
        self.clients[slot].forward(hidden(slot, window), window, digest=f"f{window}".encode())

    def _backward(self, slot: int, window: int) -> None:
        self.clients[slot].backward(
            grad(slot, window), window, num_tokens=TOKENS[slot], digest=f"b{window}".encode()
        )

    def digest(self) -> str:
        return self.engine.prepare_round("test", 1, 0, time.monotonic() + 10).digest

    def close(self) -> None:
        self.engine.close()
        self.replicas.close()
        self.pool.shutdown()


@pytest.fixture(autouse=True)
def no_collecting() -> Iterator[None]:
    """Keep the collector out of torch's random state, which followers as threads read at once.

    torch holds a lock of its own there: a finalizer that gives up the interpreter's lets the other
    thread in, which then waits for ever.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def rigs() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*args: object, **settings: object) -> Rig:
        made.append(Rig(*args, **settings))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0)


def numbers(slot: int, window: int, kind: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * kind + 100 * slot + 10 * window)
    return torch.randn(ROWS[slot], LENGTHS[slot], HIDDEN, generator=generator)


def hidden(slot: int, window: int = 0) -> Tensor:
    return numbers(slot, window, 0)


def grad(slot: int, window: int = 0) -> Tensor:
    return numbers(slot, window, 1)


def padded(tensors: Sequence[Tensor]) -> Tensor:
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat(
        [nn.functional.pad(t, (0, 0, 0, longest - t.shape[1])) for t in tensors], dim=0
    )


def in_the_defined_order(windows: int) -> Tensor:
    """The weight after so many windows of slots 0, 1 and 2 on two replicas, by autograd and SGD.

    Slot 2 has most positions (15): it is the leader's. Slots 0 (8) and 1 (7) are the follower's, one
    batch, whose gradient counts in units of its smaller denominator: slot 0's 2.0 tokens.
    """
    trunk = ToyTrunk()
    optimizer = torch.optim.SGD(trunk.parameters(), lr=0.5)
    for window in range(windows):
        ones = [torch.ones(ROWS[slot], LENGTHS[slot], 1) for slot in (0, 1)]
        (leader,) = torch.autograd.grad(trunk(hidden(2, window)), [trunk.weight], grad(2, window))
        (follower,) = torch.autograd.grad(
            trunk(
                padded([hidden(0, window), hidden(1, window)]),
                attention_mask=padded(ones).squeeze(-1).long(),
            ),
            [trunk.weight],
            padded([grad(0, window), grad(1, window) * (6.0 / 2.0)]),
        )
        trunk.weight.grad = (leader + follower * (2.0 / 3.0)) * (3.0 / 11.0)
        optimizer.step()
    return trunk.weight.detach()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_two_replicas_have_the_bits_of_their_division_in_any_order_of_arrival(rigs, order):
    rig = rigs(2)
    for window in range(2):
        rig.window(order, window)
    assert torch.equal(rig.engine.adapter()["weight"], in_the_defined_order(2))
    assert rig.replicas.followers[0].orders == 4


def test_repeated_calls_leave_the_bits_as_they_are(rigs):
    digests = set()
    for order, twice in (((0, 1, 2), False), ((2, 1, 0), True)):
        rig = rigs(2, optimizer=ADAMW)
        for window in range(2):
            rig.window(order, window, twice=twice)
        digests.add(rig.digest())
    assert len(digests) == 1


def test_follower_forgets_what_the_leader_has_stepped_with(rigs):
    rig = rigs(2)
    (follower,) = rig.replicas.followers
    rig.window((0, 1, 2), 0)
    assert follower.follower.num_passes == 1
    rig.window((0, 1, 2), 1)
    assert follower.follower.num_passes == 1  # window 0's went with window 1's forward


def test_follower_that_ends_is_named_to_whoever_waits(rigs):
    rig = rigs(2)
    rig.replicas.followers[0].kill()
    with pytest.raises(TrunkUnavailable, match="replica 1 has ended"):
        rig.window((0, 1, 2))


# ---------------------------------------------------------------------- joint passes


def trunk_of(family: str = "gpt2", dtype: torch.dtype = torch.float64) -> TrunkModel:
    """Two layers in the middle, with LoRA whose B is not zero."""
    _, trunk = split_model(tiny_model(family), CUTS)
    attach_lora(trunk, CUTS, {"trunk": LoraPartConfig(r=2)}, seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(trunk.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return trunk.to(dtype)


@dataclass
class Sent:
    """What one client sends for one micro-batch."""

    slot: int
    hidden: Tensor
    grad: Tensor
    denominator: float
    cuts: CutLayers | None = None

    def part(self) -> Part:
        return Part(slot=self.slot, tensors={"hidden_states": self.hidden}, cuts=self.cuts)


def sent(slot: int, rows: int, length: int, width: int, cuts: CutLayers | None = None) -> Sent:
    generator = torch.Generator().manual_seed(slot)
    made = [
        torch.randn(rows, length, width, generator=generator, dtype=torch.float64) for _ in range(2)
    ]
    return Sent(slot, made[0], made[1], float(rows * length * (1 + slot)), cuts)


class Trunk:
    """A trunk of so many replicas without an engine."""

    def __init__(self, size: int, **settings: int) -> None:
        self.compute = TrunkCompute(trunk_of(), ADAMW, seed=0)
        local = JointCompute(self.compute, takes_mask=True, max_positions=1000)
        self.joint: Joint = local
        self.replicas: ThreadReplicas | None = None
        if size > 1:
            self.replicas = ThreadReplicas(
                self.compute, lambda: TrunkCompute(trunk_of(), ADAMW, seed=0), size, **settings
            )
            self.joint = self.replicas.divided(local, takes_mask=True)
        self.width = self.compute.trunk.hidden_size

    def clients(self) -> list[Sent]:
        shapes = [(2, 6), (1, 5), (3, 4), (1, 40), (2, 6)]
        made = [sent(slot, *shape, self.width) for slot, shape in enumerate(shapes)]
        own = CutLayers(1, 2)
        self.compute.spans.admit(own)
        return [*made, sent(5, 1, 6, self.width, own)]

    def window(
        self,
        clients: list[Sent],
        keep: Callable[[JointPass], None],
        without: set[int] = frozenset(),
    ) -> dict[int, Tensor]:
        """Forward, backward and step of one window; return the smashed gradients."""
        made = self.joint.forward([one.part() for one in reversed(clients)], "name", keep)
        given = {one.slot: Given(one.grad, one.denominator) for one in clients}
        back = self.joint.backward(made.passes, given)
        assert not made.failures and not back.failures
        total = WindowSum(self.joint, self.compute.covers)
        counted = [Counted(one.slot, one.denominator, one.denominator) for one in clients]
        total.add(0, made.passes, back.gradients, counted)
        slots = [one.slot for one in clients if one.slot not in without]
        self.compute.step(reduce_in_slot_order(total.gradients(slots)))
        return back.smashed_grads

    def close(self) -> None:
        if self.replicas is not None:
            self.replicas.close()


@pytest.fixture
def trunks() -> Iterator[Callable[..., Trunk]]:
    made: list[Trunk] = []

    def make(size: int, **settings: int) -> Trunk:
        made.append(Trunk(size, **settings))
        return made[-1]

    yield make
    for trunk in made:
        trunk.close()


def kept(one: JointPass) -> None:
    """Every graph has room."""


def dropped(one: JointPass) -> None:
    """No graph has room."""
    one.activation.output = None
    one.activation.hidden = one.activation.hidden.detach()


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("without", [set(), {1, 3}])
def test_replicas_agree_with_one_device_in_fp64(trunks, without):
    """Three windows of AdamW, unequal clients, one with cut layers of its own, some taken out again."""
    one, three = trunks(1), trunks(3)
    for _ in range(3):
        alone = one.window(one.clients(), kept, without)
        divided = three.window(three.clients(), kept, without)
        assert alone.keys() == divided.keys() == set(range(6))
        assert max(relative(divided[slot], alone[slot]) for slot in alone) <= 1e-10
    weights = dict(one.compute.named)
    worst = max(relative(p.detach(), weights[n].detach()) for n, p in three.compute.named)
    assert worst <= 1e-10
    moved = trunk_of().state_dict()
    assert any(not torch.equal(p.detach(), moved[n]) for n, p in three.compute.named)


@pytest.mark.parametrize("settings", [{}, {"graph_bytes": 0}])
def test_passes_without_room_for_their_graphs_have_the_same_bits(trunks, settings):
    rich, poor = trunks(2), trunks(2, **settings)
    digests = []
    for trunk, keep in ((rich, kept), (poor, kept if settings else dropped)):
        trunk.window(trunk.clients(), keep)
        digests.append(trunk.compute.digest())
    assert digests[0] == digests[1]


def test_roll_back_reaches_the_followers(trunks):
    trunk = trunks(2)
    clients = trunk.clients()
    before = trunk.compute.snapshot()
    first = trunk.joint.forward([one.part() for one in clients], "n", kept).outputs
    trunk.window(clients, kept)
    after = trunk.joint.forward([one.part() for one in clients], "n", kept).outputs
    trunk.compute.restore(before)
    again = trunk.joint.forward([one.part() for one in clients], "n", kept).outputs
    assert all(torch.equal(first[slot], again[slot]) for slot in first)
    assert all(not torch.equal(first[slot], after[slot]) for slot in first)


def test_client_at_fault_on_a_follower_is_named_and_the_others_keep_theirs(trunks):
    trunk = trunks(2)
    clients = [sent(slot, 1, 6, trunk.width) for slot in range(4)]  # 1 and 3 are the follower's
    made = trunk.joint.forward([one.part() for one in clients], "n", kept)
    given = {one.slot: Given(one.grad, one.denominator) for one in clients}
    given[1] = replace(given[1], grad=torch.full_like(clients[1].grad, 1e308))
    back = trunk.joint.backward(made.passes, given)
    assert back.failures.keys() == {1}
    assert isinstance(back.failures[1], TrunkRefused)
    assert back.failures[1].reason is RefusalReason.NON_FINITE
    leaf = clients[3].hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(trunk.compute.trunk(leaf), leaf, clients[3].grad)
    assert relative(back.smashed_grads[3], expected) <= 1e-10


def test_order_that_fails_as_a_whole_is_told_and_the_next_one_is_answered(trunks):
    trunk = trunks(2)
    clients = [sent(slot, 1, 6, trunk.width) for slot in range(2)]
    made = trunk.joint.forward([one.part() for one in clients], "n", kept)
    remote = made.passes[1]
    remote.number += 7  # the follower knows no such pass
    given = {one.slot: Given(one.grad, one.denominator) for one in clients}
    with pytest.raises(RuntimeError, match="replica 1 failed to compute its share of a backward"):
        trunk.joint.backward(made.passes, given)
    assert trunk.window(clients, kept).keys() == {0, 1}


# ---------------------------------------------------------------------- waits


class Silent:
    """A follower's process that never answers."""

    killed = False

    def is_alive(self) -> bool:
        return not self.killed

    def kill(self) -> None:
        self.killed = True


def test_wait_for_a_follower_has_a_deadline_that_names_it_and_ends_it():
    pipe, theirs = multiprocessing.Pipe()
    peer = Silent()
    link = FollowerLink(3, pipe, peer, 0.01)
    with pytest.raises(
        ReplicaLost, match="replica 3 has taken more than 0.01 s to compute"
    ) as lost:
        link.answer("compute its share of a forward")
    assert peer.killed and "last checkpoint" in str(lost.value)
    theirs.close()


# ---------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "window-batch-positions = 1"),
        ({"window_batches": "on", "device_map": "auto"}, "trunk.device-map"),
        ({"window_batches": "on", "max_experiments": 2}, "trunk.max-experiments"),
        ({"replicas": 0}, "trunk.replicas"),
    ],
)
def test_replicas_that_cannot_be_are_refused_with_the_remedy(changes, match):
    with pytest.raises(ConfigError, match=match):
        TrunkConfig(**{"replicas": 2, **changes})
