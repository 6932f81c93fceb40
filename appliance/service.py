"""The service: joins the drivers to the controller, and runs its loop on the calling thread.

picture → intake → spool → feed → inspections: Arrived → controller → orders: Load, Run → Finished → Publish
→ inspections: record → outbox → verdict
"""

from __future__ import annotations

import gc
import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace

from appliance import config as settings
from appliance import contract
from appliance.boards import Boards
from appliance.config import Config
from appliance.contract import Message
from appliance.core import suspects
from appliance.core.rates import Rate, Rates
from appliance.core.types import (
    Acknowledge,
    Action,
    Device,
    Event,
    Finished,
    Heard,
    Publish,
    Quarantine,
    Reinstate,
    RunFailed,
    Tick,
)
from appliance.drivers import runtime, systemd
from appliance.drivers.alarms import Alarms
from appliance.drivers.broker import Broker
from appliance.drivers.commands import CommandIntake
from appliance.drivers.inbox import Inbox
from appliance.drivers.intake import Intake
from appliance.drivers.journal import Journal
from appliance.drivers.mqtt import Door, DoorState
from appliance.drivers.outbox import Note, Outbox
from appliance.drivers.recipes import Recipes
from appliance.drivers.records import Quota, Records, Sort
from appliance.engine.engine import Engine, Engines
from appliance.errors import ApplianceError, BrokerError, DeviceError, OutOfMemory
from appliance.feed import Fed, Feed
from appliance.health import STUCK_SECONDS
from appliance.inspections import Inspections
from appliance.orders import Orders
from appliance.startup import CPU, Installation, install
from appliance.store.store import Compiled
from appliance.store.storecheck import StoreCheck
from appliance.telemetry import Telemetry

log = logging.getLogger(__name__)

TURN_SECONDS = 0.5  # the loop turns at least this often: a watchdog that is fed less often than it turns is honest
STATS_SECONDS = 1.0
DRAIN_SECONDS = 10.0


def serve(config: Config, *, stopping: threading.Event | None = None) -> None:
    """Run the service until SIGTERM, SIGINT or `stopping`. Raises ApplianceError when it cannot start or go on."""
    stop = stopping or threading.Event()
    if stopping is None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    say = systemd.Supervisor(settings.notify_socket(), settings.watchdog_seconds())
    say.status("reading and compiling experts")
    with ExitStack() as stack:
        stack.callback(say.close)
        records = stack.enter_context(
            Records.open(
                config.paths.state,
                spool_bytes=int(config.limits.spool),
                outbox_rows=config.limits.outbox,
                verdict_days=config.limits.verdict_days,
                verdict_bytes=int(config.limits.verdict_bytes),
                quotas=_quotas(config),
            )
        )
        installation = _without_crashing(install(config, _note_compiled), records)
        for expert, refusal in installation.unavailable.items():
            log.error("expert_unavailable expert=%s reason=%s detail=%s", expert, refusal.reason, refusal.detail)
        for expert, refusal in installation.variants.refused.items():
            log.error("variant_refused expert=%s reason=%s detail=%s", expert, refusal.reason, refusal.detail)
        for expert, refusal in installation.gpus.unavailable.items():
            log.error("gpu_expert_unavailable expert=%s reason=%s detail=%s", expert, refusal.reason, refusal.detail)
        broker = stack.enter_context(Broker.embedded(config)) if config.broker.embedded else None
        service = Service(installation, records, say, broker)
        stack.callback(service.close)
        service.run(stop)


def _quotas(config: Config) -> dict[Sort, Quota]:
    keep = config.keep
    quotas = {
        Sort.FAIL: Quota(int(keep.fail), keep.fail_days),
        Sort.DOUBTFUL: Quota(int(keep.doubtful), keep.doubtful_days),
    }
    return {sort: quota for sort, quota in quotas.items() if quota.bytes}


