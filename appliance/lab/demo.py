"""The first minute: embedded broker and service as a process of their own, real boards published by several lines,
verdicts, loads and evictions as they happen, and what they were worth at the end.

`boards.py` makes what the lines publish, `watch.py` hears what the box says, `score.py` judges it.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from appliance import catalog as catalogs
from appliance import config as settings
from appliance.catalog import Product
from appliance.client import Answer, Camera
from appliance.drivers.broker import free_port
from appliance.errors import BrokerError, CatalogError
from appliance.lab.boards import Part, mixed, streams
from appliance.lab.score import Score, broken_promises, closing, compared
from appliance.lab.simulate import simulated
from appliance.lab.watch import Watch
from appliance.report import megabytes, verdict_cells
from appliance.startup import install, waiting_to_compile

VERDICT_SECONDS = 120.0
STOP_SECONDS = 30.0
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


@dataclass(slots=True)
class Shown:
    """The last answers, for the live table, and how long each took. Filled on the cameras' threads."""

    rows: deque[tuple[Part, Answer]] = field(default_factory=lambda: deque(maxlen=SHOWN_ROWS))
    waits: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, part: Part, answer: Answer) -> None:
        with self.lock:
            self.rows.append((part, answer))
            self.waits.append(answer.seconds)


def run_demo(demo: Demo, console: Console) -> dict[str, Any]:
    """Returns the closing numbers; `broken` lists the promises that they break. Raises ApplianceError when something
    does not start."""
    config_path = _write_config(demo)
    _compile(config_path, console)
    config = settings.load(config_path)
    catalog = catalogs.load(config.paths.catalog)
    boards = [product for product in catalog.products.values() if (product.folder / "sample.txt").is_file()]
    if not boards:
        raise CatalogError(f"{config.paths.catalog} has no product with a sample", "use the shipped models_onnx")
    score, shown = Score(), Shown()

    def numbers() -> dict[str, Any]:
        return closing(catalog, score, watch.stats, watch.resident_max, shown.waits, seconds)

    with _service(config_path, config.paths.state / "service.log") as service, Watch(config, score) as watch:
        watch.start(lambda: service.poll() is None)
        seconds = _publish(demo, config, boards, shown, watch, console)
        if demo.keep:
            _print_closing(numbers(), console)
            _print_hint(config, console)
            _keep(service, watch, console)
        found = numbers()
    found = compared(found, simulated(_journal(config), predict=False))  # the journal is whole when its writer stopped
    found["broken"] = broken_promises(found)
    if demo.keep:
        console.print(f"\nreplayed in the simulator: {_replay_cell(found)}")
    else:
        _print_closing(found, console)
    for words in found["broken"]:
        console.print(f"[bold red]broken promise:[/bold red] {words}")
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
        f"[mqtt]\nport = {free_port()}\n"
        f"[broker]\nembedded = true\n"
        f"[limits]\npicture_pixels = 1_000_000\npicture_bytes = 1_000_000\n"
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
            _stop(process)
    if process.returncode:
        raise BrokerError(f"the service ended with {process.returncode}", f"see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """In order, or else by force: also when Ctrl-C comes again, nothing stays behind."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


# Publishing.


def _publish(
    demo: Demo, config: settings.Config, boards: Sequence[Product], shown: Shown, watch: Watch, console: Console
) -> float:
    """Every picture until its answer; returns the seconds from the first to the last."""
    score = watch.score
    with contextlib.ExitStack() as stack:
        cameras = {}
        for number in range(demo.lines):
            camera = Camera("127.0.0.1", config.mqtt.port, line=f"line{number + 1}", site=config.box.site)
            camera.on_answer(lambda answer: shown.add(score.parts[answer.request_id], answer))
            cameras[f"line{number + 1}"] = stack.enter_context(camera)
        live = stack.enter_context(Live(console=console, refresh_per_second=8, transient=not console.is_terminal))
        started = time.monotonic()
        drawn = 0.0
        for part in islice(streams(mixed(boards), demo.lines), demo.pictures):
            camera = cameras[part.line]
            score.ask(camera.name_of(part.product, part.board, part.part, part.picture), part)
            camera.publish(product=part.product, board=part.board, part=part.part, picture=part.picture)
            if time.monotonic() - drawn > 0.12:
                drawn = time.monotonic()
                live.update(_view(demo, shown, watch, drawn - started))
        ends = time.monotonic() + VERDICT_SECONDS
        while any(camera.waiting for camera in cameras.values()) and time.monotonic() < ends:
            for camera in cameras.values():
                camera.wait(0.05)
            live.update(_view(demo, shown, watch, time.monotonic() - started))
        seconds = time.monotonic() - started
        watch.settle()
        live.update(_view(demo, shown, watch, seconds))
    return seconds


def _view(demo: Demo, shown: Shown, watch: Watch, seconds: float) -> Group:
    """The live table: the last verdicts, and what the box does for them."""
    table = Table("line", "picture", "component", "verdict", "findings", "ms", box=None, pad_edge=False)
    with shown.lock:
        rows, answered = list(shown.rows), len(shown.waits)
    for part, answer in rows:
        picture = f"{part.product}/{part.part}"
        table.add_row(part.line, picture, part.component, *verdict_cells(answer.body), f"{answer.seconds * 1000:.0f}")
    stats = watch.stats
    memory = f"{megabytes(stats.get('weights_bytes', 0))} of {megabytes(stats.get('weights_budget_bytes', 0))}"
    facts = (
        f"{answered} of {demo.pictures} answered, {answered / seconds if seconds else 0:.0f} images/s   "
        f"weights {memory}, {stats.get('resident', 0)} experts resident   "
        f"{stats.get('loads', 0)} loads, {stats.get('evictions', 0)} evictions"
    )
    return Group(table, Text(), Text(facts, style="bold"), Text("   ".join(list(watch.moves)[-4:]), style="dim"))


# Closing.


def _print_closing(found: Mapping[str, Any], console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("pictures, verdicts", f"{found['pictures']}, {found['verdicts']}")
    table.add_row("defects missed", f"{found['missed_defects']} of {found['defective']} (recall {found['recall']:.3f})")
    boards = ", ".join(f"{count} {outcome}" for outcome, count in found["boards"].items())
    table.add_row("whole boards", boards or "none had all its parts")
    rate = f"{found['false_alarm_rate']:.2%}"
    table.add_row("false alarms", f"{found['false_alarms']} of {found['sound']} sound parts ({rate})")
    table.add_row("localisation F", f"{found['localisation_f']:.3f} (overlap 0.33 and type right)")
    wait = found["wait_p50_seconds"] or 0.0
    table.add_row("speed", f"{found['images_per_second']:.0f} images/s, half of them within {wait * 1000:.0f} ms")
    resident = f"{found['experts_resident_max']} of {found['experts']} at most"
    table.add_row("experts resident", resident)
    table.add_row("loads, evictions", f"{found['loads']}, {found['evictions']}")
    if "simulated_loads" in found:
        table.add_row("replayed in the simulator", _replay_cell(found))
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


def _replay_cell(found: Mapping[str, Any]) -> str:
    agrees = "the same" if found["simulation_agrees"] else "DIFFERENT"
    return f"{found['simulated_loads']} loads, {found['simulated_evictions']} evictions ({agrees})"


def _print_hint(config: settings.Config, console: Console) -> None:
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


def _keep(service: subprocess.Popen[bytes], watch: Watch, console: Console) -> None:
    """Until Ctrl-C; then for the box's numbers about what was published by hand."""
    console.print("Ctrl-C ends them.")
    with contextlib.suppress(KeyboardInterrupt):
        service.wait()
        return
    watch.refresh()


def _journal(config: settings.Config) -> Path:
    assert config.paths.journal is not None
    return config.paths.journal
