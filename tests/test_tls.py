"""Links with TLS to a real mosquitto: what passes, and what is said of certificates that do not."""

from __future__ import annotations

import logging
import queue
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import pytest

from appliance import client
from appliance.config import Config
from appliance.contract import Message
from appliance.drivers import mqtt
from appliance.drivers.link import filters
from appliance.drivers.mqtt import Door, DoorState
from appliance.errors import BrokerError, CertificateError
from appliance.tls import Certificates
from tests.kit_brokers import WAIT_SECONDS, Mosquitto, config_for, until
from tests.kit_certificates import Authority, tls_listener
from tests.kit_ports import free_ports

pytestmark = pytest.mark.mosquitto


@dataclass(frozen=True)
class Site:
    """One mosquitto with a listener for each certificate that a broker may have, and a box's certificate."""

    authority: Authority
    stranger: Authority
    broker: Mosquitto
    ports: dict[str, int]
    box: Certificates


@dataclass
class Listening:
    """What the kit wants to know of a broker."""

    port: int


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("tls")
    authority, stranger = Authority(folder / "plant"), Authority(folder / "stranger")
    brokers = {
        "good": authority.issue("broker"),
        "named otherwise": authority.issue("other", host="DNS:broker.plant.example"),
        "expired": authority.issue("old", begins_days=-9, ends_days=-1),
        "of tomorrow": authority.issue("early", begins_days=1),
        "of a stranger": replace(stranger.issue("foreign"), ca=authority.ca),
    }
    ports = dict(zip(brokers, free_ports(len(brokers)), strict=True))
    authority.revoke(authority.issue("thief"))
    crl = f"crlfile {authority.revoked}"
    lines = [line for name in brokers for line in tls_listener(ports[name], brokers[name], crl)]
    broker = Mosquitto(folder / "mosquitto", *lines)
    broker.start()
    yield Site(authority, stranger, broker, ports, authority.issue("box1"))
    broker.stop()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "SHORTEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(mqtt, "LONGEST_PAUSE_SECONDS", 0.1)


def test_pictures_larger_than_a_record_pass(site: Site) -> None:
    sizes = [1, 100, 16_384, 20_000, 500_000, *[30] * 40]
    with opened(_config(site)) as (door, heard), _camera(site) as camera:
        sent = {camera.publish(part="R1", picture=bytes([n]) * size) for n, size in enumerate(sizes)}
        for size in sizes:
            message = heard.get(timeout=WAIT_SECONDS)
            assert len(message.payload) == size
            door.acknowledge(message)
        until(lambda: door.counts["acknowledged"] == len(sent))


def test_pictures_that_come_in_one_record_are_all_heard(site: Site) -> None:
    """What TLS has read ahead no selector tells: without care all but the first would wait for the next record, and
    here none comes. The records of mosquitto end with its packets, so the broker is one of our own."""
    pictures = [b"first", b"second", b"third"]
    heard: queue.Queue[Message] = queue.Queue()
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as broker:
        silent = _config(site, port=server.getsockname()[1], protocol="3.1.1", keepalive_seconds=600)
        broker.submit(_send_in_one_record, server, site.authority.issue("broker"), pictures)
        with _new_door(silent, heard):
            assert [heard.get(timeout=WAIT_SECONDS).payload for _ in pictures] == pictures


