"""What we tell systemd, over its notification socket; nothing at all where there is none."""

from __future__ import annotations

import socket
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
