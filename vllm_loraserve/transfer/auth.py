"""Proof of the cluster key, both ways, before anything else is said on a connection.

The server sends a nonce; the client answers with a nonce of its own and HMAC-SHA256(key, "client" + both
nonces); the server answers with HMAC-SHA256(key, "server" + both nonces). The key never travels and a
recorded exchange is of no use again. A stranger learns the protocol's name and 32 random bytes, nothing about
adapters or memory. What follows on the connection is not encrypted: the transfer network is one that you
trust, as for RDMA itself (docs/rdma.md).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import stat
from pathlib import Path

from vllm_loraserve.transfer.errors import AuthenticationError, PeerLostError
from vllm_loraserve.transfer.wire import Deadline, receive_exactly

MAGIC = b"LRSX\x01\x00\x00\x00"
NONCE, PROOF = 32, 32
MIN_KEY = 16


def generate_key() -> bytes:
    """A new cluster key of 32 random bytes, as 64 hexadecimal digits."""
    return secrets.token_hex(32).encode()


def load_key(path: str | Path) -> bytes:
    """The cluster key from a file that only its owner can read.

    Raises AuthenticationError in one sentence where the file is absent, open to others or too short.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        key = path.read_bytes().strip()
    except OSError as error:
        raise AuthenticationError(f"the cluster key {path} cannot be read: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise AuthenticationError(f"the cluster key {path} can be read by others; chmod 600 it")
    return check_key(key)


def check_key(key: bytes) -> bytes:
    """The key itself. Raises AuthenticationError where it is too short to protect anything."""
    if len(key) < MIN_KEY:
        raise AuthenticationError(f"the cluster key has {len(key)} bytes; it needs at least {MIN_KEY}")
    return key


def _proof(key: bytes, role: bytes, server: bytes, client: bytes) -> bytes:
    return hmac.new(key, MAGIC + role + server + client, hashlib.sha256).digest()


def _receive(sock: socket.socket, size: int, deadline: Deadline) -> bytes:
    data = receive_exactly(sock, size, deadline)
    if data is None:
        raise PeerLostError("the connection was closed during authentication")
    return data


def prove_as_server(sock: socket.socket, key: bytes, deadline: Deadline) -> None:
    """The server's half. Raises AuthenticationError, having sent nothing but the nonce, or DeadlineError: a client that
    sends byte after byte has no more time than any other."""
    nonce = os.urandom(NONCE)
    sock.sendall(MAGIC + nonce)
    answer = _receive(sock, NONCE + PROOF, deadline)
    theirs, proof = answer[:NONCE], answer[NONCE:]
    if not hmac.compare_digest(proof, _proof(key, b"client", nonce, theirs)):
        raise AuthenticationError("the client does not know the cluster key")
    sock.sendall(_proof(key, b"server", nonce, theirs))


def prove_as_client(sock: socket.socket, key: bytes, deadline: Deadline) -> None:
    """The client's half. Raises AuthenticationError on a server that is not of the cluster, or DeadlineError."""
    greeting = _receive(sock, len(MAGIC) + NONCE, deadline)
    if greeting[: len(MAGIC)] != MAGIC:
        raise AuthenticationError("the other side does not speak the transfer protocol")
    theirs, nonce = greeting[len(MAGIC) :], os.urandom(NONCE)
    sock.sendall(nonce + _proof(key, b"client", theirs, nonce))
    try:
        proof = _receive(sock, PROOF, deadline)
    except (PeerLostError, ConnectionError):
        raise AuthenticationError("the server closed the connection: it has another cluster key") from None
    if not hmac.compare_digest(proof, _proof(key, b"server", theirs, nonce)):
        raise AuthenticationError("the server does not know the cluster key")
