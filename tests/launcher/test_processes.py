"""Ports that a cluster takes."""

from __future__ import annotations

import socket

import pytest

from vllm_loraserve.cli import main
from vllm_loraserve.launcher import processes


def test_ports_that_are_spoken_for_are_left_out() -> None:
    (first,) = processes.free_ports(1, 23000)
    assert processes.free_ports(1, first, besides=(first,))[0] > first


@pytest.mark.parametrize("first", [32767, 40000])
def test_a_router_port_in_the_range_of_outgoing_connections_has_instances_after_it(first: int) -> None:
    ports = processes.free_ports(2, first + 1)
    assert len(set(ports)) == 2
    assert min(ports) > first


def test_too_few_free_ports_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "is_free", lambda port: False)
    with pytest.raises(OSError, match="no 2 free ports from 65000 to 65535"):
        processes.free_ports(2, 65000)


@pytest.mark.parametrize("arguments", [["up", "x"], ["demo"]])
@pytest.mark.parametrize("port", ["0", "70000"])
def test_a_number_that_is_no_port_is_told(arguments: list[str], port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--port", port])
    assert ended.value.code == 2
    assert f"{port} is no port from 1 to 65535" in capsys.readouterr().err


def test_a_name_with_an_address_of_a_family_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    sound = socket.socket

    def without_ipv6(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError("Address family not supported by protocol")
        return sound(family, kind)

    monkeypatch.setattr(processes.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(processes.socket, "socket", without_ipv6)
    assert processes.listen_error("localhost", 0) is None
