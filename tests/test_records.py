"""The spool and the verdicts: nothing that was committed is lost, and the same question always has the same answer."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import queue
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from appliance.core.types import Crash
from appliance.drivers.records import (
    Acceptance,
    Answered,
    Conclusion,
    Conflict,
    Counts,
    Full,
    New,
    Picture,
    Publication,
    Recorded,
    Records,
    Spooled,
    Unowed,
    Waiting,
)
from appliance.drivers.records.ledger import Request, Result
from appliance.drivers.records.schema import PRAGMAS, ROW_BYTES
from appliance.drivers.records.writer import (
    BUSY_REQUESTS,
    DEEP_SPOOL,
    GATHERED_REQUESTS,
    QUEUED_BYTES,
    Calendar,
    Writer,
)
from appliance.errors import NotSpooled, RecordsError
from tests.kit_brokers import until

WAIT_SECONDS = 60.0
TOPIC = "coe/v1/plant/result/line1/-/-/R1"


def opened(
    folder: Path,
    *,
    spool_bytes: int = 1_000_000,
    outbox_rows: float = inf,
    verdict_bytes: float = inf,
    verdict_days: float = 1.0,
    clock: Callable[[], float] = lambda: 1000.0,
) -> Records:
    return Records.open(
        folder,
        spool_bytes=spool_bytes,
        verdict_days=verdict_days,
        outbox_rows=outbox_rows,
        verdict_bytes=verdict_bytes,
        clock=clock,
    )


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with opened(tmp_path) as store:
        yield store


def picture(id: str, payload: bytes = b"x", **given: object) -> Picture:
    digest = hashlib.sha256(payload).hexdigest()
    return replace(Picture(id, "line1", "-", "-", "R1", digest, 999.0), **given)  # type: ignore[arg-type]


def accept(records: Records, id: str, payload: bytes = b"x", **given: object) -> Acceptance:
    answers: queue.Queue[Acceptance] = queue.Queue()
    records.accept(picture(id, payload, **given), payload, answers.put)
    return answers.get(timeout=WAIT_SECONDS)


def conclude(records: Records, id: str, body: bytes = b"{}", outcome: str = "pass") -> Conclusion:
    answers: queue.Queue[Conclusion] = queue.Queue()
    records.conclude(id, outcome, body, TOPIC, answers.put)
    return answers.get(timeout=WAIT_SECONDS)


def publications(answer: Acceptance | Conclusion) -> tuple[Publication, ...]:
    assert isinstance(answer, Answered | Recorded)
    return answer.publications


# Accepting.


def test_a_new_picture_waits_with_all_that_is_known_of_it(records: Records) -> None:
    known = {
        "captured_at": "2026-01-31T08:15:00+00:00",
        "deadline_seconds": 0.5,
        "response_topic": "my/answers",
        "correlation": b"\x00",
    }
    assert accept(records, "a", b"bytes", **known) == New(1)
    assert records.waiting() == [Spooled(1, picture("a", b"bytes", **known), 5)]
    assert records.payload("a") == b"bytes"
    assert records.counts == Counts(spooled=1, spooled_bytes=5, verdicts=0, unpublished=0)


def counted_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each commit from here on, how many requests shared it."""
    groups, commit = list[int](), Writer._commit

    def counted(self: Writer, group: Sequence[Request]) -> list[Result]:
        groups.append(len(group))
        return commit(self, group)

    monkeypatch.setattr(Writer, "_commit", counted)
    return groups


