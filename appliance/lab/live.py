"""A task served live by one policy: the product's controller, loaders, sessions and reads.

Only the broker is missing: pictures are handed over encoded, at their times, and verdicts taken back. Every policy
begins with as many experts in memory as its budget holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import inf
from queue import Empty, Queue

import psutil

from appliance.catalog import Bundle
from appliance.core import policies
from appliance.core.costs import Cost
from appliance.core.graph import ExpertGraph
from appliance.core.policies import Policy
from appliance.core.types import (
    Acknowledge,
    Action,
    Arrived,
    Device,
    Event,
    Evict,
    Executor,
    Expert,
    Finished,
    Load,
    Loaded,
    Outcome,
    Publish,
    Quarantine,
    Refusal,
    Reinstate,
    Request,
    Run,
    Tick,
    Verdict,
)
from appliance.drivers.devices import cores
from appliance.drivers.images import Views
from appliance.engine.cancellation import Cancellation
from appliance.engine.engine import Engine, Engines
from appliance.errors import ApplianceError
from appliance.lab import paper
from appliance.lab.contenders import Pool, Setup, contender, pools
from appliance.lab.fleet import MAX_BATCH, Fleet
from appliance.lab.laps import Lap, Pictures, Stays, Work, album
from appliance.lab.paper import Trace
from appliance.lab.simulate import Answer
from appliance.startup import CPU, footprint
from appliance.store.store import Compiled

_STALLED_SECONDS = 120.0
_KEEP_FREE = 0.2
"""Of the memory that is available, at least."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a policy serves, whatever it is given to do it with: experts, how they follow each other, and pictures.

    `answer` says what an expert finds in a request's picture.
    """

    graph: ExpertGraph
    bundles: Mapping[str, Bundle]
    requests: Sequence[Request]
    answer: Answer
    pictures: Pictures
    batch_cap: int | None = None


Open = Callable[[Device, Callable[[Event], None]], Engine]
"""Makes the engine of a device, which reports there. Raises OutOfMemory or DeviceError."""


def lap(name: str, made: Fleet, trace: Trace, pictures: Pictures, budget_bytes: int, bytes_per_second: float) -> Lap:
    """The task served once by a policy. Raises ApplianceError when a request gets no answer."""
    uses_at = dict[str, list[float]]()
    policy = contender(name, uses_at)
    equipment = _equipment(policy, made, budget_bytes, bytes_per_second)
    stage = Stage(paper.graph(made.board), made.bundles, trace.requests, trace.answer, pictures)

    def opened(device: Device, report: Callable[[Event], None]) -> Engine:
        return Engine.in_main_memory(device, equipment.compiled, made.segment_path, report)

    def tell(begin: float) -> None:
        uses_at.update((expert, [begin + at for at in times]) for expert, times in trace.asked.items())

    return served(stage, policy, equipment.setup, opened, how=equipment.how, asked=trace.asked.keys(), tell=tell)


def served(
    stage: Stage,
    policy: Policy,
    setup: Setup,
    opened: Open,
    *,
    how: str = "",
    asked: Set[str] = frozenset(),
    tell: Callable[[float], None] = lambda begin: None,
) -> Lap:
    """The stage served once. `tell` hears the second at which it begins. Raises ApplianceError when a device cannot be
    opened, or a request gets no answer."""
    box = _Served(stage, policy, setup, opened)
    try:
        begin, cpu_begin = time.monotonic(), time.process_time()
        tell(begin)
        seconds, cpu_seconds = box.serve(begin), time.process_time() - cpu_begin
    finally:
        box.stop()
    stays = box.stays.until(seconds)
    box.close()
    return Lap(
        policy=policy.name,
        loader="segments",
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        waits_seconds=tuple(verdict.waited_seconds for verdict in box.verdicts),
        loads=box.loads,
        loads_floor=len(asked - {expert for _, expert in setup.residents}),
        peak_bytes=box.peak_bytes,
        stays=stays,
        how=how,
        late_requests=tuple(verdict.request for verdict in box.verdicts if verdict.outcome is Outcome.LATE),
        ran=tuple(box.work.ran),
        handovers=tuple(box.work.handovers),
    )


@dataclass(frozen=True, slots=True)
class _Equipment:
    """A policy's setup, the experts' files for it, and what is special about it, in words."""

    setup: Setup
    compiled: Mapping[str, Compiled]
    how: str


def _equipment(policy: Policy, made: Fleet, budget_bytes: int, load_bytes_per_second: float) -> _Equipment:
    found = pools(policy, {CPU: cores()})
    compiled, how = made.compiled, _how(found)
    if policy is policies.ALL_RESIDENT:
        budget_bytes = made.bytes
        how = "all weights in memory"
        if made.bytes > (1 - _KEEP_FREE) * psutil.virtual_memory().available:
            compiled, how = made.shared, "one copy of the weights per architecture, for want of memory"
    prints = {name: footprint(one) for name, one in compiled.items()}
    working = max(print.activation_bytes(MAX_BATCH) for print in prints.values())
    devices = tuple(
        Device(pool.name, budget_bytes // len(found), len(pool.executors), len(pool.executors) * working)
        for pool in found
    )
    executors = tuple(
        Executor(f"{pool.name}-{turn}", pool.name) for pool in found for turn in range(len(pool.executors))
    )
    chances = {e.name: e.probability for e in paper.experts(made.board, {})}
    experts = {
        name: Expert(
            name,
            dict.fromkeys((device.name for device in devices), prints[name]),
            dict.fromkeys((device.name for device in devices), _cost(one, load_bytes_per_second)),
            made.bundles[name].manifest.model.max_batch,
            chances[name],
        )
        for name, one in compiled.items()
    }
    sizes = [(name, prints[name].weights_bytes) for name in sorted(chances, key=lambda name: (-chances[name], name))]
    if policy is policies.ALL_RESIDENT:
        residents = [(CPU, name) for name, _ in sizes]
    else:
        residents = policy.place(sizes, {device.name: device.budget_bytes for device in devices})
    return _Equipment(Setup(devices, executors, experts, tuple(residents)), compiled, how)


def _how(found: Sequence[Pool]) -> str:
    count = sum(len(pool.executors) for pool in found)
    if count == 1:
        return "one executor"
    return f"{count} executors, {'one pool' if len(found) == 1 else 'a pool each'}"


def _cost(compiled: Compiled, bytes_per_second: float) -> Cost:
    return Cost(compiled.item_seconds, compiled.fixed_seconds, compiled.bytes / bytes_per_second)


def _engines(devices: Sequence[Device], opened: Open, report: Callable[[Event], None]) -> dict[str, Engine]:
    """All of them, or what opening one raises, and none stays."""
    engines: dict[str, Engine] = {}
    try:
        for device in devices:
            engines[device.name] = opened(device, report)
    except ApplianceError:
        for engine in engines.values():
            engine.loaders.stop()
            engine.memory.close()
        raise
    return engines


def _goes_on(ended: Finished, action: Action) -> bool:
    """Whether the executor has its next batch by this."""
    return isinstance(action, Run) and action.batch.executor == ended.batch.executor


def _begun(request: Request, begin: float) -> Request:
    """By the clock, of a stage that begins then."""
    due = request.deadline_seconds
    return replace(
        request,
        arrived_seconds=begin + request.arrived_seconds,
        deadline_seconds=None if due is None else begin + due,
    )


class _Served:
    """One policy on its box, from the first picture to the last verdict."""

    def __init__(self, stage: Stage, policy: Policy, box: Setup, opened: Open) -> None:
        self._stage, self._album = stage, album(stage.pictures)
        self._events: Queue[Event] = Queue()
        self._engines = _engines(box.devices, opened, self._told)
        self._all = Engines(
            self._engines, box.executors, stage.bundles, self._look, self._told, batch_cap=stage.batch_cap
        )
        self.stays, self.loads, self.verdicts = Stays(), 0, list[Verdict]()
        self.work, self._ended = Work(), dict[int, float]()  # by batch, when it was told
        self._controller = box.controller(stage.graph, policy)
        for device, name in box.residents:
            segments = box.experts[name].footprints[device].distinct
            self._engines[device].residents.bring(Load(device, name, segments), Cancellation())
            self.stays.came(device, name, 0.0)

    @property
    def peak_bytes(self) -> int:
        return sum(engine.memory.peak_bytes for engine in self._engines.values())

    def serve(self, begin: float) -> float:
        """All verdicts; returns how long they took. Raises ApplianceError when one is not an answer, or none comes."""
        coming = [_begun(request, begin) for request in reversed(self._stage.requests)]
        count = len(coming)
        while len(self.verdicts) < count:
            now = time.monotonic()
            if coming and coming[-1].arrived_seconds <= now:
                arrived = Arrived(coming.pop())
                self._handle(arrived, now, begin, more=bool(coming) and coming[-1].arrived_seconds <= now)
                continue
            wakeup = self._controller.next_wakeup(now)
            arrival = coming[-1].arrived_seconds if coming else inf
            until = min(now + _STALLED_SECONDS, arrival, inf if wakeup is None else wakeup)
            try:
                event = self._events.get(timeout=max(until - now, 0.0))
            except Empty:
                if not coming and wakeup is None:
                    raise ApplianceError(f"nothing has happened for {_STALLED_SECONDS:.0f} s", "report this") from None
                if wakeup is None or wakeup > time.monotonic():
                    continue
                event = Tick()
            self._handle(event, time.monotonic(), begin)
        return time.monotonic() - begin

    def stop(self) -> None:
        """Give up what is in work."""
        self._all.stop()

    def close(self) -> None:
        """Give all memory back, when all is served and nothing is in work."""
        for name, engine in self._engines.items():
            ledger = self._controller.ledgers[name]
            for expert in ledger.resident:  # what was loaded ahead may not have come
                ledger.give_up(expert)
                freed = ledger.evict(expert).segments if ledger.is_ready(expert) else ledger.abort_load(expert)
                engine.residents.evict(Evict(name, expert, freed))
            engine.memory.close()

    def _handle(self, event: Event, now: float, begin: float, *, more: bool = False) -> None:
        at = now - begin
        self.work.ends(event)
        ended = self._ended.pop(event.batch.id) if isinstance(event, Finished) else now
        if isinstance(event, Loaded):
            self.stays.came(event.device, event.expert, at)
        for action in self._controller.handle(event, now, more=more):
            match action:
                case Publish(verdict):
                    if not verdict.outcome.is_answer and verdict.outcome is not Outcome.LATE:
                        raise ApplianceError(f"{verdict.request} got no answer: {verdict.refusal}", "report this")
                    self.verdicts.append(verdict)
                    self._album.forget(verdict.request)
                case Quarantine(expert, refusal):
                    raise ApplianceError(f"{expert} cannot serve: {refusal.detail}", "report this")
                case Acknowledge() | Reinstate():
                    pass  # nobody commands here, and nobody fails
                case _:
                    if isinstance(action, Evict):
                        self.stays.left(action.device, action.expert, at)
                    self.loads += isinstance(action, Load)
                    self.work.begins(action)
                    self._all.obey(action)
                    if isinstance(event, Finished) and _goes_on(event, action):
                        self.work.goes_on(event, time.monotonic() - ended)

    def _look(self, request: str) -> Views:
        """Who compares with a golden picture finds no difference."""
        views = self._album.look(request)
        return Views(views.picture, views.picture)

    def _told(self, event: Event) -> None:
        """What random weights found means nothing: the task says what they found."""
        if isinstance(event, Finished):
            given = zip(event.batch.requests, event.answers, strict=True)
            answers = (a if isinstance(a, Refusal) else self._stage.answer(r, event.batch.expert) for r, a in given)
            event = replace(event, answers=tuple(answers))
            self._ended[event.batch.id] = time.monotonic()
        self._events.put(event)
