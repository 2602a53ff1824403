"""Who does not know the key learns nothing and gets nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from types import SimpleNamespace

import msgspec
import pytest

from transfer.helpers import KEY, PATIENCE_S, until
from vllm_loraserve.transfer import auth, wire
from vllm_loraserve.transfer import server as server_module
from vllm_loraserve.transfer.errors import AuthenticationError, DeadlineError
from vllm_loraserve.transfer.peer import Peer


def handshake(server_key: bytes, client_key: bytes) -> tuple[Exception | None, Exception | None, bytes]:
    """What each side raised, and everything that the server sent."""
    here, there = socket.socketpair()
    here.settimeout(PATIENCE_S)
    there.settimeout(PATIENCE_S)
    caught: list[Exception | None] = [None]

    def serve() -> None:
        try:
            auth.prove_as_server(there, server_key, wire.Deadline(PATIENCE_S))
        except Exception as error:
            caught[0] = error
        finally:
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    client_error = None
    try:
        auth.prove_as_client(here, client_key, wire.Deadline(PATIENCE_S))
    except Exception as error:
        client_error = error
    thread.join()
    left = b""
    while part := here.recv(100):
        left += part
    here.close()
    return caught[0], client_error, left


def closed(sock: socket.socket) -> bool:
    """Whether the other side closed without another byte (a reset: bytes of ours lay unread there)."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_both_sides_accept_the_same_key():
    assert handshake(KEY, KEY) == (None, None, b"")


def test_another_key_is_refused_and_nothing_more_is_sent():
    server_error, client_error, left = handshake(KEY, b"another key of the same length")
    assert isinstance(server_error, AuthenticationError)
    assert isinstance(client_error, AuthenticationError)
    assert left == b""


def test_a_server_without_the_key_is_refused():
    here, there = socket.socketpair()
    there.sendall(auth.MAGIC + os.urandom(32))
    there.sendall(os.urandom(32))
    here.settimeout(PATIENCE_S)
    with pytest.raises(AuthenticationError, match="server does not know"):
        auth.prove_as_client(here, KEY, wire.Deadline(PATIENCE_S))
    here.close()
    there.close()


def test_a_recorded_proof_is_of_no_use_again(server):
    """What a listener saw of one connection does not open the next: the server's nonce differs."""
    host, port = server.endpoint.split(":")
    recorded = b""
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        greeting = auth._receive(sock, 8 + 32, wire.Deadline(PATIENCE_S))
        nonce = os.urandom(32)
        recorded = nonce + auth._proof(KEY, b"client", greeting[8:], nonce)
        sock.sendall(recorded)
        assert len(auth._receive(sock, 32, wire.Deadline(PATIENCE_S))) == 32
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        auth._receive(sock, 8 + 32, wire.Deadline(PATIENCE_S))
        sock.sendall(recorded)
        assert closed(sock)


def test_a_server_s_proof_reflected_back_is_no_client_s_proof(server):
    host, port = server.endpoint.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        greeting = auth._receive(sock, 8 + 32, wire.Deadline(PATIENCE_S))
        nonce = os.urandom(32)
        sock.sendall(nonce + auth._proof(KEY, b"server", greeting[8:], nonce))
        assert closed(sock)


def test_a_stranger_gets_nothing_from_a_server(server):
    host, port = server.endpoint.split(":")
    with pytest.raises(AuthenticationError):
        Peer(server.endpoint, b"not the key of this cluster", "stranger")
    for message in (
        wire.Hello(version=1, instance="x", boot_id=""),
        wire.GetCatalogue(),
        wire.Pull(lease=1, start=0, length=9),
    ):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
            greeting = auth._receive(sock, 8 + 32, wire.Deadline(PATIENCE_S))
            assert greeting[:8] == auth.MAGIC
            body = msgspec.msgpack.encode(message)
            sock.sendall(len(body).to_bytes(4, "little") + body + bytes(100))
            assert closed(sock)
    assert server.session_count == 0


def test_a_stranger_on_the_unix_socket_gets_nothing_either(server):
    assert server._unix_name
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect("\0" + server._unix_name)
        auth._receive(sock, 8 + 32, wire.Deadline(PATIENCE_S))
        sock.sendall(bytes(64))
        assert closed(sock)


def test_an_unknown_session_opens_no_data_connection(server):
    host, port = server.endpoint.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        auth.prove_as_client(sock, KEY, wire.Deadline(PATIENCE_S))
        wire.send(sock, wire.Attach(session=bytes(32)))
        reply = wire.receive_reply(sock)
        assert isinstance(reply, wire.Refused)
        assert closed(sock)


def test_keys_from_files(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(auth.generate_key() + b"\n")
    path.chmod(0o644)
    with pytest.raises(AuthenticationError, match="chmod 600"):
        auth.load_key(path)
    path.chmod(0o600)
    assert len(auth.load_key(path)) == 64
    path.write_bytes(b"short")
    with pytest.raises(AuthenticationError, match="at least 16"):
        auth.load_key(path)
    with pytest.raises(AuthenticationError, match="cannot be read"):
        auth.load_key(tmp_path / "absent")


class Drip:
    """A socket on which one byte comes at a time, each well within any time-out of its own; `now` goes on with each."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self.clock, self.got = clock, 0

    def recv_into(self, view: memoryview) -> int:
        self.clock.now += 1.0
        self.got += 1
        return 1

    def sendall(self, data: bytes) -> None:
        pass

    def settimeout(self, seconds: float) -> None:
        pass


@pytest.mark.parametrize("side", [auth.prove_as_server, auth.prove_as_client])
def test_who_sends_byte_after_byte_has_no_more_time_than_others(side, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(wire, "time", SimpleNamespace(monotonic=lambda: clock.now))
    drip = Drip(clock)
    with pytest.raises(DeadlineError):
        side(drip, KEY, wire.Deadline(5.0))
    assert drip.got == 5


def test_a_slow_stranger_gives_its_place_back(server, monkeypatch):
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 0.2)
    host, port = server.endpoint.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        auth._receive(sock, 8 + 32, wire.Deadline(PATIENCE_S))
        with contextlib.suppress(ConnectionError):
            while True:
                sock.sendall(b"x")
                sock.settimeout(0.02)
                with contextlib.suppress(TimeoutError):
                    if not sock.recv(1):
                        break
    until(lambda: not server._connections)
