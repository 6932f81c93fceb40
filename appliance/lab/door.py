"""What the way in and out costs: the real service between a real broker and a camera, beside that broker alone and
beside the same work without either.

"No experts" is one expert that takes the mean of 8 x 8 pixels: nothing of the box is left out or pretended, and what
reading the picture back, deciding and running that cost counts against the door. Everything runs on the same cores,
the broker, the camera and the bare subscriber too. A round measures each number once for each broker by turns; what
is told are medians, and fractions are those of a round.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from paho.mqtt.client import Client, MQTTMessage, error_string
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from appliance import __version__
from appliance import catalog as catalogs
from appliance import config as settings
from appliance.client import no_delay
from appliance.drivers.devices import cores
from appliance.errors import ApplianceError, BrokerError, CatalogError
from appliance.lab.bareloop import BareLoop, Job
from appliance.lab.boards import mixed, streams
from appliance.lab.shapes import pooled, small_net, write_expert, write_manifest
from appliance.lab.site import KINDS, PICTURE_BYTES, WAIT_SECONDS, Service, SiteBroker, kinds_here, running
from appliance.lab.telling import Say, Target
from appliance.startup import install

DOOR_BYTES = 50_000
WORK_SECONDS = 0.025
WINDOW = 128
"""Pictures that may wait for their answers: as many as a camera of `appliance.client` lets."""
DEMO_BUDGET = 0.33
_DRAFT_LAYERS, _CHANNELS = 20, 128
SITES = ("plant", "demo")
"""Two boxes listen at each broker: one serves experts made for this, one the demo's."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How many of each in one round."""

    rounds: int
    pictures: int
    trips: int
    worked: int
    boards: int

    @classmethod
    def of(cls, *, rounds: int, quick: bool) -> Effort:
        return cls(1, 60, 10, 8, 40) if quick else cls(rounds, 1000, 200, 200, 800)


