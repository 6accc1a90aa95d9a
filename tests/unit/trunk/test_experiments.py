"""A trunk of several experiments: who finds whose engine, how many there are, and when one goes."""

import secrets
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import OptimizerConfig
from flower_split.errors import ConfigError, RefusalReason, RoundAborted, TrunkRefused
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.values import RoundBase, RoundPlan
from flower_split.runtime.secret_files import TokenFile
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.fair_device import FairDevice
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.several_experiments import SeveralExperiments
from flower_split.trunk.service.server import TrunkServer
from flower_split.wire.grpc_transport import TrunkChannel
from tests.support.engine_rig import ManualClock
from tests.support.loopback import COORDINATOR_TOKEN, FINGERPRINT, HIDDEN, TinyTrunk

OTHER_TOKEN = "the token of another lab"


class Rig:
    """Experiments whose engines train a tiny trunk at the rate that their runs bring."""

    def __init__(self, checkpoints: Path, maximum: int, lease_seconds: float = 100.0) -> None:
        self.clock = ManualClock()
        self.made: list[str] = []
        self._checkpoints = checkpoints
        self._device = FairDevice()
        self.experiments = SeveralExperiments(
            self.make,
            FINGERPRINT,
            maximum=maximum,
            lease_seconds=lease_seconds,
            clock=self.clock,
        )

    def make(self, owner: str, values) -> TrunkEngine:
        rate = float((values or {}).get("trunk.optimizer.learning-rate", 0.1))
        self.made.append(f"{owner}:{rate:g}")
        optimizer = OptimizerConfig(name="sgd", learning_rate=rate, max_grad_norm=0.0)
        share = self._device.share()
        with share.turn():
            return TrunkEngine(
                TrunkCompute(TinyTrunk(), optimizer, seed=0, share=share),
                mode="joint",
                hidden_size=HIDDEN,
                fingerprint=FINGERPRINT,
                activation_bytes=1 << 26,
                checkpoints=CheckpointStore(self._checkpoints / owner),
            )


@contextmanager
def served(rig: Rig, others: Path | None = None) -> Iterator[int]:
    coordinators = {}
    if others is not None:
        others.write_text(OTHER_TOKEN + "\n")
        others.chmod(0o600)
        coordinators = {"lab": TokenFile(others, "--coordinator")}
    server = TrunkServer(
        rig.experiments, coordinator_token=COORDINATOR_TOKEN, coordinators=coordinators
    )
    try:
        yield server.start()
    finally:
        server.stop(0.0)
        rig.experiments.close()


def coordinator(port: int, token: str = COORDINATOR_TOKEN, rate: float | None = None):
    made = TrunkCoordinator(f"127.0.0.1:{port}", token, timeout=20.0)
    if rate is not None:
        made.bring({"trunk.optimizer.learning-rate": rate})
    return closing(made)


def plan(name: str, server_round: int = 1, **changes: object) -> RoundPlan:
    values: dict[str, object] = {
        "experiment": name,
        "server_round": server_round,
        "attempt": 0,
        "participants": {0: f"token of {name} {server_round}"},
        "join_seconds": 20.0,
        "window_seconds": 20.0,
    }
    return RoundPlan(**{**values, **changes})


def join(port: int, name: str, server_round: int = 1) -> RemoteTrunk:
    trunk = RemoteTrunk(
        f"127.0.0.1:{port}",
        token=f"token of {name} {server_round}",
        fingerprint=FINGERPRINT,
        mode="joint",
        call_timeout=20.0,
    )
    trunk.open(1)
    return trunk


def train(trunk: RemoteTrunk) -> None:
    hidden = torch.ones(1, 2, HIDDEN, requires_grad=True)
    with trunk.micro_batch(0, 0, num_tokens=2, loss_denominator=2.0, last=True):
        trunk(hidden).sum().backward()


def refused(call) -> tuple[RefusalReason, str]:
    with pytest.raises(TrunkRefused) as caught:
        call()
    return caught.value.reason, str(caught.value)


def whole_round(link: TrunkCoordinator, port: int, name: str, number: int = 1, **changes) -> str:
    link.begin_round(plan(name, number, **changes))
    with closing(join(port, name, number)) as trunk:
        train(trunk)
    digest = link.prepare_round(name, number, 0).digest
    link.commit_round(name, number, 0)
    return digest


