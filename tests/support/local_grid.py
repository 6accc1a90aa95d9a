"""The real ClientApp behind a grid in this process, one client after the other: no Ray, no SuperLink.

For everything that needs no barrier between clients; joint training with a window per local step
needs them at the same time, and runs this way with a single client.
"""

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flower_split.client.app import app
from flower_split.config import RunConfig, Scalar
from flower_split.messages.packing import unpacked
from flower_split.runtime.simulation import SIMULATED
from flower_split.server.trunk_child import TrunkChild
from flower_split.trunk.serve import RunningTrunk, Serving
from tests.support.fakes import FakeGrid


class LocalGrid(FakeGrid):
    """Nodes 100, 101, ... with partitions 0, 1, ...; the last answers first.

    Messages reach the clients as they are sent, which is packed; who watches here sees what is in them.
    """

    def __init__(
        self, num_clients: int, config: Mapping[str, Scalar], client_app: ClientApp = app
    ) -> None:
        super().__init__(range(100, 100 + num_clients), lambda _: None)
        self.client_app = client_app  # called as Flower does: with its mods
        self._travelling: dict[str, Message] = {}
        self.contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={
                    "partition-id": node - 100,
                    "num-partitions": num_clients,
                    SIMULATED: True,  # what a client keeps lies in the run directory
                },
                state=RecordDict(),
                run_config=dict(config),
            )
            for node in self.nodes
        }

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        ids = list(super().push_messages([unpacked(message) for message in sent]))
        self._travelling.update(zip(ids, sent, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """One reply at a time, as a slow simulation would give them."""
        for name in sorted(message_ids, reverse=True):
            message = self._waiting.pop(name, None)
            if message is not None:
                sent = self._travelling.pop(name)
                reply = self.client_app(sent, self.contexts[message.metadata.dst_node_id])
                reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
                return [unpacked(reply) if reply.has_content() else reply]
        return []


class TrunkHere:
    """What ``TrunkProcess`` offers, in this process: quicker to start."""

    alive, given_up = True, False

    def __init__(self, config: RunConfig, checkpoints: Path | None) -> None:
        self.token = secrets.token_urlsafe(32)
        serving = Serving(token=self.token, checkpoints=str(checkpoints or ""))
        self._running = RunningTrunk(config, serving)
        self.address = f"127.0.0.1:{self._running.port}"

    @classmethod
    def start(
        cls,
        config: RunConfig,
        timeout: float,
        checkpoints: Path | None = None,
        ready: TrunkChild | None = None,
    ) -> Self:
        """As the process's; neither ``timeout`` nor a process is needed."""
        del timeout, ready
        return cls(config, checkpoints)

    def supervise(self) -> None:
        """Nothing to do: it lives as long as this process."""

    def close(self) -> None:
        """End the server."""
        self._running.__exit__(None, None, None)
