"""Makes int8 variants of bundles that are there: calibrated and judged on the user's own pictures.

Half of the pictures calibrate, the other half judge. The variant stays only if it finds what the network finds; else
the report says which numbers missed, and the bundle is as it was without one.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from appliance import catalog, sandbox
from appliance.catalog import Bundle, ExpertManifest, Variant
from appliance.errors import ApplianceError, ExportError, ModelError
from export import agreement, bundle, proof
from export.agreement import Agreement
from export.manifest import output_names

LEAST_PICTURES = 32
"""Half of them calibrate: with fewer, what the judging half says would be chance."""
MOST_PICTURES = 1000
MOST_BYTES = 2 << 30
"""Of prepared pictures, on disk beside each other."""
AGREEMENT = 0.99
MEMORY_BYTES = 8 << 30
"""Address space of the child that quantises."""
SECONDS = 900.0

_SPARE = 1.5
"""Times what a variant was off the golden outputs here: another processor rounds otherwise, and no more than that."""
_SCOPES: tuple[Literal["all", "layers"], ...] = ("all", "layers")
"""What is tried in turn."""

Arrays = dict[str, NDArray[np.float32]]


class Disagrees(ExportError):
    """The variant does not find what its network finds, or not as well."""

    reason = "variant-disagrees"


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture, and whether its part shall fail, if its folder says so."""

    path: Path
    fails: bool | None


@dataclass(frozen=True, slots=True)
class VariantJob:
    """One bundle that shall have an int8 variant, the folder of its pictures, and the agreement that is asked."""

    folder: Path
    samples: Path
    asked: float = AGREEMENT

    @property
    def key(self) -> tuple[str, int]:
        return self.folder.parent.name, int(self.folder.name)

    @property
    def out(self) -> Path:
        return self.folder.parents[1]


def make(job: VariantJob) -> tuple[Bundle, Variant]:
    """Make, judge and keep one; the bundle without it, and what was kept.

    Raises ExportError for too few pictures, Disagrees when it may not serve, ModelError when it cannot be made and
    UnsafeModel when the child died of it.
    """
    whole = catalog.read_bundle(job.folder)
    catalog.verify(whole)
    shown = pictures(job.samples, whole.manifest)
    try:
        content, variant = _made(whole, shown, job.asked)
    except Disagrees:
        bundle.remove_int8(whole)
        raise
    bundle.add_int8(whole, content, variant)
    return whole, variant


def is_done(job: VariantJob) -> bool:
    """Whether the variant is there, whole, agrees as is asked, and was made of this network and these pictures."""
    try:
        whole = catalog.read_bundle(job.folder)
        catalog.verify(whole)
        catalog.verified_int8(whole)
        variant = whole.manifest.variants.int8
        return (
            variant is not None
            and variant.agreement >= job.asked
            and variant.samples_sha256 == _digest(pictures(job.samples, whole.manifest), whole.manifest)
        )
    except ApplianceError:
        return False


