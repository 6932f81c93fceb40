"""Which expert is brought into memory next, and when; and the books of how long it was waited for.

A load begins for a group whose turn has come, ahead of its need, or for good. An expert loaded for waiting tasks is
*claimed*, that is pinned until its first batch starts, so that every load leads to a run. A slot that nobody needs
loads *ahead* whom a running batch may lead to, into free memory alone; what is loaded ahead gives way to who waits.
Whose turn it is, the scheduler knows, and who leaves for it, `leaving`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from appliance.core.leaving import Leaving
from appliance.core.memory import Ledger
from appliance.core.scheduler import Group, Scheduler
from appliance.core.thrash import Thrash
from appliance.core.types import (
    CANCELLED,
    FRAGMENTED,
    OUT_OF_MEMORY,
    Action,
    Batch,
    CancelLoad,
    Evict,
    HurryLoad,
    Load,
    Refusal,
    Rule,
)
from appliance.errors import NoRoom

LOAD_ATTEMPTS = 2  # a load that failed twice in a row fails everyone who waits for it


@dataclass(slots=True)
class LoadWaits:
    """Of so many tasks whose expert was not ready: seconds for their turn to be loaded, a slot and room, together; and
    seconds while it was loaded. A task waits once more when its expert leaves before it has run."""

    tasks: int = 0
    turn_seconds: float = 0.0
    load_seconds: float = 0.0


class Loading:
    """Of all devices. `likely` names whom an expert's answers lead to, the likeliest first.

    `coming` are loaded in this order as far as memory is free while nobody waits; those of them that stay by their
    ledgers, also where what is idle has to leave. Loads are told to `thrash` and added to `counts`.
    """

    def __init__(
        self,
        likely: Callable[[str], Sequence[str]],
        unavailable: Mapping[str, Refusal],
        ledgers: Mapping[str, Ledger],
        scheduler: Scheduler,
        leaving: Leaving,
        thrash: Mapping[str, Thrash],
        counts: Counter[str],
        coming: Iterable[str],
    ) -> None:
        self.waits = LoadWaits()
        self.coming = deque(coming)
        self._likely, self._unavailable, self._ledgers = likely, unavailable, ledgers
        self._scheduler, self._policy, self._leaving = scheduler, scheduler.policy, leaving
        self._thrash, self._counts = thrash, counts
        self._began_seconds: dict[tuple[str, str], float] = {}  # loads in work
        self._ahead: set[tuple[str, str]] = set()  # those of them that began ahead
        self._cancelled: set[tuple[str, str]] = set()
        self._failed: Counter[tuple[str, str]] = Counter()
        self._claimed: set[tuple[str, str]] = set()
        self._blocked: dict[str, tuple[tuple[str, int, int], float]] = {}
        """By device: the load that found no room and after which changes, and until when trying again is in vain."""

    # How loads begin

    def begin(self, now: float, actions: list[Action]) -> None:
        """For who waits, as far as there are slots and room."""
        if self._ahead:
            self._hurry(actions)
        for ledger in self._ledgers.values():
            if ledger.loading_count >= ledger.device.load_slots and not self._ahead:
                continue
            for group in self._wanted(ledger, now):
                has_slot = ledger.loading_count < ledger.device.load_slots
                if not has_slot or not self._begin_for(group, ledger, now, actions):
                    if self._ahead:
                        self._cancel_ahead(ledger, actions)
                    break

    def begin_behind(self, begun: Sequence[Batch], now: float, actions: list[Action]) -> None:
        """While a batch runs, bring whom it is likely to lead to and nobody has, as far as slots and memory are free
        anyway."""
        for batch in begun:
            ledger = self._ledgers[batch.device]
            if self._scheduler.cold[batch.device]:
                continue
            for expert in self._likely(batch.expert):
                if (
                    expert not in self._unavailable
                    and ledger.ever_fits(expert)
                    and not self._scheduler.is_at_hand(expert, self._ledgers)
                    and ledger.loading_count < ledger.device.load_slots
                    and ledger.missing_bytes(expert) <= ledger.free_bytes(expert)
                ):
                    self.begin_ahead(ledger, expert, {}, now, actions)

    def begin_coming(self, now: float, actions: list[Action]) -> None:
        """One after the other, while nobody waits; for a pinned one what is idle leaves, as it will stay."""
        while self.coming:
            expert = self.coming[0]
            able = [ledger for ledger in self._ledgers.values() if ledger.ever_fits(expert)]
            ledger = next((ledger for ledger in able if expert in ledger.pinned), able[0] if able else None)
            if ledger is None or expert in self._unavailable or not ledger.is_absent(expert):
                self.coming.popleft()
                continue
            if ledger.loading_count >= ledger.device.load_slots or self._scheduler.cold[ledger.device.name]:
                return
            is_pinned = expert in ledger.pinned
            try:
                victims = self._leaving.victims(ledger, expert, None) if is_pinned else ledger.victims((), expert)
                self.begin_ahead(ledger, expert, dict.fromkeys(victims, Rule.PINNED), now, actions)
            except NoRoom:
                if is_pinned:  # what runs now will end
                    return
            self.coming.popleft()

    def begin_ahead(
        self, ledger: Ledger, expert: str, leaving: Mapping[str, Rule], now: float, actions: list[Action]
    ) -> None:
        """Load the expert although nobody waits for it; it gives way to who does."""
        self._ahead.add((ledger.device.name, expert))
        self._counts["loads_ahead"] += 1
        self._begin(ledger, expert, leaving, now, actions, ahead=True)

    # What became of them

    def was_there(self, device: str, expert: str, came_seconds: float) -> None:
        """The expert was in memory before the first event."""
        self._ledgers[device].begin_load(expert)
        self._began_seconds[device, expert] = came_seconds
        self.loaded(device, expert, came_seconds)

    def loaded(self, device: str, expert: str, now: float) -> None:
        ledger = self._ledgers[device]
        ledger.finish_load(expert)
        self._count(device, expert, now)
        self._failed.pop((device, expert), None)
        self._forget_ahead(device, expert)
        is_held = self._scheduler.steps.is_held(expert)
        if self._scheduler.demand(device, expert) and not is_held and not self._policy.in_order:
            ledger.pin(expert)
            self._claimed.add((device, expert))
        self._leaving.came(ledger, expert, now)

    def failed(self, device: str, expert: str, refusal: Refusal, now: float, actions: list[Action]) -> bool:
        """Whether it will not be tried again there for those who wait for it."""
        ledger = self._ledgers[device]
        actions.append(Evict(device, expert, ledger.abort_load(expert), Rule.NOT_LOADED))
        self._forget_ahead(device, expert)
        del self._began_seconds[device, expert]
        self._leaving.moved(ledger, expert, now)
        if refusal.reason == CANCELLED:
            self._counts["cancelled_loads"] += 1
            if expert in ledger.pinned:
                self.coming.append(expert)
            return False
        is_wanted = self._scheduler.demand(device, expert) > 0
        if refusal.reason == FRAGMENTED:
            self._counts["fragmented"] += 1
            if is_wanted and (evicted := self._leaving.evict_one(ledger, Rule.FRAGMENTED, now)) is not None:
                actions.append(evicted)  # and it is tried again
                return False
        self._counts["load_failures"] += 1
        if refusal.reason == OUT_OF_MEMORY:
            actions.extend(self._leaving.withhold(ledger, 0, now))
        if not is_wanted and expert not in ledger.pinned:
            return False
        self._failed[device, expert] += 1
        if self._failed[device, expert] < LOAD_ATTEMPTS:
            self.coming.extend([expert] if expert in ledger.pinned else [])
            return False
        del self._failed[device, expert]
        return True

    def release(self, device: str, expert: str) -> None:
        """The tasks that it was loaded for run, or wait no more."""
        if (device, expert) in self._claimed:
            self._claimed.remove((device, expert))
            self._ledgers[device].unpin(expert)

    def mind_steps(self, now: float) -> None:
        """Steps are full that were not, or no more: whom they hold back may leave, were it loaded a moment ago, so that
        there is room for the step."""
        self._blocked.clear()
        for device, expert in sorted(self._claimed):
            if self._scheduler.steps.is_held(expert):
                self.release(device, expert)
                self._leaving.rank(self._ledgers[device], expert, now)

    def look_for_thrash(self, device: str, now: float) -> None:
        """Where a device thrashes, who was loaded stays for all who waited for it: each load serves more."""
        if self._thrash[device].look(now) and not self._policy.in_order:
            self._scheduler.thrashing ^= {device}

    def _wanted(self, ledger: Ledger, now: float) -> Iterator[Group]:
        """The groups whose expert has to be loaded now, in order of their turns; each is loading when it goes on.

        Where queues are worked off in order, these are the heads for which an idle executor waits.
        """
        device = ledger.device.name
        if self._policy.in_order:
            for queue in self._scheduler.on(device):
                if queue.running is None and (head := self._scheduler.head(queue)) and ledger.is_absent(head.expert):
                    yield head
            return
        while (group := self._scheduler.next_cold(device, now)) is not None:
            yield group

    def _begin_for(self, group: Group, ledger: Ledger, now: float, actions: list[Action]) -> bool:
        """Make room for the group's expert and load it; False when it has to wait for its turn."""
        device, expert = ledger.device.name, group.expert
        attempt = (expert, self._leaving.changes[device], ledger.withheld_bytes)
        blocked, until = self._blocked.get(device, (None, inf))
        if blocked == attempt and now < until:
            return False
        if now < group.turn_seconds and self._can_wait(group, ledger):
            return False
        due = self._scheduler.group_due_seconds(group) if self._policy.spares_queued else inf
        held_until = min(due, self._scheduler.held_until(device, group))
        is_held = now < held_until
        leaving: dict[str, Rule] | None
        try:
            leaving = self._leaving.victims(ledger, expert, self._may_give_way(group, now))
        except NoRoom:
            leaving = None
        if leaving is None or (leaving and is_held):
            self._blocked[device] = attempt, min((at for at in (held_until, due) if at > now), default=inf)
            return False
        self._begin(ledger, expert, leaving, now, actions)
        return True

    def _can_wait(self, group: Group, ledger: Ledger) -> bool:
        """Whether somebody would have to leave for a load that nobody is in need of yet."""
        if not self._policy.spares_queued or self._scheduler.steps.is_pressing(group.expert):
            return False
        return self._scheduler.have_plenty(
            ledger.device.name, group.expert, ledger.device.load_slots
        ) and ledger.missing_bytes(group.expert) > ledger.free_bytes(group.expert)

    def _may_give_way(self, group: Group, now: float) -> float | None:
        """For the group's load, who is needed by tasks due later than this alone may leave; None: nobody queued for.

        Who is overdue displaces who is not. Where everybody is, patience is the lead that counts.
        """
        if not self._policy.spares_queued:
            return -inf
        due = self._scheduler.group_due_seconds(group)
        return min(now, due + self._policy.patience_seconds) if now >= due else None

    def _begin(
        self,
        ledger: Ledger,
        expert: str,
        leaving: Mapping[str, Rule],
        now: float,
        actions: list[Action],
        ahead: bool = False,
    ) -> None:
        device = ledger.device.name
        freed, missing = ledger.begin_load(expert, tuple(leaving))
        self._counts["loads"] += 1
        self._counts["loads_evicting"] += bool(leaving)
        self._began_seconds[device, expert] = now
        for left in freed:
            actions.append(self._leaving.left(ledger, left, leaving[left.expert], now))
        actions.append(Load(device, expert, missing, ahead))
        self._leaving.moved(ledger, expert, now)

    def _hurry(self, actions: list[Action]) -> None:
        for device, expert in sorted(self._ahead - self._cancelled):
            if self._scheduler.demand(device, expert):
                self._ahead.remove((device, expert))
                actions.append(HurryLoad(device, expert))

    def _cancel_ahead(self, ledger: Ledger, actions: list[Action]) -> None:
        """Somebody waits for a slot or for memory: what is loaded ahead gives way."""
        for device, expert in sorted(self._ahead - self._cancelled):
            if device == ledger.device.name:
                self._cancelled.add((device, expert))
                actions.append(CancelLoad(device, expert))

    def _forget_ahead(self, device: str, expert: str) -> None:
        self._ahead.discard((device, expert))
        self._cancelled.discard((device, expert))

    def _count(self, device: str, expert: str, now: float) -> None:
        """How long who waits for this load has done so: since it asked, or since the expert left in spite of that."""
        began = self._began_seconds.pop((device, expert))
        asked = self._scheduler.since_seconds(device, expert)
        if not asked:
            return
        thrash = self._thrash[device]
        left = thrash.left_seconds(expert)
        for since in asked:
            since = since if left is None else max(since, left)
            self.waits.tasks += 1
            self.waits.turn_seconds += max(began - since, 0.0)
            self.waits.load_seconds += now - max(since, began)
        self._counts["came_back"] += thrash.loaded(expert, began, now)
        self.look_for_thrash(device, now)
