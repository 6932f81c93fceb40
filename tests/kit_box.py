"""A whole box for tests: a small catalogue on disk, its settings, and the service as a process of its own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import queue
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from onnx import ModelProto
from PIL import Image

from appliance import client
from appliance.config import Config, Paths
from appliance.lab.shapes import write_manifest
from appliance.startup import install
from tests.kit_brokers import Camera, HasPort, until
from tests.kit_models import SIDE, conv_net, run_plain, write_bundle
from tests.kit_ports import free_port

INFER = "coe/v1/plant/infer/line1/-/-/"
RESULT = "coe/v1/plant/result/#"
ERROR = "coe/v1/plant/error/#"
STATUS = "coe/v1/plant/box/box1/status"
STATS = "coe/v1/plant/box/box1/stats"
COMMAND = "coe/v1/plant/box/box1/cmd/"
ALARMS = "coe/v1/plant/box/box1/alarm/+"

DEADLY = b"this picture ends whoever decodes it"
DEADLY_DECODER = f"""
import os, signal
from appliance.drivers import images
decode = images.decode
def deadly(payload, **limits):
    if {DEADLY!r} in payload:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(payload, **limits)
images.decode = deadly
"""

HASTY = """
from appliance.drivers import mqtt
mqtt.SHORTEST_PAUSE_SECONDS, mqtt.LONGEST_PAUSE_SECONDS = 0.05, 0.1
"""
"""A box that connects again at once, where it matters that it does and not when."""


def picture(seed: int = 0, side: int = SIDE, kind: str = "PNG") -> bytes:
    """A colour picture of noise, encoded; no two seeds give the same bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, kind)
    return encoded.getvalue()


def bomb(side: int) -> bytes:
    """A small valid PNG of side x side black pixels."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def write_catalog(folder: Path, experts: Mapping[str, ModelProto] | int, edges: Sequence[tuple[str, str]] = ()) -> Path:
    """Bundles, and a graph in which component `c-<expert>` asks its expert; edges are always taken."""
    nets = experts if isinstance(experts, Mapping) else {f"e{n}": conv_net(n) for n in range(experts)}
    for name, net in nets.items():
        write_manifest(write_bundle(folder, name, net))
    lines = ["schema = 1", "name = 'test'", "[components]", *(f"c-{name} = '{name}'" for name in nets)]
    for source, to in edges:
        lines += ["[[edges]]", f"from = '{source}'", f"to = '{to}'"]
    (folder / "graph.toml").write_text("\n".join(lines), "utf-8")
    return folder


def compiled(catalog: Path) -> Path:
    """The catalogue, its experts now compiled in a store beside it, of which each `Box` gets a copy."""
    profile, state = Path(__file__).parents[1] / "profiles" / "default.json", catalog.with_name("state")
    install(Config(paths=Paths(catalog=catalog, state=state, store=catalog.with_name("store"), profile=profile)))
    return catalog


def add_golden(folder: Path) -> None:
    """Golden samples of a bundle's own network, as a sound expert answers them."""
    noise = np.random.default_rng(5).random((2, 3, SIDE, SIDE), np.float32)
    logits = run_plain(folder / "model.onnx", {"image": noise})["logits"]
    np.savez(folder / "golden.npz", image=noise, logits=logits)
    digest = hashlib.sha256((folder / "golden.npz").read_bytes()).hexdigest()
    with (folder / "expert.toml").open("a", encoding="utf-8") as file:
        file.write(f"\n[golden]\nsha256 = '{digest}'\ntolerance = 1e-4\n")


def spoil_weights(store: Path, expert: str) -> None:
    """Other bytes, and as many, in all segments of an expert, as a bad disk would have it."""
    (description,) = store.glob(f"*/experts/{expert}/*.json")
    for segment in json.loads(description.read_text("utf-8"))["content"]["segments"]:
        path = description.parents[2] / "segments" / segment["id"]
        path.unlink()  # a `Box` may share it with others
        path.write_bytes(np.random.default_rng(1).random(segment["bytes"] // 4, np.float32).tobytes())


class Box:
    """The service of one box as a child process. With `broker` None it runs its own embedded broker.

    `settings` are further lines of appliance.toml, such as `[memory]`; `program` is Python that prepares the process
    before it serves. State survives `kill` and `start`.
    """

    def __init__(
        self, folder: Path, catalog: Path, broker: HasPort | None = None, *, settings: str = "", program: str = ""
    ) -> None:
        self._program = f"{program}\nfrom appliance.cli import main\nmain()"
        self.folder, self.port = folder, broker.port if broker else free_port()
        self.config, self.log = folder / "appliance.toml", folder / "service.log"
        folder.mkdir(parents=True, exist_ok=True)
        if catalog.with_name("store").is_dir():
            shutil.copytree(catalog.with_name("store"), folder / "store", copy_function=_linked)
        profile = Path(__file__).parents[1] / "profiles" / "default.json"
        self.config.write_text(
            f"[paths]\ncatalog = '{catalog}'\nstate = 'state'\nstore = 'store'\nprofile = '{profile}'\n"
            f"journal = 'journal.jsonl'\n"
            f"[mqtt]\nport = {self.port}\nkeepalive_seconds = 5\n"
            f"[broker]\nembedded = {str(broker is None).lower()}\n" + settings,
            "utf-8",
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begins = 0

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the service; returns at once."""
        self._log_begins = len(self.log_text) if self.log.exists() else 0
        command = [sys.executable, "-c", self._program, "serve", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(environment or {})}
            )

    def wait_online(self, seconds: float = 60.0) -> None:
        """Until the box says, since it was started last, that it is connected and subscribed."""
        until(lambda: not self.is_running or "mqtt state=ready" in self.log_text[self._log_begins :], seconds)
        assert self.is_running, self.log_text

    def kill(self) -> None:
        """SIGKILL; whatever broker is embedded goes with it. The log starts anew."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.log.write_text("")

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def wait_exit(self, seconds: float = 60.0) -> int:
        assert self._process is not None
        return self._process.wait(seconds)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_text(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def __enter__(self) -> Box:
        self.start()
        self.wait_online()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.is_running:
            self.kill() if kind else self.stop()


def _linked(source: str, to: str) -> None:
    """A weight segment twice for the room of one: nobody writes into those."""
    os.link(source, to) if Path(source).parent.name == "segments" else shutil.copy2(source, to)


def hear_verdicts(camera: Camera, count: int, seconds: float = 60.0) -> dict[str, dict[str, Any]]:
    """So many different verdicts by request id; the same one may come again, a different one for a request may not."""
    verdicts: dict[str, dict[str, Any]] = {}
    while len(verdicts) < count:
        body = json.loads(camera.hear(seconds).payload)
        if "outcome" in body:
            known = verdicts.setdefault(body["request_id"], body)
            assert known == body, "two different verdicts for one picture"
    return verdicts


def kept_alive(box: Box, camera: client.Camera) -> int:
    """Start the service again whenever it ended, as systemd does, until the camera has its answers; how often."""
    crashes, ends = 0, time.monotonic() + 200
    while not camera.wait(0.1):
        assert time.monotonic() < ends, box.log_text
        if not box.is_running:
            crashes += 1
            box.start()
    return crashes


def hear_all(camera: Camera, quiet_seconds: float = 1.0) -> list[dict[str, Any]]:
    """Whatever comes until nothing has come for so long."""
    bodies = []
    with suppress(queue.Empty):
        while True:
            bodies.append(json.loads(camera.hear(quiet_seconds).payload))
    return bodies
