"""Why a request took so long: the events of a service told again, with who waited for what at every moment.

A chronicle is made by feeding events to a controller like the one that decided on them; it adds up, for each question
that a request had to an expert, what it waited for, and keeps who was loaded and who left by which rule. It decides
nothing, and the controller knows nothing of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from appliance.core.controller import Controller
from appliance.core.memory import Residency
from appliance.core.scheduler import Queue
from appliance.core.types import (
    Action,
    Arrived,
    Batch,
    Event,
    Evict,
    Finished,
    Heard,
    Load,
    Loaded,
    LoadFailed,
    Publish,
    Quarantine,
    Request,
    Rule,
    Run,
    RunFailed,
    Verdict,
)


class Wait(StrEnum):
    """What a request waits for. Where queues are worked off in order, what is before it is the executor's time."""

    SPOOL = "spool"
    """Too many others were scheduled, or the box had just started."""
    LOAD_SLOT = "load slot"
    """Its expert was absent, and every slot of the device was loading others."""
    MEMORY = "memory"
    """Its expert was absent, a slot was free, and nobody was allowed to leave for it yet."""
    LOAD = "load"
    """Its expert was on its way."""
    EXECUTOR = "executor"
    """Its expert was there, and its executor ran something else."""
    ACTIVATIONS = "activations"
    """Its expert was there, its executor was idle, and what ran elsewhere left no room for a batch."""
    STEP = "full step"
    """As many as may waited for another expert to which its own leads."""
    RUN = "run"
    """It was looked at."""


MAKING_ROOM = frozenset({Rule.ORPHANED, Rule.LEAST_WORTH, Rule.OVERDUE, Rule.PINNED})
"""Rules by which somebody leaves for the load that begins in the same moment."""


@dataclass(slots=True)
class Departure:
    """An expert left; `coming` is for whom, if it was for somebody."""

    at_seconds: float
    device: str
    expert: str
    rule: Rule
    coming: str | None = None


@dataclass(slots=True)
class Arrival:
    """A load; `reason` why it came to nothing. `waiting` tasks wanted it when it began; `left` made room for it."""

    began_seconds: float
    device: str
    expert: str
    ahead: bool
    waiting: int
    left: tuple[Departure, ...]
    ended_seconds: float | None = None
    reason: str | None = None


@dataclass(slots=True)
class Course:
    """One run of a batch; `reason` why it failed."""

    batch: Batch
    began_seconds: float
    ended_seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """How things were when a question was queued: what its executor ran and had to do, and who was in memory."""

    running: Batch | None
    ahead: tuple[tuple[str, int], ...]
    resident: Mapping[str, tuple[str, ...]]


@dataclass(slots=True)
class Question:
    """What a request asked of one expert. `departure` is how the expert left last, if it was absent then."""

    request: str
    expert: str
    asked_seconds: float
    device: str
    executor: str
    found: Residency
    departure: Departure | None
    waits: defaultdict[Wait, float] = field(default_factory=lambda: defaultdict(float))
    loads: list[Arrival] = field(default_factory=list)
    runs: list[Course] = field(default_factory=list)
    standing: Standing | None = None
    ended_seconds: float | None = None
    _since: float = 0.0
    _full_before: float = 0.0
    _busy_before: float = 0.0


@dataclass(slots=True)
class Journey:
    """A request from its arrival at the scheduler, `taken_seconds`, to its verdict."""

    request: Request
    taken_seconds: float
    questions: list[Question] = field(default_factory=list)
    verdict: Verdict | None = None
    ended_seconds: float | None = None

    @property
    def waits(self) -> dict[Wait, float]:
        total = dict.fromkeys(Wait, 0.0)
        total[Wait.SPOOL] = max(0.0, self.taken_seconds - self.request.arrived_seconds)
        for question in self.questions:
            for wait, seconds in question.waits.items():
                total[wait] += seconds
        return total

    @property
    def cause(self) -> Wait:
        """What it waited for longest."""
        waits = self.waits
        return max(Wait, key=lambda wait: waits[wait])