@dataclass(frozen=True, slots=True)
class Lap:
    """What one round found with one broker."""

    broker_images_per_second: float
    images_per_second_durable: float
    round_trips_seconds: tuple[float, ...]
    worked_images_per_second: float
    bare_worked_images_per_second: float
    demo_images_per_second: float
    demo_door_images_per_second: float
    bare_demo_images_per_second: float
    fsyncs_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What the rounds with one broker came to."""

    broker_images_per_second: float
    images_per_second_durable: float
    fraction_of_broker_rate: float
    goodput_images_per_second: float
    goodput_fraction_of_bare_loop: float
    demo_images_per_second: float
    demo_fraction_of_smaller: float
    demo_fraction_of_both: float
    """Of what the same cores can do that do the loop's work and the door's for each picture, one after the other."""
    round_trip_p50_seconds: float
    round_trip_p99_seconds: float
    fsync_p99_seconds: float


def door(
    *, broker: str | None = None, rounds: int = 5, quick: bool = False, folder: Path, catalog: Path, say: Say
) -> dict[str, Any]:
    """Measure with each broker that is here, or the named one. Raises ApplianceError when something does not start."""
    names, effort = kinds_here(broker), Effort.of(rounds=rounds, quick=quick)
    folder.mkdir(parents=True, exist_ok=True)
    laps: dict[str, list[Lap]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="door-", dir=folder) as home, ExitStack() as stack:
        say("compiling experts")
        made = _experts(Path(home).resolve(), catalog.resolve())
        rigs = {name: stack.enter_context(_rig(name, Path(home).resolve(), made, effort)) for name in names}
        for number in range(effort.rounds):
            for name, rig in rigs.items():
                say(f"round {number + 1} of {effort.rounds}, {name}")
                laps[name].append(_lap(rig, effort))
    found = {name: summed_up(each) for name, each in laps.items()}
    first = found[names[0]]
    return {
        "version": __version__,
        "cores": cores(),
        "load_average": round(os.getloadavg()[0], 2),
        "rounds": effort.rounds,
        "picture_bytes": DOOR_BYTES,
        "work_seconds": made.work_seconds,
        "broker": names[0],
        **asdict(first),
        "brokers": {
            name: asdict(each) | {"targets": [asdict(t) | {"met": t.met} for t in targets(name, each)]}
            for name, each in found.items()
        },
    }


def summed_up(laps: Sequence[Lap]) -> Found:
    trips = [seconds for lap in laps for seconds in lap.round_trips_seconds]
    return Found(
        broker_images_per_second=statistics.median(lap.broker_images_per_second for lap in laps),
        images_per_second_durable=statistics.median(lap.images_per_second_durable for lap in laps),
        fraction_of_broker_rate=statistics.median(
            lap.images_per_second_durable / lap.broker_images_per_second for lap in laps
        ),
        goodput_images_per_second=statistics.median(lap.worked_images_per_second for lap in laps),
        goodput_fraction_of_bare_loop=statistics.median(
            lap.worked_images_per_second / lap.bare_worked_images_per_second for lap in laps
        ),
        demo_images_per_second=statistics.median(lap.demo_images_per_second for lap in laps),
        demo_fraction_of_smaller=statistics.median(
            lap.demo_images_per_second / min(lap.bare_demo_images_per_second, lap.demo_door_images_per_second)
            for lap in laps
        ),
        demo_fraction_of_both=statistics.median(
            lap.demo_images_per_second * (1 / lap.bare_demo_images_per_second + 1 / lap.demo_door_images_per_second)
            for lap in laps
        ),
        round_trip_p50_seconds=_share(trips, 0.5),
        round_trip_p99_seconds=_share(trips, 0.99),
        fsync_p99_seconds=_share([seconds for lap in laps for seconds in lap.fsyncs_seconds], 0.99),
    )


def _share(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def targets(broker: str, found: Found) -> list[Target]:
    """mosquitto confirms before it writes, so a share of its rate says little: there the rate itself is promised."""
    rate = (
        Target("images_per_second_durable", found.images_per_second_durable, "at least", 500.0)
        if broker == "mosquitto"
        else Target("fraction_of_broker_rate", found.fraction_of_broker_rate, "at least", 0.45)
    )
    return [
        rate,
        Target("goodput_fraction_of_bare_loop", found.goodput_fraction_of_bare_loop, "at least", 0.9),
        Target("demo_fraction_of_smaller", found.demo_fraction_of_smaller, "at least", 0.9),
        Target("round_trip_p50_seconds", found.round_trip_p50_seconds, "at most", 0.010 + 3 * found.fsync_p99_seconds),
    ]


# Experts, and pictures for them.


@dataclass(frozen=True, slots=True)
class _Made:
    """Two catalogues and the store that has both compiled."""

    door: Path
    demo: Path
    store: Path
    demo_settings: str
    work_seconds: float


def _experts(home: Path, demo: Path) -> _Made:
    """Of as many layers as take WORK_SECONDS for a picture on one core here."""
    store, catalog = home / "store", home / "catalog"
    draft = home / "draft"
    seconds = _compiled_seconds(_written(draft, _DRAFT_LAYERS), store, home)
    layers = max(3, round(_DRAFT_LAYERS * WORK_SECONDS / seconds))
    work_seconds = _compiled_seconds(_written(catalog, layers), store, home)
    weights = sum(bundle.manifest.model.bytes for bundle in catalogs.load(demo).bundles.values())
    budget = f"[memory]\nweights = {max(int(weights * DEMO_BUDGET), 1)}\n"
    return _Made(catalog, demo, store, budget, work_seconds)


def _written(catalog: Path, layers: int) -> Path:
    nothing = write_expert(catalog, "nothing", pooled(0), side=8, max_batch=16)
    crop = nothing.manifest.inputs[0].model_copy(update={"crop": (8, 8)})
    write_manifest(replace(nothing, manifest=nothing.manifest.model_copy(update={"inputs": (crop,)})))
    write_manifest(write_expert(catalog, "work", small_net(_CHANNELS, layers)(0), side=32))
    (catalog / "graph.toml").write_text("schema = 1\nname = 'door'\n[components]\nnothing = 'nothing'\nwork = 'work'\n")
    return catalog


def _compiled_seconds(catalog: Path, store: Path, home: Path) -> float:
    """What the expert `work` takes for a picture, as measured by compiling it."""
    installation = install(settings.load(Service(home / "draft-box", catalog, store, 1).config))
    if installation.unavailable:
        raise ApplianceError(f"{installation.unavailable}", "report this")
    return installation.compiled["work"].item_seconds


def picture(size: int) -> bytes:
    """A picture of so many bytes that takes no decoding: colours of nothing, as an array."""
    side = max(8, round((size / 3) ** 0.5))
    to = io.BytesIO()
    np.save(to, np.random.default_rng(size).integers(0, 256, (side, side, 3), np.uint8))
    return to.getvalue()


# One broker with its box.


@dataclass(frozen=True, slots=True)
class _Rig:
    broker: SiteBroker
    camera: _Camera
    listener: Connection
    state: Path
    demo: Sequence[Job]
    work: BareLoop
    demo_work: BareLoop


@contextmanager
def _rig(name: str, home: Path, made: _Made, effort: Effort) -> Iterator[_Rig]:
    with ExitStack() as stack:
        broker = stack.enter_context(running(KINDS[name](home / name)))
        limits = f"[limits]\npicture_pixels = 1_000_000\npicture_bytes = {PICTURE_BYTES}\n"
        box = Service(home / f"{name}-door", made.door, made.store, broker.port, "[box]\nname = 'door'\n" + limits)
        other = f"[box]\nsite = 'demo'\nname = 'demo'\n{limits}{made.demo_settings}"
        demo = Service(home / f"{name}-demo", made.demo, made.store, broker.port, other)
        for service in (box, demo):
            stack.enter_context(service)
        loops = [BareLoop(install(settings.load(service.config))) for service in (box, demo)]
        for loop in loops:
            stack.callback(loop.close)
        camera = stack.enter_context(_Camera(broker.port))
        listener = stack.enter_context(_listener(broker.port))
        yield _Rig(broker, camera, listener, box.state, _jobs(made.demo, effort.boards), *loops)


def _jobs(catalog: Path, count: int) -> list[Job]:
    """The demo's pictures."""
    products = [p for p in catalogs.load(catalog).products.values() if (p.folder / "sample.txt").is_file()]
    if not products:
        raise CatalogError(f"{catalog} has no product with a sample", "use the shipped models_onnx")
    return [Job(p.product, p.part, p.component, p.picture, p.board) for p in islice(streams(mixed(products), 4), count)]


