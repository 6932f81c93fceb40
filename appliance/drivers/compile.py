"""Portable ONNX experts to this box's templates and weight segments, kept in a store on disk.

    <store>/<runtime, instruction set, provider>/architectures/<signature>/template.onnx, architecture.json
                                                 segments/<sha256>
                                                 experts/<name>/<version>-<model sha256, 12 digits>.json

Foreign files are opened in a child process only (`compile_child.py`). All is written beside its place and renamed
into it, and everything but the last file is named by its content: two processes may compile into one store, and what
a crash leaves behind is found incomplete and made again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from appliance import catalog
from appliance.catalog import Bundle, DetectionHead
from appliance.core.types import Segment
from appliance.drivers import devices
from appliance.errors import ApplianceError, CatalogError, ModelError, StoreError
from appliance.sandbox import Child

Report = Callable[[str, "Compiled | ApplianceError"], None]

_LAYOUT = 1
"""Part of the store's key: raise it when templates, segments or these files change their form."""
_COMPILER = "appliance.drivers.compile_child"
_COMPILE_SECONDS = 120.0
_COMPILE_BYTES = 3 << 30
_COPIES_AT_COMPILE = 12
"""Address space per byte of model: parsed, serialised, optimised, packed and run, partly at the same time."""
_STALE_SECONDS = 3600.0
_COMPILE_AGAIN = "delete it; the next start compiles it again"


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where one of the template's weight inputs lies: segment number and offset in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segment: int
    offset: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """An expert as this box runs it.

    The template calls its pictures `x0`, `x1`, … in the order of `inputs` and its results `y0`, … in the order of
    `outputs`; both tuples hold the names of the portable graph. The seconds are K and B of the architecture on one
    thread.
    """

    expert: str
    version: int
    model_sha256: str
    architecture: str
    template_path: Path
    segments: tuple[Segment, ...]
    tensors: tuple[TensorSlot, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    item_seconds: float
    fixed_seconds: float

    @property
    def bytes(self) -> int:
        """What its weights take in memory."""
        return sum({segment.id: segment.bytes for segment in self.segments}.values())


class Store:
    """The compiled experts of one box. Nothing in it is precious: it may be deleted and is made again."""

    def __init__(self, folder: Path) -> None:
        self.key = f"onnxruntime-{_runtime_version()}-{devices.instruction_set()}-cpu-{_LAYOUT}"
        self.folder = folder / self.key
        self.making = self.folder / "making"

    def segment_path(self, segment_id: str) -> Path:
        return self.folder / "segments" / segment_id

    def template_path(self, architecture: str) -> Path:
        return self.folder / "architectures" / architecture / "template.onnx"

    def find(self, bundle: Bundle) -> Compiled | None:
        """The compiled form of exactly this model file, or None if it is absent or any of its files is."""
        manifest = bundle.manifest
        try:
            compiled = self._read(self._expert_path(bundle))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if (compiled.expert, compiled.version, compiled.model_sha256) != (
            manifest.name,
            manifest.version,
            manifest.model.sha256,
        ):
            return None
        is_same = compiled.inputs == tuple(spec.name for spec in manifest.inputs)
        return compiled if is_same and self._is_complete(compiled) else None

    def verify(self, compiled: Compiled) -> None:
        """Read every byte. Raises StoreError naming the file whose content is not what its name says."""
        for path, expected in [
            (compiled.template_path, compiled.architecture),
            *((self.segment_path(segment.id), segment.id) for segment in compiled.segments),
        ]:
            try:
                is_sound = catalog.sha256_of(path) == expected
            except OSError as error:
                raise StoreError(f"{path} cannot be read: {error.strerror}", _COMPILE_AGAIN) from error
            if not is_sound:
                raise StoreError(f"{path} is damaged", _COMPILE_AGAIN)

    def _read(self, path: Path) -> Compiled:
        entry = json.loads(path.read_text("utf-8"))
        template = self.template_path(entry["architecture"])
        cost = json.loads((template.parent / "architecture.json").read_text("utf-8"))
        return Compiled(
            expert=entry["expert"],
            version=entry["version"],
            model_sha256=entry["model_sha256"],
            architecture=entry["architecture"],
            template_path=template,
            segments=tuple(Segment(s["id"], s["bytes"]) for s in entry["segments"]),
            tensors=tuple(
                TensorSlot(t["name"], t["dtype"], tuple(t["shape"]), t["segment"], t["offset"])
                for t in entry["tensors"]
            ),
            inputs=tuple(entry["inputs"]),
            outputs=tuple(entry["outputs"]),
            item_seconds=cost["item_seconds"],
            fixed_seconds=cost["fixed_seconds"],
        )

    def _is_complete(self, compiled: Compiled) -> bool:
        try:
            sizes = [self.segment_path(segment.id).stat().st_size for segment in compiled.segments]
        except OSError:
            return False
        return compiled.template_path.is_file() and sizes == [segment.bytes for segment in compiled.segments]

    def _expert_path(self, bundle: Bundle) -> Path:
        manifest = bundle.manifest
        return self.folder / "experts" / manifest.name / f"{manifest.version}-{manifest.model.sha256[:12]}.json"

    def keep(self, bundle: Bundle, made: Mapping[str, Any], folder: Path) -> Compiled:
        """Move what a child made in `folder` to its places; the expert's own file comes last."""
        self._keep_architecture(made, folder)
        self._keep_segment(made, folder / "segment")
        manifest = bundle.manifest
        entry = {
            "expert": manifest.name,
            "version": manifest.version,
            "model_sha256": manifest.model.sha256,
            "architecture": made["architecture"],
            "segments": [{"id": made["segment"], "bytes": made["bytes"]}],
            "tensors": [{**tensor, "segment": 0} for tensor in made["tensors"]],
            "inputs": [spec.name for spec in manifest.inputs],
            "outputs": made["outputs"],
        }
        (folder / "expert.json").write_text(json.dumps(entry), "utf-8")
        _place(folder / "expert.json", self._expert_path(bundle))
        return self._read(self._expert_path(bundle))

    def _keep_architecture(self, made: Mapping[str, Any], folder: Path) -> None:
        if made["costs"] is None:  # the child found it here
            return
        item_seconds, fixed_seconds = made["costs"]
        cost = json.dumps({"item_seconds": item_seconds, "fixed_seconds": fixed_seconds})
        (folder / "architecture.json").write_text(cost, "utf-8")
        home = self.template_path(made["architecture"]).parent
        for name in ("template.onnx", "architecture.json"):
            _place(folder / name, home / name)

    def _keep_segment(self, made: Mapping[str, Any], source: Path) -> None:
        place = self.segment_path(made["segment"])
        if not (place.is_file() and place.stat().st_size == made["bytes"]):
            _place(source, place)


def compile_bundles(
    store: Store, bundles: Sequence[Bundle], *, report: Report, jobs: int = 1
) -> dict[str, Compiled | ApplianceError]:
    """Bring what is missing into the store; each expert's result by name, also told to `report` as it comes.

    A broken expert does not stop the others: its result is the error (DigestMismatch, CatalogError, ModelError,
    UnsafeModel). With more than one job `report` is called from other threads, one call at a time. Raises StoreError
    when the store itself cannot be written.
    """
    results: dict[str, Compiled | ApplianceError] = {}
    telling = Lock()

    def tell(name: str, result: Compiled | ApplianceError) -> None:
        with telling:
            results[name] = result
            report(name, result)

    missing = []
    for bundle in bundles:
        found = store.find(bundle)
        if found is None:
            missing.append(bundle)
        else:
            tell(bundle.manifest.name, found)
    if missing:
        _sweep(store.making)
        _share_out(store, missing, tell, min(jobs, len(missing)))
    return results


def _share_out(store: Store, missing: Sequence[Bundle], tell: Report, jobs: int) -> None:
    memory_bytes = _COMPILE_BYTES + _COPIES_AT_COMPILE * max(bundle.manifest.model.bytes for bundle in missing)
    waiting: SimpleQueue[Bundle] = SimpleQueue()
    for bundle in missing:
        waiting.put(bundle)

    def work() -> None:
        with _Compiler(store, memory_bytes) as compiler:
            for bundle in _drained(waiting):
                tell(bundle.manifest.name, compiler.attempt(bundle))

    if jobs == 1:
        work()
        return
    with ThreadPoolExecutor(jobs, "compile") as pool:
        try:
            for worker in [pool.submit(work) for _ in range(jobs)]:
                worker.result()
        finally:  # after an interrupt or a full disk nobody begins another
            list(_drained(waiting))


def _drained(waiting: SimpleQueue[Bundle]) -> Iterator[Bundle]:
    with suppress(Empty):
        while True:
            yield waiting.get_nowait()


class _Compiler:
    """One child process that compiles expert after expert, replaced when one of them kills it."""

    def __init__(self, store: Store, memory_bytes: int) -> None:
        self._store, self._memory_bytes = store, memory_bytes
        self._child: Child | None = None

    def __enter__(self) -> _Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()

    def attempt(self, bundle: Bundle) -> Compiled | ApplianceError:
        try:
            return self._compile(bundle)
        except ModelError as error:
            name = f"{bundle.manifest.name} version {bundle.manifest.version}"
            return type(error)(f"{name}: {error.what}", error.remedy)
        except CatalogError as error:
            return error
        except OSError as error:
            raise StoreError(
                f"{self._store.folder} cannot be written: {error}", "make room there, or correct paths.store"
            ) from error

    def _compile(self, bundle: Bundle) -> Compiled:
        catalog.verify(bundle)
        with _workshop(self._store.making) as folder:
            made = self._living_child().ask(_request(bundle, self._store, folder), seconds=_COMPILE_SECONDS)
            return self._store.keep(bundle, made, folder)

    def _living_child(self) -> Child:
        if self._child is None or not self._child.is_alive:
            if self._child is not None:
                self._child.close()
            self._child = Child(_COMPILER, memory_bytes=self._memory_bytes)
        return self._child


def _request(bundle: Bundle, store: Store, folder: Path) -> dict[str, Any]:
    manifest, head = bundle.manifest, bundle.manifest.head
    return {
        "model": str(bundle.model_path.resolve()),
        "inputs": [
            {"name": spec.name, "channels": spec.channels, "width": spec.size[0], "height": spec.size[1]}
            for spec in manifest.inputs
        ],
        "outputs": [head.boxes, head.scores] if isinstance(head, DetectionHead) else [head.output],
        "max_batch": manifest.model.max_batch,
        "golden": None if bundle.golden_path is None else str(bundle.golden_path.resolve()),
        "tolerance": manifest.golden.tolerance if manifest.golden else 0.0,
        "folder": str(folder.resolve()),
        "known": str((store.folder / "architectures").resolve()),
    }


@contextmanager
def _workshop(making: Path) -> Iterator[Path]:
    """A folder of one's own beside the places where its contents will go; gone afterwards."""
    making.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=making))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(making: Path) -> None:
    """Remove workshops that a killed process left; a compile never takes as long as they are old."""
    for folder in making.glob("*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _place(source: Path, place: Path) -> None:
    """Rename a file to its place, whole or not at all, also across a power cut."""
    place.parent.mkdir(parents=True, exist_ok=True)
    _flush(source)
    source.replace(place)
    _flush(place.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runtime_version() -> str:
    """The installed ONNX Runtime's version, without importing it: the parent of a compile does not need it."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    raise StoreError("ONNX Runtime is not installed", "pip install coe-appliance")
