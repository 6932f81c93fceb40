"""The embedded broker: it is there when it says so, keeps what it confirmed, and never outlives its parent."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from appliance.drivers import broker as brokers
from appliance.drivers.broker import Broker, answers, find_server
from appliance.errors import BrokerError
from tests.kit_brokers import Camera, until
from tests.kit_ports import free_port

PICTURE_BYTES = 1_000_000


def test_a_free_port_is_none_that_an_outgoing_connection_may_be_given() -> None:
    least, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    for _ in range(100):
        port = brokers.free_port()
        assert 1024 <= port < int(least)
        with socket.socket() as listens:
            listens.bind(("127.0.0.1", port))


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Broker]:
    with Broker(tmp_path / "broker", free_port(), picture_bytes=PICTURE_BYTES, ack_wait_seconds=1.0) as broker:
        yield broker


def test_it_answers_mqtt_as_soon_as_start_returns(embedded: Broker) -> None:
    assert embedded.is_alive
    assert answers("127.0.0.1", embedded.port)


def test_it_listens_on_loopback_only(embedded: Broker) -> None:
    listening = _listening_addresses(embedded.pid or 0)
    assert f"127.0.0.1:{embedded.port}" in listening
    assert all(address.startswith("127.0.0.1:") for address in listening)


def test_a_port_in_use_is_named_with_its_remedy(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"port {port} .*mqtt\.port"):
            Broker(tmp_path, port, picture_bytes=PICTURE_BYTES).start()


def test_a_missing_wheel_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BrokerError, match=r"pip install coe-appliance\[broker\]"):
        find_server()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BrokerError, match=r"file/broker cannot be written"):
        Broker(tmp_path / "file" / "broker", free_port(), picture_bytes=PICTURE_BYTES).start()


def test_pictures_beyond_what_the_server_can_carry_are_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r"limits\.picture_bytes"):
        Broker(tmp_path, free_port(), picture_bytes=brokers.PAYLOAD_LIMIT_BYTES).start()


def test_a_server_that_cannot_start_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r"nats-server ended with code 1: .*invalid value -5"):
        Broker(tmp_path, free_port(), picture_bytes=1, max_ack_pending=-5).start()


def test_the_largest_picture_passes_and_a_larger_one_does_not(embedded: Broker) -> None:
    topic = "coe/v1/plant/infer/line1/-/-/part"
    with Camera(embedded.port, topic, name="listener") as listener, Camera(embedded.port) as camera:
        camera.publish_confirmed(topic, b"x" * PICTURE_BYTES)
        assert len(listener.hear().payload) == PICTURE_BYTES
        camera.publish(topic, b"x" * (PICTURE_BYTES + 200_000), qos=0)
        camera.publish_confirmed(topic, b"after the broken link")
        assert listener.hear().payload == b"after the broken link"


def test_only_who_knows_the_password_may_enter(tmp_path: Path) -> None:
    with Broker(tmp_path, free_port(), picture_bytes=1, username="box", password='se"cret\\') as broker:
        assert answers("127.0.0.1", broker.port, "box", 'se"cret\\')
        assert not answers("127.0.0.1", broker.port, "box", "guess")
        assert not answers("127.0.0.1", broker.port)
        assert (tmp_path / "nats-server.conf").stat().st_mode & 0o077 == 0


def test_it_says_when_it_died_and_can_be_started_again_on_its_port(embedded: Broker) -> None:
    os.kill(embedded.pid or 0, signal.SIGKILL)
    until(lambda: not embedded.is_alive)
    assert not answers("127.0.0.1", embedded.port)
    embedded.start()
    assert answers("127.0.0.1", embedded.port)


def test_it_cannot_be_started_twice(embedded: Broker) -> None:
    with pytest.raises(BrokerError, match="already runs"):
        embedded.start()


def test_what_it_confirmed_survives_its_death(embedded: Broker) -> None:
    topic = "coe/v1/plant/infer/line1/-/-/part"
    with Camera(embedded.port, topic, name="listener", clean=False):
        pass  # leaves a session behind that pictures are kept for
    with Camera(embedded.port) as camera:
        pictures = [os.urandom(10_000) for _ in range(20)]
        camera.wait_confirmed(*[camera.publish(topic, picture) for picture in pictures])
        os.kill(embedded.pid or 0, signal.SIGKILL)
    until(lambda: not embedded.is_alive)
    embedded.start()
    with Camera(embedded.port, topic, name="listener", clean=False) as listener:
        unheard = set(pictures)
        while unheard:
            unheard.discard(listener.hear().payload)


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    port = free_port()
    program = (
        "import sys, pathlib\n"
        "from appliance.drivers.broker import Broker\n"
        f"broker = Broker(pathlib.Path({str(tmp_path)!r}), {port}, picture_bytes=1)\n"
        "broker.start()\n"
        "print(broker.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        assert answers("127.0.0.1", port)
        parent.kill()
    until(lambda: not _runs(child))
    assert not answers("127.0.0.1", port)


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def _listening_addresses(pid: int) -> list[str]:
    """Listening TCP sockets of a process, as address:port, from /proc."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            target = os.readlink(entry)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table, width in (("tcp", 8), ("tcp6", 32)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, port = fields[1].split(":")
                assert len(host) == width
                raw = bytes.fromhex(host)
                name = socket.inet_ntoa(raw[::-1]) if width == 8 else f"[{host}]"
                found.append(f"{name}:{int(port, 16)}")
    return found
