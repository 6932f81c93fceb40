"""Exports hundreds of experts in worker processes, each bundle complete or absent, and says which failed and why; and
makes their variants in the same way.

A worker that dies takes nobody along: those it was busy with are tried once more, each in a process of its own.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from appliance.core.types import Precision
from appliance.errors import ApplianceError, ExportError
from export import bundle, variants
from export.manifest import Entry
from export.variants import VariantJob

Done = Callable[["Outcome"], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One expert to export: `root` is where its paths start, `out` is the catalogue's folder."""

    entry: Entry
    root: Path
    out: Path

    @property
    def key(self) -> tuple[str, int]:
        return self.entry.name, self.entry.version


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one expert. `why` is empty when it passed; `was_there` when --resume found it complete.

    Of an int8 variant also how many pictures judged it, how far it agrees, and the bytes of the network it stands for.
    """

    expert: str
    version: int
    passed: bool
    seconds: float
    model_bytes: int = 0
    max_batch: int = 0
    why: str = ""
    was_there: bool = False
    precision: Precision = "full"
    judged: int = 0
    agreement: float | None = None
    full_bytes: int = 0


Work = Job | VariantJob


def export_one(job: Job) -> Outcome:
    """Prove and write one bundle. Raises ApplianceError when it cannot be proven."""
    started = time.monotonic()
    if job.entry.onnx is not None:
        from export import foreign  # torch is not needed for these

        proven = foreign.register(job.entry, job.root)
    else:
        proven = _converted(job)
    bundle.write(job.entry, proven, job.out)
    return Outcome(
        job.entry.name,
        job.entry.version,
        True,
        time.monotonic() - started,
        len(proven.model),
        proven.max_batch,
    )


def make_variant(job: VariantJob) -> Outcome:
    """Make, judge and keep one int8 variant. Raises ApplianceError when it may not serve."""
    started = time.monotonic()
    whole, made = variants.make(job)
    return Outcome(
        *job.key,
        True,
        time.monotonic() - started,
        made.bytes,
        made.max_batch,
        precision="int8",
        judged=made.judged,
        agreement=made.agreement,
        full_bytes=whole.manifest.model.bytes,
    )


def export_all(jobs: Sequence[Work], workers: int, resume: bool, done: Done) -> list[Outcome]:
    """All of them, in the order given; `done` is told of each as it ends."""
    for out in {job.out for job in jobs}:
        out.mkdir(parents=True, exist_ok=True)
        bundle.sweep(out)
    outcomes: dict[tuple[str, int], Outcome] = {}

    def note(job: Work, outcome: Outcome) -> None:
        outcomes[job.key] = outcome
        done(outcome)

    for job in jobs:
        if resume and is_done(job):
            note(job, Outcome(*job.key, True, 0.0, was_there=True, precision=_precision(job)))
    waiting = [job for job in jobs if job.key not in outcomes]
    suspects = []
    while waiting:
        broken = _run_pool(waiting, workers, note)
        waiting = [job for job in waiting if job.key not in outcomes and job not in broken]
        suspects += broken
    for job in suspects:
        if _run_pool([job], 1, note):
            note(job, _failed(job, "the worker process died: out of memory, or a crash of the exporter"))
    for out in {job.out for job in jobs}:
        bundle.sweep(out)
    return [outcomes[job.key] for job in jobs]


def is_done(job: Work) -> bool:
    if isinstance(job, VariantJob):
        return variants.is_done(job)
    try:
        source = (job.root / job.entry.source).read_bytes()
    except (OSError, ExportError):
        return False
    return bundle.is_done(job.entry, hashlib.sha256(source).hexdigest(), job.out)


def _converted(job: Job) -> bundle.Proven:
    try:
        from export import convert  # heavy: torch
    except ImportError as error:
        raise ExportError(f"PyTorch is not installed: {error}", 'pip install "coe-appliance[export]"') from error
    return convert.convert(job.entry, job.root)


def _run_pool(jobs: Sequence[Work], workers: int, note: Callable[[Work, Outcome], None]) -> list[Work]:
    """Run the jobs until done or until a worker dies; returns those that were being worked on when one died.

    No more are handed out than there are workers, so that the dead one's job is among few.
    """
    waiting: Iterator[Work] = iter(jobs)
    running: dict[Future[Outcome], Work] = {}
    # A fresh interpreter each: a forked torch inherits locks of threads that no longer exist.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_begin_worker) as pool:
        try:
            while True:
                while len(running) < workers and (job := next(waiting, None)) is not None:
                    running[pool.submit(_attempt, job)] = job
                if not running:
                    return []
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    outcome = future.result()
                    note(running.pop(future), outcome)
        except BrokenProcessPool:  # from a result, or from handing out the next job
            return list(running.values())


def _attempt(job: Work) -> Outcome:
    """The border of a worker: whatever is wrong with one expert is its outcome, never the run's end."""
    started = time.monotonic()
    try:
        return make_variant(job) if isinstance(job, VariantJob) else export_one(job)
    except ApplianceError as error:
        return _failed(job, str(error), time.monotonic() - started)
    except Exception as error:
        return _failed(job, f"{type(error).__name__}: {error}", time.monotonic() - started)


def _failed(job: Work, why: str, seconds: float = 0.0) -> Outcome:
    return Outcome(*job.key, False, seconds, why=why, precision=_precision(job))


def _precision(job: Work) -> Precision:
    return "int8" if isinstance(job, VariantJob) else "full"


def _begin_worker() -> None:
    """An end when the parent was killed: a pool's workers would wait for it for ever."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
