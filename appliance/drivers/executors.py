"""Threads with a desk each: they run batches or bring weights, then report. A broad `except` makes answers here.

What a thread was doing when something unexpected happened is known here and nowhere else, so here it becomes an
answer: RunFailed or LoadFailed with a reason. Nothing is decided here; the controller asks only whom it knows idle.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Full, Queue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.catalog import ExpertManifest
from appliance.core.types import Batch, Event, Finished, Load, Loaded, LoadFailed, Refusal, RunFailed
from appliance.drivers import heads, images
from appliance.drivers.sessions import Sessions
from appliance.errors import ApplianceError, CatalogError, MessageError, RunError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Views:
    """What an expert looks at: (H, W) or (H, W, 3) uint8; the reference is the golden picture's same place."""

    picture: NDArray[np.uint8]
    reference: NDArray[np.uint8] | None = None


class Executors:
    """One thread per executor. `work` turns a batch into its event, `report` passes the event on."""

    def __init__(
        self, names: Mapping[str, str], work: Callable[[Batch], Event], report: Callable[[Event], None]
    ) -> None:
        self._work, self._report = work, report
        self._desks: dict[str, Queue[Batch | None]] = {name: Queue(1) for name in names}
        self._threads = [
            Thread(target=self._serve, args=(desk,), name=f"{names[name]}-{name}", daemon=True)
            for name, desk in self._desks.items()
        ]
        for thread in self._threads:
            thread.start()

    def run(self, batch: Batch) -> None:
        """Put a batch on its executor's desk. Never waits: raises RunError when the desk has one already."""
        try:
            self._desks[batch.executor].put_nowait(batch)
        except Full as error:
            raise RunError(f"executor {batch.executor} has a batch waiting already") from error

    def stop(self) -> None:
        """Return when all batches given out have been reported."""
        for desk in self._desks.values():
            desk.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self, desk: Queue[Batch | None]) -> None:
        while (batch := desk.get()) is not None:
            self._report(self._done(batch))

    def _done(self, batch: Batch) -> Event:
        try:
            return self._work(batch)
        except Exception as error:
            return RunFailed(batch, _refusal(error, f"batch of {batch.expert}"))


class LoaderLane:
    """The threads that bring weights to one device, so that a load never stalls a run."""

    def __init__(self, device: str, slots: int, bring: Callable[[Load], None], report: Callable[[Event], None]) -> None:
        self._device, self._bring, self._report = device, bring, report
        self._pool = ThreadPoolExecutor(slots, f"{device}-loader")

    def load(self, action: Load) -> None:
        """Begin a load as soon as a slot is free; ends in Loaded or LoadFailed."""
        self._pool.submit(self._serve, action)

    def stop(self) -> None:
        """Return when the loads in work have been reported; those still waiting are forgotten."""
        self._pool.shutdown(cancel_futures=True)

    def _serve(self, action: Load) -> None:
        self._report(self._done(action))

    def _done(self, action: Load) -> Event:
        try:
            self._bring(action)
        except Exception as error:
            return LoadFailed(self._device, action.expert, _refusal(error, f"load of {action.expert}"))
        return Loaded(self._device, action.expert)


def _refusal(error: Exception, doing: str) -> Refusal:
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
    """

    def __init__(
        self, sessions: Sessions, manifests: Mapping[str, ExpertManifest], look: Callable[[str], Views]
    ) -> None:
        self._sessions, self._manifests, self._look = sessions, manifests, look

    def __call__(self, batch: Batch) -> Finished:
        """Raises RunError when the run as a whole fails."""
        begun = time.perf_counter()
        manifest = self._manifests[batch.expert]
        looks = [self._prepared(manifest, request) for request in batch.requests]
        answers = iter(self._inspected(manifest, [p for p in looks if isinstance(p, _Prepared)]))
        return Finished(
            batch,
            tuple(look if isinstance(look, Refusal) else next(answers) for look in looks),
            time.perf_counter() - begun,
        )

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

    def _inspected(self, manifest: ExpertManifest, prepared: Sequence[_Prepared]) -> list[heads.Answer]:
        """Findings of each, in as few runs as the expert's largest batch allows."""
        if not prepared:
            return []
        most = manifest.model.max_batch
        with self._sessions.lease(manifest.name) as lease:
            runs = [
                (part, lease.run(_stacked(part)))
                for part in (prepared[i : i + most] for i in range(0, len(prepared), most))
            ]
        return [
            answer for part, outputs in runs for answer in heads.findings(manifest, outputs, [p.size for p in part])
        ]


def _stacked(prepared: Sequence[_Prepared]) -> dict[str, NDArray[Any]]:
    """One array (N, C, height, width) per graph input."""
    return {name: np.stack([p.inputs[name] for p in prepared]) for name in prepared[0].inputs}
