"""How many pictures each line may send: a bucket of tokens for each, so that one that sends too many takes nothing from
the others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

BUCKETS = 1024
"""Names of lines are the senders' choice: who has not come for longest is forgotten, and begins anew."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many pictures a second for good, and a `burst` at once."""

    per_second: float
    burst: int


class Rates:
    """`lines` have their own rate, all others `others`; None is no limit."""

    def __init__(self, lines: Mapping[str, Rate | None], others: Rate | None) -> None:
        self._lines, self._others = lines, others
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def admit(self, line: str, now: float) -> bool:
        """Whether the line may send one more picture now; that takes a token."""
        rate = self._lines.get(line, self._others)
        if rate is None:
            return True
        tokens, since = self._buckets.pop(line, (float(rate.burst), now))
        tokens = min(float(rate.burst), tokens + (now - since) * rate.per_second)
        is_welcome = tokens >= 1.0
        self._buckets[line] = tokens - is_welcome, now
        if len(self._buckets) > BUCKETS:
            self._buckets.popitem(last=False)
        return is_welcome