def _without_crashing(installation: Installation, records: Records) -> Installation:
    """The box without the experts that ended former processes again and again."""
    crashes, bundles = records.crashes(), installation.bundles_on(CPU)
    found = {name: suspects.blamed(crashes.get(bundles[name].mark, ())) for name in installation.compiled}
    blamed = {name: refusal for name, refusal in found.items() if refusal is not None}
    return replace(installation, unavailable={**installation.unavailable, **blamed})


def _rates(config: Config) -> Rates:
    """What each line that has settings may send, and what all others may."""

    def rate(per_second: float | None, burst: int | None) -> Rate | None:
        return None if per_second is None else Rate(per_second, burst or config.limits.burst)

    others = config.limits.pictures_per_second
    lines = {name: rate(line.pictures_per_second or others, line.burst) for name, line in config.lines.items()}
    return Rates(lines, rate(others, None))


def _note_compiled(expert: str, result: Compiled | ApplianceError) -> None:
    if isinstance(result, Compiled):
        log.info("compiled expert=%s version=%d architecture=%s", expert, result.version, result.architecture[:12])


def _store_checks(installation: Installation) -> Iterator[StoreCheck]:
    compiled, gpus = installation.compiled, installation.gpus
    yield StoreCheck(installation.store, installation.bundles_on(CPU), compiled)
    if gpus.store is not None:
        yield StoreCheck(gpus.store, installation.catalog.bundles, gpus.compiled)


