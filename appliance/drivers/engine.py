"""One device's engine: the memory, sessions and loaders that bring experts to it, joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from appliance.core.types import Device, Event
from appliance.drivers.executors import LoaderLane
from appliance.drivers.place import Place, SegmentMemory
from appliance.drivers.residents import Residents
from appliance.drivers.sessions import Sessions
from appliance.drivers.store import Compiled


@dataclass(frozen=True, slots=True)
class Engine:
    memory: SegmentMemory
    sessions: Sessions
    residents: Residents
    loaders: LoaderLane

    @classmethod
    def on(
        cls,
        device: Device,
        compiled: Mapping[str, Compiled],
        memory: SegmentMemory,
        place: Place,
        report: Callable[[Event], None],
    ) -> Engine:
        assert device.activation_bytes is not None, "activations of a real device are bounded"
        sessions = Sessions(memory, place, activation_bytes=device.activation_bytes)
        residents = Residents(compiled, memory, sessions)
        return cls(
            memory,
            sessions,
            residents,
            LoaderLane(device.name, device.load_slots, residents.bring, report, residents.hurry),
        )
