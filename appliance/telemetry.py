"""What the box tells of itself: its status line, info, statistics and cache, and what is wrong with it, as alarms."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from dataclasses import asdict
from typing import Any

from appliance import __version__, contract
from appliance.boards import Boards
from appliance.core import suspects
from appliance.core.controller import Controller
from appliance.core.drift import Balance
from appliance.core.relearn import Relearning
from appliance.core.types import Evict, Finished, Load
from appliance.drivers import devices, runtime, systemd
from appliance.drivers.alarms import Alarm, Alarms
from appliance.drivers.intake import Intake
from appliance.drivers.mqtt import Door, DoorState
from appliance.drivers.outbox import Outbox
from appliance.drivers.records import Records
from appliance.engine.engine import Engines, Order
from appliance.errors import MessageError
from appliance.health import PROCESS, Drift, Passing, Underway, process_balance, weights_balance
from appliance.inspections import Inspections
from appliance.promise import DECODING_BYTES_PER_PIXEL, promised_bytes
from appliance.startup import CPU, Installation, footprint, kind_of

log = logging.getLogger(__name__)

TRIM_SECONDS = 10.0
SPARE_SECONDS = 60.0
"""Memory that experts gave back and nobody has taken for so long goes back to the machine."""
RECENT_MOVES = 64
ARCHITECTURE_DIGITS = 12


class Telemetry:
    """Reads what others hold, on the thread that decides."""

    def __init__(
        self,
        installation: Installation,
        controller: Controller,
        *,
        records: Records,
        engines: Engines,
        inspections: Inspections,
        intake: Intake,
        outbox: Outbox,
        door: Door,
        alarms: Alarms,
        underway: Underway,
        boards: Boards,
        say: systemd.Supervisor,
    ) -> None:
        self._config, self._installation, self._controller = installation.config, installation, controller
        self._records, self._engines, self._inspections, self._intake = records, engines, inspections, intake
        self._outbox, self._door, self._alarms = outbox, door, alarms
        self._underway, self._boards, self._say = underway, boards, say
        self._moves: deque[dict[str, object]] = deque(maxlen=RECENT_MOVES)
        self._cores, self._memory_bytes = devices.cores(), devices.memory_bytes()
        self._memory = devices.MemoryWatch()
        self._drift = Drift()
        self._next_trim = 0.0
        self._experts = installation.experts
        self._relearning = Relearning(
            {
                device.name: {n: one.architecture for n, one in installation.compiled_on(device.name).items()}
                for device in installation.devices
            }
        )
        self._footprints = {
            device.name: {name: footprint(compiled) for name, compiled in installation.compiled_on(device.name).items()}
            for device in installation.devices
        }

    def begin(self) -> None:
        """All is made, and nothing is served yet: what the process holds now is what it holds anyway."""
        self._memory.begin()
        self.alarm_of_experts()
        self._alarm_of_budget()
        self._alarm_of_gpus()
        self._alarm_of_variants()
        self._look_at_costs()

    def ordered(self, order: Order) -> None:
        match order:
            case Load(expert=expert):
                self._moves.append({"move": "load", "expert": expert})
            case Evict(expert=expert):
                self._moves.append({"move": "evict", "expert": expert})

    def ran(self, event: Finished) -> None:
        """A batch ran to its end."""
        batch, expert = event.batch, self._experts[event.batch.expert]
        items = self._controller.ledgers[batch.device].device.filled(len(batch.requests), expert.max_batch)
        self._relearning.saw(expert.name, batch.device, items, event.seconds, expert.costs[batch.device])

    def status(self) -> str:
        unavailable = self._controller.unavailable
        serving = f"serving {len(self._installation.compiled.keys() - unavailable.keys())} experts"
        broken = f", {len(unavailable)} unavailable" if unavailable else ""
        link = "" if self._door.state is DoorState.READY else f"; broker: {self._door.state} {self._door.detail}"
        disk = f"; the disk refuses to write: {self._records.trouble}" if self._records.trouble else ""
        return serving + broken + link + disk

    def info(self) -> bytes:
        """What the box is, for its info topic."""
        config = self._config
        return json.dumps(
            {
                "schema_version": 1,
                "version": __version__,
                "runtime": self._installation.store.key,
                "experts": len(self._installation.compiled),
                "unavailable": {name: r.reason for name, r in self._controller.unavailable.items()},
                "weights_budget_bytes": self._controller.ledgers[CPU].device.budget_bytes,
                "configured_weights_budget_bytes": int(config.memory.weights),
                "picture_bytes": int(config.limits.picture_bytes),
                "picture_pixels": config.limits.picture_pixels,
                "executors": [executor.name for executor in self._installation.executors],
                "cores": self._cores,
                "memory_bytes": self._memory_bytes,
                "gpus": [gpu.name for gpu in self._installation.gpus.used],
                "gpu_trouble": dict(self._installation.gpus.trouble),
                "gpu_unavailable": {name: r.reason for name, r in self._installation.gpus.unavailable.items()},
                "unpinned": list(self._installation.unpinned(self._controller.ledgers)),
            }
        ).encode()

    def look(self) -> None:
        """Every second: what is wrong is raised as an alarm, and the numbers go to whoever listens."""
        self._memory.look()
        self._look_at_memory()
        self._look_for_thrash()
        self._look_at_clocks()
        self._look_at_outbox()
        self._look_for_refusals()
        self._look_at_costs()
        self._say.status(self.status())
        if self._door.state is not DoorState.READY:
            return
        cache = {
            "schema_version": 1,
            "resident": list(self._controller.ledgers[CPU].resident),
            "pinned": sorted(self._controller.ledgers[CPU].pinned),
            "moves": list(self._moves),
            "loads_evicting": self._controller.counts["loads_evicting"],
            "came_back": self._controller.counts["came_back"],
            "idle_seconds": self._controller.idle_seconds,
            "load_waits": asdict(self._controller.load_waits),
        }
        self._tell("stats", self._stats())
        if self._tell("cache", cache):
            self._moves.clear()

    def _stats(self) -> dict[str, Any]:
        ledger, counts, stored = self._controller.ledgers[CPU], self._controller.counts, self._records.counts
        waiting = self._inspections.attempts
        return {
            "schema_version": 1,
            "arrived": counts["arrived"],
            "verdicts": dict(self._inspections.outcomes),
            "verdicts_by_reason": dict(self._inspections.reasons),
            "loads": counts["loads"],
            "evictions": counts["evictions"],
            "evictions_by_rule": dict(self._controller.evictions),
            "asked": dict(self._controller.asked),
            "runs": counts["runs"],
            "running": [
                {"architecture": kind[:ARCHITECTURE_DIGITS], "device": device, **asdict(found)}
                for (kind, device), found in self._relearning.learnt().items()
            ],
            "waiting": len(waiting),
            "boards": self._boards.numbers(),
            "spooled": stored.spooled,
            "unpublished": stored.unpublished,
            "suspects": sum(map(suspects.is_suspect, waiting)),
            "turned_away": self._intake.counts[contract.RATE],
            "quarantine": self._inspections.dead_letters.numbers(),
            "resident": len(ledger.resident),
            "weights_bytes": self._engines.memory(CPU).mapped_bytes,
            "weights_peak_bytes": self._engines.memory(CPU).peak_bytes,
            "weights_budget_bytes": ledger.device.budget_bytes,
            "devices": {name: self._numbers(name) for name in self._controller.ledgers},
            "cancelled_runs": counts["cancelled_runs"],
            "loads_ahead": counts["loads_ahead"],
            "out_of_memory": counts["out_of_memory"],
            "fallbacks": counts["fallbacks"],
            "alarms": self._alarms.raised,
            **self._memory.numbers(),
            "memory_drift": self._drift.of(PROCESS),
            "anonymous_promise_bytes": promised_bytes(
                self._config,
                weights_bytes=ledger.device.budget_bytes,
                executors=len(self._installation.executors),
                at_start_bytes=self._memory.at_start_bytes,
            ),
        }

    def _numbers(self, device: str) -> dict[str, Any]:
        ledger, memory = self._controller.ledgers[device], self._engines.memory(device)
        return {
            "resident": len(ledger.resident),
            "weights_booked_bytes": ledger.used_bytes,
            "weights_bytes": memory.mapped_bytes,
            "weights_budget_bytes": ledger.device.budget_bytes,
            "withheld_bytes": ledger.withheld_bytes,
            "activations_bytes": ledger.running_bytes,
            "activations_peak_bytes": ledger.running_peak_bytes,
            "activations_budget_bytes": ledger.device.activation_bytes,
            "hits": dict(memory.hits),
            "memory_drift": self._drift.of(device),
        }

    def _tell(self, name: str, numbers: dict[str, Any]) -> bool:
        """Best effort: the next second brings newer ones. A broker that takes no message of this size gets none."""
        try:
            return self._door.publish(contract.box_topic(self._config, name), json.dumps(numbers).encode(), qos=0)
        except MessageError as error:
            log.debug("untold topic=%s why=%s", name, error)
            return False

    def _look_at_memory(self) -> None:
        """Compare what is booked with what is there, and say when the two part, or when a device refused memory."""
        now = time.monotonic()
        for device in self._controller.ledgers:
            self._engines.memory(device).trim(idle_seconds=SPARE_SECONDS)
        wrong = self._drift.look(self._balances(), now)
        if self._drift.of(PROCESS) > 0 and now >= self._next_trim:
            self._next_trim = now + TRIM_SECONDS
            runtime.trim()  # what only the C heap keeps is no leak; the next look tells
        self._alarms.set(Alarm.MEMORY_DRIFT, {"memory": dict(wrong)} if wrong else None)
        short = {name: ledger.withheld_bytes for name, ledger in self._controller.ledgers.items()}
        if not any(short.values()):
            self._alarms.set(Alarm.OUT_OF_MEMORY, None)
        elif Alarm.OUT_OF_MEMORY not in self._alarms.raised:
            self._alarms.set(Alarm.OUT_OF_MEMORY, {"withheld_bytes": short})

    def _look_for_thrash(self) -> None:
        """Told with the numbers of when it began: they change every second."""
        found = self._controller.thrashing(time.monotonic())
        if not found:
            self._alarms.set(Alarm.THRASHING, None)
        elif Alarm.THRASHING not in self._alarms.raised:
            numbers = {device: asdict(thrashing) for device, thrashing in found.items()}
            remedy = "raise memory.weights, or see `appliance check`"
            self._alarms.set(Alarm.THRASHING, {"devices": numbers, "remedy": remedy})

    def _look_at_clocks(self) -> None:
        lines = self._inspections.clocks.ahead(time.monotonic())
        remedy = "set the clocks of the cameras and of the box by the same source, such as NTP"
        self._alarms.set(Alarm.CLOCK, {"lines": lines, "remedy": remedy} if lines else None)

    def _look_at_outbox(self) -> None:
        """Full until a tenth of it is free: at the brim every verdict that leaves makes room for one picture."""
        limit, unpublished = self._config.limits.outbox, self._records.counts.unpublished
        if unpublished <= 0.9 * limit:
            self._alarms.set(Alarm.OUTBOX, None)
        elif unpublished >= limit and Alarm.OUTBOX not in self._alarms.raised:
            remedy = "see whether the broker is up and lets the box publish its results"
            self._alarms.set(Alarm.OUTBOX, {"unpublished": unpublished, "remedy": remedy})

    def _look_for_refusals(self) -> None:
        """One topic stands for all: where boards are refused, each has a topic of its own."""
        topic, why = next(iter(self._outbox.refused_results.items()), (None, ""))
        rights = " and ".join(self._config.topic(kind, "#") for kind in ("result", "board"))
        remedy = f"let the box write to {rights} (the broker's access list); it tries again with its next connection"
        self._alarms.set(Alarm.REFUSED_TOPIC, {"topic": topic, "why": why, "remedy": remedy} if topic else None)

    def _look_at_costs(self) -> None:
        """A profile that is not this box's, or no more. What compiling measured is rough, and nobody's promise."""
        choice, profile = self._installation.choice, self._installation.profile
        if choice.trouble is not None:
            self._alarms.set(Alarm.PROFILE, {"detail": choice.trouble})
            return
        # A GPU's executor prepares its pictures on the same cores.
        threads = sum(profile.threads if e.device == CPU else 1 for e in self._installation.executors)
        sharing, was = threads / self._cores, Alarm.PROFILE in self._alarms.raised
        off = {
            architecture[:ARCHITECTURE_DIGITS]: round(found.times_as_long, 2)
            for (architecture, device), found in self._relearning.learnt().items()
            if architecture in profile.running_on(kind_of(device)) and found.is_far_off(sharing, was=was)
        }
        if not off:
            self._alarms.set(Alarm.PROFILE, None)
        elif not was:
            detail = "runs take so many times as long as the profile says; run `appliance profile` again"
            self._alarms.set(Alarm.PROFILE, {"detail": detail, "times_as_long": off})

    def _balances(self) -> dict[str, Balance]:
        album = self._inspections.album
        passing = Passing(
            queued_bytes=self._intake.held_bytes + self._records.queued_bytes + self._records.fresh_bytes,
            largest_payload_bytes=self._intake.largest_bytes,
            decoded_bytes=album.cached_bytes + DECODING_BYTES_PER_PIXEL * album.decoding_pixels,
            pictures_in_work=self._underway.pictures,
            largest_pixels=album.largest_pixels,
        )
        ledgers = self._controller.ledgers
        process = process_balance(
            ledgers[CPU],
            self._footprints[CPU],
            passing,
            at_start_bytes=self._memory.at_start_bytes,
            kept_bytes=int(self._config.memory.activations) + self._engines.memory(CPU).spare_bytes,
            measured_bytes=self._memory.now_bytes,
            gpus=len(self._installation.gpus.used),
        )
        weights = {
            name: weights_balance(ledger, self._footprints[name], self._engines.memory(name).mapped_bytes)
            for name, ledger in ledgers.items()
        }
        return {PROCESS: process, **weights}

    def _alarm_of_gpus(self) -> None:
        gpus = self._installation.gpus
        wrong: dict[str, Any] = {"gpus": dict(gpus.trouble)} if gpus.trouble else {}
        if gpus.unavailable:
            wrong["experts"] = {name: {"reason": r.reason, "detail": r.detail} for name, r in gpus.unavailable.items()}
        if unpinned := self._installation.unpinned(self._controller.ledgers):
            why = "has no room beside the other experts of experts.pin without what the GPU lacks, and may leave"
            wrong["unpinned"] = dict.fromkeys(unpinned, why)
        self._alarms.set(Alarm.GPU, wrong or None)

    def _alarm_of_variants(self) -> None:
        refused = self._installation.variants.refused
        wrong = {name: {"reason": why.reason, "detail": why.detail} for name, why in refused.items()}
        self._alarms.set(Alarm.VARIANTS, {"experts": wrong} if wrong else None)

    def _alarm_of_budget(self) -> None:
        made, wanted = self._installation, int(self._config.memory.weights)
        given = self._controller.ledgers[CPU].device.budget_bytes
        numbers = {"weights_bytes": given, "configured_bytes": wanted, "memory_bytes": made.memory_bytes}
        self._alarms.set(Alarm.MEMORY_BUDGET, numbers if given < wanted else None)

    def alarm_of_experts(self) -> None:
        failed = self._controller.unavailable | self._controller.on_trial
        broken = {name: {"reason": r.reason, "detail": r.detail} for name, r in failed.items()}
        self._alarms.set(Alarm.EXPERTS, {"experts": broken} if broken else None)
