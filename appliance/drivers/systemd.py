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


class Notices:
    """Messages to the notification socket at `address` (a path, or `@name` for an abstract one), if there is one.

    Our end of it is kept open: while the process may open no more files, its watchdog is fed all the same.
    """

    def __init__(self, address: str | None) -> None:
        name = address or ""
        self._name = "\0" + name[1:] if name.startswith("@") else name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if name else None

    def tell(self, *messages: str) -> bool:
        """True when systemd has them; False without a socket, or when it does not answer: the service runs on either
        way."""
        if self._socket is None:
            return False
        with suppress(OSError):
            self._socket.sendto("\n".join(messages).encode(), self._name)
            return True
        return False

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


class Supervisor:
    """Notifications, if systemd started us. The watchdog is fed at most four times per period."""

    def __init__(self, address: str | None, watchdog_seconds: float | None) -> None:
        self._notices = Notices(address)
        self._pause_seconds = None if watchdog_seconds is None else watchdog_seconds / 4
        self._next_seconds = 0.0
        self._said = ""

    def ready(self) -> None:
        """Able to answer: connected and subscribed. Said again after every reconnect, which systemd ignores."""
        self._notices.tell(READY)

    def stopping(self) -> None:
        self._notices.tell(STOPPING, status("draining"))

    def status(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._notices.tell(status(text))

    def alive(self) -> None:
        now = time.monotonic()
        if self._pause_seconds is not None and now >= self._next_seconds:
            self._next_seconds = now + self._pause_seconds
            self._notices.tell(WATCHDOG)

    def close(self) -> None:
        self._notices.close()
