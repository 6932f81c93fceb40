"""Verdicts from their record to the broker: each until its PUBACK, however often the link breaks.

The record is the queue: what the link does not take now is read from there again. What the broker refuses stops nobody
else. Error answers and status messages are kept in memory only, bounded; their senders keep what they sent.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from appliance import contract
from appliance.config import Config
from appliance.drivers.link import LOST
from appliance.drivers.mqtt import Door
from appliance.drivers.records import Publication, Records
from appliance.errors import MessageError

log = logging.getLogger(__name__)

KEPT_NOTES = 1000
READ_ROWS = 64
REFUSED_TOPICS = 1000
"""Reply topics that the broker refused are remembered, the latest ones: senders choose them."""


@dataclass(frozen=True, slots=True)
class Note:
    """A message that is not a verdict: kept until the link takes it.

    Of retained ones the latest of each topic is kept, of others the latest KEPT_NOTES.
    """

    topic: str
    payload: bytes
    retain: bool = False
    correlation: bytes | None = None


class Outbox:
    """Safe from several threads. `connect` it to the door before the door starts.

    What may have been published before, by a former process, over a link that broke, or when its picture came the first
    time, is marked as resent, where the protocol has room for that; the body is the same.

    Tokens grow. While it is behind, rows are read from the record in steps and wait in `_rows`; those up to
    `_read_through` were read. A broken link begins again at the oldest.

    mosquitto 2.0.11 ends the link with each refusal, and what it says of it is lost when more was on the way. So after
    a broken link the oldest goes alone: either it passes, or its topic is known for the next link.
    """

    def __init__(self, config: Config, records: Records) -> None:
        self._config, self._records = config, records
        self._results = (config.topic("result", ""), config.topic("board", ""))
        self._door: Door | None = None
        self._lock = threading.RLock()  # door.publish calls nothing back on the calling thread
        self._in_flight: dict[int, str] = {}
        self._former_through = records.last_token()
        self._lost: set[int] = set()  # on their way when a link broke
        self._is_behind = True  # what a former process left
        self._rows: deque[Publication] = deque()
        self._read_through = 0
        self._refused: OrderedDict[str, None] = OrderedDict()
        self._refused_results: dict[str, str] = {}
        self._tries_again = False
        self._is_cautious = False
        self._retained: dict[str, Note] = {}
        self._notes: deque[Note] = deque()
        self._is_dropping = False
        self.counts: Counter[str] = Counter()

    def connect(self, door: Door) -> None:
        self._door = door

    def post(self, publications: Iterable[Publication]) -> None:
        """These were recorded just now: publish them, in turn with those that wait already.

        What was read from the record between its commit and this call is on its way, or even published.
        """
        with self._lock:
            self._add([one for one in publications if one.token > self._read_through])

    def repeat(self, publications: Iterable[Publication]) -> None:
        """Somebody asked again: publish them once more, unless they are on their way."""
        with self._lock:
            self._add(publications)

    def _add(self, publications: Iterable[Publication]) -> None:
        if self._is_behind:
            return self._pump()
        for publication in publications:
            self._rows.append(publication)
            self._read_through = max(self._read_through, publication.token)
        self._is_behind = not self._send_rows()

    def answer(
        self,
        error: MessageError,
        topic: str,
        request: str | None,
        picture_sha256: str | None,
        *,
        has_verdict: bool = False,
    ) -> None:
        """Say on the error topic what was refused, why, and what to do."""
        body = contract.error_body(
            error,
            topic=topic,
            at=datetime.now(UTC),
            request_id=request,
            picture_sha256=picture_sha256,
            has_verdict=has_verdict,
        )
        self.note(Note(contract.error_topic(self._config, error.reason), body))

    def note(self, note: Note) -> None:
        with self._lock:
            if note.retain:
                self._retained[note.topic] = note
            else:
                self._keep(note)
            self._pump()

    @property
    def refused_results(self) -> dict[str, str]:
        """Result topics that the broker refused and has not taken since, with what it said, the longest refused first.

        With MQTT 3.1.1 brokers cannot say so: they confirm, or end the link.
        """
        with self._lock:
            return dict(self._refused_results)

    def published(self, token: int) -> None:
        """The broker has it (on the link's thread)."""
        self._records.published(token)
        with self._lock:
            self._refused_results.pop(self._in_flight.pop(token, ""), None)
            self._lost.discard(token)
            self._is_cautious = False
            self.counts["published"] += 1
            self._pump()

    def returned(self, token: int, why: str) -> None:
        """The broker did not take it: its topic is left out. Or the link broke: all is read again when it is ready."""
        with self._lock:
            topic = self._in_flight.pop(token, None)
            if why == LOST:
                self.counts["returned"] += 1
                self._lost.add(token)
                self._is_cautious = True
                self._rewind()
            elif topic is not None:
                self.counts["refused"] += 1
                self._leave_out(topic, why)
                if not self._is_result(topic):
                    self._give_up(token)
                self._pump()

    def ready(self) -> None:
        """The link is up: everything that is unpublished goes out."""
        with self._lock:
            self._tries_again = True
            self._rewind()
            self._pump()

    def _rewind(self) -> None:
        self._rows.clear()
        self._is_behind, self._read_through = True, 0

    def _pump(self) -> None:
        """How the box is, then verdicts, then error answers: one about a picture follows its verdict."""
        for topic in [topic for topic, note in self._retained.items() if self._publish_note(note)]:
            del self._retained[topic]
        if self._is_behind:
            self._catch_up()
        while not self._is_behind and self._notes and self._publish_note(self._notes[0]):
            self._notes.popleft()
            self._is_dropping = False
        if self._tries_again and not self._is_behind and not self._in_flight:
            self._try_again()

    def _try_again(self) -> None:
        """Once per connection the result topics that the broker refused: it may allow them by now. After all others."""
        self._tries_again = False
        if results := [topic for topic in self._refused if self._is_result(topic)]:
            for topic in results:
                del self._refused[topic]
            self._is_cautious = True
            self._rewind()
            self._pump()

    def _catch_up(self) -> None:
        while self._send_rows():
            self._rows.extend(self._records.unpublished(self._read_through, READ_ROWS))
            if not self._rows:
                self._is_behind = False
                return
            self._read_through = self._rows[-1].token

    def _send_rows(self) -> bool:
        """False when the link cannot take them all now."""
        while self._rows:
            if not self._send(self._rows[0]):
                return False
            self._rows.popleft()
        return True

    def _send(self, publication: Publication) -> bool:
        """False when the link cannot take it now."""
        assert self._door is not None
        token, topic = publication.token, publication.topic
        if token in self._in_flight:
            return True
        if self._is_cautious and self._in_flight:
            return False
        if topic in self._refused:
            if not self._is_result(topic):
                self._give_up(token)
            return True
        resent = publication.resent or token <= self._former_through or token in self._lost
        body, correlation = publication.body, publication.correlation
        try:
            taken = self._door.publish(topic, body, token=token, correlation=correlation, resent=resent)
        except MessageError as error:  # offering it again would never help
            log.error("outbox unpublishable request=%s why=%s", publication.id, error)
            self._give_up(token)
            return True
        if taken:
            self._in_flight[token] = topic
        return taken

    def _is_result(self, topic: str) -> bool:
        """Ours, which the operator can have allowed; any other is a reply topic, which its sender chose."""
        return topic.startswith(self._results)

    def _leave_out(self, topic: str, why: str) -> None:
        """Remember it, and say so once. A reply topic stays refused: the verdict is on the result topic as well."""
        if topic not in self._refused:
            what = "its verdicts wait for the next connection" if self._is_result(topic) else "nothing goes there"
            log.error("outbox refused topic=%s why=%s: %s", contract.shortened(topic), why, what)
        self._refused[topic] = None
        self._refused.move_to_end(topic)
        if len(self._refused) > REFUSED_TOPICS:
            self._refused.popitem(last=False)
        if self._is_result(topic) and len(self._refused_results) < REFUSED_TOPICS:
            self._refused_results.setdefault(topic, why)

    def _give_up(self, token: int) -> None:
        self.counts["unpublishable"] += 1
        self._lost.discard(token)
        self._records.published(token)

    def _keep(self, note: Note) -> None:
        """The latest: a sender that waited long has sent again by now."""
        if len(self._notes) >= KEPT_NOTES:
            self._notes.popleft()
            self.counts["dropped_notes"] += 1
            if not self._is_dropping:
                log.warning("outbox drops error answers: more than %d wait for the link", KEPT_NOTES)
            self._is_dropping = True
        self._notes.append(note)

    def _publish_note(self, note: Note) -> bool:
        assert self._door is not None
        try:
            return self._door.publish(note.topic, note.payload, retain=note.retain, correlation=note.correlation)
        except MessageError as error:
            log.error("outbox unpublishable topic=%s why=%s", note.topic, error)
            return True
