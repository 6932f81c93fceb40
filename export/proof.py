"""Proves that an ONNX model gives the numbers, and leads to the decisions, that its maker's framework gave.

Knows samples, tolerances and ONNX Runtime; not where the expected outputs come from. Pictures are prepared and
outputs are judged by the appliance's own functions: a second version of them would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from appliance.catalog import ExpertManifest, InputSpec
from appliance.core.types import Finding, Refusal
from appliance.drivers import heads, images
from appliance.errors import ExportError
from export.manifest import Entry
from export.text import first_line

Feed = NDArray[np.float32]
Arrays = Mapping[str, Feed]
"""Graph inputs or outputs by name; the first dimension counts samples."""
Compute = Callable[[Arrays], Arrays]
"""From inputs to outputs."""
Size = tuple[int, int]
"""Width and height of a published picture."""

PROVIDER = "CPUExecutionProvider"
"""Every box has it, and it is the yardstick for the others."""

MAX_SAMPLES = 64
MAX_PICTURE_BYTES = 64 << 20
MAX_PICTURE_PIXELS = 64_000_000

_NOISE_SAMPLES = 2
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, slots=True)
class Samples:
    """Pictures as graph inputs, and the sizes that they were published in."""

    feeds: Arrays
    sizes: tuple[Size, ...]

    def batch(self, size: int) -> Samples:
        """So many samples, repeated from the start when there are fewer."""
        rows = [row % len(self.sizes) for row in range(size)]
        return Samples({name: array[rows] for name, array in self.feeds.items()}, tuple(self.sizes[r] for r in rows))


class NotTheSame(ExportError):
    """The converted model answers differently: in the tensor `output`, or in the `decision`, at this batch size."""

    reason = "export-parity"

    def __init__(self, expert: str, output: str, batch: int, found: str) -> None:
        super().__init__(
            f"{expert}: {output} differs at batch {batch}: {found}",
            "raise `tolerance` if the numbers are as they should be, or correct the network",
        )
        self.expert, self.output, self.batch = expert, output, batch


def read_samples(entry: Entry, root: Path) -> Samples:
    """The sample pictures as graph inputs, prepared as the appliance will prepare them."""
    if entry.samples is None:
        raise ExportError(f"{entry.name} names no samples", "give a folder of published pictures: samples = …")
    paths = spread(picture_files(root / entry.samples), MAX_SAMPLES)
    if not paths:
        raise ExportError(f"{root / entry.samples} holds no pictures", "put a few real published pictures there")
    pictures = [decoded(path.read_bytes()) for path in paths]
    references = [reference_of(path) for path in paths] if entry.draft.needs_reference else []
    feeds = {spec.name: prepared(pictures if spec.source == "picture" else references, spec) for spec in entry.inputs}
    return Samples(feeds, tuple((picture.shape[1], picture.shape[0]) for picture in pictures))


def picture_files(folder: Path) -> list[Path]:
    """The published pictures in a folder and in the folders in it, in the order of their names; no references."""
    return sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if _is_picture(path))


def spread(paths: Sequence[Path], most: int) -> list[Path]:
    """All of them, or so many evenly from all: folders in them may stand for what is true."""
    return list(paths) if len(paths) <= most else [paths[len(paths) * number // most] for number in range(most)]


def noise(entry: Entry) -> Samples:
    """Random pictures of the size that the expert takes: they prove that a model runs, not that it sees."""
    generator = np.random.default_rng(0)
    width, height = entry.inputs[0].crop or entry.inputs[0].size
    pictures = [generator.integers(256, size=(height, width, 3), dtype=np.uint8) for _ in range(_NOISE_SAMPLES)]
    feeds = {spec.name: prepared(pictures, spec) for spec in entry.inputs}
    return Samples(feeds, ((width, height),) * _NOISE_SAMPLES)


def reference_of(picture: Path) -> images.Picture:
    """What a published picture is compared with. Raises ExportError when there is none, or more than one."""
    beside = reference_paths(picture)
    if len(beside) != 1:
        raise ExportError(
            f"{picture} has {len(beside)} references, its expert compares with one",
            f"put {picture.stem}.reference.png beside it",
        )
    return decoded(beside[0].read_bytes())


def reference_paths(picture: Path) -> list[Path]:
    """The references that lie beside a picture."""
    return [path for path in picture.parent.glob(f"{picture.stem}.reference.*") if path.suffix.lower() in _SUFFIXES]


def decoded(payload: bytes) -> images.Picture:
    return images.decode(payload, max_bytes=MAX_PICTURE_BYTES, max_pixels=MAX_PICTURE_PIXELS)


def prepared(pictures: Sequence[images.Picture], spec: InputSpec) -> Feed:
    """Decoded pictures as one graph input (n, channels, height, width)."""
    return np.stack([images.prepare(picture, spec) for picture in pictures])


def prove(model: Path, entry: Entry, samples: Samples, expected: Compute) -> None:
    """Run batches of 1, 2 and the largest on the target runtime and compare. Raises NotTheSame or ExportError.

    Several sizes, because an exporter may fix a dimension to its example without a word.
    """
    session = open_session(model, entry.name)
    for size in sorted({1, min(2, entry.max_batch), entry.max_batch}):
        batch = samples.batch(size)
        compare(entry, batch, _run(session, entry, batch.feeds), expected(batch.feeds))


def open_session(model: Path, expert: str) -> onnxruntime.InferenceSession:
    """On the runtime that will serve it. Raises ExportError when that runtime refuses the opset, IR or an operator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=[PROVIDER])
    except Exception as error:  # ONNX Runtime's exceptions share no family below Exception
        raise ExportError(
            f"{expert}: ONNX Runtime {onnxruntime.__version__} refuses the model: {first_line(error)}",
            "export with an opset that it supports",
        ) from error
    if session.get_providers() != [PROVIDER]:  # it may fall back without a word
        raise ExportError(f"{expert}: asked for {PROVIDER}, got {', '.join(session.get_providers())}")
    return session


