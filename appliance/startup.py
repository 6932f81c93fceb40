"""What serving, checking and simulating do first: read the catalogue, compile what is new, and say what the box has.

An expert that is broken or cannot be compiled is set aside with its reason; the others serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from appliance import catalog as catalogs
from appliance import profile as profiles
from appliance.catalog import Bundle, Catalog
from appliance.config import Config
from appliance.core.controller import Controller
from appliance.core.costs import Cost
from appliance.core.graph import draw
from appliance.core.memory import Ledger
from appliance.core.policies import POLICIES
from appliance.core.types import Device, Executor, Expert, Footprint, Refusal
from appliance.drivers import devices
from appliance.engine import cuda
from appliance.errors import ApplianceError, ConfigError
from appliance.profile import Profile
from appliance.promise import weights_budget
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store

CPU = "cpu"
GPU_SHARE = 0.8
"""Of a GPU's free memory for weights and activations, unless settings say otherwise: its libraries need some too."""
COMPILE_JOBS = 2
"""Children that compile at the same time, where there are cores for them: each takes gigabytes for a large model."""

Report = Callable[[str, Compiled | ApplianceError], None]
Progress = Callable[[str, int, int], None]
"""Hears what is counted ("bytes" read, "experts" compiled), how many are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs in use, their experts, and by its name why another one that is there or asked for is not in use."""

    used: tuple[devices.Gpu, ...] = ()
    store: Store | None = None
    compiled: Mapping[str, Compiled] = field(default_factory=dict)
    trouble: Mapping[str, str] = field(default_factory=dict)


def gpu_name(gpu: devices.Gpu) -> str:
    return f"cuda:{gpu.index}"


@dataclass(frozen=True, slots=True)
class Installation:
    """A box as it can serve: everything read, checked and compiled."""

    config: Config
    catalog: Catalog
    profile: Profile
    store: Store
    compiled: Mapping[str, Compiled]
    unavailable: Mapping[str, Refusal]
    memory_bytes: int
    gpus: Gpus = Gpus()

    @property
    def experts(self) -> dict[str, Expert]:
        """What the controller needs to know of each expert."""
        usage = probabilities(self.catalog)
        return {
            name: Expert(
                name,
                {device: footprint(c) for device, c in self._compiled_by_device(name)},
                {device: self._cost(device, c) for device, c in self._compiled_by_device(name)},
                min(self.catalog.bundles[name].manifest.model.max_batch, self.profile.batch_cap),
                usage.get(name, 0.0),
            )
            for name in self.compiled
        }

    def compiled_on(self, device: str) -> Mapping[str, Compiled]:
        """The experts as this device runs them."""
        return self.compiled if device == CPU else self.gpus.compiled

    def without(self, device: str, why: str) -> Installation:
        """The same box, with a GPU less."""
        left = tuple(gpu for gpu in self.gpus.used if gpu_name(gpu) != device)
        return replace(self, gpus=replace(self.gpus, used=left, trouble={**self.gpus.trouble, device: why}))

    def _compiled_by_device(self, expert: str) -> Iterator[tuple[str, Compiled]]:
        for device in self.devices:
            if expert in self.compiled_on(device.name):
                yield device.name, self.compiled_on(device.name)[expert]

    def _cost(self, device: str, compiled: Compiled) -> Cost:
        speed = 1.0 if device == CPU else self.profile.gpu_speed
        return self.profile.cost(compiled.item_seconds / speed, compiled.fixed_seconds / speed, compiled.bytes)

    @property
    def devices(self) -> tuple[Device, ...]:
        memory, slots = self.config.memory, self.config.executors.load_slots
        working = int(memory.gpu_activations)
        cpu_bytes = weights_budget(self.config, self.memory_bytes, len(self.gpus.used))
        return (
            *(
                Device(gpu_name(gpu), int(memory.gpu_weights or GPU_SHARE * gpu.free_bytes - working), slots, working)
                for gpu in self.gpus.used
            ),
            Device(CPU, cpu_bytes, slots, int(memory.activations)),
        )

    @property
    def executors(self) -> tuple[Executor, ...]:
        count = self.config.executors.cpu or self.profile.cpu_executors or devices.cores()
        gpus = (gpu_name(gpu) for gpu in self.gpus.used)
        return (
            *(Executor(f"{name}-0", name) for name in gpus),  # runs from several threads make a GPU's memory grow
            *(Executor(f"{CPU}-{number}", CPU) for number in range(count)),
        )

    def controller(self) -> Controller:
        """Raises ConfigError when the experts that shall stay do not fit together."""
        special = self.config.experts
        made = Controller(
            self.catalog.graph,
            self.experts,
            self.devices,
            self.executors,
            self.unavailable,
            pinned=special.pin,
            preload=special.preload,
            policy=POLICIES[self.config.scheduler.policy],
        )
        staying = {name for ledger in made.ledgers.values() for name in ledger.pinned}
        for name in special.pin:
            if name in self.compiled and name not in staying:
                raise ConfigError(
                    f"experts.pin: {name} has no room beside the others", "raise memory.weights, or pin fewer"
                )
        return made


