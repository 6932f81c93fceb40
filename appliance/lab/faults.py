"""Everything that can break between a camera and its verdict is broken, at random, for minutes; then all is counted.

A real broker and the real service as child processes, a line that keeps its pictures, and a proxy between broker and
box. Service and broker are killed, links are reset, cut in mid-packet and swallowed. What must hold is in `audit.py`.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from appliance.errors import ApplianceError
from appliance.lab.audit import Audit, Line
from appliance.lab.door import picture
from appliance.lab.proxy import Proxy, Weather
from appliance.lab.shapes import pooled, write_expert, write_manifest
from appliance.lab.site import KINDS, Service, SiteBroker, kinds_here, running
from appliance.lab.telling import Say

PICTURES_PER_SECOND = 50.0
PICTURE_BYTES = 20_000
PAUSE_SECONDS = (0.5, 5.0)
"""From one fault to the next: some strike while the last is not over."""
BREAK_SECONDS = 1.5
SETTLE_SECONDS = 120.0
RESEND_SECONDS = 3.0
FLAT_SHARE = 0.10
_EXPERTS = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """The service's process, as it was when it was about to be killed."""

    rss_bytes: int
    descriptors: int
    threads: int


def faults(
    *, minutes: float, broker: str | None = None, seed: int = 0, folder: Path, say: Say = lambda line: None
) -> dict[str, Any]:
    """So many minutes, shared by the brokers that are here. Raises ApplianceError when something does not start."""
    names = kinds_here(broker)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="faults-", dir=folder) as home:
        catalog = _catalog(Path(home).resolve() / "catalog")
        runs = {name: _run(name, catalog, minutes * 60 / len(names), random.Random(seed), say) for name in names}
    sums = {key: sum(run[key] for run in runs.values()) for key in ("published", "verdicts", "records")}
    sums |= {key: sum(run[key] for run in runs.values()) for key in ("lost", "conflicting", "phantom")}
    return {
        **sums,
        "kills": dict(sum((Counter(run["kills"]) for run in runs.values()), Counter())),
        "is_clean": all(run["is_clean"] for run in runs.values()),
        "is_flat": all(run["is_flat"] for run in runs.values()),
        "minutes": minutes,
        "seed": seed,
        "brokers": runs,
    }


def _catalog(folder: Path) -> Path:
    """Small experts: what is to be tried is everything around them."""
    names = [f"e{number}" for number in range(_EXPERTS)]
    for number, name in enumerate(names):
        write_manifest(write_expert(folder, name, pooled(number), side=8, max_batch=4))
    components = "".join(f"c-{name} = '{name}'\n" for name in names)
    (folder / "graph.toml").write_text(f"schema = 1\nname = 'faults'\n[components]\n{components}", "utf-8")
    return folder


def _run(name: str, catalog: Path, seconds: float, chance: random.Random, say: Say) -> dict[str, Any]:
    home = catalog.parent / name
    with running(KINDS[name](home)) as broker, Proxy(broker.port) as proxy:
        service = Service(home / "box", catalog, catalog.parent / "store", proxy.port)
        with service, Line(broker.port, resend_seconds=RESEND_SECONDS) as line:
            with _published(line) as trouble:
                kills, samples = _broken(_Site(broker, service, proxy), seconds, chance, say)
            proxy.weather = Weather.FAIR
            say(f"{name}: waiting for {line.camera.waiting} verdicts")
            line.wait(SETTLE_SECONDS)
            service.stop()
            found = line.audit(service.state)
            outcomes = Counter(str(answer.body.get("outcome")) for answer in line.answers.values())
    if trouble:
        raise trouble[0]
    return _told(found, kills, samples) | {"resent": line.camera.resent, "outcomes": dict(outcomes)}


def _told(found: Audit, kills: Mapping[str, int], samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        **asdict(found),
        "is_clean": found.is_clean,
        "kills": dict(kills),
        "is_flat": is_flat(samples),
        "samples": [asdict(sample) for sample in samples],
    }


def is_flat(samples: Sequence[Sample]) -> bool:
    """Whether the last third of the processes was no larger than the first, of which each lived for a while only."""
    third = len(samples) // 3
    if not third:
        return True

    def grown(what: Callable[[Sample], int]) -> float:
        first, last = (statistics.median(map(what, part)) for part in (samples[:third], samples[-third:]))
        return last / first - 1

    return all(
        grown(what) <= FLAT_SHARE for what in (lambda s: s.rss_bytes, lambda s: s.descriptors, lambda s: s.threads)
    )


@contextmanager
def _published(line: Line) -> Iterator[list[ApplianceError]]:
    """Pictures all the while; what a camera cannot go on after is in the list."""
    content, ended, trouble = picture(PICTURE_BYTES), threading.Event(), list[ApplianceError]()

    def publish() -> None:
        number = 0
        try:
            while not ended.wait(1 / PICTURES_PER_SECOND):
                number += 1
                line.publish(f"c-e{number % _EXPERTS}", content, board=f"b{number}")
        except ApplianceError as error:
            trouble.append(error)

    publisher = threading.Thread(target=publish, name="faults-publisher")
    publisher.start()
    try:
        yield trouble
    finally:
        ended.set()
        publisher.join()


@dataclass(frozen=True, slots=True)
class _Site:
    broker: SiteBroker
    service: Service
    proxy: Proxy


def _broken(site: _Site, seconds: float, chance: random.Random, say: Say) -> tuple[Counter[str], list[Sample]]:
    """Fault after fault; a service that ends by itself is started again, as systemd does."""
    faults: dict[str, Callable[[_Site], None]] = {
        "service": _kill_service,
        "broker": _kill_broker,
        "reset": lambda site: site.proxy.reset(),
        "cut": lambda site: _weathered(site.proxy, Weather.CUT),
        "hole": lambda site: _weathered(site.proxy, Weather.HOLE),
        "deaf": lambda site: _weathered(site.proxy, Weather.DEAF),
    }
    kills, samples, ends = Counter[str](), list[Sample](), time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(min(chance.uniform(*PAUSE_SECONDS), max(ends - time.monotonic(), 0.0)))
        name = chance.choices(list(faults), weights=(3, 2, 1, 1, 1, 1))[0]
        if name == "service":
            samples.extend(_sample(site.service))
        say(f"{site.broker.name}: {name}")
        faults[name](site)
        kills[name] += 1
        if not site.service.is_running:
            kills["ended by itself"] += 1
            site.service.start()
    return kills, samples


def _kill_service(site: _Site) -> None:
    site.service.kill()
    site.service.start()


def _kill_broker(site: _Site) -> None:
    site.broker.kill()
    site.broker.start()


def _weathered(proxy: Proxy, weather: Weather) -> None:
    proxy.weather = weather
    time.sleep(BREAK_SECONDS)
    proxy.weather = Weather.FAIR


def _sample(service: Service) -> Iterator[Sample]:
    """Nothing of one that is only just starting."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(service.pid)
        if time.time() - process.create_time() > 2 * BREAK_SECONDS:
            yield Sample(process.memory_info().rss, process.num_fds(), process.num_threads())
