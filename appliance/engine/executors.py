"""Threads with a desk each: they run batches or bring weights, then report. A broad `except` makes answers here.

What a thread was doing when something unexpected happened is known here and nowhere else, so here it becomes an
answer: RunFailed or LoadFailed with a reason. Nothing is decided here; the controller asks only whom it knows idle.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import Full, Queue
from threading import Condition, Lock, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.catalog import Bundle, ExpertManifest
from appliance.core.types import Batch, Device, Event, Finished, Load, Loaded, LoadFailed, Refusal, RunFailed
from appliance.drivers import heads, images
from appliance.drivers.golden import prove
from appliance.drivers.images import Views
from appliance.engine.cancellation import Cancellation
from appliance.engine.sessions import Lease, Sessions
from appliance.errors import ApplianceError, CatalogError, GoldenMismatch, MessageError, OutOfMemory, RunError
from appliance.store.store import Compiled

_log = logging.getLogger(__name__)
_AGAIN_SECONDS = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """A batch on a desk or in work."""

    batch: Batch
    cancellation: Cancellation


class Executors:
    """One thread per executor. `work` turns a batch into its event, `report` passes the event on."""

    def __init__(
        self,
        names: Mapping[str, str],
        work: Callable[[Batch, Cancellation], Event],
        report: Callable[[Event], None],
    ) -> None:
        self._work, self._report = work, report
        self._lock = Lock()
        self._open: list[_Given] = []  # until they are reported
        self._desks: dict[str, Queue[_Given | None]] = {name: Queue(1) for name in names}
        self._threads = [
            Thread(target=self._serve, args=(desk,), name=f"{names[name]}-{name}", daemon=True)
            for name, desk in self._desks.items()
        ]
        for thread in self._threads:
            thread.start()

    def run(self, batch: Batch) -> None:
        """Put a batch on its executor's desk. Never waits: raises RunError when the desk has one already."""
        given = _Given(batch, Cancellation())
        with self._lock:
            try:
                self._desks[batch.executor].put_nowait(given)
            except Full as error:
                raise RunError(f"executor {batch.executor} has a batch waiting already") from error
            self._open.append(given)

    def cancel(self, batch_id: int) -> None:
        """Give a batch up: on the desk, or within a node of its run. It is reported as RunFailed, reason `cancelled`.

        What has ended by itself before that is reported as it ended. An id that is not given out is ignored.
        """
        self._cancel(lambda given: given.batch.id == batch_id)

    def stop(self) -> None:
        """Give all batches up, and return when they have been reported."""
        self._cancel(lambda given: True)
        for desk in self._desks.values():
            desk.put(None)
        for thread in self._threads:
            thread.join()

    def _cancel(self, is_meant: Callable[[_Given], bool]) -> None:
        with self._lock:
            meant = [given for given in self._open if is_meant(given)]
        for given in meant:
            given.cancellation.cancel()

    def _serve(self, desk: Queue[_Given | None]) -> None:
        while (given := desk.get()) is not None:
            event = self._done(given)
            with self._lock:
                self._open.remove(given)
            self._report(event)

    def _done(self, given: _Given) -> Event:
        batch = given.batch
        try:
            given.cancellation.check(f"the batch of {batch.expert}")
            return self._work(batch, given.cancellation)
        except Exception as error:
            return RunFailed(batch, _refusal(error, f"batch of {batch.expert}"))


@dataclass(frozen=True, slots=True, eq=False)
class _Ordered:
    """A load waiting or in work."""

    load: Load
    cancellation: Cancellation


