"""The work without the broker: a box's own controller, loaders and executors, fed from memory.

No link, spool or records: what the door costs is what a box does less than this.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, Queue

from appliance.core.types import Acknowledge, Arrived, Event, Outcome, Publish, Quarantine, Reinstate, Request, Tick
from appliance.drivers.album import Album, Subject
from appliance.engine.engine import Engine, Engines
from appliance.errors import ApplianceError
from appliance.startup import CPU, Installation

STALLED_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """A picture, and what it shows."""

    product: str
    part: str
    component: str
    picture: bytes
    board: str = ""
    """Its serial, of a part of a board."""


class BareLoop:
    """Of one box. `run` it as often as needed, then `close`."""

    def __init__(self, installation: Installation) -> None:
        self._events: Queue[Event] = Queue()
        self._jobs: Mapping[str, Job] = {}
        limits, products = installation.config.limits, installation.catalog.products
        self._album = Album(
            lambda request: self._jobs[request].picture,
            lambda request: Subject(products.get(self._jobs[request].product), self._jobs[request].part),
            int(limits.picture_bytes),
            limits.picture_pixels,
        )
        self._engines = Engines(
            {
                device.name: Engine.in_main_memory(
                    device,
                    installation.compiled_on(device.name),
                    installation.store.segment_path,
                    self._events.put,
                    threads=installation.profile.threads,
                )
                for device in installation.devices
            },
            installation.executors,
            installation.bundles_on(CPU),
            self._album.look,
            self._events.put,
            batch_cap=installation.profile.batch_cap,
        )
        self._controller = installation.controller()
        self._laps = 0

    def run(self, jobs: Sequence[Job], window: int) -> float:
        """All of them, `window` at a time; returns how many per second were answered. Raises ApplianceError."""
        self._laps += 1
        self._jobs = {f"{self._laps}/{number}": job for number, job in enumerate(jobs)}
        waiting, asked, answered, began = list(reversed(self._jobs)), 0, 0, time.monotonic()
        while answered < len(jobs):
            while waiting and asked - answered < window:
                name = waiting.pop()
                job = self._jobs[name]
                answered += self._handle(Arrived(Request(name, job.component, time.monotonic(), product=job.product)))
                asked += 1
            answered += self._handle(self._next())
        return len(jobs) / (time.monotonic() - began)

    def close(self) -> None:
        self._engines.stop()

    def _next(self) -> Event:
        now = time.monotonic()
        wakeup = self._controller.next_wakeup(now)
        try:
            return self._events.get(timeout=STALLED_SECONDS if wakeup is None else max(wakeup - now, 0.0))
        except Empty:
            if wakeup is None:
                raise ApplianceError(f"nothing has happened for {STALLED_SECONDS:.0f} s", "report this") from None
            return Tick()

    def _handle(self, event: Event) -> int:
        """How many verdicts that made."""
        verdicts = 0
        for action in self._controller.handle(event, time.monotonic()):
            match action:
                case Publish(verdict):
                    if verdict.outcome not in (Outcome.PASS, Outcome.FAIL):
                        raise ApplianceError(f"a picture got no answer: {verdict.refusal}", "report this")
                    verdicts += 1
                    self._album.forget(verdict.request)
                case Quarantine(expert, refusal):
                    raise ApplianceError(f"{expert} cannot serve: {refusal.detail}", "report this")
                case Acknowledge() | Reinstate():
                    pass  # nobody commands here, and nobody fails
                case _:
                    self._engines.obey(action)
        return verdicts
