"""Window batches over several replicas: whole slots to each, computed at the same time.

Which slots a replica computes depends on the slots of the batch and on their positions alone, never on
the order of arrival, and the replicas' gradients are added in the order of their ranks. So the same
participants give the same bits, whichever call came first and whichever replica was fastest. They are
the bits of that division: another number of replicas rounds elsewhere, as other passes would.

The leader computes its share while the followers compute theirs. All else stays with it: it holds the
window, the ledger, the optimizer and the weights, which go out with the first forward after they changed.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from flower_split.trunk.compute.activations import Activation
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.joining import Part
from flower_split.trunk.compute.joint import Joint
from flower_split.trunk.compute.joint_pass import (
    Backwarded,
    Forwarded,
    Given,
    JointPass,
    PassGradient,
)
from flower_split.trunk.replicas.link import FollowerLink
from flower_split.trunk.replicas.orders import (
    AgainOrder,
    BackwardOrder,
    Backwards,
    ForwardOrder,
    Forwards,
    GradientHeader,
    Kept,
    Order,
    PartHeader,
    PassHeader,
)
from flower_split.trunk.replicas.packing import length_of, pack, unpack


def divide(parts: Sequence[Part], size: int) -> list[list[Part]]:
    """Return each replica's share of a batch, by rank, in slot order.

    The largest micro-batch goes first, each to whom has least so far; ties go to the lower slot and to
    the lower rank.
    """
    shares: list[list[Part]] = [[] for _ in range(size)]
    loads = [0] * size
    for part in sorted(parts, key=lambda item: (-item.num_positions, item.slot)):
        rank = loads.index(min(loads))
        shares[rank].append(part)
        loads[rank] += part.num_positions
    return [sorted(share, key=lambda item: item.slot) for share in shares]


@dataclass(eq=False, slots=True, weakref_slot=True)
class RemotePass(JointPass):
    """A pass that a follower has made; its activation here has a shape and no numbers."""

    rank: int = 0
    number: int = 0  # by which the follower knows it


class DividedJoint:
    """Joint passes over the leader's device and its followers'. The compute thread calls it.

    Args:
        compute: The trunk module, whose weights the followers take over.
        local: Joint passes on the leader's own device.
        links: To the followers, by rank from 1.
    """

    def __init__(self, compute: TrunkCompute, local: Joint, links: Sequence[FollowerLink]) -> None:
        self._compute = compute
        self._local = local
        self._seats = [_Seat(link, compute) for link in links]

    def forward(
        self, parts: Sequence[Part], seed_of: str, keep: Callable[[JointPass], None]
    ) -> Forwarded:
        """Run the micro-batches of one place in the window; see ``JointCompute.forward``."""
        own, *others = divide(parts, 1 + len(self._seats))
        asked = _ask(
            [
                (seat, seat.forward_order(share, seed_of))
                for seat, share in zip(self._seats, others, strict=True)
                if share
            ]
        )
        result = Forwarded()
        try:
            if own:
                result = self._local.forward(own, seed_of, keep)
        finally:  # whatever became of it, the replies are read: both ends stay in step
            answers = _each(asked, _Seat.forwards)
        for seat, (passes, found) in answers:
            for one in passes:
                had = one.activation.output is not None
                keep(one)
                if had and one.activation.output is None:
                    seat.without_graph.add(one.number)
            result.passes += passes
            result.outputs |= found.outputs
            result.failures |= found.failures
        self._wait()
        return result

    def backward(self, passes: Sequence[JointPass], given: Mapping[int, Given]) -> Backwarded:
        """Run the backward of a batch for the slots that give a gradient."""
        asked = _ask(
            [
                (seat, seat.backward_order(theirs, given))
                for seat in self._seats
                if (theirs := [p for p in passes if seat.made(p) and _slots_of(p) & given.keys()])
            ]
        )
        try:
            result = self._local.backward(
                [one for one in passes if not isinstance(one, RemotePass)], given
            )
        finally:
            answers = _each(asked, _Seat.backwards)
        for _, found in answers:
            result.gradients += found.gradients
            result.smashed_grads |= found.smashed_grads
            result.failures |= found.failures
            result.norms_squared |= found.norms_squared
        self._wait()
        return result

    def again(self, one: JointPass, slots: set[int]) -> list[PassGradient]:
        """Return what ``slots`` alone give to a pass that has had its backward."""
        if not isinstance(one, RemotePass):
            return self._local.again(one, slots)
        if not _slots_of(one) & slots:
            return []
        return self._seats[one.rank - 1].again(one, slots)

    def _wait(self) -> None:
        """Wait until what came over the group is complete: other threads read it."""
        if self._compute.device.type == "cuda":
            torch.cuda.current_stream(self._compute.device).synchronize()


class _Seat:
    """One follower's place: what it was asked, what it keeps, which weights it has.

    Args:
        link: To it.
        compute: The leader's.
    """

    def __init__(self, link: FollowerLink, compute: TrunkCompute) -> None:
        self.without_graph: set[int] = set()
        self._link = link
        self._compute = compute
        self._passes: weakref.WeakValueDictionary[int, RemotePass] = weakref.WeakValueDictionary()
        self._weights: object = None  # those that it has

    def made(self, one: JointPass) -> bool:
        """Return whether the follower has made ``one``."""
        return isinstance(one, RemotePass) and one.rank == self._link.rank

    def forward_order(self, parts: Sequence[Part], seed_of: str) -> "_Asking":
        """Return the order of a forward, with the weights where the follower has others."""
        compute = self._compute
        # In-place changes count up a tensor's version: steps, roll-backs and loads alike.
        weights = (compute.version, tuple(p._version for p in compute.parameters))
        news = self._weights != weights
        tensors: list[Tensor] = list(compute.parameters) if news else []
        headers = []
        for part in parts:
            headers.append(PartHeader(part.slot, tuple(part.tensors), part.use_cache, part.cuts))
            tensors += part.tensors.values()
        layout, buffer = pack(tensors, compute.device)
        self._weights = weights
        return ForwardOrder(
            self._kept(), compute.version, news, tuple(headers), seed_of, layout
        ), buffer

    def forwards(self) -> tuple[list[RemotePass], Forwarded]:
        """Return the passes of the forward that was asked for, and the outputs."""
        reply = self._link.answer("compute its share of a forward")
        assert isinstance(reply, Forwards)
        tensors = unpack(reply.layout, self._link.tensors(length_of(reply.layout)))
        passes = [self._pass_of(header) for header in reply.passes]
        failures = {slot: why.error(self._link.where) for slot, why in reply.failures.items()}
        outputs = dict(zip(reply.slots, tensors, strict=True))
        return passes, Forwarded(outputs=outputs, failures=failures)

    def backward_order(self, passes: Sequence[JointPass], given: Mapping[int, Given]) -> "_Asking":
        """Return the order of the backward of passes that the follower has made."""
        slots = sorted(given.keys() & {slot for one in passes for slot in _slots_of(one)})
        layout, buffer = pack([given[slot].grad for slot in slots], self._compute.device)
        numbers = tuple(one.number for one in passes if isinstance(one, RemotePass))
        denominators = {slot: given[slot].denominator for slot in slots}
        return BackwardOrder(self._kept(), numbers, denominators, layout), buffer

    def ask(self, asking: "_Asking") -> None:
        """Send an order."""
        self._link.ask(*asking)

    def backwards(self) -> Backwarded:
        """Return what the backward that was asked for gives."""
        reply = self._link.answer("compute its share of a backward")
        assert isinstance(reply, Backwards)
        tensors = iter(unpack(reply.layout, self._link.tensors(length_of(reply.layout))))
        smashed_grads = {slot: next(tensors) for slot in reply.slots}
        failures = {slot: why.error(self._link.where) for slot, why in reply.failures.items()}
        gradients = [_gradient(header, tensors) for header in reply.gradients]
        return Backwarded(gradients, smashed_grads, failures, dict(reply.norms_squared))

    def again(self, one: RemotePass, slots: Iterable[int]) -> list[PassGradient]:
        """Return what ``slots`` alone give to a pass that it has made."""
        self._link.ask(AgainOrder(self._kept(), one.number, frozenset(slots)))
        return self.backwards().gradients

    def _kept(self) -> Kept:
        alive = frozenset(self._passes.keys())
        self.without_graph &= alive
        return Kept(alive, frozenset(self.without_graph))

    def _pass_of(self, header: PassHeader) -> RemotePass:
        hidden = torch.empty(header.shape, dtype=self._compute.dtype, device="meta")
        activation = Activation(
            version=self._compute.version,
            num_bytes=header.num_bytes,
            hidden=hidden,
            output=hidden if header.has_graph else None,
            recompute=_elsewhere,
        )
        made = RemotePass(
            header.cuts,
            header.rows,
            activation,
            rank=self._link.rank,
            number=header.number,
        )
        self._passes[header.number] = made
        return made


_Asking = tuple[Order, Tensor]  # an order and the bytes that follow it
Value = TypeVar("Value")


def _ask(asking: Sequence[tuple[_Seat, _Asking]]) -> list[_Seat]:
    """Send orders that are all made, so that what fails in the making has asked nobody."""
    for seat, one in asking:
        seat.ask(one)
    return [seat for seat, _ in asking]


def _each(seats: Sequence[_Seat], read: Callable[[_Seat], Value]) -> list[tuple[_Seat, Value]]:
    """Read every seat's reply, by rank; what went wrong with one is raised when all are read."""
    answers, errors = [], []
    for seat in seats:
        try:
            answers.append((seat, read(seat)))
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return answers


def _elsewhere(hidden: Tensor) -> Tensor:
    raise RuntimeError("a pass of a follower is computed again by the follower alone")


def _slots_of(one: JointPass) -> set[int]:
    return {rows.slot for rows in one.rows}


def _gradient(header: GradientHeader, tensors: Iterator[Tensor]) -> PassGradient:
    gradients = [next(tensors) if there else None for there in header.present]
    return PassGradient(header.cuts, header.unit, gradients)
