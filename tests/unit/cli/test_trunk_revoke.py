"""``flower-split trunk-revoke``: one client is out, by its slot or its certificate; the others go on."""

from pathlib import Path

import pytest
import torch

from flower_split.cli.main import main
from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.trunk.service.client_certificates import MutualTls
from tests.support.certificates import Authority
from tests.support.loopback import (
    COORDINATOR_TOKEN,
    HIDDEN,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)


@pytest.fixture
def token(tmp_path: Path) -> str:
    file = tmp_path / "token"
    file.write_text(COORDINATOR_TOKEN)
    file.chmod(0o600)
    return str(file)


def test_slot_that_is_revoked_is_out_and_the_other_completes_the_round(
    token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(make_engine(TinyTrunk())) as port, coordinator(port) as link:
        options = [f"127.0.0.1:{port}", "--token-file", token]
        assert main(["trunk-revoke", *options, "--slot", "1"]) == 1
        assert "no round was begun" in capsys.readouterr().err
        link.begin_round(plan(2, quorum=0.5))
        with remote(port, slot=0) as honest, remote(port, slot=1) as bad:
            bad.open(1)
            assert main(["trunk-revoke", *options, "--slot", "1"]) == 0
            said = capsys.readouterr().out
            assert "slot 1 is out of experiment e" in said and "goes on without it" in said
            with pytest.raises(TrunkRefused) as refused:
                bad.wait_version(0)
            assert refused.value.reason is RefusalReason.UNAUTHENTICATED
            honest.open(1)
            with honest.micro_batch(0, 0, num_tokens=2, loss_denominator=2.0, last=True):
                honest(torch.ones(1, 2, HIDDEN)).sum().backward()
            report = link.prepare_round("e", 1, 0)
        assert [slot.completed for slot in report.slots] == [True, False]
        assert main(["trunk-revoke", *options, "--slot", "5"]) == 1
        assert "slots [5] are not among the participants" in capsys.readouterr().err


def test_client_is_revoked_by_the_subject_of_its_certificate(
    token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ca = Authority.made(tmp_path / "ca")
    certificate, key = ca.sign()
    operator = ca.client("operator")
    with served(
        make_engine(TinyTrunk()),
        tls_certificate=certificate,
        tls_key=key,
        mutual=MutualTls(client_ca=ca.root),
    ) as port:
        tls = ["--root-certificates", ca.root, "--client-certificate", operator.certificate]
        options = [f"127.0.0.1:{port}", "--token-file", token, *tls, "--client-key", operator.key]
        with coordinator(port, root_certificates=ca.root, certificate=operator) as link:
            link.begin_round(plan(2))
            shown = {"root_certificates": ca.root, "certificate": ca.client("clinic-b")}
            with remote(port, slot=1, **shown) as bad:
                bad.open(1)
                assert main(["trunk-revoke", *options, "--subject", "clinic-a"]) == 1
                assert "has called with a certificate of" in capsys.readouterr().err
                assert main(["trunk-revoke", *options, "--subject", "clinic-b"]) == 0
                said = capsys.readouterr().out
                assert "slot 1 is out" in said and "was given up" in said  # the quorum is everybody
                with pytest.raises(TrunkRefused) as refused:
                    bad.wait_version(0)
                assert refused.value.reason is RefusalReason.UNAUTHENTICATED


def test_subject_without_client_certificates_is_refused_with_the_remedy(
    token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(make_engine(TinyTrunk())) as port, coordinator(port) as link:
        link.begin_round(plan())
        options = [f"127.0.0.1:{port}", "--token-file", token]
        assert main(["trunk-revoke", *options, "--subject", "alice"]) == 1
        assert "--client-ca" in (said := capsys.readouterr().err) and "--slot N" in said
        assert main(["trunk-revoke", *options, "--slot", "-1"]) == 2
        assert "--slot must be a partition" in capsys.readouterr().err
