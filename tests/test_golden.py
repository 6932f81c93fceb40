from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from appliance.drivers import golden
from appliance.errors import GoldenMismatch, ModelError

PICTURES = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1)


def doubled(pictures: Sequence[NDArray[np.float32]]) -> list[NDArray[Any]]:
    return [pictures[0].reshape(-1, 1) * 2]


def prove(folder: Path, arrays: Mapping[str, NDArray[Any]], run: golden.Run = doubled, tolerance: float = 0.01) -> None:
    np.savez(folder / "golden.npz", allow_pickle=False, **arrays)
    golden.prove(run, folder / "golden.npz", ["image"], ["twice"], max_batch=2, tolerance=tolerance)


def test_samples_run_in_batches_that_the_expert_takes(tmp_path: Path) -> None:
    sizes = []

    def run(pictures: Sequence[NDArray[np.float32]]) -> list[NDArray[Any]]:
        sizes.append(len(pictures[0]))
        return doubled(pictures)

    prove(tmp_path, {"image": PICTURES, "twice": PICTURES.reshape(-1, 1) * 2}, run)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        (PICTURES.reshape(-1, 1) * 2 + 0.5, "output twice is 0.5 off golden.npz, allowed is 0.01"),
        (PICTURES.reshape(-1, 1) * np.nan, "output twice is nan off"),
        (PICTURES.reshape(-1, 1)[:4] * 2, r"output twice has shape \(5, 1\), golden.npz \(4, 1\)"),
    ],
)
def test_other_answers_than_the_samples_are_a_mismatch_that_says_how_far_off(
    tmp_path: Path, expected: NDArray[Any], said: str
) -> None:
    with pytest.raises(GoldenMismatch, match=said):
        prove(tmp_path, {"image": PICTURES, "twice": expected})


def test_rounding_is_allowed_as_far_as_the_bundle_says(tmp_path: Path) -> None:
    prove(tmp_path, {"image": PICTURES, "twice": PICTURES.reshape(-1, 1) * 2 + 0.5}, tolerance=0.5)


def test_outputs_without_samples_are_not_compared(tmp_path: Path) -> None:
    prove(tmp_path, {"image": PICTURES})


def test_samples_without_an_input_are_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no samples for the input image"):
        prove(tmp_path, {"twice": PICTURES})


@pytest.mark.parametrize("lone", [False, True])
def test_a_damaged_file_is_a_model_error(tmp_path: Path, lone: bool) -> None:
    path = tmp_path / "golden.npz"
    if lone:
        with path.open("wb") as file:
            np.save(file, PICTURES)
    else:
        path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ModelError, match=r"golden\.npz cannot be read"):
        golden.prove(doubled, path, ["image"], [], max_batch=1, tolerance=0)
