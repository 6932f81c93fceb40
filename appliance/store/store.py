"""The store on disk: templates, weight segments and what makes an expert of them, shared, checked and kept tidy.

    <store>/<runtime, instruction set, provider>/architectures/<signature>/template.onnx, architecture.json
                                                                           plain-<sha256>.onnx
                                                 segments/<sha256>
                                                 experts/<name>/<version>-<model sha256, 12 digits>.json
                                                 quarantine/<what was damaged>, <the same>.reason
                                                 making/, in-use, changing, untidy

All is written beside its place and renamed into it, and everything but an expert's file is named by its content: two
processes may write into one store, and what a crash leaves behind is found incomplete and made again. An expert's file
comes after what it names. It is replaced when its tensors become shared; the segments that it named before stay until
nobody else uses the store, for a service loads what it read about when it started.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import numpy as np

from appliance import catalog
from appliance.catalog import Bundle, Catalog
from appliance.core.types import Segment
from appliance.drivers import devices
from appliance.errors import CatalogError, StoreError
from appliance.store import sealed, sharing
from appliance.store.sharing import Content, Recipe

_log = logging.getLogger(__name__)

Provider = Literal["cpu", "cuda"]
"""Of the runtime: what the graphs are optimised for."""
PROVIDERS: tuple[Provider, ...] = ("cpu", "cuda")
_LAYOUT = 4
"""Part of the store's key: raise it when templates, segments or these files change their form."""
_COPIES_OF_OUTPUTS = 3
"""The last layer's sums, what is made of them, and the copy that is handed out."""
_COPIES_WHEN_PACKED = 2
"""At most, of weights that the runtime packs (1.0 to 1.2, 1.31.1, 2026-11)."""
_STALE_SECONDS = 3600.0
_PIECE_BYTES = 4 << 20
_COMPILE_AGAIN = "the next start compiles it again"


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One of the template's weight inputs, and where its bytes lie: segment number and offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segment: int
    offset: int
    sha256: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Compiled:
    """An expert as this box runs it.

    The template calls its pictures `x0`, `x1`, … in the order of `inputs` and its results `y0`, … in the order of
    `outputs`; both tuples hold the names of the portable graph. The seconds are K and B of the architecture on one
    thread; a run of n pictures takes `activation_fixed_bytes + n * activation_item_bytes` while it lasts. Its private
    segment comes first, if it has one; the others are shared. An architecture that is slower as a template is served by
    a plain session of `plain_path`, whose initializers are the segments' tensors; the runtime keeps `private_bytes` of
    it beside them.
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
    activation_fixed_bytes: int = 0
    activation_item_bytes: int = 0
    private_bytes: int = 0
    plain_path: Path | None = None

    @property
    def bytes(self) -> int:
        """What its weights take in memory."""
        return sum({segment.id: segment.bytes for segment in self.segments}.values())

    @property
    def weights_sha256(self) -> str:
        """Names all its weights in order, wherever they lie: it stays the same when they become shared."""
        return hashlib.sha256("".join(slot.sha256 for slot in self.tensors).encode()).hexdigest()

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """What lies in each of its segments."""
        found: list[dict[int, str]] = [{} for _ in self.segments]
        for slot in self.tensors:
            found[slot.segment][slot.offset] = slot.sha256
        return tuple(tuple(contents[offset] for offset in sorted(contents)) for contents in found)


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not what its name says, and the experts that cannot run without it."""

    path: Path
    reason: str
    experts: tuple[str, ...]


