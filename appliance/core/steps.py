"""Limits of steps: how many pictures wait for an expert that is asked after others, and who is held back meanwhile.

A step for which as many wait as may is *full*. Until it is not, whoever leads to it is *held back*: it begins no batch
and is not loaded. A full step that is not held back itself is *pressing*: it goes before everybody. The graph has no
cycle, so of several full steps one always is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Steps:
    """`limits` by expert, `before`: expert → who leads to it. Who asks tells how many tasks come and go."""

    def __init__(self, limits: Mapping[str, int], before: Mapping[str, tuple[str, ...]]) -> None:
        self._limits, self._before = limits, before
        self._waiting: Counter[str] = Counter()
        self._held: Counter[str] = Counter()  # by how many full steps
        self._turned: set[str] = set()

    def add(self, expert: str, tasks: int) -> None:
        """So many more tasks wait for the expert, or fewer."""
        if expert not in self._limits:
            return
        was_full = self.is_full(expert)
        self._waiting[expert] += tasks
        if self.is_full(expert) is not was_full:
            for source in self._before[expert]:
                self._held[source] += -1 if was_full else 1
            self._turned.update((expert, *self._before[expert]))

    def is_full(self, expert: str) -> bool:
        limit = self._limits.get(expert)
        return limit is not None and self._waiting[expert] >= limit

    def is_held(self, expert: str) -> bool:
        return self._held.get(expert, 0) > 0

    @property
    def held(self) -> frozenset[str]:
        return frozenset(expert for expert, steps in self._held.items() if steps)

    def is_pressing(self, expert: str) -> bool:
        return self.is_full(expert) and not self.is_held(expert)

    @property
    def have_turned(self) -> bool:
        return bool(self._turned)

    def turned(self) -> frozenset[str]:
        """Who is full, held back or pressing otherwise than when this was asked last, perhaps."""
        turned, self._turned = frozenset(self._turned), set()
        return turned
