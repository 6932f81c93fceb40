"""Reads the whole store once beside a running service, slowly: a bit that flipped on disk must not pass for a weight.

What it finds damaged is compiled again from the bundles, so that it is whole before an expert has to be loaded from
there. Checking a segment at each load instead would double what a load costs: 45 MB take 26 ms of processor time to
hash (SHA extensions, 2026-11), which is what bringing them takes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from appliance.catalog import Bundle
from appliance.errors import ApplianceError, Cancelled, StoreError
from appliance.store.compile import Interruption, compile_bundles
from appliance.store.store import Compiled, Damage, Store

_log = logging.getLogger(__name__)

SHARE = 0.05
"""Of one core's and the disk's time. 100 experts of 45 MB take two to three minutes."""


_NICE = 10
"""Of this thread and of the children that it compiles in: runs and loads go first."""


class StoreCheck:
    """One thread. `serving` is what the service loads, and each of it has a bundle.

    What is damaged is put into quarantine, logged, and compiled again so that what is served can be loaded as before.
    """

    def __init__(
        self, store: Store, bundles: Mapping[str, Bundle], serving: Mapping[str, Compiled], *, share: float = SHARE
    ) -> None:
        self._store, self._bundles, self._serving = store, bundles, serving
        self._rests_per_second = 1 / share - 1
        self._stopping = threading.Event()
        self._interruption = Interruption()
        self._thread = threading.Thread(target=self._run, name="store-check", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> None:
        """Return when everything has been read, and what was damaged is whole again if it can be."""
        self._thread.join()

    def interrupt(self) -> None:
        """Let it end soon: what is not compiled yet, the next start compiles. Returns at once."""
        self._stopping.set()
        self._interruption.interrupt()

    def stop(self) -> None:
        """Return when no file is touched any more, soon. Nothing happens if it was never started, or has ended."""
        self.interrupt()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with suppress(OSError):  # a sandbox may refuse; then it works at the priority of all
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # on Linux, of this thread alone
        begun = time.monotonic()
        try:
            damaged = self._store.check(self._rest)
            if self._stopping.is_set():
                return
            _log.info("store_checked damaged=%d seconds=%.1f", len(damaged), time.monotonic() - begun)
            self._rebuild(damaged)
        except (OSError, StoreError) as error:
            _log.error("store_check_failed store=%s error=%s", self._store.folder, error)

    def _rest(self, seconds: float) -> bool:
        return self._stopping.wait(seconds * self._rests_per_second)

    def _rebuild(self, damaged: list[Damage]) -> None:
        """Files are named by their content and compiling gives the same each time, so nobody has to be told."""
        names = sorted({name for damage in damaged for name in damage.experts} & self._serving.keys())
        if not names:
            return
        self._store.join()
        # Another one, so that it is never alone in the folder: what the service read about stays.
        apart = Store(self._store.folder.parent, self._store.provider)
        try:
            results = compile_bundles(
                apart,
                [self._bundles[name] for name in names],
                report=lambda *_: None,
                interruption=self._interruption,
            )
        except Cancelled:
            return
        for name, result in results.items():
            if isinstance(result, ApplianceError):
                _log.error("rebuild_failed expert=%s error=%s", name, result)
            elif result != self._serving[name]:
                _log.error("rebuild_differs expert=%s remedy=%s", name, "restart: it is loaded as it is now")
            else:
                _log.info("rebuilt expert=%s", name)