def install(config: Config, report: Report = lambda expert, result: None) -> Installation:
    """Read, check and compile. `report` hears of each expert that had to be compiled, or could not be.

    Raises ConfigError, CatalogError or StoreError when nothing could serve at all.
    """
    profile = profiles.load(config.paths.profile)
    catalog = catalogs.load(config.paths.catalog)
    _check_named(config, catalog)
    store = Store(config.paths.store)
    unavailable = {name: refusal_of(error) for name, error in catalog.broken.items()}
    for name, error in catalog.broken.items():
        report(name, error)
    sound, waiting = [], set[str]()
    for name, bundle in catalog.bundles.items():
        try:
            catalogs.verify(bundle)
        except ApplianceError as error:
            unavailable[name] = refusal_of(error)
            report(name, error)
            continue
        sound.append(bundle)
        if store.find(bundle) is None:
            waiting.add(name)

    def tell(name: str, result: Compiled | ApplianceError) -> None:
        if name in waiting:
            report(name, result)

    found = dict[str, Compiled]()
    for name, result in compile_bundles(store, sound, report=tell, jobs=min(devices.cores(), COMPILE_JOBS)).items():
        if isinstance(result, ApplianceError):
            unavailable[name] = refusal_of(result)
        else:
            found[name] = result
    gpus = _install_gpus(config, [bundle for bundle in sound if bundle.manifest.name in found])
    compiled = dict(sorted(found.items()))
    return Installation(config, catalog, profile, store, compiled, unavailable, devices.memory_bytes(), gpus)


def _install_gpus(config: Config, bundles: Sequence[Bundle]) -> Gpus:
    """Which GPUs can be used, and the experts compiled for them. One that cannot be is served by the CPU alone."""
    wanted = config.executors.gpus
    if wanted == 0:
        return Gpus()
    there = devices.gpus()
    trouble = {gpu_name(gpu): why for gpu in there if (why := cuda.usable_gpu(gpu.index)) is not None}
    usable = [gpu for gpu in there if gpu_name(gpu) not in trouble]
    if wanted is not None and len(usable) < wanted:
        trouble.setdefault("gpu", f"executors.gpus is {wanted}, and {len(usable)} can be used")
    used = tuple(usable[:wanted])
    if not used:
        return Gpus(trouble=trouble)
    store = Store(config.paths.store, "cuda")
    results = compile_bundles(store, bundles, report=lambda *_: None, jobs=min(devices.cores(), COMPILE_JOBS))
    compiled = {name: result for name, result in results.items() if isinstance(result, Compiled)}
    return Gpus(used, store, compiled, trouble)


def _check_named(config: Config, catalog: Catalog) -> None:
    """Raises ConfigError for an expert that the settings name and the catalogue lacks."""
    for key, names in (("pin", config.experts.pin), ("preload", config.experts.preload)):
        for name in names:
            if name not in catalog.bundles and name not in catalog.broken:
                raise ConfigError(f"experts.{key} names {name}, which has no bundle", "correct the name")


