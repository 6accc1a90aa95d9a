"""Every call of the protocol with every wrong credential: the right code, and nothing changed."""

import json
from collections.abc import Iterator

import pytest

from flower_split.trunk.service.audit_log import verify_audit_log
from tests.hostile.matrix import (
    CREDENTIALS,
    HANDSHAKE,
    METHODS,
    OF_CLIENTS,
    Rig,
    expected,
    rigs,
)

CELLS = [(m, c) for c in CREDENTIALS for m in METHODS if expected(m, c)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Rig]]:
    with rigs(tmp_path_factory.mktemp("matrix")) as both:
        yield both


def test_matrix_has_every_method_of_the_protocol() -> None:
    assert len(METHODS) == 16 and set(OF_CLIENTS) < set(METHODS)
    for method in METHODS:  # and none is without a row of codes
        assert sum(bool(expected(method, credential)) for credential in CREDENTIALS) >= 9


@pytest.mark.parametrize(("method", "credential"), CELLS)
def test_wrong_credential_gets_its_code_and_changes_nothing(
    made: dict[bool, Rig], method: str, credential: str
) -> None:
    rig = made[credential == "replayed after commit"]
    found = rig.attempt(method, credential)
    assert found.code == expected(method, credential)
    assert not found.changed
    # Who does not get through the handshake makes no call; every other refusal is counted.
    assert found.noted == (credential not in HANDSHAKE and found.code != "OK")


def test_every_refusal_is_in_the_audit_log(made: dict[bool, Rig]) -> None:
    for rig in made.values():
        rig.attempt("Status", "revoked")
        rig.close()  # with a last call of carol's, which is refused
        total = sum(rig.server.refusals.counts.values())
        verify_audit_log([rig.audit_path])
        lines = list(map(json.loads, rig.audit_path.read_text().splitlines()))
        refused = sum(line["outcome"] == "REFUSED" for line in lines)
        left_out = sum(line["also_refused"] for line in lines)
        assert refused + left_out == total >= 2
