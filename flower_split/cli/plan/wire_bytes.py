"""The bytes of a client's calls in one optimizer step, by the wire's own frames.

Exact for micro-batches of full rows in a run's first round, whose gradients have no rows of zeros but,
in causal language modelling, that of every row's last position, which has no label. Later rounds'
version numbers take a byte or two more in each message, and micro-batches that overlap two less in
some; shorter rows have less payload. Not counted are inputs that only some families send (biases by
relative position), and the outlier channels of codec int8, which take up to 3 % more; nor that a
classification's gradient has few rows where no layer follows the trunk.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flower_split.cli.plan.dry_run import DryRun
from flower_split.config import RunConfig
from flower_split.config.model import CAUSAL_LM
from flower_split.proto import trunk_pb2 as pb
from flower_split.server.step_ends import finish_rule
from flower_split.wire.codecs import Codec, Coded, WireCodecs
from flower_split.wire.sending import Outgoing

_SESSION = "0" * 32  # as long as a trunk's, as are the epoch and the run's name
_EPOCH = (1 << 63) - 1
_DIRECTORY = "20260101-000000-abcdef"  # as long as that of a run without a run-dir
_SUFFIX = "-01234567"  # as long as what a run puts behind its directory's name
_SECONDS = 0.1  # of a reply; a double takes the same bytes, whatever it is but 0


@dataclass(frozen=True, slots=True)
class StepBytes:
    """One client's bytes of one optimizer step, in frames."""

    sent: int
    received: int


def step_bytes(config: RunConfig, run: DryRun, experiment: str, step: int = 1) -> StepBytes:
    """Return the bytes of an optimizer step of round 1.

    Args:
        config: The run's.
        run: Of one micro-batch.
        experiment: The run's name, which every call bears.
        step: Which, from 0.

    Raises:
        ConfigError: A codec of the run is not installed here.
    """
    calls = _Calls(config, run, experiment)
    per_step = config.train.gradient_accumulation_steps
    at_round = config.trunk.step_every == "server-round"
    sent = received = 0
    for index in range(per_step):
        window, micro_batch = (0, step * per_step + index) if at_round else (step, index)
        last = index == per_step - 1
        if at_round:
            last = last and step == config.train.local_steps - 1
        key = calls.key(window, micro_batch)
        for message in calls.micro_batch(key, last):
            sent += message.num_bytes
        replies = calls.replies(window)
        received += sum(message.num_bytes for message in replies)
    if finish_rule(config) is not None:
        there, back = calls.finish(calls.key(step, per_step))
        sent, received = sent + there.num_bytes, received + back.num_bytes
    return StepBytes(sent, received)


def experiment_name(config: RunConfig) -> str:
    """Return a name as long as the one that a run's calls to the trunk will bear."""
    return (Path(config.run_dir).name or _DIRECTORY) + _SUFFIX


class _Calls:
    """Messages as a client and the trunk make them."""

    def __init__(self, config: RunConfig, run: DryRun, experiment: str) -> None:
        self._config, self._run, self._experiment = config, run, experiment
        trunk = config.trunk
        self._codecs = WireCodecs.make(trunk.wire_dtype, trunk.gradient_wire_dtype)
        dtype = self._codecs.activations.dtype or run.hidden_dtype
        self._hidden = torch.ones(run.hidden_shape, dtype=dtype)
        self._grad = self._hidden.clone()
        if config.model.task == CAUSAL_LM:
            self._grad[:, -1] = 0.0
        self._back = config.mode != "forward-only"

    def key(self, window: int, micro_batch: int) -> pb.ContributionKey:
        return pb.ContributionKey(
            experiment=self._experiment,
            server_round=1,
            window=window,
            micro_batch=micro_batch,
        )

    def micro_batch(self, key: pb.ContributionKey, last: bool) -> list[Outgoing]:
        """Return what a client sends in a forward and, if there is one, a backward."""
        forward = pb.ForwardHeader(
            session=_SESSION,
            trunk_epoch=_EPOCH,
            key=key,
            version=key.window,
            mode=pb.ForwardMode.TRAIN if self._back else pb.ForwardMode.NO_GRAD,
            acknowledged=key.micro_batch,
            use_cache=False,
            last=last,
        )
        mask = {"attention_mask": torch.ones(self._run.hidden_shape[:2], dtype=torch.bool)}
        activations, gradients = self._codecs.activations, self._codecs.gradients
        hidden = self._coded("hidden_states", activations)
        sent = [Outgoing(pb.Header(forward=forward), {**hidden, **mask})]
        if self._back:
            backward = pb.BackwardHeader(
                session=_SESSION,
                trunk_epoch=_EPOCH,
                key=key,
                version=key.window,
                num_tokens=1.0,
                loss_denominator=1.0,
                last=last,
                without_zeros=True,
            )
            grad = self._gradient("trunk_output_grad", gradients)
            sent.append(Outgoing(pb.Header(backward=backward), grad))
        return sent

    def replies(self, version: int) -> list[Outgoing]:
        """Return what the trunk answers to them."""
        tensors = [self._coded("trunk_output", self._codecs.activations)]
        if self._back:
            tensors.append(self._gradient("smashed_grad", self._codecs.gradients))
        return [Outgoing(_reply(version), parts) for parts in tensors]

    def finish(self, key: pb.ContributionKey) -> tuple[Outgoing, Outgoing]:
        """Return the call that ends a step together with the trunk, and its reply."""
        gradients: dict[str, Tensor] = {}
        if self._config.shares_gradients:
            gradients = {name: torch.zeros(shape) for name, shape in self._run.trained.items()}
        header = pb.FinishStepHeader(
            session=_SESSION, trunk_epoch=_EPOCH, key=key, grad_norm_squared=1.0
        )
        reply = _reply(key.window + 1)  # the trunk's version after its step
        reply.reply.clip_factor = reply.reply.grad_norm = 1.0
        return Outgoing(pb.Header(finish_step=header), gradients), Outgoing(reply, gradients)

    def _coded(self, name: str, codec: Codec) -> dict[str, Tensor]:
        return Coded(codec, name).encode(self._hidden)

    def _gradient(self, name: str, codec: Codec) -> dict[str, Tensor]:
        tensor = self._grad.to(codec.dtype or self._grad.dtype)
        return Coded(codec, name, without_zeros=True).encode(tensor)


def _reply(version: int) -> pb.Header:
    return pb.Header(
        reply=pb.ReplyHeader(version=version, compute_seconds=_SECONDS, queue_seconds=_SECONDS)
    )
