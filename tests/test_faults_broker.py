"""The broker dies, forgets, fills up and refuses, and nothing is lost. docs/faults.md has the whole table."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from tests.kit_box import HASTY, INFER, RESULT, Box, hear_verdicts, picture
from tests.kit_brokers import AnyBroker, Camera, Mosquitto, Nats, broker, mosquitto, nats, until
from tests.kit_faults import audited, catalog, publish

__all__ = ["broker", "catalog", "mosquitto", "nats"]  # fixtures


def test_nothing_is_lost_when_the_broker_is_killed(tmp_path: Path, catalog: Path, broker: AnyBroker) -> None:
    box = Box(tmp_path / "box", catalog, broker, program=HASTY)
    with box, audited(box, broker.port) as line:
        publish(line, 60)
        until(lambda: len(line.answers) >= 5)
        broker.kill()
        publish(line, 10, first=60)
        broker.start()


@pytest.mark.mosquitto
def test_a_broker_that_forgot_everything_is_told_again_what_the_box_wants(
    tmp_path: Path, catalog: Path, mosquitto: Mosquitto
) -> None:
    box = Box(tmp_path / "box", catalog, mosquitto, program=HASTY)
    with box, audited(box, mosquitto.port) as line:
        publish(line, 20)
        until(lambda: line.answers)
        mosquitto.kill()
        (mosquitto.folder / "mosquitto.db").unlink(missing_ok=True)
        mosquitto.start()
        until(lambda: "mqtt session_lost" in box.log_text)
        publish(line, 20, first=20)


def test_what_the_broker_confirmed_survives_its_restart_without_being_sent_again(
    tmp_path: Path, catalog: Path, broker: AnyBroker
) -> None:
    box = Box(tmp_path / "box", catalog, broker)
    with box:
        box.stop()
    with Camera(broker.port) as camera:
        camera.wait_confirmed(*(camera.publish(INFER + "c-e0", picture(number)) for number in range(20)))
    broker.stop()
    broker.start()
    with Camera(broker.port, RESULT, name="listener") as listener, box:
        assert len(hear_verdicts(listener, 20)) == 20


@pytest.mark.mosquitto
def test_pictures_that_a_full_queue_dropped_are_sent_again(tmp_path: Path, catalog: Path) -> None:
    """mosquitto drops what exceeds max_queued_messages, and confirms it all the same: so it must be 0 on a site."""
    with (
        Mosquitto(tmp_path / "mosquitto", "max_queued_messages 5") as small,
        Box(tmp_path / "box", catalog, small) as box,
    ):
        box.stop()
        with audited(box, small.port) as line:
            publish(line, 30)
            until(lambda: line.camera.resent >= 25)
            box.start()
            box.wait_online()


def test_a_broker_whose_disk_takes_nothing_confirms_nothing(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    box = Box(tmp_path / "box", catalog, nats, program=HASTY)
    with box, audited(box, nats.port) as line:
        publish(line, 10)
        assert line.wait(60)
        former = resource.prlimit(nats.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(nats.pid, resource.RLIMIT_FSIZE, (0, former[1]))
        publish(line, 10, first=10)
        resource.prlimit(nats.pid, resource.RLIMIT_FSIZE, former)
        nats.kill()
        nats.start()


@pytest.mark.mosquitto
def test_a_picture_that_expired_at_the_broker_is_not_inspected_and_may_be_sent_again(
    tmp_path: Path, catalog: Path, mosquitto: Mosquitto
) -> None:
    box = Box(tmp_path / "box", catalog, mosquitto)
    with box:
        box.stop()
    with Camera(mosquitto.port, RESULT, protocol=MQTTProtocolVersion.MQTTv5) as camera:
        sent = camera.publish(INFER + "c-e0", picture(1), MessageExpiryInterval=1)
        camera.wait_confirmed(sent)
        expires = time.monotonic() + 2.0
        until(lambda: time.monotonic() > expires)  # by the broker's clock, which nobody can ask
        with box:
            camera.publish(INFER + "c-e1", picture(2))
            assert [body["part"] for body in hear_verdicts(camera, 1).values()] == ["c-e1"]
            camera.publish(INFER + "c-e0", picture(1))
            assert [body["part"] for body in hear_verdicts(camera, 1).values()] == ["c-e0"]


@pytest.mark.mosquitto
def test_no_secret_is_told(tmp_path: Path, catalog: Path) -> None:
    """Neither in the log, nor in what other processes see of ours."""
    secret = "unspeakable-4711"
    (tmp_path / "password").write_text(secret + "\n")
    (tmp_path / "password").chmod(0o600)
    broker = Mosquitto(tmp_path / "mosquitto")
    broker.start()
    box = Box(tmp_path / "box", catalog, broker)
    account = f"[mqtt]\nusername = 'box1'\npassword_file = '{tmp_path / 'password'}'\n"
    box.config.write_text(box.config.read_text().replace("[mqtt]\n", account))
    with box:
        broker.kill()
        until(lambda: "mqtt no_link" in box.log_text)
        seen = b"".join(Path(f"/proc/{box.pid}/{name}").read_bytes() for name in ("environ", "cmdline"))
        assert os.fsencode(secret) not in seen
    assert secret not in box.log_text
    assert secret not in (tmp_path / "box" / "journal.jsonl").read_text()