def _lap(rig: _Rig, effort: Effort) -> Lap:
    camera, content = rig.camera, picture(DOOR_BYTES)
    work = [Job("-", "work", "work", content)] * effort.worked
    smaller = picture(int(statistics.fmean(len(job.picture) for job in rig.demo)))
    doors = [Job("-", "nothing", "nothing", content)] * effort.pictures
    return Lap(
        broker_images_per_second=camera.confirmed(content, effort.pictures, rig.listener),
        images_per_second_durable=camera.answered("plant", doors),
        round_trips_seconds=tuple(camera.answered("plant", doors[:1]) ** -1 for _ in range(effort.trips)),
        worked_images_per_second=camera.answered("plant", work),
        bare_worked_images_per_second=rig.work.run(work, WINDOW),
        demo_images_per_second=camera.answered("demo", rig.demo),
        demo_door_images_per_second=camera.answered("plant", [replace(job, picture=smaller) for job in doors]),
        bare_demo_images_per_second=rig.demo_work.run(rig.demo, WINDOW),
        fsyncs_seconds=tuple(_fsyncs(rig.state, content, effort.trips)),
    )


def _fsyncs(state: Path, content: bytes, count: int) -> Iterator[float]:
    """What the disk takes to have a picture for good, on a file that grows as a log does."""
    path = state / "fsync-measured"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for _ in range(count):
            os.write(file, content)
            began = time.monotonic()
            os.fdatasync(file)
            yield time.monotonic() - began
    finally:
        os.close(file)
        path.unlink()


