"""profiles/*.json: how a box is configured best, and what running and loading costs there.

`appliance profile` measures and writes one for the box it runs on. `default.json` serves any box: its load costs are
cautious, running costs come from the brief measurement that compiling an architecture makes, and what it leaves open
stays as the settings have it. What appliance.toml says goes before what a profile says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.config import Config
from appliance.core import costs
from appliance.core.costs import Cost
from appliance.core.types import Precision
from appliance.errors import ConfigError

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=4096)]
"""Each may be a thread: what is more is no box of ours."""
Size = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Kind = Literal["cpu", "cuda"]
"""Of a device: costs are those of a kind, and all GPUs of a box are taken to be like the first."""
MEMORY_TOLERANCE = 0.05
"""The kernel keeps a little more or less for itself from one version to the next."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hardware(Part):
    """What costs depend on."""

    processor: str
    cores: Count
    memory_bytes: Size
    gpus: tuple[str, ...] = Field((), description="Name and driver of each.")
    runtime: str = Field(description="Name and version.")

    def differs(self, here: Hardware) -> str | None:
        """In what another box is not this one, in words."""
        if abs(self.memory_bytes - here.memory_bytes) > MEMORY_TOLERANCE * self.memory_bytes:
            return f"memory_bytes was {self.memory_bytes} and is {here.memory_bytes}"
        for name in ("processor", "cores", "gpus", "runtime"):
            then, now = getattr(self, name), getattr(here, name)
            if then != now:
                return f"{name} was {then} and is {now}"
        return None


class Found(Part):
    """Images per second that a search came to. `live` and `default_live` are medians of the same rounds."""

    workload: str
    objective: str
    trials: Size
    confirmed: Size = Field(description="Configurations that were served live.")
    predicted: float
    live: float
    default_live: float


class Origin(Part):
    """Where a profile comes from."""

    version: str
    made_at: str
    hardware: Hardware
    graph_sha256: str
    found: Found


class Running(Part):
    """K and B of an architecture on one kind of device, on the CPU with the profile's threads, and how far off they are
    (median)."""

    item_seconds: Seconds
    fixed_seconds: Seconds
    fit_error: Share


class Loads(Part):
    """Loads from one tier to one kind of device."""

    fixed_seconds: Seconds = Field(description="Part of a load that does not depend on its bytes.")
    bytes_per_second: Rate

    def seconds(self, weights_bytes: int) -> float:
        return self.fixed_seconds + weights_bytes / self.bytes_per_second


class OnGpus(Part):
    """What was found for the GPUs of a box, and measured on the first of them. What is None was not."""

    count: Size | None = Field(None, description="GPUs that run experts; None: all that can.")
    weights_bytes: Size | None = Field(
        None, description="The split of each one's memory; None: as the settings have it."
    )
    activation_bytes: Size | None = None
    host_tier_bytes: Size | None = Field(None, description="Pinned main memory for each.")
    from_disk: Loads | None = None
    from_host: Loads | None = Field(None, description="Of what is in pinned main memory.")
    running: Mapping[str, Running] = Field({}, description="By architecture, as compiled for GPUs.")


