"""Registers an ONNX file of somebody else's: it is opened, and first run, only in a child process with limits."""

from __future__ import annotations

import hashlib
import stat
import tempfile
from pathlib import Path

import numpy as np

from appliance import sandbox
from appliance.errors import ExportError, ModelError
from export import proof
from export.bundle import SOURCE_KEY, Proven
from export.manifest import Entry
from export.proof import Arrays

MAX_MODEL_BYTES = 512 << 20
MEMORY_BYTES = 6 << 30
"""Address space, of which importing the runtime alone reserves 1 GB."""
SECONDS = 120.0


def register(entry: Entry, root: Path, *, seconds: float = SECONDS) -> Proven:
    """Check and run the file. Raises ModelError when it cannot serve, UnsafeModel when the child died of it.

    There is no original framework to compare with: the golden outputs are what this runtime computed today, and the
    proof is that batches give what single pictures give.
    """
    content = read_model(root / entry.source)
    samples = proof.read_samples(entry, root) if entry.samples is not None else proof.noise(entry)
    with tempfile.TemporaryDirectory() as folder:
        # A copy in an empty folder: the bytes that are checked are those that are kept, and have no neighbours.
        work = Path(folder)
        (work / "model.onnx").write_bytes(content)
        np.savez(work / "samples.npz", allow_pickle=False, **samples.feeds)
        try:
            reply = sandbox.run_limited(
                "export.examine", _request(entry, work), memory_bytes=MEMORY_BYTES, seconds=seconds
            )
        except ModelError as error:  # it knows what is wrong, not whose file it is
            raise type(error)(f"{entry.name} ({entry.source}): {error.what}", error.remedy) from error
        outputs = _read_outputs(work / "outputs.npz", entry)
    proof.decisions(entry.draft, outputs, samples.sizes)  # raises when the head does not fit the outputs
    return Proven(
        model=content,
        opset=int(reply["opset"]),
        ir_version=int(reply["ir_version"]),
        max_batch=int(reply["max_batch"]),
        golden={**samples.feeds, **outputs},
        provenance={"framework": f"ONNX, {reply['producer']}", SOURCE_KEY: hashlib.sha256(content).hexdigest()},
    )


def read_model(path: Path) -> bytes:
    """The bytes of a regular file under the size cap: a device or a pipe would never end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a regular file", "give the .onnx file itself")
        if not 0 < status.st_size <= MAX_MODEL_BYTES:
            raise ModelError(f"{path} has {status.st_size} bytes, 1 to {MAX_MODEL_BYTES} are accepted")
        return path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error


def _request(entry: Entry, work: Path) -> dict[str, object]:
    return {
        "folder": str(work),
        "inputs": {spec.name: [spec.channels, spec.size[1], spec.size[0]] for spec in entry.inputs},
        "outputs": list(entry.output_names),
        "max_batch": entry.max_batch,
        "tolerance": entry.tolerance,
    }


def _read_outputs(path: Path, entry: Entry) -> Arrays:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name].astype(np.float32) for name in entry.output_names}