class Store:
    """The experts of one box, compiled for one kind of device. Nothing in it is precious: it may be deleted and is made
    again.

    Safe to use from several threads and processes.
    """

    def __init__(self, folder: Path, provider: Provider = "cpu") -> None:
        made_for = "cuda" if provider == "cuda" else f"{devices.instruction_set()}-cpu"
        self.provider = provider
        self.key = f"onnxruntime-{_runtime_version()}-{made_for}-{_LAYOUT}"
        self.folder = folder / self.key
        self.making = self.folder / "making"
        self.quarantine = self.folder / "quarantine"
        self._untidy = self.folder / "untidy"
        self._changing = RLock()
        self._use: int | None = None

    def segment_path(self, segment_id: str) -> Path:
        return self.folder / "segments" / segment_id

    def template_path(self, architecture: str) -> Path:
        return self.folder / "architectures" / architecture / "template.onnx"

    def find(self, bundle: Bundle) -> Compiled | None:
        """The compiled form of exactly this model file, or None if it is absent or any of its files is.

        Segments are known by their size here, the rest by its content: `check` reads them whole.
        """
        manifest = bundle.manifest
        compiled = self._named_by(self._expert_path(bundle))
        if compiled is None or (compiled.expert, compiled.version, compiled.model_sha256) != (
            manifest.name,
            manifest.version,
            manifest.model.sha256,
        ):
            return None
        is_same = compiled.inputs == tuple(spec.name for spec in manifest.inputs)
        return compiled if is_same and not any(self._seen_damage(compiled)) else None

    def verify(self, compiled: Compiled) -> None:
        """Read every byte. Raises StoreError naming the file whose content is not what its name says."""
        for path, expected in self._digests(compiled).items():
            reason = _damage(path, expected)
            if reason is not None:
                raise StoreError(f"{path} {reason}", _COMPILE_AGAIN)

    def check(
        self,
        rest: Callable[[float], bool] = lambda seconds: False,
        tell: Callable[[int, int], None] = lambda read_bytes, all_bytes: None,
    ) -> list[Damage]:
        """Read every byte that any expert needs, each once, and put what is damaged into quarantine.

        After each piece `tell` hears how many bytes of how many have been read, and `rest` how many seconds the piece
        took; that one may wait, and when it returns True, the check ends.
        """
        expected = {path: digest for c in self._entries().values() for path, digest in self._digests(c).items()}
        total, read = sum(path.stat().st_size for path in expected if path.exists()), 0

        def heard(seconds: float, size: int) -> bool:
            nonlocal read
            read += size
            tell(read, total)
            return rest(seconds)

        found = []
        for path, digest in expected.items():
            try:
                reason = _damage(path, digest, heard)
            except InterruptedError:
                break
            if reason is not None and path.exists():
                found.append(self._set_aside(path, reason))
        return found

    def unused(self, catalogue: Catalog) -> dict[str, int]:
        """The bytes of every compiled expert that no bundle on disk names, of whatever version; by its file's name.

        A bundle that cannot be read names all that was ever made of its version.
        """
        compiled = {path: self._named_by(path) for path in self._unused_paths(catalogue)}
        return {f"{path.parent.name}/{path.stem}": c.bytes if c is not None else 0 for path, c in compiled.items()}

    def prune(self, catalogue: Catalog) -> int:
        """Remove the unused experts, and what nobody needs without them. The bytes that the store takes less.

        Segments and architectures stay while another process uses the store; `tidy` removes the segments once it is
        alone, and the next `prune` the rest.
        """
        before = self._size_bytes()
        with self._change():
            self._untidy.touch()
            for path in self._unused_paths(catalogue):
                path.unlink()
        self.tidy()
        with self._change(), self._alone() as is_alone:
            if is_alone:
                self._remove_unused_graphs()
        return before - self._size_bytes()

    def repair(self, bundle: Bundle) -> None:
        """Put away what is seen at once to be damaged of this expert, so that compiling it makes it anew."""
        compiled = self._named_by(self._expert_path(bundle))
        for path, reason in [] if compiled is None else list(self._seen_damage(compiled)):
            if path.exists():
                self._set_aside(path, reason)

    def join(self) -> None:
        """From now on, as long as this object lives, nobody removes a segment that an expert's file ever named.

        The lock is the kernel's: it ends with this process, however that ends.
        """
        with self._changing:
            if self._use is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._use = _opened_lock(self.folder / "in-use")
                weakref.finalize(self, os.close, self._use)
                fcntl.flock(self._use, fcntl.LOCK_SH)

    def keep(self, bundle: Bundle, made: Mapping[str, Any], folder: Path) -> Compiled:
        """Move what a child made in `folder` to its places; the expert's own file comes last."""
        manifest = bundle.manifest
        if catalog.sha256_of(folder / "segment") != made["segment"]:
            raise StoreError(
                f"{folder / 'segment'} is not what was written", "check the disk and the memory of this box"
            )
        with self._change():
            self._untidy.touch()
            is_plain = self._keep_architecture(made, folder)
            self._keep_segment(Segment(made["segment"], made["bytes"]), folder / "segment")
            entry = {
                "expert": manifest.name,
                "version": manifest.version,
                "model_sha256": manifest.model.sha256,
                "architecture": made["architecture"],
                "segments": [{"id": made["segment"], "bytes": made["bytes"]}],
                "tensors": [{**tensor, "segment": 0} for tensor in made["tensors"]],
                "inputs": [spec.name for spec in manifest.inputs],
                "outputs": made["outputs"],
                "output_bytes": made["output_bytes"],
                "plain": made["plain"] if is_plain else None,
            }
            sealed.write(entry, folder, self._expert_path(bundle))
            return self._read(self._expert_path(bundle))

    def tidy(self) -> list[Damage]:
        """Let equal tensors share segments, and remove the segments that no expert names any more.

        Nothing is removed while another process uses the store: whoever is alone next does it. Does nothing when
        nothing was kept since. Damage that comes to light on the way is put into quarantine and returned.
        """
        with self._change():
            if not self._untidy.exists():
                return []
            found = self._share()
            with self._alone() as is_alone:
                if is_alone:
                    self._remove_unnamed()
                    if not found:
                        self._untidy.unlink()
            return found

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A folder of one's own beside the places where its contents will go; gone afterwards."""
        self.making.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.making))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove workshops that a killed process left; a compile never takes as long as they are old."""
        for folder in self.making.glob("*"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    # Reading.

    def _read(self, path: Path) -> Compiled:
        entry = sealed.read(path)
        template = self.template_path(entry["architecture"])
        cost = sealed.read(template.parent / "architecture.json")
        tensors = tuple(_slot(tensor) for tensor in entry["tensors"])
        # Experts of one architecture differ in their last layer; it was measured on one of them.
        wider_bytes = max(0, entry["output_bytes"] - cost["output_bytes"])
        heavier_bytes = max(0, sum(slot.bytes for slot in tensors) - cost["weights_bytes"])
        is_plain = cost["is_plain"]
        if is_plain and entry["plain"] is None:
            raise ValueError(f"{path} was made before its architecture was measured again")
        return Compiled(
            expert=entry["expert"],
            version=entry["version"],
            model_sha256=entry["model_sha256"],
            architecture=entry["architecture"],
            template_path=template,
            segments=tuple(Segment(s["id"], s["bytes"]) for s in entry["segments"]),
            tensors=tensors,
            inputs=tuple(entry["inputs"]),
            outputs=tuple(entry["outputs"]),
            item_seconds=cost["item_seconds"],
            fixed_seconds=cost["fixed_seconds"],
            activation_fixed_bytes=cost["activation_fixed_bytes"],
            activation_item_bytes=cost["activation_item_bytes"] + _COPIES_OF_OUTPUTS * wider_bytes,
            private_bytes=cost["private_bytes"] + _COPIES_WHEN_PACKED * heavier_bytes if is_plain else 0,
            plain_path=_plain_path(template, entry["plain"]) if is_plain else None,
        )

    def _named_by(self, path: Path) -> Compiled | None:
        try:
            return self._read(path)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _entries(self) -> dict[Path, Compiled]:
        """Every expert whose file can be read, those included that no catalogue lists any more."""
        found = {path: self._named_by(path) for path in sorted((self.folder / "experts").glob("*/*.json"))}
        return {path: compiled for path, compiled in found.items() if compiled is not None}

    def _digests(self, compiled: Compiled) -> dict[Path, str]:
        segments = {self.segment_path(segment.id): segment.id for segment in compiled.segments}
        return {**_graphs(compiled), **segments}

    def _seen_damage(self, compiled: Compiled) -> Iterator[tuple[Path, str]]:
        """What is missing or wrong at first sight: sizes, and the graphs' few bytes."""
        for graph, digest in _graphs(compiled).items():
            reason = _damage(graph, digest)
            if reason is not None:
                yield graph, reason
        for segment in compiled.segments:
            path = self.segment_path(segment.id)
            try:
                found = path.stat().st_size
            except OSError as error:
                yield path, f"cannot be read: {error.strerror}"
            else:
                if found != segment.bytes:
                    yield path, f"has {found} bytes instead of {segment.bytes}"

    def _unused_paths(self, catalogue: Catalog) -> list[Path]:
        named = set[Path]()
        for name, versions in catalogue.versions.items():
            for version in versions:
                try:
                    bundle = catalog.read_bundle(catalogue.folder / name / str(version))
                    named.update(self._expert_path(one) for one in (bundle, bundle.in_int8) if one is not None)
                except CatalogError:
                    named.update((self.folder / "experts" / name).glob(f"{version}-*.json"))
        return sorted(set((self.folder / "experts").glob("*/*.json")) - named)

    def _size_bytes(self) -> int:
        folders = (self.folder / name for name in ("architectures", "segments", "experts"))
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    def _expert_path(self, bundle: Bundle) -> Path:
        manifest = bundle.manifest
        return self.folder / "experts" / manifest.name / f"{manifest.version}-{manifest.model.sha256[:12]}.json"

    # Keeping.

    def _keep_architecture(self, made: Mapping[str, Any], folder: Path) -> bool:
        """Whether this architecture is served plain. What was found out first holds: experts must not differ by luck.

        Raises StoreError when what the child relied on is gone.
        """
        template = self.template_path(made["architecture"])
        if _damage(template, made["architecture"]) is not None:
            sealed.place(folder / "template.onnx", template)
        place = template.parent / "architecture.json"
        try:
            is_plain = bool(sealed.read(place)["is_plain"])
        except (OSError, ValueError):
            if made["costs"] is None:
                raise StoreError(f"{place} is gone since the compile began", "start again") from None
            weights_bytes = sum(_slot({**tensor, "segment": 0}).bytes for tensor in made["tensors"])
            of_whom = {"output_bytes": made["output_bytes"], "weights_bytes": weights_bytes}
            sealed.write({**made["costs"], **of_whom}, folder, place)
            is_plain = bool(made["costs"]["is_plain"])
        if is_plain:
            if made["plain"] is None:
                raise StoreError(f"{place} is another than when the compile began", "start again")
            plain = _plain_path(template, made["plain"])
            if _damage(plain, made["plain"]) is not None:
                sealed.place(folder / "plain.onnx", plain)
        return is_plain

    def _keep_segment(self, segment: Segment, source: Path) -> None:
        place = self.segment_path(segment.id)
        if _damage(place, segment.id) is not None:
            sealed.place(source, place)

    def _set_aside(self, path: Path, reason: str) -> Damage:
        experts = tuple(sorted({c.expert for c in self._entries().values() if path in self._digests(c)}))
        name = f"{path.parent.name}.onnx" if path.name == "template.onnx" else path.name
        try:
            self.quarantine.mkdir(parents=True, exist_ok=True)
            (self.quarantine / f"{name}.reason").write_text(f"{reason}\n", "utf-8")
            with suppress(FileNotFoundError):  # another process was quicker
                path.replace(self.quarantine / name)
        except OSError as error:
            raise StoreError(f"{path} {reason}, and cannot be put away: {error.strerror}", "delete it") from error
        _log.error("quarantined file=%s reason=%s experts=%s", path, reason, ",".join(experts))
        return Damage(path, reason, experts)

    # Sharing.

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Within, nobody else changes experts' files, in whatever process."""
        with self._changing:
            self.join()
            descriptor = os.open(self.folder / "changing", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def _share(self) -> list[Damage]:
        """Give every expert the segments that `sharing` wants for it. Its new ones are whole before it names them."""
        entries = {path: c for path, c in self._entries().items() if not any(self._seen_damage(c))}
        wanted = sharing.recipes(
            {str(path): [Content(slot.sha256, slot.bytes) for slot in c.tensors] for path, c in entries.items()}
        )
        made = {r: s for c in entries.values() for r, s in zip(c.recipes, c.segments, strict=True)}
        sources = {slot.sha256: (c.segments[slot.segment], slot) for c in entries.values() for slot in c.tensors}
        found = []
        for path, compiled in entries.items():
            if compiled.recipes == wanted[str(path)]:
                continue
            try:
                with self.workshop() as folder:
                    for recipe in wanted[str(path)]:
                        if recipe not in made:
                            made[recipe] = self._merged([sources[digest] for digest in recipe], folder)
                    sealed.write(_regrouped(sealed.read(path), wanted[str(path)], made, sources), folder, path)
            except _Damaged as error:
                if error.path.exists():  # not yet put away on account of another expert
                    found.append(self._set_aside(error.path, error.reason))
        return found

    def _merged(self, sources: Sequence[tuple[Segment, TensorSlot]], folder: Path) -> Segment:
        """A new segment of tensors that lie in others. Raises _Damaged when one of them is not what it was."""
        offsets, size = sharing.layout([slot.bytes for _, slot in sources])
        whole = hashlib.sha256()
        with (folder / "segment").open("wb") as file:
            for (segment, slot), offset in zip(sources, offsets, strict=True):
                content = _slice(self.segment_path(segment.id), slot)
                for piece in (bytes(offset - file.tell()), content):
                    whole.update(piece)
                    file.write(piece)
            rest = bytes(size - file.tell())
            whole.update(rest)
            file.write(rest)
        segment = Segment(whole.hexdigest(), size)
        self._keep_segment(segment, folder / "segment")
        return segment

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other process, and no other Store, uses this folder; as long as it lasts, none can begin to."""
        assert self._use is not None
        try:
            fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = True
        except BlockingIOError:
            is_alone = False
        try:
            yield is_alone
        finally:  # a refused lock is lost for a moment: whoever calls this reads the experts' files again
            fcntl.flock(self._use, fcntl.LOCK_SH)

    def _remove_unnamed(self) -> None:
        named = {segment.id for compiled in self._entries().values() for segment in compiled.segments}
        for path in (self.folder / "segments").glob("*"):
            if path.name not in named:
                path.unlink()

    def _remove_unused_graphs(self) -> None:
        entries = self._entries().values()
        architectures, graphs = {c.architecture for c in entries}, {path for c in entries for path in _graphs(c)}
        for home in (self.folder / "architectures").glob("*"):
            if home.name not in architectures:
                shutil.rmtree(home)
        for path in (self.folder / "architectures").glob("*/plain-*"):
            if path not in graphs:
                path.unlink()


def _slot(tensor: Mapping[str, Any]) -> TensorSlot:
    t = tensor
    return TensorSlot(t["name"], t["dtype"], tuple(t["shape"]), t["segment"], t["offset"], t["sha256"])


def _graphs(compiled: Compiled) -> dict[Path, str]:
    """The files that hold its graph, and their digests."""
    plain = compiled.plain_path
    return {compiled.template_path: compiled.architecture} | ({} if plain is None else {plain: _digest_in(plain)})


def _plain_path(template: Path, sha256: str) -> Path:
    return template.with_name(f"plain-{sha256}.onnx")


def _digest_in(plain: Path) -> str:
    return plain.stem.removeprefix("plain-")


class _Damaged(Exception):
    """A segment holds other bytes than the expert's file says."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path, self.reason = path, reason


def _regrouped(
    entry: Mapping[str, Any],
    recipes: Sequence[Recipe],
    made: Mapping[Recipe, Segment],
    sources: Mapping[str, tuple[Segment, TensorSlot]],
) -> dict[str, Any]:
    """An expert's file that says the same of other segments."""
    places = {
        digest: {"segment": number, "offset": offset}
        for number, recipe in enumerate(recipes)
        for digest, offset in zip(
            recipe, sharing.layout([sources[digest][1].bytes for digest in recipe])[0], strict=True
        )
    }
    return {
        **entry,
        "segments": [{"id": made[recipe].id, "bytes": made[recipe].bytes} for recipe in recipes],
        "tensors": [{**tensor, **places[tensor["sha256"]]} for tensor in entry["tensors"]],
    }


def _slice(path: Path, slot: TensorSlot) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(slot.offset)
            content = file.read(slot.bytes)
    except FileNotFoundError as error:
        raise _Damaged(path, "is gone") from error
    if hashlib.sha256(content).hexdigest() != slot.sha256:
        raise _Damaged(path, f"has other bytes where {slot.name} lies")
    return content


def _damage(path: Path, expected: str, heard: Callable[[float, int], bool] = lambda seconds, size: False) -> str | None:
    """Why the file's content is not what its name says, or None.

    After each piece `heard` is told how many seconds it took, and how many bytes it has. Raises InterruptedError when
    that returns True, and StoreError when the answer cannot be known.

    What was read of a large file is not kept in the page cache, which a limited box needs for other things.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            begun = time.perf_counter()
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                if len(piece) == _PIECE_BYTES:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if heard(time.perf_counter() - begun, len(piece)):
                    raise InterruptedError
                begun = time.perf_counter()
    except InterruptedError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EIO):
            return f"cannot be read: {error.strerror}"
        # Too few descriptors, or no right to read: that says nothing about the file.
        raise StoreError(f"{path} cannot be read: {error.strerror}", "correct that, and start again") from error
    return None if digest.hexdigest() == expected else "is damaged: its content has another SHA-256"


def _opened_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # somebody else's store, or one on a disk that is only read: it can be shared all the same
        return os.open(path, os.O_RDONLY)


def _runtime_version() -> str:
    """The installed ONNX Runtime's version, without importing it: the parent of a compile does not need it."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    raise StoreError("ONNX Runtime is not installed", "pip install coe-appliance")
