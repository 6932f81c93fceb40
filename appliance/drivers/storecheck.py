"""Reads the whole store once beside a running service, slowly: a bit that flipped on disk must not pass for a weight.

Checking a segment at each load instead would double what a load costs: 45 MB take 26 ms of processor time to hash
(SHA extensions, 2026-11), which is what bringing them takes.
"""

from __future__ import annotations

import logging
import threading
import time

from appliance.drivers.store import Store
from appliance.errors import StoreError

_log = logging.getLogger(__name__)

SHARE = 0.05
"""Of one core's and the disk's time. 100 experts of 45 MB take two to three minutes."""


class StoreCheck:
    """One thread. What it finds damaged is put into quarantine and logged; the next start compiles it again."""

    def __init__(self, store: Store, *, share: float = SHARE) -> None:
        self._store, self._rests_per_second = store, 1 / share - 1
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-check", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> None:
        """Return when everything has been read."""
        self._thread.join()

    def stop(self) -> None:
        """Return when no file is touched any more. Nothing happens if it was never started, or has ended."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        begun = time.monotonic()
        try:
            damaged = self._store.check(self._rest)
        except (OSError, StoreError) as error:
            _log.error("store_check_failed store=%s error=%s", self._store.folder, error)
            return
        if not self._stopping.is_set():
            _log.info("store_checked damaged=%d seconds=%.1f", len(damaged), time.monotonic() - begun)

    def _rest(self, seconds: float) -> bool:
        return self._stopping.wait(seconds * self._rests_per_second)
