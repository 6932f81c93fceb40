"""What we tell systemd, over its notification socket; nothing at all where there is none."""

from __future__ import annotations

import socket
import time
from contextlib import suppress

READY = "READY=1"
STOPPING = "STOPPING=1"
WATCHDOG = "WATCHDOG=1"


def status(text: str) -> str:
    """The line that `systemctl status` shows."""
    return "STATUS=" + " ".join(text.split())


def notify(address: str | None, *messages: str) -> bool:
    """Send messages to the notification socket at `address` (a path, or `@name` for an abstract one).

    True when systemd has them; False without a socket, or when it does not answer: the service runs on either way.
    """
    if not address:
        return False
    name = "\0" + address[1:] if address.startswith("@") else address
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notification:
        notification.sendto("\n".join(messages).encode(), name)
        return True
    return False


class Supervisor:
    """Notifications, if systemd started us. The watchdog is fed at most four times per period."""

    def __init__(self, address: str | None, watchdog_seconds: float | None) -> None:
        self._address = address
        self._pause_seconds = None if watchdog_seconds is None else watchdog_seconds / 4
        self._next_seconds = 0.0
        self._said = ""

    def ready(self) -> None:
        """Able to answer: connected and subscribed. Said again after every reconnect, which systemd ignores."""
        notify(self._address, READY)

    def stopping(self) -> None:
        notify(self._address, STOPPING, status("draining"))

    def status(self, text: str) -> None:
        if text != self._said:
            self._said = text
            notify(self._address, status(text))

    def alive(self) -> None:
        now = time.monotonic()
        if self._pause_seconds is not None and now >= self._next_seconds:
            self._next_seconds = now + self._pause_seconds
            notify(self._address, WATCHDOG)