class _Camera:
    """Publishes at QoS 1, WINDOW at a time, and hears every verdict. Parts of one board come under its serial, as from
    a line; any other picture is a board of its own. What is published again belongs to other boards."""

    def __init__(self, port: int) -> None:
        self._port, self._laps, self._unconfirmed = port, 0, 0
        self._open: set[str] = set()
        """Topics of the verdicts that are to come."""
        self._refused: bytes | None = None
        self._is_ready = False
        self._client = Client(CallbackAPIVersion.VERSION2, client_id="door-camera")
        self._client.max_inflight_messages_set(0)
        self._client.on_socket_open = no_delay
        self._client.on_connect = lambda client, *_: client.subscribe(
            [(f"coe/v1/{site}/{kind}/#", 1) for site in SITES for kind in ("result", "error")]
        )
        self._client.on_subscribe = lambda *_: self._note_ready()
        self._client.on_publish = lambda *_: self._note_confirmed()
        self._client.on_message = self._on_message

    def __enter__(self) -> _Camera:
        self._client.connect("127.0.0.1", self._port, keepalive=0)  # nobody turns it between two laps
        self._await(lambda: self._is_ready)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()

    def confirmed(self, content: bytes, count: int, listener: Connection) -> float:
        """Pictures per second that the broker confirms and hands on to who acknowledges them."""
        listener.send(count)
        began = time.monotonic()
        for number in range(count):
            self._publish(f"bare/{number}", content)
            self._await(lambda: self._unconfirmed < WINDOW)
        self._await(lambda: not self._unconfirmed)
        ended = time.monotonic()
        if not listener.poll(WAIT_SECONDS):
            raise BrokerError("the bare subscriber did not get every picture", "report this")
        arrived: float = listener.recv()
        return count / (max(ended, arrived) - began)

    def answered(self, site: str, jobs: Sequence[Job]) -> float:
        """Pictures per second that have their verdict."""
        self._laps += 1
        began = time.monotonic()
        for number, job in enumerate(jobs):
            place = f"line1/{job.product}/{job.board or number}-{self._laps}/{job.part}"
            self._open.add(f"coe/v1/{site}/result/{place}")
            self._publish(f"coe/v1/{site}/infer/{place}", job.picture)
            self._await(lambda: len(self._open) < WINDOW)
        self._await(lambda: not self._open)
        return len(jobs) / (time.monotonic() - began)

    def _publish(self, topic: str, content: bytes) -> None:
        self._unconfirmed += 1
        self._client.publish(topic, content, qos=1)

    def _await(self, condition: Callable[[], bool]) -> None:
        """Turn the link until then."""
        ends = time.monotonic() + WAIT_SECONDS
        while not condition() and self._refused is None:
            code = self._client.loop(WAIT_SECONDS)
            if code is not MQTTErrorCode.MQTT_ERR_SUCCESS:
                raise BrokerError(
                    f"the link to the broker on port {self._port} ended: {error_string(code)}", "see its log"
                )
            if time.monotonic() > ends:
                raise BrokerError("pictures were not answered in time", "see the service's log")
        if self._refused is not None:
            raise BrokerError(f"a picture was refused: {self._refused.decode()}", "report this")

    def _note_ready(self) -> None:
        self._is_ready = True

    def _note_confirmed(self) -> None:
        self._unconfirmed -= 1

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        if "/error/" in message.topic:
            self._refused = bytes(message.payload)
        self._open.discard(message.topic)


@contextmanager
def _listener(port: int) -> Iterator[Connection]:
    """The bare subscriber, in a process of its own as the box is."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=listen, args=(port, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(WAIT_SECONDS):
            raise BrokerError("the bare subscriber did not come up", "report this")
        ours.recv()
        yield ours
    finally:
        ours.send(0)
        process.join()


def listen(port: int, parent: Connection) -> None:
    """Acknowledge whatever comes; say when as many have come as the parent asked for, until it asks for none."""
    came = threading.Semaphore(0)
    client = Client(CallbackAPIVersion.VERSION2, client_id="door-listener", clean_session=False)
    client.on_socket_open = no_delay
    client.on_connect = lambda client, *_: client.subscribe("bare/+", qos=1)
    client.on_subscribe = lambda *_: parent.send(True)
    client.on_message = lambda *_: came.release()
    client.connect("127.0.0.1", port)
    client.loop_start()
    while (count := parent.recv()) > 0:
        for _ in range(count):
            came.acquire()
        parent.send(time.monotonic())
    client.disconnect()
    client.loop_stop()