def test_each_experiment_trains_by_what_its_run_brings(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=3)
    with (
        served(rig) as port,
        coordinator(port, rate=0.1) as one,
        coordinator(port, rate=0.3) as two,
        coordinator(port) as plain,
    ):
        digests = [whole_round(link, port, n) for link, n in ((one, "a"), (two, "b"), (plain, "c"))]
        assert rig.made == [":0.1", ":0.3", ":0.1"]
        assert digests[0] == digests[2] != digests[1]
        adapters = [link.get_adapter()["one.weight"] for link in (one, two, plain)]
        assert torch.equal(adapters[0], adapters[2]) and not torch.equal(adapters[0], adapters[1])
        assert sorted(item.name for item in one.status().experiments) == ["a", "b", "c"]


def test_one_more_than_the_maximum_is_refused_until_one_ends(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=2)
    with served(rig) as port, coordinator(port) as one, coordinator(port) as two:
        one.begin_round(plan("a"))
        two.begin_round(plan("b"))
        with coordinator(port) as three:
            reason, text = refused(lambda: three.begin_round(plan("c")))
            assert reason is RefusalReason.OVER_BUDGET and "trunk.max-experiments" in text
            one.end_experiment()
            three.begin_round(plan("c"))
            assert sorted(rig.experiments.engines()) == ["b", "c"]


def test_clients_token_reaches_no_other_experiment_whatever_it_names(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=2)
    with served(rig) as port, coordinator(port) as link:
        for name in ("a", "b"):
            link.begin_round(plan(name))
        with closing(join(port, "a")) as mine, closing(join(port, "b")) as theirs:
            own, other = mine.grant, theirs.grant
            channel = TrunkChannel(f"127.0.0.1:{port}", token="token of a 1", timeout=20.0)
            with closing(channel):

                def close(session: str, epoch: int) -> tuple[RefusalReason, str]:
                    request = pb.CloseSessionRequest(session=session, trunk_epoch=epoch)
                    return refused(
                        lambda: channel.unary("CloseSession", request, pb.CloseSessionReply)
                    )

                unknown = secrets.token_urlsafe(16)
                assert close(other.session, own.epoch) == close(unknown, own.epoch)
                assert close(other.session, other.epoch) == close(unknown, other.epoch + 1)
            train(theirs)
        assert link.prepare_round("b", 1, 0).slots[0].completed


def test_abort_of_one_experiment_is_none_of_the_others_business(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=2)
    with served(rig) as port, coordinator(port) as one, coordinator(port) as two:
        alone = whole_round(two, port, "alone")
        two.end_experiment()
        one.begin_round(plan("a"))
        two.begin_round(plan("b"))
        with closing(join(port, "a")) as gone, closing(join(port, "b")) as trunk:
            one.abort_round("a", 1, 0, "the test says so")
            train(trunk)
            with pytest.raises(RoundAborted, match="the test says so"):
                train(gone)
        assert two.prepare_round("b", 1, 0).digest == alone


def test_other_coordinators_experiment_is_answered_like_one_that_is_not_there(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path, maximum=3)
    with (
        served(rig, tmp_path / "lab.token") as port,
        coordinator(port) as mine,
        coordinator(port, OTHER_TOKEN) as theirs,
    ):
        digest = whole_round(mine, port, "a")
        mine.begin_round(plan("a", 2))
        for call in (
            lambda name: theirs.abort_round(name, 2, 0, "not mine"),
            lambda name: theirs.prepare_round(name, 2, 0),
            lambda name: theirs.commit_round(name, 2, 0),
        ):
            texts = [refused(lambda: call(name)) for name in ("a", "b")]  # noqa: B023
            assert texts[0] == (texts[1][0], texts[1][1].replace("'b'", "'a'"))
        assert theirs.status().experiments == ()
        theirs.begin_round(plan("a", participants={0: "their token"}))  # their own, of this name
        theirs.end_experiment()
        assert mine.status().phase == "joining"
        assert sorted(rig.experiments.engines()) == ["a"]
        # Nor does a base that another coordinator has committed come back for them.
        reason, _ = refused(
            lambda: theirs.begin_round(
                plan("a", 2, base=RoundBase(1, digest), participants={0: "their token"})
            )
        )
        assert reason is RefusalReason.NO_CHECKPOINT


def test_participant_with_a_coordinators_token_is_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=2)
    with served(rig) as port, coordinator(port) as link:
        stolen = plan("a", participants={0: COORDINATOR_TOKEN})
        assert refused(lambda: link.begin_round(stolen))[0] is RefusalReason.INVALID_REQUEST
    assert rig.made == []


def test_participant_with_a_token_of_another_experiment_is_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=2)
    with served(rig) as port, coordinator(port) as link, coordinator(port) as other:
        link.begin_round(plan("a"))
        taken = plan("b", participants={0: "token of a 1"})
        reason, text = refused(lambda: other.begin_round(taken))
        assert reason is RefusalReason.INVALID_REQUEST and "in use" in text
        link.begin_round(plan("a", attempt=1))  # its own may come again
        assert sorted(rig.experiments.engines()) == ["a"]


