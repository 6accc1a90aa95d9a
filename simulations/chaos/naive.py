"""The trunk without exactly-once, and without what turns a repeated call away before that is asked."""

from concurrent.futures import Future

from flower_split.protocol.values import CallResult
from flower_split.trunk.compute.activations import Activation, ActivationCache, Key
from flower_split.trunk.compute.gradients import SlotGradient
from flower_split.trunk.engine.ledger import CallName, Ledger
from flower_split.trunk.service.admission import UsedNumbers


def let_numbers_repeat() -> None:
    """Let a call through whose signed number was used, in this process: as one that is made again."""
    UsedNumbers.use = lambda self, number: True  # type: ignore[method-assign]


def switch_dedupe_off() -> None:
    """Make every arrival of a call count, in this process."""

    def claim(self: Ledger[CallResult], name: CallName, *call: object):
        return Future(), True

    def put(self: ActivationCache, key: Key, activation: Activation) -> None:
        activation.output = None  # so that a backward can run more than once
        self._entries[key] = activation

    def add(self: SlotGradient, micro_batch, gradients, *, num_tokens, loss_denominator):
        fp32 = [None if g is None else g.detach().float() for g in gradients]
        self._fold(fp32, num_tokens, loss_denominator)

    Ledger.claim = claim  # type: ignore[method-assign]
    ActivationCache.put = put  # type: ignore[method-assign]
    ActivationCache.release = lambda self, key: None  # type: ignore[method-assign]
    SlotGradient.add = add  # type: ignore[method-assign,assignment]