class LoaderLane:
    """The threads that bring weights to one device, so that a load never stalls a run.

    `slots` of them bring what is needed. One more brings what is loaded ahead, beginning only while nothing needed
    waits: a load ahead never takes the place of one that a task waits for, and two would only share the disk.
    """

    def __init__(
        self,
        device: str,
        slots: int,
        bring: Callable[[Load, Cancellation], None],
        report: Callable[[Event], None],
        hurry: Callable[[str], None] = lambda expert: None,
    ) -> None:
        self._device, self._bring, self._hurry, self._report = device, bring, hurry, report
        self._changed = Condition()
        self._waiting: list[_Ordered] = []
        self._in_work: list[_Ordered] = []
        self._is_stopping = False
        self._threads = [
            Thread(target=self._serve, args=(number == slots,), name=f"{device}-loader-{number}", daemon=True)
            for number in range(slots + 1)
        ]
        for thread in self._threads:
            thread.start()

    def load(self, action: Load) -> None:
        """Begin a load as soon as a slot is free; ends in Loaded or LoadFailed."""
        with self._changed:
            self._waiting.append(_Ordered(action, Cancellation()))
            self._changed.notify_all()

    def cancel(self, expert: str) -> None:
        """Give an expert's load up; it is reported as LoadFailed, reason `cancelled`, unless it ended before.

        Without a load of that expert it does nothing.
        """
        with self._changed:
            forgotten = [ordered for ordered in self._waiting if ordered.load.expert == expert]
            self._waiting = [ordered for ordered in self._waiting if ordered.load.expert != expert]
            in_work = [ordered for ordered in self._in_work if ordered.load.expert == expert]
            self._changed.notify_all()
        for ordered in (*forgotten, *in_work):
            ordered.cancellation.cancel()
        for ordered in forgotten:
            self._report(self._done(ordered))

    def hurry(self, expert: str) -> None:
        """The expert's load, which began ahead, is needed now. Without such a load it does nothing."""
        with self._changed:
            self._waiting = [
                _Ordered(replace(ordered.load, ahead=False), ordered.cancellation)
                if ordered.load.expert == expert
                else ordered
                for ordered in self._waiting
            ]
            self._changed.notify_all()
        self._hurry(expert)

    def stop(self) -> None:
        """Give the loads in work up, and return when they have been reported; those still waiting are forgotten."""
        with self._changed:
            self._is_stopping = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            while thread.is_alive():
                self._cancel_work()  # again: a load may just have been about to begin its next segment
                thread.join(_AGAIN_SECONDS)

    def _cancel_work(self) -> None:
        with self._changed:
            in_work = list(self._in_work)
        for ordered in in_work:
            ordered.cancellation.cancel()

    def _serve(self, ahead: bool) -> None:
        while (ordered := self._next(ahead)) is not None:
            event = self._done(ordered)
            with self._changed:
                self._in_work.remove(ordered)
            self._report(event)

    def _next(self, ahead: bool) -> _Ordered | None:
        with self._changed:
            while not self._is_stopping:
                ordered = self._first(ahead)
                if ordered is not None:
                    self._waiting.remove(ordered)
                    self._in_work.append(ordered)
                    self._changed.notify_all()
                    return ordered
                self._changed.wait()
        return None

    def _first(self, ahead: bool) -> _Ordered | None:
        """What waits longest of its sort; nothing ahead while anything needed waits."""
        first = min(self._waiting, key=lambda ordered: ordered.load.ahead, default=None)
        return first if first is not None and first.load.ahead == ahead else None

    def _done(self, ordered: _Ordered) -> Event:
        load = ordered.load
        try:
            ordered.cancellation.check(f"the load of {load.expert}")
            self._bring(load, ordered.cancellation)
        except Exception as error:
            return LoadFailed(self._device, load.expert, _refusal(error, f"load of {load.expert}"))
        return Loaded(self._device, load.expert)


