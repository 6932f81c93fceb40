"""Real brokers on free loopback ports, and a camera to talk to them; for every test that needs MQTT.

    def test_something(broker: AnyBroker) -> None:      # runs once with nats-server, once with mosquitto
        config = config_for(broker)
        with Camera(broker.port) as camera: ...

Import the fixture `broker` (or `nats`, `mosquitto`) into the test's module. Nothing here sleeps for luck: `until` and
the queues wait for a condition, with a deadline.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import pytest
from paho.mqtt.client import Client, ConnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from appliance.config import Box, Config, Limits, Mqtt
from appliance.drivers.broker import Broker
from tests.conftest import program
from tests.kit_ports import free_port

T = TypeVar("T")
WAIT_SECONDS = 60.0


def until(condition: Callable[[], T], seconds: float = WAIT_SECONDS) -> T:
    """The condition's first true value. Fails the test when there is none in time."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < ends, "the condition did not come true in time"
        threading.Event().wait(0.005)
    return value


class HasPort(Protocol):
    port: int


class AnyBroker(Protocol):
    """What a test may do with a broker of either kind. `start` again keeps port and files."""

    name: str
    port: int

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""

    def freeze(self) -> None:
        """SIGSTOP: it keeps its connections and says nothing."""

    def thaw(self) -> None: ...


class Nats:
    """The embedded broker, with a short redelivery time."""

    name = "nats"

    def __init__(self, folder: Path, *, picture_bytes: int = 1_000_000, ack_wait_seconds: float = 1.0) -> None:
        self.port = free_port()
        self._broker = Broker(
            folder, self.port, picture_bytes=picture_bytes, ack_wait_seconds=ack_wait_seconds, max_ack_pending=64
        )

    def start(self) -> None:
        self._broker.start()

    def stop(self) -> None:
        self._broker.stop()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        until(lambda: not self._broker.is_alive)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        assert self._broker.pid is not None
        return self._broker.pid

    def _signal(self, number: signal.Signals) -> None:
        if self._broker.is_alive:
            os.kill(self.pid, number)


class Mosquitto:
    """mosquitto with persistence. `settings` are further lines of its configuration."""

    name = "mosquitto"

    def __init__(self, folder: Path, *settings: str) -> None:
        self.port = free_port()
        self.folder, self._settings = folder, settings
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"listener {self.port} 127.0.0.1",
            "persistence true",
            f"persistence_location {self.folder}/",
            "autosave_interval 1",
            "max_queued_messages 0",
            "set_tcp_nodelay true",
            *self._settings,
        ]
        if not any(line.startswith(("allow_anonymous", "password_file")) for line in lines):
            lines.append("allow_anonymous true")
        if os.geteuid() == 0:
            lines.append("user root")  # else it becomes a user that cannot read this folder
        path = self.folder / "mosquitto.conf"
        path.write_text("\n".join(lines) + "\n")
        with (self.folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen([program("mosquitto") or "mosquitto", "-c", path], stdout=log, stderr=log)
        until(self._is_listening)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(WAIT_SECONDS)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(WAIT_SECONDS)

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def reload(self) -> None:
        """Read password and access files again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def _is_listening(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "mosquitto.log").read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True


def config_for(broker: HasPort, *, protocol: str = "auto", name: str = "box1", **mqtt: object) -> Config:
    """A configuration that points at the broker. Keep-alive is short, so that dead links are noticed within a test."""
    settings = {"port": broker.port, "protocol": protocol, "keepalive_seconds": 2, **mqtt}
    return Config(
        box=Box(name=name),
        mqtt=Mqtt.model_validate(settings),
        limits=Limits.model_validate({"picture_bytes": 1_000_000}),
    )


@pytest.fixture(scope="module")
def hasty() -> Iterator[None]:
    """Reconnect at once, where it matters that it does and not when."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("appliance.drivers.mqtt.SHORTEST_PAUSE_SECONDS", 0.05)
        patch.setattr("appliance.drivers.mqtt.LONGEST_PAUSE_SECONDS", 0.1)
        yield


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Nats]:
    broker = Nats(tmp_path / "nats")
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """Mark the test with `mosquitto`."""
    broker = Mosquitto(tmp_path / "mosquitto")
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(params=["nats", pytest.param("mosquitto", marks=pytest.mark.mosquitto)])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyBroker]:
    """Each test once with nats-server and once with mosquitto."""
    kinds: dict[str, type[Nats] | type[Mosquitto]] = {"nats": Nats, "mosquitto": Mosquitto}
    broker = kinds[request.param](tmp_path / request.param)
    broker.start()
    yield broker
    broker.stop()


