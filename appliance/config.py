"""appliance.toml as a strict schema: an unknown key is an error with its line. The only reader of settings.

Every field says what it is for; the table in docs/configuration.md is made from these descriptions.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from appliance.core.types import Precision
from appliance.errors import ConfigError
from appliance.tls import Certificates

Level = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

Topic = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$", max_length=200)]


INBOX_BYTES = 64 * 1024 * 1024
"""Pictures that have arrived and wait for their turn to be checked, in memory."""
SMALLEST_WINDOW = 4

CREDENTIALS = "$CREDENTIALS_DIRECTORY"
"""Paths of the section [mqtt] may begin so: what the unit's LoadCredential= names lies there, for the service alone."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Box(Settings):
    """Who this box is."""

    site: Level = Field("plant", description="Site name, a topic level.")
    name: Level = Field("box1", description="Box name, a topic level; also part of the MQTT client id.")


class Paths(Settings):
    """Where things lie. Relative paths are relative to the configuration file."""

    catalog: Path = Field(Path("models_onnx"), description="The expert bundles, graph and recipes.")
    state: Path = Field(
        Path("/var/lib/appliance"), description="Accepted pictures and verdicts; must survive restarts."
    )
    store: Path = Field(Path("/var/cache/appliance"), description="Compiled experts; may be deleted, is rebuilt.")
    profile: Path = Field(Path("profiles/default.json"), description="Costs and counts for this box.")
    journal: Path | None = Field(None, description="Write every event here, for `appliance simulate`; off by default.")


class Mqtt(Settings):
    """The broker that cameras publish to."""

    host: str = Field("127.0.0.1", description="Broker's host name or address.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(1883, description="Broker's port.")
    protocol: Literal["auto", "5", "3.1.1"] = Field("auto", description="MQTT version; auto tries 5, then 3.1.1.")
    root: Level = Field("coe", description="First topic level.")
    reply_prefix: Topic | None = Field(
        None,
        description="Response topics must lie below this; by default any plain topic outside `<root>/v1/` is allowed.",
    )
    username: str | None = Field(None, description="User name at the broker.")
    password_file: Path | None = Field(None, description="File whose first line is the password.")
    ca_file: Path | None = Field(
        None, description="Certificates (PEM) of the authorities that may sign the broker's; with it the link is TLS."
    )
    certificate_file: Path | None = Field(None, description="Our certificate (PEM), for a broker that asks for one.")
    key_file: Path | None = Field(None, description="Its key (PEM, without a passphrase), not open to everybody.")
    keepalive_seconds: Annotated[int, Field(ge=2, le=600)] = Field(
        15, description="A silent link is dropped after 1.5 of these."
    )
    receive_maximum: Annotated[int, Field(ge=1, le=1000)] = Field(
        64,
        description="Most pictures that the broker may send ahead; fewer when they may be large.",
    )

    @model_validator(mode="after")
    def _certificates_are_whole(self) -> Mqtt:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file go together")
        if self.certificate_file is not None and self.ca_file is None:
            raise ValueError("certificate_file needs ca_file: without it the link is no TLS")
        return self

    @property
    def certificates(self) -> Certificates | None:
        """The files of a link with TLS, None for a plain one."""
        if self.ca_file is None:
            return None
        return Certificates(self.ca_file, self.certificate_file, self.key_file)


class Broker(Settings):
    """The embedded broker, for a box without a site broker."""

    embedded: bool = Field(False, description="Run nats-server as a child process on mqtt.port.")
    folder: Path = Field(Path("broker"), description="Its files, below paths.state unless absolute.")


class Memory(Settings):
    """Byte budgets, per device."""

    weights: ByteSize = Field(ByteSize(1_000_000_000), description="Budget of the experts' weights in main memory.")
    activations: ByteSize = Field(
        ByteSize(256_000_000), description="Budget of what running batches take beside the weights, in main memory."
    )
    gpu_weights: ByteSize | None = Field(
        None,
        description="The same for weights on each GPU; from the profile by default, or else four fifths of what is "
        "free there at the start, less what activations take.",
    )
    gpu_activations: ByteSize = Field(
        ByteSize(1_000_000_000), description="The same for running batches on each GPU; the profile may say otherwise."
    )
    gpu_host_tier: ByteSize = Field(
        ByteSize(1_000_000_000),
        description="Pinned main memory, for each GPU, in which weights that left it wait to come back; the profile "
        "may say otherwise.",
    )


class Experts(Settings):
    """Experts that are treated otherwise than use alone would have it."""

    pin: tuple[Level, ...] = Field((), description="These are loaded at the start and never evicted.")
    preload: tuple[Level, ...] = Field(
        (), description="These are loaded at the start, in this order, as far as memory is free."
    )
    precision: Precision = Field(
        "full",
        description="`int8`: the CPU serves experts that have an int8 variant in it; from the profile by default.",
    )


class Executors(Settings):
    """Threads that run experts."""

    cpu: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None,
        description="CPU executors; from the profile by default. One at least: it does what a GPU fails to do.",
    )
    gpus: Annotated[int, Field(ge=0, le=16)] | None = Field(
        None,
        description="GPUs that run experts, one executor each; from the profile by default, or else all that can.",
    )
    load_slots: Annotated[int, Field(ge=1, le=16)] = Field(2, description="Loads in flight per device.")


