"""Loads and evictions as the controller orders them: weights into memory, a binding on them, and back."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from appliance.core.types import Evict, Load
from appliance.drivers.sessions import Sessions
from appliance.drivers.store import Compiled
from appliance.drivers.weights import Weights


class Residents:
    """The experts in this process's memory. `bring` runs on loader threads, `evict` on the deciding one."""

    def __init__(self, compiled: Mapping[str, Compiled], weights: Weights, sessions: Sessions) -> None:
        self._compiled, self._weights, self._sessions = compiled, weights, sessions
        self._lock = threading.Lock()
        self._active: set[str] = set()

    def bring(self, load: Load) -> None:
        """Make the expert ready. Raises LoadError, StoreError or ModelError; what came before stays to be evicted."""
        compiled = self._compiled[load.expert]
        self._weights.load(compiled.segments)
        self._sessions.activate(compiled)
        with self._lock:
            self._active.add(load.expert)

    def evict(self, eviction: Evict) -> None:
        """Give the expert's memory back at once. After a failed load some of it may never have been there."""
        with self._lock:
            is_active = eviction.expert in self._active
            self._active.discard(eviction.expert)
        if is_active:
            self._sessions.drop(eviction.expert)
        self._weights.drop([segment for segment in eviction.segments if self._weights.is_mapped(segment)])