def test_while_many_pictures_wait_requests_share_a_commit(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.drivers.records.writer.GATHER_SECONDS", WAIT_SECONDS)
    for number in range(DEEP_SPOOL):
        accept(records, f"early{number}")
    groups = counted_groups(monkeypatch)
    answers: queue.Queue[Acceptance] = queue.Queue()
    for number in range(GATHERED_REQUESTS):
        records.accept(picture(f"late{number}"), b"x", answers.put)
    for _ in range(GATHERED_REQUESTS):
        answers.get(timeout=WAIT_SECONDS / 2)
    assert groups == [GATHERED_REQUESTS]


def test_while_much_comes_at_once_requests_share_a_commit(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.drivers.records.writer.BUSY_SECONDS", WAIT_SECONDS)
    groups, go_on = counted_groups(monkeypatch), threading.Event()

    def hold(answer: Acceptance) -> None:
        go_on.wait(WAIT_SECONDS)

    records.accept(picture("first"), b"x", hold)
    until(lambda: groups == [1])
    answers: queue.Queue[Acceptance] = queue.Queue()
    for number in range(BUSY_REQUESTS):
        records.accept(picture(f"busy{number}"), b"x", answers.put)
    go_on.set()
    for _ in range(BUSY_REQUESTS):
        answers.get(timeout=WAIT_SECONDS / 2)
    for _ in range(GATHERED_REQUESTS):
        records.accept(picture("again"), b"x", answers.put)
    for _ in range(GATHERED_REQUESTS):
        answers.get(timeout=WAIT_SECONDS / 2)
    assert groups == [1, BUSY_REQUESTS, GATHERED_REQUESTS]


def test_who_closes_a_store_that_gathers_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.drivers.records.writer.GATHER_SECONDS", 1000.0)
    with opened(tmp_path) as records:
        for number in range(DEEP_SPOOL):
            accept(records, f"early{number}")
        records.accept(picture("late"), b"x", lambda answer: None)
    with opened(tmp_path) as records:
        assert records.counts.spooled == DEEP_SPOOL + 1


def test_the_same_picture_again_waits_already(records: Records) -> None:
    accept(records, "a")
    assert accept(records, "a") == Waiting()
    assert records.counts.spooled == 1


def test_the_same_name_for_other_bytes_is_a_conflict(records: Records) -> None:
    accept(records, "a", b"one")
    assert accept(records, "a", b"two") == Conflict()
    assert records.payload("a") == b"one"
    conclude(records, "a")
    assert accept(records, "a", b"two") == Conflict()


@pytest.mark.parametrize("level", ["line", "product", "board", "part"])
def test_the_same_name_for_another_place_is_a_conflict(records: Records, level: str) -> None:
    accept(records, "a")
    assert accept(records, "a", b"x", **{level: "other"}) == Conflict()
    conclude(records, "a")
    assert accept(records, "a", b"x", **{level: "other"}) == Conflict()


def test_a_full_spool_takes_nothing_until_there_is_room(tmp_path: Path) -> None:
    with opened(tmp_path, spool_bytes=10) as records:
        accept(records, "a", b"12345678")
        assert accept(records, "b", b"123") == Full("the spool holds 8 of 10 bytes")
        assert accept(records, "c", b"12") == New(2)
        assert [spooled.picture.id for spooled in records.waiting()] == ["a", "c"]
        conclude(records, "a")
        assert isinstance(accept(records, "b", b"123"), New)


def test_a_full_outbox_takes_nothing_until_the_broker_has_taken_some_and_drops_nothing(tmp_path: Path) -> None:
    """What was accepted before is recorded all the same, and what waits in it is not repeated."""
    with opened(tmp_path, outbox_rows=2) as records:
        for name in "abc":
            accept(records, name)
        tokens = [publications(conclude(records, name))[0].token for name in "abc"]
        assert accept(records, "d") == Full("3 verdicts wait for the broker (limits.outbox)")
        assert isinstance(accept(records, "a"), Full)
        assert accept(records, "a", b"other") == Conflict()
        assert len(records.unpublished()) == 3
        for token in tokens[:2]:
            records.published(token)
        until(lambda: records.counts.unpublished == 1)
        assert isinstance(accept(records, "d"), New)
        (again,) = publications(accept(records, "a"))
        assert (again.resent, again.body) == (True, b"{}")
        assert [(row.id, row.resent) for row in records.unpublished()] == [("c", False), ("a", True)]


def test_a_full_spool_still_knows_its_pictures_and_verdicts(tmp_path: Path) -> None:
    with opened(tmp_path, spool_bytes=4) as records:
        accept(records, "a", b"1234")
        conclude(records, "a")
        accept(records, "b", b"1234")
        assert isinstance(accept(records, "a", b"1234"), Answered)
        assert accept(records, "b", b"1234") == Waiting()
        assert isinstance(accept(records, "c", b"1234"), Full)


def test_more_pictures_than_the_disk_can_take_are_not_held_in_memory(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.drivers.records.writer.QUEUED_BYTES", 10)
    gate, answers = threading.Event(), queue.Queue[Acceptance]()

    def block(_: Acceptance) -> None:
        gate.wait(WAIT_SECONDS)

    records.accept(picture("a"), b"x", block)
    until(lambda: records.counts.spooled == 1)
    records.accept(picture("b", b"12345678"), b"12345678", answers.put)
    records.accept(picture("c", b"12345678"), b"12345678", answers.put)
    assert answers.get(timeout=WAIT_SECONDS) == Full("more pictures come than the disk can take")
    gate.set()
    assert answers.get(timeout=WAIT_SECONDS) == New(2)


def test_answers_come_in_the_order_of_the_questions(records: Records) -> None:
    answers: queue.Queue[tuple[int, Acceptance]] = queue.Queue()
    for n in range(200):
        records.accept(picture(f"{n % 150}"), b"x", lambda answer, n=n: answers.put((n, answer)))  # type: ignore[misc]
    got = [answers.get(timeout=WAIT_SECONDS) for _ in range(200)]
    assert [n for n, _ in got] == list(range(200))
    assert [answer for _, answer in got] == [New(n + 1) for n in range(150)] + [Waiting()] * 50


def test_the_spool_is_walked_in_order_of_arrival_in_steps(records: Records) -> None:
    for n in range(5):
        accept(records, f"p{n}")
    conclude(records, "p1")
    first = records.waiting(limit=2)
    rest = records.waiting(after=first[-1].arrival, limit=2)
    assert [spooled.picture.id for spooled in first + rest] == ["p0", "p2", "p3", "p4"]
    assert records.waiting(after=rest[-1].arrival) == []


def test_an_arrival_number_is_never_given_twice(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        accept(records, "a")
        conclude(records, "a")
    with opened(tmp_path) as records:
        assert accept(records, "b") == New(2)


def test_a_payload_can_be_read_by_many_threads(records: Records) -> None:
    for n in range(8):
        accept(records, f"p{n}", b"%d" % n)
    read: queue.Queue[tuple[int, bytes]] = queue.Queue()
    threads = [threading.Thread(target=lambda n=n: read.put((n, records.payload(f"p{n}")))) for n in range(8)]
    for thread in threads:
        thread.start()
    assert dict(read.get(timeout=WAIT_SECONDS) for _ in threads) == {n: b"%d" % n for n in range(8)}
    for thread in threads:
        thread.join()


def test_a_payload_that_is_gone_is_named(records: Records) -> None:
    with pytest.raises(NotSpooled, match="no picture a in the spool"):
        records.payload("a")


def test_a_store_that_cannot_be_read_is_another_matter_than_a_payload_that_is_gone(
    records: Records, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "records.db")) as db:
        db.execute("ALTER TABLE pictures RENAME TO lost")
    with pytest.raises(RecordsError) as caught:
        records.payload("a")
    assert not isinstance(caught.value, NotSpooled)


def test_pictures_on_their_way_to_the_disk_are_held_to_32_mib(records: Records) -> None:
    gate, answers = threading.Event(), queue.Queue[Acceptance]()
    records.accept(picture("a"), b"x", lambda _: _ignore(gate.wait(WAIT_SECONDS)))
    until(lambda: records.counts.spooled == 1)
    third = bytes(QUEUED_BYTES // 3)
    for name in "bcde":
        records.accept(picture(name, b"x"), third, answers.put)
    assert answers.get(timeout=WAIT_SECONDS) == Full("more pictures come than the disk can take")
    assert answers.empty()
    assert QUEUED_BYTES == 32 * 1024 * 1024
    gate.set()


def test_what_is_on_its_way_to_the_disk_is_counted_until_it_is_there(records: Records) -> None:
    gate, last = threading.Event(), threading.Event()
    records.accept(picture("a"), b"x", lambda _: _ignore(gate.wait(WAIT_SECONDS)))
    until(lambda: records.counts.spooled == 1)
    records.accept(picture("b", b"2" * 100), b"2" * 100, lambda _: last.set())
    assert records.queued_bytes == 1 + 100, "the first is still in the hands of who writes"
    gate.set()
    assert last.wait(WAIT_SECONDS)
    until(lambda: records.queued_bytes == 0)


def test_the_writer_turns_while_nobody_asks_for_anything(records: Records) -> None:
    for _ in range(2):
        last = records.turned_seconds
        until(lambda last=last: records.turned_seconds > last)  # type: ignore[misc]


def test_a_writer_that_hangs_is_seen(records: Records) -> None:
    gate, hangs = threading.Event(), threading.Event()

    def hang(_: Acceptance) -> None:
        hangs.set()
        gate.wait(WAIT_SECONDS)

    records.accept(picture("a"), b"x", hang)
    assert hangs.wait(WAIT_SECONDS)
    last = records.turned_seconds
    until(lambda: time.monotonic() > last + 1.0)
    assert records.turned_seconds == last
    gate.set()
    until(lambda: records.turned_seconds > last)


# Concluding and publishing.


def test_a_verdict_leaves_the_spool_and_waits_in_the_outbox(records: Records) -> None:
    accept(records, "a")
    sent = conclude(records, "a", b'{"outcome":"pass"}')
    assert sent == Recorded((Publication(1, "a", TOPIC, None, b'{"outcome":"pass"}'),))
    assert records.waiting() == []
    assert records.unpublished() == list(publications(sent))
    assert records.verdict("a") == b'{"outcome":"pass"}'
    assert records.counts == Counts(spooled=0, spooled_bytes=0, verdicts=1, unpublished=1)


def test_a_verdict_goes_to_the_response_topic_too(records: Records) -> None:
    accept(records, "a", response_topic="my/answers", correlation=b"7")
    assert [(p.topic, p.correlation) for p in publications(conclude(records, "a"))] == [
        (TOPIC, None),
        ("my/answers", b"7"),
    ]


def test_who_asks_again_under_another_response_topic_gets_it_there(records: Records) -> None:
    accept(records, "a", response_topic="my/answers", correlation=b"7")
    accept(records, "a", response_topic="new/answers")
    accept(records, "a")
    assert [(p.topic, p.correlation) for p in publications(conclude(records, "a"))] == [
        (TOPIC, None),
        ("new/answers", None),
    ]


def test_a_published_verdict_leaves_the_outbox_and_stays_on_record(records: Records) -> None:
    accept(records, "a")
    (publication,) = publications(conclude(records, "a", b"body"))
    records.published(publication.token)
    until(lambda: records.counts.unpublished == 0)
    assert records.unpublished() == []
    assert records.verdict("a") == b"body"


def test_a_token_that_is_done_may_be_marked_again(records: Records) -> None:
    accept(records, "a")
    (publication,) = publications(conclude(records, "a"))
    for _ in range(3):
        records.published(publication.token)
    records.published(99)
    accept(records, "b")
    assert records.counts.unpublished == 0


def test_asking_again_repeats_the_same_bytes(records: Records) -> None:
    accept(records, "a")
    (first,) = publications(conclude(records, "a", b"body"))
    records.published(first.token)
    (second,) = publications(accept(records, "a"))
    assert second == replace(first, token=second.token, resent=True)
    assert second.token > first.token


def test_asking_a_hundred_times_makes_one_publication(records: Records) -> None:
    accept(records, "a")
    first = publications(conclude(records, "a", b"body"))
    assert all(publications(accept(records, "a")) == first for _ in range(100))
    assert records.counts.unpublished == 1


def test_asking_again_is_answered_at_the_new_response_topic(records: Records) -> None:
    accept(records, "a", response_topic="my/answers")
    conclude(records, "a", b"body")
    again = publications(accept(records, "a", response_topic="other/answers", correlation=b"8"))
    assert [(p.topic, p.correlation, p.body) for p in again] == [
        (TOPIC, None, b"body"),
        ("other/answers", b"8", b"body"),
    ]
    assert records.counts.unpublished == 3


def test_the_first_verdict_stands(records: Records) -> None:
    accept(records, "a")
    conclude(records, "a", b"first")
    assert conclude(records, "a", b"second") == Unowed()
    assert records.verdict("a") == b"first"


def test_a_verdict_for_nothing_is_not_recorded(records: Records) -> None:
    assert conclude(records, "never accepted") == Unowed()
    assert records.verdict("never accepted") is None


def test_the_outbox_is_read_in_steps(records: Records) -> None:
    for n in range(5):
        accept(records, f"p{n}")
        conclude(records, f"p{n}")
    first = records.unpublished(limit=3)
    rest = records.unpublished(after=first[-1].token, limit=3)
    assert [p.id for p in first + rest] == [f"p{n}" for n in range(5)]


def test_old_verdicts_are_forgotten_unless_they_wait_in_the_outbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.drivers.records.writer.CLEAN_ROWS", 2)
    now = 1000.0
    with opened(tmp_path, clock=lambda: now) as records:
        for n in range(7):
            accept(records, f"p{n}")
            (publication,) = publications(conclude(records, f"p{n}"))
            if n != 3:
                records.published(publication.token)
        until(lambda: records.counts.unpublished == 1)
    now += 86_400.0 + 1
    with opened(tmp_path, clock=lambda: now) as records:
        until(lambda: records.counts.verdicts == 1)
        assert records.verdict("p3") is not None
        assert isinstance(accept(records, "p2"), New)


def test_one_start_with_a_clock_far_ahead_forgets_no_verdict(tmp_path: Path) -> None:
    now = 1000.0
    with opened(tmp_path, verdict_days=3.0, clock=lambda: now) as records:
        accept(records, "p0")
        (publication,) = publications(conclude(records, "p0"))
        records.published(publication.token)
        until(lambda: not records.counts.unpublished)
    now += 1000 * 86_400.0
    with opened(tmp_path, verdict_days=3.0, clock=lambda: now) as records:
        accept(records, "p1")
        conclude(records, "p1")
    now = 2000.0
    with opened(tmp_path, verdict_days=3.0, clock=lambda: now) as records:
        assert isinstance(accept(records, "p0"), Answered)
        assert isinstance(accept(records, "p1"), Answered)


def test_a_wall_clock_is_believed_when_it_has_not_leapt_for_a_day() -> None:
    day = 86_400.0
    passed, ahead = 0.0, 40 * day
    calendar = Calendar(lambda: 1000.0 + ahead + passed, newest_at=1000.0, steady=lambda: passed)
    assert calendar.now() == 1000.0 + day
    passed = 0.5 * day
    assert calendar.now() == 1000.0 + 1.5 * day, "it goes on"
    passed, ahead = 0.6 * day, 400 * day
    assert calendar.now() == pytest.approx(1000.0 + 1.6 * day)
    passed = 1.5 * day
    assert calendar.now() == pytest.approx(1000.0 + 2.5 * day), "it has leapt less than a day ago"
    passed = 1.7 * day
    assert calendar.now() == 1000.0 + 401.7 * day
    passed, ahead = 1.8 * day, 0.0
    assert calendar.now() == 1000.0 + 1.8 * day, "never is anything younger than the clock says"


def test_a_box_without_verdicts_believes_its_clock() -> None:
    assert Calendar(lambda: 5e9, newest_at=None).now() == 5e9


def test_the_oldest_verdicts_leave_when_all_take_more_than_they_may_but_none_that_the_broker_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.drivers.records.writer.CLEAN_ROWS", 2)
    body = bytes(1000)
    with opened(tmp_path, verdict_bytes=10 * (len(body) + ROW_BYTES)) as records:
        for n in range(20):
            accept(records, f"p{n}")
            (publication,) = publications(conclude(records, f"p{n}", body))
            if n != 3:
                records.published(publication.token)
        until(lambda: records.counts.verdicts <= 10)
        until(lambda: records.counts.unpublished == 1)
        left = {n for n in range(20) if records.verdict(f"p{n}") is not None}
        assert left >= {3, 13, 14, 15, 16, 17, 18, 19}
        assert not left & {0, 1, 2, 4, 5, 6, 7, 8, 9}
        assert isinstance(accept(records, "p0"), New), "as if it came the first time"
    with closing(sqlite3.connect(tmp_path / "records.db")) as db:
        found = db.execute("SELECT sum(length(body)) + ? * count(*) FROM verdicts", (ROW_BYTES,)).fetchone()
        assert db.execute("SELECT bytes FROM totals").fetchone() == found


def test_where_all_verdicts_wait_for_the_broker_none_leaves(tmp_path: Path) -> None:
    with opened(tmp_path, verdict_bytes=1) as records:
        for n in range(5):
            accept(records, f"p{n}")
            conclude(records, f"p{n}")
        assert records.counts.verdicts == 5
        for row in records.unpublished():
            records.published(row.token)
        until(lambda: records.counts.verdicts == 0)


def test_a_long_spool_is_walked_without_being_in_memory(tmp_path: Path) -> None:
    """Of 20,000 pictures of 2 KB, 40 MB, a page of 1,000 rows is held at a time, and no payload."""
    with opened(tmp_path, spool_bytes=10**9) as records:
        answers: queue.Queue[Acceptance] = queue.Queue()
        for page in range(20):
            for n in range(1000):
                records.accept(picture(f"p{page}-{n}"), bytes(2000), answers.put)
            assert all(isinstance(answers.get(timeout=WAIT_SECONDS), New) for _ in range(1000))
    walked = run_child(
        tmp_path,
        "def anonymous(): return int([l for l in open('/proc/self/status') if 'RssAnon' in l][0].split()[1])\n"
        "before, most, count, arrival = anonymous(), 0, 0, 0\n"
        "records = store(sys.argv[1])\n"
        "while page := records.waiting(arrival):\n"
        "    count, arrival, most = count + len(page), page[-1].arrival, max(most, anonymous())\n"
        "print(count, most - before)\n"
        "records.close()",
    )
    count, grown_kilobytes = map(int, walked.stdout.split())
    assert count == 20_000
    assert grown_kilobytes < 16_000


def test_a_callback_that_raises_harms_nobody_else(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a bug in the service")

    records.accept(picture("a"), b"x", fail)
    assert accept(records, "b") == New(2)
    assert "callback failed" in caplog.text


# Opening and closing.


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        accept(records, "a", b"bytes", correlation=b"1", response_topic="t")
        accept(records, "b")
        conclude(records, "b", b"body")
        before = records.waiting(), records.unpublished(), records.counts
    with opened(tmp_path) as records:
        assert (records.waiting(), records.unpublished(), records.counts) == before
        assert records.payload("a") == b"bytes"
        assert records.moved_aside is None


def test_closing_writes_what_was_asked_for(tmp_path: Path) -> None:
    answers: queue.Queue[Acceptance] = queue.Queue()
    with opened(tmp_path) as records:
        for n in range(100):
            records.accept(picture(f"p{n}"), b"x", answers.put)
    assert answers.qsize() == 100
    with opened(tmp_path) as records:
        assert records.counts.spooled == 100


def test_two_stores_cannot_have_the_same_folder(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(RecordsError, match=rf"in use by process {os.getpid()} .*paths\.state"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordsError, match=r"file/state cannot be used: Not a directory .*paths\.state"):
        opened(tmp_path / "file" / "state")


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened(folder).close()
        for path in (*folder.iterdir(), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        told = run_child(folder, "os.geteuid() or os.setuid(65534)\nstore(sys.argv[1])")
        folder.chmod(0o755)
    assert f"RecordsError: the state directory {folder} cannot be used: Permission denied" in told.stderr
    assert "make it writable, or set paths.state" in told.stderr


@pytest.mark.parametrize("damage", ["header", "page", "truncated", "text"])
def test_a_damaged_store_is_moved_aside_and_a_new_one_begun(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as records:
        for n in range(50):
            accept(records, f"p{n}", os.urandom(5000))
    path = tmp_path / "records.db"
    content = bytearray(path.read_bytes())
    match damage:
        case "header":
            content[:16] = b"not a database!!"
        case "page":
            content[16_384 : 16_384 * 8] = b"\xff" * 16_384 * 7
        case "truncated":
            del content[16_384 * 3 :]
        case "text":
            content = bytearray(b"hello, I am a text file\n" * 1000)
    path.write_bytes(content)
    with opened(tmp_path) as records:
        assert records.moved_aside is not None
        assert records.moved_aside.read_bytes()[100:] == content[100:]
        assert records.counts == Counts(0, 0, 0, 0)
        assert accept(records, "a") == New(1)
    assert "moved_aside" in caplog.text
    with opened(tmp_path) as records:
        assert records.moved_aside is None
        assert records.counts.spooled == 1


def test_a_torn_log_loses_only_what_was_not_committed(tmp_path: Path) -> None:
    run_child(
        tmp_path,
        "records = store(sys.argv[1])\n"
        "for n in range(20): accept(records, f'p{n}', b'x' * 5000)\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    log = tmp_path / "records.db-wal"
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 7000)
    with opened(tmp_path) as records:
        assert records.moved_aside is None
        ids = [spooled.picture.id for spooled in records.waiting()]
        assert ids == [f"p{n}" for n in range(len(ids))]
        assert 0 < len(ids) < 20


def test_a_store_of_a_newer_release_is_left_alone(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "records.db")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(RecordsError, match="newer release"):
        opened(tmp_path)


def test_a_crash_while_the_store_is_made_is_survived(tmp_path: Path) -> None:
    (tmp_path / "records.db").touch()
    with opened(tmp_path) as records:
        assert accept(records, "a") == New(1)


# Disks that say no, and processes that die.


def test_every_picture_whose_commit_was_reported_survives_a_kill(tmp_path: Path) -> None:
    """Processes are killed in the middle of accepting and concluding; the next one finds every promise kept."""
    folder = tmp_path / "state"
    accepted, concluded = set[str](), set[str]()
    for number in range(6):
        with child(folder, BUSY, str(number)) as process:
            assert process.stdout
            said = [process.stdout.readline() for _ in range(100 + 97 * number)]
            process.kill()
            said += [line for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        accepted |= {line.split()[1] for line in said if line.startswith("accepted")}
        concluded |= {line.split()[1] for line in said if line.startswith("concluded")}
        with opened(folder, spool_bytes=10**9) as records:
            assert records.moved_aside is None
            waiting = {spooled.picture.id: spooled.picture_bytes for spooled in records.waiting(limit=10**6)}
            assert {id for id in accepted if id not in waiting and records.verdict(id) is None} == set()
            assert {id for id in waiting if records.verdict(id) is not None} == set()
            assert {id for id in concluded if records.verdict(id) != b"verdict of " + id.encode()} == set()
            assert concluded <= {publication.id for publication in records.unpublished(limit=10**6)}
            assert {id for id in waiting if records.payload(id) != id.encode() * 500} == set()
            assert records.counts.spooled_bytes == sum(waiting.values())
        check_integrity(folder)
    assert concluded


def test_a_disk_that_takes_no_more_is_reported_and_survived(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: a real write error in the middle of a transaction."""
    told = run_child(tmp_path, FULL_DISK)
    assert told.returncode == 0, told.stderr
    said = json.loads(told.stdout)
    assert said["refused"] == "Full"
    assert "the disk takes nothing" in said["why"]
    assert said["trouble_while_full"]
    assert not said["broken"]
    assert said["payload_while_full"]
    assert said["concluded"] == "Recorded"
    assert said["accepted_after"] == "New"
    assert said["trouble_after"] is None
    with opened(tmp_path, spool_bytes=10**9) as records:
        assert records.moved_aside is None
        assert records.verdict("p0") == b"{}"
        assert {spooled.picture.id for spooled in records.waiting()} == {*said["kept"]} - {"p0"} | {"late"}
    check_integrity(tmp_path)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A real file system of 4 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = Path(tempfile.mkdtemp())
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("this machine may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


def test_a_full_disk_takes_verdicts_until_there_is_room_for_pictures(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.drivers.records.writer.BALLAST_BYTES", 800_000)
    monkeypatch.setattr("appliance.drivers.records.schema.PRAGMAS", (*PRAGMAS, "wal_autocheckpoint = 8"))
    with opened(small_disk, spool_bytes=10**9) as records:
        taken = 0
        while isinstance(accept(records, f"p{taken}", b"x" * 50_000), New):
            taken += 1
        assert taken > 10
        assert records.trouble
        assert len(records.payload("p0")) == 50_000
        assert isinstance(conclude(records, "p0", b"y" * 1000), Recorded)
        assert isinstance(accept(records, "q", b"x"), Full)
        for n in range(1, taken):
            assert isinstance(conclude(records, f"p{n}", b"y" * 1000), Recorded)
        until(lambda: records.trouble is None)
        assert isinstance(accept(records, "q", b"x" * 50_000), New)
        assert not records.broken
    check_integrity(small_disk)


def test_a_disk_without_room_to_spare_is_full_from_the_start(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("appliance.drivers.records.writer.BALLAST_BYTES", 1_048_576)
    (small_disk / "other").write_bytes(b"x" * 3_300_000)
    with opened(small_disk) as records:
        assert accept(records, "a") == Full("less than 1 MiB are free: No space left on device")
        (small_disk / "other").unlink()
        until(lambda: records.trouble is None)
        assert accept(records, "a") == New(1)
    assert "recovered from" in caplog.text


def test_a_store_that_fails_in_another_way_is_given_up(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    with closing(sqlite3.connect(records.folder / "records.db")) as vandal:
        vandal.execute("DROP TABLE pictures")
    answer = accept(records, "a")
    assert isinstance(answer, Full)
    assert "cannot be trusted" in answer.why
    assert isinstance(records.broken, RecordsError)
    assert isinstance(accept(records, "b"), Full)
    assert "records broken" in caplog.text


def test_the_newest_picture_of_a_place_is_found_by_an_index_however_many_verdicts_there_are(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        for name, second, part in (("a", 1, "R1"), ("b", 3, "R1"), ("c", 2, "R1"), ("d", 9, "R2"), ("e", 0, "R3")):
            taken = f"2026-01-31T08:15:{second:02}+00:00" if second else None
            accept(records, name, part=part, captured_at=taken)
            conclude(records, name)
        found = [records.newest_capture("line1", "-", "-", part) for part in ("R1", "R2", "R3", "R4")]
        assert found == ["2026-01-31T08:15:03+00:00", "2026-01-31T08:15:09+00:00", None, None]
    with closing(sqlite3.connect(tmp_path / "records.db")) as db:
        plan = db.execute(
            "EXPLAIN QUERY PLAN SELECT max(captured_at) FROM verdicts"
            " WHERE line = 'a' AND product = 'b' AND board = 'c' AND part = 'd' AND captured_at IS NOT NULL"
        ).fetchall()
    assert ["verdicts_by_place" in row[3] for row in plan] == [True]


# Who ended the process.


def test_a_crash_counts_for_those_in_hand_alone(tmp_path: Path) -> None:
    run_child(
        tmp_path,
        "records = store(sys.argv[1])\n"
        "for n in range(6): accept(records, f'p{n}')\n"
        "records.take(1, 'e0', [1, 2])\n"
        "records.take(2, 'e0', [3])\n"
        "records.put_back(1)\n"
        "records.take(3, 'e0', [5])\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    with opened(tmp_path) as records:
        assert attempts(records) == {"p0": 0, "p1": 0, "p2": 1, "p3": 0, "p4": 1, "p5": 0}


def test_each_crash_counts_once(tmp_path: Path) -> None:
    crash = "os.kill(os.getpid(), signal.SIGKILL)"
    run_child(tmp_path, "records = store(sys.argv[1])\naccept(records, 'p0')\nrecords.take(1, 'e0', [1])\n" + crash)
    run_child(tmp_path, "records = store(sys.argv[1])\n" + crash)
    run_child(tmp_path, "records = store(sys.argv[1])\nrecords.take(1, 'e0', [1])\n" + crash)
    with opened(tmp_path) as records:
        assert attempts(records) == {"p0": 2}


def test_a_clean_end_counts_for_nobody(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        accept(records, "a")
        records.take(1, "e0", [1])
    with opened(tmp_path) as records:
        assert attempts(records) == {"a": 0}


def test_what_was_in_hand_of_a_store_that_was_moved_aside_counts_for_nobody(tmp_path: Path) -> None:
    run_child(
        tmp_path,
        "records = store(sys.argv[1])\n"
        "accept(records, 'a')\n"
        "records.take(1, 'e0', [1])\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    for path in tmp_path.glob("records.db*"):
        path.write_bytes(b"hello, I am a text file\n" * 1000)
    with opened(tmp_path) as records:
        assert records.moved_aside is not None
        assert accept(records, "b") == New(1)
        assert attempts(records) == {"b": 0}


@pytest.mark.parametrize("content", [b"", bytes(4096), b"open\n1\n99999999999999999999\n\xff\nend\n7\n", b"open"])
def test_whatever_a_power_cut_left_of_the_note_is_read(tmp_path: Path, content: bytes) -> None:
    with opened(tmp_path) as records:
        accept(records, "a")
    (tmp_path / "in-hand").write_bytes(content)
    with opened(tmp_path) as records:
        assert attempts(records) == {"a": int(b"1" in content)}


def test_after_a_crash_pictures_from_before_it_are_noted_on_the_disk_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_child(tmp_path, "accept(store(sys.argv[1]), 'a')\nos.kill(os.getpid(), signal.SIGKILL)")
    synced = list[int]()
    monkeypatch.setattr("appliance.drivers.records.inhand.os.fdatasync", synced.append)
    with opened(tmp_path) as records:
        assert accept(records, "b") == New(2)
        before = len(synced)
        records.take(1, "e0", [2])
        assert len(synced) == before, "the kernel keeps it, however this process ends"
        records.take(2, "e0", [1, 2])
        assert len(synced) == before + 1, "the machine may have died of it"


def test_who_cannot_be_noted_may_not_be_touched(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("appliance.drivers.records.inhand.os.pwrite", refuse)
        with pytest.raises(RecordsError, match="cannot be noted: Input/output error"):
            records.take(1, "e0", [1])


def attempts(records: Records) -> dict[str, int]:
    return {spooled.picture.id: spooled.attempts for spooled in records.waiting()}


def test_an_expert_that_was_at_work_at_a_crash_is_known_by_its_mark(tmp_path: Path) -> None:
    """One runs two pictures, one decodes, one is loaded; two have ended."""
    run_child(
        tmp_path,
        "records = store(sys.argv[1])\n"
        "records.take(1, 'aa', [1, 2]); records.work(1, runs=True)\n"
        "records.take(2, 'bb', [3])\n"
        "records.take(3, 'cc', [4]); records.work(3, runs=True); records.put_back(3)\n"
        "records.take(5, 'ff', [5]); records.work(5, runs=True); records.work(5, runs=False)\n"
        "records.take_load('cpu', 'dd')\n"
        "records.take_load('cpu', 'ee'); records.put_back_load('cpu', 'ee')\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    with opened(tmp_path) as records:
        company = {"aa": (Crash(frozenset({1, 2}), False),), "dd": (Crash(frozenset(), False),)}
        assert records.crashes() == company


def test_crashes_of_an_expert_add_up_until_it_has_worked(tmp_path: Path) -> None:
    alone = "records = store(sys.argv[1])\n{}\nos.kill(os.getpid(), signal.SIGKILL)"
    run_child(tmp_path, alone.format("records.take(1, 'aa', [1]); records.work(1, runs=True)"))
    run_child(tmp_path, alone.format("records.take_load('cpu', 'aa')"))
    with opened(tmp_path) as records:
        ran, loaded = Crash(frozenset({1}), True), Crash(frozenset(), True)
        assert records.crashes() == {"aa": (ran, loaded)}
        records.forgive("aa", only_loads=True)
        until(lambda: records.crashes() == {"aa": (ran,)})
        records.forgive("bb")
        records.forgive("aa")
        until(lambda: not records.crashes())


def test_suspects_are_told_those_first_that_were_at_the_fewest_crashes(tmp_path: Path) -> None:
    for arrivals in ([1, 2, 4], [1, 2], [1]):
        run_child(
            tmp_path,
            "records = store(sys.argv[1])\n"
            "for n in range(6): accept(records, f'p{n}')\n"
            f"records.take(1, 'aa', {arrivals})\n"
            "os.kill(os.getpid(), signal.SIGKILL)",
        )
    with opened(tmp_path) as records:
        assert [(one.picture.id, one.attempts) for one in records.suspects()] == [("p3", 1), ("p1", 2), ("p0", 3)]


# The store against a dictionary.


class Model(RuleBasedStateMachine):
    """Whatever is asked, in whatever order, across restarts: the store answers as a few dictionaries would."""

    ids = st.sampled_from([f"id{n}" for n in range(6)])
    payloads = st.sampled_from([b"", b"1", b"22", b"4444"])
    replies = st.sampled_from([None, "r/1", "r/2"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.records = opened(self.folder, spool_bytes=9, outbox_rows=4)
        self.waiting: dict[str, tuple[bytes, str | None]] = {}
        self.verdicts: dict[str, tuple[bytes, bytes]] = {}
        self.outbox: dict[int, tuple[str, str]] = {}

    def teardown(self) -> None:
        self.records.close()
        shutil.rmtree(self.folder)

    @rule(id=ids, payload=payloads, reply=replies)
    def accept(self, id: str, payload: bytes, reply: str | None) -> None:
        answer = accept(self.records, id, payload, response_topic=reply)
        if id in self.waiting:
            held, old_reply = self.waiting[id]
            assert answer == (Waiting() if held == payload else Conflict())
            if held == payload:
                self.waiting[id] = held, reply or old_reply
        elif id in self.verdicts and self.verdicts[id][0] != payload:
            assert answer == Conflict()
        elif len(self.outbox) >= 4:
            assert isinstance(answer, Full)
        elif id in self.verdicts:
            self.sent(id, reply, publications(answer))
        elif sum(len(held) for held, _ in self.waiting.values()) + len(payload) > 9:
            assert isinstance(answer, Full)
        else:
            assert isinstance(answer, New)
            self.waiting[id] = payload, reply

    @rule(id=ids, body=st.binary(min_size=1, max_size=5))
    def conclude(self, id: str, body: bytes) -> None:
        answer = conclude(self.records, id, body)
        if id not in self.waiting:
            assert answer == Unowed()
            return
        payload, reply = self.waiting.pop(id)
        self.verdicts[id] = payload, body
        self.sent(id, reply, publications(answer))

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        if self.outbox:
            token = data.draw(st.sampled_from(sorted(self.outbox)))
            self.records.published(token)
            del self.outbox[token]

    @rule()
    def reopen(self) -> None:
        self.records.close()
        self.records = opened(self.folder, spool_bytes=9, outbox_rows=4)

    @invariant()
    def agrees(self) -> None:
        until(lambda: self.records.counts.unpublished == len(self.outbox))
        assert [spooled.picture.id for spooled in self.records.waiting()] == list(self.waiting)
        assert {id: self.records.payload(id) for id in self.waiting} == {i: p for i, (p, _) in self.waiting.items()}
        assert {id: self.records.verdict(id) for id in self.verdicts} == {i: b for i, (_, b) in self.verdicts.items()}
        held = {p.token: (p.id, p.topic) for p in self.records.unpublished()}
        assert held == self.outbox
        assert all(p.body == self.verdicts[p.id][1] for p in self.records.unpublished())
        size = sum(len(payload) for payload, _ in self.waiting.values())
        assert self.records.counts == Counts(len(self.waiting), size, len(self.verdicts), len(self.outbox))

    def sent(self, id: str, reply: str | None, made: tuple[Publication, ...]) -> None:
        assert [p.topic for p in made] == [TOPIC, *([reply] if reply else [])]
        assert all(p.body == self.verdicts[id][1] for p in made)
        for publication in made:
            known = [token for token, what in self.outbox.items() if what == (id, publication.topic)]
            assert known in ([], [publication.token])
            self.outbox[publication.token] = (id, publication.topic)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=25, stateful_step_count=30)


# Other processes.

PREAMBLE = """
import json, os, queue, resource, signal, sys, threading
from pathlib import Path
from tests.test_records import accept, conclude, opened, picture, TOPIC
from appliance.drivers.records import New
def store(folder): return opened(Path(folder), spool_bytes=10**9)
"""

BUSY = """
records, counter = store(sys.argv[1]), iter(range(10**9))
def accepted(id):
    def done(answer):
        print("accepted", id, flush=True)
        records.conclude(id, "pass", b"verdict of " + id.encode(), TOPIC, lambda _: print("concluded", id, flush=True))
        submit()
    def waits(answer):
        print("accepted", id, flush=True)
        submit()
    return done if hash(id) % 2 else waits
def submit():
    id = f"r{sys.argv[2]}-{next(counter)}."
    payload = id.encode() * 500
    records.accept(picture(id, payload), payload, accepted(id))
for _ in range(20): submit()
threading.Event().wait()
"""

FULL_DISK = """
records = store(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
kept = []
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
while isinstance(answer := accept(records, f"p{len(kept)}", b"x" * 50_000), New):
    kept.append(f"p{len(kept)}")
concluded = queue.Queue()
records.conclude("p0", "pass", b"{}", TOPIC, concluded.put)
said = {
    "kept": kept, "refused": type(answer).__name__, "why": answer.why, "trouble_while_full": records.trouble,
    "broken": bool(records.broken), "payload_while_full": len(records.payload("p1")) == 50_000,
}
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
said["concluded"] = type(concluded.get(timeout=60)).__name__
said["accepted_after"] = type(accept(records, "late", b"x" * 50_000)).__name__
said["trouble_after"] = records.trouble
records.close()
print(json.dumps(said))
"""


def child(folder: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREAMBLE + program, str(folder), *arguments]
    root = Path(__file__).parent.parent
    return subprocess.Popen(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_child(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    with child(folder, program) as process:
        output, errors = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def check_integrity(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "records.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []


def _ignore(_: object) -> None:
    pass
