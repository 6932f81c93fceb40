"""What runs experts on a box: an engine for each device, the executors on them, and who obeys the controller there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from appliance.catalog import Bundle
from appliance.core.types import (
    Batch,
    CancelLoad,
    CancelRun,
    Device,
    Event,
    Evict,
    Executor,
    Finished,
    HurryLoad,
    Load,
    Run,
)
from appliance.drivers.images import Views
from appliance.drivers.runtime import CpuPlace
from appliance.engine import cuda
from appliance.engine.cancellation import Cancellation
from appliance.engine.device_weights import DeviceWeights
from appliance.engine.executors import Executors, Inspection, LoaderLane
from appliance.engine.place import Place, SegmentMemory
from appliance.engine.residents import Residents
from appliance.engine.sessions import Sessions
from appliance.engine.weights import Weights
from appliance.errors import OutOfMemory
from appliance.store.store import Compiled

Order = Load | CancelLoad | HurryLoad | Evict | Run | CancelRun
Tell = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Engine:
    """What brings experts to one device and runs them there."""

    device: Device
    memory: SegmentMemory
    sessions: Sessions
    residents: Residents
    loaders: LoaderLane

    @classmethod
    def on(
        cls, device: Device, compiled: Mapping[str, Compiled], memory: SegmentMemory, place: Place, report: Tell
    ) -> Engine:
        assert device.activation_bytes is not None, "activations of a real device are bounded"
        sessions = Sessions(memory, place, activation_bytes=device.activation_bytes)
        residents = Residents(compiled, memory, sessions)
        loaders = LoaderLane(device.name, device.load_slots, residents.bring, report, residents.hurry)
        return cls(device, memory, sessions, residents, loaders)

    @classmethod
    def in_main_memory(
        cls,
        device: Device,
        compiled: Mapping[str, Compiled],
        segment_path: Callable[[str], Path],
        report: Tell,
        *,
        threads: int = 1,
    ) -> Engine:
        """Of the processors, so many threads to a run."""
        memory = Weights(segment_path, budget_bytes=device.budget_bytes)
        return cls.on(device, compiled, memory, CpuPlace(threads), report)

    @classmethod
    def on_gpu(
        cls,
        device: Device,
        compiled: Mapping[str, Compiled],
        segment_path: Callable[[str], Path],
        report: Tell,
        *,
        host_bytes: int,
    ) -> Engine:
        """Of the GPU that the device is called by. Raises OutOfMemory or DeviceError, having taken nothing of it."""
        assert device.activation_bytes is not None, "activations of a real device are bounded"
        accelerator = cuda.CudaAccelerator(int(device.name.removeprefix("cuda:")))
        with ExitStack() as undo:
            undo.callback(accelerator.close)
            memory = DeviceWeights(segment_path, accelerator, device_bytes=device.budget_bytes, host_bytes=host_bytes)
            undo.pop_all()
        place = cuda.CudaPlace(accelerator.index, accelerator.compute_stream, device.activation_bytes)
        return cls.on(device, compiled, memory, place, report)


class Engines:
    """All engines of a box. What becomes of an order is told to `report`, from other threads."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        executors: Sequence[Executor],
        bundles: Mapping[str, Bundle],
        look: Callable[[str], Views],
        report: Tell,
        *,
        batch_cap: int | None = None,
        note: Callable[[int, bool], None] = lambda batch, runs: None,
    ) -> None:
        """`note` hears, by a batch's number, whether its expert runs now or its pictures are decoded."""
        self._engines = engines
        self._inspections = {
            name: Inspection(engine.device, engine.sessions, bundles, look, batch_cap=batch_cap, note=note)
            for name, engine in engines.items()
        }
        names = {executor.name: executor.device for executor in executors}
        self._executors = Executors(names, self._inspected, report)

    def memory(self, device: str) -> SegmentMemory:
        return self._engines[device].memory

    def obey(self, order: Order) -> None:
        """Begin it, and return at once; only evicting is done when this returns."""
        match order:
            case Load(device):
                self._engines[device].loaders.load(order)
            case CancelLoad(device, expert):
                self._engines[device].loaders.cancel(expert)
            case HurryLoad(device, expert):
                self._engines[device].loaders.hurry(expert)
            case Evict(device):
                self._engines[device].residents.evict(order)
            case Run(batch):
                self._executors.run(batch)
            case CancelRun(batch):
                self._executors.cancel(batch.id)
            case _:
                assert_never(order)

    def _inspected(self, batch: Batch, cancellation: Cancellation) -> Finished:
        try:
            return self._inspections[batch.device](batch, cancellation)
        except OutOfMemory:
            self.memory(batch.device).trim()  # for when it is tried once more
            raise

    def stop(self) -> None:
        """Give up what runs and loads; returns when nobody does any more."""
        self._executors.stop()
        for engine in self._engines.values():
            engine.loaders.stop()
