"""`appliance profile`: the box of a configuration or one made for it, profiled; what was found, and its file."""

from __future__ import annotations

import errno
import os
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from appliance import __version__, profile
from appliance import catalog as catalogs
from appliance import config as settings
from appliance.catalog import Catalog
from appliance.core.types import Request
from appliance.errors import ConfigError
from appliance.lab import laps, paper
from appliance.lab.telling import Say
from appliance.profile import Hardware, Profile
from appliance.profiler import boxes, workload
from appliance.profiler.choosing import ROUNDS
from appliance.profiler.measurements import Handover, Measured
from appliance.profiler.profiled import Plan, Profiled, profiled, told
from appliance.profiler.progress import alone
from appliance.profiler.rig import Rig
from appliance.profiler.settings import Settings
from appliance.profiler.workload import Workload
from appliance.startup import hardware, install


@dataclass(frozen=True, slots=True)
class Pictures:
    """The workload that is asked for: of a journal, of a product, or else by usage; and where its pictures lie."""

    requests: int
    checked_share: float
    gap_seconds: float
    journal: Path | None = None
    speed: float = 1.0
    product: str | None = None
    due_seconds: float | None = None
    folder: Path | None = None

    def of(self, catalog: Catalog) -> Workload:
        if self.journal is not None:
            return workload.of_journal(self.journal, catalog.graph, self.speed)
        if self.product is not None:
            boards = -(-self.requests // workload.parts_of(catalog, self.product))
            return workload.of_product(
                catalog, self.product, boards, self.checked_share, self.gap_seconds, self.due_seconds
            )
        return workload.of_usage(catalog, self.requests, self.checked_share, self.gap_seconds)


def of_box(path: Path, pictures: Pictures, plan: Plan, out: Path | None, html: Path | None, say: Say) -> dict[str, Any]:
    """Profile the box of these settings and write its profile."""
    config = settings.load(path)
    wanted = out or boxes.profile_path(config)
    _check_places(wanted, html, plan.folder)
    work = pictures.of(catalogs.load(config.paths.catalog))  # before experts are compiled, which may take minutes
    _check_objective(plan.objective, work.requests)
    shown = None if pictures.folder is None else workload.pictures_in(pictures.folder)
    if shown is not None:
        work = replace(work, name=f"{work.name}, pictures of {pictures.folder}")
    with alone(plan.folder):
        say("reading and compiling experts")
        made = install(config, profile=profile.DEFAULT)  # the one that is there may be of another time
        if made.unavailable:
            work = workload.servable(work, made.catalog.graph, made.compiled)
            say(f"left out, for they cannot be served (see `appliance check`): {', '.join(sorted(made.unavailable))}")
        rig, default, here = boxes.rig_of(made, work, say, shown), boxes.default_of(made), hardware(made.gpus.used)
        if len({gpu.name for gpu in made.gpus.used}) > 1:
            say(f"the GPUs differ: all are taken to be like {made.gpus.used[0].name}")
        for knob, key in rig.settled.items():
            say(f"{knob} is not searched: the settings have {key}")
        found = profiled(rig, default, plan, say)
        graph = boxes.graph_of(made, rig, found.settings)
        made_of_it = boxes.profile_of(found, rig, config.box.name, plan.objective, graph, here)
        return _written(found, rig, plan, made_of_it, here, place(wanted, found.is_complete), html)


def of_made(asked: laps.Workload, plan: Plan, folder: Path, out: Path, html: Path | None, say: Say) -> dict[str, Any]:
    """Profile experts that are made for it."""
    _check_places(out, html, plan.folder)
    _check_objective(plan.objective, paper.drawn(asked.job).requests)
    with alone(plan.folder), boxes.made_rig(asked, folder, say) as (rig, default):
        found, here = profiled(rig, default, plan, say), hardware()
        name = f"{asked.experts}-{asked.shape}"
        made_of_it = boxes.profile_of(found, rig, name, plan.objective, "", here)
        return _written(found, rig, plan, made_of_it, here, place(out, found.is_complete), html)


def _check_places(out: Path, html: Path | None, folder: Path) -> None:
    """Raises ConfigError for what could not be written in the end: nobody shall wait an hour to be told."""
    with _told_kindly(out, "--out"):
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _check_folder(_nearest(out.parent))
    with _told_kindly(folder, "--folder"):
        _check_folder(_nearest(folder))
    if html is None:
        return
    if html.resolve() == out.resolve():
        raise ConfigError(f"the page would lie where the profile does: {out}", "choose another place with --html")
    with _told_kindly(html, "--html"):
        if html.exists():
            html.open("ab").close()
        else:
            _check_folder(html.parent)


@contextmanager
def _told_kindly(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", f"choose another place with {option}"
        ) from error


def _check_folder(folder: Path) -> None:
    """Raises OSError where no file can be made."""
    TemporaryFile(dir=folder).close()  # it is without a name, or gone at once: nothing is left behind


def _nearest(folder: Path) -> Path:
    """It, or of those above it the first that there is: in which it will be made."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _check_objective(objective: str, requests: Sequence[Request]) -> None:
    if objective == "deadlines" and all(request.deadline_seconds is None for request in requests):
        raise ConfigError(
            "no picture of this workload has a deadline",
            "give --product with --due, or --journal of pictures that have one, or choose another --objective",
        )


def place(wanted: Path, is_complete: bool) -> Path:
    """Where to write: what an interrupted run knows takes the place of no former profile."""
    return wanted if is_complete or not wanted.exists() else wanted.with_suffix(".interrupted.json")


def _written(
    found: Profiled, rig: Rig, plan: Plan, made_of_it: Profile, here: Hardware, path: Path, html: Path | None
) -> dict[str, Any]:
    """What was found, once it lies where it was wanted."""
    profile.save(made_of_it, path)
    result = _told(found, rig, plan, here, path)
    if html is not None:
        from appliance.profiler.page import page

        with _told_kindly(html, "--html"):
            html.write_text(page(result), "utf-8")
    if found.is_complete:  # not before: until all is written, the same command goes on from there
        shutil.rmtree(found.home, ignore_errors=True)
    return result


def _told(found: Profiled, rig: Rig, plan: Plan, here: Hardware, path: Path) -> dict[str, Any]:
    """What `--json` prints, and what the page and the terminal show."""
    count = len(rig.workload.requests)
    return {
        "version": __version__,
        "hardware": here.model_dump(),
        "workload": rig.workload.name,
        "requests": count,
        "requests_per_lap": round(count * found.share),
        "experts": len(rig.compiled),
        "weights_bytes": sum(one.bytes for one in rig.compiled.values()),
        "memory_bytes": rig.memory_bytes,
        "objective": plan.objective,
        "budget_seconds": plan.budget_seconds,
        "seconds": found.seconds,
        "complete": found.is_complete,
        "trials": found.trials,
        "configurations_confirmed_live": found.confirmed,
        "predicted_images_per_second": found.predicted_images_per_second,
        "live_images_per_second": found.live(found.settings),
        "default_live_images_per_second": found.live(found.default),
        "live": _live(found, found.settings),
        "default_live": _live(found, found.default),
        "profile_path": str(path.resolve()),  # in appliance.toml, others are beside that file
        "changed": told(found.settings, found.default),
        "why_default": _why_default(found),
        "settings": found.settings.told(),
        "default": found.default.told(),
        "fits": _fits(rig, found.measured),
        "handover": asdict(found.measured.handover or Handover()),
        "settled": dict(rig.settled),
        "loading": asdict(found.measured.loading),
        "contention": [asdict(one) for one in found.measured.contention],
        "gpu": None if found.measured.gpu is None else asdict(found.measured.gpu),
        "failed": _failed(found.measured),
        "importances": dict(found.importances),
        "best_predicted": [{"settings": one.settings.told(), "value": one.value} for one in found.predicted],
        "laps": [
            {"round": lap.round, "settings": lap.settings.told(), "predicted_images_per_second": predicted}
            | lap.outcome.told()
            for lap in found.laps
            for predicted in (rig.predicted(lap.settings, found.measured, found.share).images_per_second,)
        ],
        "memory_curve": _memory_curve(rig, found),
    }


def _why_default(found: Profiled) -> str:
    """In words, why the defaults stay; empty where they do not, or where it is not decided yet."""
    if found.settings != found.default or not found.is_complete:
        return ""
    with_default = {lap.round for lap in found.laps if lap.settings == found.default}
    rounds = Counter(lap.settings for lap in found.laps if lap.round in with_default)
    del rounds[found.default]
    if max(rounds.values(), default=0) < ROUNDS:
        return (
            "The defaults stay: there was no time to serve another configuration beside them twice, and once may be "
            "chance. A larger --budget tells more."
        )
    return "The defaults stay: nothing was better than they are in more than half of the rounds."


def _live(found: Profiled, settings: Settings) -> dict[str, float]:
    """All that an objective may ask for: medians of the rounds in which both the default and what was chosen were
    served, empty if there are none."""
    if not (served := found.compared(settings)):
        return {}
    return {name: statistics.median(getattr(one, name) for one in served) for name in _COMPARED}


_COMPARED = ("images_per_second", "wait_p99_seconds", "late_share")


def _failed(measured: Measured) -> dict[str, str]:
    """What could not be measured, and why."""
    int8 = {} if measured.int8 is None else measured.int8.failed
    return {**measured.failed, **{f"{name} in int8": why for name, why in int8.items()}}


def _fits(rig: Rig, measured: Measured) -> list[dict[str, Any]]:
    """Of networks, and of int8 variants, which say so."""
    variants = set() if rig.int8 is None else {one.architecture for one in rig.int8.compiled.values()}
    return [
        asdict(one) | {"precision": "int8" if one.architecture in variants else "full"}
        for one in measured.of(int8=True).architectures
    ]


def _memory_curve(rig: Rig, found: Profiled) -> list[dict[str, float]]:
    """What the chosen settings would come to with less memory, and with more, as predicted."""
    points = []
    for factor in (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0):
        other = replace(rig, memory_bytes=int(rig.memory_bytes * factor))
        if other.holds(found.settings):
            rate = other.predicted(found.settings, found.measured, found.share).images_per_second
            points.append({"memory_bytes": other.memory_bytes, "images_per_second": rate})
    return points
