"""Portable ONNX experts to this box's templates and weight segments, in a store that is made complete and left tidy.

Foreign files are opened in a child process only (`compile_child.py`). How the store lies on disk is known to
`store.py`; what here decides is who is compiled, by how many children, and what becomes of those that fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from appliance import catalog
from appliance.catalog import Bundle, DetectionHead
from appliance.errors import ApplianceError, Cancelled, CatalogError, ModelError, StoreError
from appliance.sandbox import Child
from appliance.store.store import Compiled, Store

Report = Callable[[str, "Compiled | ApplianceError"], None]

_COMPILER = "appliance.store.compile_child"
_COMPILE_SECONDS = 120.0
_COMPILE_BYTES = 3 << 30
_COPIES_AT_COMPILE = 12
"""Address space per byte of model: parsed, serialised, optimised, packed and run, partly at the same time."""
_FILES_PER_MODEL = 5
"""Free disk per byte of model: the portable graph, the optimised one, template, segment, and a segment to be shared."""
_TIDY_EVERY = 16
"""Experts compiled between two looks for what they share: until then each lies whole on the disk."""


class Interruption:
    """Ends a compile from another thread, soon and for good: its children are killed, and no other begins.

    The store is left as after a crash: the experts that are done stay, and the next who compiles tidies up.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._children: set[Child] = set()
        self._has_come = False

    def interrupt(self) -> None:
        with self._lock:
            self._has_come = True
            for child in self._children:
                child.kill()

    def check(self) -> None:
        """Raises Cancelled once it has come."""
        if self._has_come:
            raise Cancelled("compiling was interrupted")

    @contextmanager
    def ends(self, child: Child) -> Iterator[None]:
        """Within, the child is killed when it comes. Raises Cancelled then, whatever became of the child."""
        with self._lock:
            self.check()
            self._children.add(child)
        try:
            yield
        finally:
            with self._lock:
                self._children.discard(child)
            self.check()


def compile_bundles(
    store: Store,
    bundles: Sequence[Bundle],
    *,
    report: Report,
    jobs: int = 1,
    interruption: Interruption | None = None,
) -> dict[str, Compiled | ApplianceError]:
    """Bring what is missing into the store; each expert's result by name, also told to `report` as it comes.

    A broken expert does not stop the others: its result is the error (DigestMismatch, CatalogError, ModelError,
    UnsafeModel). With more than one job `report` is called from other threads, one call at a time. Raises StoreError
    when the store itself cannot be written, and Cancelled when it is interrupted.
    """
    ending = interruption or Interruption()
    results: dict[str, Compiled | ApplianceError] = {}
    telling = Lock()

    def tell(name: str, result: Compiled | ApplianceError) -> None:
        with telling:
            results[name] = result
            report(name, result)

    with _store_errors(store):
        store.join()
        _complete(store, bundles, tell, jobs, ending)
        if store.tidy():  # what shares a damaged segment was sound only at first sight
            broken = {name for name, result in results.items() if isinstance(result, ApplianceError)}
            sound = [bundle for bundle in bundles if bundle.manifest.name not in broken]
            _complete(store, sound, lambda *_: None, jobs, ending)
            store.tidy()
    return {bundle.manifest.name: _final(store, bundle, results[bundle.manifest.name]) for bundle in bundles}


def _final(store: Store, bundle: Bundle, result: Compiled | ApplianceError) -> Compiled | ApplianceError:
    """The expert as it lies in the store now that everybody shares what is equal."""
    if isinstance(result, ApplianceError):
        return result
    return store.find(bundle) or StoreError(f"{bundle.manifest.name} is damaged", "restart: it is compiled again")


def _complete(store: Store, bundles: Sequence[Bundle], tell: Report, jobs: int, ending: Interruption) -> None:
    missing = []
    for bundle in bundles:
        found = store.find(bundle)
        if found is None:
            missing.append(bundle)
        else:
            tell(bundle.manifest.name, found)
    if missing:
        store.sweep()
        for bundle in missing:
            store.repair(bundle)
        _share_out(store, missing, tell, min(jobs, len(missing)), ending)


def _share_out(store: Store, missing: Sequence[Bundle], tell: Report, jobs: int, ending: Interruption) -> None:
    memory_bytes = _COMPILE_BYTES + _COPIES_AT_COMPILE * max(bundle.manifest.model.bytes for bundle in missing)
    waiting: SimpleQueue[Bundle] = SimpleQueue()
    for bundle in missing:
        waiting.put(bundle)

    def work() -> None:
        with _Compiler(store, memory_bytes, ending) as compiler:
            for bundle in _drained(waiting):
                tell(bundle.manifest.name, compiler.attempt(bundle))
                if waiting.qsize() % _TIDY_EVERY == _TIDY_EVERY - 1:
                    store.tidy()

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

    def __init__(self, store: Store, memory_bytes: int, ending: Interruption) -> None:
        self._store, self._memory_bytes, self._ending = store, memory_bytes, ending
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

    def _compile(self, bundle: Bundle) -> Compiled:
        self._ending.check()
        catalog.verify(bundle)
        with _store_errors(self._store), self._store.workshop() as folder:
            _check_room(folder, _FILES_PER_MODEL * bundle.manifest.model.bytes)
            child = self._living_child()
            with self._ending.ends(child):
                made = child.ask(_request(bundle, self._store, folder), seconds=_COMPILE_SECONDS)
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
        "tolerances": dict(bundle.tolerances),
        "folder": str(folder.resolve()),
        "provider": store.provider,
        "known": str((store.folder / "architectures").resolve()),
    }


def _check_room(folder: Path, need_bytes: int) -> None:
    """Before and not after: what the runtime says of a full disk cannot be told from what it says of a bad model."""
    disk = os.statvfs(folder)
    if disk.f_bavail * disk.f_frsize < need_bytes:
        raise StoreError(
            f"{folder.parent} has {disk.f_bavail * disk.f_frsize} bytes left, compiling needs {need_bytes}",
            "make room there, or correct paths.store",
        )


@contextmanager
def _store_errors(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{store.folder} cannot be written: {error}", "make room there, or correct paths.store"
        ) from error
