"""The box's one way to its broker: messages in, publications out, over one link after another, on a thread of its own.

What a picture is worth, whether it was seen before and when it may be acknowledged is decided elsewhere: `Door` hands
every message on and acknowledges only what it is told to.
"""

from __future__ import annotations

import logging
import random
import selectors
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Literal, ParamSpec

from paho.mqtt.enums import MQTTProtocolVersion

from appliance import tls
from appliance.config import Config
from appliance.contract import Message, check_publishable
from appliance.drivers.link import HEADROOM_BYTES, LOST, Farewell, Link, Publish, Reports, client_id
from appliance.errors import CertificateError, MessageError

P = ParamSpec("P")
log = logging.getLogger(__name__)

WINDOW = 64
"""Publications of ours on their way to a PUBACK; the broker's Receive Maximum may make it smaller."""

SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
STABLE_SECONDS = 20.0
"""A link that was ready this long ended for a new reason: the back-off starts again."""

GARBLED_LINKS, DETOUR_SECONDS = 2, 10.0
"""paho 2.2 ends a link on which a property cannot be read (U+FEFF in any text is enough, and mosquitto lets it pass).
The broker then delivers that message again, for ever. So after this many links that ended so, one speaks MQTT 3.1.1 for
this long: the broker leaves the properties out, the picture is answered, and all others behind it."""


class DoorState(StrEnum):
    """How the link stands. Publications are taken and pictures come in READY only."""

    STARTING = "starting"
    CONNECTING = "connecting"
    SUBSCRIBING = "subscribing"
    READY = "ready"
    WAITING = "waiting"
    """No broker, or one that refused us: trying again after a pause."""
    TAKEN_OVER = "taken-over"
    """Another client uses our client id. Final: fighting back would lose pictures on both sides."""
    STOPPED = "stopped"


