"""Count what one optimizer step enters: files of flower_split, changes between them, and frames.

One client and one trunk in this process, over loopback, train a tiny Llama for two steps with one
micro-batch each; the second step is counted. Usage: ``python -m tests.support.step_profile``.

A *change of file* is a call into a file of flower_split other than the one that the same thread
entered last. The deadline thread, and the question that it has the compute thread answer once a second
(``watching.py``), take no part in a step and are not counted. *Frames* are those of
flower_split on the two threads that a forward passes: from the gRPC handler to the hand-over to the
compute thread, and from there to the trunk module's forward.
"""

import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import flower_split
from flower_split.split import TrunkModel, set_trunk
from flower_split.training.loss import Batch
from flower_split.training.measures import RoundPosition
from flower_split.training.round import train_round
from flower_split.trunk.engine.engine import TrunkEngine
from tests.acceptance.federation import federation, make_batch, make_config, write_checkpoint

ROOT = str(Path(flower_split.__file__).parent) + "/"


@dataclass
class StepProfile:
    """What was counted; calls are counted only while ``active``."""

    active: bool = False
    calls: Counter[str] = field(default_factory=Counter)  # file -> functions entered in it
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (from, to) file
    forward_frames: list[str] = field(default_factory=list)  # handler first
    _last: dict[int, str] = field(default_factory=dict)  # thread -> file entered last
    _to_compute_thread: list[str] = field(default_factory=list)

    @property
    def num_changes(self) -> int:
        return self.changes.total()

    def hook(self, frame: FrameType, event: str, _: object) -> None:
        """Count one call; for ``sys.setprofile`` and ``threading.setprofile``."""
        if not self.active or event != "call":
            return
        code = frame.f_code
        if code.co_name == "submit" and code.co_filename.endswith("futures/thread.py"):
            frames = _frames(frame)
            if any(name.endswith("._forward") for name in frames[:1]):
                self._to_compute_thread = frames
        if not code.co_filename.startswith(ROOT):
            return
        thread = threading.current_thread()
        watches = thread.name in ("trunk-deadlines", "trunk-call-watch")
        if watches or code.co_filename.endswith("engine/watching.py"):
            return  # what is looked at once a second belongs to no step
        name = code.co_filename.removeprefix(ROOT)
        self.calls[name] += 1
        before = self._last.get(thread.ident or 0, "")
        if before != name:
            self.changes[before, name] += 1
        self._last[thread.ident or 0] = name
        if code is _TRUNK_FORWARD and thread.name.startswith("trunk-compute"):
            self.forward_frames = self._to_compute_thread + _frames(frame)[:-1]

    def table(self) -> str:
        """Return the counts as lines."""
        lines = [f"{count:6d} {name}" for name, count in self.calls.most_common()]
        lines += [f"{count:6d} {a} -> {b}" for (a, b), count in self.changes.most_common()]
        lines += ["handler to the trunk's forward:", *(f"       {f}" for f in self.forward_frames)]
        lines.append(
            f"{len(self.calls)} files, {self.calls.total()} calls, {self.num_changes} changes of "
            f"file, {len(self.forward_frames)} frames"
        )
        return "\n".join(lines)


_TRUNK_FORWARD: CodeType = TrunkModel.forward.__code__


def _frames(frame: FrameType | None) -> list[str]:
    """Return flower_split's frames on this thread, outermost first."""
    names = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(ROOT):
            names.append(f"{code.co_filename.removeprefix(ROOT)}:{code.co_qualname}")
        frame = frame.f_back
    return names[::-1]


def _wait_for(engine: TrunkEngine, version: int) -> None:
    """Wait until the trunk has stepped, which it does after its replies, and has nothing to do."""
    deadline = time.monotonic() + 60
    while engine.status().version < version:
        assert time.monotonic() < deadline, "the trunk does not step"
        time.sleep(0.001)
    time.sleep(0.05)  # for the few calls after it


def profile_step() -> StepProfile:
    """Return the counts of one optimizer step with one micro-batch."""
    profile = StepProfile()
    threading.setprofile(profile.hook)
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = write_checkpoint(Path(directory) / "model")
            config = make_config(path, local_steps=2)
            with federation(config) as fed:
                batch = make_batch(2, [8, 6], 1)

                def batches() -> Iterator[Batch]:
                    yield batch
                    sys.setprofile(None)
                    _wait_for(fed.engine, 1)  # the first step, which has warmed everything up
                    sys.setprofile(profile.hook)
                    profile.active = True
                    yield batch

                model = fed.client_model(0)
                fed.begin([0])
                with fed.remote(0) as trunk:
                    set_trunk(model, trunk)
                    trunk.open(2)
                    position = RoundPosition(
                        server_round=1, num_server_rounds=1, num_steps=2, partition_id=0
                    )
                    sys.setprofile(profile.hook)
                    train_round(model, batches(), config, position, trunk)
                    sys.setprofile(None)
                    _wait_for(fed.engine, 2)
                    profile.active = False
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return profile


if __name__ == "__main__":
    print(profile_step().table())
