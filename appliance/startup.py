"""What serving, checking and simulating do first: read the catalogue, compile what is new, and say what the box has.

An expert that is broken or cannot be compiled is set aside with its reason; the others serve.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from appliance import __version__
from appliance import catalog as catalogs
from appliance import profile as profiles
from appliance.catalog import Bundle, Catalog
from appliance.config import Config
from appliance.contract import Serving
from appliance.core import policies
from appliance.core.controller import Controller
from appliance.core.costs import Cost
from appliance.core.graph import draw
from appliance.core.memory import Ledger
from appliance.core.policies import POLICIES, Policy
from appliance.core.slab import SLACK
from appliance.core.types import Device, Executor, Expert, Footprint, Overflow, Precision, Refusal, bytes_together
from appliance.drivers import devices, runtime
from appliance.drivers.journal import Opening
from appliance.engine import cuda
from appliance.errors import ApplianceError, ConfigError, VariantError
from appliance.profile import Choice, Hardware, Kind, Profile
from appliance.promise import activation_bytes, weights_budget
from appliance.store.compile import Report, compile_bundles
from appliance.store.store import PROVIDERS, Compiled, Store

CPU = "cpu"
GPU_SHARE = 0.8
"""Of a GPU's free memory for weights and activations, unless settings say otherwise: its libraries need some too."""
COMPILE_JOBS = 2
"""Children that compile at the same time, where there are cores for them: each takes gigabytes for a large model."""

Forecast = Callable[["Installation"], Sequence[Mapping[str, Any]]]
"""Says of each product of the box what it will be like to serve."""
Progress = Callable[[str, int, int], None]
"""Hears what is counted ("bytes" read, "experts" compiled), how many are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs in use, their experts, and by its name why another one that is there or asked for is not in use.

    `unavailable` are the experts that cannot be compiled for GPUs; the CPU serves them.
    """

    used: tuple[devices.Gpu, ...] = ()
    store: Store | None = None
    compiled: Mapping[str, Compiled] = field(default_factory=dict)
    trouble: Mapping[str, str] = field(default_factory=dict)
    unavailable: Mapping[str, Refusal] = field(default_factory=dict)


def gpu_name(gpu: devices.Gpu) -> str:
    return f"cuda:{gpu.index}"


def kind_of(device: str) -> Kind:
    """Of the device that is called so."""
    return "cpu" if device == CPU else "cuda"


def host_share(compiled: Mapping[str, Compiled], tier_bytes: int) -> float:
    """How likely a GPU finds in host memory what it has to load: as much of all weights as fits there."""
    size = bytes_together(map(footprint, compiled.values()))
    return min(tier_bytes / size, 1.0) if size else 0.0


