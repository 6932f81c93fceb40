"""The mosquitto settings that we ship, in a real mosquitto: it accepts them, and they keep what they promise.

Everything twice: on the plain listener with accounts, and on the TLS listener with certificates, made as
docs/install.md tells.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from appliance import config, contract
from appliance.client import Answer, Camera
from appliance.config import Config
from appliance.contract import Address, Message
from appliance.drivers.broker import answers
from appliance.drivers.link import client_id
from appliance.drivers.mqtt import Door, DoorState
from appliance.tls import Certificates
from tests.conftest import program
from tests.kit_brokers import WAIT_SECONDS, until
from tests.kit_ports import free_ports

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "systemd"
ACCOUNTS = ("box1", "line1", "line2", "operator")
BROKER = "broker.plant.example"

pytestmark = pytest.mark.mosquitto


@dataclass
class Listener:
    """What one account hears: the topics so far, whether there was any, and whether the broker ended the link."""

    topics: list[str] = field(default_factory=list)
    heard: threading.Event = field(default_factory=threading.Event)
    lost: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Site:
    """One listener of the broker, and the certificates of who may enter; none where accounts have passwords."""

    port: int
    certificates: dict[str, Certificates]

    def options(self, account: str) -> list[str]:
        """Who we are, for mosquitto_pub."""
        if not self.certificates:
            return ["-u", account, "-P", "secret"]
        files = self.certificates[account]
        return ["--cafile", str(files.ca), "--cert", str(files.certificate), "--key", str(files.key)]

    def introduce(self, client: paho.Client, account: str) -> None:
        if self.certificates:
            client.tls_set_context(self.certificates[account].context())
        else:
            client.username_pw_set(account, "secret")

    @property
    def impostors(self) -> list[list[str]]:
        """Options of mosquitto_pub that must not suffice."""
        if not self.certificates:
            return [["-u", "line1", "-P", "wrong"], ["-u", "nobody", "-P", "secret"], []]
        return [self.options("line1")[:2], [*self.options("stranger")], ["-u", "line1", "-P", "secret"]]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Site]]:
    folder = tmp_path_factory.mktemp("mosquitto")
    made = _certificates(folder / "site")
    made["stranger"] = Certificates(made["box1"].ca, *_pair(_certificates(folder / "elsewhere")["line1"]))
    plain, secured = free_ports(2)
    sites = {"accounts": Site(plain, {}), "certificates": Site(secured, made)}
    settings = _here(folder, made[BROKER], sites)
    with (folder / "log").open("wb") as log:
        broker = subprocess.Popen([program("mosquitto") or "mosquitto", "-c", str(settings)], stdout=log, stderr=log)
        try:
            until(lambda: _is_listening(sites["accounts"].port, broker, folder / "log"))
            yield sites
        finally:
            broker.terminate()
            broker.wait(WAIT_SECONDS)


@pytest.fixture(params=["accounts", "certificates"])
def site(request: pytest.FixtureRequest, sites: dict[str, Site]) -> Site:
    return sites[request.param]


def test_the_largest_picture_passes_the_broker() -> None:
    limits = re.findall(r"(?m)^max_packet_size (\d+)", (FOLDER / "mosquitto.conf").read_text())
    assert int(limits[0]) >= config.load(FOLDER / "appliance.toml").limits.picture_bytes + 64_000


def test_nobody_enters_without_an_account(site: Site) -> None:
    topic = "coe/v1/plant/infer/line1/-/-/resistor-0603"
    assert _says(site, "line1", topic) == 0
    for impostor in site.impostors:
        assert _publish(site, impostor, topic) != 0


def test_nobody_can_take_the_client_id_of_the_box(site: Site) -> None:
    with _listening(site, "box1", "coe/v1/plant/#") as box:
        for thief in ("line1", "line2", "operator"):
            _says(site, thief, "coe/v1/plant/box/box1/status", client_id="box1")
            _says(site, thief, "coe/v1/plant/box/box1/status", client_id=client_id(Config()))
        _says(site, "line1", "coe/v1/plant/infer/line1/-/-/resistor-0603", client_id="box1")
        assert box.heard.wait(WAIT_SECONDS)
        assert not box.lost.is_set()


def test_a_line_publishes_its_own_pictures_only(site: Site) -> None:
    with _listening(site, "box1", "coe/v1/plant/infer/+/+/+/+") as box:
        _says(site, "line2", "coe/v1/plant/infer/line1/-/-/resistor-0603")
        _says(site, "line2", "coe/v1/plant/infer/line2/-/-/resistor-0603")
        assert box.heard.wait(WAIT_SECONDS)
        assert box.topics == ["coe/v1/plant/infer/line2/-/-/resistor-0603"]


def test_a_line_hears_its_own_verdicts_only(site: Site) -> None:
    with _listening(site, "line2", "coe/v1/plant/result/#") as line:
        _says(site, "box1", "coe/v1/plant/result/line1/-/-/resistor-0603")
        _says(site, "box1", "coe/v1/plant/result/line2/-/-/resistor-0603")
        assert line.heard.wait(WAIT_SECONDS)
        assert line.topics == ["coe/v1/plant/result/line2/-/-/resistor-0603"]


def test_a_line_hears_the_replies_that_the_box_publishes_below_its_name(site: Site) -> None:
    prefix = config.load(FOLDER / "appliance.toml").mqtt.reply_prefix
    assert prefix is not None
    with _listening(site, "line2", f"{prefix}/#") as line:
        _says(site, "line1", f"{prefix}/line2/forged")
        _says(site, "box1", f"{prefix}/line1/job-6")
        _says(site, "box1", f"{prefix}/line2/job-7")
        assert line.heard.wait(WAIT_SECONDS)
        assert line.topics == [f"{prefix}/line2/job-7"]


def test_only_the_operator_commands_the_box(site: Site) -> None:
    with _listening(site, "box1", "coe/v1/plant/box/box1/cmd/+") as box:
        _says(site, "line1", "coe/v1/plant/box/box1/cmd/evict")
        _says(site, "operator", "coe/v1/plant/box/box1/cmd/load")
        assert box.heard.wait(WAIT_SECONDS)
        assert box.topics == ["coe/v1/plant/box/box1/cmd/load"]


def test_only_the_operator_hears_what_the_box_answers_to_a_command(site: Site) -> None:
    answer, status = "coe/v1/plant/box/box1/cmd/evict/ack", "coe/v1/plant/box/box1/status"
    with _listening(site, "operator", answer) as operator, _listening(site, "line2", "coe/v1/plant/box/box1/#") as line:
        _says(site, "line1", answer)
        assert _says(site, "box1", answer) == _says(site, "box1", status) == 0
        assert operator.heard.wait(WAIT_SECONDS)
        assert line.heard.wait(WAIT_SECONDS)
        assert (operator.topics, line.topics) == ([answer], [status])


def test_who_follows_the_documentation_gets_a_verdict(
    sites: dict[str, Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = sites["certificates"]
    box = config.load(_documented_settings(site, tmp_path, monkeypatch))
    door = Door(
        box,
        deliver=lambda message: _answer(door, message, box),
        published=lambda token: None,
        returned=lambda token, why: None,
        state_changed=lambda state: None,
    )
    answers: list[Answer] = []
    camera = Camera("localhost", site.port, line="line1", certificates=site.certificates["line1"])
    camera.on_answer(answers.append)
    with door, camera:
        until(lambda: door.state is DoorState.READY)
        name = camera.publish(part="moulded-figure", picture=b"picture")
        assert camera.wait(WAIT_SECONDS)
    assert [answer.request_id for answer in answers] == [name]


def _answer(door: Door, message: Message, box: Config) -> None:
    """As the box would."""
    body = b'{"request_id": "%s"}' % contract.request_id(message.topic, message.payload, {}).encode()
    door.publish(Address.parse(message.topic, box).result_topic(box), body)
    door.acknowledge(message)


def _documented(language: str, word: str) -> str:
    """The code block of docs/install.md in which this word stands."""
    blocks = re.findall(rf"(?ms)^```{language}\n(.*?)^```", (ROOT / "docs" / "install.md").read_text("utf-8"))
    (block,) = (block for block in blocks if word in block)
    return str(block).replace(BROKER, "localhost")


def _certificates(folder: Path) -> dict[str, Certificates]:
    """What the documentation's commands make."""
    folder.mkdir()
    made = subprocess.run(["sh", "-ec", _documented("sh", "openssl")], cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    here = folder / "certificates"
    names = {BROKER: "localhost", **{name: name for name in ACCOUNTS}}
    return {
        who: Certificates(here / "ca.crt", here / f"{name}.crt", here / f"{name}.key") for who, name in names.items()
    }


def _documented_settings(site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """appliance.toml as documented, with this site's port; the credentials as systemd would show them."""
    box = site.certificates["box1"]
    given = {"mqtt-ca": box.ca, "mqtt-certificate": box.certificate, "mqtt-key": box.key}
    drop_in = (FOLDER / "credentials.conf").read_text()
    assert re.findall(r"(?m)^LoadCredential=([\w-]+):", drop_in) == list(given)
    for name, path in given.items():
        shutil.copy(str(path), folder / name)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    settings = folder / "appliance.toml"
    settings.write_text(_documented("toml", "$CREDENTIALS_DIRECTORY").replace("8883", str(site.port)))
    return settings


def _pair(certificates: Certificates) -> tuple[Path | None, Path | None]:
    return certificates.certificate, certificates.key


def _here(folder: Path, broker: Certificates, sites: dict[str, Site]) -> Path:
    """The shipped settings with this machine's files and ports."""
    passwords = folder / "appliance.passwd"
    passwords.touch(mode=0o600)
    for account in ACCOUNTS:
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), account, "secret"], check=True)
    rules = folder / "appliance.acl"
    rules.write_text((FOLDER / "mosquitto.acl").read_text())
    rules.chmod(0o644)
    (folder / "certs").mkdir()
    for name, path in (("ca.crt", broker.ca), ("broker.crt", broker.certificate), ("broker.key", broker.key)):
        shutil.copy(str(path), folder / "certs" / name)
    text = (FOLDER / "mosquitto.conf").read_text().replace("/etc/mosquitto/", f"{folder}/")
    text = text.replace("listener 1883 ", f"listener {sites['accounts'].port} ")
    text = text.replace("listener 8883", f"listener {sites['certificates'].port} 127.0.0.1")
    settings = folder / "mosquitto.conf"
    # As root, mosquitto would become a user that cannot read this folder. persistence_location is the distribution's.
    settings.write_text(f"{text}\npersistence_location {folder}/\n{'user root' if os.geteuid() == 0 else ''}\n")
    return settings