def test_two_coordinators_with_one_token_are_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=2)
    file = tmp_path / "token"
    file.write_text(COORDINATOR_TOKEN + "\n")
    file.chmod(0o600)
    with closing(rig.experiments), pytest.raises(ConfigError, match="--coordinator lab"):
        TrunkServer(
            rig.experiments,
            coordinator_token=COORDINATOR_TOKEN,
            coordinators={"lab": TokenFile(file, "--coordinator")},
        )


def test_experiment_of_a_silent_coordinator_is_let_go_and_comes_back(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=2, lease_seconds=100.0)
    with served(rig) as port, coordinator(port, rate=0.3) as one, coordinator(port) as two:
        digest = whole_round(one, port, "a")
        two.begin_round(plan("b"))
        rig.clock.now += 90.0
        two.keep_alive()
        rig.clock.now += 20.0
        rig.experiments.expire()
        assert sorted(rig.experiments.engines()) == ["b"]
        assert one.status().experiment == ""  # the trunk's own status, of another epoch
        reason, _ = refused(lambda: one.prepare_round("a", 2, 0))
        assert reason is RefusalReason.WRONG_ATTEMPT  # as a trunk that has restarted says it
        _, version = one.begin_round(plan("a", 2, base=RoundBase(1, digest)))
        assert version == 1 and rig.made[-1] == ":0.3"


def test_experiment_whose_clients_are_at_work_is_not_let_go(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=2, lease_seconds=100.0)
    with served(rig) as port, coordinator(port) as one:
        one.begin_round(plan("a"))
        with closing(join(port, "a")) as trunk:
            rig.clock.now += 1000.0
            rig.experiments.expire()
            train(trunk)
        assert one.prepare_round("a", 1, 0).slots[0].completed


def test_restarted_trunk_finds_every_experiments_committed_round(tmp_path: Path) -> None:
    digests = {}
    rig = Rig(tmp_path, maximum=2)
    with (
        served(rig) as port,
        coordinator(port, rate=0.1) as one,
        coordinator(port, rate=0.3) as two,
    ):
        digests = {"a": whole_round(one, port, "a"), "b": whole_round(two, port, "b")}
        expected = {
            "a": whole_round(one, port, "a", 2, base=RoundBase(1, digests["a"])),
            "b": whole_round(two, port, "b", 2, base=RoundBase(1, digests["b"])),
        }
    again = Rig(tmp_path, maximum=2)
    with (
        served(again) as port,
        coordinator(port, rate=0.1) as one,
        coordinator(port, rate=0.3) as two,
    ):
        for name, link in (("a", one), ("b", two)):
            base = RoundBase(1, digests[name])
            assert whole_round(link, port, name, 2, base=base) == expected[name]


def test_experiment_that_begins_with_other_settings_is_made_anew(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=1)
    with served(rig) as port, coordinator(port, rate=0.1) as link:
        link.begin_round(plan("a"))
        link.begin_round(plan("a"))  # a retry
        assert rig.made == [":0.1"]
        link.bring({"trunk.optimizer.learning-rate": 0.1, "num-server-rounds": 9})
        link.begin_round(plan("a", attempt=1))  # which makes no other engine
        assert rig.made == [":0.1"]
        link.bring({"trunk.optimizer.learning-rate": 0.2})
        link.begin_round(plan("a", attempt=2))
        assert rig.made == [":0.1", ":0.2"]


@pytest.mark.parametrize("name", ["", "x" * 81])
def test_experiments_name_has_a_length(tmp_path: Path, name: str) -> None:
    rig = Rig(tmp_path, maximum=2)
    with closing(rig.experiments):
        assert refused(lambda: rig.experiments.begin("", name, None))[0] is (
            RefusalReason.INVALID_REQUEST
        )
    assert rig.made == []


def test_revocation_and_adapter_ask_for_a_name_where_there_are_several(tmp_path: Path) -> None:
    rig = Rig(tmp_path, maximum=2)
    with served(rig) as port, coordinator(port) as link, coordinator(port) as operator:
        link.begin_round(plan("a"))
        assert operator.revoke_client([0]) == [0]  # the only one there is
        link.begin_round(plan("b"))
        assert "--experiment" in refused(lambda: operator.revoke_client([0]))[1]
        named = TrunkCoordinator(
            f"127.0.0.1:{port}", COORDINATOR_TOKEN, timeout=20.0, experiment="b"
        )
        with closing(named):
            assert named.revoke_client([0]) == [0]
            assert named.status().experiment == "b"
