"""Hundreds of experts to measure with, made cheaply: one per architecture is compiled, the others are copies of it.

A copy's weights differ in the last bits of every number. Each has segment files of its own, of real size, so that each
is read for real. What they answer means nothing: the task says which of their findings leads on to a detector.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from appliance.catalog import Bundle
from appliance.core.types import Segment
from appliance.errors import ApplianceError
from appliance.lab import paper
from appliance.lab.paper import Board
from appliance.lab.shapes import SHAPES, Shape, small_net, write_expert
from appliance.lab.telling import Say
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store

DETECTORS: Mapping[str, tuple[str, str]] = {
    "tiny": ("tiny", "tiny"),
    "14MB": ("14MB", "14MB"),
    "45MB": ("14MB", "45MB"),
    "170MB": ("45MB", "170MB"),
}
"""Shapes of the two detectors by that of the classifiers: about half and all of their size, as in the paper."""
TINY = Shape("tiny", "three convolutions, for tests", 32, small_net(128))
_PREFIX = "bench-"
_SPARE_BYTES = 1 << 30
"""Left free on the disk."""
_LAST_BITS = 1 << 12
"""Of a float32's fraction: weights change by at most a two-thousandth, and every page of the file does."""
MODEL_FILES = 8
MAX_BATCH = 4
"""Of every expert: from there on a picture takes no less time of one core, in any of the shapes."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """A board's experts on disk. `shared` are the same experts without weights of their own: one copy per architecture.

    `model_files` are portable models with weights of their own, some per shape: what a plain session is made from.
    """

    board: Board
    compiled: Mapping[str, Compiled]
    shared: Mapping[str, Compiled]
    bundles: Mapping[str, Bundle]
    shapes: Mapping[str, str]
    model_files: Mapping[str, Sequence[Path]]
    segment_path: Callable[[str], Path]

    @property
    def bytes(self) -> int:
        return sum(compiled.bytes for compiled in self.compiled.values())

    def model_of(self, expert: str) -> Path:
        files = self.model_files[self.shapes[expert]]
        return files[list(self.compiled).index(expert) % len(files)]


def shape_named(name: str) -> Shape:
    """Raises ApplianceError when there is none."""
    known = {**SHAPES, TINY.name: TINY}
    if name not in known:
        raise ApplianceError(f"there is no shape {name}", f"choose from {', '.join(SHAPES)}")
    return known[name]


@contextmanager
def fleet(board: Board, shape: str, folder: Path, say: Say, *, plain: bool = True) -> Iterator[Fleet]:
    """The experts of a board, gone again afterwards; without `plain` no models for plain sessions.

    Raises ApplianceError when the disk has no room for them, or one cannot be compiled here.
    """
    kinds = {paper.classifier(rank): shape for rank in range(board.types)}
    kinds |= dict(zip(paper.DETECTOR_BYTES, DETECTORS[shape_named(shape).name], strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=folder) as home:
        say(f"compiling an expert for each of {', '.join(dict.fromkeys(kinds.values()))}")
        store = Store(Path(home) / "store")
        bundles = {name: _bundle(Path(home), shape_named(name)) for name in dict.fromkeys(kinds.values())}
        results = compile_bundles(store, list(bundles.values()), report=lambda name, result: None)
        bases = {name: _sound(results[bundle.manifest.name]) for name, bundle in bundles.items()}
        files = MODEL_FILES if plain else 0
        needed = sum(bases[kind].bytes for kind in kinds.values()) + files * sum(base.bytes for base in bases.values())
        _check_room(folder, needed)
        say(f"writing the weights of {len(kinds)} experts, {needed / 1e9:.1f} GB")
        yield Fleet(
            board,
            {name: _copy(bases[kind], name, number, store) for number, (name, kind) in enumerate(kinds.items())},
            {name: replace(bases[kind], expert=name) for name, kind in kinds.items()},
            {name: _renamed(bundles[kind], name) for name, kind in kinds.items()},
            kinds,
            {name: _models(Path(home), shape_named(name), files) for name in bases},
            store.segment_path,
        )


def _sweep(folder: Path) -> None:
    """What processes left here that were killed: gigabytes that nobody else would miss."""
    for left in folder.glob(f"{_PREFIX}*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)


def _bundle(home: Path, shape: Shape) -> Bundle:
    return write_expert(home, f"base-{shape.name.lower()}", shape.build(0), side=shape.side, max_batch=MAX_BATCH)


def _sound(result: Compiled | ApplianceError) -> Compiled:
    if isinstance(result, ApplianceError):
        raise result
    return result


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise ApplianceError(
            f"{folder} has {free / 1e9:.1f} GB free, and these experts take {needed / 1e9:.1f} GB and 1 GB to spare",
            "choose another --folder, fewer --experts or a smaller --shape",
        )


def _copy(base: Compiled, name: str, number: int, store: Store) -> Compiled:
    """The expert with segments of its own on disk."""
    segments = []
    for index, segment in enumerate(base.segments):
        content = np.fromfile(store.segment_path(segment.id), np.uint8)
        noise = np.random.default_rng((number, index))
        for slot in base.tensors:
            if slot.segment == index and slot.dtype == "float32":
                words = content[slot.offset : slot.offset + slot.bytes].view(np.uint32)
                words ^= noise.integers(0, _LAST_BITS, len(words), np.uint32)
        own = Segment(hashlib.sha256(f"{name}/{segment.id}".encode()).hexdigest(), segment.bytes)
        _write(store.segment_path(own.id), content)
        segments.append(own)
    return replace(base, expert=name, segments=tuple(segments))


def _write(path: Path, content: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    """On the disk, and not in the page cache, when this returns."""
    with path.open("wb") as file:
        file.write(content.data)
        file.flush()
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _renamed(bundle: Bundle, name: str) -> Bundle:
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"name": name}))


def _models(home: Path, shape: Shape, count: int) -> list[Path]:
    paths = [home / f"plain-{shape.name}-{number}.onnx" for number in range(count)]
    for number, path in enumerate(paths):
        onnx.save(shape.build(number), path)
    return paths
