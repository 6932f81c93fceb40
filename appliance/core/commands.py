"""What operators want: each command is obeyed or refused at once, but for a load, whose end is awaited.

None takes from queued pictures what they need, and nobody is shut out by who stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from appliance.core.leaving import Leaving
from appliance.core.loading import Loading
from appliance.core.memory import Ledger
from appliance.core.scheduler import Scheduler
from appliance.core.types import CANCELLED, Acknowledge, Action, Command, Refusal, Rule, Verb
from appliance.errors import NoRoom


class Commands:
    """Every command is acknowledged once, a load when it `ended`."""

    def __init__(self, ledgers: Mapping[str, Ledger], scheduler: Scheduler, leaving: Leaving, loading: Loading) -> None:
        self._ledgers, self._scheduler, self._leaving, self._loading = ledgers, scheduler, leaving, loading
        self._waiting: dict[tuple[str, str], list[int]] = {}  # loads in work, and the commands that wait for them

    def obey(self, command: Command, unservable: Refusal | None, now: float, actions: list[Action]) -> None:
        """`unservable`: why the expert can answer nobody."""
        expert, refusal = command.expert, unservable
        if refusal is None:
            match command.verb:
                case Verb.LOAD:
                    refusal = self._load(expert, now, actions)
                    if refusal is None and (device := self._is_coming_to(expert)) is not None:
                        self._waiting.setdefault((device, expert), []).append(command.number)
                        return
                case Verb.PIN:
                    refusal = self.pin(expert, now)
                case Verb.UNPIN:
                    refusal = self._unpin(expert, now)
                case Verb.EVICT:
                    refusal = self._evict(expert, now, actions)
                case Verb.REINSTATE:  # it would be unservable otherwise, and what is so the controller reinstates
                    refusal = Refusal("not-quarantined", f"{expert} serves")
                case _:
                    assert_never(command.verb)
        actions.append(Acknowledge(command.number, refusal))

    def ended(self, device: str, expert: str, refusal: Refusal | None, actions: list[Action]) -> None:
        """A load ended, or failed with this refusal."""
        if refusal is not None and refusal.reason == CANCELLED:
            refusal = Refusal(CANCELLED, "it gave way to an expert for which pictures wait")
        for number in self._waiting.pop((device, expert), ()):
            actions.append(Acknowledge(number, refusal))

    def _load(self, expert: str, now: float, actions: list[Action]) -> Refusal | None:
        """Unless it is somewhere already. Like all that is loaded ahead, it gives way to who waits."""
        refusal = None
        if all(ledger.is_absent(expert) for ledger in self._ledgers.values()):
            for ledger in self._ledgers.values():
                refusal = self._load_on(ledger, expert, now, actions)
                if refusal is None:
                    break
        return refusal

    def _load_on(self, ledger: Ledger, expert: str, now: float, actions: list[Action]) -> Refusal | None:
        """For a load by command somebody may leave, but nobody whom queued pictures need."""
        name, slots = ledger.device.name, ledger.device.load_slots
        if not ledger.ever_fits(expert):
            return Refusal("no-room", f"{expert} has no room on {name} beside those that are pinned")
        if ledger.loading_count >= slots:
            return Refusal("busy", f"all {slots} load slots of {name} are taken")
        try:
            leaving = self._leaving.victims(ledger, expert, None)
        except NoRoom as error:
            return Refusal(error.reason, f"on {name} {error.what} from experts that nobody needs now")
        self._loading.begin_ahead(ledger, expert, leaving, now, actions)
        return None

    def _is_coming_to(self, expert: str) -> str | None:
        """The device on which it is being loaded; None when it is ready on one."""
        there = {name: ledger for name, ledger in self._ledgers.items() if not ledger.is_absent(expert)}
        return None if any(ledger.is_ready(expert) for ledger in there.values()) else next(iter(there))

    def pin(self, expert: str, now: float) -> Refusal | None:
        """On the first device where it, and everybody else still, has room beside all that are pinned."""
        if any(expert in ledger.pinned for ledger in self._ledgers.values()):
            return None
        refusal = None
        for ledger in self._ledgers.values():
            if not ledger.ever_fits(expert):
                continue
            shut_out = ledger.shut_out_by(expert)
            if shut_out is None:
                ledger.keep(expert)
                self._loading.coming.appendleft(expert)
                self._leaving.changed_who_stays(ledger, expert, now)
                return None
            name, need_bytes = shut_out
            detail = f"{name} and all that are pinned would need {need_bytes} of {ledger.device.budget_bytes} bytes"
            refusal = Refusal("no-room", f"{detail} on {ledger.device.name}")
        return refusal

    def _unpin(self, expert: str, now: float) -> Refusal | None:
        keeping = [ledger for ledger in self._ledgers.values() if expert in ledger.pinned]
        for ledger in keeping:
            ledger.give_up(expert)
            self._leaving.changed_who_stays(ledger, expert, now)
        return None if keeping else Refusal("not-pinned", f"{expert} is not pinned")

    def _evict(self, expert: str, now: float, actions: list[Action]) -> Refusal | None:
        """From all devices or from none."""
        there = [ledger for ledger in self._ledgers.values() if not ledger.is_absent(expert)]
        for ledger in there:
            device = ledger.device.name
            if expert in ledger.pinned:
                return Refusal("pinned", f"{expert} is pinned on {device}: unpin it first")
            if not ledger.is_ready(expert):
                return Refusal("busy", f"{expert} is being loaded on {device}")
            if waiting := self._scheduler.demand(device, expert):
                return Refusal("in-use", f"pictures wait for {expert} on {device}: {waiting}")
            if not ledger.is_evictable(expert):
                return Refusal("in-use", f"a batch of {expert} runs on {device}")
        for ledger in there:
            actions.append(self._leaving.evict(ledger, expert, Rule.COMMANDED, now))
        return None
