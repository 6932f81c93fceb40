"""What a search knows so far, in a file, so that one that was killed goes on where it was; and what names a search."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from pydantic import TypeAdapter

from appliance import __version__
from appliance.core.graph import ExpertGraph
from appliance.core.types import Finding, Refusal
from appliance.errors import ProfileError
from appliance.profile import Hardware
from appliance.profiler.measure import GpuRuns, Runs
from appliance.profiler.measurements import Measured
from appliance.profiler.rig import Outcome, Rig
from appliance.profiler.settings import Settings
from appliance.profiler.workload import Workload

PREDICTIONS = 2
"""One more with each change of what predictions mean: what was predicted otherwise is another search."""


@dataclass(frozen=True, slots=True)
class Lap:
    """A configuration served live once, in one of the rounds."""

    round: int
    settings: Settings
    outcome: Outcome


@dataclass(slots=True)
class Progress:
    """What is known so far. Written after each step; a later run begins with it.

    `spent_seconds` are of all that was done, `searched_seconds` those of the search alone. Of the workload, a lap plays
    `share` and the search `searched_share`. `runs` and `gpu_runs` are
    what architectures took that are measured while others are not yet.
    """

    path: Path
    spent_seconds: float = 0.0
    searched_seconds: float = 0.0
    measured: Measured | None = None
    runs: dict[str, Runs] = field(default_factory=dict)
    gpu_runs: dict[str, GpuRuns] = field(default_factory=dict)
    laps: list[Lap] = field(default_factory=list)
    share: float | None = None
    searched_share: float | None = None

    @property
    def storage(self) -> Path:
        """The search's own file."""
        return self.path.with_name("search.db")

    @classmethod
    def read(cls, path: Path) -> Progress:
        """Where there is none, or none that can be read, all begins anew, and so does the search."""
        try:
            found = json.loads(path.read_text("utf-8"))
            if {"path", *found} != {one.name for one in fields(cls)}:
                raise ValueError("it is of another version")
            return _PROGRESS.validate_python({**found, "path": path})
        except (OSError, ValueError, TypeError):  # pydantic's errors are ValueErrors, too
            fresh = cls(path)
            fresh.storage.unlink(missing_ok=True)
            return fresh

    def write(self) -> None:
        """Whole or not at all. Raises ProfileError when it cannot be written."""
        beside = self.path.with_suffix(".new")
        try:
            beside.write_text(json.dumps(_PROGRESS.dump_python(self, mode="json", exclude={"path"})), "utf-8")
            beside.replace(self.path)
        except OSError as error:
            raise ProfileError(
                f"{self.path} cannot be written: {error.strerror}",
                "make room there: the same command goes on from what is there already",
            ) from error

    def keep(self, architecture: str, found: Runs | GpuRuns) -> None:
        """One is measured, others are not."""
        if isinstance(found, Runs):
            self.runs[architecture] = found
        else:
            self.gpu_runs[architecture] = found


_PROGRESS = TypeAdapter(Progress)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other profiler works in this folder: each would measure the other, and both write the same search.

    Raises ProfileError when one does. The lock is the kernel's: it ends with this process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / "in-use", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            other = os.pread(file, 20, 0).decode("ascii", "replace")
            raise ProfileError(f"process {other} is profiling with {folder}", "wait for it, or end it") from error
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)


def search_key(rig: Rig, default: Settings, objective: str, seed: int, here: Hardware) -> str:
    """Names what is searched: another workload, box, memory or version is another search."""
    experts = {name: (one.architecture, one.bytes) for name, one in rig.compiled.items()}
    gpus = None if rig.gpus is None else (rig.gpus.names, rig.gpus.memory_bytes, sorted(rig.gpus.compiled))
    int8 = None if rig.int8 is None else {name: one.architecture for name, one in rig.int8.compiled.items()}
    graph = (rig.graph.entries, rig.graph.edges, rig.graph.tables, rig.graph.limits, rig.graph.stand_ins)
    described = (
        (
            __version__,
            PREDICTIONS,
            here,
            rig.memory_bytes,
            rig.cores,
            sorted(rig.settled.items()),
            rig.pinned,
            rig.policy.name,
        ),
        (experts, gpus, int8, graph, sorted(rig.chances.items())),
        (default, objective, seed),
    )
    digest = hashlib.sha256(repr(described).encode())
    for picture in rig.pictures:
        digest.update(hashlib.sha256(picture).digest())
    for request in rig.workload.requests:
        answers = list(_answers(rig.workload, rig.graph, request.id, request.component))
        digest.update(repr((request, answers)).encode())
    return digest.hexdigest()[:16]


def _answers(
    workload: Workload, graph: ExpertGraph, request: str, component: str
) -> Iterator[tuple[str, tuple[Finding, ...] | Refusal]]:
    """Of all experts that are asked about the picture, in their order."""
    asked = [graph.entries[component]]
    for expert in asked:
        answer = workload.answer(request, expert)
        yield expert, answer
        if not isinstance(answer, Refusal):
            asked += [other for other in graph.next_experts(expert, answer) if other not in asked]