class Service:
    """Built in one go, run once. Everything that decides or counts happens on the thread that calls `run`."""

    def __init__(
        self, installation: Installation, records: Records, say: systemd.Supervisor, broker: Broker | None
    ) -> None:
        self._inbox = Inbox()
        engines, installation = self._opened(installation)
        self._config, self._installation, self._records = installation.config, installation, records
        self._say, self._broker = say, broker
        self._controller = installation.controller()
        self._drain_wanted, self._has_connected = threading.Event(), threading.Event()
        self._has_drained = False
        self._rates = _rates(self._config)
        self._next_stats = 0.0
        self._store_checks = list(_store_checks(installation))
        self._recipes = Recipes(installation.catalog, self._config.limits.most_placements)
        self._outbox = Outbox(self._config, records)
        serving = installation.serving
        self._boards = Boards(self._config, self._recipes, records, serving, self._outbox.post)
        self._feed = Feed(records, self._boards, self._controller.room)
        self._inspections = Inspections(
            installation, records, self._recipes, self._boards, serving, self._outbox, self._left
        )
        self._engines = self._make_engines(engines)
        marks = {name: bundle.mark for name, bundle in installation.bundles_on(CPU).items()}
        self._orders = Orders(records, self._engines, self._inspections, self._inbox, marks)
        self._join_broker()
        self.telemetry = self._make_telemetry()
        self._journal = self._open_journal()

    def _opened(self, installation: Installation) -> tuple[dict[str, Engine], Installation]:
        """An engine for each device that does what it says, and the box as it is with these."""
        engines: dict[str, Engine] = {}
        for device in installation.devices:
            try:
                engines[device.name] = self._engine(device, installation)
            except (DeviceError, OutOfMemory) as error:  # only a GPU's; the CPU does its work
                installation = installation.without(device.name, str(error))
        return engines, installation

    def _make_engines(self, engines: dict[str, Engine]) -> Engines:
        made = self._installation
        return Engines(
            engines,
            made.executors,
            made.bundles_on(CPU),
            self._inspections.album.look,
            self._inbox.tell,
            batch_cap=made.profile.batch_cap,
            note=lambda batch, runs: self._records.work(batch, runs=runs),  # on an executor's thread
        )

    def _join_broker(self) -> None:
        """What stands between the records and the broker: the door, and who goes in and out by it."""
        config = self._config
        self._alarms = Alarms(config, self._outbox.note)
        self._intake = Intake(
            config,
            self._recipes.of,
            self._records,
            self._outbox,
            acknowledge=lambda message: self._door.acknowledge(message),
            spooled=self._spooled,
            may_enter=self._may_enter,
        )
        self._commands = CommandIntake(
            config,
            tell=self._inbox.tell,
            drain=self._drain_wanted.set,
            reload=self._recipes.reload,
            note=self._outbox.note,
        )
        self._door = Door(
            config,
            deliver=self._deliver,
            published=self._outbox.published,
            returned=self._outbox.returned,
            state_changed=self._link_changed,
        )
        self._outbox.connect(self._door)

    def _make_telemetry(self) -> Telemetry:
        return Telemetry(
            self._installation,
            self._controller,
            records=self._records,
            engines=self._engines,
            inspections=self._inspections,
            intake=self._intake,
            outbox=self._outbox,
            door=self._door,
            alarms=self._alarms,
            underway=self._orders.underway,
            boards=self._boards,
            say=self._say,
        )

    def _engine(self, device: Device, installation: Installation) -> Engine:
        """Raises DeviceError or OutOfMemory when a GPU does not do what it says."""
        if device.name == CPU:
            path, threads = installation.store.segment_path, installation.profile.threads
            return Engine.in_main_memory(device, installation.compiled, path, self._inbox.tell, threads=threads)
        gpus, host_bytes = installation.gpus, int(installation.config.memory.gpu_host_tier)
        assert gpus.store is not None
        return Engine.on_gpu(device, gpus.compiled, gpus.store.segment_path, self._inbox.tell, host_bytes=host_bytes)

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` or the command `drain`, then finish what runs.

        Raises ApplianceError when going on would lose something.
        """
        self._boards.resume()
        self._intake.start()
        self._door.start()
        gc.collect()
        runtime.trim()  # what was needed until now only would be missed later
        self.telemetry.begin()
        for check in self._store_checks:
            check.start()
        self._take_in(self._feed.suspects())
        self._decide(Tick())  # whoever is loaded before anybody asks
        self._say.status(self.telemetry.status())
        made = self._installation
        log.info(
            "serving experts=%d unavailable=%d profile=%s",
            len(made.compiled),
            len(made.unavailable),
            made.profile.name,
        )
        while not (stop.is_set() or self._drain_wanted.is_set()):
            self._turn()
            self._check_health()
        self._drain()

    def close(self) -> None:
        """However it ended: what runs is given up and awaited, and whoever watches the box knows that it is gone."""
        if not self._has_drained:  # a clean goodbye keeps the last will from saying so
            self._outbox.note(Note(contract.status_topic(self._config), b"offline", retain=True))
        for check in self._store_checks:
            check.interrupt()
        self._engines.stop()
        self._intake.stop()
        self._door.disconnect()
        if self._journal is not None:
            self._journal.close()
        for check in self._store_checks:
            check.stop()

    # The loop.

    def _turn(self) -> None:
        """Wait for the next event, decide, obey; then take in what the spool has, as far as there is room."""
        event = self._next_event()
        if self._has_connected.is_set():
            self._has_connected.clear()
            self._greet()
        if event is not None:
            self._decide(event)
        self._take_in(self._feed.pictures())
        now = time.monotonic()
        if now >= self._next_stats:
            self._next_stats = now + STATS_SECONDS
            self.telemetry.look()
        if self._is_progressing(now):
            self._say.alive()

    def _greet(self) -> None:
        """The link is up, perhaps to a broker that knows nothing of the box. Verdicts wait for nothing else."""
        self._outbox.ready()
        self._outbox.note(Note(contract.status_topic(self._config), b"online", retain=True))
        self._outbox.note(Note(contract.box_topic(self._config, "info"), self.telemetry.info(), retain=True))
        self._alarms.tell_all()
        self._say.ready()

    def _next_event(self) -> Event | None:
        now = time.monotonic()
        wakeup = self._controller.next_wakeup(now)
        seconds = TURN_SECONDS if wakeup is None else min(max(wakeup - now, 0.0), TURN_SECONDS)
        try:
            event = self._inbox.wait(seconds)
        except TimeoutError:
            return Tick() if wakeup is not None and wakeup <= time.monotonic() else None
        if event is None:
            self._feed.look_again()
        return event

    def _take_in(self, fed: Iterable[Fed | Tick]) -> None:
        for one in fed:
            if isinstance(one, Tick):
                self._decide(one)
            else:
                for asked in self._inspections.begin(one):
                    self._decide(asked, more=True)

    def _decide(self, event: Event, *, more: bool = False) -> None:
        actions = self._handled(event, more=more)
        self._orders.begin_behind(event)
        for action in actions:
            self._obey(action)

    def _handled(self, event: Event, *, more: bool = False) -> list[Action]:
        """What the controller wants done now."""
        now = time.monotonic()
        self._orders.ended(event)
        if isinstance(event, Finished):
            self.telemetry.ran(event)
        if self._journal is not None:
            self._journal.note(Heard(now, event, more))
        return self._controller.handle(event, now, more=more)

    def _obey(self, action: Action) -> None:
        match action:
            case Publish(verdict):
                self._inspections.conclude(verdict)
            case Quarantine():
                self.telemetry.alarm_of_experts()
            case Reinstate(expert, on_trial):
                log.warning("reinstated expert=%s on_trial=%s", expert, on_trial)
                if not on_trial:
                    self._orders.forgive(expert)
                self.telemetry.alarm_of_experts()
            case Acknowledge(command, refusal):
                self._commands.acknowledge(command, refusal)
            case _:
                self.telemetry.ordered(action)
                self._orders.obey(action)

    # On the threads of others.

    def _deliver(self, message: Message) -> None:
        """On the network thread."""
        room = self._commands if contract.is_command(message.topic, self._config) else self._intake
        room.deliver(message)

    def _spooled(self, arrival: int) -> None:
        """On the writer's thread: a picture was committed."""
        self._feed.spooled(arrival)
        self._inbox.wake()

    def _left(self) -> None:
        """On the writer's thread: a picture has its verdict on record."""
        self._intake.room()

    def _may_enter(self, line: str) -> bool:
        """On the writer's thread."""
        return self._rates.admit(line, time.monotonic())

    def _link_changed(self, state: DoorState) -> None:
        """On the network thread: what there is to tell only the thread that decides may read."""
        log.info("mqtt state=%s", state)
        if state is DoorState.READY:
            self._has_connected.set()
        self._inbox.wake()

    # Health.

    def _is_progressing(self, now: float) -> bool:
        """The loop turns, no batch or load hangs, and neither do the threads that every picture passes."""
        turns = (self._door.turned_seconds, self._intake.turned_seconds, self._records.turned_seconds)
        return now - min(turns) < STUCK_SECONDS and not self._orders.underway.is_stuck(now)

    def _check_health(self) -> None:
        if self._records.broken is not None:
            raise self._records.broken
        if self._door.state is DoorState.TAKEN_OVER:
            raise BrokerError("another client took our client id", "give every box its own box.name")
        if self._broker is not None and not self._broker.is_alive:
            raise BrokerError("the embedded broker ended", f"see {self._config.broker_folder}")

    def _drain(self) -> None:
        """Finish what runs; what waits stays in the spool for the next start."""
        self._say.stopping()
        self._commands.stop()
        self._records.hurry()
        self._outbox.note(Note(contract.status_topic(self._config), b"draining", retain=True))
        ends = time.monotonic() + DRAIN_SECONDS
        while self._orders.underway.has_runs and time.monotonic() < ends:
            try:
                event = self._inbox.wait(TURN_SECONDS)
            except TimeoutError:
                continue
            if isinstance(event, Finished | RunFailed):
                self._finish(event)
        self._outbox.note(Note(contract.status_topic(self._config), b"stopped", retain=True))
        self._has_drained = True
        log.info("stopped open=%d", len(self._inspections))

    def _finish(self, event: Finished | RunFailed) -> None:
        """Publish what this batch completes, and begin nothing new."""
        for action in self._handled(event):
            if isinstance(action, Publish):
                self._obey(action)

    def _open_journal(self) -> Journal | None:
        path = self._config.paths.journal
        if path is None:
            return None
        return Journal(path, self._installation.opening)
