"""A token that names a key is of no use without it, and no proof can be used twice."""

import random
import threading
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flower_split.trunk.service.admission import PossessionCheck
from flower_split.wire.possession import ClientKey, key_of, new_token

METHOD = "/flower_split.Trunk/Forward"


@pytest.fixture
def key() -> ClientKey:
    return ClientKey()


def test_proofs_of_the_keys_owner_pass_once_each(key: ClientKey) -> None:
    token, check = new_token(key.public), PossessionCheck()
    proofs = [key.proof(token, METHOD) for _ in range(20)]
    random.Random(0).shuffle(proofs)  # calls in progress at once arrive in any order
    assert [check.passes(token, METHOD, proof) for proof in proofs] == [True] * 20
    assert [check.passes(token, METHOD, proof) for proof in proofs] == [False] * 20


def test_signature_is_that_of_the_text_that_is_documented() -> None:
    private = Ed25519PrivateKey.generate()
    key = ClientKey(private.private_bytes_raw())
    token = new_token(key.public)
    proof = key.proof(token, METHOD)
    signed = b"flower-split call 1\0" + token.encode() + b"\0" + METHOD.encode() + b"\0" + proof[:8]
    private.public_key().verify(proof[8:], signed)
    assert abs(int.from_bytes(proof[:8]) - time.time_ns()) < 60e9


@pytest.mark.parametrize(
    "wrong",
    [
        "none",
        "other key",
        "other token",
        "other method",
        "other number",
        "short",
        "long",
        "flipped",
    ],
)
def test_call_without_the_right_proof_does_not_pass(key: ClientKey, wrong: str) -> None:
    token, check = new_token(key.public), PossessionCheck()
    good = key.proof(token, METHOD)
    proof = {
        "none": b"",
        "other key": ClientKey().proof(token, METHOD),
        "other token": key.proof(new_token(key.public), METHOD),
        "other method": key.proof(token, METHOD.replace("Forward", "CloseSession")),
        "other number": bytes(8) + good[8:],
        "short": good[:-1],
        "long": good + b"\0",
        "flipped": good[:-1] + bytes([good[-1] ^ 1]),
    }[wrong]
    assert not check.passes(token, METHOD, proof)
    assert check.passes(token, METHOD, good)  # and no wrong one has used it up


@pytest.mark.parametrize("named", ["x", "not base64 !", "é", "A" * 43 + "B", "." * 3 + "AAAA"])
def test_token_that_names_no_key_that_exists_passes_with_nothing(
    key: ClientKey, named: str
) -> None:
    token = f"{new_token()}.{named}"
    assert not PossessionCheck().passes(token, METHOD, key.proof(token, METHOD))


def test_token_without_a_key_is_its_bearers(key: ClientKey) -> None:
    token, check = new_token(), PossessionCheck()
    assert key_of(token) == "" and key.holds(token)
    assert all(check.passes(token, METHOD, proof) for proof in (b"", b"", b"anything"))


def test_key_holds_its_own_tokens_alone(key: ClientKey) -> None:
    again = ClientKey(key.private)
    assert again.public == key.public and again.holds(new_token(key.public))
    assert not ClientKey().holds(new_token(key.public))
    assert len({new_token(key.public) for _ in range(50)}) == 50


def test_process_that_takes_over_the_key_goes_on(key: ClientKey) -> None:
    token, check = new_token(key.public), PossessionCheck()
    assert check.passes(token, METHOD, key.proof(token, METHOD))
    assert check.passes(token, METHOD, ClientKey(key.private).proof(token, METHOD))


def test_old_proofs_stay_used_however_many_follow(key: ClientKey) -> None:
    token, check = new_token(key.public), PossessionCheck()
    first, late = key.proof(token, METHOD), key.proof(token, METHOD)
    assert check.passes(token, METHOD, first)
    for _ in range(1100):
        assert check.passes(token, METHOD, key.proof(token, METHOD))
    assert not check.passes(token, METHOD, first)
    assert not check.passes(
        token, METHOD, late
    )  # below all that are remembered: it may be a replay


def test_one_proof_tried_from_many_threads_passes_once(key: ClientKey) -> None:
    token, check = new_token(key.public), PossessionCheck()
    proof, passed = key.proof(token, METHOD), list[bool]()
    threads = [
        threading.Thread(target=lambda: passed.append(check.passes(token, METHOD, proof)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(passed) == [False] * 7 + [True]
