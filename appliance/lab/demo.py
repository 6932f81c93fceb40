"""The first minute: embedded broker and service as a process of their own, real boards published by several lines,
verdicts, loads and evictions as they happen, and what they were worth at the end.

The defective boards are the products' inspected samples. The sound ones are their golden pictures, shifted by a pixel
and encoded anew, for no real sample is free of defects; they are labelled so.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion
from PIL import Image, ImageChops
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from appliance import catalog as catalogs
from appliance import config as settings
from appliance import samples
from appliance.catalog import Catalog, Product
from appliance.client import Answer, Camera
from appliance.errors import BrokerError, CatalogError
from appliance.lab.simulate import simulated
from appliance.report import megabytes, verdict_cells
from appliance.startup import install, waiting_to_compile

SOUND_EVERY = 4  # one board of so many is a golden picture
SHIFT_PIXELS = 1
JPEG_QUALITY = 92
START_SECONDS = 120.0
VERDICT_SECONDS = 120.0
SHOWN_ROWS = 14


@dataclass(frozen=True, slots=True)
class Demo:
    """What `appliance demo` was asked for."""

    pictures: int
    lines: int
    budget_share: float
    keep: bool
    folder: Path
    catalog: Path


@dataclass(frozen=True, slots=True)
class Part:
    """One picture to publish, and what is true of it."""

    line: str
    product: str
    board: str
    part: str
    component: str
    rect: tuple[int, int, int, int]
    truth: str | None
    picture: bytes


@dataclass(slots=True)
class Score:
    """What came back so far. Filled on the cameras' threads, one call at a time."""

    parts: dict[str, Part] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    repeated: int = 0
    rows: deque[tuple[Part, Answer]] = field(default_factory=lambda: deque(maxlen=SHOWN_ROWS))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, answer: Answer) -> None:
        with self.lock:
            self.repeated += answer.request_id in self.answers
            self.answers[answer.request_id] = answer
            part = self.parts.get(answer.request_id)
            if part is not None:
                self.rows.append((part, answer))


def run_demo(demo: Demo, console: Console) -> dict[str, Any]:
    """Returns the closing numbers. Raises ApplianceError when something does not start."""
    config_path = _write_config(demo)
    _compile(config_path, console)
    config = settings.load(config_path)
    catalog = catalogs.load(config.paths.catalog)
    boards = [product for product in catalog.products.values() if (product.folder / "sample.txt").is_file()]
    if not boards:
        raise CatalogError(f"{config.paths.catalog} has no product with a sample", "use the shipped models_onnx")
    score, watch = Score(), Watch(config.mqtt.port, config.topic("box", config.box.name, ""))
    with _service(config_path, config.paths.state / "service.log") as service:
        watch.start(service)
        seconds = _publish(demo, config, boards, score, watch, console)
        watch.settle(len(score.answers))
        _print_hint(demo, config, console)
        if demo.keep:
            _keep(service, console)
    found = _closing(demo, catalog, score, watch, seconds)
    replayed = simulated(_journal(config), predict=False)
    found |= {
        "simulated_loads": replayed["loads"],
        "simulated_evictions": replayed["evictions"],
        "simulation_agrees": (replayed["loads"], replayed["evictions"]) == (found["loads"], found["evictions"]),
    }
    _print_closing(found, console)
    return found


# Preparing.


def _write_config(demo: Demo) -> Path:
    """Settings with a fresh state directory (old verdicts would answer the same pictures) and a budget by share."""
    folder = demo.folder.resolve() / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    catalog = demo.catalog.resolve()
    total = sum(bundle.manifest.model.bytes for bundle in catalogs.load(catalog).bundles.values())
    profile = Path(__file__).parents[2] / "profiles" / "default.json"
    path = folder / "appliance.toml"
    path.write_text(
        "# Written by `appliance demo`; try `appliance check --config` on it.\n"
        f"[box]\nname = 'demo'\n"
        f"[paths]\ncatalog = '{catalog}'\nprofile = '{profile}'\n"
        f"state = 'state'\nstore = '../store'\njournal = 'journal.jsonl'\n"
        f"[mqtt]\nport = {_free_port()}\n"
        f"[broker]\nembedded = true\n"
        f"[limits]\npicture_pixels = 1_000_000\n"
        f"[memory]\nweights = {max(int(total * demo.budget_share), 1)}\n",
        "utf-8",
    )
    return path


