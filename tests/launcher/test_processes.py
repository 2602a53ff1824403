"""Ports that a cluster takes."""

from __future__ import annotations

import pytest

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
