"""A round on a running trunk for a training loop of your own: no Flower, one client.

The trunk is one that ``flower-split trunk`` serves. The loop is its only client and its coordinator:
what it has done is committed when the block ends, and taken back when the block raises:

>>> from pathlib import Path
>>> from tempfile import TemporaryDirectory
>>> import torch
>>> from flower_split import CutLayers, attach_lora, load_client_model
>>> from flower_split.assets import resolve_model_path
>>> from flower_split.config import parse_run_config
>>> from flower_split.integrations.trunk_round import trunk_round
>>> from flower_split.split import set_trunk
>>> from flower_split.trunk.serve import RunningTrunk, Serving
>>> config = parse_run_config({"train.device": "cpu", "trunk.device": "cpu"})
>>> path, cuts = resolve_model_path("quickstart"), CutLayers(2, 6)
>>> client = load_client_model(path, cuts, torch.nn.Identity())
>>> attach_lora(client, cuts, {"bottom": config.lora.bottom, "top": config.lora.top}, seed=0)
>>> tokens = torch.tensor([[5, 6, 7]])
>>> folder = TemporaryDirectory()
>>> token_file = Path(folder.name) / "token"
>>> token_file.touch(mode=0o600)
>>> _ = token_file.write_text("a token of the trunk's own")
>>> with RunningTrunk(config, Serving(token="a token of the trunk's own")) as server:
...     address = f"127.0.0.1:{server.port}"
...     with trunk_round(address, token_file, config, steps=2) as trunk:
...         set_trunk(client, trunk)
...         for step in range(2):
...             name = {"num_tokens": 2, "loss_denominator": 2.0, "last": True}
...             with trunk.micro_batch(step, 0, **name):
...                 loss = client(tokens, labels=tokens).loss
...             loss.backward()  # which steps the trunk
...     server.engine.status().version
2
>>> folder.cleanup()
"""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import RunConfig
from flower_split.errors import RefusalReason, TrunkError, TrunkRefused
from flower_split.parties.experiment_settings import brought
from flower_split.parties.fingerprint import fingerprint
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import RoundPlan, TrunkStatus
from flower_split.runtime.secret_files import read_secret
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.step_ends import finish_rule
from flower_split.wire.possession import ClientKey, new_token

logger = logging.getLogger(__name__)

_SLOT = 0  # of the only client


@contextmanager
def trunk_round(
    address: str,
    token_file: str | Path,
    config: RunConfig,
    steps: int,
    *,
    server_round: int = 1,
    experiment: str = "loop",
) -> Iterator[RemoteTrunk]:
    """Train through a running trunk: commit at the block's end, take back what a failed one did.

    The block is given an open trunk for the client's model, and names every training forward with its
    ``micro_batch``. A loop that takes fewer steps says so with ``trunk.shorten_plan(steps)``, or the
    round is not kept. Where steps end together with the trunk (``trunk.finish``), so do the loop's.

    Args:
        address: The trunk's ``host:port``.
        token_file: The file with its token.
        config: Of trunk and client; certificates, transport and timeouts are taken from it.
        steps: Optimizer steps that the loop will take.
        server_round: From 1, which begins with the trunk's initial weights. A later one goes on from
            the one before, the trunk's last committed round of this experiment.
        experiment: Its name on the trunk.

    Yields:
        The open trunk.

    Raises:
        ConfigError: The token file cannot be read, or is open to others.
        TrunkUnavailable: The trunk does not answer within its timeout.
        TrunkRefused: It is at work, holds another model or configuration, or does not stand at the
            round before.
        RoundAborted: The round was given up, or the loop took fewer steps than it said.
    """
    coordinator = TrunkCoordinator(
        address,
        read_secret(str(token_file), "token_file"),
        root_certificates=config.trunk.root_certificates,
        proxy=config.trunk.proxy,
        timeout=config.trunk.call_timeout,
        experiment=experiment,
    )
    with closing(coordinator):
        coordinator.bring(brought(config))  # a trunk of one experiment looks at nothing of it
        attempt = _attempt(coordinator.status(), experiment, server_round)
        key = ClientKey()
        plan = _plan(config, steps, experiment, server_round, attempt, new_token(key.public))
        with _remote(address, plan, config, key) as trunk:
            coordinator.begin_round(plan)
            try:
                trunk.open(steps)
                yield trunk
                coordinator.prepare_round(experiment, server_round, attempt)
            except (
                BaseException
            ) as error:  # also an interrupt: the trunk must not wait for the loop
                _abort(coordinator, plan, error)
                raise
        coordinator.commit_round(experiment, server_round, attempt)


def _plan(
    config: RunConfig, steps: int, experiment: str, server_round: int, attempt: int, token: str
) -> RoundPlan:
    return RoundPlan(
        experiment=experiment,
        server_round=server_round,
        attempt=attempt,
        participants={_SLOT: token},
        step_every=StepEvery(config.trunk.step_every),
        steps_per_round=steps,
        num_server_rounds=max(config.num_server_rounds, server_round),
        join_seconds=config.trunk.join_timeout,
        window_seconds=config.trunk.window_timeout,
        finish=finish_rule(config),
    )


def _remote(address: str, plan: RoundPlan, config: RunConfig, key: ClientKey) -> RemoteTrunk:
    return RemoteTrunk(
        address,
        token=plan.participants[_SLOT],
        key=key,
        fingerprint=fingerprint(config),
        mode=config.mode,
        call_timeout=config.trunk.call_timeout,
        root_certificates=config.trunk.root_certificates,
        proxy=config.trunk.proxy,
        transport=config.trunk.transport,
    )


def _attempt(status: TrunkStatus, experiment: str, server_round: int) -> int:
    """Return the attempt of the round, one that nobody has used.

    Raises:
        TrunkRefused: The trunk does not stand at the round before.
    """
    mine = status.experiment == experiment
    if mine and status.server_round == server_round and status.phase == "aborted":
        return status.attempt + 1
    stands = mine and status.server_round == server_round - 1 and status.phase == "idle"
    if server_round == 1 and not mine:
        return 0
    if stands:
        return 0
    there = (
        f"stands at round {status.server_round} ({status.phase}) of experiment {status.experiment!r}"
        if status.experiment
        else "has no round yet, as a trunk has that was started again"
    )
    raise TrunkRefused(
        RefusalReason.NO_CHECKPOINT,
        f"round {server_round} of experiment {experiment!r} goes on from round {server_round - 1}, and "
        f"the trunk at work {there}. Give the round after its last one, or begin another experiment "
        "with round 1.",
    )


def _abort(coordinator: TrunkCoordinator, plan: RoundPlan, error: BaseException) -> None:
    """Take back what the round did; a trunk that does not answer gives it up by its own deadlines."""
    why = f"the loop ended with {type(error).__name__}: {error}"
    try:
        coordinator.abort_round(plan.experiment, plan.server_round, plan.attempt, why)
    except TrunkError as refused:
        logger.warning("round=%d the trunk could not abort: %s", plan.server_round, refused)
