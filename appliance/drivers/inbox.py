"""Where every thread leaves what it has to tell the deciding one."""

from __future__ import annotations

import queue

from appliance.core.types import Event


class Inbox:
    """Events, and bare wake-ups, in order of arrival. `wait` is for the one thread that decides.

    Not a SimpleQueue: that one (CPython 3.11) waits for ever when a signal's handler ends after the time-out, which
    is how a SIGTERM on a busy box was once never noticed.
    """

    def __init__(self) -> None:
        self._queue: queue.Queue[Event | None] = queue.Queue()
        self._is_woken = False

    def tell(self, event: Event) -> None:
        self._queue.put(event)

    def wake(self) -> None:
        """Something changed that is no event: look again. Whoever wakes before that happens adds nothing."""
        if not self._is_woken:
            self._is_woken = True
            self._queue.put(None)

    def wait(self, seconds: float) -> Event | None:
        """The next event; None for a wake-up. Raises TimeoutError when nothing comes in time."""
        try:
            event = self._queue.get(timeout=seconds)
        except queue.Empty as error:
            raise TimeoutError from error
        if event is None:
            self._is_woken = False  # before anybody looks: what changes from here on wakes again
        return event
