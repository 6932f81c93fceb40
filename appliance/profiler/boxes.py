"""What the profiler works on: the box of a configuration, or experts made for it; and the profile that comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from appliance import __version__
from appliance import profile as profiles
from appliance.config import Config
from appliance.drivers.devices import cores
from appliance.errors import CatalogError
from appliance.lab import laps, paper
from appliance.lab.fleet import MAX_BATCH, fleet
from appliance.lab.telling import Say
from appliance.profile import Found, Origin, Profile, Running
from appliance.profiler import workload
from appliance.profiler.measure import Architecture
from appliance.profiler.profiled import Profiled
from appliance.profiler.rig import ACTIVATIONS_TWICE, Rig, bandwidth
from appliance.profiler.settings import Settings
from appliance.profiler.workload import Workload
from appliance.startup import Installation, footprint, graph_sha256, hardware, probabilities


def rig_of(made: Installation, work: Workload) -> Rig:
    """The box as it serves, with its experts on the CPU. Raises CatalogError when none can be served."""
    if not made.compiled:
        raise CatalogError("no expert can be served", "see `appliance check`")
    return Rig(
        made.catalog.graph,
        made.compiled,
        {name: made.variants.served.get(name, made.catalog.bundles[name]) for name in made.compiled},
        made.store.segment_path,
        probabilities(made.catalog),
        laps.encoded_pictures(),
        made.split_bytes,
        cores(),
        work,
    )


def default_of(made: Installation) -> Settings:
    """How the box is set without a profile of its own: what the settings say, and else what any box gets."""
    config, memory = made.config, made.config.memory
    return Settings(
        cpu_executors=config.executors.cpu or cores(),
        load_slots=config.executors.load_slots,
        batch_cap=min(profiles.DEFAULT.batch_cap, _largest_batch(made)),
        weights_share=1 - ACTIVATIONS_TWICE * int(memory.activations) / made.split_bytes,
    )


def _largest_batch(made: Installation) -> int:
    return max(made.catalog.bundles[name].manifest.model.max_batch for name in made.compiled)


_STEP_BYTES = 32 << 20
"""What compiling measures is never twice the same; so the box is, and a search on it goes on after a kill."""


@contextmanager
def made_rig(asked: laps.Workload, folder: Path, say: Say) -> Iterator[tuple[Rig, Settings]]:
    """A box of made experts at the task of `appliance bench task`, and its default settings; gone afterwards.

    Raises ApplianceError when the disk has no room for them.
    """
    with fleet(asked.job.board, asked.shape, folder, say, plain=False) as found:
        weights = int(found.bytes * asked.budget_share)
        working = max(footprint(one).activation_bytes(MAX_BATCH) for one in found.compiled.values()) * cores()
        working = -(-working // _STEP_BYTES) * _STEP_BYTES
        whole = weights + ACTIVATIONS_TWICE * working
        rig = Rig(
            paper.graph(found.board),
            found.compiled,
            found.bundles,
            found.segment_path,
            {expert.name: expert.probability for expert in paper.experts(found.board, {})},
            laps.encoded_pictures(),
            whole,
            cores(),
            workload.of_trace(f"{asked.experts} experts of {asked.shape}", paper.drawn(asked.job)),
        )
        yield rig, Settings(cpu_executors=cores(), batch_cap=MAX_BATCH, weights_share=weights / whole)


def profile_of(found: Profiled, rig: Rig, name: str, objective: str, graph: str) -> Profile:
    """What `profiles/<box>.json` says."""
    best, loading = found.settings, found.measured.loading
    return Profile(
        schema=2,
        name=name,
        cpu_executors=best.cpu_executors,
        threads=best.threads,
        load_slots=best.load_slots,
        batch_cap=best.batch_cap,
        weights_bytes=rig.weights_bytes(best),
        activation_bytes=rig.activation_bytes(best),
        hold_share=best.hold_share,
        load_fixed_seconds=loading.fixed_seconds,
        disk_bytes_per_second=bandwidth(loading, 1),
        running={
            one.architecture: _running(one, best) for one in found.measured.architectures if one.threads == best.threads
        },
        origin=Origin(
            version=__version__,
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            hardware=hardware(),
            graph_sha256=graph,
            found=Found(
                workload=rig.workload.name,
                objective=objective,
                trials=found.trials,
                confirmed=found.confirmed,
                predicted=found.predicted_images_per_second,
                live=found.live(best),
                default_live=found.live(found.default),
            ),
        ),
    )


def _running(one: Architecture, best: Settings) -> Running:
    item_seconds, fixed_seconds = one.line(best.batch_cap)
    return Running(item_seconds=item_seconds, fixed_seconds=fixed_seconds, fit_error=one.fit_error)


def profile_path(config: Config) -> Path:
    """Where this box's profile lies."""
    return config.paths.profile.parent / f"{config.box.name}.json"


def graph_of(made: Installation) -> str:
    return graph_sha256(made.catalog, made.compiled)
