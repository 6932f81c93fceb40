"""The same task as a user would build it today: an InferenceSession per expert, the least recently used leave.

Sessions have default options. A request is answered by one worker from its picture to its verdict, in order of arrival.
What a session takes is measured, and the budget holds so many. It begins with as many experts in memory as the others.
"""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

import numpy as np
import onnxruntime

from appliance.core.policies import filled
from appliance.core.types import Request
from appliance.drivers import heads, images, runtime
from appliance.drivers.devices import anonymous_bytes, cores
from appliance.lab import paper
from appliance.lab.fleet import Fleet
from appliance.lab.laps import Lap, Pictures, Stays, album
from appliance.lab.paper import Trace

PLAIN = "plain-lru"


@dataclass(frozen=True, slots=True)
class Setting:
    """So many workers, whose sessions have so many threads each; 0 is the runtime's default, one per core."""

    workers: int
    threads: int

    @property
    def how(self) -> str:
        each = f"{self.threads} thread" if self.threads else "the default threads"
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}, sessions of {each}"


def settings() -> tuple[Setting, ...]:
    """The two that a user would try: the runtime spreads a run over the cores, or each core has a run of its own."""
    return Setting(1, 0), Setting(cores(), 1)


def lap(
    setting: Setting, made: Fleet, trace: Trace, pictures: Pictures, budget_bytes: int, sizes: Mapping[str, int]
) -> Lap:
    """The task served once. `sizes` are the bytes of a session by shape."""
    cache = _Cache(lambda expert: _opened(made.model_of(expert), setting.threads), budget_bytes)
    cache.sizes = {expert: sizes[shape] for expert, shape in made.shapes.items()}
    chances = [(e.name, cache.sizes[e.name]) for e in paper.experts(made.board, {})]
    for _, expert in reversed(filled(chances, {PLAIN: budget_bytes})):
        cache.session(expert)
    began_with, loads_before = cache.resident, cache.loads
    served = _Served(cache, made, trace, pictures)
    cache.begin = begin = time.monotonic()
    cpu_begin = time.process_time()
    served.serve(begin, setting.workers)
    seconds = time.monotonic() - begin
    return Lap(
        policy=PLAIN,
        loader="plain",
        seconds=seconds,
        cpu_seconds=time.process_time() - cpu_begin,
        waits_seconds=tuple(served.waits),
        loads=cache.loads - loads_before,
        loads_floor=len(trace.asked.keys() - began_with),
        peak_bytes=cache.peak_bytes,
        stays=cache.stays.until(seconds),
        how=f"{setting.how}; models from {sum(map(len, made.model_files.values()))} files in the page cache",
    )


def session_bytes(made: Fleet, side: Callable[[str], int]) -> dict[str, int]:
    """What a session of each shape takes once it has run, beside files: measured, the largest of both settings."""
    return {
        shape: max(_measured(files[0], side(shape), setting.threads) for setting in settings())
        for shape, files in made.model_files.items()
    }


def _measured(path: Path, side: int, threads: int) -> int:
    picture = np.zeros((1, 3, side, side), np.float32)

    def ran() -> Any:
        session = _opened(path, threads)
        session.run(None, {"image": picture})
        return session

    warm = ran()
    before = _settled_bytes()
    sessions = [ran() for _ in range(3)]
    taken = (_settled_bytes() - before) // len(sessions)
    del warm, sessions
    return max(taken, 1)


def _settled_bytes() -> int:
    gc.collect()
    runtime.trim()
    return anonymous_bytes()


def _opened(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class _Cache:
    """Sessions by expert, the least recently used first. Whoever asks first makes the session, the others wait."""

    def __init__(self, opened: Callable[[str], Any], budget_bytes: int) -> None:
        self._opened, self._budget_bytes, self._lock = opened, budget_bytes, Lock()
        self._sessions: OrderedDict[str, Future[Any]] = OrderedDict()
        self._used_bytes = self.peak_bytes = self.loads = 0
        self.sizes: Mapping[str, int] = {}
        self.stays, self.begin = Stays(), 0.0

    @property
    def resident(self) -> frozenset[str]:
        return frozenset(self._sessions)

    def session(self, expert: str) -> Any:
        with self._lock:
            promised = self._sessions.get(expert)
            is_mine = promised is None
            if promised is None:
                self._make_room(self.sizes[expert])
                promised = self._sessions[expert] = Future()
                self.stays.came(PLAIN, expert, self._now())
                self.loads += 1
            self._sessions.move_to_end(expert)
        if is_mine:
            try:
                promised.set_result(self._opened(expert))
            except BaseException as error:
                promised.set_exception(error)
        return promised.result()

    def _make_room(self, size: int) -> None:
        while self._sessions and self._used_bytes + size > self._budget_bytes:
            leaving, _ = self._sessions.popitem(last=False)
            self._used_bytes -= self.sizes[leaving]
            self.stays.left(PLAIN, leaving, self._now())
        self._used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._used_bytes)

    def _now(self) -> float:
        return max(time.monotonic() - self.begin, 0.0) if self.begin else 0.0


class _Served:
    """Workers that take requests as they come."""

    def __init__(self, cache: _Cache, made: Fleet, trace: Trace, pictures: Pictures) -> None:
        self._cache, self._made, self._trace, self._album = cache, made, trace, album(pictures)
        self.waits = list[float]()
        self._failed = list[BaseException]()

    def serve(self, begin: float, workers: int) -> None:
        """Returns when all are answered. Raises what a worker failed of."""
        waiting = SimpleQueue[Request]()
        for request in self._trace.requests:
            waiting.put(request)
        threads = [Thread(target=self._work, args=(waiting, begin)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in self._failed:
            raise error

    def _work(self, waiting: SimpleQueue[Request], begin: float) -> None:
        with suppress(Empty):
            while not self._failed:
                request = waiting.get_nowait()
                time.sleep(max(begin + request.arrived_seconds - time.monotonic(), 0.0))
                try:
                    self._answer(request)
                except BaseException as error:  # told by who waits for the workers
                    self._failed.append(error)
                self.waits.append(time.monotonic() - begin - request.arrived_seconds)

    def _answer(self, request: Request) -> None:
        rank = int(request.component.removeprefix("type"))
        picture = self._album.look(request.id).picture
        for expert in (paper.classifier(rank), *([paper.detector(rank)] if request.id in self._trace.checked else [])):
            manifest = self._made.bundles[expert].manifest
            feeds = {spec.name: images.prepare(picture, spec)[None] for spec in manifest.inputs}
            session = self._cache.session(expert)
            names = [output.name for output in session.get_outputs()]
            outputs = dict(zip(names, session.run(None, feeds), strict=True))
            heads.findings(manifest, outputs, [(picture.shape[1], picture.shape[0])])
        self._album.forget(request.id)
