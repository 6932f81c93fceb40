"""Engines with nobody who decides: batches and loads that are handed out one by one, so that it is known what goes on
beside what. Everything else is what serves: loader lanes, direct reads, executor threads, sessions.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, cycle, islice
from queue import Queue

from appliance.catalog import Bundle
from appliance.core.types import Batch, Device, Event, Evict, Executor, Finished, Load, Loaded, Refusal, Run, Segment
from appliance.drivers import images
from appliance.drivers.images import Views
from appliance.engine.engine import Engine, Engines
from appliance.errors import LoadError, RunError
from appliance.lab.laps import MAX_BYTES, MAX_PIXELS, Pictures
from appliance.startup import footprint
from appliance.store.store import Compiled

Opening = Callable[[Callable[[Event], None]], Engine]
"""Makes an engine that reports there."""


def size_of(experts: Sequence[Compiled]) -> int:
    """What has to be read for all of them."""
    return sum(segment.bytes for segment in _distinct(experts))


def _distinct(experts: Sequence[Compiled]) -> tuple[Segment, ...]:
    return tuple(dict.fromkeys(segment for one in experts for segment in one.segments))


class Lane:
    """Loads as a service makes them, into a memory of its own: what others hold there is read here for real."""

    def __init__(self, experts: Sequence[Compiled], opening: Opening) -> None:
        self._experts, self._told = experts, Queue[tuple[float, Event]]()
        self._engine = opening(self._tell)

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._engine.loaders.stop()
        if kind is None:  # else somebody may still be there
            self._engine.memory.close()

    @property
    def device(self) -> Device:
        return self._engine.device

    @property
    def hits(self) -> Mapping[str, int]:
        """Segments that were brought, by the tier where they were."""
        return self._engine.memory.hits

    def bring(self, experts: Sequence[Compiled]) -> float:
        """Seconds until all are ready. Raises LoadError when one cannot be brought."""
        begun = time.perf_counter()
        for one in experts:
            self._engine.loaders.load(Load(self.device.name, one.expert, footprint(one).distinct))
        told = [self._told.get() for _ in experts]
        for _, event in told:
            if not isinstance(event, Loaded):
                raise LoadError(getattr(event, "refusal", Refusal("", "")).detail)
        return max(at for at, _ in told) - begun

    def let_go(self, experts: Sequence[Compiled], segments: Sequence[Segment] | None = None) -> None:
        """Evict them and their segments, or only these."""
        freed = _distinct(experts) if segments is None else tuple(segments)
        for one in experts[:-1]:
            self._engine.residents.evict(Evict(self.device.name, one.expert, ()))
        self._engine.residents.evict(Evict(self.device.name, experts[-1].expert, freed))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within, as many loads as the device has slots are in flight, over and over."""
        ending = threading.Event()
        turns = cycle(self._experts)

        def load() -> None:
            while not ending.is_set():
                experts = list(islice(turns, min(self.device.load_slots, len(self._experts))))
                self.bring(experts)
                self.let_go(experts)

        with ThreadPoolExecutor(1) as pool:
            loads = pool.submit(load)
            try:
                yield
            finally:
                ending.set()
            loads.result()

    def _tell(self, event: Event) -> None:
        self._told.put((time.perf_counter(), event))


@dataclass(frozen=True, slots=True)
class Crew:
    """So many executors of an engine at work, each with batches of so many pictures, and at least so many of them."""

    engine: str
    executors: int
    items: int
    rounds: int = 1


class Bench:
    """Experts in the memories of some engines, and executors for each. `experts` are as each engine runs them."""

    def __init__(
        self,
        openings: Mapping[str, Opening],
        experts: Mapping[str, Sequence[Compiled]],
        bundles: Mapping[str, Bundle],
        executors: Mapping[str, int],
        pictures: Pictures,
    ) -> None:
        """Engines are called as their devices are. Raises what opening one raises, RunError or LoadError."""
        self._experts, self._told, self._ids = experts, Queue[Event](), count()
        self._is_turned = False
        self._pictures = pictures
        self._reference = self._decoded(0)
        self._engines = {name: opening(self._told.put) for name, opening in openings.items()}
        made = [Executor(f"{name}-{n}", name) for name, most in executors.items() for n in range(most)]
        self._all = Engines(self._engines, made, bundles, self._look, self._told.put)
        for name in self._engines:
            for one in experts[name]:
                self._all.obey(Load(name, one.expert, footprint(one).distinct))
                self._heard()

    def close(self) -> None:
        self._all.stop()
        for name, engine in self._engines.items():
            for one in self._experts[name]:
                engine.residents.evict(Evict(name, one.expert, ()))
        memories = {id(engine.memory): engine.memory for engine in self._engines.values()}
        for memory in memories.values():
            memory.close()

    def seconds(self, engine: str, items: int) -> float:
        """Of one batch alone."""
        return self.together(Crew(engine, 1, items))[engine]

    def together(self, *crews: Crew) -> dict[str, float]:
        """The median of batches by engine, while all are at work: none rests before all had their rounds."""
        crew_of = {crew.engine: crew for crew in crews}
        left = {f"{crew.engine}-{number}": crew.rounds for crew in crews for number in range(crew.executors)}
        seconds: dict[str, list[float]] = {name: [] for name in crew_of}
        for executor in left:
            self._run(executor, crew_of)
        at_work = len(left)
        while at_work:
            finished = self._heard()
            assert isinstance(finished, Finished)
            executor, engine = finished.batch.executor, finished.batch.device
            seconds[engine].append(finished.seconds)
            left[executor] -= 1
            if max(left.values()) > 0:
                self._run(executor, crew_of)
            else:
                at_work -= 1
        return {name: statistics.median(found) for name, found in seconds.items()}

    def times_as_long(self, beside: Callable[[], float], without: Callable[[], float]) -> float:
        """A pair, of which now one and now the other is first: a box that becomes slower favours neither."""
        self._is_turned = not self._is_turned
        if self._is_turned:
            seconds = beside()
            return seconds / without()
        seconds = without()
        return beside() / seconds

    def _run(self, executor: str, crews: Mapping[str, Crew]) -> None:
        """Executors run different experts where there are several: weights that they share would stay in caches."""
        engine, _, number = executor.rpartition("-")
        experts = self._experts[engine]
        requests = tuple(str(next(self._ids)) for _ in range(crews[engine].items))
        expert = experts[int(number) % len(experts)].expert
        self._all.obey(Run(Batch(next(self._ids), executor, engine, expert, requests)))

    def _heard(self) -> Event:
        """Raises RunError or LoadError when it is that something failed."""
        match self._told.get():
            case Loaded() as event:
                return event
            case Finished(batch, answers) as event:
                for one in answers:
                    if isinstance(one, Refusal):
                        raise RunError(f"{batch.expert}: {one.detail}")
                return event
            case event:
                raise RunError(getattr(event, "refusal", Refusal("", "")).detail)

    def _look(self, request: str) -> Views:
        """A picture that nobody has decoded before, and a golden one for experts that compare."""
        return Views(self._decoded(int(request)), self._reference)

    def _decoded(self, number: int) -> images.Picture:
        payload = self._pictures[number % len(self._pictures)]
        return images.decode(payload, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)
