"""The link to the broker: what arrives, what is acknowledged, what is published, and what it survives."""

from __future__ import annotations

import logging
import queue
import random
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import MQTTProtocolVersion

from appliance.config import Config
from appliance.contract import Address, Message, Reply, status_topic
from appliance.drivers import mqtt
from appliance.drivers.broker import Broker
from appliance.drivers.link import client_id
from appliance.drivers.mqtt import Door, DoorState, pause_seconds
from appliance.errors import MessageError
from tests.conftest import program
from tests.kit_brokers import AnyBroker, Camera, Mosquitto, Nats, broker, config_for, hasty, mosquitto, nats, until
from tests.kit_ports import free_port

__all__ = ["broker", "hasty", "mosquitto", "nats"]  # fixtures

pytestmark = pytest.mark.usefixtures("hasty")  # `pause_seconds` is tested by its values

V5 = MQTTProtocolVersion.MQTTv5
CONFIG = Config()
ADDRESS = Address("line1", "-", "-", "resistor-0603")
TOPIC = "coe/v1/plant/infer/line1/-/-/resistor-0603"
WAIT_SECONDS = 60.0


SHIPPED_PAUSES = (mqtt.SHORTEST_PAUSE_SECONDS, mqtt.LONGEST_PAUSE_SECONDS)


@dataclass
class Heard:
    """What a door reported."""

    messages: queue.Queue[Message] = field(default_factory=queue.Queue)
    published: queue.Queue[int] = field(default_factory=queue.Queue)
    returned: queue.Queue[tuple[int, str]] = field(default_factory=queue.Queue)
    states: list[DoorState] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    """Those of the states, one each. To look at the door for them would be too late now and then: it tries again."""

    def next(self) -> Message:
        return self.messages.get(timeout=WAIT_SECONDS)

    def waits(self, times: int = 1) -> str:
        """Why there is no link, when there has been none for the so-many-th time."""
        until(lambda: self.states.count(DoorState.WAITING) >= times)
        return [why for state, why in zip(self.states, self.details, strict=False) if state is DoorState.WAITING][-1]

    def nothing(self, seconds: float = 0.2) -> None:
        with pytest.raises(queue.Empty):
            self.messages.get(timeout=seconds)


def new_door(config: Config, heard: Heard, deliver: Callable[[Message], None] | None = None) -> Door:
    def changed(state: DoorState) -> None:
        heard.details.append(door.detail)
        heard.states.append(state)

    door = Door(
        config,
        deliver=deliver or heard.messages.put,
        published=heard.published.put,
        returned=lambda token, why: heard.returned.put((token, why)),
        state_changed=changed,
    )
    return door


@contextmanager
def opened(config: Config, deliver: Callable[[Message], None] | None = None) -> Iterator[tuple[Door, Heard]]:
    """A door that was ready once."""
    heard = Heard()
    with new_door(config, heard, deliver) as door:
        until(lambda: DoorState.READY in heard.states)
        yield door, heard


@contextmanager
def stopped(broker: AnyBroker) -> Iterator[None]:
    """The broker's process is frozen: it holds its connections and says nothing."""
    broker.freeze()
    try:
        yield
    finally:
        broker.thaw()


class FakeBroker:
    """Accepts connections, answers the first packet of each with the next of `answers`, and closes."""

    def __init__(self, *answers: bytes) -> None:
        self._answers, self.connections = answers, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FakeBroker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.recv(4096)
                connection.sendall(self._answers[min(self.connections, len(self._answers) - 1)])
            self.connections += 1


def test_a_picture_arrives_and_is_delivered_again_until_acknowledged(broker: AnyBroker) -> None:
    config = config_for(broker)
    with Camera(broker.port) as camera, opened(config) as (_, heard):
        camera.publish_confirmed(TOPIC, b"picture")
        first = heard.next()
        assert (first.topic, first.payload, first.qos, first.duplicate) == (TOPIC, b"picture", 1, False)
    with opened(config) as (door, heard):
        again = heard.next()
        assert (again.payload, again.duplicate) == (b"picture", True)
        door.acknowledge(again)
        until(lambda: door.counts.get("acknowledged") == 1)
    with opened(config) as (_, heard):
        heard.nothing()


