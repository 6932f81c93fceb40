"""Verdicts from their record to a real broker, whatever happens to the link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from appliance.contract import Address
from appliance.drivers.mqtt import Door, DoorState
from appliance.drivers.outbox import KEPT_NOTES, READ_ROWS, Note, Outbox
from appliance.drivers.records import (
    Acceptance,
    Answered,
    Conclusion,
    OpenBoard,
    Picture,
    Publication,
    Recorded,
    Records,
)
from appliance.errors import MessageError
from appliance.lab.proxy import Proxy, Weather
from tests.kit_brokers import (
    WAIT_SECONDS,
    AnyBroker,
    Camera,
    HasPort,
    Mosquitto,
    Nats,
    broker,
    config_for,
    hasty,
    mosquitto,
    nats,
    until,
)

__all__ = ["broker", "hasty", "mosquitto", "nats"]  # fixtures

pytestmark = pytest.mark.usefixtures("hasty")


def test_verdicts_recorded_without_a_link_go_out_when_it_comes(tmp_path: Path, broker: AnyBroker) -> None:
    with _office(tmp_path, broker) as (records, outbox, door):
        for number in range(200):  # more than the link takes at once
            _conclude(records, outbox, broker, f"r{number}")
        with Camera(broker.port, "coe/v1/plant/result/#") as camera:
            door.start()
            assert {camera.hear().payload for _ in range(200)} == {b"verdict of r%d" % n for n in range(200)}
        until(lambda: not records.unpublished())


def test_a_verdict_stays_in_the_outbox_until_the_broker_has_it(tmp_path: Path, nats: Nats) -> None:
    with _office(tmp_path, nats) as (records, outbox, door):
        door.start()
        until(lambda: door.state is DoorState.READY)
        nats.kill()
        _conclude(records, outbox, nats, "r1")
        assert [row.id for row in records.unpublished()] == ["r1"]
        nats.start()
        until(lambda: not records.unpublished())


def test_a_verdict_that_can_never_be_published_blocks_nobody(tmp_path: Path, nats: Nats) -> None:
    with _office(tmp_path, nats) as (records, outbox, door):
        _conclude(records, outbox, nats, "huge", body=bytes(3_000_000))
        _conclude(records, outbox, nats, "r2")
        with Camera(nats.port, "coe/v1/plant/result/#") as camera:
            door.start()
            assert camera.hear().payload == b"verdict of r2"
        until(lambda: not records.unpublished())
        assert outbox.counts["unpublishable"] == 1


def test_error_answers_wait_for_the_link(tmp_path: Path, nats: Nats) -> None:
    with _office(tmp_path, nats) as (_, outbox, door):
        outbox.answer(MessageError("picture-empty", "nothing", "send something"), "a/topic", None, None)
        outbox.note(Note("coe/v1/plant/box/box1/info", b"{}", retain=True))
        with Camera(nats.port, "coe/v1/plant/error/#") as camera:
            door.start()
            assert camera.hear().topic == "coe/v1/plant/error/picture-empty"


@pytest.mark.mosquitto
def test_a_reply_topic_that_the_broker_refuses_stops_nobody(tmp_path: Path) -> None:
    with _strict(tmp_path, "topic readwrite coe/#") as broker, _office(tmp_path, broker) as (records, outbox, door):
        for number in range(70):  # more than the link takes at once
            _conclude(records, outbox, broker, f"r{number}", response_topic="camera/replies")
        _conclude(records, outbox, broker, "innocent")
        with Camera(broker.port, "coe/v1/plant/result/#") as camera:
            door.start()
            heard = {camera.hear().payload}
            while b"verdict of innocent" not in heard:
                heard.add(camera.hear().payload)
        until(lambda: not records.unpublished())
        assert outbox.counts["unpublishable"] >= 70
        assert outbox.counts["refused"] <= 64  # a window; those behind it are not even sent


@pytest.mark.mosquitto
def test_a_result_topic_that_the_broker_refuses_waits_alone_until_it_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        _strict(tmp_path, "topic read coe/#", "topic readwrite coe/v1/plant/result/line1/#") as broker,
        _office(tmp_path, broker) as (records, outbox, door),
    ):
        for number in range(70):
            _conclude(records, outbox, broker, f"denied{number}", line="line2")
        board = OpenBoard("denied board", "line2", "p1", "SN-1", 0.0, b"")
        records.conclude_board(board, "pass", b"{}", "coe/v1/plant/board/line2/p1/SN-1", lambda _: None)
        for number in range(70):
            _conclude(records, outbox, broker, f"r{number}")
        with Camera(broker.port, "coe/v1/plant/result/line1/#") as camera:
            door.start()
            wanted = {b"verdict of r%d" % n for n in range(70)}
            while wanted:
                wanted.discard(camera.hear().payload)
        until(lambda: {row.id[:6] for row in records.unpublished()} == {"denied"})
        assert len(records.unpublished()) == 71
        assert caplog.text.count("outbox refused") >= 1
        broker.stop()
        (tmp_path / "acl").write_text("topic readwrite coe/#\n")
        broker.start()
        until(lambda: not records.unpublished())


@pytest.mark.mosquitto
def test_only_what_may_have_been_published_before_is_marked_as_resent(tmp_path: Path, mosquitto: Mosquitto) -> None:
    """By a former process, over a link that broke, or when its picture came the first time."""
    with _office(tmp_path, mosquitto) as (records, outbox, _):
        _conclude(records, outbox, mosquitto, "former")
    with (
        _office(tmp_path, mosquitto) as (records, outbox, door),
        Camera(mosquitto.port, "coe/v1/plant/result/#", protocol=MQTTProtocolVersion.MQTTv5) as camera,
    ):
        _conclude(records, outbox, mosquitto, "new")
        door.start()
        heard = {message.payload: message.is_resent for message in (camera.hear(), camera.hear())}
        assert heard == {b"verdict of former": True, b"verdict of new": False}
        until(lambda: not records.counts.unpublished)
        for _ in range(2):
            _repeat(records, outbox, "new")
            again = camera.hear()
            assert (again.payload, again.is_resent) == (b"verdict of new", True)
            until(lambda: not records.counts.unpublished)


@pytest.mark.mosquitto
def test_what_was_on_its_way_when_the_link_broke_is_marked_as_resent(tmp_path: Path, mosquitto: Mosquitto) -> None:
    """There is none before somebody listens to what is published."""
    with Proxy(mosquitto.port) as proxy, _office(tmp_path, proxy) as (records, outbox, door):
        door.start()
        until(lambda: door.state is DoorState.READY)
        proxy.weather = Weather.DEAF
        _conclude(records, outbox, mosquitto, "on its way")
        until(lambda: outbox.counts["returned"])
        _conclude(records, outbox, mosquitto, "waits")
        with Camera(mosquitto.port, "coe/v1/plant/result/#", protocol=MQTTProtocolVersion.MQTTv5) as camera:
            proxy.weather = Weather.FAIR
            proxy.reset()
            heard = {message.payload: message.is_resent for message in (camera.hear(), camera.hear())}
        assert heard == {b"verdict of on its way": True, b"verdict of waits": False}


def _repeat(records: Records, outbox: Outbox, name: str) -> None:
    """Its picture comes again."""
    answered = Event()

    def done(answer: Acceptance) -> None:
        assert isinstance(answer, Answered)
        outbox.post(answer.publications)
        answered.set()

    records.accept(Picture(name, "line1", "-", "-", "R1", "00", 0.0), b"picture", done)
    assert answered.wait(WAIT_SECONDS)


@pytest.mark.mosquitto
def test_how_the_box_is_goes_before_a_backlog_and_is_not_pushed_out(tmp_path: Path, mosquitto: Mosquitto) -> None:
    status = "coe/v1/plant/box/box1/status"
    with _office(tmp_path, mosquitto) as (records, outbox, door):
        for number in range(100):
            _conclude(records, outbox, mosquitto, f"r{number}")
        for state in (b"draining", b"online"):
            outbox.note(Note(status, state, retain=True))
        for _ in range(KEPT_NOTES + 1):
            outbox.answer(MessageError("picture-empty", "nothing", "send something"), "a/topic", None, None)
        with Camera(mosquitto.port, "coe/v1/plant/#") as camera:
            door.start()
            first, *verdicts, error = [camera.hear() for _ in range(102)]
        assert (first.topic, first.payload) == (status, b"online")
        assert all(heard.topic.startswith("coe/v1/plant/result/") for heard in verdicts)
        assert error.topic == "coe/v1/plant/error/picture-empty"


def test_error_answers_that_are_too_many_are_counted_and_said_once(
    tmp_path: Path, nats: Nats, caplog: pytest.LogCaptureFixture
) -> None:
    with _office(tmp_path, nats) as (_, outbox, _door):
        for _ in range(KEPT_NOTES + 3):
            outbox.answer(MessageError("picture-empty", "nothing", "send something"), "a/topic", None, None)
        assert outbox.counts["dropped_notes"] == 3
        assert caplog.text.count("outbox drops") == 1


def test_a_backlog_is_read_once(tmp_path: Path, nats: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    with _office(tmp_path, nats) as (records, outbox, door):
        for number in range(300):
            _conclude(records, outbox, nats, f"r{number}")
        read, rows = records.unpublished, Counter[str]()

        def counted(after: int = 0, limit: int = 1000) -> list[Publication]:
            found = read(after, limit)
            rows["read"] += len(found)
            return found

        monkeypatch.setattr(records, "unpublished", counted)
        door.start()
        until(lambda: not records.counts.unpublished)
        assert 300 <= rows["read"] <= 300 + 2 * READ_ROWS


def test_a_verdict_that_was_read_from_the_record_before_it_was_posted_is_published_once(
    tmp_path: Path, nats: Nats
) -> None:
    """The writer tells after its commit; on the way there the link's thread may have read, sent and confirmed it."""
    posted: list[Publication] = []
    with _office(tmp_path, nats) as (records, outbox, door), Camera(nats.port, "coe/v1/plant/result/#") as camera:
        _conclude(records, outbox, nats, "r1", post=posted.extend)
        door.start()
        assert camera.hear().payload == b"verdict of r1"
        until(lambda: not records.unpublished())
        outbox.post(posted)
        _conclude(records, outbox, nats, "r2")
        assert camera.hear().payload == b"verdict of r2"