class Scheduler(Settings):
    """Who is asked when, and who leaves when memory is needed."""

    policy: Literal["appliance", "coserve", "em+ra", "em", "none", "samba", "samba-fifo", "samba-parallel"] = Field(
        "appliance",
        description="Ours; the others are CoServe as published, its ablations and its baselines, for comparison.",
    )


class Line(Settings):
    """A line that is not treated like others. `<name>` is the topic level behind `infer`."""

    priority: Annotated[int, Field(ge=0, le=9)] = Field(
        0,
        description="Each step counts as having come 2 s earlier, for loads and runs: who comes later than that "
        "has no advantage over a picture of another line. Only the policy `appliance` minds it.",
    )
    pictures_per_second: Annotated[float, Field(gt=0)] | None = Field(
        None, description="What it may send; by default what `limits.pictures_per_second` says."
    )
    burst: Annotated[int, Field(ge=1)] | None = Field(
        None, description="So many it may send at once; by default `limits.burst`."
    )


class Limits(Settings):
    """What the box accepts."""

    picture_bytes: ByteSize = Field(ByteSize(16_000_000), description="Largest payload.")
    picture_pixels: Annotated[int, Field(ge=1)] = Field(
        25_000_000,
        description="Largest width x height; decoding takes 16 bytes of memory per pixel and executor, and the whole "
        "boards that are being cut have together no more pixels, at 3 bytes.",
    )
    pictures_per_second: Annotated[float, Field(gt=0)] | None = Field(
        None, description="What each line may send; more is answered `rate`. By default there is no limit."
    )
    burst: Annotated[int, Field(ge=1)] = Field(1000, description="So many each line may send at once, as for a board.")
    waiting_pictures: Annotated[int, Field(ge=1)] = Field(
        10_000, description="Pictures scheduled at once; `overflow` says what becomes of the rest."
    )
    overflow: Literal["block", "reject", "oldest"] = Field(
        "block",
        description="`block`: it waits on disk, and when that is full nothing more is acknowledged. The others answer "
        "`queue-full` at once: `reject` to the picture that comes, `oldest` to the one that has waited longest and "
        "that nobody has begun to look at.",
    )
    board_seconds: Annotated[float, Field(gt=0, le=86_400)] = Field(
        60.0,
        description="How long a board waits for pictures of its parts after the first. Then it has its verdict, as "
        "soon as all that have come have theirs.",
    )
    boards: Annotated[int, Field(ge=1)] = Field(
        1000,
        description="Boards that may wait for nothing but pictures; of more, the one of which nothing has come for "
        "longest has its verdict at once.",
    )
    spool: ByteSize = Field(
        ByteSize(2_000_000_000), description="Accepted pictures on disk; a full spool stops acknowledging."
    )
    outbox: Annotated[int, Field(ge=1)] = Field(
        100_000,
        description="Verdicts that the broker has not confirmed yet; as many stop acknowledging, until it takes some.",
    )
    quarantine: ByteSize = Field(
        ByteSize(256_000_000), description="Pictures that ended the service are kept up to this; the oldest leave."
    )
    stale_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        0.0,
        description="A picture that was taken longer ago than this (`captured-at`) when it would be scheduled is "
        "answered `stale` instead; 0 inspects them all. The clocks of cameras and box must agree.",
    )
    verdict_days: Annotated[float, Field(gt=0)] = Field(
        30.0, description="Verdicts are kept this long; longer, for a day, where the wall clock has leapt ahead."
    )
    verdict_bytes: ByteSize = Field(
        ByteSize(2_000_000_000),
        description="What they may take on disk, about; the oldest leave before their time, once the broker has them.",
    )

    @property
    def most_placements(self) -> int | None:
        """No recipe may have more. Where pictures wait outside there is no such limit: the last one may exceed it."""
        return None if self.overflow == "block" else self.waiting_pictures

    @model_validator(mode="after")
    def _the_spool_takes_a_picture(self) -> Limits:
        if self.spool < 2 * self.picture_bytes:
            raise ValueError(f"spool must take two pictures of {self.picture_bytes} bytes, or one waits for ever")
        return self

    @model_validator(mode="after")
    def _who_turns_away_does_not_block(self) -> Limits:
        """A spool that is full of bytes before it is full of pictures would stop acknowledging all the same."""
        if self.overflow != "block" and self.spool < self.waiting_pictures * self.picture_bytes:
            raise ValueError(
                f"with overflow {self.overflow} the spool must take waiting_pictures x picture_bytes, here "
                f"{self.waiting_pictures * self.picture_bytes} bytes, or it blocks before anything is turned away"
            )
        return self