class Door:
    """The box's link to its broker: pictures in, verdicts out.

    Callbacks run on the link's thread and must only enqueue; one that raises is logged and counted, and the link
    lives on. Every token that `publish` took comes back exactly once: as `published(token)` when the broker has the
    message (PUBACK), or as `returned(token, why)` when it refused it or the connection ended before it could say.
    """

    def __init__(
        self,
        config: Config,
        *,
        deliver: Callable[[Message], None],
        published: Callable[[int], None],
        returned: Callable[[int, str], None],
        state_changed: Callable[[DoorState], None],
    ) -> None:
        """Raises ConfigError when the password file cannot be read, CertificateError for the files of TLS."""
        self._config = config
        self._deliver, self._published, self._returned = deliver, published, returned
        self._state_changed = state_changed
        self._password = config.password()
        self._reports = Reports(self._connected, self._ready, self._received, self._settle)
        if config.mqtt.certificates is not None:
            config.mqtt.certificates.context()  # said at the start; later a file that is being replaced is waited for
        self._lock = threading.Lock()  # never held while paho or a callback runs: either would deadlock
        self._orders: deque[_Acknowledge | Publish] = deque()
        self._is_open = False
        self._in_flight = 0
        self._window = WINDOW
        self._packet_bytes = 0
        self._state, self._detail = DoorState.STARTING, ""
        self._generation = 0
        self._counts: Counter[str] = Counter()
        self._turned_seconds = time.monotonic()
        self._stop_by_seconds: float | None = None
        self._stopping = threading.Event()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._is_woken = False
        self._thread = threading.Thread(target=self._live, name="mqtt", daemon=True)

    def start(self) -> None:
        """Begin connecting; returns at once and keeps trying. Ready when `state_changed` says so."""
        self._thread.start()

    def __enter__(self) -> Door:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.disconnect()

    @property
    def state(self) -> DoorState:
        return self._state

    @property
    def detail(self) -> str:
        """Why the link stands as it does, in words; empty when all is well."""
        return self._detail

    @property
    def generation(self) -> int:
        """Number of the current connection, from 1."""
        return self._generation

    @property
    def turned_seconds(self) -> float:
        """Monotonic time of the link thread's last turn: it is older than a few seconds only if the thread is stuck."""
        return self._turned_seconds

    @property
    def counts(self) -> Mapping[str, int]:
        """What happened so far: received, acknowledged, stale-acknowledgement, published, returned, connected,
        session-lost, callback-failed."""
        return dict(self._counts)

    def acknowledge(self, message: Message) -> None:
        """Tell the broker that the picture is ours now. Call it in the order of arrival, from any thread.

        For a message of an earlier connection this does nothing but count: there the same packet id may already
        belong to another picture, which would be lost. The broker delivers the old one again.
        """
        if message.qos > 0:
            self._order(_Acknowledge(message.packet_id, message.generation))

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        token: int | None = None,
        correlation: bytes | None = None,
        qos: Literal[0, 1] = 1,
        resent: bool = False,
    ) -> bool:
        """Send a message, from any thread; False when the link is not ready or its window is full: try again later.

        With QoS 0 `published` means sent. `resent` is said with MQTT 5. Raises MessageError `topic-name`, or
        `too-large` for one beyond the broker's maximum packet size: such a message must never be offered again.
        """
        check_publishable(topic)
        packet_bytes = len(payload) + len(topic) + len(correlation or b"") + 64
        with self._lock:
            if not self._is_open or self._in_flight >= self._window:
                return False
            if packet_bytes > self._packet_bytes:
                what = f"a message of {packet_bytes} bytes for {topic}; the broker takes {self._packet_bytes}"
                raise MessageError("too-large", what, "raise the broker's maximum packet size")
            self._in_flight += 1
            self._orders.append(Publish(topic, payload, qos, retain, token, correlation, resent))
        self._wake()
        return True

    def disconnect(self, timeout_seconds: float = 5.0) -> None:
        """Wait for outstanding PUBACKs, at most `timeout_seconds`, say goodbye and end the thread.

        A clean goodbye keeps the last will from being published: publish `stopped` before.
        """
        self._stop_by_seconds = time.monotonic() + timeout_seconds
        self._stopping.set()
        self._wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._waker.close()
        self._woken.close()

    # From here on everything runs on the link's thread.

    def _live(self) -> None:
        protocol, failures, garbled = self._first_protocol(), 0, 0
        while not self._stopping.is_set():
            is_detour = garbled >= GARBLED_LINKS
            farewell = self._connection(MQTTProtocolVersion.MQTTv311 if is_detour else protocol, is_detour)
            self._return_all(LOST)
            is_v5 = protocol is MQTTProtocolVersion.MQTTv5 and not is_detour
            garbled = garbled + 1 if farewell.is_garbled and is_v5 and self._may_fall_back() else 0
            if farewell.is_taken_over:
                log.error("mqtt taken_over client_id=%s: is another box using this name?", client_id(self._config))
                return self._enter(DoorState.TAKEN_OVER, farewell.why)
            if farewell.is_version_refused and is_v5 and self._may_fall_back():
                log.info("mqtt broker speaks 3.1.1 only: no response topics, request ids or deadlines")
                protocol = MQTTProtocolVersion.MQTTv311
                continue
            if farewell.is_detour_over:
                continue
            failures = 1 if farewell.ready_seconds > STABLE_SECONDS else failures + 1
            self._pause(failures, farewell.why if failures < 3 else farewell.why + _suspicion(farewell, self._config))
        self._enter(DoorState.STOPPED)

    def _first_protocol(self) -> MQTTProtocolVersion:
        asked = self._config.mqtt.protocol
        return MQTTProtocolVersion.MQTTv311 if asked == "3.1.1" else MQTTProtocolVersion.MQTTv5

    def _may_fall_back(self) -> bool:
        return self._config.mqtt.protocol == "auto"

    def _pause(self, failures: int, why: str) -> None:
        if self._stopping.is_set():
            return
        seconds = pause_seconds(failures, random.random())
        mqtt = self._config.mqtt
        log.warning("mqtt no_link host=%s port=%d retry_seconds=%.1f why=%s", mqtt.host, mqtt.port, seconds, why)
        self._enter(DoorState.WAITING, why)
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not self._stopping.wait(min(left, 1.0)):
            self._turned_seconds = time.monotonic()

    def _connection(self, protocol: MQTTProtocolVersion, is_detour: bool) -> Farewell:
        """One connection from CONNECT to its end, whatever ended it."""
        if is_detour:
            log.warning("mqtt garbled: properties of a message cannot be read; %.0f s without any", DETOUR_SECONDS)
        self._generation += 1
        self._enter(DoorState.CONNECTING)
        link = Link(self._config, self._reports, protocol, self._generation, DETOUR_SECONDS if is_detour else None)
        try:
            link.connect(self._password.get_secret_value() if self._password else None)
            self._converse(link)
        except CertificateError as error:
            link.why = str(error)
        except (ssl.SSLError, ConnectionResetError) as error:
            link.why = str(tls.explained(error, self._config.mqtt.host))
        except OSError as error:
            link.why = link.why or f"{error.strerror or error}"
        except Exception as error:  # the link must outlive any fault of ours or of paho's
            log.exception("mqtt link failed")
            self._counts["callback-failed"] += 1
            link.why = f"internal fault: {error!r}"
        finally:
            link.drop()
        return link.farewell()

    def _converse(self, link: Link) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            watching = 0
            while (connection := link.connection()) is not None:
                self._turned_seconds = time.monotonic()
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.wants_to_write else 0)
                if wanted != watching:
                    (selector.modify if watching else selector.register)(connection, wanted)
                    watching = wanted
                has_read_ahead = link.has_read_ahead
                ready = {key.fileobj: events for key, events in selector.select(0.0 if has_read_ahead else 0.5)}
                if self._woken in ready:
                    self._drain_wakes()
                self._obey(link)
                link.turn(ready.get(connection, 0) | (selectors.EVENT_READ if has_read_ahead else 0))
                if self._is_time_to_leave() or link.is_detour_over:
                    return link.leave()

    def _is_time_to_leave(self) -> bool:
        if not self._stopping.is_set():
            return False
        with self._lock:
            idle = self._in_flight == 0 and not self._orders
        return idle or not self._is_open or time.monotonic() >= (self._stop_by_seconds or 0)

    def _obey(self, link: Link) -> None:
        with link.together() if len(self._orders) > 1 else nullcontext():
            self._obey_all(link)

    def _obey_all(self, link: Link) -> None:
        while True:
            try:
                order = self._orders.popleft()
            except IndexError:
                return
            match order:
                case _Acknowledge(packet_id, generation) if generation == link.generation:
                    link.acknowledge(packet_id)
                    self._counts["acknowledged"] += 1
                case _Acknowledge():
                    self._counts["stale-acknowledgement"] += 1
                case Publish():
                    self._send(link, order)

    def _send(self, link: Link, order: Publish) -> None:
        """A token that paho chokes on comes back too; the fault then ends the link."""
        try:
            link.publish(order)
        except Exception:
            self._settle(order.token, LOST)
            raise

    def _connected(self, session_present: bool, window: int | None, packet_bytes: int | None) -> None:
        self._counts["connected"] += 1
        if not session_present and self._counts["connected"] > 1:
            self._counts["session-lost"] += 1
            log.warning("mqtt session_lost: pictures queued for this box are gone; cameras send them again")
        with self._lock:
            self._window = min(WINDOW, window or WINDOW)
            ours = int(self._config.limits.picture_bytes) + HEADROOM_BYTES
            self._packet_bytes = min(packet_bytes or ours, ours)
        self._enter(DoorState.SUBSCRIBING)

    def _received(self, message: Message) -> None:
        self._counts["received"] += 1
        self._tell(self._deliver, message)

    def _settle(self, token: int | None, why: str | None) -> None:
        """A publication came to its end: `why` it is not published, or None when it is."""
        with self._lock:
            self._in_flight -= 1
        self._counts["published" if why is None else "returned"] += 1
        if token is None:
            return
        if why is None:
            self._tell(self._published, token)
        else:
            self._tell(self._returned, token, why)

    def _return_all(self, why: str) -> None:
        """Whatever `publish` took and no connection sent."""
        with self._lock:
            self._is_open = False
        while self._orders:
            match self._orders.popleft():
                case Publish(token=token):
                    self._settle(token, why)
                case _Acknowledge():
                    self._counts["stale-acknowledgement"] += 1

    def _ready(self) -> None:
        with self._lock:
            self._is_open = True
        self._enter(DoorState.READY)

    def _enter(self, state: DoorState, detail: str = "") -> None:
        if (state, detail) == (self._state, self._detail):
            return
        self._state, self._detail = state, detail
        log.debug("mqtt state=%s generation=%d %s", state, self._generation, detail)
        self._tell(self._state_changed, state)

    def _tell(self, callback: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(*args, **kwargs)
        except Exception:  # a callback that raises would end the thread while paho still reports a connection
            self._counts["callback-failed"] += 1
            log.exception("mqtt callback failed")

    # These two are called from any thread.

    def _order(self, order: _Acknowledge | Publish) -> None:
        self._orders.append(order)
        self._wake()

    def _wake(self) -> None:
        """Once until the link's thread looks: a group of verdicts needs no byte for each."""
        if not self._is_woken:
            self._is_woken = True
            with suppress(OSError):  # closed: nobody is left to wake
                self._waker.send(b"\0")

    def _drain_wakes(self) -> None:
        with suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        self._is_woken = False  # before the orders are obeyed: what comes from here on wakes again


def pause_seconds(failures: int, chance: float) -> float:
    """Back-off before the next attempt: doubling, with jitter from `chance` in [0, 1), from 1 s to 30 s."""
    longest = min(LONGEST_PAUSE_SECONDS, SHORTEST_PAUSE_SECONDS * 2.0 ** min(failures, 10))
    return SHORTEST_PAUSE_SECONDS + (longest - SHORTEST_PAUSE_SECONDS) * chance


def _suspicion(farewell: Farewell, config: Config) -> str:
    """MQTT 3.1.1 brokers, and mosquitto 2.0.11, close the link of who is taken over without a word."""
    if not farewell.ready_seconds:
        return ""
    return f" (soon after it was ready, again and again: does another client use the id {client_id(config)}?)"


@dataclass(frozen=True, slots=True)
class _Acknowledge:
    packet_id: int
    generation: int