class Profile(Part):
    schema_: Literal[2] = Field(alias="schema")
    name: str
    cpu_executors: Count | None = Field(None, description="None: one per usable core.")
    threads: Count = Field(1, description="Of each run on the CPU.")
    load_slots: Count | None = Field(None, description="Loads in flight per device; None: as the settings have it.")
    batch_cap: Count = Field(16, description="Largest batch, whatever an expert allows.")
    weights_bytes: Size | None = Field(None, description="The split of main memory; None: as the settings have it.")
    activation_bytes: Size | None = None
    precision: Precision | None = Field(None, description="Of experts; None: as the settings have it.")
    hold_share: Share | None = Field(None, description="The policy's; None: as it is.")
    load_fixed_seconds: Seconds = Field(0.002, description="Part of a load that does not depend on its bytes.")
    disk_bytes_per_second: Rate = Field(5e8, description="Read bandwidth for weights.")
    running: Mapping[str, Running] = Field({}, description="By architecture; others as compiling measured them.")
    gpus: OnGpus = OnGpus()
    gpu_speed: Rate = Field(10.0, description="Times as fast as the CPU: a guess for what was not measured on a GPU.")
    origin: Origin | None = Field(None, description="None: it is for any box.")

    def running_on(self, kind: Kind) -> Mapping[str, Running]:
        """What was measured, by architecture."""
        return self.running if kind == "cpu" else self.gpus.running

    def load_seconds(self, kind: Kind, weights_bytes: int, host_share: float = 0.0) -> float:
        """From the disk, but so large a share of the loads of a GPU from host memory. Into a GPU that was not measured
        as into main memory: the disk is what is slow."""
        disk = Loads(fixed_seconds=self.load_fixed_seconds, bytes_per_second=self.disk_bytes_per_second)
        if kind == "cpu":
            return disk.seconds(weights_bytes)
        far = (self.gpus.from_disk or disk).seconds(weights_bytes)
        near = far if self.gpus.from_host is None else self.gpus.from_host.seconds(weights_bytes)
        return costs.mixed(far, near, host_share)

    def cost(
        self, kind: Kind, architecture: str, weights_bytes: int, compiled: tuple[float, float], host_share: float = 0.0
    ) -> Cost:
        """K and B as measured on this kind of device, or else what they were when the architecture was `compiled`, on a
        GPU as many times as fast as is guessed; L from the bytes and where they are."""
        load_seconds = self.load_seconds(kind, weights_bytes, host_share)
        if (known := self.running_on(kind).get(architecture)) is not None:
            return Cost(known.item_seconds, known.fixed_seconds, load_seconds)
        speed = 1.0 if kind == "cpu" else self.gpu_speed
        return Cost(compiled[0] / speed, compiled[1] / speed, load_seconds)

    def misfit(self, hardware: Hardware) -> str | None:
        """Why this is no profile of a box; None if it is."""
        return None if self.origin is None else self.origin.hardware.differs(hardware)

    def is_outdated(self, graph_sha256: str) -> bool:
        """Whether experts have come, gone or changed their networks or their order since it was made."""
        return self.origin is not None and self.origin.graph_sha256 != graph_sha256

    def without_split(self) -> Profile:
        """Memory stays as the settings split it; costs and counts are those that were found."""
        split = dict.fromkeys(("weights_bytes", "activation_bytes"))
        gpus = self.gpus.model_copy(update={**split, "host_tier_bytes": None})
        return self.model_copy(update={**split, "gpus": gpus})

    def applied(self, config: Config) -> Config:
        """The settings, with what they leave open as it is best here."""
        gpus = self.gpus
        memory = {
            "weights": self.weights_bytes,
            "activations": self.activation_bytes,
            "gpu_weights": gpus.weights_bytes,
            "gpu_activations": gpus.activation_bytes,
            "gpu_host_tier": gpus.host_tier_bytes,
        }
        executors = {"cpu": self.cpu_executors, "load_slots": self.load_slots, "gpus": gpus.count}
        experts = {"precision": self.precision}

        def open_ones(wanted: Mapping[str, int | str | None], given: set[str]) -> dict[str, int | str]:
            return {name: value for name, value in wanted.items() if value is not None and name not in given}

        return config.model_copy(
            update={
                "memory": config.memory.model_copy(update=open_ones(memory, config.memory.model_fields_set)),
                "executors": config.executors.model_copy(
                    update=open_ones(executors, config.executors.model_fields_set)
                ),
                "experts": config.experts.model_copy(update=open_ones(experts, config.experts.model_fields_set)),
            }
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """The profile that a box uses. `refused` says why it is not the one that the settings name, `outdated` that the
    experts are not those that it was made for."""

    profile: Profile
    refused: str | None = None
    outdated: bool = False

    @property
    def trouble(self) -> str | None:
        """What is wrong with the profile that the settings name, and what helps; None if nothing is."""
        if self.refused is None and self.outdated:
            return (
                f"profile {self.profile.name} was found for other experts: its split of memory is not used; "
                "run `appliance profile`"
            )
        return self.refused

    def applied(self, config: Config) -> Config:
        """The settings, with what they leave open as the profile has it. How it splits memory was found for the bytes
        of its experts: others may not even have room."""
        return (self.profile.without_split() if self.outdated else self.profile).applied(config)


DEFAULT = Profile(schema=2, name="default")
"""What `profiles/default.json` says."""


def chosen(profile: Profile, hardware: Hardware, graph_sha256: str) -> Choice:
    """A profile of another box is refused: its costs are not this one's, and may be far off."""
    why = profile.misfit(hardware)
    if why is not None:
        return Choice(
            DEFAULT, refused=f"profile {profile.name} is of another box, and not used: {why}; run `appliance profile`"
        )
    return Choice(profile, outdated=profile.is_outdated(graph_sha256))


def load(path: Path) -> Profile:
    """Raises ConfigError naming the file and the key."""
    try:
        return Profile.model_validate(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "set paths.profile in appliance.toml") from error
    except ValidationError as error:
        problems = "; ".join(": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in error.errors())
        raise ConfigError(f"{path}: {problems}", "correct these keys, or run `appliance profile`") from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or a list in a list in a list
        raise ConfigError(f"{path} is not JSON: {error}", "correct that line, or run `appliance profile`") from error


def save(profile: Profile, path: Path) -> None:
    """Whole or not at all. Raises ConfigError when it cannot be written."""
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(profile.model_dump_json(by_alias=True, indent=2, exclude_defaults=False) + "\n", "utf-8")
        beside.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "choose another place with --out") from error
