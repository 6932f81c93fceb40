"""Ports for tests: nobody else's, and not given out twice."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit_ports import HOST, deaf_port, free_port, free_ports

ASKING = "from tests.kit_ports import free_ports; print(*free_ports(50), flush=True); input()"


def test_ports_are_different_free_and_below_those_of_outgoing_connections() -> None:
    ports = [*free_ports(20), *(free_port() for _ in range(20))]
    assert len(set(ports)) == 40
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not any(lowest <= port <= highest for port in ports)
    for port in ports:
        with socket.socket() as taken:
            taken.bind((HOST, port))


def test_processes_beside_each_other_never_get_the_same() -> None:
    command = [sys.executable, "-c", ASKING]
    others = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = free_ports(50)
    for other in others:
        assert other.stdout is not None
        found += map(int, other.stdout.readline().split())
    for other in others:
        other.communicate("\n", timeout=60)
    assert len(set(found)) == 200


def test_nobody_can_be_reached_at_a_deaf_port_and_nobody_can_take_it() -> None:
    with deaf_port() as port:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port), 10)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, port))