class Keep(Settings):
    """Pictures that stay beside their verdicts, for `appliance records`; the oldest leave first."""

    fail: ByteSize = Field(ByteSize(1_000_000_000), description="Pictures of parts that failed; 0 keeps none.")
    fail_days: Annotated[float, Field(gt=0)] = Field(
        30.0, description="They are kept this long, and no longer than their verdicts."
    )
    doubtful: ByteSize = Field(
        ByteSize(500_000_000), description="Pictures that could not be inspected, or passed by little; 0 keeps none."
    )
    doubtful_days: Annotated[float, Field(gt=0)] = Field(14.0, description="The same for these.")
    margin: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="A part passed by little when a score was less than this below the threshold of failing."
    )


class Config(Settings):
    """The whole of appliance.toml."""

    box: Box = Box()
    paths: Paths = Paths()
    mqtt: Mqtt = Mqtt()
    broker: Broker = Broker()
    memory: Memory = Memory()
    experts: Experts = Experts()
    executors: Executors = Executors()
    scheduler: Scheduler = Scheduler()
    lines: Mapping[Level, Line] = Field(default_factory=dict)
    limits: Limits = Limits()
    keep: Keep = Keep()

    @property
    def priorities(self) -> dict[str, int]:
        """Of the lines that have one."""
        return {name: line.priority for name, line in self.lines.items()}

    @model_validator(mode="after")
    def _the_embedded_broker_is_plain(self) -> Config:
        if self.broker.embedded and self.mqtt.ca_file is not None:
            raise ValueError("the embedded broker speaks no TLS: leave mqtt.ca_file out, or use a site broker")
        return self

    @property
    def receive_window(self) -> int:
        """How many pictures the broker may send ahead: fewer than mqtt.receive_maximum when they may be large, so
        that the inbox holds them. Group commit needs no more than a handful to keep the disk busy."""
        return min(self.mqtt.receive_maximum, max(SMALLEST_WINDOW, INBOX_BYTES // int(self.limits.picture_bytes)))

    @property
    def broker_folder(self) -> Path:
        return self.paths.state / self.broker.folder

    def topic(self, *levels: str) -> str:
        """`coe/v1/<site>/<levels…>`"""
        return "/".join((self.mqtt.root, "v1", self.box.site, *levels))

    def password(self) -> SecretStr | None:
        """The broker password. Raises ConfigError when its file cannot be read."""
        if self.mqtt.password_file is None:
            return None
        try:
            return SecretStr(self.mqtt.password_file.read_text("utf-8").splitlines()[0])
        except (OSError, IndexError) as error:
            raise ConfigError(
                f"mqtt.password_file {self.mqtt.password_file} has no password", "put it on the first line"
            ) from error


def load(path: Path) -> Config:
    """Read appliance.toml. Raises ConfigError naming file, line, key and remedy."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "give its place with --config") from error
    try:
        config = Config.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}", "correct that line") from error
    except ValidationError as error:
        problems = "; ".join(_problem(e["loc"], e["msg"], text) for e in error.errors())
        raise ConfigError(f"{path}: {problems}", "see docs/configuration.md for the keys") from error
    base = path.parent.resolve()
    files = ("password_file", "ca_file", "certificate_file", "key_file")
    mqtt = config.mqtt.model_copy(update={name: _beside(base, getattr(config.mqtt, name)) for name in files})
    paths = config.paths.model_copy(update={name: _beside(base, value) for name, value in config.paths})
    return config.model_copy(update={"paths": paths, "mqtt": mqtt})


def notify_socket() -> str | None:
    """systemd's notification socket, if it gave us one."""
    return os.environ.get("NOTIFY_SOCKET")


def watchdog_seconds() -> float | None:
    """How often systemd wants a sign of progress (WatchdogSec), if it does and means this process."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    meant_for = os.environ.get("WATCHDOG_PID")
    if microseconds is None or (meant_for is not None and meant_for != str(os.getpid())):
        return None
    return int(microseconds) / 1e6


def _problem(location: tuple[int | str, ...], message: str, text: str) -> str:
    key = ".".join(str(part) for part in location)
    line = _line_of(str(location[-1]), text) if location else None
    hint = "unknown key" if message == "Extra inputs are not permitted" else message
    return (f"line {line}: " if line else "") + (f"{key}: {hint}" if key else hint)


def _line_of(key: str, text: str) -> int | None:
    for number, line in enumerate(text.splitlines(), 1):
        if line.split("=")[0].split(".")[-1].strip(" []\t\"'") == key:
            return number
    return None


def _beside(base: Path, path: Path | None) -> Path | None:
    """A path of the file, seen from the file's folder, or from the folder of systemd's credentials where it says so.

    That folder is the service's alone: for a command typed by hand the path stays as it is, and leads nowhere.
    """
    if path is None:
        return None
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if folder is not None and path.parts[:1] == (CREDENTIALS,):
        return Path(folder, *path.parts[1:])
    return base / path
