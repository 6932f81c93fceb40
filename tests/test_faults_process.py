"""The service is killed, stopped and starved, and nothing is lost. docs/faults.md has the whole table."""

from __future__ import annotations

import os
import random
import resource
import signal
from pathlib import Path

import pytest

from tests.kit_box import HASTY, STATUS, Box
from tests.kit_brokers import AnyBroker, Camera, Mosquitto, Nats, broker, mosquitto, nats, until
from tests.kit_faults import audited, catalog, impatient, publish

__all__ = ["broker", "catalog", "mosquitto", "nats"]  # fixtures


def test_nothing_is_lost_when_the_service_is_killed_again_and_again(
    tmp_path: Path, catalog: Path, broker: AnyBroker
) -> None:
    chance, box = random.Random(7), Box(tmp_path / "box", catalog, broker)
    with box, audited(box, broker.port) as line:
        for turn in range(2):
            publish(line, 60, first=60 * turn)
            wanted = len(line.answers) + chance.randrange(1, 40)
            until(lambda wanted=wanted: len(line.answers) >= wanted)  # type: ignore[misc]
            box.kill()
            box.start()
        box.wait_online()


STEPS = {
    "a picture was committed and not acknowledged": ("records.writer", "Writer._commit", "self.counts.spooled"),
    "a picture was acknowledged": ("link", "Link.acknowledge", "True"),
    "a picture is in hand": ("records.inhand", "InHand.take", "True"),
    "a verdict was entered and not committed": ("records.ledger", "Ledger._conclude", "True"),
    "a verdict was committed and not published": ("records.writer", "Writer._commit", "self.counts.unpublished"),
    "a verdict was published and not confirmed": ("link", "Link.publish", "given[0].token is not None"),
    "a verdict was confirmed and not marked": ("records.records", "Records.published", "True"),
}
DEADLY_STEP = """
import os, signal
from pathlib import Path
import appliance.drivers.{module} as module
step = module.{function}
def deadly(self, *given):
    result = step(self, *given)
    if not Path({once!r}).exists() and ({when}):
        Path({once!r}).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return result
module.{function} = deadly
"""


@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_lost_when_the_service_is_killed_right_when(
    tmp_path: Path, catalog: Path, step: str, nats: Nats
) -> None:
    module, function, when = STEPS[step]
    once = tmp_path / "killed"
    program = DEADLY_STEP.format(module=module, function=function, when=when, once=str(once))
    box = Box(tmp_path / "box", catalog, nats, program=program)
    with box, audited(box, nats.port) as line:
        publish(line, 20)
        until(lambda: not box.is_running)
        assert once.exists()
        box.start()
        box.wait_online()


@pytest.mark.mosquitto
def test_a_service_that_was_stopped_like_a_clock_goes_on_where_it_was(
    tmp_path: Path, catalog: Path, mosquitto: Mosquitto
) -> None:
    """SIGSTOP for longer than its broker waits: that one says offline, and delivers again."""
    box = impatient(Box(tmp_path / "box", catalog, mosquitto, program=HASTY))
    with box, Camera(mosquitto.port, STATUS, name="watcher") as watcher, audited(box, mosquitto.port) as line:
        assert watcher.hear().payload == b"online"
        publish(line, 20)
        os.kill(box.pid, signal.SIGSTOP)
        try:
            publish(line, 20, first=20)
            assert watcher.hear().payload == b"offline"
        finally:
            os.kill(box.pid, signal.SIGCONT)
        assert watcher.hear().payload == b"online"


def test_a_service_that_may_open_too_few_files_ends_with_the_reason(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    program = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))"
    box = Box(tmp_path / "box", catalog, nats, program=program)
    box.start()
    assert box.wait_exit() == 1
    assert "Too many open files" in box.log_text or "unable to open database file" in box.log_text


def test_a_service_that_may_open_no_more_files_for_a_while_serves_on(
    tmp_path: Path, catalog: Path, broker: AnyBroker
) -> None:
    """Its link breaks meanwhile, and what looks after the box every second finds no file to open either."""
    box = Box(tmp_path / "box", catalog, broker, program=HASTY)
    with box, audited(box, broker.port) as line:
        publish(line, 20)
        assert line.wait(60)
        former = resource.prlimit(box.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(box.pid, resource.RLIMIT_NOFILE, (3, former[1]))
        broker.kill()
        publish(line, 20, first=20)
        broker.start()
        until(lambda: not box.is_running or box.log_text.count("Too many open files") >= 2)
        assert box.is_running, box.log_text
        resource.prlimit(box.pid, resource.RLIMIT_NOFILE, former)
        publish(line, 20, first=40)
