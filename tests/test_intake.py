"""What is accepted into the spool and what is answered instead, without network or broker."""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from appliance import catalog as catalogs
from appliance.catalog import Catalog
from appliance.config import INBOX_BYTES, Config
from appliance.contract import Message, check_publishable
from appliance.core.rates import Rate, Rates
from appliance.drivers import images
from appliance.drivers.intake import (
    FULL_PAUSE_SECONDS,
    QUEUED_MESSAGES,
    Intake,
    admit,
)
from appliance.drivers.mqtt import Door
from appliance.drivers.outbox import Outbox
from appliance.drivers.records import Records
from appliance.errors import MessageError
from appliance.lab.shapes import manifest_text
from tests.kit_box import picture, write_catalog
from tests.kit_brokers import WAIT_SECONDS, until
from tests.kit_models import SIDE, conv_net, write_bundle

CONFIG = Config()


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Component c-e0 for anybody; c-compared needs a reference; product p1 has both, with a golden picture."""
    folder = tmp_path_factory.mktemp("catalog")
    write_catalog(folder, 1)
    inputs = [
        {"name": "image", "size": (SIDE, SIDE)},
        {"name": "reference", "size": (SIDE, SIDE), "source": "reference"},
    ]
    bundle = write_bundle(folder, "compared", conv_net(1), inputs=inputs)
    (bundle.folder / "expert.toml").write_text(manifest_text(bundle))
    graph = folder / "graph.toml"
    graph.write_text(graph.read_text() + "\nc-compared = 'compared'\n")
    for product, golden in (("p1", True), ("p2", False)):
        home = folder / "products" / product
        home.mkdir(parents=True)
        if golden:
            Image.fromarray(np.zeros((64, 64), np.uint8)).save(home / "golden.png")
        places = "".join(
            f"[[placements]]\ndesignator = 'R{n}'\ncomponent = '{c}'\nrect = [0, 0, {SIDE}, {SIDE}]\n"
            for n, c in enumerate(("c-e0", "c-compared"))
        )
        line = "golden = 'golden.png'\n" if golden else ""
        (home / "recipe.toml").write_text(f"schema = 1\nproduct = '{product}'\nsize = [64, 64]\n{line}{places}")
    return catalogs.load(folder)


def test_a_part_without_product_is_its_component(catalog: Catalog) -> None:
    accepted = admit(_message("line1/-/-/c-e0"), CONFIG, lambda address: catalog, 100.0)
    assert (accepted.line, accepted.part, accepted.accepted_at) == ("line1", "c-e0", 100.0)


def test_a_part_of_a_product_is_its_placement(catalog: Catalog) -> None:
    assert admit(_message("line1/p1/SN-1/R1"), CONFIG, lambda address: catalog, 0.0).product == "p1"


def test_a_whole_board_of_a_product_with_a_serial_number_is_taken(catalog: Catalog) -> None:
    assert admit(_message("line1/p1/SN-1/_board"), CONFIG, lambda address: catalog, 0.0).part == "_board"


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("line1/-/-/ghost", "unknown-component"),
        ("line1/ghost/-/R1", "unknown-product"),
        ("line1/p1/-/R9", "unknown-part"),
        ("line1/-/-/c-compared", "reference-missing"),
        ("line1/p2/-/R1", "reference-missing"),
        ("line1/ghost/SN-1/_board", "unknown-product"),
        ("line1/-/SN-1/_board", "board-nameless"),
        ("line1/p1/-/_board", "board-nameless"),
        ("line1/-/c-e0", "topic-depth"),
        ("line1/-/-/c+e0", "topic-name"),
    ],
)
def test_what_nothing_can_answer_is_refused(catalog: Catalog, topic: str, reason: str) -> None:
    with pytest.raises(MessageError) as caught:
        admit(_message(topic), CONFIG, lambda address: catalog, 0.0)
    assert caught.value.reason == reason
    assert caught.value.remedy


def test_what_a_sender_asks_for_is_kept(catalog: Catalog) -> None:
    user = {"request-id": "job-1", "captured-at": "2026-01-31T08:15:00Z", "deadline-ms": "1500"}
    message = _message("line1/-/-/c-e0", user=user, response_topic="my/answers", correlation=b"7")
    accepted = admit(message, CONFIG, lambda address: catalog, 0.0)
    assert (accepted.id, accepted.deadline_seconds) == ("job-1", 1.5)
    assert (accepted.response_topic, accepted.correlation) == ("my/answers", b"7")
    assert accepted.captured_at == "2026-01-31T08:15:00+00:00"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"retain": True}, "retained"),
        ({"payload": b""}, "picture-empty"),
        ({"payload": b"GIF89a......"}, "picture-format"),
        ({"response_topic": "coe/v1/plant/infer/line1/-/-/c-e0"}, "response-topic"),
        ({"user": {"deadline-ms": "soon"}}, "deadline-ms"),
        ({"user": {"request-id": "a\0b"}}, "request-id"),
    ],
)
def test_what_a_message_may_not_be_is_refused(catalog: Catalog, changed: dict[str, object], reason: str) -> None:
    with pytest.raises(MessageError) as caught:
        admit(_message("line1/-/-/c-e0", **changed), CONFIG, lambda address: catalog, 0.0)
    assert caught.value.reason == reason


# What the thread does. The spool takes one picture at a time: `_full` has one in it.


class Wire(Door):
    """A link that takes everything and shows what was said on the error topic."""

    def __init__(self) -> None:
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        token: int | None = None,
        correlation: bytes | None = None,
        qos: Literal[0, 1] = 1,
        resent: bool = False,
    ) -> bool:
        check_publishable(topic)
        if topic.startswith(CONFIG.topic("error", "")):
            self.said.put(json.loads(payload))
        return True

    def hear(self) -> dict[str, Any]:
        return self.said.get(timeout=WAIT_SECONDS)


@dataclass
class Desk:
    """An intake at work, and what it did: packet ids in the order of their acknowledgement."""

    intake: Intake
    records: Records
    wire: Wire
    acknowledged: list[int]

    def deliver(self, packet_id: int, seed: int | None = None, **changed: object) -> None:
        payload = picture(packet_id if seed is None else seed)
        self.intake.deliver(_message("line1/-/-/c-e0", **{"payload": payload, "packet_id": packet_id, **changed}))

    def conclude_all(self) -> None:
        """Every picture in the spool gets its verdict."""
        for spooled in self.records.waiting():
            topic = CONFIG.topic("result", "line1", "-", "-", "c-e0")
            self.records.conclude(spooled.picture.id, "pass", b"{}", topic, lambda _: self.intake.room())


@contextmanager
def _desk(
    folder: Path,
    catalog: Catalog,
    *,
    spool_bytes: int = 1_000_000,
    starts: bool = True,
    may_enter: Callable[[str], bool] = lambda line: True,
) -> Iterator[Desk]:
    acknowledged: list[int] = []
    with Records.open(folder, spool_bytes=spool_bytes, verdict_days=1.0) as records:
        outbox = Outbox(CONFIG, records)
        wire = Wire()
        outbox.connect(wire)
        intake = Intake(
            CONFIG,
            lambda address: catalog,
            records,
            outbox,
            acknowledge=lambda message: acknowledged.append(message.packet_id),
            spooled=lambda arrival: None,
            may_enter=may_enter,
        )
        if starts:
            intake.start()
        try:
            yield Desk(intake, records, wire, acknowledged)
        finally:
            intake.stop()


@contextmanager
def _full(folder: Path, catalog: Catalog) -> Iterator[Desk]:
    with _desk(folder, catalog, spool_bytes=1000) as desk:
        desk.deliver(1)
        until(lambda: desk.acknowledged == [1])
        yield desk


def test_what_a_line_sends_beyond_its_rate_is_told_so_and_acknowledged_and_stops_nobody(
    tmp_path: Path, catalog: Catalog
) -> None:
    rates = Rates({"line1": Rate(0.001, 2)}, None)
    with _desk(tmp_path, catalog, may_enter=lambda line: rates.admit(line, 0.0)) as desk:
        for number in (1, 2, 3):
            desk.deliver(number)
        other = _message("line2/-/-/c-e0", payload=picture(4), packet_id=4)
        desk.intake.deliver(other)
        until(lambda: desk.acknowledged == [1, 2, 3, 4])
        said = desk.wire.hear()
        assert (said["reason"], said["has_verdict"]) == ("rate", False)
        assert [one.picture.line for one in desk.records.waiting()] == ["line1", "line1", "line2"]


def test_what_is_known_already_is_answered_whatever_the_rate(tmp_path: Path, catalog: Catalog) -> None:
    rates = Rates({}, Rate(0.001, 1))
    with _desk(tmp_path, catalog, may_enter=lambda line: rates.admit(line, 0.0)) as desk:
        desk.deliver(1)
        desk.deliver(2, seed=1)
        until(lambda: desk.acknowledged == [1, 2])
        desk.conclude_all()
        until(lambda: not desk.records.waiting())
        desk.deliver(3, seed=1)
        until(lambda: desk.acknowledged == [1, 2, 3])
        assert (desk.intake.counts["answered_again"], desk.intake.counts["rate"]) == (1, 0)
        desk.deliver(4)
        assert desk.wire.hear()["reason"] == "rate"


def test_what_finds_the_spool_full_is_acknowledged_when_there_is_room(tmp_path: Path, catalog: Catalog) -> None:
    with _full(tmp_path, catalog) as desk:
        desk.deliver(2)
        until(lambda: desk.intake.counts["spool_full"])
        assert desk.acknowledged == [1]
        desk.conclude_all()
        until(lambda: desk.acknowledged == [1, 2])
        assert len(desk.records.waiting()) == 1


def test_every_packet_of_one_picture_is_acknowledged_when_it_has_room(tmp_path: Path, catalog: Catalog) -> None:
    with _full(tmp_path, catalog) as desk:
        for packet_id in (2, 3, 4):  # a camera that sends again while it is held
            desk.deliver(packet_id, seed=2)
        until(lambda: desk.intake.counts["spool_full"] >= 4)
        desk.conclude_all()
        until(lambda: desk.acknowledged == [1, 2, 3, 4])


def test_what_is_delivered_again_while_it_waits_for_room_is_kept_once(tmp_path: Path, catalog: Catalog) -> None:
    with _full(tmp_path, catalog) as desk:
        for _ in range(10):  # a broker that delivers again what is not acknowledged, as nats-server does
            for packet_id in range(2, 10):
                desk.deliver(packet_id)
        assert desk.intake.counts["redelivered"] == 72
        for count in range(2, 10):
            desk.conclude_all()
            until(lambda count=count: len(desk.acknowledged) == count)  # type: ignore[misc]
        assert desk.acknowledged == list(range(1, 10))


def test_while_one_picture_waits_for_room_no_other_is_offered(
    tmp_path: Path, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    with _full(tmp_path, catalog) as desk, caplog.at_level(logging.INFO):
        desk.deliver(2)
        until(lambda: desk.intake.counts["spool_full"])
        for packet_id in range(3, 60):
            desk.deliver(packet_id)
        begun, told = time.monotonic(), desk.intake.counts["spool_full"]
        until(lambda: desk.intake.counts["spool_full"] >= told + 3)
        assert time.monotonic() - begun > 2 * FULL_PAUSE_SECONDS
        assert desk.intake.counts["received"] == 2
        assert len([record for record in caplog.records if "full" in record.message]) == 1


def test_acknowledgements_keep_the_order_of_arrival_when_a_small_picture_finds_room_first(
    tmp_path: Path, catalog: Catalog
) -> None:
    large = picture(2, side=2 * SIDE)
    with _desk(tmp_path, catalog, spool_bytes=len(large) + 100) as desk:
        desk.deliver(1)
        until(lambda: desk.acknowledged == [1])
        gate = threading.Event()
        desk.records.conclude("nothing", "pass", b"", "t", lambda _: _ignore(gate.wait(WAIT_SECONDS)))
        desk.deliver(2, payload=large)
        desk.deliver(3)
        until(lambda: desk.intake.counts["received"] == 3)
        gate.set()
        until(lambda: desk.records.counts.spooled == 2 and desk.intake.counts["spool_full"])
        assert desk.acknowledged == [1]
        desk.conclude_all()
        until(lambda: desk.acknowledged == [1, 2, 3])


def test_a_refusal_is_not_acknowledged_before_the_picture_in_front_of_it(tmp_path: Path, catalog: Catalog) -> None:
    with _full(tmp_path, catalog) as desk:
        gate = threading.Event()
        desk.records.conclude("nothing", "pass", b"", "t", lambda _: _ignore(gate.wait(WAIT_SECONDS)))
        desk.deliver(2)
        desk.deliver(3, payload=b"no picture")
        assert desk.wire.hear()["reason"] == "picture-format"
        assert desk.acknowledged == [1]
        gate.set()
        until(lambda: desk.intake.counts["spool_full"])
        assert desk.acknowledged == [1]
        desk.conclude_all()
        until(lambda: desk.acknowledged == [1, 2, 3])


def test_what_a_former_connection_left_is_neither_kept_nor_acknowledged(tmp_path: Path, catalog: Catalog) -> None:
    with _full(tmp_path, catalog) as desk:
        for packet_id in (2, 3):
            desk.deliver(packet_id)
        until(lambda: desk.intake.counts["spool_full"])
        desk.deliver(7, seed=2, generation=2)
        desk.deliver(8, seed=3, generation=2)

        def is_done() -> bool:
            desk.conclude_all()
            return len(desk.acknowledged) == 3

        until(is_done)
        assert desk.acknowledged == [1, 7, 8]


def test_a_picture_at_qos_0_is_told_that_the_spool_is_full(tmp_path: Path, catalog: Catalog) -> None:
    with _full(tmp_path, catalog) as desk:
        desk.deliver(0, seed=2, qos=0)
        answer = desk.wire.hear()
        assert (answer["reason"], answer["has_verdict"]) == ("busy", False)
        assert answer["picture_sha256"] == hashlib.sha256(picture(2)).hexdigest()
        desk.deliver(2, seed=3)  # now one waits for room: those at QoS 0 do not wait behind it
        until(lambda: desk.intake.counts["spool_full"] >= 2)
        desk.deliver(0, seed=4, qos=0)
        assert desk.wire.hear()["reason"] == "busy"
        assert desk.acknowledged == [1]


def test_the_inbox_is_bounded_in_bytes(tmp_path: Path, catalog: Catalog) -> None:
    with _desk(tmp_path, catalog, starts=False) as desk:
        third = bytes(INBOX_BYTES // 3)
        for packet_id in range(1, 5):
            desk.deliver(packet_id, payload=third)
        assert desk.intake.counts["overflow"] == 1
        desk.intake.start()
        until(lambda: desk.acknowledged == [1, 2, 3])  # refused, being no pictures


def test_what_has_come_and_is_not_accepted_is_counted(tmp_path: Path, catalog: Catalog) -> None:
    with _desk(tmp_path, catalog, starts=False) as desk:
        for packet_id in (1, 2):
            desk.deliver(packet_id, payload=bytes(100))
        assert (desk.intake.held_bytes, desk.intake.largest_bytes) == (200, 100)
        desk.intake.start()
        until(lambda: desk.acknowledged == [1, 2])
        until(lambda: desk.intake.held_bytes == 0)


def test_a_single_picture_always_fits_the_inbox(tmp_path: Path, catalog: Catalog) -> None:
    with _desk(tmp_path, catalog, starts=False) as desk:
        desk.deliver(1, payload=bytes(INBOX_BYTES + 1))
        assert desk.intake.counts["overflow"] == 0


def test_what_nobody_waits_for_makes_room_in_the_inbox(tmp_path: Path, catalog: Catalog) -> None:
    with _desk(tmp_path, catalog, starts=False) as desk:
        third = bytes(INBOX_BYTES // 3)
        for _ in range(4):
            desk.deliver(0, payload=third, qos=0)
        assert desk.intake.counts["dropped"] == 1
        desk.deliver(1, payload=third)
        assert (desk.intake.counts["dropped"], desk.intake.counts["overflow"]) == (4, 0)
        desk.deliver(2, payload=third)
        desk.deliver(3, payload=third)
        desk.deliver(1, payload=third, generation=2)  # and so does what the broker delivers again
        assert desk.intake.counts["overflow"] == 0


def test_a_fault_of_ours_ends_neither_the_thread_nor_the_order(
    tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, poison = images.check, picture(2)

    def exhausted(payload: bytes, *, max_bytes: int, max_pixels: int) -> None:
        if payload == poison:
            raise MemoryError
        check(payload, max_bytes=max_bytes, max_pixels=max_pixels)

    monkeypatch.setattr(images, "check", exhausted)
    with _desk(tmp_path, catalog) as desk:
        for packet_id in (1, 2, 3):
            desk.deliver(packet_id)
        until(lambda: desk.acknowledged == [1, 3])
        assert desk.intake.counts["failed"] == 1
        monkeypatch.undo()
        desk.deliver(2)
        until(lambda: desk.acknowledged == [1, 3, 2])


def test_stopping_does_not_wait_for_a_full_inbox(tmp_path: Path, catalog: Catalog) -> None:
    with _full(tmp_path, catalog) as desk:
        desk.deliver(2)
        until(lambda: desk.intake.counts["spool_full"])
        for packet_id in range(3, QUEUED_MESSAGES + 10):
            desk.intake.deliver(_message("line1/-/-/c-e0", payload=b"x", packet_id=packet_id))
        assert desk.intake.counts["overflow"]
        stopper = threading.Thread(target=desk.intake.stop)
        stopper.start()
        stopper.join(WAIT_SECONDS)
        assert not stopper.is_alive()


def test_a_conflict_does_not_end_the_request_whose_name_it_has(tmp_path: Path, catalog: Catalog) -> None:
    with _desk(tmp_path, catalog) as desk:
        for packet_id in (1, 2):
            desk.deliver(packet_id, user={"request-id": "job-1"})
        answer = desk.wire.hear()
        assert (answer["reason"], answer["request_id"], answer["has_verdict"]) == ("conflict", "job-1", True)
        assert answer["picture_sha256"] == hashlib.sha256(picture(2)).hexdigest()
        until(lambda: desk.acknowledged == [1, 2])


def test_an_idle_intake_turns(tmp_path: Path, catalog: Catalog) -> None:
    with _desk(tmp_path, catalog) as desk:
        first = desk.intake.turned_seconds
        until(lambda: desk.intake.turned_seconds > first)


def test_room_is_told_when_the_spool_took_everything_for_a_while(
    tmp_path: Path, catalog: Catalog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.drivers.intake.CALM_SECONDS", 0.0)
    with _full(tmp_path, catalog) as desk, caplog.at_level(logging.INFO):
        desk.deliver(2)
        until(lambda: desk.intake.counts["spool_full"])
        assert "intake room" not in caplog.text
        desk.conclude_all()
        until(lambda: "intake room" in caplog.text)


def _message(topic: str, **changed: object) -> Message:
    values: dict[str, object] = {
        "topic": CONFIG.topic("infer", topic),
        "payload": picture(),
        "qos": 1,
        "retain": False,
        "duplicate": False,
        "packet_id": 1,
        "generation": 1,
        **changed,
    }
    return Message(**values)  # type: ignore[arg-type]


def _ignore(_: object) -> None:
    pass
