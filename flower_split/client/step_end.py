"""The call that ends an optimizer step together with the trunk."""

from collections.abc import Mapping

from torch import Tensor

from flower_split.client.calls import SessionCalls
from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.values import FinishResult


def finish_step(
    calls: SessionCalls,
    window: int,
    num_micro_batches: int,
    grad_norm_squared: float,
    gradients: Mapping[str, Tensor],
) -> FinishResult:
    """End a step together with the trunk; see ``RemoteTrunk.finish_step``.

    Args:
        calls: The open session's calls.
        window: The optimizer step within the round, from 0.
        num_micro_batches: How many the step had.
        grad_norm_squared: L2, of the client's own gradient.
        gradients: On the CPU; empty where the round does not share them.

    Raises:
        CodecError: The gradients that come back are not of the parameters that went.
    """
    grant = calls.require()
    header = pb.FinishStepHeader(
        session=grant.session,
        trunk_epoch=grant.epoch,
        key=pb.ContributionKey(
            experiment=grant.experiment,
            server_round=grant.server_round,
            attempt=grant.attempt,
            window=window,
            micro_batch=num_micro_batches,
        ),
        grad_norm_squared=grad_norm_squared,
    )
    size = sum(tensor.nbytes for tensor in gradients.values())
    received, reply = calls.exchange(
        "FinishStep", pb.Header(finish_step=header), gradients, reply_bytes=size
    )
    tensors = received.tensors
    sent = {name: (tensor.shape, tensor.dtype) for name, tensor in gradients.items()}
    if sent != {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
        raise CodecError(
            f"the trunk must answer FinishStep with the {len(sent)} gradients that it was sent, "
            f"reduced; it sent {len(tensors)}, or others."
        )
    return FinishResult(
        clip_factor=reply.clip_factor,
        grad_norm=reply.grad_norm,
        gradients=tensors,
        version=reply.version,
        compute_seconds=reply.compute_seconds,
        queue_seconds=reply.queue_seconds,
    )
