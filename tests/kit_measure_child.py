"""The profiler's measuring child with a pretend GPU: `python -m tests.kit_measure_child`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from appliance import sandbox
from appliance.core.types import Device, Event
from appliance.engine.device_weights import DeviceWeights
from appliance.engine.engine import Engine
from appliance.profiler.measure_child import answer
from appliance.store.store import Compiled
from tests.kit_device import PretendAccelerator, PretendPlace


def open_pretend_gpu(
    device: Device,
    compiled: Mapping[str, Compiled],
    segment_path: Callable[[str], Path],
    report: Callable[[Event], None],
    *,
    host_bytes: int,
) -> Engine:
    """What `Engine.on_gpu` is to a real one."""
    memory = DeviceWeights(segment_path, PretendAccelerator(), device_bytes=device.budget_bytes, host_bytes=host_bytes)
    return Engine.on(device, compiled, memory, PretendPlace(), report)


if __name__ == "__main__":
    sandbox.serve(partial(answer, open_gpu=open_pretend_gpu))