@dataclass(frozen=True, slots=True)
class Variants:
    """The bundles of the experts that the CPU serves in int8, and why others that have a variant are served in full
    precision all the same."""

    served: Mapping[str, Bundle] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Installation:
    """A box as it can serve: everything read, checked and compiled."""

    config: Config
    catalog: Catalog
    choice: Choice
    store: Store
    compiled: Mapping[str, Compiled]
    unavailable: Mapping[str, Refusal]
    memory_bytes: int
    gpus: Gpus = Gpus()
    variants: Variants = Variants()

    @property
    def profile(self) -> Profile:
        return self.choice.profile

    @property
    def split_bytes(self) -> int:
        """Main memory that weights, activations and what is pinned for GPUs share, as a profile may split it anew."""
        gpus = len(self.gpus.used)
        pinned = gpus * int(self.config.memory.gpu_host_tier)
        return weights_budget(self.config, self.memory_bytes, gpus) + activation_bytes(self.config) + pinned

    @property
    def policy(self) -> Policy:
        return policies.tuned(POLICIES[self.config.scheduler.policy], self.profile.hold_share)

    @property
    def experts(self) -> dict[str, Expert]:
        """What the controller needs to know of each expert."""
        usage = probabilities(self.catalog)
        near = host_share(self.gpus.compiled, int(self.config.memory.gpu_host_tier))
        return {
            name: Expert(
                name,
                {device: footprint(c) for device, c in self._compiled_by_device(name)},
                {device: self._cost(device, c, near) for device, c in self._compiled_by_device(name)},
                min(self.catalog.bundles[name].manifest.model.max_batch, self.profile.batch_cap),
                usage.get(name, 0.0),
            )
            for name in self.compiled
        }

    def compiled_on(self, device: str) -> Mapping[str, Compiled]:
        """The experts as this device runs them."""
        return self.compiled if device == CPU else self.gpus.compiled

    def bundles_on(self, device: str) -> Mapping[str, Bundle]:
        """The bundles that these were compiled from."""
        return {**self.catalog.bundles, **self.variants.served} if device == CPU else self.catalog.bundles

    def without(self, device: str, why: str) -> Installation:
        """The same box, with a GPU less."""
        left = tuple(gpu for gpu in self.gpus.used if gpu_name(gpu) != device)
        return replace(self, gpus=replace(self.gpus, used=left, trouble={**self.gpus.trouble, device: why}))

    def _compiled_by_device(self, expert: str) -> Iterator[tuple[str, Compiled]]:
        for device in self.devices:
            if expert in self.compiled_on(device.name):
                yield device.name, self.compiled_on(device.name)[expert]

    def _cost(self, device: str, compiled: Compiled, near: float) -> Cost:
        once = compiled.item_seconds, compiled.fixed_seconds
        return self.profile.cost(kind_of(device), compiled.architecture, compiled.bytes, once, near)

    @property
    def devices(self) -> tuple[Device, ...]:
        memory, slots = self.config.memory, self.config.executors.load_slots
        working, steps = int(memory.gpu_activations), cuda.BATCH_SIZES
        cpu_bytes = weights_budget(self.config, self.memory_bytes, len(self.gpus.used))
        return (
            *(Device(gpu_name(gpu), _gpu_budget(self.config, gpu), slots, working, steps) for gpu in self.gpus.used),
            Device(CPU, cpu_bytes, slots, int(memory.activations)),
        )

    @property
    def executors(self) -> tuple[Executor, ...]:
        count = self.config.executors.cpu or devices.cores()
        gpus = (gpu_name(gpu) for gpu in self.gpus.used)
        return (
            *(Executor(f"{name}-0", name) for name in gpus),  # runs from several threads make a GPU's memory grow
            *(Executor(f"{CPU}-{number}", CPU) for number in range(count)),
        )

    @property
    def serving(self) -> dict[tuple[str, str], Serving]:
        """What verdicts name of whom was asked, by executor and expert."""
        bundles = {executor.device: self.bundles_on(executor.device) for executor in self.executors}
        return {
            (executor.name, name): Serving(
                str(compiled.version),
                bundles[executor.device][name].precision,
                compiled.weights_sha256,
                bundles[executor.device][name].manifest.head.threshold,
                executor.device,
            )
            for executor in self.executors
            for name, compiled in self.compiled_on(executor.device).items()
        }

    @property
    def opening(self) -> Opening:
        """What a journal says of the controller."""
        config = self.config
        return Opening(
            __version__,
            self.catalog.graph,
            tuple(self.experts.values()),
            self.devices,
            self.executors,
            dict(self.unavailable),
            config.experts.pin,
            config.experts.preload,
            config.scheduler.policy,
            config.priorities,
            config.limits.waiting_pictures,
            Overflow(config.limits.overflow),
            demands(self.catalog),
            self.profile.hold_share,
        )

    def controller(self) -> Controller:
        """Raises ConfigError when the experts that shall stay do not fit together, and that is no fault of a GPU."""
        made = self.lenient_controller()
        for name in self.unpinned(made.ledgers):
            if not self.gpus.trouble and not self.gpus.unavailable:
                raise ConfigError(
                    f"experts.pin: {name} has no room beside the others", "raise memory.weights, or pin fewer"
                )
        return made

    def lenient_controller(self) -> Controller:
        """Pinned experts that have no room beside the others are preloaded as far as memory is free."""
        return Controller(
            self.catalog.graph,
            self.experts,
            self.devices,
            self.executors,
            self.unavailable,
            pinned=self.config.experts.pin,
            preload=self.config.experts.preload,
            policy=self.policy,
            priorities=self.config.priorities,
            most_waiting=self.config.limits.waiting_pictures,
            overflow=Overflow(self.config.limits.overflow),
            products=demands(self.catalog),
        )

    def unpinned(self, ledgers: Mapping[str, Ledger]) -> tuple[str, ...]:
        """Of experts.pin, those that have no room beside the others and so may leave."""
        staying = {name for ledger in ledgers.values() for name in ledger.pinned}
        able = self.compiled.keys() - self.unavailable.keys()
        return tuple(name for name in self.config.experts.pin if name in able and name not in staying)


