"""Writes a bundle: model, golden samples and manifest in one folder that appears complete or not at all; and adds a
variant to one that is there."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from appliance import catalog
from appliance.catalog import Bundle, ExpertManifest, Variant
from appliance.errors import ApplianceError, ExportError
from export import toml
from export.manifest import Entry
from export.proof import Arrays

GOLDEN_SAMPLES = 6
GOLDEN_BYTES = 40_000
"""As many samples are kept as fit, at least one."""

SOURCE_KEY = "checkpoint_sha256"
"""Provenance: digest of the checkpoint or foreign file that the bundle was made from."""

_UNFINISHED = ".exporting-"
_VARIANTS = re.compile(r"^\[variants[.\]].*?(?=^\[(?!variants[.\]])|^#|\Z)", re.MULTILINE | re.DOTALL)
"""In a manifest: these tables, to the next other one, or what is said above it."""


@dataclass(frozen=True, slots=True)
class Proven:
    """A model that has passed: its bytes, what it was built for, and samples that will pass again at the appliance."""

    model: bytes
    opset: int
    ir_version: int
    max_batch: int
    golden: Arrays
    provenance: Mapping[str, str]


def write(entry: Entry, proven: Proven, out: Path) -> Path:
    """`out/<name>/<version>/`, written beside and renamed into place: a kill never leaves half a bundle."""
    final = out / entry.name / str(entry.version)
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=out))
    try:
        golden = _packed(proven.golden)
        manifest = _manifest(entry, proven, golden)
        _write_file(work / "model.onnx", proven.model)
        _write_file(work / "golden.npz", golden)
        _write_file(work / "expert.toml", toml.dumps(manifest).encode("utf-8"))
        work.chmod(0o755)
        _replace(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def is_done(entry: Entry, source_sha256: str, out: Path) -> bool:
    """Whether the bundle is there, whole, and made from this entry and these weights as they stand."""
    folder = out / entry.name / str(entry.version)
    try:
        bundle = catalog.read_bundle(folder)
        catalog.verify(bundle)
    except ApplianceError:
        return False
    made_from = bundle.manifest.provenance
    return (made_from.get("entry_sha256"), made_from.get(SOURCE_KEY)) == (_entry_sha256(entry), source_sha256)


def sweep(out: Path) -> None:
    """Remove what a killed export left half-written. One export at a time writes to a catalogue."""
    for left in out.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def add_int8(bundle: Bundle, content: bytes, variant: Variant) -> None:
    """Put a variant into a bundle, in place of one that is there. What serves without it is not touched.

    The manifest that names it comes last, by one rename. Raises ExportError when that has no place for it.
    """
    _replace_file(bundle.folder / variant.file, content)
    _write_variants(bundle.folder, {"variants": {"int8": variant.model_dump()}})
    _remove_files(bundle, but=variant.file)


def remove_int8(bundle: Bundle) -> None:
    """Take the variant out of a bundle, if it has one."""
    if bundle.manifest.variants.int8 is not None:
        _write_variants(bundle.folder, {})
    _remove_files(bundle)


def _write_variants(folder: Path, section: Mapping[str, object]) -> None:
    """The manifest with this in place of its variants; the rest stays as somebody may have written it by hand."""
    path = folder / "expert.toml"
    old = path.read_text("utf-8")
    new = _VARIANTS.sub("", old).rstrip() + "\n" + (f"\n{toml.dumps(section)}" if section else "")
    wanted = {key: value for key, value in tomllib.loads(old).items() if key != "variants"} | dict(section)
    if tomllib.loads(new) != wanted:
        raise ExportError(f"{path} has [variants] in a form that is not ours", "remove them from it")
    _replace_file(path, new.encode("utf-8"))


def _replace_file(path: Path, content: bytes) -> None:
    """Whole or not at all; what a kill leaves is swept from the catalogue's folder."""
    handle, beside = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parents[2])
    os.close(handle)
    _write_file(Path(beside), content)
    Path(beside).chmod(0o644)
    Path(beside).replace(path)


def _remove_files(bundle: Bundle, but: str = "") -> None:
    for path in bundle.folder.glob("int8-*.onnx"):
        if path.name != but:
            path.unlink()


def _manifest(entry: Entry, proven: Proven, golden: bytes) -> Mapping[str, object]:
    manifest = {
        "schema": 1,
        "name": entry.name,
        "version": entry.version,
        "description": entry.description,
        "model": {
            "file": "model.onnx",
            "sha256": hashlib.sha256(proven.model).hexdigest(),
            "bytes": len(proven.model),
            "opset": proven.opset,
            "ir_version": proven.ir_version,
            "max_batch": proven.max_batch,
        },
        "golden": {
            "file": "golden.npz",
            "sha256": hashlib.sha256(golden).hexdigest(),
            "tolerance": entry.tolerance,
        },
        "inputs": [spec.model_dump(exclude_none=True) for spec in entry.inputs],
        "head": entry.head.model_dump(exclude_none=True),
        "provenance": {**entry.provenance, **proven.provenance, "entry_sha256": _entry_sha256(entry)},
    }
    ExpertManifest.model_validate(manifest)
    return manifest


def _entry_sha256(entry: Entry) -> str:
    return hashlib.sha256(entry.model_dump_json().encode("utf-8")).hexdigest()


def _packed(arrays: Arrays) -> bytes:
    samples = min(len(next(iter(arrays.values()))), GOLDEN_SAMPLES)
    while True:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **{name: array[:samples] for name, array in arrays.items()})
        if samples == 1 or buffer.tell() <= GOLDEN_BYTES:
            return buffer.getvalue()
        samples -= 1


def _write_file(path: Path, content: bytes) -> None:
    """On disk before the folder is renamed: a name must never outlive its bytes."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace(work: Path, final: Path) -> None:
    """Directories cannot be replaced in one step where one stands; the old one steps aside first."""
    aside = Path(f"{work}-old")
    if final.exists():
        final.rename(aside)
    work.rename(final)
    shutil.rmtree(aside, ignore_errors=True)
