"""Experts that keep failing: who serves no more, and when one may try again.

A circuit breaker for each. It counts failures that no picture can be blamed for, in a row; at so many it opens. After
a pause, which grows with every vain trial, whoever asks next is its trial: one failure opens it again, one success
closes it. What a process learnt so is forgotten with it: the next finds out anew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

FAILURES = 5
WINDOW_SECONDS = 3600.0
"""So many pictures failed within this, without a success between them: the expert fails, and not a picture."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 60.0, 3600.0

OWN_FAULT = frozenset({"run", "invalid-output", "load", "store", "model"})
"""Reasons for which an expert is to blame: not the picture, not the memory or device that it was given."""


@dataclass(slots=True)
class _Trouble:
    """`failures` are when, and of which picture; `open_until` while nobody may ask; `trips` how often in a row it was
    opened."""

    failures: deque[tuple[float, str | None]] = field(default_factory=lambda: deque(maxlen=FAILURES))
    trips: int = 0
    open_until: float | None = None

    @property
    def is_on_trial(self) -> bool:
        return self.trips > 0 and self.open_until is None


class Breaker:
    """Of all experts; those that work well take no room here."""

    def __init__(self) -> None:
        self._troubles: dict[str, _Trouble] = {}

    def failed(self, expert: str, reason: str, now: float, picture: str | None = None) -> bool:
        """Note that the expert failed a picture, or to be loaded. Whether it shall serve no more from now on.

        One picture counts once, however many parts are cut from it: it may be to blame for all of them.
        """
        if reason not in OWN_FAULT:
            return False
        trouble = self._troubles.setdefault(expert, _Trouble())
        if trouble.open_until is not None:
            return False
        if picture is None or all(picture != known for _, known in trouble.failures):
            trouble.failures.append((now, picture))
        is_failing = len(trouble.failures) == FAILURES and now - trouble.failures[0][0] <= WINDOW_SECONDS
        return is_failing or trouble.is_on_trial

    def open(self, expert: str, now: float) -> None:
        """Nobody may ask the expert for a while."""
        trouble = self._troubles.setdefault(expert, _Trouble())
        trouble.failures.clear()
        trouble.open_until = now + min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(trouble.trips, 10))
        trouble.trips += 1

    def try_again(self, expert: str, now: float) -> bool:
        """Whether the pause is over: then its trial begins."""
        trouble = self._troubles.get(expert)
        if trouble is None or trouble.open_until is None or now < trouble.open_until:
            return False
        trouble.open_until = None
        return True

    def worked(self, expert: str) -> bool:
        """It answered a picture. Whether it was on trial, and has passed."""
        trouble = self._troubles.get(expert)
        if trouble is None or trouble.open_until is not None:
            return False
        del self._troubles[expert]
        return trouble.is_on_trial

    def forget(self, expert: str) -> None:
        """As if it had never failed."""
        self._troubles.pop(expert, None)
