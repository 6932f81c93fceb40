"""What the demo hears from the box: its statistics, loads and evictions as they happen, and every answer it publishes.

It listens by itself: a camera tells each picture's first answer only.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from appliance.config import Config
from appliance.errors import BrokerError
from appliance.lab.score import Score

START_SECONDS = 120.0
SETTLE_SECONDS = 10.0


class Watch:
    """Listens from `start` to the end of its `with` block; what it hears about pictures goes to `score`."""

    def __init__(self, config: Config, score: Score) -> None:
        self.score = score
        self.stats: Mapping[str, Any] = {}
        self.resident_max = 0
        self.moves: deque[str] = deque(maxlen=6)
        self._port, self._box = config.mqtt.port, config.topic("box", config.box.name, "")
        self._online = threading.Event()
        self._changed = threading.Condition()
        self._told = 0
        self._client = Client(CallbackAPIVersion.VERSION2, client_id="demo-watch")
        topics = [(self._box + "+", 0), (config.topic("result", "#"), 1), (config.topic("error", "+"), 1)]
        self._client.on_connect = lambda client, *_: client.subscribe(topics)
        self._client.on_message = self._on_message

    def start(self, is_running: Callable[[], bool]) -> None:
        """Wait until the box is online. Raises BrokerError when the service ends or does not come up."""
        ends, is_connected = time.monotonic() + START_SECONDS, False
        while time.monotonic() < ends and is_running():
            if not is_connected:
                with contextlib.suppress(OSError):
                    self._client.connect("127.0.0.1", self._port)
                    self._client.loop_start()
                    is_connected = True
            if self._online.wait(0.1):
                return
        raise BrokerError("the service did not come up", "see .appliance/demo/state/service.log")

    def settle(self) -> None:
        """Wait for statistics that count every verdict heard so far, and for an answer about every picture."""
        with self._changed:
            self._changed.wait_for(self._is_settled, SETTLE_SECONDS)

    def refresh(self) -> None:
        """Wait for statistics made from now on: the next ones may be on their way already, the second are not."""
        with self._changed:
            told = self._told
            self._changed.wait_for(lambda: self._told >= told + 2, SETTLE_SECONDS)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        # paho closes its last sockets when nobody holds it any more: so its callbacks must not hold us.
        self._client.on_connect = self._client.on_message = None

    def _is_settled(self) -> bool:
        counted = sum(self.stats.get("verdicts", {}).values())
        return self.score.answered == len(self.score.parts) and counted >= len(self.score.verdicts)

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        if not message.topic.startswith(self._box):
            with self._changed:
                self.score.hear(bytes(message.payload))
                self._changed.notify_all()
            return
        name = message.topic.removeprefix(self._box)
        if name == "status":
            if message.payload == b"online":
                self._online.set()
            return
        body = json.loads(message.payload)
        with self._changed:
            if name == "stats":
                self.stats, self._told = body, self._told + 1
                self.resident_max = max(self.resident_max, body["resident"])
            elif name == "cache":
                self.resident_max = max(self.resident_max, len(body["resident"]))
                self.moves.extend(f"{move['move']:5} {move['expert']}" for move in body["moves"])
            self._changed.notify_all()
