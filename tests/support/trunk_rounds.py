"""Rounds of a served trunk: a coordinator, and clients that send random hidden states and gradients."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import RunConfig
from flower_split.parties.fingerprint import fingerprint
from flower_split.protocol.values import RoundBase, RoundPlan, RoundReport
from flower_split.server.coordinator import TrunkCoordinator

TOKEN = "the coordinator's token"
SLOTS = (0, 1, 2)
WINDOWS = 2
SECONDS = 30.0


class Run:
    """A coordinator and three clients of a trunk."""

    def __init__(self, config: RunConfig, port: int) -> None:
        self.config, self.port = config, port
        self.control = TrunkCoordinator(f"127.0.0.1:{port}", TOKEN, timeout=SECONDS)

    def begin(
        self, server_round: int, attempt: int, base: RoundBase, seconds: float = SECONDS
    ) -> list[RemoteTrunk]:
        """Open a round; return its clients, who have joined."""
        tokens = {slot: f"token-{server_round}-{attempt}-{slot}" for slot in SLOTS}
        self.control.begin_round(
            RoundPlan(
                experiment="e",
                server_round=server_round,
                attempt=attempt,
                participants=tokens,
                steps_per_round=WINDOWS,
                num_server_rounds=2,
                base=base,
            )
        )
        clients = [
            RemoteTrunk(
                f"127.0.0.1:{self.port}",
                token=token,
                fingerprint=fingerprint(self.config),
                mode="joint",
                call_timeout=seconds,
            )
            for token in tokens.values()
        ]
        for client in clients:
            client.open(WINDOWS)
        return clients

    def round(
        self, server_round: int, attempt: int, base: RoundBase, order: Sequence[int]
    ) -> RoundReport:
        """Train, the calls of each window in ``order``, and prepare."""
        clients = self.begin(server_round, attempt, base)
        with ThreadPoolExecutor(len(SLOTS)) as pool:
            futures = [pool.submit(train, clients[slot], slot, server_round) for slot in order]
            for future in futures:
                future.result(SECONDS)
        return self.control.prepare_round("e", server_round, attempt)

    def close(self) -> None:
        self.control.close()


def train(client: RemoteTrunk, slot: int, server_round: int) -> None:
    for window in range(WINDOWS):
        smashed, grad = numbers(slot, server_round, window)
        with client.micro_batch(window, 0, num_tokens=5.0, loss_denominator=5.0, last=True):
            output = client(smashed.requires_grad_())
        torch.autograd.grad(output, [smashed, client.always], grad, allow_unused=True)


def numbers(slot: int, server_round: int, window: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * server_round + 10 * window + slot)
    smashed, grad = (torch.randn(1 + slot, 5, 32, generator=generator) for _ in range(2))
    return smashed, 1e-3 * grad
