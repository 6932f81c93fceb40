"""From a message to a picture in the spool, or to an answer on the error topic: what the box accepts.

A picture is acknowledged only after it is committed (or known, or refused), in the order of arrival. While the spool
is full nothing is acknowledged: that is the back-pressure.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from appliance import contract
from appliance.catalog import Catalog
from appliance.config import Config
from appliance.contract import Address, Message, Reply
from appliance.drivers import images
from appliance.drivers.outbox import Outbox
from appliance.drivers.records import Acceptance, Answered, Conflict, Full, New, Picture, Records, Waiting
from appliance.errors import MessageError

log = logging.getLogger(__name__)

QUEUED_MESSAGES = 4096  # many times any broker's window: reaching it means that the broker ignores its window
FULL_PAUSE_SECONDS = 0.25
AGAIN = Message("", b"", 0, False, False, 0, 0)
"""Wakes the intake thread: a picture that found the spool full waits to be offered again."""


def component_of(address: Address, catalog: Catalog) -> str:
    """The component that a picture shows. Raises MessageError: unknown product, part or component."""
    if address.product == "-":
        component = address.part
    else:
        product = catalog.products.get(address.product)
        if product is None:
            raise MessageError(
                "unknown-product", f"there is no recipe for product {address.product}", "add one, or use -"
            )
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


def admit(message: Message, config: Config, catalog: Catalog, accepted_at: float) -> Picture:
    """Check everything that can be checked without decoding. Raises MessageError with reason and remedy."""
    if message.retain:
        raise MessageError(
            "retained", "a retained picture would be inspected again at every start", "publish without -r"
        )
    address = Address.parse(message.topic, config)
    component_of(address, catalog)
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


class Intake:
    """One thread between the network and the spool. `acknowledge` and `spooled` are called in the order of arrival."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        records: Records,
        outbox: Outbox,
        *,
        acknowledge: Callable[[Message], None],
        spooled: Callable[[], None],
    ) -> None:
        self._config, self._catalog, self._records, self._outbox = config, catalog, records, outbox
        self._acknowledge, self._spooled = acknowledge, spooled
        self._messages: queue.Queue[Message | None] = queue.Queue(QUEUED_MESSAGES)
        self._held: dict[str, Message] = {}
        self._room = threading.Event()
        self._stopping = threading.Event()
        self.counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._live, name="intake", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def deliver(self, message: Message) -> None:
        """On the network thread: enqueue, nothing more. What does not fit is delivered again by the broker."""
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            self.counts["overflow"] += 1
            log.error("intake overflow topic=%s: the broker ignores its window", contract.shortened(message.topic))

    def room(self) -> None:
        """A picture left the spool: one that found it full may try again."""
        self._room.set()

    def stop(self) -> None:
        """What was not accepted yet stays unacknowledged: the broker delivers it again."""
        self._stopping.set()
        self._room.set()
        self._messages.put(None)
        self._thread.join()

    def _live(self) -> None:
        while True:
            message = self._messages.get()
            while self._held and not self._stopping.is_set():
                self._room.wait(FULL_PAUSE_SECONDS)
                self._room.clear()
                for name in tuple(self._held):
                    self._take(self._held.pop(name))
            if message is None or self._stopping.is_set():
                return
            if message is not AGAIN:
                self._take(message)

    def _take(self, message: Message) -> None:
        self.counts["received"] += 1
        try:
            picture = admit(message, self._config, self._catalog, time.time())
        except MessageError as error:
            self._refuse(message, error)
            return
        self._records.accept(picture, message.payload, lambda answer: self._accepted(message, picture, answer))

    def _accepted(self, message: Message, picture: Picture, answer: Acceptance) -> None:
        """On the writer's thread, after the commit."""
        match answer:
            case New():
                self._acknowledge(message)
                self._spooled()
            case Waiting():
                self.counts["repeated"] += 1
                self._acknowledge(message)
            case Answered(publications):
                self.counts["answered_again"] += 1
                self._acknowledge(message)
                self._outbox.post(publications)
            case Conflict():
                what = f"request-id {picture.id} already stands for another picture"
                self._refuse(message, MessageError("conflict", what, "give every picture its own request-id"), picture)
            case Full(why):
                self._hold(message, picture, why)

    def _hold(self, message: Message, picture: Picture, why: str) -> None:
        """Offer it again later; until then it is not acknowledged. Delivered again meanwhile, the newer one counts."""
        self.counts["spool_full"] += 1
        log.warning("intake spool_full why=%s: not acknowledging", why)
        self._held[picture.id] = message
        with suppress(queue.Full):  # a full queue is read anyway
            self._messages.put_nowait(AGAIN)

    def _refuse(self, message: Message, error: MessageError, picture: Picture | None = None) -> None:
        self.counts["refused"] += 1
        log.info(
            "intake refused reason=%s topic=%s what=%s", error.reason, contract.shortened(message.topic), error.what
        )
        self._outbox.answer(error, message.topic, _identity(message), hashlib.sha256(message.payload).hexdigest())
        self._acknowledge(message)


def _has_reference(address: Address, catalog: Catalog) -> bool:
    product = catalog.products.get(address.product)
    return product is not None and product.golden_path is not None


def _identity(message: Message) -> str | None:
    try:
        return contract.request_id(message.topic, message.payload, message.user)
    except MessageError:
        return None
