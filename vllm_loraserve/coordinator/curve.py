"""CURVE keys of a cluster: one directory with the coordinator's and the members' certificates.

`vllm-loraserve keygen DIR` writes it once; the coordinator gets the whole directory, members (instances, routers,
tools) get a copy without `coordinator.key_secret`. With keys, frames are encrypted and a stranger's connection is
dropped before a byte of it is read as a message. Without keys the coordinator binds to loopback only.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import msgspec
import zmq
import zmq.auth

COORDINATOR_PUBLIC = "coordinator.key"
COORDINATOR_SECRET = "coordinator.key_secret"
MEMBER_PUBLIC = "member.key"
MEMBER_SECRET = "member.key_secret"
KEYS_VARIABLE = "LORASERVE_KEYS"
"""Environment variable that names the key directory where no option does."""


class KeysError(ValueError):
    """Keys that can't be used; the message is one sentence naming the file and the fix."""


class MemberKeys(msgspec.Struct, frozen=True):
    """What a client needs: its own pair, and the public key that the coordinator must prove to have (Z85)."""

    public: bytes
    secret: bytes
    coordinator: bytes

    def apply(self, socket: zmq.Socket) -> None:
        """Makes `socket` a CURVE client; to be called before connect."""
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret
        socket.curve_serverkey = self.coordinator


class CoordinatorKeys(msgspec.Struct, frozen=True):
    """The coordinator's own pair and the public keys that may connect (Z85)."""

    public: bytes
    secret: bytes
    members: frozenset[bytes]

    def apply(self, socket: zmq.Socket) -> None:
        """Makes `socket` a CURVE server; to be called before bind. Who may connect is the authenticator's part."""
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret
        socket.curve_server = True


def create_keys(directory: str | Path) -> list[Path]:
    """Writes a new set of keys (directory mode 0700, secret files 0600); refuses to overwrite one."""
    directory = Path(directory)
    if (directory / COORDINATOR_SECRET).exists():
        raise KeysError(f"'{directory}' already has keys; give another directory or remove them first.")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    before = os.umask(0o077)
    try:
        written = [Path(p) for name in ("coordinator", "member") for p in zmq.auth.create_certificates(directory, name)]
    finally:
        os.umask(before)
    return written


def _load(path: Path, *, secret: bool) -> tuple[bytes, bytes]:
    try:
        public_key, secret_key = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise KeysError(
            f"The key file '{path}' can't be read ({error}); make keys by `vllm-loraserve keygen`."
        ) from None
    if secret and secret_key is None:
        raise KeysError(f"The key file '{path}' has no secret key; make keys by `vllm-loraserve keygen`.")
    return public_key, secret_key or b""


def load_member_keys(directory: str | Path) -> MemberKeys:
    """Reads what a member needs; raises KeysError."""
    directory = Path(directory)
    public, secret = _load(directory / MEMBER_SECRET, secret=True)
    coordinator, _ = _load(directory / COORDINATOR_PUBLIC, secret=False)
    return MemberKeys(public=public, secret=secret, coordinator=coordinator)


def load_coordinator_keys(directory: str | Path) -> CoordinatorKeys:
    """Reads the coordinator's pair; every other `*.key` of the directory may connect. Raises KeysError."""
    directory = Path(directory)
    public, secret = _load(directory / COORDINATOR_SECRET, secret=True)
    members = {_load(p, secret=False)[0] for p in directory.glob("*.key") if p.name != COORDINATOR_PUBLIC}
    if not members:
        raise KeysError(f"'{directory}' has no member key ('{MEMBER_PUBLIC}'); nobody could connect.")
    return CoordinatorKeys(public=public, secret=secret, members=frozenset(members))


def default_member_keys() -> MemberKeys | None:
    """Keys of the directory that $LORASERVE_KEYS names, or None."""
    directory = os.environ.get(KEYS_VARIABLE)
    return load_member_keys(directory) if directory else None


def is_loopback(endpoint: str) -> bool:
    """Whether only processes of this host can reach `endpoint` (tcp on 127/8, ::1 or localhost; ipc; inproc)."""
    if endpoint.startswith(("ipc://", "inproc://")):
        return True
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
