"""Verdicts from their record to a real broker, whatever happens to the link."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from appliance.contract import Address
from appliance.drivers.mqtt import Door, DoorState
from appliance.drivers.outbox import Note, Outbox
from appliance.drivers.records import Acceptance, Conclusion, Picture, Recorded, Records
from appliance.errors import MessageError
from tests.kit_brokers import AnyBroker, Camera, Nats, broker, config_for, nats, until

__all__ = ["broker", "nats"]  # fixtures

ADDRESS = Address("line1", "-", "-", "R1")


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
        until(lambda: not records.unpublished(), 30)


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


@contextmanager
def _office(folder: Path, broker: AnyBroker) -> Iterator[tuple[Records, Outbox, Door]]:
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


def _conclude(records: Records, outbox: Outbox, broker: AnyBroker, name: str, body: bytes = b"") -> None:
    """Accept a picture and record its verdict, as the service does."""
    accepted, concluded = Event(), Event()
    picture = Picture(name, ADDRESS.line, ADDRESS.product, ADDRESS.board, ADDRESS.part, "00", 0.0)

    def done(answer: Acceptance) -> None:
        accepted.set()

    def recorded(answer: Conclusion) -> None:
        assert isinstance(answer, Recorded)
        outbox.post(answer.publications)
        concluded.set()

    records.accept(picture, b"picture", done)
    assert accepted.wait(10)
    topic = ADDRESS.result_topic(config_for(broker))
    records.conclude(name, "pass", body or f"verdict of {name}".encode(), topic, recorded)
    assert concluded.wait(10)
