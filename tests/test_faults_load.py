"""More pictures than the box can take at once, and a clock that jumps. docs/faults.md has the whole table."""

from __future__ import annotations

import json
from pathlib import Path

from tests.kit_box import STATS, Box, picture
from tests.kit_brokers import AnyBroker, Camera, Nats, broker, mosquitto, nats, until
from tests.kit_faults import audited, catalog, publish

__all__ = ["broker", "catalog", "mosquitto", "nats"]  # fixtures

SPOOL_BYTES = 30_000
LIMITS = f"[limits]\npicture_bytes = 10000\nspool = {SPOOL_BYTES}\n"


def test_a_burst_beyond_the_spool_waits_at_the_broker_and_is_answered(
    tmp_path: Path, catalog: Path, broker: AnyBroker
) -> None:
    """250 at once, and room for a few: the spool stays inside its bound, and the link lives on. Slow enough for the
    statistics of a second to come meanwhile."""
    slow = "import time; import appliance.engine.executors as e; run = e.Inspection.__call__\n"
    slow += "e.Inspection.__call__ = lambda self, *given: (time.sleep(0.1), run(self, *given))[1]"
    box = Box(tmp_path / "box", catalog, broker, settings=LIMITS, program=slow)
    with box, Camera(broker.port, STATS, name="watcher") as watcher, audited(box, broker.port) as line:
        publish(line, 250)
        assert line.wait(60)
        stats = [json.loads(watcher.heard.get().payload) for _ in range(watcher.heard.qsize())]
    assert "intake full" in box.log_text
    most = SPOOL_BYTES // min(len(picture(number)) for number in range(10))
    assert 0 < max(each["spooled"] for each in stats) <= most
    assert "no_link" not in box.log_text


def test_a_clock_that_jumps_changes_no_deadline_and_loses_no_session(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    """Thirty days on, then sixty back. Deadlines and time-outs go by another clock."""
    jump = tmp_path / "jump"
    jump.write_text("0")
    program = f"import time\nreal = time.time\ntime.time = lambda: real() + float(open({str(jump)!r}).read())"
    box = Box(tmp_path / "box", catalog, nats, program=program)
    with box, audited(box, nats.port) as line:
        publish(line, 10)
        for turn, days in enumerate((30, -30)):
            (tmp_path / "next").write_text(str(days * 86_400.0))
            (tmp_path / "next").rename(jump)  # at once: who found the file empty would have no clock at all
            publish(line, 10, first=10 * turn + 10)
            assert line.wait(60)
    assert {answer.body["outcome"] for answer in line.answers.values()} <= {"pass", "fail"}
    assert "no_link" not in box.log_text
    assert "session_lost" not in box.log_text


def test_nobody_who_listens_to_verdicts_changes_nothing_for_the_box(
    tmp_path: Path, catalog: Path, broker: AnyBroker
) -> None:
    """They are recorded, confirmed by the broker and done."""
    box = Box(tmp_path / "box", catalog, broker)
    with box, Camera(broker.port, STATS, name="watcher") as watcher, Camera(broker.port, name="mute") as mute:
        for number in range(20):
            mute.publish("coe/v1/plant/infer/line1/-/-/c-e0", picture(number))
        until(lambda: _is_done(json.loads(watcher.hear().payload)))


def _is_done(stats: dict[str, object]) -> bool:
    verdicts = stats["verdicts"]
    assert isinstance(verdicts, dict)
    return sum(verdicts.values()) == 20 and not stats["unpublished"]