def compare(entry: Entry, samples: Samples, found: Arrays, expected: Arrays) -> None:
    """Numbers first, then what the head makes of them. Raises NotTheSame."""
    size = len(samples.sizes)
    for name in entry.output_names:
        _compare_numbers(entry, size, name, found[name], expected[name])
    ours, theirs = (decisions(entry.draft, outputs, samples.sizes) for outputs in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        if _decision(one) != _decision(other):
            raise NotTheSame(entry.name, "decision", size, f"{_decision(one)} instead of {_decision(other)}")


def decisions(manifest: ExpertManifest, outputs: Arrays, sizes: Sequence[Size]) -> list[tuple[Finding, ...]]:
    """The findings of each sample, by the appliance's own rules. Raises ExportError when the head does not fit."""
    found = []
    for answer in heads.findings(manifest, outputs, sizes):
        if isinstance(answer, Refusal):
            raise ExportError(f"{manifest.name}: {answer.detail}", "correct [head], or the network")
        found.append(answer)
    return found


def _run(session: onnxruntime.InferenceSession, entry: Entry, feeds: Arrays) -> Arrays:
    try:
        outputs = session.run(list(entry.output_names), dict(feeds))
    except Exception as error:  # as above
        size = len(next(iter(feeds.values())))
        raise ExportError(
            f"{entry.name}: batch {size} does not run: {first_line(error)}", "lower max_batch, or free the batch axis"
        ) from error
    return dict(zip(entry.output_names, outputs, strict=True))


def _compare_numbers(entry: Entry, size: int, name: str, found: Feed, expected: Feed) -> None:
    if found.shape != expected.shape:
        raise NotTheSame(entry.name, name, size, f"shape {found.shape} instead of {expected.shape}")
    if not np.isfinite(found).all():
        raise NotTheSame(entry.name, name, size, "not every number is finite")
    worst = float(np.abs(found - expected).max(initial=0.0))
    if worst > entry.tolerance:
        raise NotTheSame(entry.name, name, size, f"by {worst:.3g}, {entry.tolerance:.3g} is allowed")


def _decision(findings: Sequence[Finding]) -> list[tuple[str, bool]]:
    return sorted((finding.label, finding.fails) for finding in findings)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.stem.endswith(".reference")
