"""What a client's training calls do on the compute thread: a forward, and a backward that counts.

Everything is checked before anything is accumulated, so that a call that is refused leaves no trace.
"""

import threading
from collections.abc import Mapping

from torch import Tensor

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.trunk.compute.checks import check_weights
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import SlotGradient
from flower_split.trunk.engine.dispatches import Flight
from flower_split.trunk.engine.ledger import CallName
from flower_split.trunk.engine.round_lifecycle import RoundKeeper
from flower_split.trunk.engine.round_state import Round, seed_name


class Contributions:
    """The micro-batches of the open round, and of the dispatches of an asynchronous one.

    Args:
        keeper: Of the open round.
        compute: The trunk module.
        changed: Guards the round; notified when a contribution was counted.
    """

    def __init__(
        self, keeper: RoundKeeper, compute: TrunkCompute, changed: threading.Condition
    ) -> None:
        self._keeper = keeper
        self._compute = compute
        self._changed = changed

    def forward_train(
        self,
        current: Round,
        name: CallName,
        tensors: Mapping[str, Tensor],
        acknowledged: int,
        use_cache: bool | None = None,
    ) -> Tensor:
        """Run a forward and keep what its backward needs."""
        with self._changed:
            self._keeper.require_open(current)
            current.ledger.acknowledge(name.slot, name.window, min(acknowledged, name.micro_batch))
        activations = self._keeper.activations_of(current)
        activations.require_room(
            name.slot, tensors["hidden_states"].numel() * self._compute.dtype.itemsize
        )
        output, activation = self._compute.forward_train(
            tensors,
            seed_of=seed_name(current, name),
            use_cache=use_cache,
            cuts=current.cuts.get(name.slot),
            weights=current.weights if isinstance(current, Flight) else None,
        )
        activations.put((name.slot, name.window, name.micro_batch), activation)
        return output

    def backward(
        self,
        current: Round,
        name: CallName,
        version: int,
        grad: Tensor,
        num_tokens: float,
        loss_denominator: float,
        last: bool,
    ) -> Tensor:
        """Run a backward and add its gradients to the open window, or do neither."""
        place = (name.slot, name.window, name.micro_batch)
        with self._changed:
            self._keeper.require_open(current)
            current.windows.check(name.slot, name.window)
        activations = self._keeper.activations_of(current)
        activation = activations.get(place)
        if activation is None:
            raise TrunkRefused(
                RefusalReason.UNKNOWN_CONTRIBUTION,
                f"slot {name.slot} sends a backward for window {name.window}, micro-batch "
                f"{name.micro_batch}, without a forward that the trunk still holds.",
            )
        now = current.version if isinstance(current, Flight) else self._compute.version
        if activation.version != now or version != activation.version:
            raise TrunkRefused(
                RefusalReason.STALE_VERSION,
                f"the forward of slot {name.slot} ran at version {activation.version} (the client "
                f"says {version}); the weights are at {now}. Run it again.",
            )
        check_weights(activation.hidden.shape, num_tokens, loss_denominator, name.slot)
        smashed_grad, gradients = self._compute.backward(activation, grad)
        with self._changed:
            current.windows.contribute(
                name.slot, name.window, name.micro_batch, num_tokens=num_tokens, last=last
            )
            if self._keeper.trains:
                # Where every contribution is a step of its own, each is the first of its step.
                alone = current.windows.step_every is StepEvery.CONTRIBUTION
                covers = self._compute.covers(current.cuts.get(name.slot))
                current.gradients.setdefault(name.slot, SlotGradient(covers)).add(
                    0 if alone else name.micro_batch,
                    gradients,
                    num_tokens=num_tokens,
                    loss_denominator=loss_denominator,
                )
            current.turn = None
            activations.release(place)
            if isinstance(current, Flight):
                self._keeper.flights.settled(current)
            self._changed.notify_all()
        return smashed_grad
