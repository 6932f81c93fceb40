"""Pictures that have just been spooled, still in memory: whoever inspects them at once need not read them again."""

from __future__ import annotations

import threading
from collections import OrderedDict

FRESH_BYTES = 8 << 20
"""Of the newest; older ones are read from the disk when their turn comes."""


class Fresh:
    """Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self.bytes = 0

    def keep(self, id: str, payload: bytes) -> None:
        """The oldest leave when all come to more than FRESH_BYTES."""
        with self._lock:
            self._let_go(id)
            self._kept[id] = payload
            self.bytes += len(payload)
            while self.bytes > FRESH_BYTES:
                self._let_go(next(iter(self._kept)))

    def get(self, id: str) -> bytes | None:
        return self._kept.get(id)

    def drop(self, id: str) -> None:
        """The picture has its verdict."""
        with self._lock:
            self._let_go(id)

    def _let_go(self, id: str) -> None:
        self.bytes -= len(self._kept.pop(id, b""))