def test_pictures_sent_while_the_box_was_away_wait_for_it(broker: AnyBroker) -> None:
    config = config_for(broker)
    with opened(config):
        pass
    with Camera(broker.port) as camera:
        camera.wait_confirmed(*[camera.publish(TOPIC, b"%d" % n) for n in range(10)])
    with opened(config) as (_, heard):
        assert [heard.next().payload for _ in range(10)] == [b"%d" % n for n in range(10)]


def test_a_wrong_depth_is_heard_too_so_that_it_can_be_answered(broker: AnyBroker) -> None:
    config = config_for(broker)
    with Camera(broker.port) as camera, opened(config) as (_, heard):
        for levels in ("", "/line1", "/line1/-", "/line1/-/-", "/line1/-/-/a/b", "/line1/-/-/a/b/c/d"):
            camera.publish_confirmed("coe/v1/plant/infer" + levels)
            wrong = heard.next()
            assert (wrong.topic, wrong.qos) == ("coe/v1/plant/infer" + levels, 0)
            with pytest.raises(MessageError):
                Address.parse(wrong.topic, config)
        heard.nothing()


def test_other_peoples_topics_are_not_heard(broker: AnyBroker) -> None:
    with Camera(broker.port) as camera, opened(config_for(broker)) as (_, heard):
        camera.publish_confirmed("coe/v1/plant/result/line1/-/-/a")
        camera.publish_confirmed("coe/v1/elsewhere/infer/line1/-/-/a")
        heard.nothing()


def test_names_with_dots_survive_the_broker(broker: AnyBroker) -> None:
    topic = "coe/v1/plant/infer/line.1/p.q/SN.0001.7/R.17"
    result = "coe/v1/plant/result/line.1/p.q/SN.0001.7/R.17"
    with Camera(broker.port, result) as camera, opened(config_for(broker)) as (door, heard):
        camera.publish_confirmed(topic)
        assert heard.next().topic == topic
        assert door.publish(Address.parse(topic, CONFIG).result_topic(CONFIG), b"{}", token=1)
        assert camera.hear().topic == result


def test_a_box_may_have_a_dot_in_its_name(broker: AnyBroker) -> None:
    with opened(config_for(broker, name="box.1_a-b")) as (door, _):
        assert door.state is DoorState.READY


def test_a_retained_picture_can_be_told(broker: AnyBroker) -> None:
    with Camera(broker.port) as camera:
        camera.publish_confirmed(TOPIC, b"old", retain=True)
        with opened(config_for(broker, protocol="3.1.1")) as (_, heard):
            assert heard.next().retain  # 3.1.1 cannot ask the broker to keep them
        camera.publish_confirmed(TOPIC, b"", retain=True)


@pytest.mark.mosquitto
def test_retained_pictures_stay_at_the_broker_and_new_ones_keep_their_mark(mosquitto: Mosquitto) -> None:
    with Camera(mosquitto.port) as camera:
        camera.publish_confirmed(TOPIC, b"old", retain=True)
        with opened(config_for(mosquitto)) as (_, heard):
            heard.nothing()
            camera.publish_confirmed(TOPIC, b"new", retain=True)
            assert heard.next().retain


@pytest.mark.mosquitto
def test_mqtt_5_properties_arrive(mosquitto: Mosquitto) -> None:
    with Camera(mosquitto.port, "my/answers", protocol=V5) as camera, opened(config_for(mosquitto)) as (door, heard):
        camera.publish(
            TOPIC,
            ResponseTopic="my/answers",
            CorrelationData=b"\x00seven",
            ContentType="image/png",
            MessageExpiryInterval=60,
            user={"request-id": "q7", "deadline-ms": "500", "colour": "red"},
        )
        picture = heard.next()
        assert picture.user == {"request-id": "q7", "deadline-ms": "500"}
        reply = Reply.wanted(picture, CONFIG)
        assert reply == Reply("my/answers", b"\x00seven")
        assert door.publish(reply.topic, b"{}", token=1, correlation=reply.correlation)
        answer = camera.hear()
        assert (answer.topic, answer.correlation) == ("my/answers", b"\x00seven")


