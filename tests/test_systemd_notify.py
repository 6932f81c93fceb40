"""What systemd hears, over a real datagram socket."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from appliance.drivers.systemd import READY, STOPPING, WATCHDOG, Notices, Supervisor, status


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@appliance-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service_manager:
        service_manager.bind(address.replace("@", "\0"))
        service_manager.settimeout(5)
        yield address, service_manager


def test_systemd_hears_each_message(listener: tuple[str, socket.socket]) -> None:
    address, service_manager = listener
    with closing(Notices(address)) as notices:
        for messages in ((READY, status("serving")), (WATCHDOG,), (STOPPING,)):
            assert notices.tell(*messages)
            assert service_manager.recv(1000).decode() == "\n".join(messages)


def test_the_watchdog_is_fed_while_no_more_files_may_be_opened(listener: tuple[str, socket.socket]) -> None:
    address, service_manager = listener
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(Supervisor(address, 1.0)) as supervisor:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, former[1]))
        try:
            supervisor.alive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, former)
    assert service_manager.recv(1000).decode() == WATCHDOG


def test_a_status_is_one_line() -> None:
    assert status("no broker:\n connection refused\nREADY=1") == "STATUS=no broker: connection refused READY=1"


@pytest.mark.parametrize("address", [None, ""])
def test_without_systemd_nothing_happens(address: str | None) -> None:
    assert not Notices(address).tell(READY)


def test_a_socket_that_is_gone_is_survived(tmp_path: Path) -> None:
    for address in (str(tmp_path / "gone"), "/" + "x" * 200):
        with closing(Notices(address)) as notices:
            assert not notices.tell(READY)


def test_a_service_manager_that_does_not_read_never_blocks_us(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service_manager, closing(Notices(address)) as notices:
        service_manager.bind(address)
        heard = [notices.tell(WATCHDOG) for _ in range(1000)]
    assert heard[0]
    assert not heard[-1]
