"""Pictures that may have ended the process: who is suspect, who is given up, and which batches may run beside which.

A crash names nobody: whoever was in hand may have done it. So each of them runs with nobody beside it until it has its
verdict; a crash is then its own, and an innocent picture is in hand at one crash, not at several.
"""

from __future__ import annotations

from collections import deque

from appliance.core.types import Batch, Refusal

POISON = "poison"
ATTEMPTS = 3
"""So many crashes with a picture in hand make it poison: one in company, and two alone."""


def is_suspect(attempts: int) -> bool:
    """Whether a picture that was in hand at so many crashes has to run with nobody beside it."""
    return attempts > 0


def poisoned(attempts: int) -> Refusal | None:
    """Why a picture that was in hand at so many crashes is given up, None while it may be tried again."""
    if attempts < ATTEMPTS:
        return None
    return Refusal(POISON, f"the service ended {attempts} times while it had this picture in hand")


class Gate:
    """Lets batches begin, in the order in which they are offered.

    A suspect's begins when none runs, and none begins beside it. Others that come behind it wait until it has ended,
    and the next suspect until they have: so the line stands still for one suspect's run at a time.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[Batch, bool]] = deque()
        self._running: set[int] = set()
        self._is_exclusive = False

    def offer(self, batch: Batch, *, suspect: bool) -> list[Batch]:
        """The batches to begin now."""
        self._held.append((batch, suspect))
        return self._let_through()

    def ended(self, batch: Batch) -> list[Batch]:
        """The same, now that this one has ended, or was dropped."""
        self._running.discard(batch.id)
        return self._let_through()

    def drop(self, batch: Batch) -> bool:
        """Whether it was held back, and now will never begin. Who came behind it may begin when that `ended`."""
        held = len(self._held)
        self._held = deque(one for one in self._held if one[0].id != batch.id)
        return len(self._held) < held

    def _let_through(self) -> list[Batch]:
        begun = []
        while self._held and self._may_begin(self._held[0][1]):
            batch, self._is_exclusive = self._held.popleft()
            self._running.add(batch.id)
            begun.append(batch)
        return begun

    def _may_begin(self, suspect: bool) -> bool:
        return not self._running or not (suspect or self._is_exclusive)
