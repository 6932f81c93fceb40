"""One connection to the broker: one paho client, from CONNECT to its end.

So packet identifiers never outlive their connection, an acknowledgement cannot meet the wrong message, and paho
re-sends nothing behind the outbox's back. When to connect, and what to send, is the door's (`mqtt.py`).
"""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from paho.mqtt.client import MQTT_LOG_ERR, Client, ConnectFlags, DisconnectFlags, MQTTMessage, error_string
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from appliance import tls
from appliance.config import Config
from appliance.contract import USER_PROPERTIES, Message, command_topic, status_topic

log = logging.getLogger(__name__)

HEADROOM_BYTES = 65_536
"""What a packet may hold beside the picture: topic, properties, header."""

READ_BYTES, READ_PACKETS = 65_536, 32
"""What is read from the socket at once, and how many packets of it in a turn."""

CORK: int | None = getattr(socket, "TCP_CORK", None)
"""Linux has it."""

NEVER_EXPIRES = 0xFFFFFFFF
"""A finite session expiry ends with a jump of the broker's clock, and with it the queued pictures."""

TAKEN_OVER = 0x8E
NOTHING_SAID = (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN, MQTTErrorCode.MQTT_ERR_CONN_LOST)
LOST = "connection-lost"
"""Why a publication came back when the broker had no chance to say anything: publish it again."""


def client_id(config: Config) -> str:
    """The same for the life of the box: the broker keeps our session, and its queued pictures, under it.

    nats-server 2.15 refuses a client id with a dot, which the names of site and box may hold.
    """
    return f"appliance-{config.box.site}-{config.box.name}".replace(".", ":")


def filters(config: Config) -> list[tuple[str, Literal[0, 1]]]:
    """What the box subscribes to, with the QoS that it asks for.

    Pictures come at QoS 1 on exactly four levels. Any other depth is a mistake that deserves an answer; these come at
    QoS 0, best effort, so that mistakes are never queued for an absent box and take nothing of its window. So do
    commands: one that has waited for the box to come back is not what its operator meant.
    """
    wrong_depths = ((), ("+",), ("+", "+"), ("+", "+", "+"), ("+", "+", "+", "+", "+", "#"))
    return [
        (config.topic("infer", "+", "+", "+", "+"), 1),
        *((config.topic("infer", *levels), 0) for levels in wrong_depths),
        (command_topic(config, "+"), 0),
    ]


@dataclass(frozen=True, slots=True)
class Publish:
    """A message of ours; its `token` comes back with what became of it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    token: int | None
    correlation: bytes | None
    resent: bool = False


@dataclass(frozen=True, slots=True)
class Farewell:
    """How a connection ended."""

    why: str
    is_version_refused: bool
    is_taken_over: bool
    is_garbled: bool
    is_detour_over: bool
    ready_seconds: float


@dataclass(frozen=True, slots=True)
class Reports:
    """Whom a link tells what happens, on its thread."""

    connected: Callable[[bool, int | None, int | None], None]
    """Whether the broker kept our session, its Receive Maximum and its maximum packet size; None: it has none."""
    ready: Callable[[], None]
    received: Callable[[Message], None]
    settled: Callable[[int | None, str | None], None]
    """A publication's token, and why it is not published; None when it is."""


class _Client(Client):
    """Reads ahead: paho asks the socket for the first bytes of each packet one by one, and each call is a chance for
    another thread to take the interpreter, beside what it costs itself."""

    _ahead, _at = b"", 0

    @property
    def has_read_ahead(self) -> bool:
        return self._at < len(self._ahead)

    def _sock_recv(self, bufsize: int) -> bytes:
        if not self.has_read_ahead:
            if bufsize >= READ_BYTES:
                return super()._sock_recv(bufsize)
            self._ahead, self._at = super()._sock_recv(READ_BYTES), 0
        begin, self._at = self._at, min(self._at + bufsize, len(self._ahead))
        return self._ahead[begin : self._at]


