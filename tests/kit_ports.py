"""Ports on the loopback for brokers: none twice, and none that another test process or an outgoing connection may get.

A port from the kernel (`bind` to 0) is anybody's again once its socket is closed, and lies where outgoing connections
take theirs: beside a second worker a broker that comes later, or comes back, finds it taken. So each process owns a
range outside of that, by a name that the kernel gives to one process at a time and takes back however that ends.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

HOST = "127.0.0.1"
RANGE = 400
_RANGES = range(10_000, 65_000, RANGE)


def free_port() -> int:
    [port] = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    """So many ports on which nobody listens, all held until the last one is chosen."""
    with ExitStack() as held:
        return [held.enter_context(_bound()).getsockname()[1] for _ in range(count)]


@contextmanager
def deaf_port() -> Iterator[int]:
    """A port that refuses connections as long as it is lent: it is taken, and nobody listens there."""
    with _bound() as taken:
        yield taken.getsockname()[1]


def _bound() -> socket.socket:
    while True:
        taken = socket.socket()
        try:
            taken.bind((HOST, next(_own_range().ports)))
            return taken
        except OSError:  # somebody who is no test is there
            taken.close()


@dataclass(frozen=True)
class _Range:
    """Its ports in turn, so that each rests as long as can be. The owner is what makes them ours."""

    owner: socket.socket
    ports: Iterator[int]


@cache
def _own_range() -> _Range:
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    outside = [first for first in _RANGES if first + RANGE <= lowest or first > highest]
    for first in outside or _RANGES:
        owner = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            owner.bind(f"\0appliance-tests-ports-{first}")
        except OSError:
            owner.close()
        else:
            return _Range(owner, cycle(range(first, first + RANGE)))
    raise RuntimeError("all ranges of ports are taken: is a test process left over for each?")
