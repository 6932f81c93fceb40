"""Whether anything was lost: what a line published, what it was told, and what the box has on record, side by side."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Collection, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from appliance.client import Answer, Camera
from appliance.errors import BrokerError

READY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Audit:
    """`lost`: published, and without a record or an answer. `conflicting`: told in two ways, or otherwise than
    recorded. `phantom`: recorded, and never published. `damage` is what SQLite finds wrong with the store.
    """

    published: int
    verdicts: int
    records: int
    lost: int
    conflicting: int
    phantom: int
    damage: str | None

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.conflicting or self.phantom or self.damage)


def audited(
    state: Path,
    published: Collection[str],
    answers: Mapping[str, Mapping[str, Any]],
    heard: Mapping[str, Collection[bytes]],
) -> Audit:
    """Of a box that has stopped. `answers` are first answers, `heard` all bodies that were on the result topics."""
    with closing(sqlite3.connect(state / "records.db")) as db:
        (finding,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        recorded = {name: bytes(body) for name, body in db.execute("SELECT id, body FROM verdicts")}
    asked = set(published)
    conflicting = {
        name
        for name in asked & recorded.keys()
        if {*heard.get(name, ())} - {recorded[name]}
        or answers.get(name, recorded[name]) not in (recorded[name], json.loads(recorded[name]))
    }
    return Audit(
        published=len(asked),
        verdicts=len(asked & answers.keys()),
        records=len(asked & recorded.keys()),
        lost=len(asked - (recorded.keys() & answers.keys())),
        conflicting=len(conflicting),
        phantom=len(recorded.keys() - asked),
        damage=None if finding == "ok" else str(finding),
    )


class Line:
    """A camera that keeps each picture until its verdict comes, and somebody beside it who hears all that is said."""

    def __init__(self, port: int, *, resend_seconds: float = 2.0, window: int = 256) -> None:
        self._port = port
        self.camera = Camera("127.0.0.1", port, line="line1", resend_seconds=resend_seconds, window=window)
        self.camera.on_answer(self._answered)
        self.published: set[str] = set()
        self.answers: dict[str, Answer] = {}
        self._heard: dict[str, set[bytes]] = {}
        self._ready = threading.Event()
        self._listener = Client(CallbackAPIVersion.VERSION2, client_id="line-listener")
        self._listener.reconnect_delay_set(1, 1)
        self._listener.on_connect = lambda client, *_: client.subscribe("coe/v1/plant/result/#", qos=1)
        self._listener.on_subscribe = lambda *_: self._ready.set()
        self._listener.on_message = self._on_message
        self._stack = ExitStack()

    def __enter__(self) -> Line:
        self._listener.connect("127.0.0.1", self._port)
        self._listener.loop_start()
        self._stack.callback(self._listener.loop_stop)
        self._stack.callback(self._listener.disconnect)
        try:
            if not self._ready.wait(READY_SECONDS):
                raise BrokerError(f"the broker on port {self._port} does not answer", "see its log")
            self._stack.enter_context(self.camera)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def publish(self, part: str, picture: bytes, board: str = "-") -> str:
        """Noted before it is sent: an answer may come first."""
        name = self.camera.name_of("-", board, part, picture)
        self.published.add(name)
        self.camera.publish(part=part, picture=picture, board=board)
        return name

    def wait(self, seconds: float = 60.0) -> bool:
        """Until everything has its verdict; False when `seconds` pass first."""
        return self.camera.wait(seconds)

    def audit(self, state: Path) -> Audit:
        """When the box has stopped."""
        verdicts = {name: answer.body for name, answer in self.answers.items() if not answer.is_rejected}
        return audited(state, self.published, verdicts, self._heard)

    def _answered(self, answer: Answer) -> None:
        self.answers[answer.request_id] = answer

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        name = json.loads(message.payload)["request_id"]
        self._heard.setdefault(name, set()).add(bytes(message.payload))
