"""From an operator's message to an event for whoever decides, and from what became of it to the answer.

Commands are heard at QoS 0: they are for the box as it is now, and never wait for one that is away.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime

from appliance import contract
from appliance.config import Config
from appliance.contract import DRAIN, Message, Wish
from appliance.core.types import Command, Refusal, Verb
from appliance.drivers.outbox import Note
from appliance.errors import MessageError

log = logging.getLogger(__name__)

WAITING_COMMANDS = 64
"""Not acknowledged yet: loads that go on. More at once is no operator."""

STOPPING = Refusal("stopping", "the box stops")


class CommandIntake:
    """Every command gets one acknowledgement, also to its response topic if it names one.

    `tell` hands an event to whoever decides, `drain` ends the service in good order, `reload` reads the recipes again
    and tells what became of it, `note` publishes; all must only enqueue.
    """

    def __init__(
        self,
        config: Config,
        *,
        tell: Callable[[Command], None],
        drain: Callable[[], None],
        reload: Callable[[Callable[[Refusal | None], None]], None],
        note: Callable[[Note], None],
    ) -> None:
        self._config, self._tell, self._drain, self._reload, self._note = config, tell, drain, reload, note
        self._lock = threading.Lock()  # guards all that follows; never held while others are called
        self._waiting: dict[int, Wish] = {}
        self._last = 0
        self._is_stopping = False

    def deliver(self, message: Message) -> None:
        """On the network thread."""
        try:
            verb = contract.verb_of(message.topic, self._config)
        except MessageError as error:
            body = contract.error_body(error, topic=message.topic, at=datetime.now(UTC))
            self._note(Note(contract.error_topic(self._config, error.reason), body))
            return
        try:
            wish = Wish.parse(message, self._config)
        except MessageError as error:
            self._answer(Wish(verb, None, None, None), Refusal(error.reason, str(error)))
            return
        self._begin(wish)

    def acknowledge(self, number: int, refusal: Refusal | None) -> None:
        """The command of this number is done, or was refused."""
        with self._lock:
            wish = self._waiting.pop(number, None)
        if wish is not None:
            self._answer(wish, refusal)

    def stop(self) -> None:
        """The service ends: what goes on is not waited for, and nothing more is begun."""
        with self._lock:
            self._is_stopping = True
            waiting, self._waiting = self._waiting, {}
        for wish in waiting.values():
            self._answer(wish, STOPPING)

    def _begin(self, wish: Wish) -> None:
        if wish.verb == DRAIN:
            self._answer(wish, None)
            self._drain()
            return
        admitted = self._admitted(wish)
        if isinstance(admitted, Refusal):
            self._answer(wish, admitted)
        elif isinstance(wish.verb, Verb) and wish.expert is not None:
            self._tell(Command(admitted, wish.verb, wish.expert))
        else:
            self._reload(lambda refusal: self.acknowledge(admitted, refusal))

    def _admitted(self, wish: Wish) -> int | Refusal:
        with self._lock:
            if self._is_stopping:
                return STOPPING
            if len(self._waiting) >= WAITING_COMMANDS:
                return Refusal("busy", f"{WAITING_COMMANDS} commands are being obeyed")
            self._last += 1
            self._waiting[self._last] = wish
            return self._last

    def _answer(self, wish: Wish, refusal: Refusal | None) -> None:
        body = contract.acknowledgement_body(
            wish.verb, wish.expert, wish.id, refusal, box=self._config.box.name, at=datetime.now(UTC)
        )
        became = "done" if refusal is None else f"refused reason={refusal.reason} detail={refusal.detail}"
        log.info("command verb=%s expert=%s id=%s %s", wish.verb, wish.expert, wish.id, became)
        self._note(Note(contract.acknowledgement_topic(self._config, wish.verb), body))
        if wish.reply is not None:
            self._note(Note(wish.reply.topic, body, correlation=wish.reply.correlation))
