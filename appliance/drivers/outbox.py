"""Verdicts from their record to the broker: each until its PUBACK, however often the link breaks.

The record is the queue: what the link does not take now is read from there again. Error answers and status messages
are kept in memory only, bounded; their senders keep what they sent.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from appliance import contract
from appliance.config import Config
from appliance.drivers.mqtt import Door
from appliance.drivers.records import Publication, Records
from appliance.errors import MessageError

log = logging.getLogger(__name__)

KEPT_NOTES = 1000
READ_ROWS = 64


@dataclass(frozen=True, slots=True)
class Note:
    """A message that is not a verdict: kept until the link takes it, and forgotten when too many wait."""

    topic: str
    payload: bytes
    retain: bool = False


class Outbox:
    """Safe from several threads. `connect` it to the door before the door starts.

    Tokens grow: what was sent on this link ends at `_sent_through`, and a broken link begins again at the oldest.
    """

    def __init__(self, config: Config, records: Records) -> None:
        self._config, self._records = config, records
        self._door: Door | None = None
        self._lock = threading.RLock()  # door.publish calls nothing back on the calling thread
        self._in_flight: set[int] = set()
        self._is_behind = True  # what a former process left
        self._sent_through = 0
        self._notes: deque[Note] = deque(maxlen=KEPT_NOTES)
        self.counts: Counter[str] = Counter()

    def connect(self, door: Door) -> None:
        self._door = door

    def post(self, publications: Iterable[Publication]) -> None:
        """These are recorded: publish them, in turn with those that wait already."""
        with self._lock:
            if self._is_behind:
                self._pump()
                return
            for publication in publications:
                if not self._send(publication):
                    self._is_behind = True
                    return
                self._sent_through = publication.token

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
            self._notes.append(note)
            self._pump()

    def published(self, token: int) -> None:
        """The broker has it (on the link's thread)."""
        self._records.published(token)
        with self._lock:
            self._in_flight.discard(token)
            self.counts["published"] += 1
            self._pump()

    def returned(self, token: int, why: str) -> None:
        """The broker did not take it, or the link broke first: it is read again when the link is ready."""
        log.warning("outbox returned token=%d why=%s", token, why)
        with self._lock:
            self._in_flight.discard(token)
            self._is_behind, self._sent_through = True, 0
            self.counts["returned"] += 1

    def ready(self) -> None:
        """The link is up: everything that is unpublished goes out."""
        with self._lock:
            self._is_behind, self._sent_through = True, 0
            self._pump()

    def _pump(self) -> None:
        """Verdicts first: an error answer about a picture follows its verdict."""
        if self._is_behind:
            self._catch_up()
        while self._notes and self._publish_note(self._notes[0]):
            self._notes.popleft()

    def _catch_up(self) -> None:
        while rows := self._records.unpublished(self._sent_through, READ_ROWS):
            for publication in rows:
                if not self._send(publication):
                    return
                self._sent_through = publication.token
        self._is_behind = False

    def _send(self, publication: Publication) -> bool:
        """False when the link cannot take it now."""
        assert self._door is not None
        if publication.token in self._in_flight:
            return True
        try:
            taken = self._door.publish(
                publication.topic, publication.body, token=publication.token, correlation=publication.correlation
            )
        except MessageError as error:  # offering it again would never help
            log.error("outbox unpublishable request=%s why=%s", publication.id, error)
            self.counts["unpublishable"] += 1
            self._records.published(publication.token)
            return True
        if taken:
            self._in_flight.add(publication.token)
        return taken

    def _publish_note(self, note: Note) -> bool:
        assert self._door is not None
        try:
            return self._door.publish(note.topic, note.payload, retain=note.retain)
        except MessageError as error:
            log.error("outbox unpublishable topic=%s why=%s", note.topic, error)
            return True
