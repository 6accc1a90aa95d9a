"""The committed round whose weights the trunk has; checkpoints restore, keep and prune it."""

import logging
from dataclasses import dataclass, field

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import RoundBase
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.weights_state import Snapshot
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.round_state import Round

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class CommittedWeights:
    """Where the trunk stands between rounds. Only the compute thread calls it.

    Args:
        compute: The trunk module and its optimizer.
        checkpoints: Where rounds are kept before they are committed; None: nowhere.
    """

    compute: TrunkCompute
    checkpoints: CheckpointStore | None
    experiment: str = ""
    server_round: int = 0  # whose weights these are, between rounds
    initial: Snapshot = field(init=False)

    def __post_init__(self) -> None:
        """Remember the weights that every experiment begins with."""
        self.keep_as_initial()

    @property
    def directory(self) -> str:
        """Where the checkpoints are, for messages."""
        return "nowhere" if self.checkpoints is None else str(self.checkpoints.directory)

    def stands_at(self, base: RoundBase | None) -> bool:
        """Return whether the weights are those of the committed round ``base`` already."""
        if base is None or not self.compute.parameters:
            return True
        if base.server_round != self.server_round:
            return False
        return base.server_round == 0 or self.compute.digest() == base.digest

    def keep_as_initial(self) -> None:
        """Let every experiment begin with the weights as they are now."""
        self.initial = self.compute.snapshot()

    def begin_experiment(self, experiment: str) -> None:
        """Start from the initial weights."""
        self.compute.restore(self.initial)
        self.experiment, self.server_round = experiment, 0

    def stand_at(self, base: RoundBase | None) -> None:
        """Have the weights of the committed round ``base``, restoring them if need be.

        Later rounds' checkpoints are discarded: they were prepared and never committed.

        Raises:
            TrunkRefused: They are nowhere (NO_CHECKPOINT).
        """
        if base is None or not self.compute.parameters:
            return
        if not self.stands_at(base):
            if base.server_round == 0:
                self.compute.restore(self.initial)
            else:
                self._restore(base)
        self.server_round = base.server_round
        if self.checkpoints is not None:
            self.checkpoints.discard_after(self.experiment, base.server_round)

    def save(self, current: Round, digest: str) -> None:
        """Write a prepared round's checkpoint, where one is needed.

        Raises:
            OSError: It cannot be written; the checkpoints before it are intact.
        """
        if self.checkpoints is None or current.plan.evaluate or not self.compute.parameters:
            return
        self.checkpoints.save(
            self.compute.state_tensors(),
            experiment=current.plan.experiment,
            server_round=current.plan.server_round,
            attempt=current.plan.attempt,
            version=self.compute.version,
            digest=digest,
            ledger=f"{current.ledger_hash:064x}",
        )

    def keep(self, current: Round) -> None:
        """Stand at a round's weights: it is committed."""
        if current.plan.evaluate:
            return
        self.server_round = current.plan.server_round
        if self.checkpoints is not None:
            self.checkpoints.prune(current.plan.experiment, self.server_round)

    def _restore(self, base: RoundBase) -> None:
        if self.checkpoints is None:
            raise TrunkRefused(
                RefusalReason.NO_CHECKPOINT,
                f"round {base.server_round} of experiment {self.experiment} is not in this trunk "
                "process, which has no checkpoint directory. Start the trunk with --checkpoints "
                "DIR, and begin a new run.",
            )
        record, tensors = self.checkpoints.load(self.experiment, base.server_round, base.digest)
        self.compute.load_state_tensors(tensors, record.version)
        if self.compute.digest() != base.digest:
            raise TrunkRefused(
                RefusalReason.NO_CHECKPOINT,
                f"the checkpoint of round {base.server_round} does not restore the weights that it "
                "names; it was written by another version. Begin a new run.",
            )
        logger.info(
            "restored round %d of experiment %s, version %d",
            base.server_round,
            self.experiment,
            record.version,
        )
