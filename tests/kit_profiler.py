"""The profiler of tests: how much it measures is no matter of time; and what it knows, kept and read again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from appliance.profiler.measure import measured
from appliance.profiler.measurements import Measured
from appliance.profiler.progress import Progress


@pytest.fixture(scope="module")
def few_samples() -> Iterator[None]:
    """One of each that counts, and time enough for children that wait for a processor to start: nobody waits for its
    end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("appliance.profiler.profiled.measured", partial(measured, repeats=1))
        patch.setattr("appliance.profiler.profiled._LEAST_MEASURING_SECONDS", 60.0)
        yield


def kept(found: Measured, folder: Path) -> Measured | None:
    """As who goes on after a kill knows it."""
    path = folder / "progress.json"
    Progress(path, measured=found).write()
    return Progress.read(path).measured
