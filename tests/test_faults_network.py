"""A network that resets, cuts, swallows, slows and garbles. docs/faults.md has the whole table."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from appliance.lab.proxy import Proxy, Weather
from tests.kit_box import HASTY, INFER, RESULT, STATUS, Box, picture
from tests.kit_brokers import AnyBroker, Camera, Mosquitto, Nats, broker, mosquitto, nats, until
from tests.kit_faults import audited, catalog, impatient, publish

__all__ = ["broker", "catalog", "mosquitto", "nats"]  # fixtures


def test_links_that_are_reset_again_and_again_lose_nothing(tmp_path: Path, catalog: Path, broker: AnyBroker) -> None:
    """The box's and the camera's, at random moments."""
    chance = random.Random(3)
    with Proxy(broker.port) as near, Proxy(broker.port) as far:
        box = Box(tmp_path / "box", catalog, near, program=HASTY)
        with box, audited(box, far.port) as line:
            for turn in range(2):
                publish(line, 40, first=40 * turn)
                wanted = len(line.answers) + chance.randrange(1, 30)
                until(lambda wanted=wanted: len(line.answers) >= wanted)  # type: ignore[misc]
                chance.choice((near, far)).reset()
        assert near.connections + far.connections > 4


@pytest.mark.parametrize("weather", [Weather.CUT, Weather.REFUSED])
def test_a_link_that_ends_in_mid_packet_or_right_after_its_greeting_is_made_anew(
    tmp_path: Path, catalog: Path, nats: Nats, weather: Weather
) -> None:
    """Again and again: the thread that makes the attempts lives on."""
    with Proxy(nats.port) as proxy:
        box = Box(tmp_path / "box", catalog, proxy, program=HASTY)
        with box, audited(box, nats.port) as line:
            publish(line, 20)
            until(lambda: line.answers)
            proxy.weather = weather
            if weather is Weather.REFUSED:
                proxy.reset()
            publish(line, 20, first=20)
            until(lambda: box.log_text.count("mqtt no_link") >= 2)
            proxy.weather = Weather.FAIR


def test_a_break_that_ends_before_the_keepalive_ends_no_link(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    with Proxy(nats.port) as proxy:
        box = Box(tmp_path / "box", catalog, proxy)
        with box, audited(box, nats.port) as line:
            made = proxy.connections
            proxy.weather = Weather.HOLE
            publish(line, 20)
            until(lambda: proxy.held_bytes)
            assert not line.answers
            proxy.weather = Weather.FAIR
            assert line.wait(60)
            assert proxy.connections == made


def test_a_peer_that_is_gone_without_a_word_is_noticed_by_the_keepalive(
    tmp_path: Path, catalog: Path, mosquitto: Mosquitto
) -> None:
    """By both: the broker says offline for the box, and the box says that it has no link."""
    with Proxy(mosquitto.port) as proxy:
        box = impatient(Box(tmp_path / "box", catalog, proxy, program=HASTY))
        with box, Camera(mosquitto.port, STATUS, name="watcher") as watcher, audited(box, mosquitto.port) as line:
            assert watcher.hear().payload == b"online"
            proxy.weather = Weather.DEAF
            publish(line, 20)
            assert watcher.hear().payload == b"offline"
            until(lambda: "mqtt no_link" in box.log_text)
            proxy.weather = Weather.FAIR
            assert watcher.hear().payload == b"online"


def test_a_slow_link_is_slow_and_nothing_else(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    """Ten pictures of 40 KB at 400 KB/s, keepalive two seconds."""
    with Proxy(nats.port) as proxy:
        box = impatient(Box(tmp_path / "box", catalog, proxy))
        with box, audited(box, nats.port) as line:
            made = proxy.connections
            proxy.bytes_per_second = 400_000
            for number in range(10):
                line.publish("c-e0", picture(number, side=116))
            assert line.wait(60)
            assert proxy.connections == made


def test_a_flipped_bit_is_inspected_as_what_it_is_and_told_by_the_digest(
    tmp_path: Path, catalog: Path, nats: Nats
) -> None:
    """MQTT has no checksum. What arrived is damaged or another picture: never is it answered as the one sent."""
    sent = [picture(number, side=64) for number in range(4)]
    with (
        Proxy(nats.port) as proxy,
        Box(tmp_path / "box", catalog, nats),
        Camera(nats.port, RESULT, name="listener") as listener,
        Camera(proxy.port) as camera,
    ):
        proxy.weather = Weather.NOISE
        digests = set()
        for content in sent:  # one by one: of two in one piece it would hit the header between them
            camera.publish(INFER + "c-e0", content)
            digests.add(json.loads(listener.hear().payload)["picture_sha256"])
        proxy.weather = Weather.FAIR
        camera.publish(INFER + "c-e0", sent[0])
        until(lambda: (body := json.loads(listener.hear().payload)) and body.get("outcome") in ("pass", "fail"))
    assert digests.isdisjoint({_digest(content) for content in sent})


def test_a_broker_whose_name_nobody_knows_is_looked_up_again(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    box = Box(tmp_path / "box", catalog, nats, program=HASTY)
    text = box.config.read_text()
    box.config.write_text(text.replace("[mqtt]\n", "[mqtt]\nhost = 'broker.invalid'\n"))
    box.start()
    until(lambda: box.log_text.count("mqtt no_link host=broker.invalid") >= 2)
    assert box.is_running
    assert box.stop() == 0


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