def waiting_to_compile(config: Config) -> list[Bundle]:
    """The bundles that `install` would have to compile."""
    store = Store(config.paths.store)
    return [b for b in catalogs.load(config.paths.catalog).bundles.values() if store.find(b) is None]


def probabilities(catalog: Catalog) -> dict[str, float]:
    """How likely a request uses each expert, from the components' usage; equal where the graph names none.

    A subsequent expert counts with all who may lead to it: the share of conditional edges taken is not known here.
    """
    weights = {component: catalog.usage.get(component, 0.0) for component in catalog.graph.entries}
    total = sum(weights.values())
    if not total:
        weights, total = dict.fromkeys(weights, 1.0), float(len(weights) or 1)
    chances = dict[str, float]()
    for component, expert in catalog.graph.entries.items():
        chances[expert] = chances.get(expert, 0.0) + weights[component] / total
    for expert, before in catalog.graph.before.items():
        chances[expert] = min(1.0, chances.get(expert, 0.0) + sum(chances.get(name, 0.0) for name in before))
    return chances


def footprint(compiled: Compiled) -> Footprint:
    return Footprint(
        compiled.segments,
        compiled.private_bytes,
        compiled.activation_fixed_bytes,
        compiled.activation_item_bytes,
    )


def refusal_of(error: ApplianceError) -> Refusal:
    return Refusal(error.reason, str(error))


def checked(config: Config, *, prune: bool = False, tell: Progress = lambda what, done, of: None) -> dict[str, Any]:
    """What `appliance check` tells: the catalogue, what is unavailable and why, and whether the budget holds it.

    Reads every byte of the store first; what was damaged has been compiled again when this returns. `prune` removes
    compiled experts that no bundle names any more. `tell` hears how far it is: bytes read, then experts compiled.
    """
    damaged = Store(config.paths.store).check(tell=partial(tell, "bytes"))
    waiting = {bundle.manifest.name for bundle in waiting_to_compile(config)}
    compiled = set[str]()

    def count(name: str, result: Compiled | ApplianceError) -> None:
        compiled.update({name} & waiting)
        tell("experts", len(compiled), len(waiting))

    made = install(config, count)
    unused = made.store.unused(made.catalog)
    freed_bytes = made.store.prune(made.catalog) if prune else None
    device = made.devices[-1]
    footprints, budget = {name: e.footprints[CPU] for name, e in made.experts.items()}, device.budget_bytes
    total = sum({s.id: s.bytes for f in footprints.values() for s in f.segments}.values())
    total += sum(f.private_bytes for f in footprints.values())
    ledger = Ledger(device, footprints)
    return {
        "catalog": str(config.paths.catalog),
        "store": str(made.store.folder),
        "profile": made.profile.name,
        "experts": len(footprints),
        "architectures": len({compiled.architecture for compiled in made.compiled.values()}),
        "versions": {name: list(versions) for name, versions in made.catalog.versions.items()},
        "components": len(made.catalog.graph.entries),
        "products": len(made.catalog.products),
        "weights_bytes": total,
        "budget_bytes": budget,
        "configured_budget_bytes": int(config.memory.weights),
        "budget_share": budget / total if total else 1.0,
        "memory_bytes": made.memory_bytes,
        "gpus": [gpu.name for gpu in made.gpus.used],
        "gpu_trouble": dict(made.gpus.trouble),
        "too_large": sorted(name for name in footprints if not ledger.ever_fits(name)),
        "largest_expert": max(footprints, key=lambda name: footprints[name].weights_bytes, default=None),
        "executors": [executor.name for executor in made.executors],
        "damaged": {str(damage.path): damage.reason for damage in damaged},
        "unused": unused,
        "freed_bytes": freed_bytes,
        "unavailable": {name: {"reason": r.reason, "detail": r.detail} for name, r in made.unavailable.items()},
        "graph": draw(made.catalog.graph),
    }