@pytest.mark.mosquitto
def test_a_property_that_cannot_be_read_does_not_block_the_pictures_behind_it(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker delivers it again after every broken link: without the detour over 3.1.1 that never ends."""
    monkeypatch.setattr(mqtt, "DETOUR_SECONDS", 2.0)
    with Camera(mosquitto.port, protocol=V5) as camera, opened(config_for(mosquitto)) as (door, heard):
        camera.publish(TOPIC, b"poison", user={"request-id": "\ufeff"})
        camera.publish(TOPIC, b"poison", ResponseTopic="my/\ufeff")
        camera.publish(TOPIC, b"behind it")
        for payload in (b"poison", b"poison", b"behind it"):
            picture = heard.next()
            assert (picture.payload, picture.user, picture.response_topic) == (payload, {}, None)
            door.acknowledge(picture)
        until(lambda: door.generation == 4 and door.state is DoorState.READY)
        camera.publish(TOPIC, b"later", user={"request-id": "q1"})
        assert heard.next().user == {"request-id": "q1"}


@pytest.mark.mosquitto
@pytest.mark.parametrize(
    "properties",
    [
        {"user": {f"key{n}": "v" * 60_000 for n in range(20)}},
        {"user": {"request-id": "v" * 60_000}},
        {"CorrelationData": b"x" * 65_000},
        {"ResponseTopic": "x" * 60_000},
    ],
)
def test_huge_properties_break_nothing(mosquitto: Mosquitto, properties: dict[str, object]) -> None:
    with Camera(mosquitto.port, protocol=V5) as camera, opened(config_for(mosquitto)) as (door, heard):
        camera.publish(TOPIC, **properties)  # type: ignore[arg-type]
        assert set(heard.next().user) <= {"request-id"}
        assert door.generation == 1


@pytest.mark.mosquitto
def test_the_mosquitto_client_gets_its_answer(mosquitto: Mosquitto) -> None:
    command = [program("mosquitto_pub") or "", "-p", str(mosquitto.port), "-V", "5", "-q", "1", "-t", TOPIC, "-m", "x"]
    with opened(config_for(mosquitto)) as (_, heard):
        subprocess.run([*command, "-D", "PUBLISH", "response-topic", "my/answers"], check=True)
        assert heard.next().response_topic == "my/answers"


def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(nats: Nats) -> None:
    with opened(config_for(nats)) as (door, heard):
        assert heard.states == [DoorState.CONNECTING, DoorState.SUBSCRIBING, DoorState.READY]
        assert door.generation == 2
        nats.kill()
        until(lambda: door.state is DoorState.WAITING)
        nats.start()
        until(lambda: door.state is DoorState.READY)
        assert door.counts["connected"] == 2


def test_who_insists_on_mqtt_5_is_told_that_the_broker_has_none(nats: Nats) -> None:
    heard = Heard()
    with new_door(config_for(nats, protocol="5"), heard):
        assert "Unsupported protocol version" in heard.waits()


def test_a_publication_is_reported_at_its_puback(broker: AnyBroker) -> None:
    with Camera(broker.port, "coe/v1/plant/result/#") as camera, opened(config_for(broker)) as (door, heard):
        for token in range(20):
            assert door.publish(ADDRESS.result_topic(CONFIG), b"%d" % token, token=token)
        assert [heard.published.get(timeout=WAIT_SECONDS) for _ in range(20)] == list(range(20))
        assert [camera.hear().payload for _ in range(20)] == [b"%d" % token for token in range(20)]


def test_a_verdict_that_nobody_listens_to_is_published_all_the_same(broker: AnyBroker) -> None:
    with opened(config_for(broker)) as (door, heard):
        assert door.publish(ADDRESS.result_topic(CONFIG), b"{}", token=3)
        assert heard.published.get(timeout=WAIT_SECONDS) == 3


def test_a_retained_status_is_there_for_who_comes_later(broker: AnyBroker) -> None:
    with opened(config_for(broker)) as (door, heard):
        assert door.publish(status_topic(CONFIG), b"online", retain=True, token=1)
        heard.published.get(timeout=WAIT_SECONDS)
        with Camera(broker.port, status_topic(CONFIG)) as operator:
            assert operator.hear().payload == b"online"


def test_the_last_will_says_offline_when_the_box_dies_and_not_when_it_leaves(broker: AnyBroker) -> None:
    program = (
        "import sys\n"
        "from appliance.config import Config\n"
        "from appliance.drivers.mqtt import Door, DoorState\n"
        "config = Config.model_validate_json(sys.stdin.readline())\n"
        "ready = lambda state: state is DoorState.READY and print('ready', flush=True)\n"
        "Door(config, deliver=print, published=print, returned=print, state_changed=ready).start()\n"
        "sys.stdin.read()\n"
    )
    config = config_for(broker)
    with Camera(broker.port, status_topic(config)) as operator:
        with opened(config):
            pass
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as box:
            assert box.stdin
            assert box.stdout
            box.stdin.write(config.model_dump_json().encode() + b"\n")
            box.stdin.flush()
            assert box.stdout.readline() == b"ready\n"
            assert operator.heard.empty()
            box.kill()
        assert operator.hear().payload == b"offline"


def test_a_stale_acknowledgement_does_not_reach_another_picture(broker: AnyBroker) -> None:
    config = config_for(broker)
    with Camera(broker.port) as camera, opened(config) as (door, heard):
        camera.publish_confirmed(TOPIC, b"first")
        first = heard.next()
        broker.kill()
        until(lambda: door.state is not DoorState.READY)
        broker.start()
        until(lambda: door.state is DoorState.READY)
        with Camera(broker.port, name="second-camera") as other:
            other.publish_confirmed(TOPIC, b"second")
        until(lambda: b"second" in {picture.payload for picture in heard.messages.queue})
        door.acknowledge(first)  # its packet id means another picture by now
        until(lambda: door.counts.get("stale-acknowledgement") == 1)
        assert door.counts.get("acknowledged", 0) == 0
    with opened(config) as (_, heard):
        until(lambda: b"second" in {picture.payload for picture in heard.messages.queue})


def test_what_was_on_its_way_when_the_link_broke_comes_back(broker: AnyBroker) -> None:
    with opened(config_for(broker)) as (door, heard), stopped(broker):
        for token in range(3):
            assert door.publish(ADDRESS.result_topic(CONFIG), b"{}", token=token)
        broker.kill()
        came_back = sorted(heard.returned.get(timeout=WAIT_SECONDS) for _ in range(3))
        assert came_back == [(token, "connection-lost") for token in range(3)]
        assert heard.published.empty()


def test_nothing_is_taken_while_there_is_no_link(broker: AnyBroker) -> None:
    with opened(config_for(broker)) as (door, heard):
        broker.kill()
        until(lambda: door.state is DoorState.WAITING)
        assert not door.publish(ADDRESS.result_topic(CONFIG), b"{}", token=1)
        assert heard.returned.empty()


def test_the_window_of_publications_is_bounded(broker: AnyBroker) -> None:
    with opened(config_for(broker)) as (door, heard), stopped(broker):
        taken = 0
        while door.publish(ADDRESS.result_topic(CONFIG), b"{}", token=taken):
            taken += 1
        assert 1 <= taken <= 64
        assert heard.published.empty()


def test_a_publication_larger_than_the_broker_takes_is_refused_before_it_is_sent(broker: AnyBroker) -> None:
    with opened(config_for(broker)) as (door, heard):
        with pytest.raises(MessageError) as caught:
            door.publish("a/b", b"x" * 2_000_000, token=1)
        assert caught.value.reason == "too-large"
        assert door.publish("a/b", b"small", token=2)
        assert heard.published.get(timeout=WAIT_SECONDS) == 2


def test_a_callback_that_raises_ends_nothing(broker: AnyBroker, caplog: pytest.LogCaptureFixture) -> None:
    got: queue.Queue[Message] = queue.Queue()

    def deliver(picture: Message) -> None:
        got.put(picture)
        raise RuntimeError("a bug in the service")

    with caplog.at_level(logging.CRITICAL), opened(config_for(broker), deliver=deliver) as (door, _):
        with Camera(broker.port) as camera:
            camera.publish_confirmed(TOPIC, b"1")
            camera.publish_confirmed(TOPIC, b"2")
        until(lambda: {picture.payload for picture in got.queue} == {b"1", b"2"})
        until(lambda: door.counts["callback-failed"] >= 2)
        assert door.counts.get("acknowledged", 0) == 0
        assert door.state is DoorState.READY


def test_it_waits_for_a_broker_that_comes_later(nats: Nats) -> None:
    nats.stop()
    heard = Heard()
    with new_door(config_for(nats), heard) as door:
        assert "refused" in heard.waits()
        nats.start()
        until(lambda: door.state is DoorState.READY)


def test_a_broker_that_stops_answering_is_noticed_within_two_keepalives(
    nats: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two seconds each, by a pretend clock."""
    now = 1000.0
    monkeypatch.setattr("paho.mqtt.client.time_func", lambda: now)
    with opened(config_for(nats)) as (door, heard), stopped(nats):
        for _ in range(2):
            turn_twice(door)
            assert door.state is DoorState.READY
            now += 2.0
        until(lambda: DoorState.WAITING in heard.states)


def turn_twice(door: Door) -> None:
    """Return when its thread has looked at everything since."""
    for _ in range(2):
        last = door.turned_seconds
        until(lambda last=last: door.turned_seconds > last)  # type: ignore[misc]


def test_being_taken_over_is_final(caplog: pytest.LogCaptureFixture) -> None:
    heard = Heard()
    accepted_then_session_taken_over = b"\x20\x03\x00\x00\x00" + b"\xe0\x02\x8e\x00"
    with caplog.at_level(logging.CRITICAL), FakeBroker(accepted_then_session_taken_over) as peer:
        with new_door(config_for(peer), heard) as door:
            until(lambda: door.state is DoorState.TAKEN_OVER)
            door.disconnect()
        assert heard.states[-1] is DoorState.TAKEN_OVER


@pytest.mark.mosquitto
def test_a_client_id_that_others_use_too_is_suspected(mosquitto: Mosquitto) -> None:
    config = config_for(mosquitto)
    with opened(config) as (door, heard):
        for count in range(1, 4):
            until(lambda: door.state is DoorState.READY)
            with Camera(mosquitto.port, name=client_id(config)):
                why = heard.waits(times=count)
        assert f"does another client use the id {client_id(config)}?" in why


@pytest.mark.mosquitto
def test_a_refused_publication_comes_back_with_the_reason(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("acl")
    (folder / "acl").write_text("topic readwrite coe/v1/plant/infer/#\n")
    broker = Mosquitto(folder, f"acl_file {folder}/acl")
    broker.start()
    try:
        with opened(config_for(broker)) as (door, heard):
            assert door.publish("coe/v1/plant/result/a", b"{}", token=4)
            assert heard.returned.get(timeout=WAIT_SECONDS) == (4, "broker: Not authorized")
            assert heard.published.empty()
            until(lambda: door.state is DoorState.READY)  # 2.0.11 cuts the link after saying no
    finally:
        broker.stop()


def test_wrong_credentials_are_reported_and_right_ones_open(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("guess\n")
    with Broker(tmp_path / "broker", free_port(), picture_bytes=1, username="box1", password="secret") as guarded:
        config = config_for(guarded, username="box1", password_file=secret)
        heard = Heard()
        with new_door(config, heard):
            assert "broker refuses us: " in heard.waits()
        secret.write_text("secret\n")
        with opened(config) as (door, _):
            assert door.detail == ""


@given(st.integers(1, 1000), st.floats(0, 1, exclude_max=True))
def test_the_pause_grows_from_the_shortest_to_the_longest(failures: int, chance: float) -> None:
    assert SHIPPED_PAUSES == (1.0, 30.0)
    seconds = pause_seconds(failures, chance)
    assert mqtt.SHORTEST_PAUSE_SECONDS <= seconds <= mqtt.LONGEST_PAUSE_SECONDS
    assert seconds <= pause_seconds(failures + 1, chance)


def test_random_packets_break_only_their_own_link() -> None:
    chance = random.Random(7)
    heads = (
        b"",
        b"\x20\x03\x00\x00\x00",
        b"\x20\x02\x00\x00",
        b"\x20\x03\x00\x00\x00\x90\x09\x00\x01\x00\x01" + b"\0" * 5,
    )
    packets = [chance.choice(heads) + chance.randbytes(chance.randrange(40)) for _ in range(50)]
    heard = Heard()
    with FakeBroker(*packets) as peer, new_door(config_for(peer), heard) as door:
        until(lambda: peer.connections > len(packets), seconds=60)
        assert door.state is not DoorState.TAKEN_OVER
        assert door.counts.get("acknowledged", 0) == 0


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00",
        b"\x20\xff\xff\xff\xff\xff",
        b"\x20\x02\x00\x00\x90\x03\x00\x01\x80",
        b"\x30\x05\x00\x09ab",
        b"\x20\x03\x00\x00\x00\x32\x04\x00\x02\xff\xfe",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_a_peer_that_speaks_no_mqtt_is_survived(garbage: bytes) -> None:
    heard = Heard()
    with FakeBroker(garbage) as peer, new_door(config_for(peer), heard):
        assert heard.waits()
        assert heard.messages.empty()


def test_leaving_waits_for_pubacks(broker: AnyBroker) -> None:
    with opened(config_for(broker)) as (door, heard):
        for token in range(30):
            until(partial(door.publish, "a/b", b"x" * 1000, token=token))
        door.disconnect(timeout_seconds=WAIT_SECONDS)
    assert heard.published.qsize() == 30
    assert heard.states[-1] is DoorState.STOPPED


def test_who_leaves_under_load_is_stopped_and_not_offline(broker: AnyBroker) -> None:
    config = config_for(broker)
    with Camera(broker.port, status_topic(config), name="operator") as operator, Camera(broker.port) as camera:
        with opened(config) as (door, heard):
            assert door.publish(status_topic(config), b"stopped", retain=True, token=1)
            assert heard.published.get(timeout=WAIT_SECONDS) == 1
            for _ in range(60):
                camera.publish(TOPIC, b"x" * 500_000)
            heard.next()
        assert operator.hear().payload == b"stopped"
        with pytest.raises(queue.Empty):
            operator.hear(seconds=0.3)


def test_leaving_does_not_wait_for_ever(broker: AnyBroker) -> None:
    with opened(config_for(broker)) as (door, heard), stopped(broker):
        assert door.publish("a/b", b"x", token=1)
        door.disconnect(timeout_seconds=0.2)
        assert heard.returned.get(timeout=WAIT_SECONDS) == (1, "connection-lost")


def test_publishing_from_callbacks_and_many_threads_never_deadlocks(broker: AnyBroker) -> None:
    """As an outbox does: one lock around `publish` everywhere, taken in the callback too."""
    waiting, lock, heard = deque(range(2000)), threading.Lock(), Heard()

    def send() -> None:
        with lock:
            if waiting and door.publish("a/b", b"x", token=waiting[0]):
                waiting.popleft()

    def published(token: int) -> None:
        heard.published.put(token)
        send()

    def camp() -> None:
        while waiting:
            send()
            threading.Event().wait(0.0005)  # four that never rest would starve the link on a busy machine

    door = Door(
        config_for(broker),
        deliver=heard.messages.put,
        published=published,
        returned=lambda token, why: heard.returned.put((token, why)),
        state_changed=heard.states.append,
    )
    with door:
        until(lambda: door.state is DoorState.READY)
        threads = [threading.Thread(target=camp, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: heard.published.qsize() == 2000)
        assert heard.returned.empty()
        for thread in threads:
            thread.join(WAIT_SECONDS)