def install(
    config: Config, report: Report = lambda expert, result: None, *, profile: Profile | None = None
) -> Installation:
    """Read, check and compile. `report` hears of each expert that had to be compiled, or could not be. The `profile` is
    that which the settings name, unless another is given.

    Raises ConfigError, CatalogError or StoreError when nothing could serve at all.
    """
    profile = profile or profiles.load(config.paths.profile)
    catalog = catalogs.load(config.paths.catalog)
    _check_named(config, catalog)
    catalogs.check_places(catalog, config.limits.most_placements)
    sound, broken = _verified(catalog)
    for name, error in broken.items():
        report(name, error)
    store = Store(config.paths.store)
    there, trouble = _usable_gpus(config)
    precision = _precision(config, profile, there)
    compiled, failed, variants = _compiled_in(precision, store, sound, report)
    choice = profiles.chosen(profile, hardware(there), graph_sha256(catalog, compiled))
    config = choice.applied(config)
    unavailable = {name: refusal_of(error) for name, error in (broken | failed).items()}
    used = there[: config.executors.gpus]
    gpus = _install_gpus(config, used, trouble, [bundle for bundle in sound if bundle.manifest.name in compiled])
    return Installation(config, catalog, choice, store, compiled, unavailable, devices.memory_bytes(), gpus, variants)


def _precision(config: Config, profile: Profile, gpus: Sequence[devices.Gpu]) -> Precision:
    """As the settings have it, or else the profile, if it is of this box."""
    fitting = profile if profile.misfit(hardware(gpus)) is None else profiles.DEFAULT
    return fitting.applied(config).experts.precision


def hardware(gpus: Sequence[devices.Gpu] = ()) -> Hardware:
    """Of this box, as a profile remembers it."""
    return Hardware(
        processor=devices.processor(),
        cores=devices.cores(),
        memory_bytes=devices.memory_bytes(),
        gpus=tuple(f"{gpu.name}, driver {gpu.driver}" for gpu in gpus),
        runtime=f"onnxruntime {runtime.VERSION}",
    )


def graph_sha256(catalog: Catalog, compiled: Mapping[str, Compiled]) -> str:
    """Of the experts' networks and of how they follow each other; their weights do not matter."""
    known = {name: one.architecture for name, one in sorted(compiled.items())}
    return hashlib.sha256(f"{known}\n{draw(catalog.graph)}".encode()).hexdigest()


def _verified(catalog: Catalog) -> tuple[list[Bundle], dict[str, ApplianceError]]:
    """The bundles whose files are what their manifests say, and what is wrong with the others."""
    sound, broken = [], dict[str, ApplianceError](catalog.broken)
    for name, bundle in catalog.bundles.items():
        try:
            catalogs.verify(bundle)
        except ApplianceError as error:
            broken[name] = error
        else:
            sound.append(bundle)
    return sound, broken


def _compiled_in(
    precision: Precision, store: Store, bundles: Sequence[Bundle], report: Report
) -> tuple[dict[str, Compiled], dict[str, ApplianceError], Variants]:
    """The experts in the store by name, why the others cannot be, and which of them in int8.

    An expert whose variant cannot serve is compiled in full precision, as all are that have none.
    """
    variants, refused = _sound_variants(bundles) if precision == "int8" else ({}, {})
    compiled, failed = _compiled(store, list(variants.values()), report)
    refused |= failed
    whole, failed = _compiled(store, [b for b in bundles if b.manifest.name not in compiled], report)
    served = {name: variants[name] for name in compiled}
    told = Variants(served, {name: refusal_of(error) for name, error in refused.items()})
    return dict(sorted((compiled | whole).items())), failed, told


def compiled_int8(made: Installation) -> tuple[dict[str, Compiled], Variants]:
    """The experts of a box that could be served in int8, in it, whatever it serves."""
    bundles = [made.catalog.bundles[name] for name in made.compiled]
    compiled, _, variants = _compiled_in("int8", made.store, bundles, lambda expert, result: None)
    return {name: compiled[name] for name in variants.served}, variants


def _sound_variants(bundles: Sequence[Bundle]) -> tuple[dict[str, Bundle], dict[str, ApplianceError]]:
    """The bundles in int8, of those that have it, and what is wrong with the others' variants."""
    sound, broken = dict[str, Bundle](), dict[str, ApplianceError]()
    for bundle in bundles:
        try:
            found = catalogs.verified_int8(bundle)
        except VariantError as error:
            broken[bundle.manifest.name] = error
        else:
            sound |= {} if found is None else {bundle.manifest.name: found}
    return sound, broken


