"""The controller's orders on their way to the engines: what may end the process is noted in hand before it begins, and
a suspect's work begins when nothing else is in work.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from appliance.core import suspects
from appliance.core.types import (
    CANCELLED,
    Batch,
    CancelLoad,
    CancelRun,
    Event,
    Finished,
    HurryLoad,
    Load,
    Loaded,
    LoadFailed,
    Refusal,
    Run,
    RunFailed,
)
from appliance.drivers.inbox import Inbox
from appliance.drivers.records import Records
from appliance.engine.engine import Engines, Order
from appliance.health import Underway
from appliance.inspections import Inspections


class Orders:
    """Used by the thread that decides. `marks` name the experts in the records, across restarts."""

    def __init__(
        self, records: Records, engines: Engines, inspections: Inspections, inbox: Inbox, marks: Mapping[str, str]
    ) -> None:
        self._records, self._engines, self._inspections, self._inbox = records, engines, inspections, inbox
        self._marks = marks
        crashes = records.crashes()
        self._suspected = {name for name, mark in marks.items() if mark in crashes}
        """Experts that were at work when a former process crashed, until they have worked."""
        self._gate = suspects.Gate()
        self.underway = Underway()

    def obey(self, order: Order) -> None:
        match order:
            case Run(batch):
                self._begin(self._gate.offer(batch, suspect=self._inspections.is_suspect(batch)))
            case Load(expert=expert):
                self._begin(self._gate.offer(order, suspect=expert in self._suspected))
            case HurryLoad(device, expert) if self._gate.hurry(device, expert):
                pass  # it has not begun: nobody else knows of it
            case CancelRun(batch) if self._gate.drop(batch.id):
                self._inbox.tell(RunFailed(batch, Refusal(CANCELLED, f"the batch of {batch.expert} was given up")))
            case CancelLoad(device, expert) if self._gate.drop((device, expert)):
                self._inbox.tell(LoadFailed(device, expert, Refusal(CANCELLED, f"the load of {expert} was given up")))
            case _:
                self._hand_on(order)

    def ended(self, event: Event) -> None:
        """What has ended is in nobody's hand any more."""
        self.underway.ended(event)
        match event:
            case Finished(batch) | RunFailed(batch):
                self._records.put_back(batch.id)
            case Loaded(device, expert) | LoadFailed(device, expert):
                self._records.put_back_load(device, self._marks[expert])
        if self._suspected:
            self._clear(event)

    def begin_behind(self, event: Event) -> None:
        """What was held back until this ended."""
        match event:
            case Finished(batch) | RunFailed(batch):
                self._begin(self._gate.ended(batch.id))
            case Loaded(device, expert) | LoadFailed(device, expert):
                self._begin(self._gate.ended((device, expert)))

    def forgive(self, expert: str) -> None:
        """It may be tried again: its crashes count no more."""
        self._records.forgive(self._marks[expert])

    def _begin(self, works: Iterable[suspects.Work]) -> None:
        """Noted first, and then begun: what ends this process is found in hand by the next."""
        for work in works:
            mark = self._marks[work.expert]
            if isinstance(work, Batch):
                self._records.take(work.id, mark, self._inspections.arrivals(work))
            else:
                self._records.take_load(work.device, mark)
            self._hand_on(Run(work) if isinstance(work, Batch) else work)

    def _hand_on(self, order: Order) -> None:
        self.underway.begun(order, time.monotonic())
        self._engines.obey(order)

    def _clear(self, event: Event) -> None:
        """A suspected expert that works has not ended the process. That it could be loaded says nothing of its runs."""
        match event:
            case Finished(batch, answers) if batch.expert in self._suspected:
                if not all(isinstance(answer, Refusal) for answer in answers):
                    self._suspected.remove(batch.expert)
                    self._records.forgive(self._marks[batch.expert])
            case Loaded(_, expert) if expert in self._suspected:
                self._records.forgive(self._marks[expert], only_loads=True)
