"""The installed service as systemd starts it: its own ExecStart, under its own filters, with a real notify socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit_box import INFER, Box, picture, write_catalog
from tests.kit_brokers import Camera, until
from tests.kit_systemd import NotifySocket, can_filter, settings, under_unit
from tests.test_systemd_unit import UNIT, installed

PIPE_BYTES = 1 << 16


@pytest.mark.skipif(not can_filter(), reason="no libseccomp.so.2 on this machine")
def test_the_installed_unit_says_ready_and_stopping(tmp_path: Path) -> None:
    destination = installed(tmp_path)
    command = _exec_start(destination, Box(tmp_path / "box", write_catalog(tmp_path / "catalog", 2)).config)
    with NotifySocket(tmp_path) as systemd, _started(command, systemd.environment(), tmp_path) as service:
        assert systemd.wait_for("READY=1", 60), (tmp_path / "log").read_text()
        until(lambda: "mqtt state=ready" in (tmp_path / "log").read_text())
        service.send_signal(signal.SIGTERM)
        assert systemd.wait_for("STOPPING=1", 60)
        assert service.wait(60) == 0
        assert any("serving 2 experts" in message for message in systemd.messages)


def test_the_watchdog_is_fed_while_the_decider_turns_and_not_while_it_hangs(tmp_path: Path) -> None:
    """The journal is a pipe that nobody reads: the decider blocks in it for real, every other thread lives on."""
    box = Box(tmp_path / "box", write_catalog(tmp_path / "catalog", 2))
    pipe = tmp_path / "journal"
    os.mkfifo(pipe)
    box.config.write_text(box.config.read_text().replace("'journal.jsonl'", f"'{pipe}'"))
    with NotifySocket(tmp_path) as systemd:
        box.start(systemd.environment(watchdog_seconds=1.0))
        reader = os.open(pipe, os.O_RDONLY)
        box.wait_online()
        assert systemd.wait_for("WATCHDOG=1", 60)
        with Camera(box.port) as camera:
            for number in range(600):
                camera.publish(INFER + "c-e0", picture(number))
            until(lambda: not systemd.wait_for("WATCHDOG=1", 2.0))
            assert box.is_running
            os.set_blocking(reader, False)
            until(lambda: _drained(reader) and systemd.wait_for("WATCHDOG=1", 0.5))
        box.kill()
        os.close(reader)


def _drained(reader: int) -> bool:
    try:
        while os.read(reader, PIPE_BYTES):
            pass
    except BlockingIOError:
        pass
    return True


def _exec_start(destination: Path, config: Path) -> list[str]:
    """The installed unit's command, at its place below DESTDIR, with a test's settings."""
    program, *arguments = settings(destination / "etc/systemd/system/appliance.service")["ExecStart"][0].split()
    arguments[arguments.index("--config") + 1] = str(config)
    return under_unit(UNIT, [sys.executable, str(destination / program.lstrip("/")), *arguments])


@contextmanager
def _started(command: list[str], notify: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        service = subprocess.Popen(command, env={**os.environ, **notify}, stdout=log, stderr=log)
    try:
        yield service
    finally:
        if service.poll() is None:
            service.kill()
            service.wait()
