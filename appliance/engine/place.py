"""The seam between the engine and a device: the memory that segments lie in, and the place where sessions run.

`weights` and `runtime` implement it for main memory, `device_weights` and `cuda` for a GPU; tests pretend a third one.
One suite holds them all to it: tests/test_conformance.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from appliance.core.types import Segment


class SegmentMemory(Protocol):
    """The segments on one device, each once. Safe to use from several threads."""

    @property
    def mapped_bytes(self) -> int:
        """What they take now, those still being filled included."""
        ...

    @property
    def peak_bytes(self) -> int: ...

    @property
    def spare_bytes(self) -> int:
        """Memory kept for segments that come, beside what those that are here take."""
        ...

    def trim(self, *, idle_seconds: float = 0.0) -> None:
        """Give back what is spare since so many seconds."""
        ...

    @property
    def hits(self) -> Mapping[str, int]:
        """Segments asked for so far, by the tier where they were found: the nearest first, the disk last."""
        ...

    def load(self, segments: Sequence[Segment], *, ahead: bool = False) -> None:
        """Bring them; each is brought once, however many threads ask. What is loaded `ahead` gives way to the others.

        Raises LoadError (a file is missing, short or unreadable), OutOfMemory, or Cancelled; what came before stays.
        """
        ...

    def cancel(self, segments: Sequence[Segment]) -> None:
        """Let the loads of these end soon, with Cancelled; those that are here already stay."""
        ...

    def hurry(self, segments: Sequence[Segment]) -> None:
        """Let the loads of these that began ahead give way no more."""
        ...

    def drop(self, segments: Sequence[Segment]) -> None:
        """Give the memory back at once. Raises LoadError, dropping none, when one is absent, loading or held."""
        ...

    def is_mapped(self, segment: Segment) -> bool:
        """Whether the segment takes memory: it is here, or being brought."""
        ...

    def hold(self, segments: Sequence[Segment]) -> None:
        """Until released as often, none of these can be dropped; and every run begun after this finds their bytes.

        Raises LoadError if one is not in memory.
        """
        ...

    def release(self, segments: Sequence[Segment]) -> None: ...

    def address(self, segment_id: str) -> int:
        """Where the segment begins, on the device; true as long as it is held. Raises LoadError if it is not there."""
        ...

    def close(self) -> None:
        """Give everything back. Raises LoadError when something is still held."""
        ...


class Place(Protocol):
    """One device as ONNX Runtime sees it."""

    @property
    def device(self) -> tuple[str, int]:
        """As bindings name it: ("cpu", 0), ("cuda", 1)."""
        ...

    @property
    def shares_arena(self) -> bool:
        """Whether all sessions take their activations from one arena, so that a run in any can shrink it."""
        ...

    def open_template(self, path: Path) -> Any:
        """An InferenceSession of a graph without weights. Raises one of runtime.ERRORS, or DeviceError."""
        ...

    def open_plain(self, path: Path, weights: Mapping[str, Any]) -> Any:
        """An InferenceSession of a graph whose initializers are these OrtValues. Raises as above."""
        ...

    def run_options(self, *, shrink: bool) -> Any:
        """Of one run; with `shrink` the session's arena gives back what is not in use when it ends, however it does."""
        ...