class Chronicle:
    """Follows a controller event by event. Of `focus`, one request, it also keeps how things stood at every step."""

    def __init__(self, controller: Controller, *, in_order: bool, focus: str | None = None) -> None:
        self.journeys: dict[str, Journey] = {}
        self.loads: list[Arrival] = []
        self.departures: list[Departure] = []
        self.queued: list[tuple[float, int]] = []
        """How many questions were queued from then on."""
        self.began_seconds = self.ended_seconds = 0.0
        self._controller, self._in_order, self._focus = controller, in_order, focus
        self._residency = {
            name: {expert: ledger.residency(expert) for expert in ledger.resident}
            for name, ledger in controller.ledgers.items()
        }
        self.residents_at_start = {name: tuple(there) for name, there in self._residency.items()}
        self._waiting: dict[tuple[str, str], dict[str, Question]] = {}
        self._answering: dict[tuple[str, str], Question] = {}
        self._loading: dict[tuple[str, str], Arrival] = {}
        self._last: dict[tuple[str, str], Departure] = {}
        self._held: frozenset[str] = frozenset()
        self._full: dict[str, float] = dict.fromkeys(controller.ledgers, 0.0)
        self._busy: dict[str, float] = dict.fromkeys(controller.scheduler.queues, 0.0)

    def follow(self, event: Event, now: float, *, more: bool = False) -> None:
        """Let the controller decide on the event, and note what became of it. `more` come at once."""
        self._pass(now)
        known = self._open(event.request.id) if isinstance(event, Arrived) else None
        actions = self._controller.handle(event, now, more=more)
        self._hold(now)
        batches = [action.batch for action in actions if isinstance(action, Run)]
        ran = {(request, batch.expert): batch for batch in batches for request in batch.requests}
        match event:
            case Arrived(request) if known is None:
                self.journeys[request.id] = Journey(request, now)
                self._ask(request.id, ran, now)
            case Loaded(device, expert):
                self._loaded(device, expert, now)
            case LoadFailed(device, expert, refusal):
                self._loading[device, expert].reason = refusal.reason
            case Finished(batch):
                self._ended(batch, None, now)
                for name in batch.requests:
                    self._ask(name, ran, now)
            case RunFailed(batch, refusal):
                self._ended(batch, refusal.reason, now)
                for name in batch.requests:
                    self._ask(name, ran, now)
        for action in actions:
            if isinstance(action, Quarantine):
                self._turn_to_stand_ins(action.expert, ran, now)
        self._obeyed(actions, now)
        if isinstance(event, LoadFailed):
            self._move_on(event.expert, ran, now)
        queued = sum(map(len, self._waiting.values()))
        if not self.queued or self.queued[-1][1] != queued:
            self.queued.append((now, queued))

    def stop(self) -> None:
        """No more events come: who is not answered yet has waited until now."""
        for waiting in self._waiting.values():
            for question in waiting.values():
                self._book(question, self.ended_seconds)
        for question in self._answering.values():
            question.waits[Wait.RUN] += self.ended_seconds - question._since
            question._since = self.ended_seconds

    def _open(self, request: str) -> Journey | None:
        journey = self.journeys.get(request)
        return journey if journey is not None and journey.verdict is None else None

    def _pass(self, now: float) -> None:
        """Until now, loaders and executors were as busy as the last event left them."""
        seconds = now - self.ended_seconds
        for name, ledger in self._controller.ledgers.items():
            if ledger.loading_count >= ledger.device.load_slots:
                self._full[name] += seconds
        for name, queue in self._controller.scheduler.queues.items():
            if queue.running is not None:
                self._busy[name] += seconds
        self.ended_seconds = now

    def _hold(self, now: float) -> None:
        """Until now, whoever was held back by a full step was."""
        held = self._controller.scheduler.steps.held
        for expert in held ^ self._held:
            for device in self._controller.ledgers:
                self._turn(device, expert, now)
        self._held = held

    def _ask(self, request: str, ran: Mapping[tuple[str, str], Batch], now: float) -> None:
        """Whatever the request asks by now and did not before is queued, or runs at once."""
        progress, journey = self._controller.progress.get(request), self._open(request)
        if progress is None or journey is None:
            return
        open_ones = {question.expert for question in journey.questions if question.ended_seconds is None}
        for expert in sorted(progress.waiting_for - open_ones):
            batch, queue = ran.get((request, expert)), self._controller.scheduler.queue_of(request, expert)
            if batch is not None:
                place = batch.device, batch.executor
            elif queue is not None:
                place = queue.executor.device, queue.executor.name
            else:  # it runs since before
                continue
            question = self._question(request, expert, place, now)
            if request == self._focus:
                question.standing = self._standing(question, queue)
            journey.questions.append(question)

    def _question(self, request: str, expert: str, place: tuple[str, str], now: float) -> Question:
        device, executor = place
        found = self._residency[device].get(expert, Residency.ABSENT)
        departure = self._last.get((device, expert)) if found is Residency.ABSENT else None
        question = Question(request, expert, now, device, executor, found, departure)
        if found is Residency.LOADING:
            question.loads.append(self._loading[device, expert])
        self._mark(question, now)
        self._waiting.setdefault((device, expert), {})[request] = question
        return question

    def _standing(self, question: Question, queue: Queue | None) -> Standing:
        resident = {device: tuple(there) for device, there in self._residency.items()}
        if queue is None:
            return Standing(None, (), resident)
        ahead = []
        for expert, group in queue.groups.items():
            names = [task.request for _, _, task in group.turns]
            count = names.index(question.request) if expert == question.expert else len(names)
            ahead += [(expert, count)] if count else []
            if expert == question.expert:
                break
        return Standing(queue.running, tuple(ahead), resident)

    def _loaded(self, device: str, expert: str, now: float) -> None:
        self._loading.pop((device, expert)).ended_seconds = now
        self._turn(device, expert, now)
        self._residency[device][expert] = Residency.READY

    def _ended(self, batch: Batch, reason: str | None, now: float) -> None:
        for request in batch.requests:
            question = self._answering.pop((request, batch.expert), None)
            if question is not None:
                question.waits[Wait.RUN] += now - question._since
                question.ended_seconds = question.runs[-1].ended_seconds = now
                question.runs[-1].reason = reason

    def _obeyed(self, actions: Sequence[Action], now: float) -> None:
        making_room: dict[str, list[Departure]] = {}
        for action in actions:
            match action:
                case Evict():
                    departure = self._left(action, now)
                    if departure.rule in MAKING_ROOM:
                        making_room.setdefault(action.device, []).append(departure)
                case Load():
                    self._begun(action, making_room.pop(action.device, []), now)
                case Run(batch):
                    self._run(batch, now)
                case Publish(verdict):
                    self._concluded(verdict, now)
                case _:
                    pass

    def _left(self, action: Evict, now: float) -> Departure:
        device, expert = action.device, action.expert
        departure = self._last[device, expert] = Departure(now, device, expert, action.rule)
        self._turn(device, expert, now)
        del self._residency[device][expert]
        if action.rule is Rule.NOT_LOADED:
            self._loading.pop((device, expert)).ended_seconds = now
        else:
            self.departures.append(departure)
        return departure

    def _begun(self, action: Load, left: Sequence[Departure], now: float) -> None:
        device, expert = action.device, action.expert
        waiting = self._waiting.get((device, expert), {})
        load = Arrival(now, device, expert, action.ahead, len(waiting), tuple(left))
        for departure in left:
            departure.coming = expert
        self._turn(device, expert, now)
        for question in waiting.values():
            question.loads.append(load)
        self._residency[device][expert] = Residency.LOADING
        self._loading[device, expert] = load
        self.loads.append(load)

    def _run(self, batch: Batch, now: float) -> None:
        course = Course(batch, now)
        for request in batch.requests:
            question = self._waiting[batch.device, batch.expert].pop(request)
            self._book(question, now)
            question.runs.append(course)
            self._answering[request, batch.expert] = question

    def _concluded(self, verdict: Verdict, now: float) -> None:
        journey = self.journeys[verdict.request]
        journey.verdict, journey.ended_seconds = verdict, now
        for question in journey.questions:
            if question.ended_seconds is not None:
                continue
            if self._answering.pop((question.request, question.expert), None) is not None:
                question.waits[Wait.RUN] += now - question._since
            elif self._waiting[question.device, question.expert].pop(question.request, None) is not None:
                self._book(question, now)
            question.ended_seconds = now

    def _move_on(self, expert: str, ran: Mapping[tuple[str, str], Batch], now: float) -> None:
        """A load failed for good on one device: who waited for it there may be queued on another."""
        for (device, name), waiting in list(self._waiting.items()):
            if name != expert:
                continue
            for request, question in list(waiting.items()):
                queue = self._controller.scheduler.queue_of(request, expert)
                if queue is not None and queue.executor.device != device:
                    del waiting[request]
                    self._book(question, now)
                    question.ended_seconds = now
                    self._ask(request, ran, now)

    def _turn_to_stand_ins(self, expert: str, ran: Mapping[tuple[str, str], Batch], now: float) -> None:
        """The expert is asked no more: who waited for it asks another one, or has its verdict."""
        for device in self._controller.ledgers:
            for request, question in self._waiting.pop((device, expert), {}).items():
                self._book(question, now)
                question.ended_seconds = now
                self._ask(request, ran, now)

    def _turn(self, device: str, expert: str, now: float) -> None:
        """The expert is about to be loading, ready, gone or held back: so far, everybody waited for what it was."""
        for question in self._waiting.get((device, expert), {}).values():
            self._book(question, now)

    def _book(self, question: Question, now: float) -> None:
        seconds, waits = now - question._since, question.waits
        full = self._full[question.device] - question._full_before
        busy = self._busy[question.executor] - question._busy_before
        state = self._residency[question.device].get(question.expert, Residency.ABSENT)
        if state is Residency.LOADING:
            waits[Wait.LOAD] += seconds
        elif question.expert in self._held:
            waits[Wait.STEP] += seconds
        elif self._in_order:
            waits[Wait.EXECUTOR] += seconds
        elif state is Residency.READY:
            waits[Wait.EXECUTOR] += busy
            waits[Wait.ACTIVATIONS] += seconds - busy
        else:
            waits[Wait.LOAD_SLOT] += full
            waits[Wait.MEMORY] += seconds - full
        self._mark(question, now)

    def _mark(self, question: Question, now: float) -> None:
        question._since = now
        question._full_before, question._busy_before = self._full[question.device], self._busy[question.executor]


def chronicle(
    controller: Controller, events: Iterable[Heard], *, in_order: bool, focus: str | None = None
) -> Chronicle:
    """What happened, from the events alone: the same ones tell the same story."""
    told = Chronicle(controller, in_order=in_order, focus=focus)
    for number, (now, event, more) in enumerate(events):
        if not number:
            told.began_seconds = told.ended_seconds = now
        told.follow(event, now, more=more)
    told.stop()
    return told
