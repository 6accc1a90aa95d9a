"""Tokens that are of no use to whoever has merely seen one: every call proves that it holds a key.

A client makes an Ed25519 key for a run and tells the ServerApp its public half in the handshake, which
Flower authenticates. The tokens that the ServerApp then hands out name that half. With every call the
client sends a number that it has not used before and its signature of token, method and number; the
trunk refuses a call whose signature does not fit, and one whose number it has seen. So neither a token
nor a recorded call can be used again, on any connection. What a call carries is not signed: that is what
TLS is for. (Proof of possession as in RFC 9449, with a number instead of the time: clocks may differ.)
"""

import base64
import binascii
import secrets
import threading
import time

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_MARK = "."  # in a token, before the key that it names; no other token has one
_NUMBER_BYTES, _SIGNATURE_BYTES = 8, 64
_PURPOSE = b"flower-split call 1"


class ClientKey:
    """A client's key for one run; signs its calls to the trunk. Thread-safe.

    Args:
        private: Its private half, 32 bytes; None: makes a new key.

    Raises:
        ValueError: These bytes are no private half.
    """

    def __init__(self, private: bytes | None = None) -> None:
        if private is None:
            self._key = Ed25519PrivateKey.generate()
        else:
            self._key = Ed25519PrivateKey.from_private_bytes(private)
        self._last = 0
        self._lock = threading.Lock()

    @property
    def private(self) -> bytes:
        """Return the private half, to be kept on this machine; 32 bytes."""
        return self._key.private_bytes_raw()

    @property
    def public(self) -> bytes:
        """Return the public half; 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def holds(self, token: str) -> bool:
        """Return whether a token can be used with this key: it names the key, or none at all."""
        return key_of(token) in ("", _text(self.public))

    def proof(self, token: str, method: str) -> bytes:
        """Return what one call proves itself with; every attempt of it needs its own.

        Args:
            token: The token that is sent with it.
            method: Its full name, as ``/flower_split.Trunk/Forward``.
        """
        with self._lock:
            # The time, so that a process that takes over does not begin with used numbers.
            self._last = max(self._last + 1, time.time_ns())
            number = self._last.to_bytes(_NUMBER_BYTES)
        return number + self._key.sign(_signed(token, method, number))


def new_token(public_key: bytes = b"") -> str:
    """Return a new token.

    Args:
        public_key: The only key with which it can be used; empty: whoever has the token can use it.
    """
    token = secrets.token_urlsafe(32)
    return f"{token}{KEY_MARK}{_text(public_key)}" if public_key else token


def key_of(token: str) -> str:
    """Return the public key that a token names, as text; empty: it names none."""
    return token.rpartition(KEY_MARK)[2] if KEY_MARK in token else ""


def proven_number(token: str, method: str, proof: bytes) -> int | None:
    """Return the number of a call's proof; None: it proves nothing.

    Args:
        token: The token that came with it, which names a key.
        method: The call's full name.
        proof: What the call carries; empty: nothing.
    """
    if len(proof) != _NUMBER_BYTES + _SIGNATURE_BYTES:
        return None
    number, signature = proof[:_NUMBER_BYTES], proof[_NUMBER_BYTES:]
    try:
        key = Ed25519PublicKey.from_public_bytes(_bytes(key_of(token)))
        key.verify(signature, _signed(token, method, number))
    except (InvalidSignature, ValueError):
        return None
    return int.from_bytes(number)


def _signed(token: str, method: str, number: bytes) -> bytes:
    return b"\0".join((_PURPOSE, token.encode(), method.encode(), number))


def _text(public: bytes) -> str:
    return base64.urlsafe_b64encode(public).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    """Return the key that a text names.

    Raises:
        ValueError: It names none.
    """
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