def _refusal(error: Exception, doing: str) -> Refusal:
    if isinstance(error, MemoryError):
        return Refusal(OutOfMemory.reason, f"{doing}: this process had no memory left")
    if isinstance(error, ApplianceError):
        return Refusal(error.reason, str(error))
    _log.exception("unexpected error doing=%s", doing)
    return Refusal("internal", f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One request's inputs by name, (C, height, width) each, and its picture's (width, height)."""

    inputs: Mapping[str, NDArray[np.float32]]
    size: tuple[int, int]


class Inspection:
    """The work on a batch: look at each request's picture, run the expert, read its outputs.

    `look` gives a request's views, decoded already. A request that it refuses (a damaged picture, a lost reference, one
    that became late and left the spool) is answered by that refusal; the others of its batch are inspected.

    An expert first answers the golden samples of its bundle, once in a process and again if its compiled form changes:
    between the compiler's proof and this one lie the disk, this memory and, on an accelerator, another device. What is
    loaded again comes from the same file, so it is not asked again.
    """

    def __init__(
        self,
        device: Device,
        sessions: Sessions,
        bundles: Mapping[str, Bundle],
        look: Callable[[str], Views],
        *,
        batch_cap: int | None = None,
        note: Callable[[int, bool], None] = lambda batch, runs: None,
    ) -> None:
        """No batch is filled beyond `batch_cap`, nor beyond what its expert allows: the ledger booked no more.

        `note` hears of a batch whether its expert runs now or pictures are decoded, before either begins; it is said
        to be decoding from the start.
        """
        self._note = note
        self._device, self._sessions, self._bundles, self._look = device, sessions, bundles, look
        self._batch_cap = batch_cap
        self._proven: dict[str, Compiled] = {}

    def __call__(self, batch: Batch, cancellation: Cancellation) -> Finished:
        """The proof of an expert is not counted in the seconds.

        Raises RunError, OutOfMemory or Cancelled when the run as a whole fails, GoldenMismatch when the expert fails
        its proof: then no picture was inspected.
        """
        bundle = self._bundles[batch.expert]
        self._prove(bundle, batch, cancellation)
        begun = time.perf_counter()
        looks = []
        for request in batch.requests:
            cancellation.check(f"the batch of {batch.expert}")
            looks.append(self._prepared(bundle.manifest, request))
        prepared = [look for look in looks if isinstance(look, _Prepared)]
        self._note(batch.id, True)
        answers = iter(self._inspected(bundle.manifest, prepared, cancellation))
        return Finished(
            batch,
            tuple(look if isinstance(look, Refusal) else next(answers) for look in looks),
            time.perf_counter() - begun,
        )

    def _prove(self, bundle: Bundle, batch: Batch, cancellation: Cancellation) -> None:
        """In runs of at most so many samples as the batch has pictures: there is memory for no more.

        Two executors may do so at the same time, which is only once too often.
        """
        golden, path = bundle.manifest.golden, bundle.golden_path
        if golden is None or path is None:
            return
        with self._sessions.lease(bundle.manifest.name, cancellation) as lease:
            compiled = lease.compiled
            is_of_bundle = compiled.model_sha256 == bundle.manifest.model.sha256  # no GPU runs an int8 bundle's variant
            if self._proven.get(compiled.expert) == compiled:
                return
            self._note(batch.id, True)
            try:
                prove(
                    lambda pictures: list(
                        self._run(bundle.manifest, lease, dict(zip(compiled.inputs, pictures, strict=True))).values()
                    ),
                    path,
                    compiled.inputs,
                    compiled.outputs,
                    max_batch=min(len(batch.requests), bundle.manifest.model.max_batch),
                    tolerance=golden.tolerance,
                    tolerances=bundle.tolerances if is_of_bundle else {},
                )
            except GoldenMismatch as error:
                raise GoldenMismatch(f"{compiled.expert}: {error.what}", error.remedy) from error
            self._proven[compiled.expert] = compiled
        self._note(batch.id, False)

    def _prepared(self, manifest: ExpertManifest, request: str) -> _Prepared | Refusal:
        try:
            views = self._look(request)
        except (MessageError, CatalogError) as error:  # a store that cannot be read fails the run, which is repeated
            return Refusal(error.reason, str(error))
        if manifest.needs_reference and views.reference is None:
            return Refusal(
                "reference-missing", f"{manifest.name} compares with a golden picture; the request's product has none"
            )
        sources = {"picture": views.picture, "reference": views.reference}
        inputs = {
            spec.name: images.prepare(source, spec)
            for spec in manifest.inputs
            if (source := sources[spec.source]) is not None
        }
        return _Prepared(inputs, (views.picture.shape[1], views.picture.shape[0]))

    def _inspected(
        self, manifest: ExpertManifest, prepared: Sequence[_Prepared], cancellation: Cancellation
    ) -> list[heads.Answer]:
        """Findings of each, in as few runs as the expert's largest batch allows."""
        if not prepared:
            return []
        most = manifest.model.max_batch
        with self._sessions.lease(manifest.name, cancellation) as lease:
            runs = [
                (part, self._run(manifest, lease, _stacked(part)))
                for part in (prepared[i : i + most] for i in range(0, len(prepared), most))
            ]
        return [
            answer for part, outputs in runs for answer in heads.findings(manifest, outputs, [p.size for p in part])
        ]

    def _run(
        self, manifest: ExpertManifest, lease: Lease, feeds: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, NDArray[Any]]:
        items, most = len(next(iter(feeds.values()))), manifest.model.max_batch
        return lease.run(feeds, size=self._device.filled(items, min(most, self._batch_cap or most)))


def _stacked(prepared: Sequence[_Prepared]) -> dict[str, NDArray[Any]]:
    """One array (N, C, height, width) per graph input."""
    return {name: np.stack([p.inputs[name] for p in prepared]) for name in prepared[0].inputs}
