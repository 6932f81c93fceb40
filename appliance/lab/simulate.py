"""Runs the controller against a pretend world in virtual time.

The world is stricter than the real one: it refuses to run what is not ready, to load what is held, to drop what is
in use, and to hold more than the budget. A live service's journal is replayed in it event by event.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, assert_never

from appliance.core.controller import Controller
from appliance.core.policies import POLICIES, Policy, tuned
from appliance.core.types import (
    CANCELLED,
    Acknowledge,
    Action,
    Arrived,
    Batch,
    CancelLoad,
    CancelRun,
    Command,
    Device,
    Event,
    Evict,
    Executor,
    Expert,
    Finding,
    Finished,
    Footprint,
    Heard,
    HurryLoad,
    Load,
    Loaded,
    LoadFailed,
    Outcome,
    Publish,
    Quarantine,
    Refusal,
    Reinstate,
    Request,
    Run,
    RunFailed,
    Segment,
    Tick,
    Verdict,
)
from appliance.drivers import journal
from appliance.errors import ConfigError
from appliance.lab.contenders import pools

Answer = Callable[[str, str], tuple[Finding, ...] | Refusal]


class IllegalMove(AssertionError):
    """The controller asked for something that no device could do."""


@dataclass(slots=True)
class PretendDevice:
    """What a device really holds, by its own count."""

    device: Device
    held: dict[str, int] = field(default_factory=dict)
    experts: dict[str, Footprint] = field(default_factory=dict)
    loading: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    running: dict[int, Batch] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    peak_bytes: int = 0

    def load(self, action: Load, expert: Expert) -> None:
        _require(action.expert not in self.experts, f"{action.expert} is loaded twice")
        _require(len(self.loading) < self.device.load_slots, f"more than {self.device.load_slots} loads at once")
        for segment in action.segments:
            _require(segment.id not in self.held, f"segment {segment.id} is read twice")
            self.held[segment.id] = segment.bytes
        footprint = expert.footprints[self.device.name]
        needed = {segment.id for segment in footprint.segments}
        _require(needed <= self.held.keys(), f"{action.expert} lacks {needed - self.held.keys()}")
        self.experts[action.expert] = footprint
        used = sum(self.held.values()) + sum(f.private_bytes for f in self.experts.values())
        _require(used <= self.device.budget_bytes, f"{used} bytes exceed the budget of {self.device.budget_bytes}")
        self.peak_bytes = max(self.peak_bytes, used)
        self.loading.add(action.expert)

    def cancel(self, expert: str) -> None:
        _require(expert in self.loading, f"the load of {expert} is cancelled, but nobody loads it")
        self.cancelled.add(expert)

    def evict(self, action: Evict) -> None:
        _require(action.expert in self.experts, f"{action.expert} is not here")
        runs = any(batch.expert == action.expert for batch in self.running.values())
        _require(not runs, f"{action.expert} is evicted while it runs")
        _require(action.expert not in self.loading, f"{action.expert} is evicted while it loads")
        del self.experts[action.expert]
        freed = {segment.id for segment in action.segments}
        unused = self.held.keys() - {s.id for footprint in self.experts.values() for s in footprint.segments}
        _require(freed <= unused, f"{freed - unused} are dropped while others use them")
        for segment in freed:
            del self.held[segment]

    def run(self, batch: Batch, most_items: int) -> None:
        _require(batch.expert in self.experts and batch.expert not in self.loading, f"{batch.expert} is not ready")
        self.running[batch.id] = batch
        items = self.device.filled(len(batch.requests), most_items)
        self.taken[batch.id] = self.experts[batch.expert].activation_bytes(items)
        takes = sum(self.taken.values())
        most = self.device.activation_bytes
        _require(most is None or takes <= most, f"{takes} bytes of activations exceed the budget of {most}")


class SharedDisk:
    """Loads in flight share the bandwidth evenly: with n of them each gets an n-th.

    `progress` is how many bytes a load would have got that was in flight from the beginning: a load ends when
    progress has grown by its bytes, so that who joins or leaves changes nobody's place in the heap.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self._rate, self._progress, self._now = bytes_per_second, 0.0, 0.0
        self._flying: list[tuple[float, int, Event]] = []

    def begin(self, size: int, number: int, event: Event, now: float) -> None:
        self._pass(now)
        heapq.heappush(self._flying, (self._progress + size, number, event))

    def next_seconds(self) -> float:
        """When the next load ends, if nobody joins; infinite when there is none."""
        if not self._flying:
            return inf
        return self._now + max(self._flying[0][0] - self._progress, 0.0) * len(self._flying) / self._rate

    def end(self, now: float) -> Event:
        """The event of the load that ends at that second."""
        self._now = now
        self._progress, _, event = heapq.heappop(self._flying)
        return event

    def _pass(self, now: float) -> None:
        if self._flying:
            self._progress += (now - self._now) * self._rate / len(self._flying)
        self._now = now