def _compiled(
    store: Store, bundles: Sequence[Bundle], report: Report
) -> tuple[dict[str, Compiled], dict[str, ApplianceError]]:
    """The experts in the store by name, and why the others cannot be. `report` hears of who was not there before."""
    waiting = {bundle.manifest.name for bundle in bundles if store.find(bundle) is None}

    def tell(name: str, result: Compiled | ApplianceError) -> None:
        if name in waiting:
            report(name, result)

    results = compile_bundles(store, bundles, report=tell, jobs=min(devices.cores(), COMPILE_JOBS))
    made = {name: result for name, result in sorted(results.items()) if isinstance(result, Compiled)}
    return made, {name: result for name, result in results.items() if isinstance(result, ApplianceError)}


def _usable_gpus(config: Config) -> tuple[tuple[devices.Gpu, ...], dict[str, str]]:
    """As many of the GPUs that can be used as the settings want, and why by its name another one cannot be."""
    wanted = config.executors.gpus
    if wanted == 0:
        return (), {}
    there = devices.gpus()
    trouble = {gpu_name(gpu): why for gpu in there if (why := _why_not(config, gpu)) is not None}
    usable = tuple(gpu for gpu in there if gpu_name(gpu) not in trouble)
    if wanted is not None and len(usable) < wanted:
        trouble.setdefault("gpu", f"executors.gpus is {wanted}, and {len(usable)} can be used")
    return usable[:wanted], trouble


def _install_gpus(
    config: Config, used: tuple[devices.Gpu, ...], trouble: Mapping[str, str], bundles: Sequence[Bundle]
) -> Gpus:
    """With the experts compiled for them. One that cannot be is served by the CPU alone."""
    if not used:
        return Gpus(trouble=trouble)
    store = Store(config.paths.store, "cuda")
    compiled, failed = _compiled(store, bundles, lambda *_: None)
    return Gpus(used, store, compiled, trouble, {name: refusal_of(error) for name, error in failed.items()})


def _why_not(config: Config, gpu: devices.Gpu) -> str | None:
    """Why a GPU cannot be used, if it cannot."""
    if (why := cuda.usable_gpu(gpu.index)) is not None:
        return why
    if _gpu_budget(config, gpu) > 0:
        return None
    working = int(config.memory.gpu_activations)
    return (
        f"{gpu.free_bytes} of its {gpu.memory_bytes} bytes are free, of which {GPU_SHARE:.0%} may be used, and"
        f" memory.gpu_activations asks for {working} (end what else uses it, or lower that)"
    )


def _gpu_budget(config: Config, gpu: devices.Gpu) -> int:
    """For weights; none where activations, running and kept, leave nothing. They lie in a block with room for gaps."""
    memory = config.memory
    left = GPU_SHARE * gpu.free_bytes - 2 * int(memory.gpu_activations)
    return int(memory.gpu_weights or left / (1 + SLACK))


def _check_named(config: Config, catalog: Catalog) -> None:
    """Raises ConfigError for an expert that the settings name and the catalogue lacks."""
    for key, names in (("pin", config.experts.pin), ("preload", config.experts.preload)):
        for name in names:
            if name not in catalog.bundles and name not in catalog.broken:
                raise ConfigError(f"experts.{key} names {name}, which has no bundle", "correct the name")


def waiting_to_compile(config: Config) -> list[Bundle]:
    """The bundles that `install` would have to compile."""
    store, bundles = Store(config.paths.store), catalogs.load(config.paths.catalog).bundles.values()
    is_int8 = _precision(config, profiles.load(config.paths.profile), _usable_gpus(config)[0]) == "int8"
    wanted = [(bundle.in_int8 if is_int8 else None) or bundle for bundle in bundles]
    return [bundle for bundle in wanted if store.find(bundle) is None]


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


def demands(catalog: Catalog) -> dict[str, dict[str, int]]:
    """By product, how many placements of each component it has."""
    return {
        name: dict(Counter(placement.component for placement in product.recipe.placements))
        for name, product in catalog.products.items()
    }


def footprint(compiled: Compiled) -> Footprint:
    return Footprint(
        compiled.segments,
        compiled.private_bytes,
        compiled.activation_fixed_bytes,
        compiled.activation_item_bytes,
    )


def refusal_of(error: ApplianceError) -> Refusal:
    return Refusal(error.reason, str(error))


def _stores(config: Config) -> list[Store]:
    """Those that are on this box already."""
    stores = (Store(config.paths.store, provider) for provider in PROVIDERS)
    return [store for store in stores if store.folder.is_dir()]


