"""What the profiler chooses for a box: a configuration, and the space in which configurations are searched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any


@dataclass(frozen=True, slots=True)
class Settings:
    """One configuration of a box.

    The shares say how memory is split: of main memory, `host_tier_share` is pinned for the GPUs in use; of what is
    left, and of a GPU's, so much is for weights and the rest for activations. `hold_share` is the policy's: for so
    large a share of its seconds a load is held for which somebody has to leave. With `int8` 1, the CPU serves experts
    that have an int8 variant in it.
    """

    cpu_executors: int
    gpu_executors: int = 0
    threads: int = 1
    load_slots: int = 2
    batch_cap: int = 16
    weights_share: float = 0.8
    gpu_weights_share: float = 0.8
    host_tier_share: float = 0.0
    hold_share: float = 0.25
    int8: int = 0

    def told(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Knob:
    """A setting that may be anything from `low` to `high`, whole where both are; `is_log`: small ones matter more."""

    low: float
    high: float
    is_log: bool = False

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def including(self, value: float) -> Knob:
        """The same, as wide as need be for this value."""
        return replace(self, low=min(self.low, value), high=max(self.high, value))

    def moved(self, value: float, share: float) -> float:
        """By such a share of the way from one end to the other, a whole one by 1 at least; never beyond an end."""
        ratio: float = (self.high / self.low) ** share if self.is_log else 1.0
        found = value * ratio if self.is_log else value + (self.high - self.low) * share
        if self.is_whole:
            found = max(round(found), value + 1) if share > 0 else min(round(found), value - 1)
        return min(max(found, self.low), self.high)

    def steps(self, count: int) -> list[float]:
        """At most so many values, from one end to the other."""
        if self.is_whole and self.high - self.low < count:
            return list(range(int(self.low), int(self.high) + 1))
        if count == 1:
            return [self.high]
        at = [number / (count - 1) for number in range(count)]
        if self.is_log:
            found = [self.low * (self.high / self.low) ** share for share in at]
        else:
            found = [self.low + (self.high - self.low) * share for share in at]
        if self.is_whole:
            return list(dict.fromkeys(round(value) for value in found))
        return [*found[:-1], self.high]  # and not what rounding makes of it


Space = Mapping[str, Knob]
"""By the name of the setting; the others stay as they are in the settings that a search begins with."""
NAMES = tuple(field.name for field in fields(Settings))


def grid(space: Space, counts: Mapping[str, int], default: Settings) -> Iterator[Settings]:
    """All combinations of so many values of each; who is not counted stays at its default."""
    names = [name for name in space if counts.get(name, 0) > 0]
    for values in product(*(space[name].steps(counts[name]) for name in names)):
        chosen: dict[str, Any] = dict(zip(names, values, strict=True))
        yield replace(default, **chosen)