@dataclass(slots=True)
class HostTier:
    """Pinned main memory of one GPU (engine/pinned.py, without its gaps): what is brought to the GPU stays here, too,
    and comes back without the disk, until others need the room; the longest unused leaves first."""

    budget_bytes: int
    bytes_per_second: float
    fixed_seconds: float = 0.0
    held: dict[str, int] = field(default_factory=dict)
    """Bytes by segment, the longest unused first."""

    def bring(self, segment: Segment) -> int:
        """How many bytes the disk has to read for it. From now on it is here, if there is room for it at all."""
        if self.touch(segment):
            return 0
        if segment.bytes <= self.budget_bytes:
            self.held[segment.id] = segment.bytes
            while sum(self.held.values()) > self.budget_bytes:
                del self.held[next(iter(self.held))]
        return segment.bytes

    def touch(self, segment: Segment) -> bool:
        """Whether it is here; then it is in use, or was until now, and others leave before it."""
        size = self.held.pop(segment.id, None)
        if size is not None:
            self.held[segment.id] = size
        return size is not None

    def seconds(self, size: int) -> float:
        """Of a load of so many bytes, all of which are here."""
        return self.fixed_seconds + size / self.bytes_per_second


class Following(NamedTuple):
    """What comes of an action: an event after so many seconds, or once the disk has read so many bytes for it."""

    event: Event
    seconds: float = 0.0
    disk_bytes: int | None = None


Takes = Callable[[Batch, Mapping[str, int], Mapping[str, int]], float]
"""Seconds that a run takes while so many runs, itself included, and so many loads are in work, by device."""