def _compile(config_path: Path, console: Console) -> None:
    """With a bar, so that the first run shows what it does; the service then finds everything compiled."""
    config = settings.load(config_path)
    new = len(waiting_to_compile(config))
    if not new:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling experts for this box", total=new)
        install(config, lambda expert, result: progress.advance(bar))


@contextlib.contextmanager
def _service(config_path: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        command = [sys.executable, "-m", "appliance.cli", "serve", "--config", str(config_path)]
        # A session of its own: Ctrl-C is for the demo, which then stops the service in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(30)
    if process.returncode:
        raise BrokerError(f"the service ended with {process.returncode}", f"see {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Publishing.


def parts_of(product: Product, line: str, board: str, *, sound: bool) -> Iterator[Part]:
    """The placements of one board, cut out as a camera would and encoded."""
    defects = () if sound else samples.read_defects(product.folder / "sample.txt")
    path = product.golden_path if sound else product.folder / "sample.jpg"
    assert path is not None
    with Image.open(path) as opened:
        picture = opened.convert("L")
    if sound:
        picture = ImageChops.offset(picture, SHIFT_PIXELS, SHIFT_PIXELS)
    for placement in product.recipe.placements:
        x, y, width, height = placement.rect
        encoded = io.BytesIO()
        picture.crop((x, y, x + width, y + height)).save(encoded, "JPEG", quality=JPEG_QUALITY)
        truth = samples.truth_of(defects, samples.centre_cell(placement.rect))
        yield Part(
            line,
            product.recipe.product,
            board,
            placement.designator,
            placement.component,
            placement.rect,
            truth,
            encoded.getvalue(),
        )


def streams(products: Sequence[Product], lines: int) -> Iterator[Part]:
    """Boards go to the lines in turn; the lines publish at the same time, so that their experts compete."""

    def line_of(number: int) -> Iterator[Part]:
        for turn, product in enumerate(products[number::lines]):
            is_sound = (turn + number) % SOUND_EVERY == SOUND_EVERY - 1
            yield from parts_of(product, f"line{number + 1}", f"SN-{number + 1}-{turn + 1:03d}", sound=is_sound)

    # Products stand in the order of their boards: every line begins at another one.
    for together in zip_longest(*(line_of(number) for number in range(lines))):
        yield from (part for part in together if part is not None)


def _publish(
    demo: Demo, config: settings.Config, boards: Sequence[Product], score: Score, watch: Watch, console: Console
) -> float:
    """Every picture until its verdict; returns the seconds from the first to the last."""
    with contextlib.ExitStack() as stack:
        cameras = {}
        for number in range(demo.lines):
            camera = Camera("127.0.0.1", config.mqtt.port, line=f"line{number + 1}", site=config.box.site)
            camera.on_answer(score.add)
            cameras[f"line{number + 1}"] = stack.enter_context(camera)
        live = stack.enter_context(Live(console=console, refresh_per_second=8, transient=not console.is_terminal))
        started = time.monotonic()
        shown = 0.0
        for part in islice(streams(_mixed(boards), demo.lines), demo.pictures):
            name = cameras[part.line].name_of(part.product, part.board, part.part, part.picture)
            score.parts[name] = part
            cameras[part.line].publish(product=part.product, board=part.board, part=part.part, picture=part.picture)
            if time.monotonic() - shown > 0.12:
                shown = time.monotonic()
                live.update(_view(demo, score, watch, shown - started))
        ends = time.monotonic() + VERDICT_SECONDS
        while any(camera.waiting for camera in cameras.values()) and time.monotonic() < ends:
            next(iter(cameras.values())).wait(0.1)
            for camera in cameras.values():
                camera.wait(0.05)
            live.update(_view(demo, score, watch, time.monotonic() - started))
        seconds = time.monotonic() - started
        live.update(_view(demo, score, watch, seconds))
    return seconds


def _mixed(products: Sequence[Product]) -> list[Product]:
    """Products of different boards in turn, by the first five digits of their names."""
    families: dict[str, list[Product]] = {}
    for product in products:
        families.setdefault(product.recipe.product[:5], []).append(product)
    return [p for together in zip_longest(*families.values()) for p in together if p is not None]


# Watching.


class Watch:
    """The box's own messages: its statistics, and loads and evictions as they happen."""

    def __init__(self, port: int, prefix: str) -> None:
        self.stats: dict[str, Any] = {}
        self.resident_max = 0
        self.moves: deque[str] = deque(maxlen=6)
        self._port, self._prefix = port, prefix
        self._online = threading.Event()
        self._changed = threading.Condition()
        self._client = Client(CallbackAPIVersion.VERSION2, client_id="demo-watch")
        self._client.on_message = self._on_message
        self._client.on_connect = lambda client, *_: client.subscribe(prefix + "+")

    def start(self, service: subprocess.Popen[bytes]) -> None:
        """Wait until the box is online. Raises BrokerError when the service ends or does not come up."""
        ends = time.monotonic() + START_SECONDS
        while time.monotonic() < ends and service.poll() is None:
            with contextlib.suppress(OSError):
                self._client.connect("127.0.0.1", self._port)
                self._client.loop_start()
                if self._online.wait(ends - time.monotonic()):
                    return
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.wait(0.1)
        raise BrokerError("the service did not come up", "see .appliance/demo/state/service.log")

    def settle(self, verdicts: int) -> None:
        """Wait for statistics that count all verdicts, then stop listening."""
        with self._changed:
            self._changed.wait_for(lambda: sum(self.stats.get("verdicts", {}).values()) >= verdicts, 10.0)
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        name = message.topic.removeprefix(self._prefix)
        if name == "status":
            if message.payload == b"online":
                self._online.set()
            return
        body = json.loads(message.payload)
        with self._changed:
            if name == "stats":
                self.stats = body
                self.resident_max = max(self.resident_max, body["resident"])
            elif name == "cache":
                self.resident_max = max(self.resident_max, len(body["resident"]))
                self.moves.extend(f"{move['move']:5} {move['expert']}" for move in body["moves"])
            self._changed.notify_all()


def _view(demo: Demo, score: Score, watch: Watch, seconds: float) -> Group:
    """The live table: the last verdicts, and what the box does for them."""
    table = Table("line", "picture", "component", "verdict", "findings", "ms", box=None, pad_edge=False)
    with score.lock:
        rows, answered = list(score.rows), len(score.answers)
    for part, answer in rows:
        picture = f"{part.product}/{part.part}"
        table.add_row(part.line, picture, part.component, *verdict_cells(answer.body), f"{answer.seconds * 1000:.0f}")
    stats = watch.stats
    memory = f"{megabytes(stats.get('weights_bytes', 0))} of {megabytes(stats.get('weights_budget_bytes', 0))}"
    facts = (
        f"{answered} of {demo.pictures} verdicts, {answered / seconds if seconds else 0:.0f} images/s   "
        f"weights {memory}, {stats.get('resident', 0)} experts resident   "
        f"{stats.get('loads', 0)} loads, {stats.get('evictions', 0)} evictions"
    )
    return Group(table, Text(), Text(facts, style="bold"), Text("   ".join(list(watch.moves)[-4:]), style="dim"))


# Closing.


def _closing(demo: Demo, catalog: Catalog, score: Score, watch: Watch, seconds: float) -> dict[str, Any]:
    answered = [(part, score.answers[name]) for name, part in score.parts.items() if name in score.answers]
    count = samples.count(samples.Judged(part.truth, a.body.get("outcome") == "fail") for part, a in answered)
    located = _localised(catalog, score)
    stats = watch.stats
    waits = sorted(answer.seconds for answer in score.answers.values())
    return {
        "pictures": len(score.parts),
        "verdicts": len(score.answers),
        "repeated_verdicts": score.repeated,
        "outcomes": dict(Counter(str(a.body.get("outcome", "refused")) for a in score.answers.values())),
        "defective": count.defective,
        "missed_defects": count.missed,
        "recall": round(count.recall, 4),
        "sound": count.sound,
        "false_alarms": count.false_alarms,
        "false_alarm_rate": round(count.false_alarm_rate, 4),
        "localisation_f": round(located.f, 4),
        "images_per_second": round(len(score.answers) / seconds, 1) if seconds else 0.0,
        "wait_p50_seconds": round(waits[len(waits) // 2], 4) if waits else None,
        "experts": len(catalog.bundles),
        "experts_used": len({part.component for part in score.parts.values()}),
        "experts_resident_max": watch.resident_max,
        "loads": stats.get("loads"),
        "evictions": stats.get("evictions"),
        "budget_bytes": stats.get("weights_budget_bytes"),
        "peak_weights_bytes": stats.get("weights_peak_bytes"),
        "anonymous_at_start_bytes": stats.get("anonymous_at_start_bytes"),
        "anonymous_peak_bytes": stats.get("anonymous_peak_bytes"),
        "anonymous_promise_bytes": stats.get("anonymous_promise_bytes"),
    }


def _localised(catalog: Catalog, score: Score) -> samples.Localisation:
    """Findings with a box against the labelled boxes, board by board, over boards whose every picture was answered."""
    boards: dict[tuple[str, str, str], list[tuple[Part, Mapping[str, Any]]]] = {}
    for name, part in score.parts.items():
        if name in score.answers:
            boards.setdefault((part.line, part.board, part.product), []).append((part, score.answers[name].body))
    results = []
    for (_, _, product), members in boards.items():
        if all(part.truth == samples.SOUND for part, _ in members):
            defects: Sequence[samples.Defect] = ()
        else:
            defects = samples.read_defects(catalog.products[product].folder / "sample.txt")
        cells = [samples.centre_cell(part.rect) for part, _ in members]
        seen = [d for d in defects if any(samples.contains(cell, d.centre) for cell in cells)]
        results.append(samples.localise(seen, [found for part, body in members for found in _found(part, body)]))
    return samples.total(results)


def _found(part: Part, body: Mapping[str, Any]) -> Iterator[samples.Found]:
    x, y, *_ = part.rect
    for finding in body.get("findings", ()):
        if finding["box"] is not None:
            x1, y1, x2, y2 = finding["box"]
            yield samples.Found((x + x1, y + y1, x + x2, y + y2), finding["label"], finding["score"])


def _print_closing(found: Mapping[str, Any], console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("pictures, verdicts", f"{found['pictures']}, {found['verdicts']}")
    table.add_row("defects missed", f"{found['missed_defects']} of {found['defective']} (recall {found['recall']:.3f})")
    rate = f"{found['false_alarm_rate']:.2%}"
    table.add_row("false alarms", f"{found['false_alarms']} of {found['sound']} sound parts ({rate})")
    table.add_row("localisation F", f"{found['localisation_f']:.3f} (overlap 0.33 and type right)")
    wait = found["wait_p50_seconds"] or 0.0
    table.add_row("speed", f"{found['images_per_second']:.0f} images/s, half of them within {wait * 1000:.0f} ms")
    resident = f"{found['experts_resident_max']} of {found['experts']} at most"
    table.add_row("experts resident", resident)
    table.add_row("loads, evictions", f"{found['loads']}, {found['evictions']}")
    agrees = "the same" if found["simulation_agrees"] else "DIFFERENT"
    table.add_row("replayed in the simulator", f"{found['simulated_loads']}, {found['simulated_evictions']} ({agrees})")
    budget = f"{megabytes(found['peak_weights_bytes'] or 0)} of {megabytes(found['budget_bytes'] or 0)} budget"
    table.add_row("peak weights memory", budget)
    promise = megabytes(found["anonymous_promise_bytes"] or 0)
    table.add_row("peak process memory", f"{megabytes(found['anonymous_peak_bytes'] or 0)} of {promise} promised")
    console.print()
    console.print(table)
    console.print(
        "\nReal bare-board pictures (DeepPCB, see models_onnx/NOTICE.md); experts of 0.5 MB stand for the 50 to 200 MB "
        "of real ones.\nA quarter of the boards are golden pictures, shifted by a pixel and encoded anew.",
        style="dim",
    )


def _print_hint(demo: Demo, config: settings.Config, console: Console) -> None:
    if not demo.keep:
        return
    picture = Path(__file__).parents[2] / "tests" / "data" / "moulded-figure"
    example = _seen_from_here(next(iter(sorted(picture.glob("*.png"))), Path("picture.jpg")))
    topic = config.topic("infer", "line1", "-", "-", "moulded-figure")
    answers = config.topic("result", "line1", "#")
    console.print("\nBroker and service stay up. In another terminal:")
    console.print(f"  mosquitto_sub -p {config.mqtt.port} -q 1 -v -t '{answers}'", highlight=False, soft_wrap=True)
    console.print(
        f"  mosquitto_pub -p {config.mqtt.port} -q 1 -t {topic} -f {example}", highlight=False, soft_wrap=True
    )
    console.print("or", highlight=False)
    program = _seen_from_here(Path(sys.executable).parent / "appliance")
    command = f"  {program} publish --port {config.mqtt.port} --part moulded-figure {example}"
    console.print(command, highlight=False, soft_wrap=True)


def _seen_from_here(path: Path) -> Path:
    """Short to read and to type where that is possible."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _keep(service: subprocess.Popen[bytes], console: Console) -> None:
    console.print("Ctrl-C ends them.")
    with contextlib.suppress(KeyboardInterrupt):
        service.wait()


def _journal(config: settings.Config) -> Path:
    assert config.paths.journal is not None
    return config.paths.journal