class Link:
    """From `connect` on, `turn` it whenever its socket has something, until `connection` is None; then `drop` it."""

    def __init__(
        self,
        config: Config,
        reports: Reports,
        protocol: MQTTProtocolVersion,
        generation: int,
        stay_seconds: float | None,
    ) -> None:
        self.generation, self.why = generation, ""
        self._stay_seconds = stay_seconds
        self._config, self._reports = config, reports
        self._is_v5 = protocol is MQTTProtocolVersion.MQTTv5
        self._is_accepted = self._is_version_refused = self._is_taken_over = self._is_garbled = False
        self._ready_since: float | None = None
        self._tokens: dict[int, int | None] = {}
        self._client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id(config),
            clean_session=None if self._is_v5 else False,
            protocol=protocol,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        self._client.max_inflight_messages_set(0)  # the door bounds them; paho would queue beyond its own bound
        self._client.on_socket_open = _no_delay
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._client.on_disconnect = self._on_disconnect
        self._client.on_log = self._on_log
        self._client.will_set(status_topic(config), b"offline", qos=1, retain=True)

    def connect(self, password: str | None) -> None:
        """Open the socket and send CONNECT. Raises OSError, and CertificateError for the files of TLS."""
        mqtt = self._config.mqtt
        if mqtt.certificates is not None:
            self._client.tls_set_context(mqtt.certificates.context())
        if mqtt.username is not None:
            self._client.username_pw_set(mqtt.username, password)
        if not self._is_v5:
            self._client.connect(mqtt.host, mqtt.port, mqtt.keepalive_seconds)
            return
        wishes = _properties(PacketTypes.CONNECT)
        wishes.SessionExpiryInterval = NEVER_EXPIRES
        wishes.ReceiveMaximum = self._config.receive_window
        # Somewhat too large must still arrive, to be answered with an error; absurd must not be held in memory.
        wishes.MaximumPacketSize = 2 * int(self._config.limits.picture_bytes) + HEADROOM_BYTES
        self._client.connect(mqtt.host, mqtt.port, mqtt.keepalive_seconds, clean_start=False, properties=wishes)

    def connection(self) -> socket.socket | None:
        connection = self._client.socket()
        assert connection is None or isinstance(connection, socket.socket)
        return connection

    @property
    def wants_to_write(self) -> bool:
        return bool(self._client.want_write())

    @property
    def has_read_ahead(self) -> bool:
        """What was read already, or what TLS, which reads whole records, holds of them: no selector tells."""
        connection = self.connection()
        return self._client.has_read_ahead or (isinstance(connection, ssl.SSLSocket) and connection.pending() > 0)

    def turn(self, events: int) -> None:
        if events & selectors.EVENT_READ:
            self._note(self._client.loop_read())
            for _ in range(READ_PACKETS):
                if not self._client.has_read_ahead:
                    break
                self._note(self._client.loop_read())
        if self.wants_to_write:
            self._note(self._client.loop_write())
        self._note(self._client.loop_misc())

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is sent within leaves in as few segments as it fills, and wakes the broker once."""
        self._hold_back(True)
        try:
            yield
        finally:
            self._hold_back(False)

    def _hold_back(self, is_held: bool) -> None:
        connection = self.connection()
        if connection is not None and CORK is not None:
            with suppress(OSError):  # it has ended meanwhile
                connection.setsockopt(socket.IPPROTO_TCP, CORK, int(is_held))

    def acknowledge(self, packet_id: int) -> None:
        self._client.ack(packet_id, 1)

    def publish(self, order: Publish) -> None:
        properties = None
        if self._is_v5 and (order.correlation is not None or order.resent):
            properties = _properties(PacketTypes.PUBLISH)
            if order.correlation is not None:
                properties.CorrelationData = order.correlation
            if order.resent:
                properties.UserProperty = ("resent", "true")
        info = self._client.publish(order.topic, order.payload, order.qos, order.retain, properties)
        if info.rc is MQTTErrorCode.MQTT_ERR_SUCCESS and not info.is_published():
            self._tokens[info.mid] = order.token
        else:  # QoS 0 is done once it is written, which may be already
            self._reports.settled(order.token, None if info.rc is MQTTErrorCode.MQTT_ERR_SUCCESS else LOST)

    def leave(self) -> None:
        """Say goodbye, so that the broker does not publish our last will."""
        self._client.on_socket_close = _hear_out
        self._client.disconnect()

    def drop(self) -> None:
        """Close the socket, whatever state it is in, and give back what waits for a PUBACK."""
        with suppress(OSError):
            if (connection := self.connection()) is not None:
                connection.close()
        self._client.on_disconnect = None
        while self._tokens:
            _, token = self._tokens.popitem()
            self._reports.settled(token, LOST)

    @property
    def is_detour_over(self) -> bool:
        return self._stay_seconds is not None and self._ready_seconds() > self._stay_seconds

    def farewell(self) -> Farewell:
        return Farewell(
            self.why or self._silence(),
            self._is_version_refused,
            self._is_taken_over,
            self._is_garbled,
            self.is_detour_over,
            self._ready_seconds(),
        )

    def _silence(self) -> str:
        """What to make of an end without a word: a TLS listener hangs up on who begins in plain text."""
        is_plain = self._config.mqtt.certificates is None
        hint = " (does this port want TLS, mqtt.ca_file?)" if is_plain and not self._is_accepted else ""
        return f"connection lost{hint}"

    def _ready_seconds(self) -> float:
        return 0.0 if self._ready_since is None else time.monotonic() - self._ready_since

    def _note(self, code: MQTTErrorCode) -> None:
        if self._is_accepted and code is MQTTErrorCode.MQTT_ERR_PROTOCOL:
            self._is_garbled = True
        if code not in NOTHING_SAID:
            self.why = self.why or error_string(code)

    # What paho calls, on the link's thread.

    def _on_connect(
        self, client: Client, userdata: object, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self.why = f"broker refuses us: {reason}"
            self._is_version_refused = str(reason) == "Unsupported protocol version"
            return
        self._is_accepted = True
        window = getattr(properties, "ReceiveMaximum", None)
        packet_bytes = getattr(properties, "MaximumPacketSize", None)
        self._reports.connected(flags.session_present, window, packet_bytes)
        # Always, though a session may be present: a release may ask for other filters, and asking twice is harmless.
        # (On 3.1.1 the broker then sends retained pictures once more. They are refused once more.)
        wanted = filters(self._config)
        if self._is_v5:
            code, _ = client.subscribe([(topic, _options(qos)) for topic, qos in wanted])
        else:
            code, _ = client.subscribe([(topic, int(qos)) for topic, qos in wanted])
        self._note(code)

    def _on_subscribe(
        self,
        client: Client,
        userdata: object,
        packet_id: int,
        reasons: Sequence[ReasonCode],
        properties: Properties | None,
    ) -> None:
        if reasons[0].value != 1:
            self.why = f"broker refuses our subscription: {reasons[0]}"
            client.disconnect()
            return
        for (topic, _), reason in zip(filters(self._config), reasons, strict=False):
            if reason.is_failure:
                log.warning("mqtt unheard topic=%s: broker refuses the subscription", topic)
        self._ready_since = time.monotonic()
        self._reports.ready()

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        properties = message.properties
        self._reports.received(
            Message(
                topic=_topic_of(message),
                payload=bytes(message.payload),
                qos=message.qos,
                retain=message.retain,
                duplicate=message.dup,
                packet_id=message.mid,
                generation=self.generation,
                response_topic=getattr(properties, "ResponseTopic", None),
                correlation=getattr(properties, "CorrelationData", None),
                user={k: v for k, v in reversed(getattr(properties, "UserProperty", ())) if k in USER_PROPERTIES},
            )
        )

    def _on_publish(
        self, client: Client, userdata: object, packet_id: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if packet_id in self._tokens:  # "no matching subscribers" (0x10) is no failure: nobody listens, that is all
            self._reports.settled(self._tokens.pop(packet_id), f"broker: {reason}" if reason.is_failure else None)

    def _on_disconnect(
        self,
        client: Client,
        userdata: object,
        flags: DisconnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._is_taken_over = reason.value == TAKEN_OVER
            self.why = f"broker: {reason}"

    def _on_log(self, client: Client, userdata: object, level: int, text: str) -> None:
        """What a broker has against our certificate comes after a handshake that passed, and paho logs it only."""
        if level == MQTT_LOG_ERR and not self._is_accepted and (refused := tls.refused(text, client.socket())):
            self.why = str(refused)


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]


def _topic_of(message: MQTTMessage) -> str:
    try:
        return message.topic
    except UnicodeDecodeError:
        return "\ufffd"  # no name of ours: it gets the answer that any bad name gets


def _options(qos: int) -> SubscribeOptions:
    """No retained pictures at subscription; those retained later keep their mark, so that they can be refused."""
    return SubscribeOptions(qos=qos, retainAsPublished=True, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)


def _hear_out(client: Client, userdata: object, connection: object) -> None:
    """Read what the broker still sends until it closes, at most half a second.

    Closing a socket with unread pictures resets the link, and the reset may overtake our goodbye.
    """
    if not isinstance(connection, socket.socket):
        return
    ends = time.monotonic() + 0.5
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while (left := ends - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(65_536):
                return


def _no_delay(client: Client, userdata: object, connection: object) -> None:
    """Without it a 50 KB round trip takes 82.6 ms instead of 2.5 ms (2026-01, loopback, p50)."""
    if isinstance(connection, socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
