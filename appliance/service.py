"""The service: joins the drivers to the controller, and runs its loop on the calling thread.

picture → intake → spool → Arrived → controller → Load, Run → Finished → Publish → record → outbox → verdict
"""

from __future__ import annotations

import gc
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import inf

from appliance import __version__, contract
from appliance import config as settings
from appliance.boards import Boards, Whole, body_of, monotonic_of, verdict_of
from appliance.catalog import Product
from appliance.config import Config
from appliance.contract import Address, Message, Serving
from appliance.core import freshness, suspects
from appliance.core.rates import Rate, Rates
from appliance.core.types import (
    CANCELLED,
    Acknowledge,
    Action,
    Arrived,
    Batch,
    CancelLoad,
    CancelRun,
    Device,
    Event,
    Finished,
    Heard,
    HurryLoad,
    Load,
    Loaded,
    LoadFailed,
    Outcome,
    Overflow,
    Publish,
    Quarantine,
    Refusal,
    Reinstate,
    Request,
    Run,
    RunFailed,
    Tick,
    Verdict,
)
from appliance.drivers import heads, runtime, systemd
from appliance.drivers.alarms import Alarms
from appliance.drivers.album import Album, Subject
from appliance.drivers.broker import Broker
from appliance.drivers.commands import CommandIntake
from appliance.drivers.deadletters import DeadLetters
from appliance.drivers.inbox import Inbox
from appliance.drivers.intake import Intake, component_of
from appliance.drivers.journal import Journal, Opening
from appliance.drivers.mqtt import Door, DoorState
from appliance.drivers.outbox import Note, Outbox
from appliance.drivers.recipes import Recipes
from appliance.drivers.records import Conclusion, Picture, Quota, Recorded, Records, Sort, Spooled
from appliance.engine.engine import Engine, Engines
from appliance.engine.weights import Weights
from appliance.errors import ApplianceError, BrokerError, DeviceError, MessageError, OutOfMemory
from appliance.health import STUCK_SECONDS, Underway
from appliance.startup import CPU, Installation, demands, install
from appliance.store.store import Compiled
from appliance.store.storecheck import StoreCheck
from appliance.telemetry import Telemetry

log = logging.getLogger(__name__)

TURN_SECONDS = 0.5  # the loop turns at least this often: a watchdog that is fed less often than it turns is honest
STATS_SECONDS = 1.0
DRAIN_SECONDS = 10.0
FED_AT_ONCE = 1000


def serve(config: Config, *, stopping: threading.Event | None = None) -> None:
    """Run the service until SIGTERM, SIGINT or `stopping`. Raises ApplianceError when it cannot start or go on."""
    stop = stopping or threading.Event()
    if stopping is None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    say = systemd.Supervisor(settings.notify_socket(), settings.watchdog_seconds())
    say.status("reading and compiling experts")
    with ExitStack() as stack:
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
        for expert, refusal in installation.gpus.unavailable.items():
            log.error("gpu_expert_unavailable expert=%s reason=%s detail=%s", expert, refusal.reason, refusal.detail)
        broker = stack.enter_context(_broker(config)) if config.broker.embedded else None
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
    crashes, bundles = records.crashes(), installation.catalog.bundles
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


def _broker(config: Config) -> Broker:
    password = config.password()
    return Broker(
        config.broker_folder,
        config.mqtt.port,
        host=config.mqtt.host,
        picture_bytes=int(config.limits.picture_bytes),
        max_ack_pending=config.receive_window,
        username=config.mqtt.username,
        password=password.get_secret_value() if password else None,
    )


def _store_checks(installation: Installation) -> Iterator[StoreCheck]:
    compiled, gpus = installation.compiled, installation.gpus
    for store, serving in ((installation.store, compiled), (gpus.store, gpus.compiled)):
        if store is not None:
            yield StoreCheck(store, installation.catalog.bundles, serving)


