"""What the profiler works on: the box of a configuration, or experts made for it; and the profile that comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from appliance import __version__
from appliance import profile as profiles
from appliance.config import Config
from appliance.core.policies import POLICIES
from appliance.core.slab import block_bytes
from appliance.drivers.devices import cores
from appliance.errors import CatalogError, ConfigError
from appliance.lab import laps, paper
from appliance.lab.fleet import MAX_BATCH, fleet
from appliance.lab.telling import Say
from appliance.profile import Found, Hardware, Loads, OnGpus, Origin, Profile, Running
from appliance.profiler import workload
from appliance.profiler.measure import GpuPart
from appliance.profiler.measurements import Architecture, Loading, Measured, errors
from appliance.profiler.profiled import Profiled
from appliance.profiler.rig import ACTIVATIONS_TWICE, Int8Part, Rig, bandwidth
from appliance.profiler.settings import Settings
from appliance.profiler.workload import Workload
from appliance.startup import (
    CPU,
    Installation,
    compiled_int8,
    footprint,
    gpu_name,
    graph_sha256,
    probabilities,
)


def rig_of(
    made: Installation, work: Workload, say: Say = lambda line: None, pictures: laps.Pictures | None = None
) -> Rig:
    """The box as it serves, with these encoded pictures or made ones.

    Raises CatalogError when no expert can be served.
    """
    if not made.compiled:
        raise CatalogError("no expert can be served", "see `appliance check`")
    return Rig(
        made.catalog.graph,
        made.compiled,
        {name: made.bundles_on(CPU)[name] for name in made.compiled},
        made.store.segment_path,
        probabilities(made.catalog),
        pictures or laps.encoded_pictures(),
        made.split_bytes,
        cores(),
        work,
        _gpus_of(made),
        _int8_of(made, say),
        settled(made.config),
        tuple(name for name in made.config.experts.pin if name in made.compiled),
        POLICIES[made.config.scheduler.policy],
    )


_SETTLED_BY: Mapping[str, tuple[str, ...]] = {
    "cpu_executors": ("executors.cpu",),
    "gpu_executors": ("executors.gpus",),
    "load_slots": ("executors.load_slots",),
    "weights_share": ("memory.weights", "memory.activations"),
    "gpu_weights_share": ("memory.gpu_weights", "memory.gpu_activations"),
    "host_tier_share": ("memory.gpu_host_tier",),
    "int8": ("experts.precision",),
}


def settled(config: Config) -> dict[str, str]:
    """What is not to be chosen, for the settings say it, and which of them does: they go before a profile."""
    given = {
        f"{section}.{key}"
        for section in ("executors", "memory", "experts")
        for key in getattr(config, section).model_fields_set
    }
    return {knob: key for knob, keys in _SETTLED_BY.items() for key in keys if key in given}


def _int8_of(made: Installation, say: Say) -> Int8Part | None:
    """The variants that there are to choose; none where the settings have chosen."""
    if "int8" in settled(made.config):
        return None
    compiled, variants = compiled_int8(made)
    for name, why in variants.refused.items():
        say(f"{name} stays in full precision: {why.detail}")
    return Int8Part(compiled, variants.served) if compiled else None


def _gpus_of(made: Installation) -> GpuPart | None:
    """What its GPUs have in common: as much memory as the smallest."""
    gpus = made.gpus
    if not gpus.used or gpus.store is None or not gpus.compiled:
        return None
    budgets = [device.budget_bytes for device in made.devices if device.name != CPU]
    memory_bytes = block_bytes(min(budgets)) + ACTIVATIONS_TWICE * int(made.config.memory.gpu_activations)
    memory_bytes -= memory_bytes % _STEP_BYTES
    return GpuPart(tuple(map(gpu_name, gpus.used)), gpus.compiled, gpus.store.segment_path, memory_bytes)


def default_of(made: Installation) -> Settings:
    """How the box is set without a profile of its own: what the settings say, and else what any box gets."""
    config, memory, gpus = made.config, made.config.memory, _gpus_of(made)
    count = 0 if gpus is None else len(gpus.names)
    pinned = count * int(memory.gpu_host_tier)
    usual = Settings(
        cpu_executors=config.executors.cpu or cores(),
        gpu_executors=count,
        load_slots=config.executors.load_slots,
        batch_cap=min(profiles.DEFAULT.batch_cap, _largest_batch(made)),
        weights_share=1 - ACTIVATIONS_TWICE * int(memory.activations) / (made.split_bytes - pinned),
        host_tier_share=pinned / made.split_bytes,
    )
    if gpus is None:
        return usual
    working = ACTIVATIONS_TWICE * int(memory.gpu_activations)
    return replace(usual, gpu_weights_share=1 - working / gpus.memory_bytes)


def _largest_batch(made: Installation) -> int:
    return max(made.catalog.bundles[name].manifest.model.max_batch for name in made.compiled)


_STEP_BYTES = 32 << 20
"""What compiling measures, and what is free on a GPU, is never twice the same; so the box is, and a search on it goes
on after a kill."""


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


def profile_of(found: Profiled, rig: Rig, name: str, objective: str, graph: str, here: Hardware) -> Profile:
    """What `profiles/<box>.json` says."""
    best = found.settings
    known = found.measured.of(int8=bool(best.int8))
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
        precision=None if rig.int8 is None else "int8" if best.int8 else "full",
        load_fixed_seconds=known.loading.fixed_seconds,
        disk_bytes_per_second=bandwidth(known.loading, 1),
        running=_running(known.on("cpu", best.threads), best),
        gpus=_on_gpus(known, rig, best),
        origin=Origin(
            version=__version__,
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            hardware=here,
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


def _running(models: Mapping[str, Architecture], best: Settings) -> dict[str, Running]:
    """The line through the batches that will be run, and what it is off from these."""
    found = {}
    for name, one in models.items():
        line = one.line(best.batch_cap)
        off, _ = errors([sample for sample in one.samples if sample.items <= best.batch_cap], *line)
        found[name] = Running(item_seconds=line[0], fixed_seconds=line[1], fit_error=off)
    return found


def _on_gpus(known: Measured, rig: Rig, best: Settings) -> OnGpus:
    """What was measured on a GPU stays known where none is used; how its memory is split then, nobody has tried."""
    if rig.gpus is None or known.gpu is None:
        return OnGpus()
    found = OnGpus(
        count=best.gpu_executors,
        from_disk=_loads(known.gpu.from_disk),
        from_host=_loads(known.gpu.from_host),
        running=_running(known.on("cuda"), best),
    )
    if not best.gpu_executors:
        return found
    split = {
        "weights_bytes": rig.gpu_weights_bytes(best),
        "activation_bytes": rig.gpu_activation_bytes(best),
        "host_tier_bytes": rig.host_tier_bytes(best),
    }
    return found.model_copy(update=split)


def _loads(loading: Loading) -> Loads | None:
    if not loading.bytes_per_second:
        return None
    return Loads(fixed_seconds=loading.fixed_seconds, bytes_per_second=bandwidth(loading, 1))


def profile_path(config: Config) -> Path:
    """Where this box's profile lies. Raises ConfigError for a box that is called as the one for any box."""
    if config.box.name == profiles.DEFAULT.name:
        raise ConfigError(f"{config.box.name}.json is any box's profile", "set box.name, or choose a place with --out")
    return config.paths.profile.parent / f"{config.box.name}.json"


def graph_of(made: Installation, rig: Rig, best: Settings) -> str:
    """Of the experts as the box will serve them."""
    return graph_sha256(made.catalog, rig.in_precision(best).compiled)