def _says(site: Site, account: str, topic: str, client_id: str = "") -> int:
    return _publish(site, [*site.options(account), *(["-i", client_id] if client_id else [])], topic)


def _publish(site: Site, who: list[str], topic: str) -> int:
    """Publish and wait for the broker's answer; the exit code says whether it let us in."""
    publish = ["mosquitto_pub", "-V", "5", "-h", "localhost", "-p", str(site.port), *who, "-q", "1", "-t", topic]
    return subprocess.run([*publish, "-m", "x"], capture_output=True, timeout=WAIT_SECONDS).returncode


@contextmanager
def _listening(site: Site, account: str, topic: str) -> Iterator[Listener]:
    """A client of this account that has subscribed."""
    listener, subscribed = Listener(), threading.Event()

    def on_connect(*_: Any) -> None:
        client.subscribe(topic, qos=1)

    def on_message(_client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        listener.topics.append(message.topic)
        listener.heard.set()

    client = paho.Client(CallbackAPIVersion.VERSION2, account)
    site.introduce(client, account)
    client.on_connect, client.on_message = on_connect, on_message
    client.on_subscribe = lambda *_: subscribed.set()
    client.on_disconnect = lambda *_: listener.lost.set()
    client.connect("localhost", site.port)
    client.loop_start()
    try:
        assert subscribed.wait(WAIT_SECONDS)
        yield listener
    finally:
        client.disconnect()
        client.loop_stop()


def _is_listening(port: int, broker: subprocess.Popen[bytes], log: Path) -> bool:
    assert broker.poll() is None, f"mosquitto refuses our settings: {log.read_text()}"
    return answers("127.0.0.1", port, "box1", "secret")