@dataclass(frozen=True, slots=True)
class Heard:
    """A message that a camera received."""

    topic: str
    payload: bytes = field(repr=False)
    retain: bool
    correlation: bytes | None
    is_resent: bool


class Camera:
    """A camera: publishes at QoS 1, keeps what it sent and what was confirmed, and listens to the topics it is told to.

    `refused` holds the PUBACKs that said no.
    """

    def __init__(
        self,
        port: int,
        *listen: str,
        name: str = "camera",
        protocol: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv311,
        clean: bool = True,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        self.sent: dict[int, tuple[str, bytes]] = {}
        self.confirmed: set[int] = set()
        self.refused: dict[int, str] = {}
        self.heard: queue.Queue[Heard] = queue.Queue()
        self._passed: deque[Heard] = deque()
        self._port, self._listen, self._protocol = port, listen, protocol
        self._is_ready = threading.Event()
        session = None if protocol is MQTTProtocolVersion.MQTTv5 else clean
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=protocol, clean_session=session)
        if username is not None:
            self._client.username_pw_set(username, password)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_socket_open = _no_delay
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._is_ready.set()
        self._client.on_publish = self._on_publish
        self._client.on_message = self._on_message

    def __enter__(self) -> Camera:
        self._client.connect("127.0.0.1", self._port, keepalive=5)
        self._client.loop_start()
        assert self._is_ready.wait(WAIT_SECONDS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        # paho closes its last sockets when nobody holds it any more: so its callbacks must not hold us.
        self._client.on_connect = self._client.on_subscribe = None
        self._client.on_publish = self._client.on_message = None

    def publish(
        self,
        topic: str,
        payload: bytes = b"picture",
        *,
        qos: int = 1,
        retain: bool = False,
        user: Mapping[str, str] | None = None,
        **properties: object,
    ) -> int:
        """Send a message; returns its packet id. `properties` are MQTT 5 names such as ResponseTopic."""
        wanted = None
        if user or properties:
            wanted = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            for name, value in properties.items():
                setattr(wanted, name, value)
            if user:
                wanted.UserProperty = list(user.items())
        info = self._client.publish(topic, payload, qos=qos, retain=retain, properties=wanted)
        self.sent[info.mid] = (topic, payload)
        return info.mid

    def publish_confirmed(self, topic: str, payload: bytes = b"picture", *, retain: bool = False) -> int:
        """Send at QoS 1 and wait for the PUBACK."""
        packet_id = self.publish(topic, payload, retain=retain)
        self.wait_confirmed(packet_id)
        return packet_id

    def wait_confirmed(self, *packet_ids: int) -> None:
        """Until each has its PUBACK, of either kind."""
        until(lambda: set(packet_ids) <= self.confirmed | set(self.refused))

    def hear(self, seconds: float = WAIT_SECONDS) -> Heard:
        """The next message on the topics listened to. Raises queue.Empty when none comes."""
        return self.heard.get(timeout=seconds)

    def hear_of(self, part: str, seconds: float = WAIT_SECONDS) -> Heard:
        """The next message whose topic contains this. Raises queue.Empty when none comes.

        Others, which may come in any order between, are kept for whoever asks for them in this way.
        """
        if known := next((heard for heard in self._passed if part in heard.topic), None):
            self._passed.remove(known)
            return known
        ends = time.monotonic() + seconds
        while part not in (heard := self.hear(max(0.0, ends - time.monotonic()))).topic:
            self._passed.append(heard)
        return heard

    def _on_connect(
        self, client: Client, userdata: object, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            return
        if self._listen:
            client.subscribe([(topic, 1) for topic in self._listen])
        else:
            self._is_ready.set()

    def _on_publish(
        self, client: Client, userdata: object, packet_id: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self.refused[packet_id] = str(reason)
        else:
            self.confirmed.add(packet_id)

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        correlation = getattr(message.properties, "CorrelationData", None)
        is_resent = ("resent", "true") in getattr(message.properties, "UserProperty", ())
        self.heard.put(Heard(message.topic, bytes(message.payload), message.retain, correlation, is_resent))


def _no_delay(client: Client, userdata: object, connection: object) -> None:
    if isinstance(connection, socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
