"""From a message to a picture in the spool, or to an answer on the error topic: what the box accepts.

A picture is acknowledged only after it is committed (or known, or refused), in the order of arrival. One that finds the
spool full is kept and offered again; until it has room no other is taken: that is the back-pressure. Everything that is
kept is bounded in bytes.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum

from appliance import contract
from appliance.catalog import Catalog
from appliance.config import INBOX_BYTES, Config
from appliance.contract import WHOLE_BOARD, Address, Message, Reply
from appliance.drivers import images
from appliance.drivers.outbox import Outbox
from appliance.drivers.records import Acceptance, Answered, Conflict, Full, New, Picture, Records, TurnedAway, Waiting
from appliance.errors import MessageError

log = logging.getLogger(__name__)

QUEUED_MESSAGES = 4096  # many times any broker's window: reaching it means that the broker ignores its window
TURN_SECONDS = 0.5
FULL_PAUSE_SECONDS = 0.25
CALM_SECONDS = 5.0
"""The spool is called full until it took everything for so long: at the brim each verdict makes room for one picture,
and that is no news."""

BUSY = MessageError(
    "busy", "the spool or the outbox is full", "send it again later, or at QoS 1 to have it wait for room"
)


def component_of(address: Address, catalog: Catalog) -> str:
    """The component that a picture shows, or WHOLE_BOARD. Raises MessageError: unknown product, part or component."""
    if address.product == "-":
        component = address.part
    else:
        product = catalog.products.get(address.product)
        if product is None:
            raise MessageError(
                "unknown-product", f"there is no recipe for product {address.product}", "add one, or use -"
            )
        if address.is_whole:
            return WHOLE_BOARD
        placement = product.placements.get(address.part)
        if placement is None:
            raise MessageError(
                "unknown-part", f"product {address.product} has no placement {address.part}", "see its recipe.toml"
            )
        component = placement.component
    expert = catalog.graph.entries.get(component)
    if expert is None:
        raise MessageError(
            "unknown-component", f"no expert is assigned to component {component}", "add it to graph.toml"
        )
    bundle = catalog.bundles.get(expert)
    if bundle is not None and bundle.manifest.needs_reference and not _has_reference(address, catalog):
        raise MessageError(
            "reference-missing",
            f"{component} is compared with its golden picture, and {address.product}/{address.part} has none",
            "publish it as a placement of a product whose recipe has a golden picture",
        )
    return component


def admit(message: Message, config: Config, catalog_of: Callable[[Address], Catalog], accepted_at: float) -> Picture:
    """Check everything that can be checked without decoding. Raises MessageError with reason and remedy."""
    if message.retain:
        raise MessageError(
            "retained", "a retained picture would be inspected again at every start", "publish without -r"
        )
    address = Address.parse(message.topic, config)
    component_of(address, catalog_of(address))
    identity = contract.request_id(message.topic, message.payload, message.user)
    images.check(message.payload, max_bytes=int(config.limits.picture_bytes), max_pixels=config.limits.picture_pixels)
    captured, reply = contract.captured_at(message.user), Reply.wanted(message, config)
    return Picture(
        id=identity,
        line=address.line,
        product=address.product,
        board=address.board,
        part=address.part,
        picture_sha256=hashlib.sha256(message.payload).hexdigest(),
        accepted_at=accepted_at,
        captured_at=captured.isoformat() if captured else None,
        deadline_seconds=contract.deadline_seconds(message.user),
        response_topic=reply.topic if reply else None,
        correlation=reply.correlation if reply else None,
    )


class _Stand(Enum):
    """How far a message that the sender wants acknowledged has come."""

    ASKED = "asked"
    """On its way: being checked, or with the writer."""
    HELD = "held"
    """It found the spool full, and waits to be offered again."""
    OFFERED = "offered"
    """With the writer once more."""
    SETTLED = "settled"
    """Committed, known or refused: acknowledged when all before it are."""


@dataclass(slots=True, eq=False)
class _Owed:
    """A message that is owed an acknowledgement, from the inbox to that."""

    message: Message
    stand: _Stand = _Stand.ASKED
    picture: Picture | None = None

    @property
    def is_waiting_for_room(self) -> bool:
        return self.stand in (_Stand.HELD, _Stand.OFFERED)


class Intake:
    """One thread between the network and the spool.

    `acknowledge` is called in the order of arrival, whatever the order of the outcomes: a small picture may find room
    where a larger one before it did not. `spooled` is called after the commit. Both come from this thread or the
    writer's, and must only enqueue. `catalog_of` has the recipes that count at an address.
    """

    def __init__(
        self,
        config: Config,
        catalog_of: Callable[[Address], Catalog],
        records: Records,
        outbox: Outbox,
        *,
        acknowledge: Callable[[Message], None],
        spooled: Callable[[int], None],
        may_enter: Callable[[str], bool] = lambda line: True,
    ) -> None:
        """`may_enter` is asked with the line of every new picture, on the writer's thread."""
        self._may_enter = may_enter
        self._config, self._catalog_of, self._records, self._outbox = config, catalog_of, records, outbox
        self._acknowledge, self._spooled = acknowledge, spooled
        self._changed = threading.Condition()  # guards all that follows; never held while records or outbox are called
        self._inbox: deque[Message] = deque()
        self._inbox_bytes = 0
        self.largest_bytes = 0
        """Of the payloads so far."""
        self._owed: deque[_Owed] = deque()
        self._keys: set[tuple[int, int]] = set()
        """Of those in the inbox and owed that have a packet id: what comes again under one of these is known."""
        self._generation = 0
        self._is_full = False
        self._last_full_seconds = 0.0
        self._retry_seconds = 0.0
        self._is_stopping = False
        self._turned_seconds = time.monotonic()
        self.counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._live, name="intake", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def turned_seconds(self) -> float:
        """Monotonic time of the thread's last turn: it is older than a few seconds only if the thread is stuck."""
        return self._turned_seconds

    @property
    def held_bytes(self) -> int:
        """Of the pictures that have come and are not accepted yet."""
        with self._changed:
            return self._inbox_bytes + sum(len(owed.message.payload) for owed in self._owed)

    def deliver(self, message: Message) -> None:
        """On the network thread: enqueue, nothing more. What does not fit is not acknowledged."""
        with self._changed:
            self.largest_bytes = max(self.largest_bytes, len(message.payload))
            if message.generation > self._generation:
                self._forget_former(message.generation)
            if message.qos > 0 and _key(message) in self._keys:
                self.counts["redelivered"] += 1
                return
            if not self._make_room(message):
                self._overflow(message)
                return
            self._inbox.append(message)
            self._inbox_bytes += len(message.payload)
            if message.qos > 0:
                self._keys.add(_key(message))
            self._changed.notify()

    def room(self) -> None:
        """A picture left the spool: one that found it full may try again."""
        with self._changed:
            self._retry_seconds = 0.0
            self._changed.notify()

    def stop(self) -> None:
        """What was not accepted yet stays unacknowledged: the broker delivers it again."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # The inbox; the lock is held.

    def _forget_former(self, generation: int) -> None:
        """A new connection: nothing of a former one can be acknowledged, and the broker delivers all of it again."""
        self._generation = generation
        self._owed.clear()
        self._keys.clear()

    def _make_room(self, message: Message) -> bool:
        """Whether it fits, perhaps in place of what nobody waits for or of what a former connection delivered."""
        if message.qos > 0 and not self._fits(message):
            kept = [m for m in self._inbox if m.qos > 0 and m.generation == self._generation]
            self.counts["dropped"] += sum(m.qos == 0 for m in self._inbox)
            self._inbox, self._inbox_bytes = deque(kept), sum(len(m.payload) for m in kept)
        return self._fits(message)

    def _fits(self, message: Message) -> bool:
        """One alone always does: a bound below the largest picture would keep it out for ever."""
        is_small = self._inbox_bytes + len(message.payload) <= INBOX_BYTES
        return not self._inbox or (is_small and len(self._inbox) < QUEUED_MESSAGES)

    def _overflow(self, message: Message) -> None:
        if message.qos == 0:
            self.counts["dropped"] += 1
            return
        self.counts["overflow"] += 1
        topic = contract.shortened(message.topic)
        log.error("intake overflow topic=%s: not acknowledged, comes again with the next connection", topic)

    # The thread.

    def _live(self) -> None:
        while not self._is_stopping:
            self._turned_seconds = time.monotonic()
            match self._next():
                case Message() as message:
                    self._take(message)
                case _Owed() as owed:
                    self._offer(owed)

    def _next(self) -> Message | _Owed | None:
        """The first that waits for room, when it is time to offer it again; else the next message; else None.

        While one waits for room no new message is taken: that is the back-pressure. Only what nobody waits to have
        acknowledged goes on, to be turned away.
        """
        with self._changed:
            first = next((owed for owed in self._owed if owed.is_waiting_for_room), None)
            self._note_room(first)
            if first is None and self._inbox:
                return self._pulled(self._inbox.popleft())
            if first is not None and (unowed := next((m for m in self._inbox if m.qos == 0), None)):
                self._inbox.remove(unowed)
                return self._pulled(unowed)
            pause = TURN_SECONDS
            if first is not None and first.stand is _Stand.HELD:
                pause = self._retry_seconds - time.monotonic()
                if pause <= 0:
                    first.stand = _Stand.OFFERED
                    return first
            self._changed.wait(min(pause, TURN_SECONDS))
            return None

    def _note_room(self, first: _Owed | None) -> None:
        if self._is_full and first is None and time.monotonic() - self._last_full_seconds >= CALM_SECONDS:
            self._is_full = False
            log.info("intake room: nothing waits any more")

    def _pulled(self, message: Message) -> Message:
        self._inbox_bytes -= len(message.payload)
        return message

    def _take(self, message: Message) -> None:
        self.counts["received"] += 1
        owed = self._owing(message)
        with self._border(owed):
            try:
                picture = owed.picture = admit(message, self._config, self._catalog_of, time.time())
            except MessageError as error:
                self._refuse(owed, error)
                return
            if message.qos == 0 and self._is_holding():
                self._turn_away(owed)
                return
            self._hand_in(owed, picture)

    def _owing(self, message: Message) -> _Owed:
        """What of QoS 0 or of a former connection comes here is inspected, but nobody waits to have it acknowledged."""
        owed = _Owed(message)
        with self._changed:
            if message.qos > 0 and message.generation == self._generation:
                self._owed.append(owed)
        return owed

    def _is_holding(self) -> bool:
        with self._changed:
            return any(owed.is_waiting_for_room for owed in self._owed)

    def _offer(self, owed: _Owed) -> None:
        picture = owed.picture
        assert picture is not None
        with self._border(owed):
            self._hand_in(owed, picture)

    def _hand_in(self, owed: _Owed, picture: Picture) -> None:
        def done(answer: Acceptance) -> None:
            self._accepted(owed, picture, answer)

        self._records.accept(picture, owed.message.payload, done, may_enter=self._may_enter)

    def _accepted(self, owed: _Owed, picture: Picture, answer: Acceptance) -> None:
        """On the writer's thread, after the commit."""
        with self._border(owed):
            match answer:
                case New(arrival):
                    self._settle(owed)
                    self._spooled(arrival)
                case Waiting():
                    self.counts["repeated"] += 1
                    self._settle(owed)
                case Answered(publications):
                    self.counts["answered_again"] += 1
                    self._settle(owed)
                    self._outbox.repeat(publications)
                case Conflict():
                    what = f"request-id {picture.id} already stands for another picture"
                    error = MessageError("conflict", what, "give every picture its own request-id")
                    self._refuse(owed, error, has_verdict=True)  # the other one has, or will have
                case Full(why):
                    self._hold(owed, why)
                case TurnedAway():
                    self._slow_down(owed, picture.line)

    def _hold(self, owed: _Owed, why: str) -> None:
        """Until there is room it is not acknowledged. At QoS 0 nobody would send it again: that is said at once."""
        self.counts["spool_full"] += 1
        with self._changed:
            self._last_full_seconds = time.monotonic()
            is_news, self._is_full = not self._is_full, True
            if owed in self._owed:  # one of a former connection is not: the broker delivers it again
                owed.stand = _Stand.HELD
                self._retry_seconds = self._last_full_seconds + FULL_PAUSE_SECONDS
                self._changed.notify()
        if is_news:
            log.warning("intake full why=%s: not acknowledging", why)
        if owed.message.qos == 0:
            self._turn_away(owed)

    def _turn_away(self, owed: _Owed) -> None:
        """Not logged one by one: that the spool is full was."""
        self.counts["busy"] += 1
        self._answer(owed.message, BUSY)

    def _slow_down(self, owed: _Owed, line: str) -> None:
        """Not held back: acknowledgements go in order, so that would stop other lines too. Nor logged one by one."""
        self.counts[contract.RATE] += 1
        what = f"{line} sends more pictures than it may (pictures_per_second, burst)"
        self._answer(owed.message, MessageError(contract.RATE, what, "send it again later"))
        self._settle(owed)

    def _refuse(self, owed: _Owed, error: MessageError, *, has_verdict: bool = False) -> None:
        """Say why, then count it as settled."""
        self.counts["refused"] += 1
        log.info(
            "intake refused reason=%s topic=%s what=%s",
            error.reason,
            contract.shortened(owed.message.topic),
            error.what,
        )
        self._answer(owed.message, error, has_verdict=has_verdict)
        self._settle(owed)

    def _answer(self, message: Message, error: MessageError, *, has_verdict: bool = False) -> None:
        digest = hashlib.sha256(message.payload).hexdigest()
        self._outbox.answer(error, message.topic, _identity(message), digest, has_verdict=has_verdict)

    def _settle(self, owed: _Owed) -> None:
        """Acknowledge it, and those behind it that were settled before; or leave that to the one before it."""
        with self._changed:
            owed.stand = _Stand.SETTLED
            while self._owed and self._owed[0].stand is _Stand.SETTLED:
                done = self._owed.popleft().message
                self._keys.discard(_key(done))
                self._acknowledge(done)
            owed.message = replace(owed.message, payload=b"")  # it may have to wait behind one that has no room
            self._changed.notify()

    @contextmanager
    def _border(self, owed: _Owed) -> Iterator[None]:
        """A border: a picture of which we cannot say what is wrong with it must end neither this thread, and with it
        the intake, nor the acknowledgement of those behind it. It stays unacknowledged, and comes again.
        """
        try:
            yield
        except Exception:
            log.exception("intake failed topic=%s", contract.shortened(owed.message.topic))
            self.counts["failed"] += 1
            with self._changed, suppress(ValueError):
                self._owed.remove(owed)
                self._keys.discard(_key(owed.message))


def _key(message: Message) -> tuple[int, int]:
    return (message.generation, message.packet_id)


def _has_reference(address: Address, catalog: Catalog) -> bool:
    product = catalog.products.get(address.product)
    return product is not None and product.golden_path is not None


def _identity(message: Message) -> str | None:
    try:
        return contract.request_id(message.topic, message.payload, message.user)
    except MessageError:
        return None
