"""The mosquitto settings that we ship, in a real mosquitto: it accepts them, and they keep what they promise."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from appliance import config
from tests.conftest import program

FOLDER = Path(__file__).parent.parent / "systemd"
ACCOUNTS = ("box1", "line1", "line2", "operator")
WAIT_SECONDS = 10

pytestmark = pytest.mark.mosquitto


@dataclass
class Listener:
    """What one account hears: the topics so far, whether there was any, and whether the broker ended the link."""

    topics: list[str] = field(default_factory=list)
    heard: threading.Event = field(default_factory=threading.Event)
    lost: threading.Event = field(default_factory=threading.Event)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("mosquitto")
    free = _free_port()
    settings = _here(folder, free)
    with (folder / "log").open("wb") as log:
        broker = subprocess.Popen([program("mosquitto") or "mosquitto", "-c", str(settings)], stdout=log, stderr=log)
        try:
            _wait_until_listening(free, broker, folder / "log")
            yield free
        finally:
            broker.terminate()
            broker.wait(WAIT_SECONDS)


def test_the_largest_picture_passes_the_broker() -> None:
    limits = re.findall(r"(?m)^max_packet_size (\d+)", (FOLDER / "mosquitto.conf").read_text())
    assert int(limits[0]) >= config.load(FOLDER / "appliance.toml").limits.picture_bytes + 64_000


def test_nobody_enters_without_an_account(port: int) -> None:
    assert _says(port, "line1", "coe/v1/plant/infer/line1/-/-/resistor-0603") == 0
    assert _says(port, "line1", "coe/v1/plant/infer/line1/-/-/resistor-0603", password="wrong") != 0


def test_a_line_cannot_take_the_client_id_of_the_box(port: int) -> None:
    with _listening(port, "box1", "coe/v1/plant/infer/+/+/+/+") as box:
        _says(port, "line1", "coe/v1/plant/infer/line1/-/-/resistor-0603", client_id="box1")
        assert box.heard.wait(WAIT_SECONDS)
        assert not box.lost.is_set()


def test_a_line_publishes_its_own_pictures_only(port: int) -> None:
    with _listening(port, "box1", "coe/v1/plant/infer/+/+/+/+") as box:
        _says(port, "line2", "coe/v1/plant/infer/line1/-/-/resistor-0603")
        _says(port, "line2", "coe/v1/plant/infer/line2/-/-/resistor-0603")
        assert box.heard.wait(WAIT_SECONDS)
        assert box.topics == ["coe/v1/plant/infer/line2/-/-/resistor-0603"]


def test_a_line_hears_its_own_verdicts_only(port: int) -> None:
    with _listening(port, "line2", "coe/v1/plant/result/#") as line:
        _says(port, "box1", "coe/v1/plant/result/line1/-/-/resistor-0603")
        _says(port, "box1", "coe/v1/plant/result/line2/-/-/resistor-0603")
        assert line.heard.wait(WAIT_SECONDS)
        assert line.topics == ["coe/v1/plant/result/line2/-/-/resistor-0603"]


def test_a_line_hears_the_replies_that_the_box_publishes_below_its_name(port: int) -> None:
    prefix = config.load(FOLDER / "appliance.toml").mqtt.reply_prefix
    assert prefix is not None
    with _listening(port, "line2", f"{prefix}/#") as line:
        _says(port, "line1", f"{prefix}/line2/forged")
        _says(port, "box1", f"{prefix}/line1/job-6")
        _says(port, "box1", f"{prefix}/line2/job-7")
        assert line.heard.wait(WAIT_SECONDS)
        assert line.topics == [f"{prefix}/line2/job-7"]


def test_only_the_operator_commands_the_box(port: int) -> None:
    with _listening(port, "box1", "coe/v1/plant/box/box1/cmd/+") as box:
        _says(port, "line1", "coe/v1/plant/box/box1/cmd/evict")
        _says(port, "operator", "coe/v1/plant/box/box1/cmd/reload")
        assert box.heard.wait(WAIT_SECONDS)
        assert box.topics == ["coe/v1/plant/box/box1/cmd/reload"]


def _here(folder: Path, port: int) -> Path:
    """The shipped settings with this machine's files and port; the TLS listener's lines need a site's certificates."""
    passwords = folder / "appliance.passwd"
    passwords.touch(mode=0o600)
    for account in ACCOUNTS:
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), account, "secret"], check=True)
    rules = folder / "appliance.acl"
    rules.write_text((FOLDER / "mosquitto.acl").read_text())
    rules.chmod(0o644)
    text = (FOLDER / "mosquitto.conf").read_text().split("# On the plant network")[0]
    text = text.replace("/etc/mosquitto/", f"{folder}/").replace("listener 1883 ", f"listener {port} ")
    settings = folder / "mosquitto.conf"
    # As root, mosquitto would become a user that cannot read this folder. persistence_location is the distribution's.
    settings.write_text(f"{text}\npersistence_location {folder}/\n{'user root' if os.geteuid() == 0 else ''}\n")
    return settings


def _says(port: int, account: str, topic: str, password: str = "secret", client_id: str = "") -> int:
    """Publish and wait for the broker's answer; the exit code says whether it let us in."""
    who = ["-u", account, "-P", password, *(["-i", client_id] if client_id else [])]
    publish = ["mosquitto_pub", "-V", "5", "-p", str(port), *who, "-q", "1", "-t", topic, "-m", "x"]
    return subprocess.run(publish, capture_output=True, timeout=WAIT_SECONDS).returncode


@contextmanager
def _listening(port: int, account: str, topic: str) -> Iterator[Listener]:
    """A client of this account that has subscribed."""
    listener, subscribed = Listener(), threading.Event()

    def on_connect(*_: Any) -> None:
        client.subscribe(topic, qos=1)

    def on_message(_client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        listener.topics.append(message.topic)
        listener.heard.set()

    client = paho.Client(CallbackAPIVersion.VERSION2, account)
    client.username_pw_set(account, "secret")
    client.on_connect, client.on_message = on_connect, on_message
    client.on_subscribe = lambda *_: subscribed.set()
    client.on_disconnect = lambda *_: listener.lost.set()
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        assert subscribed.wait(WAIT_SECONDS)
        yield listener
    finally:
        client.disconnect()
        client.loop_stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_listening(port: int, broker: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        assert broker.poll() is None, f"mosquitto refuses our settings: {log.read_text()}"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except ConnectionRefusedError:
            continue
        return
    pytest.fail(f"mosquitto does not listen: {log.read_text()}")
