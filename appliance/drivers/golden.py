"""Golden samples: pictures, what an expert's original framework answered, and the proof that we answer the same.

They are asked twice of every expert: when it is compiled, and before its first batch in a process.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import GoldenMismatch, ModelError

Run = Callable[[Sequence[NDArray[np.float32]]], Sequence[NDArray[Any]]]
"""From prepared pictures (N, C, H, W) for each input to an array for each output."""
_EXPORT_AGAIN = "export the expert again"


def prove(
    run: Run,
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    max_batch: int,
    tolerance: float,
    tolerances: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Run the samples of a golden.npz, at most `max_batch` at a time; outputs that it does not have are not compared.

    Outputs that `tolerances` names may be as far off as it says, the others by `tolerance`.

    Raises GoldenMismatch naming the output and how far off it is, ModelError when the file cannot be read or has no
    samples for an input, and whatever `run` raises.
    """
    golden = _arrays(path)
    missing = [name for name in inputs if name not in golden]
    if missing:
        raise ModelError(f"{path.name} has no samples for the input {missing[0]}", _EXPORT_AGAIN)
    pictures = [np.ascontiguousarray(golden[name], np.float32) for name in inputs]
    results = [run([p[i : i + max_batch] for p in pictures]) for i in range(0, len(pictures[0]), max_batch)]
    for number, name in enumerate(outputs):
        if name in golden and results:
            found = np.concatenate([result[number] for result in results])
            _compare(name, found, golden[name], tolerances.get(name, tolerance))


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:  # TypeError: a lone array
        raise ModelError(f"{path.name} cannot be read: {error}", _EXPORT_AGAIN) from error


def _compare(name: str, found: NDArray[Any], expected: NDArray[Any], tolerance: float) -> None:
    if found.shape != expected.shape:
        raise GoldenMismatch(f"output {name} has shape {found.shape}, golden.npz {expected.shape}", _EXPORT_AGAIN)
    worst = float(np.max(np.abs(found.astype(np.float64) - expected), initial=0.0))
    if not worst <= tolerance:
        raise GoldenMismatch(f"output {name} is {worst:.3g} off golden.npz, allowed is {tolerance:.3g}", _EXPORT_AGAIN)
