"""What experts fine-tuned from one frozen trunk take on disk and in memory, beside what they would take unshared."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from appliance.drivers import runtime
from appliance.drivers.devices import cores
from appliance.engine.sessions import Sessions
from appliance.engine.weights import Weights
from appliance.errors import ApplianceError
from appliance.lab.shapes import small_net, write_expert
from appliance.lab.telling import Say, Target
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store

_SIDE = 32
_LAYERS, _CHANNELS = 6, 96
_FROZEN_LAYERS = _LAYERS - 1
"""Five of six convolutions of 332 KB: 80 % of the bytes."""
_BOUND = 0.25
_ACTIVATION_BYTES = 64 << 20


def trunks(count: int, folder: Path, say: Say = lambda line: None) -> dict[str, Any]:
    """Compile so many fine-tunes of one trunk and bring them all into memory. Nothing is left in `folder`.

    Raises ApplianceError when one cannot be compiled here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trunks-", dir=folder) as home:
        say(f"making and compiling {count} fine-tunes of one trunk")
        store = Store(Path(home) / "store")
        made = _compiled(store, Path(home), count)
        on_disk = sum(path.stat().st_size for path in (store.folder / "segments").iterdir())
        resident = _resident_bytes(store, made)
    unshared = sum(expert.bytes for expert in made)
    trunk = max(segment.bytes for segment in made[0].segments)
    return {
        "experts": count,
        "trunk_share": trunk / made[0].bytes,
        "unshared_bytes": unshared,
        "disk_bytes": on_disk,
        "resident_bytes": resident,
        "targets": [
            Target(name, value / unshared, "at most", _BOUND).told()
            for name, value in (("disk_share", on_disk), ("resident_share", resident))
        ],
    }


def _compiled(store: Store, folder: Path, count: int) -> list[Compiled]:
    bundles = [write_expert(folder, f"e{i}", fine_tune(i), side=_SIDE) for i in range(count)]
    made = []
    for result in compile_bundles(store, bundles, report=lambda name, result: None, jobs=min(cores(), 2)).values():
        if isinstance(result, ApplianceError):
            raise result
        made.append(result)
    return made


def _resident_bytes(store: Store, experts: Sequence[Compiled]) -> int:
    """What all of them together take when they are ready."""
    weights = Weights(store.segment_path)
    sessions = Sessions(weights, runtime.CpuPlace(), activation_bytes=_ACTIVATION_BYTES)
    for expert in experts:
        weights.load(expert.segments)
        sessions.activate(expert)
    resident = weights.mapped_bytes
    for expert in experts:
        sessions.drop(expert.expert)
    weights.close()
    return resident


def fine_tune(seed: int) -> ModelProto:
    """A network whose first layers are those of every other one, and the rest its own."""
    build = small_net(_CHANNELS, _LAYERS)
    own, trunk = build(seed + 1), build(0)
    frozen = 2 * _FROZEN_LAYERS  # kernels and biases
    for tensor, common in zip(own.graph.initializer[:frozen], trunk.graph.initializer[:frozen], strict=True):
        tensor.CopyFrom(common)
    return own