def test_who_asks_again_is_answered_though_it_was_published(tmp_path: Path, nats: Nats) -> None:
    posted: list[Publication] = []
    with _office(tmp_path, nats) as (records, outbox, door), Camera(nats.port, "coe/v1/plant/result/#") as camera:
        _conclude(records, outbox, nats, "r1", post=posted.extend)
        door.start()
        assert camera.hear().payload == b"verdict of r1"
        until(lambda: outbox.counts["published"] == 1)
        outbox.repeat(posted)
        assert camera.hear().payload == b"verdict of r1"


@contextmanager
def _strict(folder: Path, *rules: str) -> Iterator[Mosquitto]:
    """A broker that allows this and no more."""
    (folder / "acl").write_text("".join(f"{rule}\n" for rule in rules))
    (folder / "acl").chmod(0o644)
    broker = Mosquitto(folder / "mosquitto", f"acl_file {folder / 'acl'}")
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


@contextmanager
def _office(folder: Path, broker: HasPort) -> Iterator[tuple[Records, Outbox, Door]]:
    config = config_for(broker)
    with Records.open(folder / "state", spool_bytes=10_000_000, verdict_days=1.0) as records:
        outbox = Outbox(config, records)

        def changed(state: DoorState) -> None:
            if state is DoorState.READY:
                outbox.ready()

        door = Door(
            config,
            deliver=lambda message: None,
            published=outbox.published,
            returned=outbox.returned,
            state_changed=changed,
        )
        outbox.connect(door)
        try:
            yield records, outbox, door
        finally:
            door.disconnect()


def _conclude(
    records: Records,
    outbox: Outbox,
    broker: AnyBroker,
    name: str,
    body: bytes = b"",
    *,
    line: str = "line1",
    response_topic: str | None = None,
    post: Callable[[Iterable[Publication]], None] | None = None,
) -> None:
    """Accept a picture and record its verdict, as the service does; `post` hears of it in place of the outbox."""
    accepted, concluded = Event(), Event()
    address = Address(line, "-", "-", "R1")
    picture = Picture(name, line, "-", "-", "R1", "00", 0.0, response_topic=response_topic)

    def done(answer: Acceptance) -> None:
        accepted.set()

    def recorded(answer: Conclusion) -> None:
        assert isinstance(answer, Recorded)
        (post or outbox.post)(answer.publications)
        concluded.set()

    records.accept(picture, b"picture", done)
    assert accepted.wait(WAIT_SECONDS)
    topic = address.result_topic(config_for(broker))
    records.conclude(name, "pass", body or f"verdict of {name}".encode(), topic, recorded)
    assert concluded.wait(WAIT_SECONDS)