def pictures(folder: Path, manifest: ExpertManifest) -> list[Shown]:
    """What lies in a folder, or in folders named `pass`, `fail` or by a label in it. Raises ExportError for too few.

    Of many, so many that are spread evenly over them.
    """
    paths = proof.picture_files(folder)
    if len(paths) < LEAST_PICTURES:
        raise ExportError(
            f"{manifest.name}: {folder} holds {len(paths)} pictures, {LEAST_PICTURES} are needed for an int8 variant",
            "put more published pictures there",
        )
    most = min(MOST_PICTURES, MOST_BYTES // _picture_bytes(manifest))
    if most < LEAST_PICTURES:
        raise ExportError(
            f"{manifest.name}: {LEAST_PICTURES} pictures of its inputs' size are more than {MOST_BYTES >> 30} GiB",
            "leave it in full precision",
        )
    return [Shown(path, _truth(path, folder, manifest)) for path in proof.spread(paths, most)]


def _truth(path: Path, folder: Path, manifest: ExpertManifest) -> bool | None:
    if path.parent == folder:
        return None
    word, head = path.parent.name, manifest.head
    if word in ("pass", "fail"):
        return word == "fail"
    if word not in head.labels:
        raise ExportError(
            f"{manifest.name}: {path.parent} is named after no label",
            f"name it pass, fail, or {', '.join(head.labels)}",
        )
    if head.kind == "detection":
        return head.fails
    return word != head.normal if head.normal is not None else word in head.failing


def _made(whole: Bundle, shown: Sequence[Shown], asked: float) -> tuple[bytes, Variant]:
    """The first that agrees: with as much of it in int8 as can be, or else without what is made of the last layers."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        calibrate, judge = shown[::2], shown[1::2]
        golden = _golden(whole)
        sizes = _write_feeds(work, whole.manifest, [*calibrate, *judge], golden)[len(calibrate) :]
        truths = [*(one.fails for one in judge), *[None] * (len(sizes) - len(judge))]
        refused = []
        for scope in _SCOPES:
            reply = _quantised(work, whole, len(calibrate), scope)
            full, int8 = (_answers(work / f"{name}.npz") for name in ("full", "int8"))
            found = agreement.compare(
                proof.decisions(whole.manifest, full, sizes), proof.decisions(whole.manifest, int8, sizes), truths
            )
            content = (work / "int8.onnx").read_bytes()
            if not (wrong := [*found.misses(asked), *_no_gain(content, whole)]):
                tolerance = _tolerance(whole, golden, int8)
                return content, _described(
                    whole, shown, content, found, {**reply, "scope": scope, "tolerance": tolerance}
                )
            refused.append(f"{scope}: {', '.join(wrong)}")
    raise Disagrees(
        f"{whole.manifest.name}: in int8 {'; '.join(refused)}",
        "give more pictures, and such as the line publishes; or ask for less with --agreement",
    )


def _no_gain(content: bytes, whole: Bundle) -> list[str]:
    """Where hardly anything can be quantised, scales and zero points only add to it."""
    size, full = len(content), whole.manifest.model.bytes
    return [] if size < full else [f"it has {size} bytes, the network {full}"]


def _quantised(work: Path, whole: Bundle, calibrate: int, scope: str) -> dict[str, Any]:
    request = {
        "folder": str(work),
        "model": str(whole.model_path.resolve()),
        "inputs": [spec.name for spec in whole.manifest.inputs],
        "outputs": list(output_names(whole.manifest.head)),
        "calibrate": calibrate,
        "max_batch": whole.manifest.model.max_batch,
        "scope": scope,
    }
    try:
        return sandbox.run_limited("export.quantise", request, memory_bytes=MEMORY_BYTES, seconds=SECONDS)
    except ModelError as error:  # it knows what is wrong, not whose network it is
        raise type(error)(f"{whole.manifest.name}: {error.what}", error.remedy) from error


def _described(
    whole: Bundle, shown: Sequence[Shown], content: bytes, found: Agreement, made: Mapping[str, Any]
) -> Variant:
    digest = hashlib.sha256(content).hexdigest()
    return Variant(
        file=f"int8-{digest[:12]}.onnx",
        sha256=digest,
        bytes=len(content),
        max_batch=whole.manifest.model.max_batch,
        made_from=whole.manifest.model.sha256,
        agreement=found.share,
        judged=found.pictures,
        calibrated=len(shown[::2]),
        samples_sha256=_digest(shown, whole.manifest),
        runtime=f"onnxruntime {onnxruntime.__version__}",
        **made,
    )


def _write_feeds(work: Path, manifest: ExpertManifest, shown: Sequence[Shown], golden: Arrays) -> list[proof.Size]:
    """All pictures as graph inputs, prepared as the appliance prepares them, then the golden ones; the sizes of all.

    They go to the disk one by one: together they may be larger than memory.
    """
    extra = len(next(iter(golden.values()))) if golden else 0
    feeds = [
        np.lib.format.open_memmap(
            work / f"{number}.npy", "w+", np.float32, (len(shown) + extra, spec.channels, spec.size[1], spec.size[0])
        )
        for number, spec in enumerate(manifest.inputs)
    ]
    sizes = []
    for row, one in enumerate(shown):
        picture = proof.decoded(one.path.read_bytes())
        reference = proof.reference_of(one.path) if manifest.needs_reference else picture
        for spec, feed in zip(manifest.inputs, feeds, strict=True):
            feed[row] = proof.prepared([picture if spec.source == "picture" else reference], spec)[0]
        sizes.append((picture.shape[1], picture.shape[0]))
    for spec, feed in zip(manifest.inputs, feeds, strict=True):
        if extra:
            feed[len(shown) :] = golden[spec.name]
        feed.flush()
    first = manifest.inputs[0]
    return [*sizes, *[first.crop or first.size] * extra]


def _golden(whole: Bundle) -> Arrays:
    return {} if whole.golden_path is None else _answers(whole.golden_path)


def _answers(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _tolerance(whole: Bundle, golden: Arrays, found: Arrays) -> dict[str, float]:
    """By output, how far the variant may be off the golden samples, which are the last that were judged."""
    if whole.manifest.golden is None:
        return {}
    least = whole.manifest.golden.tolerance
    return {
        name: max(least, _SPARE * float(np.abs(found[name][-len(golden[name]) :] - golden[name]).max(initial=0.0)))
        for name in output_names(whole.manifest.head)
        if name in golden
    }


def _digest(shown: Sequence[Shown], manifest: ExpertManifest) -> str:
    digest = hashlib.sha256()
    for one in shown:
        digest.update(f"{one.fails}".encode())
        names = [one.path, *(proof.reference_paths(one.path) if manifest.needs_reference else ())]
        for path in names:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _picture_bytes(manifest: ExpertManifest) -> int:
    return sum(4 * spec.channels * spec.size[0] * spec.size[1] for spec in manifest.inputs)