def _send_in_one_record(server: socket.socket, certificates: Certificates, pictures: Sequence[bytes]) -> None:
    """A broker for one box, which it sends these pictures at QoS 0; until the box leaves."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate or "", certificates.key)
    topic = b"coe/v1/plant/infer/line1/-/-/R1"
    packets = [bytes((0x30, 2 + len(topic) + len(content), 0, len(topic))) + topic + content for content in pictures]
    plain, _ = server.accept()
    with context.wrap_socket(plain, server_side=True) as box, box.makefile("rb") as said:
        _packet(said)
        box.sendall(b"\x20\x02\x00\x00")
        subscribed = _packet(said)
        granted = bytes([1]) + bytes(len(filters(Config())) - 1)
        box.sendall(bytes((0x90, 2 + len(granted))) + subscribed[:2] + granted)
        box.sendall(b"".join(packets))
        said.read()


def _packet(said: BinaryIO) -> bytes:
    """An MQTT packet without its fixed header."""
    said.read(1)
    size = shift = 0
    while (byte := said.read(1)[0]) & 0x80:
        size, shift = size | (byte & 0x7F) << shift, shift + 7
    return said.read(size | byte << shift)


@pytest.mark.parametrize(
    ("broker", "says"),
    [
        ("named otherwise", "not for 127.0.0.1 (use the host name that it bears"),
        ("expired", "has expired (renew it at the broker, or set the clock"),
        ("of tomorrow", "not valid yet (set the clock"),
        ("of a stranger", "signed by nobody in ca_file (put the certificate of the authority"),
    ],
)
def test_a_broker_that_cannot_be_trusted_is_not_spoken_to_and_it_is_said_why(
    site: Site, broker: str, says: str
) -> None:
    with trying(_config(site, port=site.ports[broker])) as door:
        assert says in _failure(door)
    with pytest.raises(CertificateError) as caught, _camera(site, broker):
        pass
    assert says in str(caught.value)


def test_what_the_broker_has_against_our_certificate_is_said(site: Site) -> None:
    revoked = Certificates(*(site.authority.ca.with_name(f"thief.{kind}") for kind in ("crt", "crt", "key")))
    ours = {
        "wants a certificate of ours (set certificate_file": Certificates(site.authority.ca),
        "our certificate has expired": site.authority.issue("past", begins_days=-9, ends_days=-1),
        "our certificate is revoked": replace(revoked, ca=site.authority.ca),
        "does not know who signed our certificate": replace(site.stranger.issue("box1"), ca=site.authority.ca),
    }
    for says, certificates in ours.items():
        with trying(_config(site, certificates)) as door:
            assert says in _failure(door)
        with pytest.raises(BrokerError) as caught, _camera(site, certificates=certificates):
            pass
        assert says in str(caught.value)


def test_a_listener_without_tls_is_recognised(site: Site) -> None:
    with trying(_config(site, port=site.broker.port)) as door:
        assert "is this the port of its TLS listener?" in _failure(door)


def test_a_tls_listener_that_hangs_up_on_plain_text_is_suspected(site: Site) -> None:
    with trying(config_for(Listening(site.ports["good"]))) as door:
        assert "does this port want TLS, mqtt.ca_file?" in _failure(door)


def test_each_refusal_is_logged_once_and_followed_by_a_pause(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    states = list[DoorState]()
    config = _config(site, port=site.ports["expired"])
    with caplog.at_level(logging.WARNING), _new_door(config, queue.Queue(), states.append):
        until(lambda: states.count(DoorState.WAITING) >= 4)
    said = [record.getMessage() for record in caplog.records if "expired" in record.getMessage()]
    assert len(said) == states.count(DoorState.WAITING)
    assert all(line.startswith("mqtt no_link ") and "retry_seconds=" in line for line in said)


def test_a_renewed_certificate_is_used_without_a_restart(site: Site, tmp_path: Path) -> None:
    ours = Certificates(site.authority.ca, tmp_path / "box.crt", tmp_path / "box.key")
    _install(site.authority.issue("aged", begins_days=-9, ends_days=-1), ours)
    with trying(_config(site, ours)) as door:
        assert "expired" in _failure(door)
        (tmp_path / "box.key").unlink()  # half replaced
        until(lambda: "cannot be read" in door.detail)
        _install(site.box, ours)
        until(lambda: door.state is DoorState.READY)


def test_the_mosquitto_client_and_the_box_understand_each_other(site: Site) -> None:
    line = site.authority.issue("line1")
    files = ["--cafile", str(line.ca), "--cert", str(line.certificate), "--key", str(line.key)]
    topic = "coe/v1/plant/infer/line1/-/-/R1"
    publish = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(site.ports["good"]), "-q", "1", "-t", topic, "-m", "x"]
    with opened(_config(site)) as (_, heard):
        subprocess.run([*publish, *files], check=True)
        assert heard.get(timeout=WAIT_SECONDS).topic == topic


def test_files_that_cannot_be_used_are_named_with_the_remedy(site: Site, tmp_path: Path) -> None:
    ours = Certificates(tmp_path / "ca", tmp_path / "certificate", tmp_path / "key")
    steps: dict[str, Callable[[], object]] = {
        f"ca_file {ours.ca} cannot be read: No such file": lambda: None,
        f"ca_file {ours.ca} holds no certificate (write it as PEM)": lambda: ours.ca.write_text("-"),
        f"certificate_file {ours.certificate} cannot be read": lambda: _install(site.box, ours, "ca"),
        f"key_file {ours.key} cannot be read": lambda: _install(site.box, ours, "ca", "certificate"),
        f"key_file {ours.key} is open to everybody (chmod o-rwx": lambda: _open_key(site.box, ours),
        f"key_file {ours.key} is not the key of": lambda: _install(site.authority.issue("else"), ours, "key"),
        "the key without a passphrase": lambda: _encrypt(ours),
    }
    for says, spoil in steps.items():
        spoil()
        with pytest.raises(CertificateError) as caught:
            ours.context()
        assert says in str(caught.value)
        with pytest.raises(CertificateError):
            _new_door(_config(site, ours), queue.Queue())


@contextmanager
def opened(config: Config) -> Iterator[tuple[Door, queue.Queue[Message]]]:
    heard: queue.Queue[Message] = queue.Queue()
    with _new_door(config, heard) as door:
        until(lambda: door.state is DoorState.READY)
        yield door, heard


@contextmanager
def trying(config: Config) -> Iterator[Door]:
    with _new_door(config, queue.Queue()) as door:
        yield door


def _new_door(
    config: Config, heard: queue.Queue[Message], state_changed: Callable[[DoorState], None] = lambda state: None
) -> Door:
    return Door(
        config,
        deliver=heard.put,
        published=lambda token: None,
        returned=lambda token, why: None,
        state_changed=state_changed,
    )


def _failure(door: Door) -> str:
    """What it says while it waits to try again; before and after that it says nothing."""
    return until(lambda: door.detail)


def _config(
    site: Site,
    certificates: Certificates | None = None,
    port: int | None = None,
    protocol: Literal["auto", "3.1.1"] = "auto",
    keepalive_seconds: int = 2,
) -> Config:
    ours = certificates or site.box
    return config_for(
        Listening(port or site.ports["good"]),
        ca_file=ours.ca,
        certificate_file=ours.certificate,
        key_file=ours.key,
        protocol=protocol,
        keepalive_seconds=keepalive_seconds,
    )


def _camera(site: Site, broker: str = "good", certificates: Certificates | None = None) -> client.Camera:
    ours = certificates or site.authority.issue("line1")
    return client.Camera("127.0.0.1", site.ports[broker], line="line1", certificates=ours)


def _install(source: Certificates, target: Certificates, *names: str) -> None:
    for name in names or ("certificate", "key"):
        shutil.copy(getattr(source, name), getattr(target, name))


def _open_key(source: Certificates, target: Certificates) -> None:
    _install(source, target, "key")
    assert target.key is not None
    target.key.chmod(0o604)


def _encrypt(target: Certificates) -> None:
    assert target.key is not None
    encrypt = ["openssl", "pkey", "-in", str(target.key), "-aes256", "-passout", "pass:secret"]
    target.key.write_bytes(subprocess.run(encrypt, check=True, capture_output=True).stdout)
