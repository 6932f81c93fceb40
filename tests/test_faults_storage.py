"""The state directory's disk is full, damaged or gone, and nothing is lost. docs/faults.md has the whole table."""

from __future__ import annotations

import resource
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.kit_box import Box
from tests.kit_brokers import AnyBroker, Nats, broker, mosquitto, nats, until
from tests.kit_faults import audited, catalog, publish

__all__ = ["broker", "catalog", "mosquitto", "nats"]  # fixtures


def test_a_disk_that_takes_nothing_stops_acknowledging_and_goes_on_when_it_takes_again(
    tmp_path: Path, catalog: Path, nats: Nats
) -> None:
    """The process may not make files longer, as with a quota: what it has is read, nothing new is acknowledged."""
    box = Box(tmp_path / "box", catalog, nats)
    with box, audited(box, nats.port) as line:
        publish(line, 20)
        assert line.wait(60)
        former = resource.prlimit(box.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(box.pid, resource.RLIMIT_FSIZE, (4096, former[1]))
        publish(line, 20, first=20)
        until(lambda: "records trouble" in box.log_text)
        assert box.is_running
        resource.prlimit(box.pid, resource.RLIMIT_FSIZE, former)
        until(lambda: "records recovered" in box.log_text)


def test_pictures_of_a_damaged_store_are_answered_when_they_are_sent_again(
    tmp_path: Path, catalog: Path, broker: AnyBroker
) -> None:
    """Torn in the midst while the service was down: it is moved aside and kept, and a new one begins."""
    box = Box(tmp_path / "box", catalog, broker)
    state = box.folder / "state"
    with box:
        box.stop()
        store = state / "records.db"
        with closing(sqlite3.connect(store)) as db:  # else the log would make up for what the file lacks
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = bytearray(store.read_bytes())
        content[100:4000] = bytes(3900)
        store.write_bytes(bytes(content))
        with audited(box, broker.port) as line:
            publish(line, 20)
            box.start()
            box.wait_online()
    assert "moved_aside" in box.log_text
    assert list(state.glob("records.db.damaged-*"))