def _serving(installation: Installation) -> Iterator[tuple[tuple[str, str], Serving]]:
    """By executor and expert."""
    heads = {name: bundle.manifest.head for name, bundle in installation.catalog.bundles.items()}
    for executor in installation.executors:
        for name, compiled in installation.compiled_on(executor.device).items():
            yield (
                (executor.name, name),
                Serving(str(compiled.version), compiled.weights_sha256, heads[name].threshold, executor.device),
            )


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
        self._serving = dict(_serving(installation))
        self._open: dict[str, _Open] = {}
        self._accepted_seconds: dict[int, float] = {}
        self._read: deque[Spooled] = deque()  # from the spool, and not begun yet
        self._read_through = 0
        self._more_spooled = True
        self._read_seconds = self._begun_seconds = -inf
        """When the spool was read last and had no more; when the picture had come that was begun last in its turn."""
        self._told = records.newest_arrival()
        """Up to this one it is known when pictures were accepted."""
        self._has_drained = False
        self._drain_wanted = threading.Event()
        self._underway = Underway()
        self._gate = suspects.Gate()
        self._marks = {name: bundle.mark for name, bundle in installation.catalog.bundles.items()}
        crashes = records.crashes()
        self._suspected = {name for name, mark in self._marks.items() if mark in crashes}
        """Experts that were at work when a former process crashed, until they have worked."""
        self._fed_early = set[int]()
        self._newest = freshness.Newest(lambda place: records.newest_capture(*place))
        self._clocks = freshness.Clocks()
        self._rates = _rates(self._config)
        self._dead_letters = DeadLetters(records.folder / "quarantine", int(self._config.limits.quarantine))
        self._next_stats = 0.0
        self._store_checks = list(_store_checks(installation))
        self._recipes = Recipes(installation.catalog, self._config.limits.most_placements)
        self._album = self._make_album()
        bundles, report = installation.catalog.bundles, self._inbox.tell
        cap = installation.profile.batch_cap
        note = self._note_work
        look = self._album.look
        self._engines = Engines(engines, installation.executors, bundles, look, report, batch_cap=cap, note=note)
        self._join_broker()
        self._boards = Boards(self._config, self._recipes, records, self._serving, self._outbox.post)
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

    def _make_album(self) -> Album:
        limits = self._config.limits
        return Album(self._records.payload, self._subject, int(limits.picture_bytes), limits.picture_pixels)

    def _join_broker(self) -> None:
        """What stands between the records and the broker: the door, and who goes in and out by it."""
        config, records = self._config, self._records
        self._outbox = Outbox(config, records)
        self._alarms = Alarms(config, self._outbox.note)
        self._intake = Intake(
            config,
            self._recipes.of,
            records,
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
            album=self._album,
            intake=self._intake,
            door=self._door,
            alarms=self._alarms,
            dead_letters=self._dead_letters,
            underway=self._underway,
            boards=self._boards,
            clocks=self._clocks,
            waiting=lambda: {asked.spooled.arrival: asked.spooled.attempts for asked in self._open.values()}.values(),
            say=self._say,
        )

    def _engine(self, device: Device, installation: Installation) -> Engine:
        """Raises DeviceError or OutOfMemory when a GPU does not do what it says."""
        if device.name == CPU:
            memory = Weights(installation.store.segment_path, budget_bytes=device.budget_bytes)
            place = runtime.CpuPlace(installation.profile.threads)
            return Engine.on(device, installation.compiled, memory, place, self._inbox.tell)
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
        self._feed_suspects()
        self._decide(Tick())  # whoever is loaded before anybody asks
        self._say.status(self.telemetry.status())
        log.info(
            "serving experts=%d unavailable=%d", len(self._installation.compiled), len(self._installation.unavailable)
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
        """Wait for the next event, decide, obey; then look whether the spool has more."""
        event = self._next_event()
        if event is not None:
            self._decide(event)
        if self._boards.is_over(time.monotonic()):
            self._more_spooled = True  # whoever came in time is on the disk by now
        self._feed()
        self._boards.look(self._read_seconds if self._has_fed_all else self._begun_seconds)
        now = time.monotonic()
        if now >= self._next_stats:
            self._next_stats = now + STATS_SECONDS
            self.telemetry.look()
        if self._is_progressing(now):
            self._say.alive()

    def _next_event(self) -> Event | None:
        now = time.monotonic()
        wakeup = self._controller.next_wakeup(now)
        seconds = TURN_SECONDS if wakeup is None else min(max(wakeup - now, 0.0), TURN_SECONDS)
        try:
            event = self._inbox.wait(seconds)
        except TimeoutError:
            return Tick() if wakeup is not None and wakeup <= time.monotonic() else None
        if event is None:
            self._more_spooled = True
        return event

    def _decide(self, event: Event, *, more: bool = False) -> None:
        actions = self._handled(event, more=more)
        match event:
            case Finished(batch) | RunFailed(batch):
                self._begin_work(self._gate.ended(batch.id))
            case Loaded(device, expert) | LoadFailed(device, expert):
                self._begin_work(self._gate.ended((device, expert)))
        for action in actions:
            self._obey(action)

    def _handled(self, event: Event, *, more: bool = False) -> list[Action]:
        """What the controller wants done now. What has ended is in nobody's hand any more."""
        now = time.monotonic()
        self._underway.ended(event)
        match event:
            case Finished(batch) | RunFailed(batch):
                self._records.put_back(batch.id)
            case Loaded(device, expert) | LoadFailed(device, expert):
                self._records.put_back_load(device, self._marks[expert])
        if self._suspected:
            self._clear(event)
        if self._journal is not None:
            self._journal.note(Heard(now, event, more))
        return self._controller.handle(event, now, more=more)

    def _obey(self, action: Action) -> None:
        match action:
            case Publish(verdict):
                self._conclude(verdict)
            case Quarantine():
                self.telemetry.alarm_of_experts()
            case Reinstate(expert, on_trial):
                log.warning("reinstated expert=%s on_trial=%s", expert, on_trial)
                if not on_trial:
                    self._records.forgive(self._marks[expert])
                self.telemetry.alarm_of_experts()
            case Acknowledge(command, refusal):
                self._commands.acknowledge(command, refusal)
            case Run(batch):
                self._begin_work(self._gate.offer(batch, suspect=any(asked.alone for asked in self._asked(batch))))
            case Load():
                self.telemetry.ordered(action)
                self._begin_work(self._gate.offer(action, suspect=action.expert in self._suspected))
            case HurryLoad(device, expert) if self._gate.hurry(device, expert):
                pass  # it has not begun: nobody else knows of it
            case CancelRun(batch) if self._gate.drop(batch.id):
                self._inbox.tell(RunFailed(batch, Refusal(CANCELLED, f"the batch of {batch.expert} was given up")))
            case CancelLoad(device, expert) if self._gate.drop((device, expert)):
                self._inbox.tell(LoadFailed(device, expert, Refusal(CANCELLED, f"the load of {expert} was given up")))
            case _:
                self.telemetry.ordered(action)
                self._underway.begun(action, time.monotonic())
                self._engines.obey(action)

    def _begin_work(self, works: Iterable[suspects.Work]) -> None:
        """Noted first, and then begun: what ends this process is found in hand by the next."""
        for work in works:
            mark = self._marks[work.expert]
            if isinstance(work, Batch):
                self._records.take(work.id, mark, {asked.spooled.arrival for asked in self._asked(work)})
            else:
                self._records.take_load(work.device, mark)
            order = Run(work) if isinstance(work, Batch) else work
            self._underway.begun(order, time.monotonic())
            self._engines.obey(order)

    def _note_work(self, batch: int, runs: bool) -> None:
        """On an executor's thread."""
        self._records.work(batch, runs=runs)

    def _clear(self, event: Event) -> None:
        """A suspected expert that works has not ended the process. That it could be loaded says nothing of its runs."""
        match event:
            case Finished(batch, answers) if batch.expert in self._suspected:
                if not all(isinstance(answer, Refusal) for answer in answers):
                    self._suspected.remove(batch.expert)
                    self._records.forgive(self._marks[batch.expert])
            case Loaded(_, expert) if expert in self._suspected:
                self._records.forgive(self._marks[expert], only_loads=True)

    def _asked(self, batch: Batch) -> list[_Open]:
        """Of the batch's requests those that have no verdict yet."""
        return [self._open[request] for request in batch.requests if request in self._open]

    def _feed(self) -> None:
        """Pictures from the spool to the controller in order of acceptance, as many as there is room for. It decides
        when it knows all that are read at once."""
        while (room := self._controller.room(FED_AT_ONCE)) > 0 and self._has_read(room):
            begun = 0
            while self._read and self._controller.room(1) > 0:
                one = self._read[0]
                is_fed = one.arrival in self._fed_early
                if not is_fed and not self._boards.has_room(one.picture):
                    break
                self._read.popleft()
                begun += 1
                if is_fed:
                    self._fed_early.remove(one.arrival)
                else:
                    self._begin(one)
            if not begun:
                return
            self._decide(Tick())

    def _has_read(self, room: int) -> bool:
        if not self._read and self._more_spooled:
            told, now = self._told, time.monotonic()
            self._read.extend(one for one in self._records.waiting(self._read_through, room) if one.arrival <= told)
            self._more_spooled = len(self._read) == room
            self._read_seconds = self._read_seconds if self._more_spooled else now
            self._read_through = self._read[-1].arrival if self._read else self._read_through
        return bool(self._read)

    @property
    def _has_fed_all(self) -> bool:
        return not self._read and not self._more_spooled

    def _feed_suspects(self) -> None:
        """Before all others, whom a former process had in hand when it crashed, and with them who may clear them."""
        suspected = {one.arrival: one for one in self._records.suspects()}
        if not suspected:
            return
        known = {one.arrival: one for one in self._records.waiting(0, FED_AT_ONCE)} | suspected
        attempts = {arrival: one.attempts for arrival, one in suspected.items()}
        fresh = (arrival for arrival in known if arrival not in suspected)
        for arrival in suspects.running_order(attempts, fresh, lambda arrival: _kind(known[arrival])):
            self._fed_early.add(arrival)
            self._begin(known[arrival], alone=True)

    def _begin(self, spooled: Spooled, *, alone: bool = False) -> None:
        """Hand a picture to the controller. One that the catalogue no longer knows, or that is poison, ends here."""
        picture = spooled.picture
        address = Address(picture.line, picture.product, picture.board, picture.part)
        arrived = self._arrived_seconds(spooled)
        if not alone:
            self._begun_seconds = arrived
            self._boards.look(arrived)
        self._boards.join(spooled, address, arrived)
        catalog = self._recipes.of(address)
        product = catalog.products.get(address.product)
        try:
            component = component_of(address, catalog)
        except MessageError as error:  # it was accepted under another catalogue
            self._open[picture.id] = _Open(spooled, address, picture.part, product, alone)
            refusal = Refusal(error.reason, str(error))
            self._conclude(Verdict(picture.id, Outcome.REJECTED, (), time.monotonic() - arrived, refusal))
            return
        self._open[picture.id] = asked = _Open(spooled, address, component, product, alone)
        if (why := suspects.poisoned(spooled.attempts)) is not None:
            self._bury(spooled, Verdict(picture.id, Outcome.ERROR, (), time.monotonic() - arrived, why))
        elif (why := self._stale(picture, time.monotonic() - arrived)) is not None:
            self._conclude(Verdict(picture.id, Outcome.REJECTED, (), time.monotonic() - arrived, why))
        elif address.is_whole:
            self._cut(asked, arrived)
        else:
            self._ask(picture.id, asked, arrived)

    def _stale(self, picture: Picture, waited_seconds: float) -> Refusal | None:
        """Why it is too old, if it is; lines whose clocks are ahead are noted."""
        if (captured := picture.captured) is None:
            return None
        behind_seconds = picture.accepted_at - captured.timestamp()
        self._clocks.note(picture.line, -behind_seconds, time.monotonic())
        return freshness.stale(behind_seconds, waited_seconds, self._config.limits.stale_seconds)

    def _cut(self, asked: _Open, arrived: float) -> None:
        """A whole board's picture is a request for each placement of the recipe; together they have its one verdict."""
        picture, product = asked.spooled.picture, asked.product
        assert product is not None
        del self._open[picture.id]
        self._album.keep_whole(picture.id, product)
        for name, address in self._boards.begin_whole(Whole(picture.id, asked.address, product, arrived)):
            component = product.placements[address.part].component
            self._open[name] = part = replace(asked, address=address, component=component, is_cut=True)
            self._ask(name, part, arrived)

    def _ask(self, name: str, asked: _Open, arrived: float) -> None:
        address, seconds = asked.address, asked.spooled.picture.deadline_seconds
        deadline = None if seconds is None else arrived + seconds
        picture = asked.spooled.picture.id if asked.is_cut else ""
        request = Request(name, asked.component, arrived, deadline, address.line, address.product, asked.alone, picture)
        self._decide(Arrived(request), more=True)

    def _bury(self, spooled: Spooled, verdict: Verdict) -> None:
        """A dead letter: nobody opens the picture any more, and its bytes are kept for whoever wants to know why."""
        picture = spooled.picture
        log.error("dead_letter request=%s attempts=%d sha256=%s", picture.id, spooled.attempts, picture.picture_sha256)
        self._dead_letters.keep(picture, self._records.payload(picture.id), spooled.attempts)
        self._conclude(verdict)

    def _deliver(self, message: Message) -> None:
        """On the network thread."""
        room = self._commands if contract.is_command(message.topic, self._config) else self._intake
        room.deliver(message)

    def _spooled(self, arrival: int) -> None:
        """On the writer's thread: a picture was committed."""
        self._accepted_seconds[arrival] = time.monotonic()
        self._told = arrival
        self._inbox.wake()

    def _may_enter(self, line: str) -> bool:
        """On the writer's thread."""
        return self._rates.admit(line, time.monotonic())

    def _arrived_seconds(self, spooled: Spooled) -> float:
        """When it was accepted. Only for pictures of a former process wall time must do."""
        known = self._accepted_seconds.pop(spooled.arrival, None)
        return monotonic_of(spooled.picture.accepted_at) if known is None else known

    # Verdicts.

    def _conclude(self, verdict: Verdict) -> None:
        asked = self._open.pop(verdict.request)
        if not asked.is_cut:
            self._record(asked, verdict, None, self._sort(verdict))
            return
        whole = self._boards.cut_inspected(asked.spooled.picture.id, asked.address.part, verdict)
        if whole is not None:
            sorts = {self._sort(part) for part in whole.parts.values()}
            keep = next((sort for sort in Sort if sort in sorts), None)
            self._record(replace(asked, address=whole.address), verdict_of(whole, verdict), whole, keep)

    def _record(self, asked: _Open, verdict: Verdict, whole: Whole | None, keep: Sort | None) -> None:
        """The picture's one verdict, and after it that of the board for which it was the last."""
        address = asked.address
        self.telemetry.concluded(verdict)
        self._records.conclude(
            verdict.request,
            verdict.outcome.value,
            self._body(asked, verdict, whole),
            address.result_topic(self._config),
            lambda answer: self._recorded(verdict, asked, answer),
            keep=keep,
            also=(contract.board_topic(self._config, address.board_name),) if address.is_whole else (),
            part_of=self._boards.part_of(verdict),
        )
        self._album.forget(verdict.request)
        self._boards.inspected(verdict)

    def _body(self, asked: _Open, verdict: Verdict, whole: Whole | None) -> bytes:
        picture, box = asked.spooled.picture, self._config.box
        out_of_order = self._is_out_of_order(picture)
        if asked.address.is_whole:
            return body_of(
                verdict, picture, whole, serving=self._serving, config=self._config, out_of_order=out_of_order
            )
        return contract.verdict_body(
            verdict,
            address=asked.address,
            component=asked.component,
            picture_sha256=picture.picture_sha256,
            captured_at=picture.captured,
            out_of_order=out_of_order,
            serving=self._serving,
            site=box.site,
            box=box.name,
            finished_at=datetime.now(UTC),
        )

    def _is_out_of_order(self, picture: Picture) -> bool:
        place = (picture.line, picture.product, picture.board, picture.part)
        return picture.captured_at is not None and self._newest.is_out_of_order(place, picture.captured_at)

    def _sort(self, verdict: Verdict) -> Sort | None:
        """As what the picture is kept with its verdict. A dead letter is not: nobody shall open it by accident."""
        match verdict.outcome:
            case Outcome.FAIL:
                return Sort.FAIL
            case Outcome.ERROR if verdict.refusal is None or verdict.refusal.reason != suspects.POISON:
                return Sort.DOUBTFUL
            case Outcome.PASS if self._passed_by_little(verdict):
                return Sort.DOUBTFUL
        return None

    def _passed_by_little(self, verdict: Verdict) -> bool:
        bundles, little = self._installation.catalog.bundles, self._config.keep.margin
        margins = (
            heads.margin(bundles[step.expert].manifest.head, finding)
            for step in verdict.steps
            for finding in step.findings
        )
        return any(margin is not None and margin < little for margin in margins)

    def _recorded(self, verdict: Verdict, asked: _Open, answer: Conclusion) -> None:
        """On the writer's thread: the verdict stands, now it may be seen."""
        if isinstance(answer, Recorded):
            self._outbox.post(answer.publications)
        if verdict.refusal is not None and verdict.outcome in (Outcome.ERROR, Outcome.REJECTED):
            error = MessageError(verdict.refusal.reason, verdict.refusal.detail, "see the verdict of this request")
            topic, sha256 = asked.address.picture_topic(self._config), asked.spooled.picture.picture_sha256
            self._outbox.answer(error, topic, verdict.request, sha256, has_verdict=True)
        self._intake.room()
        self._inbox.wake()

    def _subject(self, request: str) -> Subject:
        """On an executor's thread; the request is open as long as a batch holds it, unless it became late."""
        asked = self._open.get(request)
        if asked is None:
            raise MessageError("deadline", f"{request} has its verdict already", "nothing to do")
        return Subject(asked.product, asked.address.part, asked.spooled.picture.id if asked.is_cut else None)

    # Telling the world.

    def _link_changed(self, state: DoorState) -> None:
        """On the network thread."""
        log.info("mqtt state=%s", state)
        if state is DoorState.READY:
            self._outbox.note(Note(contract.status_topic(self._config), b"online", retain=True))
            self._outbox.note(Note(contract.box_topic(self._config, "info"), self.telemetry.info(), retain=True))
            self._alarms.tell_all()
            self._outbox.ready()
            self._say.ready()
        self._say.status(self.telemetry.status())

    # Health.

    def _is_progressing(self, now: float) -> bool:
        """The loop turns, no batch or load hangs, and neither do the threads that every picture passes."""
        turns = (self._door.turned_seconds, self._intake.turned_seconds, self._records.turned_seconds)
        return now - min(turns) < STUCK_SECONDS and not self._underway.is_stuck(now)

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
        self._outbox.note(Note(contract.status_topic(self._config), b"draining", retain=True))
        ends = time.monotonic() + DRAIN_SECONDS
        while self._underway.has_runs and time.monotonic() < ends:
            try:
                event = self._inbox.wait(TURN_SECONDS)
            except TimeoutError:
                continue
            if isinstance(event, Finished | RunFailed):
                self._finish(event)
        self._outbox.note(Note(contract.status_topic(self._config), b"stopped", retain=True))
        self._has_drained = True
        log.info("stopped open=%d", len(self._open))

    def _finish(self, event: Finished | RunFailed) -> None:
        """Publish what this batch completes, and begin nothing new."""
        for action in self._handled(event):
            if isinstance(action, Publish):
                self._obey(action)

    def _open_journal(self) -> Journal | None:
        path = self._config.paths.journal
        if path is None:
            return None
        made = self._installation
        opening = Opening(
            __version__,
            made.catalog.graph,
            tuple(made.experts.values()),
            made.devices,
            made.executors,
            dict(made.unavailable),
            self._config.experts.pin,
            self._config.experts.preload,
            self._config.scheduler.policy,
            self._config.priorities,
            self._config.limits.waiting_pictures,
            Overflow(self._config.limits.overflow),
            demands(made.catalog),
            made.profile.hold_share,
        )
        return Journal(path, opening)


@dataclass(frozen=True, slots=True)
class _Open:
    """A picture between acceptance and verdict, or a part that is cut from it. Nothing runs beside who is `alone`."""

    spooled: Spooled
    address: Address
    component: str
    product: Product | None
    alone: bool
    is_cut: bool = False


def _kind(spooled: Spooled) -> tuple[str, str]:
    """Pictures of one kind ask the same experts."""
    return spooled.picture.product, spooled.picture.part
