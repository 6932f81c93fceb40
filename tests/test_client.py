"""A camera's side: it keeps what is not answered, sends it again, and never answers twice."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from appliance.client import Answer, Camera, publish_files
from appliance.errors import BrokerError, MessageError, PictureError
from tests import kit_brokers
from tests.kit_brokers import WAIT_SECONDS, AnyBroker, Nats, broker, nats, until
from tests.kit_ports import deaf_port
from tests.test_mqtt import FakeBroker

__all__ = ["broker", "nats"]  # fixtures

INFER = "coe/v1/plant/infer/line1/-/-/R1"
RESULT = "coe/v1/plant/result/line1/-/-/R1"
ERROR = "coe/v1/plant/error/picture-empty"


def test_a_picture_without_an_answer_is_sent_again(broker: AnyBroker) -> None:
    with kit_brokers.Camera(broker.port, INFER, name="box") as box, _camera(broker, resend_seconds=0.3) as camera:
        camera.publish(part="R1", picture=b"bytes")
        assert [box.hear().payload for _ in range(3)] == [b"bytes"] * 3
        assert camera.waiting == 1
        until(lambda: camera.resent >= 2)


def test_an_answer_ends_the_waiting_and_comes_once(broker: AnyBroker) -> None:
    answers: list[Answer] = []
    with kit_brokers.Camera(broker.port, INFER, name="box") as box, _camera(broker) as camera:
        camera.on_answer(answers.append)
        name = camera.publish(part="R1", picture=b"bytes")
        box.hear()
        for _ in range(2):
            box.publish_confirmed(RESULT, json.dumps({"request_id": name, "outcome": "pass"}).encode())
        assert camera.wait(WAIT_SECONDS)
        other = camera.publish(part="R1", picture=b"other")
        box.publish_confirmed(RESULT, json.dumps({"request_id": other, "outcome": "fail"}).encode())
        assert camera.wait(WAIT_SECONDS)
    assert [(a.request_id, a.body["outcome"], a.is_rejected) for a in answers] == [
        (name, "pass", False),
        (other, "fail", False),
    ]


def test_a_refusal_is_an_answer_but_an_error_beside_a_verdict_is_not(nats: Nats) -> None:
    answers: list[Answer] = []
    with kit_brokers.Camera(nats.port, INFER, name="box") as box, _camera(nats) as camera:
        camera.on_answer(answers.append)
        name = camera.publish(part="R1", picture=b"")
        box.publish_confirmed(ERROR, json.dumps({"request_id": name, "has_verdict": True}).encode())
        box.publish_confirmed(ERROR, b"not json")
        box.publish_confirmed(ERROR, json.dumps({"request_id": name, "has_verdict": False}).encode())
        assert camera.wait(WAIT_SECONDS)
    assert [answer.is_rejected for answer in answers] == [True]


def test_what_its_line_sent_too_fast_is_sent_again(nats: Nats) -> None:
    answers: list[Answer] = []
    with kit_brokers.Camera(nats.port, INFER, name="box") as box, _camera(nats, resend_seconds=0.5) as camera:
        camera.on_answer(answers.append)
        name = camera.publish(part="R1", picture=b"bytes")
        assert box.hear().payload == b"bytes"
        box.publish_confirmed(ERROR, json.dumps({"request_id": name, "has_verdict": False, "reason": "rate"}).encode())
        assert box.hear().payload == b"bytes"
        box.publish_confirmed(RESULT, json.dumps({"request_id": name, "outcome": "pass"}).encode())
        assert camera.wait(WAIT_SECONDS)
    assert [answer.is_rejected for answer in answers] == [False]


def test_what_was_on_its_way_is_sent_again_when_the_broker_comes_back(nats: Nats) -> None:
    with _camera(nats, resend_seconds=1.0) as camera:
        nats.kill()
        camera.publish(part="R1", picture=b"bytes")
        nats.start()
        with kit_brokers.Camera(nats.port, INFER, name="box") as box:
            assert box.hear().payload == b"bytes"


@pytest.mark.parametrize("away", ["killed", "frozen"])
def test_nothing_piles_up_while_the_broker_is_away(nats: Nats, away: str) -> None:
    with _camera(nats, resend_seconds=0.05) as camera:
        nats.kill() if away == "killed" else nats.freeze()
        sent = {camera.publish(part="R1", picture=b"%d" % n): b"%d" % n for n in range(3)}
        assert not camera.wait(1.0)
        assert camera.resent == 0
        nats.start() if away == "killed" else nats.thaw()
        with kit_brokers.Camera(nats.port, INFER, name="box") as box:
            unheard = set(sent.values())
            while unheard:
                unheard.discard(box.hear().payload)


def test_no_more_than_the_window_waits(nats: Nats) -> None:
    with kit_brokers.Camera(nats.port, INFER, name="box") as box, _camera(nats, window=2) as camera:
        first, _ = [camera.publish(part="R1", picture=bytes([n])) for n in range(2)]
        with pytest.raises(BrokerError, match=r"2 wait for their verdicts, the first since \d+\.\d s"):
            camera.publish(part="R1", picture=b"third", timeout_seconds=0.3)
        with ThreadPoolExecutor(1) as pool:
            third = pool.submit(camera.publish, part="R1", picture=b"third")
            box.publish_confirmed(RESULT, json.dumps({"request_id": first}).encode())
            third.result(WAIT_SECONDS)
        assert camera.waiting == 2


def test_who_waits_for_room_learns_that_the_camera_closed(nats: Nats) -> None:
    with ThreadPoolExecutor(1) as pool:
        with _camera(nats, window=1) as camera:
            camera.publish(part="R1", picture=b"first")
            second = pool.submit(camera.publish, part="R1", picture=b"second")
            until(lambda: second.running())
        with pytest.raises(BrokerError, match="closed"):
            second.result(WAIT_SECONDS)


def test_a_callback_that_raises_does_not_end_the_answers(nats: Nats, caplog: pytest.LogCaptureFixture) -> None:
    def faulty(answer: Answer) -> None:
        raise ValueError("the user's fault")

    with kit_brokers.Camera(nats.port, INFER, name="box") as box, _camera(nats) as camera:
        camera.on_answer(faulty)
        for picture in (b"first", b"second"):
            name = camera.publish(part="R1", picture=picture)
            box.publish_confirmed(RESULT, json.dumps({"request_id": name}).encode())
            assert camera.wait(WAIT_SECONDS)
    assert caplog.text.count("camera callback failed") == 2


def test_a_refused_subscription_is_an_error() -> None:
    refuses = b"\x20\x02\x00\x00\x90\x04\x00\x01\x01\x80"  # CONNACK, and a SUBACK that grants one topic of two
    with (
        FakeBroker(refuses) as broker,
        pytest.raises(BrokerError, match="we may not subscribe to coe/v1/plant/result/line1"),
        Camera("127.0.0.1", broker.port, line="line1"),
    ):
        pass


def test_a_refused_connection_is_an_error_at_once() -> None:
    with (
        FakeBroker(b"\x20\x02\x00\x05") as broker,
        pytest.raises(BrokerError, match="refuses us: Not authorized"),
        Camera("127.0.0.1", broker.port, line="line1"),
    ):
        pass


def test_an_impossible_name_is_refused_before_it_is_sent(nats: Nats) -> None:
    with _camera(nats) as camera, pytest.raises(MessageError, match="R 1"):
        camera.publish(part="R 1", picture=b"bytes")


def test_a_picture_beyond_the_limit_is_refused_before_it_is_sent(nats: Nats) -> None:
    with _camera(nats) as camera, pytest.raises(PictureError, match="16000001 bytes"):
        camera.publish(part="R1", picture=bytes(16_000_001))


def test_no_broker_is_an_error_that_names_it() -> None:
    with (
        deaf_port() as port,
        pytest.raises(BrokerError, match=f"no broker at 127.0.0.1:{port}"),
        Camera("127.0.0.1", port, line="line1"),
    ):
        pass


def test_a_file_that_cannot_be_read_is_named(nats: Nats, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"none\.jpg"):
        publish_files(_camera(nats), [tmp_path / "none.jpg"], part="R1", product="-", board="-", timeout_seconds=1.0)


def test_files_without_an_answer_are_listed(nats: Nats, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"bytes")
    found = publish_files(_camera(nats), [path], part="R1", product="-", board="-", timeout_seconds=0.2)
    assert (found["pictures"], found["verdicts"], found["unanswered"]) == (1, 0, [str(path)])


def test_more_files_than_the_window_end_in_time(nats: Nats, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.jpg" for number in range(5)]
    for path in files:
        path.write_bytes(path.name.encode())
    with ThreadPoolExecutor(1) as pool:
        camera = _camera(nats, window=2)
        published = pool.submit(
            publish_files, camera, files, part="R1", product="-", board="-", timeout_seconds=0.5
        ).result(WAIT_SECONDS)
    assert (published["pictures"], published["verdicts"]) == (5, 0)
    assert published["unanswered"] == sorted(map(str, files))


def test_a_refused_file_is_answered_but_has_no_verdict(nats: Nats, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"")
    name = _camera(nats).name_of("-", "-", "R1", b"")
    with kit_brokers.Camera(nats.port, INFER, name="box") as box, ThreadPoolExecutor(1) as pool:
        published = pool.submit(
            publish_files, _camera(nats), [path], part="R1", product="-", board="-", timeout_seconds=WAIT_SECONDS
        )
        box.hear()
        box.publish_confirmed(ERROR, json.dumps({"request_id": name, "reason": "picture-empty"}).encode())
        found = published.result(WAIT_SECONDS)
    assert (found["verdicts"], found["refused"], found["unanswered"]) == (0, [str(path)], [])


def _camera(broker: AnyBroker, resend_seconds: float = 15.0, window: int = 128) -> Camera:
    return Camera("127.0.0.1", broker.port, line="line1", resend_seconds=resend_seconds, window=window)
