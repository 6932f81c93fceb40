"""Whether the process holds what the ledger says: a judgement over time of numbers that others measured."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

TOLERANCE = 0.05
WINDOW_SECONDS = 60.0
"""Loads, batches and pictures come and go within it; what stays for so long is no passing thing."""


@dataclass(frozen=True, slots=True)
class Balance:
    """One look. At least `booked_bytes` should be there, at most `unbooked_bytes` more; `measured_bytes` are."""

    booked_bytes: int
    unbooked_bytes: int
    measured_bytes: int

    @property
    def drift(self) -> float:
        """How far it is outside, as a share of the most that may be there: above zero too much, below too little."""
        most = self.booked_bytes + self.unbooked_bytes
        outside = max(self.measured_bytes - most, 0) + min(self.measured_bytes - self.booked_bytes, 0)
        return outside / most


class DriftAlarm:
    """Raised when every look of a whole window was outside the tolerance on the same side; lowered by one inside."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, float]] = deque()
        self.drift = 0.0
        """The least of the window: what was there, or missing, all the time."""

    def look(self, balance: Balance, now: float) -> bool:
        """Whether the alarm is raised, at monotonic second `now`."""
        drift = balance.drift
        if self._looks and (abs(drift) <= TOLERANCE or (drift > 0) != (self._looks[-1][1] > 0)):
            self._looks.clear()
        if abs(drift) > TOLERANCE:
            self._looks.append((now, drift))
        while len(self._looks) > 1 and self._looks[1][0] <= now - WINDOW_SECONDS:
            self._looks.popleft()
        self.drift = min((drift for _, drift in self._looks), key=abs, default=0.0)
        return bool(self._looks) and now - self._looks[0][0] >= WINDOW_SECONDS