class World:
    """Devices and executors that take exactly as long as their costs say, and answer as `answer` says.

    `fails(action)` may name a refusal for a load or a run that shall fail. With a `disk`, loads take as long as it
    needs for their bytes beside each other, whatever their costs say; what one of the `tiers`, by device, has of them,
    the disk does not read. `residents` are (device, expert) of those that are in memory at the start. `takes` says how
    long a run takes; as its costs say by default.
    """

    def __init__(
        self,
        experts: Iterable[Expert],
        devices: Iterable[Device],
        answer: Answer,
        fails: Callable[[Load | Run], Refusal | None] = lambda action: None,
        disk: SharedDisk | None = None,
        residents: Sequence[tuple[str, str]] = (),
        takes: Takes | None = None,
        tiers: Mapping[str, HostTier] = MappingProxyType({}),
    ) -> None:
        self.experts = {expert.name: expert for expert in experts}
        self.devices = {device.name: PretendDevice(device) for device in devices}
        self.verdicts: list[Verdict] = []
        self.quarantined: dict[str, Refusal] = {}
        self.busy: set[str] = set()
        self._cancelled_runs: set[int] = set()
        self._answer, self._fails, self.disk, self._takes = answer, fails, disk, takes
        self._tiers = tiers
        for device, name in residents:
            there = self.devices[device]
            segments = self.experts[name].footprints[device].distinct
            missing = tuple(segment for segment in segments if segment.id not in there.held)
            load = Load(device, name, missing)
            there.load(load, self.experts[name])
            there.loading.remove(name)
            self._read_bytes(load)

    def obey(self, action: Action) -> Following | None:
        """Do it; returns which event will tell of it, and when. Raises IllegalMove."""
        match action:
            case Load(device, expert):
                refusal = self._fails(action)
                self.devices[device].load(action, self.experts[expert])
                return self._loading(action, LoadFailed(device, expert, refusal) if refusal else Loaded(device, expert))
            case CancelLoad(device, expert):
                self.devices[device].cancel(expert)
            case HurryLoad(device, expert):
                _require(expert in self.devices[device].loading, f"{expert} is hurried, but nobody loads it")
            case Evict(device, _, segments):
                self.devices[device].evict(action)
                for segment in segments if device in self._tiers else ():
                    self._tiers[device].touch(segment)
            case Run(batch):
                return self._run(action, batch)
            case CancelRun(batch):
                _require(batch.executor in self.busy, f"batch {batch.id} is cancelled, but does not run")
                self._cancelled_runs.add(batch.id)
            case Quarantine(expert, refusal):
                _require(expert not in self.quarantined, f"{expert} is put into quarantine twice")
                self.quarantined[expert] = refusal
            case Reinstate(expert, on_trial):
                _require(expert in self.quarantined or not on_trial, f"{expert} is tried again, but never failed")
                self.quarantined.pop(expert, None)
            case Publish(verdict):
                self.verdicts.append(verdict)
            case Acknowledge():
                pass
            case _:
                assert_never(action)
        return None

    def note(self, event: Event) -> Event:
        """The event is about to be told: what it reports is now so. Returns it as it is if it was cancelled meanwhile;
        a cancelled load or run takes here as long as it would have taken."""
        match event:
            case Loaded(device, expert) | LoadFailed(device, expert):
                self.devices[device].loading.remove(expert)
                if expert in self.devices[device].cancelled:
                    self.devices[device].cancelled.remove(expert)
                    return LoadFailed(device, expert, Refusal(CANCELLED, "nobody waits for it"))
            case Finished(batch) | RunFailed(batch):
                del self.devices[batch.device].running[batch.id], self.devices[batch.device].taken[batch.id]
                self.busy.remove(batch.executor)
                if batch.id in self._cancelled_runs:
                    self._cancelled_runs.remove(batch.id)
                    return RunFailed(batch, Refusal(CANCELLED, "nobody waits for it"))
            case Arrived() | Command() | Tick():
                pass
            case _:
                assert_never(event)
        return event

    def _loading(self, action: Load, event: Event) -> Following:
        if self.disk is None:
            return Following(event, self.experts[action.expert].costs[action.device].load_seconds)
        read = self._read_bytes(action)
        if read or action.device not in self._tiers:
            return Following(event, disk_bytes=read)
        return Following(event, self._tiers[action.device].seconds(sum(segment.bytes for segment in action.segments)))

    def _read_bytes(self, load: Load) -> int:
        """What the disk has to read: what is on its way to the device meanwhile makes it no longer."""
        tier = self._tiers.get(load.device)
        return sum(segment.bytes if tier is None else tier.bring(segment) for segment in load.segments)

    def _run(self, action: Run, batch: Batch) -> Following:
        _require(batch.executor not in self.busy, f"{batch.executor} runs two batches at once")
        _require(0 < len(batch.requests) <= self.experts[batch.expert].max_batch, f"batch of {len(batch.requests)}")
        self.devices[batch.device].run(batch, self.experts[batch.expert].max_batch)
        self.busy.add(batch.executor)
        if self._takes is None:
            seconds = self.experts[batch.expert].costs[batch.device].run_seconds(len(batch.requests))
        else:
            runs = {name: len(there.running) for name, there in self.devices.items()}
            loads = {name: len(there.loading) for name, there in self.devices.items()}
            seconds = self._takes(batch, runs, loads)
        refusal = self._fails(action)
        if refusal:
            return Following(RunFailed(batch, refusal), seconds)
        answers = tuple(self._answer(request, batch.expert) for request in batch.requests)
        return Following(Finished(batch, answers, seconds), seconds)


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a run came to. `seconds` is virtual time from the first arrival to the last verdict."""

    verdicts: tuple[Verdict, ...]
    actions: tuple[Action, ...]
    seconds: float
    loads: int
    evictions: int
    peak_bytes: int

    scheduling_seconds: float = 0.0
    """Processor time that the controller took for its decisions."""

    @property
    def answered(self) -> int:
        """Late, failed and rejected pictures are none that a box has done."""
        return sum(verdict.outcome.is_answer for verdict in self.verdicts)

    @property
    def images_per_second(self) -> float:
        return self.answered / self.seconds if self.seconds else 0.0

    @property
    def waits_seconds(self) -> tuple[float, ...]:
        """Of all that were not turned away. Who was late has waited until it was: without them, overload would look
        better the more of them there are."""
        return tuple(v.waited_seconds for v in self.verdicts if v.outcome is not Outcome.REJECTED)


def simulate(controller: Controller, world: World, arrivals: Sequence[Request]) -> Simulation:
    """Feed the arrivals, in order of time, at their times; everything else takes as long as the world says."""
    event: Event
    agenda: list[tuple[float, int, Event]] = [(r.arrived_seconds, n, Arrived(r)) for n, r in enumerate(arrivals)]
    heapq.heapify(agenda)
    number, now = len(agenda), agenda[0][0] if agenda else 0.0
    started, ended, scheduling, taken = now, now, 0.0, list[Action]()
    clock, disk, more = time.thread_time, world.disk, False
    while True:
        began = clock()
        wakeup = None if more else controller.next_wakeup(now)
        scheduling += clock() - began
        soonest = agenda[0][0] if agenda else inf
        read = disk.next_seconds() if disk is not None else inf
        if wakeup is not None and wakeup < min(soonest, read):
            now, event = max(now, wakeup), Tick()
        elif disk is not None and read < soonest:
            now, event = read, disk.end(read)
        elif agenda:
            now, _, event = heapq.heappop(agenda)
        else:
            break
        event, more = world.note(event), _come_together(event, agenda, now)
        began = clock()
        actions = controller.handle(event, now, more=more)
        scheduling += clock() - began
        for action in actions:
            taken.append(action)
            following = world.obey(action)
            ended = now if isinstance(action, Publish) else ended
            if following is None:
                continue
            number += 1
            if disk is not None and following.disk_bytes is not None:
                disk.begin(following.disk_bytes, number, following.event, now)
            else:
                heapq.heappush(agenda, (now + following.seconds, number, following.event))
    return _summed_up(controller, world, taken, ended - started, scheduling)


def _come_together(event: Event, agenda: Sequence[tuple[float, int, Event]], now: float) -> bool:
    """Whether another picture comes at the same moment: a service takes these from its spool together."""
    return isinstance(event, Arrived) and bool(agenda) and agenda[0][0] == now and isinstance(agenda[0][2], Arrived)


def replay(controller: Controller, world: World, events: Iterable[Heard]) -> Simulation:
    """Feed recorded events to a fresh controller: the same input makes the same actions."""
    taken: list[Action] = []
    started = ended = None
    for now, event, more in events:
        started = now if started is None else started
        world.note(event)
        for action in controller.handle(event, now, more=more):
            taken.append(action)
            world.obey(action)
            ended = now if isinstance(action, Publish) else ended
    return _summed_up(controller, world, taken, (ended or 0.0) - (started or 0.0))


def _summed_up(
    controller: Controller, world: World, actions: list[Action], seconds: float, scheduling_seconds: float = 0.0
) -> Simulation:
    """Counts are the controller's own, as a live box tells them: who was given up while loading is not evicted."""
    return Simulation(
        tuple(action.verdict for action in actions if isinstance(action, Publish)),
        tuple(actions),
        seconds,
        controller.counts["loads"],
        controller.counts["evictions"],
        max(device.peak_bytes for device in world.devices.values()),
        scheduling_seconds,
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise IllegalMove(otherwise)


def simulated(path: Path, *, predict: bool, policy: str | None = None) -> dict[str, Any]:
    """What `appliance simulate` tells of a journal.

    A prediction may be of another policy than the one that the service had, with the memories that such a box has.

    Raises RecordsError when it cannot be read, and ConfigError for a policy that no service has.
    """
    opening, recorded = journal.read(path)
    events = list(recorded)
    if predict and policy:
        opening = under(opening, policy)
    controller = controller_of(opening)
    answers = _recorded_answers(event for _, event, _ in events)
    world = World(opening.experts, opening.devices, lambda request, expert: answers[request, expert])
    started = time.perf_counter()
    if predict:
        simulation = simulate(controller, world, [e.request for _, e, _ in events if isinstance(e, Arrived)])
    else:
        simulation = replay(controller, world, events)
    wall_seconds = time.perf_counter() - started
    return {
        "requests": len(simulation.verdicts),
        "outcomes": dict(Counter(verdict.outcome.value for verdict in simulation.verdicts)),
        "loads": simulation.loads,
        "evictions": simulation.evictions,
        "peak_weights_bytes": simulation.peak_bytes,
        "budget_bytes": sum(device.budget_bytes for device in opening.devices),
        "seconds": simulation.seconds,
        "images_per_second": simulation.images_per_second,
        "requests_per_wall_second": len(simulation.verdicts) / wall_seconds,
    }


def controller_of(opening: journal.Opening) -> Controller:
    """One like the service's at its start. Raises ConfigError for a policy that no service has."""
    return Controller(
        opening.graph,
        {e.name: e for e in opening.experts},
        opening.devices,
        opening.executors,
        opening.unavailable,
        pinned=opening.pinned,
        preload=opening.preload,
        policy=tuned(policy_of(opening.policy), opening.hold_share),
        priorities=opening.priorities,
        most_waiting=opening.most_waiting,
        overflow=opening.overflow,
        products=opening.products,
    )


def under(opening: journal.Opening, name: str) -> journal.Opening:
    """The same box under another policy: in CoServe each executor has a memory and a load of its own, an even share.

    Raises ConfigError for a policy that no service has, and when an expert is too large for such a share.
    """
    policy = policy_of(name)
    if name == opening.policy or not policy.in_order:
        return replace(opening, policy=name)
    able = Counter(device for expert in opening.experts for device in expert.footprints)
    devices = {device.name: device for device in sorted(opening.devices, key=lambda device: -able[device.name])}
    executors = Counter(executor.device for executor in opening.executors)
    found = pools(policy, {device: executors[device] for device in devices if executors[device]})
    parts = Counter(pool.device for pool in found)
    made = replace(
        opening,
        policy=name,
        devices=tuple(_part(devices[pool.device], pool.name, parts[pool.device]) for pool in found),
        executors=tuple(Executor(f"{pool.name}-0", pool.name) for pool in found),
        experts=tuple(
            replace(
                expert,
                footprints={p.name: expert.footprints[p.device] for p in found if p.device in expert.footprints},
                costs={p.name: expert.costs[p.device] for p in found if p.device in expert.costs},
            )
            for expert in opening.experts
        ),
    )
    for expert in made.experts:
        if not any(_holds(device, expert) for device in made.devices):
            raise ConfigError(
                f"{expert.name} does not fit one executor's share of the memory, which {name} divides",
                "choose a policy that shares it, such as appliance",
            )
    return made


def _holds(device: Device, expert: Expert) -> bool:
    footprint = expert.footprints.get(device.name)
    if footprint is None or footprint.weights_bytes > device.budget_bytes:
        return False
    return device.activation_bytes is None or footprint.activation_bytes(1) <= device.activation_bytes


def _part(device: Device, name: str, parts: int) -> Device:
    """One of so many even parts of a device's memory, for one executor."""
    activations = None if device.activation_bytes is None else device.activation_bytes // parts
    return replace(
        device, name=name, budget_bytes=device.budget_bytes // parts, load_slots=1, activation_bytes=activations
    )


def policy_of(name: str) -> Policy:
    if name not in POLICIES:
        raise ConfigError(f"no service has a policy {name}", f"choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def _recorded_answers(events: Iterable[Event]) -> dict[tuple[str, str], tuple[Finding, ...] | Refusal]:
    """What each expert answered live; one that was never asked there finds nothing."""
    answers: dict[tuple[str, str], tuple[Finding, ...] | Refusal] = defaultdict(tuple)
    for event in events:
        if isinstance(event, Finished):
            for request, answer in zip(event.batch.requests, event.answers, strict=True):
                answers[request, event.batch.expert] = answer
    return answers