def checked(
    config: Config,
    *,
    prune: bool = False,
    tell: Progress = lambda what, done, of: None,
    forecast: Forecast = lambda made: (),
) -> dict[str, Any]:
    """What `appliance check` tells: the catalogue, what is unavailable and why, and whether the budgets hold it.

    Reads every byte of the stores first; what was damaged has been compiled again when this returns. `prune` removes
    compiled experts that no bundle names any more. `tell` hears how far it is: bytes read, then experts compiled.
    """
    damaged = [found for store in _stores(config) for found in store.check(tell=partial(tell, "bytes"))]
    made = install(config, _counting(config, tell))
    in_use = {store.provider: store for store in (made.store, made.gpus.store) if store is not None}
    # Two objects for one folder would be in each other's way.
    stores = [in_use.get(store.provider, store) for store in _stores(config)]
    unused = {name: size for store in stores for name, size in store.unused(made.catalog).items()}
    freed_bytes = sum(store.prune(made.catalog) for store in stores) if prune else None
    return {
        **_what_is_there(made),
        **_what_fits(made),
        "int8": _what_int8_does(made),
        "products": list(forecast(made)),
        "damaged": {str(damage.path): damage.reason for damage in damaged},
        "unused": unused,
        "freed_bytes": freed_bytes,
        "unavailable": _told(made.unavailable),
        "gpu_unavailable": _told(made.gpus.unavailable),
        "graph": draw(made.catalog.graph),
    }


def _counting(config: Config, tell: Progress) -> Report:
    """Tells how many of the experts that have to be compiled are done."""
    waiting = {bundle.manifest.name for bundle in waiting_to_compile(config)}
    done = set[str]()

    def count(name: str, result: Compiled | ApplianceError) -> None:
        done.update({name} & waiting)
        tell("experts", len(done), len(waiting))

    return count


def _what_is_there(made: Installation) -> dict[str, Any]:
    return {
        "catalog": str(made.config.paths.catalog),
        "store": str(made.store.folder),
        "profile": made.profile.name,
        "profile_refused": made.choice.refused,
        "profile_outdated": made.choice.outdated,
        "profile_trouble": made.choice.trouble,
        "experts": len(made.compiled),
        "architectures": len({compiled.architecture for compiled in made.compiled.values()}),
        "versions": {name: list(versions) for name, versions in made.catalog.versions.items()},
        "components": len(made.catalog.graph.entries),
        "memory_bytes": made.memory_bytes,
        "gpus": [gpu.name for gpu in made.gpus.used],
        "gpu_trouble": dict(made.gpus.trouble),
        "executors": [executor.name for executor in made.executors],
        "threads": made.profile.threads,
        "load_slots": made.config.executors.load_slots,
        "batch_cap": made.profile.batch_cap,
        "activation_bytes": int(made.config.memory.activations),
        "hold_share": made.policy.hold_share,
    }


def _what_int8_does(made: Installation) -> dict[str, Any]:
    """How many experts are served in int8, what their files have less, and which variants cannot be used and why."""
    served, full = made.variants.served, made.catalog.bundles
    saved = sum(full[name].manifest.model.bytes - bundle.manifest.model.bytes for name, bundle in served.items())
    variants = sum(bundle.manifest.variants.int8 is not None for bundle in full.values())
    return {
        "precision": made.config.experts.precision,
        "variants": variants,
        "experts": len(served),
        "saved_bytes": saved,
        "refused": _told(made.variants.refused),
    }


def _what_fits(made: Installation) -> dict[str, Any]:
    footprints = {name: footprint(compiled) for name, compiled in made.compiled.items()}
    total = bytes_together(footprints.values())
    *gpus, cpu = made.devices
    ledgers = made.lenient_controller().ledgers
    return {
        "weights_bytes": total,
        "budget_bytes": cpu.budget_bytes,
        "configured_budget_bytes": int(made.config.memory.weights),
        "budget_share": cpu.budget_bytes / total if total else 1.0,
        "gpu_budgets_bytes": {gpu.name: gpu.budget_bytes for gpu in gpus},
        "too_large": [name for name in footprints if not any(ledger.ever_fits(name) for ledger in ledgers.values())],
        "unpinned": list(made.unpinned(ledgers)),
        "largest_expert": max(footprints, key=lambda name: footprints[name].weights_bytes, default=None),
    }


def _told(refusals: Mapping[str, Refusal]) -> dict[str, dict[str, str]]:
    return {name: {"reason": refusal.reason, "detail": refusal.detail} for name, refusal in refusals.items()}
